use proptest::prelude::*;

use super::*;

const PORTS: Ports = Ports { host: 1 << 30, guest: 7 };

fn packet(operation: Operation) -> Received {
    Received {
        source_cid: 3,
        destination_cid: 2,
        ports: PORTS,
        bytes: 0,
        kind: TYPE_STREAM,
        operation: Some(operation),
        flags: 0,
        buffer: 1 << 20,
        forwarded: 0,
    }
}

fn established() -> Connection {
    let mut connection = Connection::from_guest(&packet(Operation::Request));
    assert_eq!(connection.next_owed().unwrap().operation, Operation::Response);
    connection
}

fn data(bytes: u32) -> Received {
    Received { bytes, ..packet(Operation::Data) }
}

const BROKEN: Verdict = Verdict::End { reset: true };

#[test]
fn request_of_the_host_waits_for_its_response() {
    let mut connection = Connection::from_host(PORTS);
    assert!(connection.is_requested());
    assert_eq!(connection.next_owed().unwrap().operation, Operation::Request);
    assert_eq!(connection.next_owed(), None);
    assert_eq!(connection.budget(), 0);
    assert_eq!(connection.on_packet(&packet(Operation::Response)), Verdict::Noted);
    assert_eq!(connection.budget(), 1 << 20);
    assert_eq!(connection.on_packet(&packet(Operation::Response)), BROKEN);
}

#[test]
fn response_before_the_request_was_sent_is_refused() {
    let mut connection = Connection::from_host(PORTS);
    assert_eq!(connection.on_packet(&packet(Operation::Response)), BROKEN);
}

#[test]
fn anything_but_an_answer_to_a_request_is_refused() {
    for operation in [
        Operation::Request,
        Operation::Shutdown,
        Operation::Data,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ] {
        let mut connection = Connection::from_host(PORTS);
        connection.next_owed();
        assert_eq!(connection.on_packet(&packet(operation)), BROKEN);
    }
}

#[test]
fn credit_is_counted_to_the_byte() {
    let mut connection = established();
    assert_eq!(connection.on_packet(&data(BUFFER_BYTES)), Verdict::Deliver);
    assert_eq!(connection.clone().on_packet(&data(1)), BROKEN);
    // Space that the guest was not told of is not its to use.
    connection.on_forwarded(1);
    assert_eq!(connection.clone().on_packet(&data(1)), BROKEN);
    assert_eq!(connection.next_owed().unwrap().forwarded, 1);
    assert_eq!(connection.on_packet(&data(1)), Verdict::Deliver);
    assert_eq!(established().on_packet(&data(u32::MAX)), BROKEN);
}

#[test]
fn guest_that_lies_about_its_credit_gets_less_and_never_more() {
    let mut connection = established();
    connection.send_data(1000);
    for forwarded in [1001, u32::MAX, 1 << 31] {
        let update = Received { forwarded, buffer: 5000, ..packet(Operation::CreditUpdate) };
        assert_eq!(connection.on_packet(&update), Verdict::Noted);
        assert!(connection.budget() <= 5000);
    }
}

#[test]
fn credit_is_asked_for_once_until_it_comes() {
    let mut connection = established();
    connection.on_packet(&Received { buffer: 0, ..packet(Operation::CreditUpdate) });
    connection.on_blocked();
    assert_eq!(connection.next_owed().unwrap().operation, Operation::CreditRequest);
    connection.on_blocked();
    connection.on_packet(&Received { buffer: 0, ..packet(Operation::CreditUpdate) });
    connection.on_blocked();
    assert_eq!(connection.next_owed(), None);
    connection.on_packet(&packet(Operation::CreditUpdate));
    connection.on_blocked();
    assert_eq!(connection.next_owed().unwrap().operation, Operation::CreditRequest);
}

#[test]
fn data_after_the_guest_said_it_was_done_is_refused() {
    let mut connection = established();
    let end = Received { flags: SHUTDOWN_SEND, ..packet(Operation::Shutdown) };
    assert_eq!(connection.on_packet(&end), Verdict::Noted);
    assert!(connection.is_guest_end());
    assert_eq!(connection.on_packet(&data(1)), BROKEN);
}

#[test]
fn flags_beyond_the_specification_mean_nothing() {
    let mut connection = established();
    let odd = Received { flags: !SHUTDOWN_BOTH, ..packet(Operation::Shutdown) };
    assert_eq!(connection.on_packet(&odd), Verdict::Noted);
    assert!(!connection.is_guest_end() && !connection.is_guest_refusing());
}

