use std::sync::Mutex;

use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::super::packet::tests::GuestHeader;
use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::{ConnectError, MAX_QUEUED, Vsock, VsockConnector, VsockError};
use super::*;
use crate::devices::testing::{BUFFERS, Bench, RAM_BYTES, WRITE, drain, ram, socket_pair};
use crate::virtio::VirtioDevice;

const CID: u32 = 3;
const PORT: u32 = 1024;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const RECEIVE_BUFFERS: u64 = BUFFERS + (16 << 20);
const RECEIVE_BYTES: u32 = 8192;

type Accepted = Arc<Mutex<Vec<(u32, OwnedFd)>>>;

/// A guest's driver.
struct Guest {
    bench: Bench,
    connector: VsockConnector,
    device: Vsock,
    accepted: Accepted,
    /// The address of each receive buffer, by its chain's head.
    buffers: HashMap<u16, u64>,
    next_buffer: u64,
}

/// A packet that the guest got.
#[derive(Debug)]
struct Got {
    host_port: u32,
    guest_port: u32,
    code: u16,
    kind: u16,
    flags: u32,
    buffer: u32,
    forwarded: u32,
    data: Vec<u8>,
}

fn device() -> (Vsock, VsockConnector, Accepted) {
    let accepted = Accepted::default();
    let sink = Arc::clone(&accepted);
    let on_connect = Box::new(move |port, socket| sink.lock().unwrap().push((port, socket)));
    let (device, connector) = Vsock::new(CID, vec![PORT], on_connect).unwrap();
    (device, connector, accepted)
}

impl Guest {
    fn new(receive_buffers: usize) -> Self {
        let (mut device, connector, accepted) = device();
        let bench = Bench::activate(&mut device, &ram());
        let mut guest = Self {
            bench,
            connector,
            device,
            accepted,
            buffers: HashMap::new(),
            next_buffer: RECEIVE_BUFFERS,
        };
        guest.bench.settle();
        guest.offer(receive_buffers);
        guest
    }

    fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let address = self.next_buffer;
            self.next_buffer += u64::from(RECEIVE_BYTES);
            let head = self.bench.queues[0].offer(&[(address, RECEIVE_BYTES, WRITE)]);
            self.buffers.insert(head, address);
        }
        self.bench.kick(0);
    }

    fn header(&self, host_port: u32, guest_port: u32, code: u16) -> GuestHeader {
        GuestHeader {
            source_cid: u64::from(CID),
            destination_cid: 2,
            guest_port,
            host_port,
            bytes: 0,
            kind: 1,
            code,
            flags: 0,
            buffer: 1 << 20,
            forwarded: 0,
        }
    }

    fn send(&mut self, header: GuestHeader, data: &[u8]) {
        let header = GuestHeader { bytes: data.len() as u32, ..header };
        self.bench.write(BUFFERS, &header.encode());
        self.bench.write(BUFFERS + 64, data);
        let chain = [(BUFFERS, 44, 0), (BUFFERS + 64, data.len() as u32, 0)];
        let chain = if data.is_empty() { &chain[..1] } else { &chain };
        assert_eq!(self.bench.request(1, chain), Some(0));
    }

    /// Has the receive buffers used up by answers to nothing.
    fn leave_no_receive_buffer(&mut self) {
        while !self.buffers.is_empty() {
            self.send(self.header(PORT + 9, 1, DATA), &[]);
            let (head, _) = self.bench.queues[0].take_used().unwrap();
            self.buffers.remove(&head);
        }
    }

    /// The next packet; its buffer is offered again.
    fn receive(&mut self) -> Option<Got> {
        self.bench.settle();
        let (head, bytes) = self.bench.queues[0].take_used()?;
        let address = self.buffers.remove(&head).unwrap();
        let packet = self.bench.read(address, bytes as usize);
        let field = |at: usize| u32::from_le_bytes(packet[at..at + 4].try_into().unwrap());
        assert_eq!(packet[..16], [2, 0, 0, 0, 0, 0, 0, 0, CID as u8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(field(24) + 44, bytes);
        let got = Got {
            host_port: field(16),
            guest_port: field(20),
            code: (field(28) >> 16) as u16,
            kind: field(28) as u16,
            flags: field(32),
            buffer: field(36),
            forwarded: field(40),
            data: packet[44..].to_vec(),
        };
        let head = self.bench.queues[0].offer(&[(address, RECEIVE_BYTES, WRITE)]);
        self.buffers.insert(head, address);
        self.bench.kick(0);
        Some(got)
    }

    fn expect(&mut self, code: u16) -> Got {
        let got = self.receive().unwrap_or_else(|| panic!("no packet, {code} was expected"));
        assert_eq!(got.code, code, "{got:?}");
        got
    }

    /// A connection from the host to guest port 7, answered. Returns our end and the host's port.
    fn connect_from_host(&mut self, buffer: u32) -> (OwnedFd, u32) {
        let (host, theirs) = socket_pair();
        self.connector.connect(7, theirs).unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.guest_port, 7);
        assert!(request.host_port >= FIRST_HOST_PORT);
        let header = self.header(request.host_port, 7, RESPONSE);
        self.send(GuestHeader { buffer, ..header }, &[]);
        (host, request.host_port)
    }

    fn connect_from_guest(&mut self, guest_port: u32) -> OwnedFd {
        self.send(self.header(PORT, guest_port, REQUEST), &[]);
        let response = self.expect(RESPONSE);
        assert_eq!((response.host_port, response.guest_port), (PORT, guest_port));
        let sizes = [BUFFER_BYTES, SMALL_BUFFER_BYTES];
        assert!(sizes.contains(&response.buffer), "{response:?}");
        let (port, socket) = self.accepted.lock().unwrap().pop().unwrap();
        assert_eq!(port, PORT);
        rustix::io::ioctl_fionbio(&socket, true).unwrap();
        socket
    }
}

