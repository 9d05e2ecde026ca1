//! One vsock connection as a pure state machine: packets and socket events go in, what is owed to
//! the guest comes out. No I/O and no bytes here; the numbers and the directions only.
//!
//! ```text
//!   host connects ──> Requested ──RESPONSE──> Established ──both directions over──> ended
//!   guest connects ─────────────────────────────^    │ RST, a broken rule
//!                                                    └────────────────────────────> ended
//! ```
//!
//! Credit (virtio 1.2, 5.10.6.3): each side may have at most `buf_alloc` bytes on the way that the
//! other has not yet passed on (`fwd_cnt`). All counters are modulo 2^32.

use super::packet::{
    Operation, Ports, Received, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Sent, TYPE_STREAM,
};

/// What we buffer at most of one connection's data on its way to the host, in bytes, unless it
/// has less by [`Connection::set_buffer`]. It is memory only when the host does not read.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host asked, the guest has not answered.
    Requested,
    Established,
}

/// What a packet of the guest means for its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing but what the machine noted.
    Noted,
    /// The data that came with it is to be passed on to the host.
    Deliver,
    /// The connection is over: what was delivered before still goes to the host. The guest gets
    /// a RST when `reset` is set.
    End {
        /// Whether the guest has to be told.
        reset: bool,
    },
}

/// The state of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connection {
    ports: Ports,
    phase: Phase,
    /// How much of the guest's data may wait for the host.
    buffer: u32,
    // From the guest to the host.
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest was last told.
    announced: u32,
    // From the host to the guest.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The directions that the guest said are over.
    guest_shutdown: u32,
    /// The directions that are over on our side, and those that the guest was told of.
    host_shutdown: u32,
    told_shutdown: u32,
    // What is owed to the guest.
    owes_request: bool,
    owes_response: bool,
    owes_credit: bool,
    owes_credit_request: bool,
    /// A credit request was sent that has not been answered.
    credit_requested: bool,
}

