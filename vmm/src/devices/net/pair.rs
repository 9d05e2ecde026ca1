//! One pair of a network device's queues, and what is done with it without the kernel's help:
//! packets straight between a queue of the tap and guest memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};

use super::taps::Taps;
use super::{ETHERNET_BYTES, HEADER_BYTES, MAX_JOINED_BYTES, MRG_RXBUF};
use crate::devices::buffers::{Buffers, MAX_VECTORS, Span};
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, QueueError};

/// Where `num_buffers` is in a packet's header.
const BUFFERS_FIELD: usize = 10;
/// The most packets of each direction in one wake-up.
const PACKETS_PER_WAKE: usize = 64;

/// Receive buffers that the guest gave and no packet has filled yet, in order.
#[derive(Debug, Default)]
struct Reserve {
    /// Head and size of each chain.
    chains: VecDeque<(u16, usize)>,
    buffers: Buffers,
}

impl Reserve {
    fn push(&mut self, head: u16, buffers: Buffers) {
        self.chains.push_back((head, buffers.len()));
        self.buffers.append(buffers);
    }

    /// What the next packet may fill: with merging all that is there, else the first chain.
    fn room(&self, merges: bool) -> Span {
        match (merges, self.chains.front()) {
            (false, Some(&(_, bytes))) => Span { offset: 0, bytes },
            _ => self.buffers.span(),
        }
    }

    /// How many chains a packet of that size fills.
    fn count(&self, packet_bytes: usize) -> u16 {
        let mut left = packet_bytes;
        let mut count = 0;
        for &(_, bytes) in &self.chains {
            count += u16::from(left > 0);
            left = left.saturating_sub(bytes);
        }
        count
    }

    /// Takes the chains that a packet of that size has filled, as head and bytes.
    fn take(&mut self, packet_bytes: usize) -> Vec<(u16, u32)> {
        let mut left = packet_bytes;
        let mut filled = Vec::new();
        while left > 0
            && let Some((head, bytes)) = self.chains.pop_front()
        {
            let written = left.min(bytes);
            left -= written;
            filled.push((head, written as u32));
            self.buffers.drop_front(bytes);
        }
        filled
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Serving,
    /// The driver does not use the pair: it gets no packets. What it sends goes out all the same,
    /// since the driver may have put it into the queue before it turned the pair off.
    Off,
    /// The tap is gone: what the guest sends is dropped.
    Unplugged,
}

/// A pair of queues and the queue of the tap that belongs to it.
pub(super) struct Pair {
    pub(super) receive: ActiveQueue,
    pub(super) transmit: ActiveQueue,
    taps: Arc<Taps>,
    number: usize,
    ram: GuestRam,
    /// The largest packet that the tap may give, its header included.
    packet_bytes: usize,
    /// Whether a packet may fill several chains.
    merges: bool,
    reserve: Reserve,
    /// What the event loop watches the tap for.
    watched: Option<EventSet>,
    state: State,
}

/// What became of a packet.
enum Moved {
    Bytes(usize),
    Dropped,
    /// The tap has none, or takes none, now.
    Wait,
    Unplugged,
}

impl Moved {
    fn of(result: io::Result<usize>) -> Self {
        match result.map_err(|error| (error.kind(), error.raw_os_error())) {
            Ok(bytes) => Self::Bytes(bytes),
            Err((io::ErrorKind::WouldBlock, _)) => Self::Wait,
            // EBADFD: the interface was deleted.
            Err((_, Some(libc::EBADFD | libc::ENODEV))) => Self::Unplugged,
            // A header that makes no sense (EINVAL), too little room (EFAULT), an interface that
            // is down (EIO), no memory: what a network may always do with a packet.
            Err(_) => Self::Dropped,
        }
    }
}

impl Pair {
    /// Pair `number` of a driver that has negotiated `features`, for a tap that gives packets of up
    /// to `payload` bytes behind their headers. The driver uses the first, and no other as yet.
    pub(super) fn new(
        number: usize,
        [receive, transmit]: [ActiveQueue; 2],
        (taps, payload): (&Arc<Taps>, usize),
        ram: &GuestRam,
        features: u64,
    ) -> Self {
        Self {
            receive,
            transmit,
            taps: taps.clone(),
            number,
            ram: ram.clone(),
            packet_bytes: HEADER_BYTES + ETHERNET_BYTES + payload,
            merges: features & MRG_RXBUF != 0,
            reserve: Reserve::default(),
            watched: None,
            state: if number == 0 { State::Serving } else { State::Off },
        }
    }

    fn tap(&self) -> BorrowedFd<'_> {
        self.taps.queues()[self.number].as_fd()
    }

    /// The driver uses the pair from here on, or does not any more.
    pub(super) fn turn(&mut self, on: bool) {
        self.state = match (self.state, on) {
            (State::Unplugged, _) => State::Unplugged,
            (_, true) => State::Serving,
            (_, false) => State::Off,
        };
    }