fn write(socket: &OwnedFd, data: &[u8]) -> usize {
    send(socket, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).unwrap_or(0)
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index * 31 + index / 251) as u8).collect()
}

#[test]
fn reserved_context_ids_are_refused() {
    for cid in [0, 1, 2, u32::MAX] {
        let made = Vsock::new(cid, vec![], Box::new(|_, _| {}));
        assert!(matches!(made, Err(VsockError::ReservedCid(refused)) if refused == cid));
    }
    let (device, _, _) = device();
    assert_eq!(device.config(), [3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn host_connects_and_both_sides_talk() {
    let mut guest = Guest::new(16);
    let (host, port) = guest.connect_from_host(1 << 20);
    write(&host, b"to the guest");
    let got = guest.expect(DATA);
    assert_eq!((got.host_port, got.guest_port), (port, 7));
    assert_eq!(got.data, b"to the guest");
    guest.send(guest.header(port, 7, DATA), b"to the host");
    assert_eq!(drain(&host), (b"to the host".to_vec(), false));
    assert!(guest.receive().is_none());
}

#[test]
fn connection_waits_for_the_driver() {
    let (mut device, connector, accepted) = device();
    let (host, theirs) = socket_pair();
    connector.connect(9, theirs).unwrap();
    let bench = Bench::activate(&mut device, &ram());
    let next_buffer = RECEIVE_BUFFERS;
    let buffers = HashMap::new();
    let mut guest = Guest { bench, connector, device, accepted, buffers, next_buffer };
    guest.bench.settle();
    guest.offer(4);
    assert_eq!(guest.expect(REQUEST).guest_port, 9);
    assert_eq!(drain(&host), (vec![], false));
}

#[test]
fn connections_beyond_the_queue_are_refused() {
    let (_device, connector, _) = device();
    for _ in 0..MAX_QUEUED {
        connector.connect(1, socket_pair().0).unwrap();
    }
    let refused = connector.connect(1, socket_pair().0);
    assert!(matches!(refused, Err(ConnectError::Full { port: 1 })));
}

#[test]
fn guest_that_refuses_ends_the_stream() {
    let mut guest = Guest::new(4);
    let (host, theirs) = socket_pair();
    guest.connector.connect(7, theirs).unwrap();
    let request = guest.expect(REQUEST);
    guest.send(guest.header(request.host_port, 7, RESET), &[]);
    assert_eq!(drain(&host), (vec![], true));
}

#[test]
fn host_that_gives_up_before_the_answer_resets() {
    let mut guest = Guest::new(4);
    let (host, theirs) = socket_pair();
    guest.connector.connect(7, theirs).unwrap();
    let request = guest.expect(REQUEST);
    drop(host);
    assert_eq!(guest.expect(RESET).host_port, request.host_port);
    guest.send(guest.header(request.host_port, 7, RESPONSE), &[]);
    guest.expect(RESET);
}

#[test]
fn guest_connects_to_allowed_ports_only() {
    let mut guest = Guest::new(4);
    let host = guest.connect_from_guest(5000);
    guest.send(guest.header(PORT, 5000, DATA), b"hi");
    assert_eq!(drain(&host).0, b"hi");
    guest.send(guest.header(PORT + 1, 5000, REQUEST), &[]);
    let refused = guest.expect(RESET);
    assert_eq!((refused.host_port, refused.guest_port), (PORT + 1, 5000));
    assert!(guest.accepted.lock().unwrap().is_empty());
}

#[test]
fn stream_of_the_guest_arrives_whole_within_the_credit() {
    let mut guest = Guest::new(64);
    let host = guest.connect_from_guest(5000);
    let data = pattern(8 << 20);
    let (mut sent, mut forwarded) = (0, 0_u32);
    let mut arrived = Vec::new();
    for round in 0.. {
        let room = BUFFER_BYTES - (sent as u32 - forwarded);
        let piece = (room as usize).min(64 << 10).min(data.len() - sent);
        if piece > 0 {
            guest.send(guest.header(PORT, 5000, DATA), &data[sent..sent + piece]);
            sent += piece;
        }
        // The host reads only now and then.
        if round % 7 == 0 || piece == 0 {
            arrived.extend(drain(&host).0);
        }
        while let Some(got) = guest.receive() {
            assert_eq!(got.code, CREDIT_UPDATE);
            forwarded = got.forwarded;
        }
        if arrived.len() == data.len() {
            break;
        }
        assert!(round < 10_000, "{sent} sent, {} arrived", arrived.len());
    }
    assert!(arrived == data);
}

#[test]
fn stream_of_the_host_arrives_whole_within_the_credit() {
    const GUEST_BUFFER: u32 = 10_000;
    let mut guest = Guest::new(3);
    let (host, port) = guest.connect_from_host(GUEST_BUFFER);
    let data = pattern(1 << 20);
    let (mut written, mut arrived, mut taken) = (0, Vec::new(), 0_u32);
    while arrived.len() < data.len() {
        written += write(&host, &data[written..data.len().min(written + 100_000)]);
        let before = arrived.len();
        while let Some(got) = guest.receive() {
            if got.code != CREDIT_REQUEST {
                assert_eq!(got.code, DATA);
                arrived.extend(got.data);
            }
            assert!(arrived.len() as u32 - taken <= GUEST_BUFFER, "credit overrun");
        }
        assert!(arrived.len() > before);
        taken = arrived.len() as u32;
        let update = guest.header(port, 7, CREDIT_UPDATE);
        guest.send(GuestHeader { buffer: GUEST_BUFFER, forwarded: taken, ..update }, &[]);
    }
    assert!(arrived == data);
}

#[test]
fn guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::new(1);
    let host = guest.connect_from_guest(5000);
    // Without room in the receive queue the guest is told of no new space.
    assert!(guest.bench.queues[0].take_used().is_none());
    guest.leave_no_receive_buffer();
    let data = pattern(BUFFER_BYTES as usize);
    for piece in data.chunks(64 << 10) {
        guest.send(guest.header(PORT, 5000, DATA), piece);
    }
    let (mut arrived, ended) = drain(&host);
    assert!(!ended);
    guest.bench.settle();
    guest.send(guest.header(PORT, 5000, DATA), b"!");
    guest.offer(1);
    guest.expect(RESET);
    arrived.extend(drain(&host).0);
    guest.bench.settle();
    assert!(arrived == data);
    assert_eq!(drain(&host), (vec![], true));
    assert!(!guest.bench.fault.is_reported());
}

#[test]
fn half_close_of_the_host_reaches_the_guest_after_the_data() {
    let mut guest = Guest::new(8);
    let (host, port) = guest.connect_from_host(1 << 20);
    write(&host, b"last words");
    shutdown(&host, Shutdown::Write).unwrap();
    assert_eq!(guest.expect(DATA).data, b"last words");
    assert_eq!(guest.expect(SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(guest.header(port, 7, DATA), b"still here");
    assert_eq!(drain(&host), (b"still here".to_vec(), false));
    let end = guest.header(port, 7, SHUTDOWN);
    guest.send(GuestHeader { flags: SHUTDOWN_SEND, ..end }, &[]);
    assert_eq!(drain(&host), (vec![], true));
    guest.expect(RESET);
    assert!(guest.receive().is_none());
}

#[test]
fn half_close_of_the_guest_reaches_the_host_after_the_data() {
    let mut guest = Guest::new(8);
    let host = guest.connect_from_guest(5000);
    let data = pattern(BUFFER_BYTES as usize);
    for piece in data.chunks(64 << 10) {
        guest.send(guest.header(PORT, 5000, DATA), piece);
    }
    let end = guest.header(PORT, 5000, SHUTDOWN);
    guest.send(GuestHeader { flags: SHUTDOWN_SEND, ..end }, &[]);
    let mut arrived = Vec::new();
    loop {
        let (piece, ended) = drain(&host);
        arrived.extend(piece);
        guest.bench.settle();
        if ended {
            break;
        }
        assert!(arrived.len() < data.len() || !ended);
    }
    assert!(arrived == data);
    while let Some(got) = guest.receive() {
        assert_eq!(got.code, CREDIT_UPDATE);
    }
    write(&host, b"answer");
    assert_eq!(guest.expect(DATA).data, b"answer");
}

#[test]
fn close_of_the_guest_is_confirmed_and_the_host_gets_all_data() {
    let mut guest = Guest::new(8);
    let host = guest.connect_from_guest(5000);
    let data = pattern(BUFFER_BYTES as usize);
    for piece in data.chunks(64 << 10) {
        guest.send(guest.header(PORT, 5000, DATA), piece);
    }
    // The guest never reads this; the host must not see an error for it.
    write(&host, b"unread");
    let end = guest.header(PORT, 5000, SHUTDOWN);
    guest.send(GuestHeader { flags: SHUTDOWN_BOTH, ..end }, &[]);
    let mut codes = Vec::new();
    while let Some(got) = guest.receive() {
        codes.push(got.code);
    }
    assert_eq!(codes.last(), Some(&RESET), "{codes:?}");
    let mut arrived = Vec::<u8>::new();
    for _ in 0..1000 {
        let mut piece = vec![0; 10_000];
        match rustix::io::read(&host, &mut piece[..]) {
            Ok(0) => break,
            Ok(bytes) => arrived.extend(&piece[..bytes]),
            Err(rustix::io::Errno::AGAIN) => guest.bench.settle(),
            Err(error) => panic!("the host saw {error}"),
        }
    }
    assert!(arrived == data, "{} of {}", arrived.len(), data.len());
    // The same ports can be used again.
    let _again = guest.connect_from_guest(5000);
}

#[test]
fn close_of_the_host_shuts_both_directions_down() {
    let mut guest = Guest::new(8);
    let (host, port) = guest.connect_from_host(1 << 20);
    write(&host, b"bye");
    drop(host);
    assert_eq!(guest.expect(DATA).data, b"bye");
    let mut flags = 0;
    while let Some(got) = guest.receive() {
        assert_eq!(got.code, SHUTDOWN);
        flags = got.flags;
    }
    assert_eq!(flags, SHUTDOWN_BOTH);
    // What was on its way is thrown away.
    guest.send(guest.header(port, 7, DATA), b"too late");
    guest.send(guest.header(port, 7, RESET), &[]);
    assert!(guest.receive().is_none());
    guest.send(guest.header(port, 7, DATA), b"gone");
    guest.expect(RESET);
}

#[test]
fn close_of_the_host_without_credit_does_not_spin() {
    let mut guest = Guest::new(8);
    let (host, port) = guest.connect_from_host(0);
    write(&host, b"waits for credit");
    drop(host);
    let mut codes = Vec::new();
    while let Some(got) = guest.receive() {
        codes.push((got.code, got.flags));
    }
    assert!(codes.contains(&(SHUTDOWN, SHUTDOWN_RECEIVE)), "{codes:?}");
    guest.send(guest.header(port, 7, CREDIT_UPDATE), &[]);
    assert_eq!(guest.expect(DATA).data, b"waits for credit");
    assert_eq!(guest.expect(SHUTDOWN).flags, SHUTDOWN_BOTH);
}

#[test]
fn guest_without_receive_buffers_does_not_make_the_worker_spin() {
    let mut guest = Guest::new(1);
    let (host, _) = guest.connect_from_host(1 << 20);
    // One buffer is there. Then none.
    guest.bench.settle();
    let data = pattern(100_000);
    let written = write(&host, &data);
    let mut arrived = Vec::new();
    while let Some(got) = guest.receive() {
        arrived.extend(got.data);
    }
    assert!(arrived == data[..written]);
}

#[test]
fn packets_of_other_ends_are_dropped() {
    let mut guest = Guest::new(4);
    let header = guest.header(PORT, 5000, REQUEST);
    guest.send(GuestHeader { source_cid: 4, ..header }, &[]);
    guest.send(GuestHeader { source_cid: 3 | 1 << 32, ..header }, &[]);
    guest.send(GuestHeader { destination_cid: 1, ..header }, &[]);
    guest.send(GuestHeader { destination_cid: 2 | 1 << 40, ..header }, &[]);
    assert!(guest.receive().is_none());
    assert!(guest.accepted.lock().unwrap().is_empty());
}

#[test]
fn packets_without_a_connection_are_reset() {
    let mut guest = Guest::new(4);
    for code in [0, RESPONSE, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(guest.header(PORT, 5000, code), b"x");
        guest.expect(RESET);
    }
    guest.send(guest.header(PORT, 5000, RESET), &[]);
    let seqpacket = GuestHeader { kind: 2, ..guest.header(PORT, 5000, REQUEST) };
    guest.send(seqpacket, &[]);
    assert_eq!(guest.expect(RESET).kind, 2);
    assert!(guest.receive().is_none());
}

#[test]
fn request_on_a_connection_resets_it() {
    let mut guest = Guest::new(4);
    let host = guest.connect_from_guest(5000);
    guest.send(guest.header(PORT, 5000, REQUEST), &[]);
    guest.expect(RESET);
    assert_eq!(drain(&host), (vec![], true));
}

#[test]
fn flood_of_packets_without_a_connection_is_bounded() {
    let mut guest = Guest::new(0);
    for _ in 0..MAX_RESETS {
        guest.send(guest.header(PORT, 5000, DATA), &[]);
    }
    let header = GuestHeader { bytes: 0, ..guest.header(PORT, 5000, DATA) };
    guest.bench.write(BUFFERS, &header.encode());
    // No answer, since there is no room for one.
    assert_eq!(guest.bench.request(1, &[(BUFFERS, 44, 0)]), None);
    guest.offer(200);
    assert!(guest.bench.queues[1].take_used().is_some());
    let mut resets = 0;
    while guest.receive().is_some() {
        resets += 1;
    }
    assert_eq!(resets, MAX_RESETS + 1);
}

#[test]
fn connections_beyond_the_limit_are_reset() {
    let mut guest = Guest::new(64);
    let mut sockets = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        sockets.push(guest.connect_from_guest(port));
    }
    guest.send(guest.header(PORT, 5000, REQUEST), &[]);
    guest.expect(RESET);
    // One that the host has closed makes room, though the guest does not confirm.
    drop(sockets.pop());
    let shutdown = guest.expect(SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
    guest.send(guest.header(PORT, 5000, REQUEST), &[]);
    let mut codes = vec![guest.receive().unwrap().code, guest.receive().unwrap().code];
    codes.sort_unstable();
    assert_eq!(codes, [RESPONSE, RESET]);
}

#[test]
fn guest_that_fills_all_connections_is_bounded_over_all_of_them() {
    let mut guest = Guest::new(16);
    let mut sockets = Vec::new();
    let mut promised = 0;
    for port in 0..MAX_CONNECTIONS as u32 {
        guest.send(guest.header(PORT, port, REQUEST), &[]);
        let room = guest.expect(RESPONSE).buffer;
        promised += room as usize;
        assert_eq!(room == BUFFER_BYTES, sockets.len() < WHOLE_BUFFERS, "{port}");
        sockets.push(guest.accepted.lock().unwrap().pop().unwrap());
    }
    assert!(promised <= MAX_BACKLOG_BYTES, "{promised}");
    // Nobody reads: the host's socket takes some, the rest is kept, and one byte beyond the
    // promise ends the connection.
    let port = MAX_CONNECTIONS as u32 - 1;
    let mut accepted = 0;
    let ended = loop {
        guest.send(guest.header(PORT, port, DATA), &pattern(1024));
        match guest.receive() {
            None | Some(Got { code: CREDIT_UPDATE, .. }) => accepted += 1024,
            Some(got) => break got,
        }
        assert!(accepted < 64 << 20, "no end to what is taken");
    };
    assert_eq!(ended.code, RESET);
    // A connection that ends gives its whole buffer to the next.
    guest.send(guest.header(PORT, 0, RESET), &[]);
    guest.send(guest.header(PORT, 5000, REQUEST), &[]);
    assert_eq!(guest.expect(RESPONSE).buffer, BUFFER_BYTES);
}

#[test]
fn one_connection_that_floods_leaves_turns_to_the_others() {
    let mut guest = Guest::new(2);
    let (flooding, _) = guest.connect_from_host(1 << 30);
    let (quiet, quiet_port) = guest.connect_from_host(1 << 30);
    write(&flooding, &pattern(150_000));
    write(&quiet, b"ping");
    let mut before = 0;
    while guest.expect(DATA).host_port != quiet_port {
        before += 1;
    }
    assert!(before <= 4, "{before} packets came first");
}

#[test]
fn malformed_chains_break_the_device_and_end_the_connections() {
    let cases = [
        (1, vec![(BUFFERS, 43, 0)]),
        (1, vec![(BUFFERS, 44, WRITE)]),
        (1, vec![(BUFFERS, 44, 0), (RAM_BYTES as u64, 8, 0)]),
        (0, vec![(BUFFERS, 44, WRITE)]),
        (0, vec![(BUFFERS, 8192, 0)]),
    ];
    for (queue, chain) in cases {
        let mut guest = Guest::new(if queue == 0 { 1 } else { 4 });
        let (host, _) = guest.connect_from_host(1 << 20);
        if queue == 0 {
            write(&host, &pattern(RECEIVE_BYTES as usize));
            guest.bench.settle();
        }
        guest.bench.queues[queue].offer(&chain);
        guest.bench.kick(queue);
        if queue == 0 {
            write(&host, b"more");
            guest.bench.settle();
        }
        assert!(guest.bench.fault.is_reported(), "{chain:?}");
        assert!(drain(&host).1);
        let (later, theirs) = socket_pair();
        guest.connector.connect(7, theirs).unwrap();
        guest.bench.kick(0);
        assert_eq!(drain(&later), (vec![], true));
    }
}

#[test]
fn header_that_claims_more_data_than_its_chain_has_breaks_the_device() {
    let mut guest = Guest::new(4);
    let header = GuestHeader { bytes: 9, ..guest.header(PORT, 5000, DATA) };
    guest.bench.write(BUFFERS, &header.encode());
    guest.bench.queues[1].offer(&[(BUFFERS, 44, 0), (BUFFERS + 64, 8, 0)]);
    guest.bench.kick(1);
    assert!(guest.bench.fault.is_reported());
}

#[test]
fn reset_drops_all_and_activation_starts_clean() {
    let mut guest = Guest::new(4);
    let (host, _) = guest.connect_from_host(1 << 20);
    let Guest { bench, connector, mut device, accepted, .. } = guest;
    bench.reset();
    assert_eq!(drain(&host), (vec![], true));
    let bench = Bench::activate(&mut device, &ram());
    let next_buffer = RECEIVE_BUFFERS;
    let buffers = HashMap::new();
    let mut guest = Guest { bench, connector, device, accepted, buffers, next_buffer };
    guest.bench.settle();
    guest.offer(4);
    let (host, port) = guest.connect_from_host(1 << 20);
    guest.send(guest.header(port, 7, DATA), b"again");
    assert_eq!(drain(&host).0, b"again");
    let _ = &guest.device;
}