impl Connection {
    fn new(ports: Ports, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            buffer: BUFFER_BYTES,
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            owes_request: false,
            owes_response: false,
            owes_credit: false,
            owes_credit_request: false,
            credit_requested: false,
        }
    }

    /// A connection that the host asks for: the guest is owed a REQUEST.
    pub(super) fn from_host(ports: Ports) -> Self {
        Self { owes_request: true, ..Self::new(ports, Phase::Requested) }
    }

    /// A connection that the guest asked for by that REQUEST: it is owed a RESPONSE.
    pub(super) fn from_guest(request: &Received) -> Self {
        let mut connection = Self::new(request.ports, Phase::Established);
        connection.owes_response = true;
        connection.note_credit(request);
        connection
    }

    /// Sets how much of the guest's data may wait for the host, in bytes. Only before the guest
    /// was told anything.
    pub(super) fn set_buffer(&mut self, bytes: u32) {
        debug_assert!(bytes > 1 && self.received == 0);
        self.buffer = bytes;
    }

    /// The two ends.
    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether the guest has still to answer a request of the host.
    pub(super) fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// Takes in a packet's header.
    pub(super) fn on_packet(&mut self, packet: &Received) -> Verdict {
        self.note_credit(packet);
        let broken = Verdict::End { reset: true };
        match (packet.operation, self.phase) {
            (Some(Operation::Reset), _) => Verdict::End { reset: false },
            // A guest cannot know of a connection before it got the request.
            (_, Phase::Requested) if self.owes_request => broken,
            (Some(Operation::Response), Phase::Requested) => {
                self.phase = Phase::Established;
                Verdict::Noted
            }
            (_, Phase::Requested) => broken,
            (Some(Operation::Data), Phase::Established) => self.on_data(packet.bytes),
            (Some(Operation::Shutdown), Phase::Established) => {
                self.guest_shutdown |= packet.flags & SHUTDOWN_BOTH;
                if self.is_over() { broken } else { Verdict::Noted }
            }
            (Some(Operation::CreditUpdate), Phase::Established) => Verdict::Noted,
            (Some(Operation::CreditRequest), Phase::Established) => {
                self.owes_credit = true;
                Verdict::Noted
            }
            (Some(Operation::Request | Operation::Response) | None, Phase::Established) => broken,
        }
    }

    fn on_data(&mut self, bytes: u32) -> Verdict {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || bytes > self.known_space() {
            return Verdict::End { reset: true };
        }
        if bytes == 0 {
            return Verdict::Noted;
        }
        self.received = self.received.wrapping_add(bytes);
        Verdict::Deliver
    }

    /// How much more the guest may send by what it was told. It never exceeds what is free.
    fn known_space(&self) -> u32 {
        self.buffer - self.received.wrapping_sub(self.announced)
    }

    fn note_credit(&mut self, packet: &Received) {
        let before = self.budget();
        self.guest_buffer = packet.buffer;
        self.guest_forwarded = packet.forwarded;
        if self.budget() > before {
            self.credit_requested = false;
        }
    }

    /// Bytes of the guest have gone to the host, or are not wanted there any more.
    pub(super) fn on_forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        // A Linux guest sends at most 64 KiB at a time, so with a whole buffer it need not wait
        // while the host keeps up.
        if self.known_space() <= self.buffer / 2 && self.guest_shutdown & SHUTDOWN_SEND == 0 {
            self.owes_credit = true;
        }
    }

    /// How many bytes may be sent to the guest now.
    pub(super) fn budget(&self) -> u32 {
        let over = self.host_shutdown & SHUTDOWN_SEND | self.guest_shutdown & SHUTDOWN_RECEIVE;
        if self.phase == Phase::Requested || self.owes_response || over != 0 {
            return 0;
        }
        // A guest that claims more than was sent has itself less to get, never more.
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(on_the_way)
    }

    /// The header for that many bytes of data, which must be within [`Connection::budget`].
    pub(super) fn send_data(&mut self, bytes: u32) -> Sent {
        debug_assert!(bytes <= self.budget());
        self.sent = self.sent.wrapping_add(bytes);
        Sent { bytes, ..self.stamp(Operation::Data) }
    }

    /// The host has data that the guest has no room for.
    pub(super) fn on_blocked(&mut self) {
        if self.phase == Phase::Established
            && !self.owes_response
            && !self.credit_requested
            && !self.is_host_read_over()
        {
            self.credit_requested = true;
            self.owes_credit_request = true;
        }
    }

    /// The host will send no more: everything before was sent.
    pub(super) fn on_host_end(&mut self) {
        self.host_shutdown |= SHUTDOWN_SEND;
    }

    /// The host will read no more.
    pub(super) fn on_host_refuses(&mut self) {
        self.host_shutdown |= SHUTDOWN_RECEIVE;
    }

    /// Whether nothing is to be read from the host any more.
    pub(super) fn is_host_read_over(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND != 0 || self.guest_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// Whether data of the guest is thrown away, since the host does not read.
    pub(super) fn is_discarding(&self) -> bool {
        self.host_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// Whether the guest will send no more: the host gets its end of stream after what it is
    /// still owed.
    pub(super) fn is_guest_end(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND != 0
    }

    /// Whether the guest will receive no more.
    pub(super) fn is_guest_refusing(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// Whether each direction is over, by the word of either side, and the guest knows. Then the
    /// connection ends with a RST to it.
    pub(super) fn is_over(&self) -> bool {
        let to_guest =
            self.guest_shutdown & SHUTDOWN_RECEIVE != 0 || self.told_shutdown & SHUTDOWN_SEND != 0;
        let to_host = self.guest_shutdown & SHUTDOWN_SEND != 0;
        to_guest && to_host
    }

    /// Whether [`Connection::next_owed`] has something.
    pub(super) fn owes(&self) -> bool {
        self.owes_request
            || self.owes_response
            || self.phase == Phase::Established
                && (self.told_shutdown != self.host_shutdown
                    || self.owes_credit
                    || self.owes_credit_request)
    }

    /// The next packet without data that the guest is owed.
    pub(super) fn next_owed(&mut self) -> Option<Sent> {
        if std::mem::take(&mut self.owes_request) {
            return Some(self.stamp(Operation::Request));
        }
        if std::mem::take(&mut self.owes_response) {
            return Some(self.stamp(Operation::Response));
        }
        if self.phase == Phase::Requested {
            return None;
        }
        if self.told_shutdown != self.host_shutdown {
            self.told_shutdown = self.host_shutdown;
            let flags = self.told_shutdown;
            return Some(Sent { flags, ..self.stamp(Operation::Shutdown) });
        }
        if self.owes_credit {
            return Some(self.stamp(Operation::CreditUpdate));
        }
        if std::mem::take(&mut self.owes_credit_request) {
            return Some(self.stamp(Operation::CreditRequest));
        }
        None
    }

    /// A header with our credit, which every packet carries.
    fn stamp(&mut self, operation: Operation) -> Sent {
        self.announced = self.forwarded;
        self.owes_credit = false;
        Sent {
            ports: self.ports,
            kind: TYPE_STREAM,
            operation,
            bytes: 0,
            flags: 0,
            buffer: self.buffer,
            forwarded: self.forwarded,
        }
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
