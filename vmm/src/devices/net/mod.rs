//! The network device (virtio 1.2, 5.1) on a tap: a pair of queues for each queue of the tap,
//! packets straight between the tap and guest memory.
//!
//! The header before each packet is the tap's own (`IFF_VNET_HDR`), so checksums and segmentation
//! are left to whichever kernel the packet ends in. A packet with a header that makes no sense is
//! refused by the host's kernel, and dropped.
//!
//! Where the host has vhost-net, its kernel carries the packets ([`kernel`]), and else a worker of
//! this process ([`worker`]). Of several pairs, the driver says by a queue of its own ([`control`])
//! how many it uses, and as many queues of the tap are attached ([`taps`]).

pub(crate) mod control;
mod kernel;
mod pair;
mod tap;
mod taps;
pub(crate) mod vhost;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vial_vmm_api::NETWORK_PAIRS;

use self::kernel::KernelWorker;
use self::tap::Offloads;
use self::taps::Taps;
pub use self::vhost::VhostError;
use self::vhost::VhostNet;
use self::worker::NetWorker;
use crate::virtio::{
    ActivateError, Activation, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, VirtioDevice, Worker,
};

const DEVICE: &str = "net";

/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER_BYTES: usize = 12;
/// An Ethernet header with a VLAN tag.
const ETHERNET_BYTES: usize = 18;
/// The largest packet that joined TCP segments make, without its Ethernet header.
const MAX_JOINED_BYTES: usize = 64 << 10;
/// The size of each queue of packets, and of the control queue, which has one command at a time.
const QUEUE_SIZE: u16 = 256;
pub(crate) const CONTROL_SIZE: u16 = 16;

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
pub(crate) const CTRL_VQ: u64 = 1 << 17;
pub(crate) const MQ: u64 = 1 << 22;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address cannot be an interface's.
    #[error("make the net device: {0:02x?} is no unicast MAC address")]
    Mac([u8; 6]),
    /// The MTU is too small.
    #[error("make the net device: an MTU of {0} is too small, IPv4 needs 68")]
    Mtu(u16),
    /// There cannot be so many queues.
    #[error(
        "make the net device: it has {taps} queues of a tap and {vhosts} of what carries their \
         packets; give {least} to {most}, and of the others as many or none",
        least = NETWORK_PAIRS.start(), most = NETWORK_PAIRS.end()
    )]
    Queues {
        /// Queues of the tap.
        taps: usize,
        /// What carries packets.
        vhosts: usize,
    },
    /// The descriptor is no tap, or one made otherwise.
    #[error(
        "make the net device: its descriptor is no tap made with \
         IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (flags {0:#x})"
    )]
    Kind(libc::c_int),
    /// The descriptors are not the queues of one tap.
    #[error(
        "make the net device: its descriptors are not queues of one tap made with \
         IFF_MULTI_QUEUE, of which only the first is attached (flags {0:#x})"
    )]
    Queue(libc::c_int),
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

/// The configuration space of a network (virtio 1.2, 5.1.4): `mac`, `status`,
/// `max_virtqueue_pairs`, `mtu`.
pub(crate) fn config(mac: [u8; 6], pairs: u16, mtu: u16) -> [u8; 12] {
    let mut config = [0; 12];
    config[..6].copy_from_slice(&mac);
    config[8..10].copy_from_slice(&pairs.to_le_bytes());
    config[10..].copy_from_slice(&mtu.to_le_bytes());
    config
}

/// The device.
#[derive(Debug)]
pub struct Net {
    taps: Arc<Taps>,
    /// What carries the packets of each queue; without any, this process does.
    vhosts: Arc<[VhostNet]>,
    sizes: Vec<u16>,
    config: [u8; 12],
    mtu: u16,
}

