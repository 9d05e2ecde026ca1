//! Serves the guest's queues and watches the host's sockets of all connections, as [`Connection`]
//! decides.
//!
//! Each wake-up does a bounded amount of work. Packets for the guest are made connection by
//! connection, one packet each in turn, so that one that floods does not starve the others. A
//! socket is watched only for what could be used: for data only when the guest has room for it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vial_sync::Bell;

use super::connection::{BUFFER_BYTES, Connection, Verdict};
use super::entry::{Entry, close};
use super::packet::{HEADER_BYTES, Operation, Ports, Received, Sent, TYPE_STREAM};
use super::{DEVICE, HOST_CID, MAX_CONNECTIONS, MAX_PENDING, OnGuestConnect, Shared};
use crate::devices::buffers::Buffers;
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, Fault, QueueError};

/// The most packets of each direction in one wake-up.
const PACKETS_PER_WAKE: usize = 256;
/// The most RST packets without a connection that wait for room in the guest's receive queue.
/// While they wait, the transmit queue does too.
const MAX_RESETS: usize = 256;
/// The first of our ports for connections from the host: above those that programs choose.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// How many connections have a whole buffer ([`BUFFER_BYTES`]), and what each of the others has,
/// so that all that a guest can make the host keep is below [`MAX_BACKLOG_BYTES`].
const WHOLE_BUFFERS: usize = 32;
const SMALL_BUFFER_BYTES: u32 = 8 << 10;
/// The most data of a guest that waits for the host, of all connections together, in bytes.
const MAX_BACKLOG_BYTES: usize = 16 << 20;

const _: () = assert!(
    WHOLE_BUFFERS * BUFFER_BYTES as usize
        + (MAX_CONNECTIONS - WHOLE_BUFFERS) * SMALL_BUFFER_BYTES as usize
        <= MAX_BACKLOG_BYTES
);

const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const WAKE: u32 = 2;
/// What the slot of a connection is added to for its event.
const FIRST_SLOT: u32 = 16;

/// All that a worker is made of.
pub(super) struct Parts {
    pub(super) guest_cid: u32,
    pub(super) host_ports: Vec<u32>,
    pub(super) on_guest_connect: Arc<OnGuestConnect>,
    pub(super) shared: Arc<Shared>,
    pub(super) ram: GuestRam,
    pub(super) receive: ActiveQueue,
    pub(super) transmit: ActiveQueue,
    pub(super) fault: Fault,
}

/// Something to be put into the guest's receive queue.
enum Job {
    Reset(Sent),
    Slot(usize),
}

/// Serves a vsock device's queues.
pub(super) struct VsockWorker {
    parts: Parts,
    entries: Vec<Option<Entry>>,
    /// The lowest is taken first: what has whole buffers.
    free: BinaryHeap<Reverse<usize>>,
    by_ports: HashMap<Ports, usize>,
    next_host_port: u32,
    /// The connections that have a packet for the guest, in turn.
    ready: VecDeque<usize>,
    resets: VecDeque<Sent>,
    /// The connections whose watched events may have to change.
    touched: Vec<usize>,
    /// Sockets to be taken off the event loop and closed.
    closing: Vec<OwnedFd>,
    broken: bool,
}

