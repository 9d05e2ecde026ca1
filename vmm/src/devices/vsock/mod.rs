//! The socket device (virtio 1.2, 5.10), stream sockets only, in user space.
//!
//! There are no socket files. A connection from the host comes as one end of a socket pair
//! ([`VsockConnector::connect`]); a connection from the guest to one of the allowed ports makes a
//! pair and hands one end out. `connection` decides, `worker` and `entry` move the bytes: straight
//! between the host's socket and guest memory, with a bounded buffer where the host is slow.
//!
//! Nothing survives a reset: all connections are dropped, and the host sees their end.

mod connection;
mod entry;
mod packet;
mod worker;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vial_sync::{Backlog, Full};

use crate::virtio::{
    ActivateError, Activation, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, VirtioDevice, Worker,
};
use crate::wake::Wake;

/// The host's context id (virtio 1.2, 5.10.4).
const HOST_CID: u32 = 2;

/// `VIRTIO_VSOCK_F_STREAM` (virtio 1.2, 5.10.3).
const FEATURE_STREAM: u64 = 1 << 0;

/// The most connections at once, those included that are about to end. A request of the guest
/// beyond is refused.
pub const MAX_CONNECTIONS: usize = 1024;

/// The most connections of the host that wait for the guest's answer.
pub const MAX_PENDING: usize = 128;

/// The most connections of the host that wait for the guest's driver.
pub const MAX_QUEUED: usize = 128;

const DEVICE: &str = "vsock";

/// What is called with the host's port and the host's end of a connection that the guest opened.
/// It runs on the thread of the device's worker and must not block.
pub type OnGuestConnect = Box<dyn Fn(u32, OwnedFd) + Send + Sync>;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is one of the reserved.
    #[error("make the vsock device: the context id {0} is reserved, take one of 3 to 4294967294")]
    ReservedCid(u32),
    /// The host refused an event descriptor.
    #[error("make the vsock device: {0}; check the limit of open files")]
    Event(rustix::io::Errno),
}

/// Why a connection to the guest could not be queued.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Too many connections wait.
    #[error(
        "connect to the guest's port {port}: {MAX_QUEUED} connections wait already; \
         the guest's vsock driver does not take them, is the guest up?"
    )]
    Full {
        /// The port.
        port: u32,
    },
}

/// What the connector and the worker share: what waits to be connected, with its port; and how much is open, or is still to be
/// told to the guest.
type Shared = Backlog<(u32, OwnedFd), Wake>;

/// Opens connections to the guest, from any thread.
#[derive(Clone)]
pub struct VsockConnector {
    shared: Arc<Shared>,
}

impl VsockConnector {
    /// The connections that there are or are about to be, the ends included that the guest has
    /// not heard of yet.
    pub fn connections(&self) -> usize {
        self.shared.len()
    }

    /// Connects `socket`, one end of a pair of Unix stream sockets, to a port of the guest. It
    /// may be called before the guest's driver is there: the connection waits. When the guest
    /// refuses, the other end of the pair sees the end of the stream.
    ///
    /// # Errors
    /// [`ConnectError::Full`].
    pub fn connect(&self, port: u32, socket: OwnedFd) -> Result<(), ConnectError> {
        self.shared.push((port, socket)).map_err(|Full| ConnectError::Full { port })
    }
}

/// The device.
pub struct Vsock {
    guest_cid: u32,
    /// `guest_cid` as configuration space (virtio 1.2, 5.10.4).
    config: [u8; 8],
    host_ports: Vec<u32>,
    on_guest_connect: Arc<OnGuestConnect>,
    shared: Arc<Shared>,
}

impl Vsock {
    /// A device for the guest with that context id. The guest may connect to `host_ports`; each
    /// such connection is handed to `on_guest_connect`, as a blocking, close-on-exec socket.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn new(
        guest_cid: u32,
        host_ports: Vec<u32>,
        on_guest_connect: OnGuestConnect,
    ) -> Result<(Self, VsockConnector), VsockError> {
        if guest_cid <= HOST_CID || guest_cid == u32::MAX {
            return Err(VsockError::ReservedCid(guest_cid));
        }
        let wake = Wake::new().map_err(VsockError::Event)?;
        let shared = Arc::new(Shared::new(wake, MAX_QUEUED));
        let device = Self {
            guest_cid,
            config: u64::from(guest_cid).to_le_bytes(),
            host_ports,
            on_guest_connect: Arc::new(on_guest_connect),
            shared: Arc::clone(&shared),
        };
        Ok((device, VsockConnector { shared }))
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK
    }

    /// Receive, transmit, event (virtio 1.2, 5.10.2).
    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn config_is_as_saved(&self) -> bool {
        true
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let receive = activation.take_queue(DEVICE, 0)?;
        let transmit = activation.take_queue(DEVICE, 1)?;
        // The event queue only tells of a change of the context id, of which there is none.
        Ok(Box::new(worker::VsockWorker::new(worker::Parts {
            guest_cid: self.guest_cid,
            host_ports: self.host_ports.clone(),
            on_guest_connect: Arc::clone(&self.on_guest_connect),
            shared: Arc::clone(&self.shared),
            ram: activation.ram,
            receive,
            transmit,
            fault: activation.fault,
        })))
    }
}