    /// Whether the guest has given room for the largest packet. A queue full of small buffers has
    /// to do; so has what one system call takes.
    fn has_room(&self) -> bool {
        let chains = self.reserve.chains.len();
        if !self.merges {
            return chains > 0;
        }
        self.reserve.buffers.len() >= self.packet_bytes
            || chains >= MAX_VECTORS.min(usize::from(self.receive.size()))
    }

    /// From the guest to the tap.
    fn serve_transmit(&mut self) -> Result<(), QueueError> {
        self.transmit.disable_kicks()?;
        for _ in 0..PACKETS_PER_WAKE {
            match self.transmit.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let packet = Buffers::readable(chain)?;
                    if packet.len() < HEADER_BYTES {
                        return Err(QueueError::Chain("it is too short for a header".into()));
                    }
                    self.send(&packet);
                    self.transmit.complete(head, 0)?;
                }
                None if self.transmit.enable_kicks()? => {}
                None => return self.transmit.notify(),
            }
        }
        let _ = self.transmit.kick_event().write(1);
        self.transmit.notify()
    }

    fn send(&mut self, packet: &Buffers) {
        // A packet in pieces beyond one call would go out as two.
        if self.state == State::Unplugged
            || packet.vectors(packet.span()) > MAX_VECTORS
            || packet.len() > HEADER_BYTES + ETHERNET_BYTES + MAX_JOINED_BYTES
        {
            return;
        }
        if let Moved::Unplugged = Moved::of(packet.write_to(&self.ram, self.tap(), packet.span())) {
            self.unplug();
        }
    }

    /// From the tap to the guest. Watches the tap when it would have room for a packet.
    fn serve_receive(&mut self) -> Result<(), QueueError> {
        for _ in 0..PACKETS_PER_WAKE {
            if self.state != State::Serving || !self.gather()? {
                break;
            }
            let room = self.reserve.room(self.merges);
            let moved = self.reserve.buffers.read_from(&self.ram, self.tap(), room);
            match Moved::of(moved) {
                Moved::Bytes(bytes) if bytes >= HEADER_BYTES => self.hand_over(bytes)?,
                Moved::Bytes(_) | Moved::Dropped => {}
                Moved::Wait => break,
                Moved::Unplugged => self.unplug(),
            }
        }
        self.receive.notify()
    }

    /// Takes receive buffers until the largest packet fits; false when the guest has too few.
    fn gather(&mut self) -> Result<bool, QueueError> {
        self.receive.disable_kicks()?;
        loop {
            if self.has_room() {
                return Ok(true);
            }
            let mut chain = self.receive.pop()?;
            if chain.is_none() && self.receive.enable_kicks()? {
                chain = self.receive.pop()?;
            }
            let Some(chain) = chain else { return Ok(false) };
            let head = chain.head_index();
            let buffers = Buffers::writable(chain)?;
            if buffers.len() <= HEADER_BYTES {
                return Err(QueueError::Chain("it has no room for a header and data".into()));
            }
            self.reserve.push(head, buffers);
        }
    }

    /// Gives the guest the packet that lies at the front of the reserve.
    fn hand_over(&mut self, bytes: usize) -> Result<(), QueueError> {
        let count = self.reserve.count(bytes);
        self.reserve.buffers.copy_from(&self.ram, BUFFERS_FIELD, &count.to_le_bytes())?;
        self.receive.complete_together(&self.reserve.take(bytes))
    }

    pub(super) fn unplug(&mut self) {
        tracing::warn!("the tap of the net device is gone: the guest is without a network");
        self.state = State::Unplugged;
    }

    /// Carries what there is to carry, both ways.
    ///
    /// # Errors
    /// The driver broke a queue.
    pub(super) fn serve(&mut self) -> Result<(), QueueError> {
        self.serve_transmit()?;
        self.serve_receive()
    }

    /// Has the tap watched, by events with `data`, as long as the guest has room for what it gives.
    /// Of a `broken` device nothing is.
    pub(super) fn update_watch(&mut self, broken: bool, data: u32, ops: &mut EventOps) {
        // With too few receive buffers packets wait in the tap, and it is not watched for them.
        let ready = !broken && self.state == State::Serving && self.has_room();
        let wanted = ready.then_some(EventSet::IN);
        if wanted == self.watched {
            return;
        }
        let events = Events::with_data_raw(self.tap().as_raw_fd(), data, EventSet::IN);
        let result = match wanted {
            Some(_) => ops.add(events),
            None => ops.remove(events),
        };
        self.watched = wanted;
        if let Err(error) = result {
            tracing::error!(%error, "the net device cannot watch its tap");
            self.watched = None;
            self.state = State::Unplugged;
        }
    }
}