#[test]
fn counters_that_wrap_go_on() {
    let mut connection = established();
    connection.received = u32::MAX - 10;
    connection.forwarded = u32::MAX - 10;
    connection.announced = u32::MAX - 10;
    connection.sent = u32::MAX - 5;
    connection.guest_forwarded = u32::MAX - 5;
    assert_eq!(
        connection.on_packet(&Received { forwarded: u32::MAX - 5, ..data(100) }),
        Verdict::Deliver
    );
    connection.on_forwarded(100);
    assert_eq!(connection.budget(), 1 << 20);
    connection.send_data(100);
    assert_eq!(connection.budget(), (1 << 20) - 100);
}

/// What can happen in the model below.
#[derive(Debug, Clone)]
enum Step {
    GuestWrites(u16),
    GuestReads(u16),
    GuestEnds(u8),
    HostTakes(u16),
    HostWrites(u16),
    HostEnds,
    HostRefuses,
    /// That many packets of ours reach the guest.
    Receive(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => any::<u16>().prop_map(Step::GuestWrites),
        4 => any::<u16>().prop_map(Step::GuestReads),
        1 => (1_u8..4).prop_map(Step::GuestEnds),
        6 => any::<u16>().prop_map(Step::HostTakes),
        6 => any::<u16>().prop_map(Step::HostWrites),
        1 => Just(Step::HostEnds),
        1 => Just(Step::HostRefuses),
        8 => any::<u8>().prop_map(Step::Receive),
    ];
    proptest::collection::vec(step, 0..200)
}

const GUEST_BUFFER: u64 = 100_000;

/// A guest that keeps the rules and a host behind the machine, as plain 64-bit counts.
#[derive(Debug)]
struct Model {
    machine: Connection,
    // From the guest to the host.
    guest_sent: u64,
    host_took: u64,
    /// What the guest knows of our credit: buffer and forwarded.
    known_forwarded: u64,
    guest_ended: u32,
    // From the host to the guest.
    host_wrote: u64,
    guest_got: u64,
    guest_read: u64,
    host_ended: bool,
    host_refused: bool,
    told: u32,
    over: bool,
}

impl Model {
    fn new() -> Self {
        let request = Received { buffer: GUEST_BUFFER as u32, ..packet(Operation::Request) };
        Self {
            machine: Connection::from_guest(&request),
            guest_sent: 0,
            host_took: 0,
            known_forwarded: 0,
            guest_ended: 0,
            host_wrote: 0,
            guest_got: 0,
            guest_read: 0,
            host_ended: false,
            host_refused: false,
            told: 0,
            over: false,
        }
    }

