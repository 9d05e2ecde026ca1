//! The network device (virtio 1.2, 5.1) on a tap: one pair of queues, packets straight between
//! the tap and guest memory.
//!
//! The header before each packet is the tap's own (`IFF_VNET_HDR`), so checksums and segmentation
//! are left to whichever kernel the packet ends in. A packet with a header that makes no sense is
//! refused by the host's kernel, and dropped.
//!
//! Where the host has vhost-net, its kernel carries the packets ([`kernel`]), and else a worker of
//! this process.

mod kernel;
mod tap;
pub(crate) mod vhost;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use self::kernel::KernelWorker;
use self::tap::Offloads;
pub use self::vhost::VhostError;
use self::vhost::VhostNet;
use super::buffers::{Buffers, MAX_VECTORS, Span};
use crate::memory::GuestRam;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, Fault,
    QueueError, VirtioDevice, Worker,
};

const DEVICE: &str = "net";

/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER_BYTES: usize = 12;
/// Where `num_buffers` is in it.
const BUFFERS_FIELD: usize = 10;
/// An Ethernet header with a VLAN tag.
const ETHERNET_BYTES: usize = 18;
/// The largest packet that joined TCP segments make, without its Ethernet header.
const MAX_JOINED_BYTES: usize = 64 << 10;
/// The most packets of each direction in one wake-up.
const PACKETS_PER_WAKE: usize = 64;

// Feature bits (virtio 1.2, 5.1.3).
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const MRG_RXBUF: u64 = 1 << 15;

const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const TAP: u32 = 2;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address cannot be an interface's.
    #[error("make the net device: {0:02x?} is no unicast MAC address")]
    Mac([u8; 6]),
    /// The MTU is too small.
    #[error("make the net device: an MTU of {0} is too small, IPv4 needs 68")]
    Mtu(u16),
    /// The descriptor is no tap, or one made otherwise.
    #[error(
        "make the net device: its descriptor is no tap made with \
         IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (flags {0:#x})"
    )]
    Kind(libc::c_int),
    /// The tap refused a setting.
    #[error("make the net device: {action}: {source}")]
    Tap {
        /// What was to be done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// What was to carry the packets does not.
    #[error("make the net device: {0}")]
    Vhost(#[from] VhostError),
}

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: OwnedFd,
    /// What carries the packets; without it, this process does.
    vhost: Option<Arc<VhostNet>>,
    /// `mac`, `status`, `max_virtqueue_pairs`, `mtu` (virtio 1.2, 5.1.4).
    config: [u8; 12],
    mtu: u16,
}

impl Net {
    /// A device on a tap that was made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, with the
    /// guest's address and the largest packet without its Ethernet header, in bytes. With
    /// `/dev/vhost-net`, opened for it alone, the kernel carries its packets.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(
        tap: OwnedFd,
        mac: [u8; 6],
        mtu: u16,
        vhost: Option<OwnedFd>,
    ) -> Result<Self, NetError> {
        if mac == [0; 6] || mac[0] & 1 != 0 {
            return Err(NetError::Mac(mac));
        }
        if mtu < 68 {
            return Err(NetError::Mtu(mtu));
        }
        let failed = |action| move |source| NetError::Tap { action, source };
        let flags = tap::flags(&tap).map_err(failed("ask the tap for its kind"))?;
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & needed != needed {
            return Err(NetError::Kind(flags));
        }
        tap::set_header_bytes(&tap, HEADER_BYTES as libc::c_int)
            .map_err(failed("set the size of the tap's packet header"))?;
        fcntl_getfl(&tap)
            .and_then(|flags| fcntl_setfl(&tap, flags | OFlags::NONBLOCK))
            .map_err(|error| failed("make the tap non-blocking")(error.into()))?;
        let vhost = vhost.map(VhostNet::new).transpose()?.map(Arc::new);
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        Ok(Self { tap, vhost, config, mtu })
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET
    }

    /// Receive, transmit (virtio 1.2, 5.1.2).
    fn queue_sizes(&self) -> &[u16] {
        &[256, 256]
    }

    fn features(&self) -> u64 {
        let offered = CSUM
            | GUEST_CSUM
            | MTU
            | MAC
            | GUEST_TSO4
            | GUEST_TSO6
            | HOST_TSO4
            | HOST_TSO6
            | MRG_RXBUF
            | FEATURE_INDIRECT_DESC
            | FEATURE_EVENT_IDX;
        self.vhost.as_ref().map_or(offered, |vhost| vhost.limit(offered))
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let has = |bit: u64| activation.features & bit != 0;
        let offloads = Offloads {
            checksum: has(GUEST_CSUM),
            // Joined segments have a checksum to be filled in (virtio 1.2, 5.1.3.1).
            tcp4: has(GUEST_CSUM) && has(GUEST_TSO4),
            tcp6: has(GUEST_CSUM) && has(GUEST_TSO6),
        };
        let refused = |what: &str, error: io::Error| ActivateError {
            device: DEVICE,
            reason: format!("{what}: {error}"),
        };
        tap::set_offloads(&self.tap, offloads)
            .map_err(|error| refused("set what the tap leaves to the guest", error))?;
        let tap = self.tap.try_clone().map_err(|error| refused("share the tap", error))?;
        let payload = match offloads {
            Offloads { tcp4: false, tcp6: false, .. } => usize::from(self.mtu),
            _ => MAX_JOINED_BYTES,
        };
        let features = activation.features;
        let worker = NetWorker::new(tap, payload, activation)?;
        Ok(match &self.vhost {
            Some(vhost) => Box::new(KernelWorker::new(vhost.clone(), features, worker)),
            None => Box::new(worker),
        })
    }
}

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
    /// The tap is gone: what the guest sends is dropped.
    Unplugged,
    /// The guest broke a queue.
    Broken,
}