impl VsockWorker {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            entries: Vec::new(),
            free: BinaryHeap::new(),
            by_ports: HashMap::new(),
            next_host_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
            closing: Vec::new(),
            broken: false,
        }
    }

    fn entry(&mut self, slot: usize) -> Option<&mut Entry> {
        self.entries.get_mut(slot).and_then(Option::as_mut)
    }

    /// To be called when anything about a connection may have changed.
    fn settle(&mut self, slot: usize) {
        let Some(entry) = self.entry(slot) else { return };
        if entry.readable && !entry.detached && entry.machine.budget() == 0 {
            entry.machine.on_blocked();
        }
        if entry.has_packet() && !std::mem::replace(&mut entry.queued, true) {
            self.ready.push_back(slot);
        }
        self.touched.push(slot);
    }

    fn insert(&mut self, mut entry: Entry) -> usize {
        let ports = entry.machine.ports();
        let slot = match self.free.pop() {
            Some(Reverse(slot)) => slot,
            None => {
                self.entries.push(None);
                self.entries.len() - 1
            }
        };
        if slot >= WHOLE_BUFFERS {
            entry.machine.set_buffer(SMALL_BUFFER_BYTES);
        }
        self.entries[slot] = Some(entry);
        self.by_ports.insert(ports, slot);
        self.settle(slot);
        slot
    }

    fn remove(&mut self, slot: usize) {
        let Some(entry) = self.entries.get_mut(slot).and_then(Option::take) else { return };
        if !entry.detached {
            self.by_ports.remove(&entry.machine.ports());
        }
        self.free.push(Reverse(slot));
        if let Some(socket) = entry.socket {
            match entry.watched {
                Some(_) => self.closing.push(socket),
                None => close(socket),
            }
        }
    }

    /// The connection is over for the guest. What the host has not taken yet is still passed on.
    fn end(&mut self, slot: usize, reset: bool) {
        let Some(entry) = self.entry(slot) else { return };
        let ports = entry.machine.ports();
        let drains = entry.socket.is_some() && !entry.hung_up && !entry.backlog.is_empty();
        if reset {
            self.resets.push_back(Sent::reset(ports, TYPE_STREAM));
        }
        if !drains {
            return self.remove(slot);
        }
        self.by_ports.remove(&ports);
        if let Some(entry) = self.entry(slot) {
            entry.detached = true;
        }
        self.touched.push(slot);
    }

    /// Whether one more connection fits. Makes room by ending one that the host has closed and
    /// the guest has not confirmed.
    fn has_room(&mut self) -> bool {
        let used = self.entries.len() - self.free.len();
        if used < MAX_CONNECTIONS {
            return true;
        }
        let lingering = self.entries.iter().position(|entry| {
            entry.as_ref().is_some_and(|entry| entry.socket.is_none() && !entry.detached)
        });
        match lingering {
            Some(slot) => {
                self.end(slot, true);
                true
            }
            None => false,
        }
    }

    // From the host.

    fn take_queued(&mut self) {
        if !self.parts.shared.is_any_waiting() {
            return;
        }
        let mut pending =
            self.entries.iter().flatten().filter(|entry| entry.machine.is_requested()).count();
        while pending < MAX_PENDING && self.has_room() {
            let Some((port, socket)) = self.parts.shared.take() else { return };
            let ports = self.free_ports(port);
            self.insert(Entry::new(Connection::from_host(ports), socket));
            pending += 1;
        }
    }

    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_host_port;
            // The last is VMADDR_PORT_ANY.
            self.next_host_port = match host {
                0xffff_fffe => FIRST_HOST_PORT,
                _ => host + 1,
            };
            let ports = Ports { host, guest };
            let taken = self.by_ports.contains_key(&ports) || self.parts.host_ports.contains(&host);
            if !taken {
                return ports;
            }
        }
    }

    fn on_socket(&mut self, slot: usize, set: EventSet) {
        let Some(entry) = self.entry(slot) else { return };
        if set.contains(EventSet::OUT) {
            entry.flush();
        }
        if set.contains(EventSet::IN) {
            entry.readable = true;
        }
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            entry.hung_up = true;
            entry.discard_backlog();
            if entry.machine.is_requested() {
                // The host gave up; the guest may have accepted meanwhile.
                return self.end(slot, true);
            }
            // What the host had written before is still there to be read.
            entry.readable = true;
        }
        if entry.detached && (entry.backlog.is_empty() || entry.hung_up) {
            return self.remove(slot);
        }
        self.settle(slot);
    }

    // From the guest.

    /// Returns whether there is more to do at once.
    fn serve_transmit(&mut self) -> Result<bool, QueueError> {
        self.parts.transmit.disable_kicks()?;
        let mut served = 0;
        let mut more = true;
        while served < PACKETS_PER_WAKE && self.resets.len() < MAX_RESETS {
            served += 1;
            match self.parts.transmit.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let buffers = Buffers::readable(chain)?;
                    self.on_chain(&buffers)?;
                    self.parts.transmit.complete(head, 0)?;
                }
                None if self.parts.transmit.enable_kicks()? => {}
                None => {
                    more = false;
                    break;
                }
            }
        }
        self.parts.transmit.notify()?;
        Ok(more)
    }

    fn on_chain(&mut self, buffers: &Buffers) -> Result<(), QueueError> {
        let mut header = [0; HEADER_BYTES];
        buffers.copy_to(&self.parts.ram, 0, &mut header)?;
        let packet = Received::parse(&header);
        if packet.bytes as usize > buffers.len() - HEADER_BYTES {
            return Err(QueueError::Chain(format!(
                "its header claims {} bytes of data, it has {}",
                packet.bytes,
                buffers.len() - HEADER_BYTES
            )));
        }
        // Not ours to answer (virtio 1.2, 5.10.6.1).
        if packet.source_cid != u64::from(self.parts.guest_cid)
            || packet.destination_cid != u64::from(HOST_CID)
        {
            return Ok(());
        }
        let known = self.by_ports.get(&packet.ports).copied();
        match known {
            Some(slot) if packet.kind == TYPE_STREAM => self.on_packet(slot, &packet, buffers),
            _ if packet.operation == Some(Operation::Reset) => Ok(()),
            None if packet.kind == TYPE_STREAM
                && packet.operation == Some(Operation::Request)
                && self.accept(&packet) =>
            {
                Ok(())
            }
            _ => {
                self.resets.push_back(Sent::reset(packet.ports, packet.kind));
                Ok(())
            }
        }
    }

    fn on_packet(
        &mut self,
        slot: usize,
        packet: &Received,
        buffers: &Buffers,
    ) -> Result<(), QueueError> {
        let Some(entry) = self.entries.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(());
        };
        match entry.machine.on_packet(packet) {
            Verdict::Noted => entry.shut_down(),
            Verdict::Deliver => entry.deliver(&self.parts.ram, buffers, packet.bytes)?,
            Verdict::End { reset } => {
                self.end(slot, reset);
                return Ok(());
            }
        }
        self.settle(slot);
        Ok(())
    }

    fn accept(&mut self, request: &Received) -> bool {
        let port = request.ports.host;
        if !self.parts.host_ports.contains(&port) || !self.has_room() {
            return false;
        }
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        match pair {
            Ok((ours, theirs)) => {
                self.insert(Entry::new(Connection::from_guest(request), ours));
                (self.parts.on_guest_connect)(port, theirs);
                true
            }
            Err(error) => {
                tracing::warn!(port, %error, "no socket pair for a connection of the guest");
                false
            }
        }
    }

    // To the guest.

    /// Returns whether there is more to do at once.
    fn serve_receive(&mut self) -> Result<bool, QueueError> {
        if self.ready.is_empty() && self.resets.is_empty() {
            return Ok(false);
        }
        self.parts.receive.disable_kicks()?;
        let mut more = true;
        for _ in 0..PACKETS_PER_WAKE {
            let Some(job) = self.next_job() else {
                more = false;
                break;
            };
            let mut chain = self.parts.receive.pop()?;
            if chain.is_none() && self.parts.receive.enable_kicks()? {
                chain = self.parts.receive.pop()?;
            }
            let Some(chain) = chain else {
                self.put_back(job);
                more = false;
                break;
            };
            let head = chain.head_index();
            let buffers = Buffers::writable(chain)?;
            if buffers.len() <= HEADER_BYTES {
                return Err(QueueError::Chain("it has no room for a header and data".into()));
            }
            match self.fill(job, &buffers)? {
                Some(bytes) => self.parts.receive.complete(head, bytes)?,
                None => self.parts.receive.undo_pop(),
            }
        }
        self.parts.receive.notify()?;
        Ok(more)
    }

    fn next_job(&mut self) -> Option<Job> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Job::Reset(reset));
        }
        while let Some(slot) = self.ready.pop_front() {
            if let Some(entry) = self.entry(slot) {
                entry.queued = false;
                if entry.has_packet() {
                    return Some(Job::Slot(slot));
                }
            }
        }
        None
    }

    fn put_back(&mut self, job: Job) {
        match job {
            Job::Reset(reset) => self.resets.push_front(reset),
            Job::Slot(slot) => {
                if let Some(entry) = self.entry(slot) {
                    entry.queued = true;
                    self.ready.push_front(slot);
                }
            }
        }
    }

    /// Writes one packet into a chain; returns its size, or nothing when there was none after
    /// all.
    fn fill(&mut self, job: Job, buffers: &Buffers) -> Result<Option<u32>, QueueError> {
        let packet = match job {
            Job::Reset(reset) => Some(reset),
            Job::Slot(slot) => self.next_packet(slot, buffers),
        };
        let Some(packet) = packet else { return Ok(None) };
        buffers.copy_from(&self.parts.ram, 0, &packet.encode(self.parts.guest_cid))?;
        Ok(Some(HEADER_BYTES as u32 + packet.bytes))
    }

    /// The next packet of a connection, its data already in the chain.
    fn next_packet(&mut self, slot: usize, buffers: &Buffers) -> Option<Sent> {
        let entry = self.entries.get_mut(slot).and_then(Option::as_mut)?;
        // After a hang-up the data goes first, so that one SHUTDOWN behind it says all.
        let mut packet = if entry.hung_up { None } else { entry.machine.next_owed() };
        if packet.is_none() && entry.can_read() {
            packet = entry.read(&self.parts.ram, buffers);
        }
        if packet.is_none() {
            packet = entry.machine.next_owed();
        }
        if entry.hung_up && entry.machine.is_host_read_over() {
            // Nothing more can come of it.
            if let Some(socket) = entry.socket.take() {
                match entry.watched.take() {
                    Some(_) => self.closing.push(socket),
                    None => close(socket),
                }
            }
        }
        if entry.machine.is_over() {
            self.end(slot, true);
        } else {
            self.settle(slot);
        }
        packet
    }

    // The event loop.

    fn run(&mut self) {
        if self.broken {
            // Whoever connects now sees the end of the stream, and not silence.
            self.parts.shared.clear();
            return;
        }
        self.take_queued();
        let served = self.serve_transmit().and_then(|more| Ok(more | self.serve_receive()?));
        match served {
            // A transmit queue that stands still for want of room in the receive queue goes on
            // with the next kick of that.
            Ok(more) => {
                if more && (self.resets.len() < MAX_RESETS) {
                    self.parts.shared.bell().ring();
                }
            }
            Err(error) => {
                self.parts.fault.report(DEVICE, &error);
                self.broken = true;
                for slot in 0..self.entries.len() {
                    self.remove(slot);
                }
                self.parts.shared.clear();
            }
        }
    }

    /// Brings what the event loop watches up to date.
    fn update_watches(&mut self, ops: &mut EventOps) {
        for socket in self.closing.drain(..) {
            // A descriptor has to leave the loop before its number can be used again.
            let _ = ops.remove(Events::empty(&socket));
            close(socket);
        }
        for slot in std::mem::take(&mut self.touched) {
            let Some(entry) = self.entries.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            let wanted = entry.interest();
            if wanted == entry.watched {
                continue;
            }
            let Some(socket) = &entry.socket else { continue };
            let events =
                |set| Events::with_data_raw(socket.as_raw_fd(), FIRST_SLOT + slot as u32, set);
            let result = match (entry.watched, wanted) {
                (None, Some(set)) => ops.add(events(set)),
                (Some(_), Some(set)) => ops.modify(events(set)),
                (Some(set), None) => ops.remove(events(set)),
                (None, None) => Ok(()),
            };
            entry.watched = wanted;
            if let Err(error) = result {
                tracing::error!(%error, "a vsock connection's socket cannot be watched");
                entry.watched = None;
                entry.hung_up = true;
                self.end(slot, true);
            }
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let sources = [
            (self.parts.receive.kick_event().as_raw_fd(), RECEIVE_KICK),
            (self.parts.transmit.kick_event().as_raw_fd(), TRANSMIT_KICK),
            (self.parts.shared.bell().as_raw_fd(), WAKE),
        ];
        for (event, data) in sources {
            if let Err(error) = ops.add(Events::with_data_raw(event, data, EventSet::IN)) {
                tracing::error!(%error, "the vsock device cannot listen to its queues");
                self.parts.fault.report(DEVICE, &error);
                self.broken = true;
                return;
            }
        }
        // The driver may have kicked before the worker listened.
        self.parts.shared.bell().ring();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            RECEIVE_KICK => self.parts.receive.acknowledge_kick(),
            TRANSMIT_KICK => self.parts.transmit.acknowledge_kick(),
            WAKE => self.parts.shared.bell().clear(),
            data => self.on_socket((data - FIRST_SLOT) as usize, events.event_set()),
        }
        self.run();
        self.update_watches(ops);
        let open = self.entries.len() - self.free.len() + self.resets.len();
        self.parts.shared.set_open(open);
    }
}

impl Drop for VsockWorker {
    fn drop(&mut self) {
        for entry in self.entries.drain(..).flatten() {
            if let Some(socket) = entry.socket {
                close(socket);
            }
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