    fn guest_sends(&mut self, operation: Operation, bytes: u32, flags: u32) -> Verdict {
        self.machine.on_packet(&Received {
            bytes,
            flags,
            buffer: GUEST_BUFFER as u32,
            forwarded: self.guest_read as u32,
            ..packet(operation)
        })
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::GuestWrites(bytes) => {
                let room = u64::from(BUFFER_BYTES) - (self.guest_sent - self.known_forwarded);
                let bytes = room.min(u64::from(bytes) * 4);
                if self.guest_ended & SHUTDOWN_SEND != 0 || bytes == 0 {
                    return;
                }
                self.guest_sent += bytes;
                assert_eq!(self.guest_sends(Operation::Data, bytes as u32, 0), Verdict::Deliver);
                if self.machine.is_discarding() {
                    self.machine.on_forwarded(bytes as u32);
                    self.host_took += bytes;
                }
            }
            Step::GuestReads(bytes) => {
                let bytes = u64::from(bytes).min(self.guest_got - self.guest_read);
                self.guest_read += bytes;
                assert_eq!(self.guest_sends(Operation::CreditUpdate, 0, 0), Verdict::Noted);
            }
            Step::GuestEnds(flags) => {
                self.guest_ended |= u32::from(flags);
                let verdict = self.guest_sends(Operation::Shutdown, 0, u32::from(flags));
                self.over = verdict == BROKEN;
                let to_guest = self.guest_ended & SHUTDOWN_RECEIVE | self.told & SHUTDOWN_SEND;
                let to_host = self.guest_ended & SHUTDOWN_SEND;
                assert_eq!(self.over, to_guest != 0 && to_host != 0);
            }
            Step::HostTakes(bytes) => {
                let bytes = u64::from(bytes).min(self.guest_sent - self.host_took);
                self.host_took += bytes;
                self.machine.on_forwarded(bytes as u32);
            }
            Step::HostWrites(bytes) if !self.host_ended => self.host_wrote += u64::from(bytes),
            Step::HostWrites(_) => {}
            Step::HostEnds => self.host_ended = true,
            Step::HostRefuses => {
                self.host_refused = true;
                self.machine.on_host_refuses();
                let rest = self.guest_sent - self.host_took;
                self.host_took += rest;
                self.machine.on_forwarded(rest as u32);
            }
            Step::Receive(packets) => {
                for _ in 0..packets {
                    if self.over || !self.receive() {
                        return;
                    }
                }
            }
        }
    }

    /// One packet reaches the guest, as the driver would make it.
    fn receive(&mut self) -> bool {
        let packet = match self.machine.next_owed() {
            Some(packet) => packet,
            None => {
                let waiting = self.host_wrote - self.guest_got;
                let bytes = u64::from(self.machine.budget()).min(waiting).min(4000);
                if bytes > 0 {
                    self.machine.send_data(bytes as u32)
                } else if waiting == 0 && self.host_ended && !self.machine.is_host_read_over() {
                    self.machine.on_host_end();
                    match self.machine.next_owed() {
                        Some(packet) => packet,
                        None => return false,
                    }
                } else {
                    return false;
                }
            }
        };
        assert_eq!(packet.forwarded, self.host_took as u32);
        self.known_forwarded = self.host_took;
        match packet.operation {
            Operation::Data => {
                self.guest_got += u64::from(packet.bytes);
                assert_eq!(self.guest_ended & SHUTDOWN_RECEIVE, 0, "data that is not wanted");
                assert_eq!(self.told & SHUTDOWN_SEND, 0, "data after the end");
                assert!(self.guest_got - self.guest_read <= GUEST_BUFFER, "credit overrun");
                assert!(self.guest_got <= self.host_wrote);
            }
            Operation::Shutdown => {
                assert_ne!(packet.flags, self.told, "told twice");
                self.told = packet.flags;
                if self.told & SHUTDOWN_SEND != 0 {
                    assert_eq!(self.guest_got, self.host_wrote, "the end came before the data");
                }
                self.over = self.machine.is_over();
            }
            _ => {}
        }
        true
    }

    /// Everybody reads all and closes: then it has to end.
    fn finish(&mut self) {
        for _ in 0..100 {
            if self.over {
                return;
            }
            self.step(&Step::HostTakes(u16::MAX));
            self.step(&Step::HostEnds);
            self.step(&Step::Receive(u8::MAX));
            if !self.over {
                self.step(&Step::GuestReads(u16::MAX));
            }
        }
        if self.guest_ended & SHUTDOWN_RECEIVE == 0 {
            assert_eq!(self.guest_got, self.host_wrote, "data was lost");
            assert_ne!(self.told & SHUTDOWN_SEND, 0, "the end was not told");
        }
        assert_eq!(self.host_took, self.guest_sent, "data was lost");
        self.step(&Step::GuestEnds(SHUTDOWN_BOTH as u8));
        assert!(self.over);
    }
}

proptest! {
    #[test]
    fn rules_hold_whatever_the_order(steps in steps()) {
        let mut model = Model::new();
        for step in &steps {
            if model.over {
                break;
            }
            model.step(step);
        }
        model.finish();
    }

    #[test]
    fn any_packet_is_survived(
        packets in proptest::collection::vec(
            (0_u8..8, any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>()), 0..64
        ),
        from_host in any::<bool>(),
    ) {
        let mut connection = match from_host {
            true => Connection::from_host(PORTS),
            false => Connection::from_guest(&packet(Operation::Request)),
        };
        let operations = [
            Operation::Response, Operation::Data, Operation::Shutdown, Operation::CreditUpdate,
            Operation::CreditRequest, Operation::Request, Operation::Reset,
        ];
        for (operation, bytes, flags, buffer, forwarded) in packets {
            connection.next_owed();
            let received = Received {
                operation: operations.get(usize::from(operation)).copied(),
                bytes, flags, buffer, forwarded, ..packet(Operation::Data)
            };
            match connection.on_packet(&received) {
                Verdict::Deliver => {
                    prop_assert!(bytes <= BUFFER_BYTES);
                    connection.on_forwarded(bytes);
                }
                Verdict::Noted => {}
                Verdict::End { .. } => break,
            }
            let budget = connection.budget();
            prop_assert!(budget <= buffer);
            connection.send_data(budget.min(100));
        }
    }
}