struct NetWorker {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    tap: OwnedFd,
    ram: GuestRam,
    fault: Fault,
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

impl NetWorker {
    /// A worker for a tap that gives packets of up to `payload` bytes behind their headers.
    fn new(
        tap: OwnedFd,
        payload: usize,
        mut activation: Activation,
    ) -> Result<Self, ActivateError> {
        Ok(Self {
            receive: activation.take_queue(DEVICE, 0)?,
            transmit: activation.take_queue(DEVICE, 1)?,
            tap,
            ram: activation.ram,
            fault: activation.fault,
            packet_bytes: HEADER_BYTES + ETHERNET_BYTES + payload,
            merges: activation.features & MRG_RXBUF != 0,
            reserve: Reserve::default(),
            watched: None,
            state: State::Serving,
        })
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
        if self.state != State::Serving
            || packet.vectors(packet.span()) > MAX_VECTORS
            || packet.len() > HEADER_BYTES + ETHERNET_BYTES + MAX_JOINED_BYTES
        {
            return;
        }
        if let Moved::Unplugged =
            Moved::of(packet.write_to(&self.ram, self.tap.as_fd(), packet.span()))
        {
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
            let moved = self.reserve.buffers.read_from(&self.ram, self.tap.as_fd(), room);
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

    fn unplug(&mut self) {
        tracing::warn!("the tap of the net device is gone: the guest is without a network");
        self.state = State::Unplugged;
    }

    fn run(&mut self) {
        if self.state == State::Broken {
            return;
        }
        if let Err(error) = self.serve_transmit().and_then(|()| self.serve_receive()) {
            self.fault.report(DEVICE, &error);
            self.state = State::Broken;
        }
    }

    fn update_watch(&mut self, ops: &mut EventOps) {
        // With too few receive buffers packets wait in the tap, and it is not watched for them.
        let ready = self.state == State::Serving && self.has_room();
        let wanted = ready.then_some(EventSet::IN);
        if wanted == self.watched {
            return;
        }
        let events = Events::with_data_raw(self.tap.as_raw_fd(), TAP, EventSet::IN);
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

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let sources = [
            (self.receive.kick_event(), RECEIVE_KICK),
            (self.transmit.kick_event(), TRANSMIT_KICK),
        ];
        for (event, data) in sources {
            if let Err(error) = ops.add(Events::with_data(event, data, EventSet::IN)) {
                tracing::error!(%error, "the net device cannot listen to its queues");
                self.fault.report(DEVICE, &error);
                self.state = State::Broken;
                return;
            }
        }
        // The driver may have kicked before the worker listened.
        let _ = self.receive.kick_event().write(1);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            RECEIVE_KICK => self.receive.acknowledge_kick(),
            TRANSMIT_KICK => self.transmit.acknowledge_kick(),
            _ if events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) => {
                self.unplug();
            }
            _ => {}
        }
        self.run();
        self.update_watch(ops);
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod on_socket;
#[cfg(test)]
mod tests;