impl Net {
    /// A device on the queues of a tap that was made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and
    /// with `IFF_MULTI_QUEUE` where there are several, of which the first is attached and no other;
    /// with the guest's address and the largest packet without its Ethernet header, in bytes. With
    /// `/dev/vhost-net` for each, opened for it alone, the kernel carries the packets.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(
        taps: Vec<OwnedFd>,
        mac: [u8; 6],
        mtu: u16,
        vhosts: Vec<OwnedFd>,
    ) -> Result<Self, NetError> {
        if mac == [0; 6] || mac[0] & 1 != 0 {
            return Err(NetError::Mac(mac));
        }
        if mtu < 68 {
            return Err(NetError::Mtu(mtu));
        }
        let pairs = u8::try_from(taps.len()).ok().filter(|pairs| NETWORK_PAIRS.contains(pairs));
        let carried = vhosts.is_empty() || vhosts.len() == taps.len();
        let Some(pairs) = pairs.filter(|_| carried) else {
            return Err(NetError::Queues { taps: taps.len(), vhosts: vhosts.len() });
        };
        check(&taps)?;
        let vhosts = vhosts.into_iter().map(VhostNet::new).collect::<Result<_, _>>()?;
        let config = config(mac, pairs.into(), mtu);
        let taps = Arc::new(Taps::new(taps));
        Ok(Self { taps, vhosts, sizes: queue_sizes(pairs.into()), config, mtu })
    }
}

/// Checks that the descriptors are the queues of a tap, and sets it up.
fn check(taps: &[OwnedFd]) -> Result<(), NetError> {
    let failed = |action| move |source| NetError::Tap { action, source };
    let mut first = None;
    for (number, tap) in taps.iter().enumerate() {
        let kind = tap::kind(tap).map_err(failed("ask the tap for its kind"))?;
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if kind.flags & needed != needed {
            return Err(NetError::Kind(kind.flags));
        }
        let has_several = kind.flags & libc::IFF_MULTI_QUEUE != 0 || taps.len() == 1;
        let is_detached = kind.flags & libc::IFF_DETACH_QUEUE != 0;
        if !has_several || is_detached != (number > 0) || !kind.is_of(first.get_or_insert(kind)) {
            return Err(NetError::Queue(kind.flags));
        }
        fcntl_getfl(tap)
            .and_then(|flags| fcntl_setfl(tap, flags | OFlags::NONBLOCK))
            .map_err(|error| failed("make the tap non-blocking")(error.into()))?;
    }
    // Of all queues together.
    tap::set_header_bytes(&taps[0], HEADER_BYTES as libc::c_int)
        .map_err(failed("set the size of the tap's packet header"))
}

/// Receive and transmit, for each pair, then control (virtio 1.2, 5.1.2).
fn queue_sizes(pairs: usize) -> Vec<u16> {
    let mut sizes = vec![QUEUE_SIZE; 2 * pairs];
    sizes.extend((pairs > 1).then_some(CONTROL_SIZE));
    sizes
}

/// What a device of several pairs offers for that.
fn pairs_features(pairs: usize) -> u64 {
    if pairs > 1 { CTRL_VQ | MQ } else { 0 }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
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
            | pairs_features(self.taps.queues().len())
            | FEATURE_INDIRECT_DESC
            | FEATURE_EVENT_IDX;
        // All instances are of one kernel.
        self.vhosts.first().map_or(offered, |vhost| vhost.limit(offered))
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
        tap::set_offloads(&self.taps.queues()[0], offloads)
            .map_err(|error| refused("set what the tap leaves to the guest", error))?;
        let payload = match offloads {
            Offloads { tcp4: false, tcp6: false, .. } => usize::from(self.mtu),
            _ => MAX_JOINED_BYTES,
        };
        let features = activation.features;
        let worker = NetWorker::new(&self.taps, payload, activation)?;
        Ok(match self.vhosts.is_empty() {
            true => Box::new(worker),
            false => Box::new(KernelWorker::new(self.vhosts.clone(), features, worker)),
        })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod on_socket;
#[cfg(test)]
mod pairs_tests;
#[cfg(test)]
mod tests;
