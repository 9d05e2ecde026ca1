//! The kernel's vhost-net, by its requests (linux/vhost.h): what carries packets between a tap and
//! the rings of a guest without a step of this process.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vm_memory::{GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::MRG_RXBUF;
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};

/// The numbers of the requests (ioctl(2)): direction, size of the argument, number.
pub(crate) mod request {
    const fn vhost(direction: u64, size: u64, number: u64) -> u64 {
        direction << 30 | size << 16 | 0xaf << 8 | number
    }

    pub(crate) const GET_FEATURES: u64 = vhost(2, 8, 0x00);
    pub(crate) const SET_FEATURES: u64 = vhost(1, 8, 0x00);
    pub(crate) const SET_OWNER: u64 = vhost(0, 0, 0x01);
    /// Of its argument only the head is counted.
    pub(crate) const SET_MEM_TABLE: u64 = vhost(1, 8, 0x03);
    pub(crate) const SET_VRING_NUM: u64 = vhost(1, 8, 0x10);
    pub(crate) const SET_VRING_ADDR: u64 = vhost(1, 40, 0x11);
    pub(crate) const SET_VRING_BASE: u64 = vhost(1, 8, 0x12);
    pub(crate) const SET_VRING_KICK: u64 = vhost(1, 8, 0x20);
    pub(crate) const SET_VRING_CALL: u64 = vhost(1, 8, 0x21);
    pub(crate) const SET_VRING_ERR: u64 = vhost(1, 8, 0x22);
    pub(crate) const NET_SET_BACKEND: u64 = vhost(1, 8, 0x30);
}

/// The receive and the transmit ring.
pub(super) const RINGS: usize = 2;
const RECEIVE: u32 = 0;

/// The features that are for whoever serves the rings to know. The others are the tap's, or the
/// configuration space's.
pub(super) const RING_FEATURES: u64 =
    MRG_RXBUF | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX | FEATURE_VERSION_1;

/// Why the kernel does not carry a network.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// It refused a request.
    #[error("{action} of vhost-net: {source}")]
    Kernel {
        /// What was to be done.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// It is too old.
    #[error(
        "the kernel's vhost-net has features {0:#x}, and VIRTIO_F_VERSION_1 is needed (Linux 3.19); \
         set `vhost_net = \"off\"`"
    )]
    Old(u64),
    /// A queue of the tap does not come or go.
    #[error("attach or detach a queue of the tap: {0}")]
    Queue(io::Error),
    /// A ring of the guest's has no address in this process.
    #[error("ring {0} does not lie in one piece of the guest's memory")]
    Ring(u32),
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> VhostError {
    move |source| VhostError::Kernel { action, source }
}

/// An instance of vhost-net, which serves one pair of rings.
#[derive(Debug)]
pub(super) struct VhostNet {
    device: OwnedFd,
    features: u64,
    /// What the kernel tells of a ring that it cannot serve any further.
    errors: [EventFd; RINGS],
}

/// `struct vhost_vring_state` and `struct vhost_vring_file`: a ring, and a number or a descriptor.
#[repr(C)]
struct OfRing<T> {
    ring: u32,
    value: T,
}

/// `struct vhost_vring_addr`: addresses in this process.
#[repr(C)]
struct RingAddresses {
    ring: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// No descriptor (`VHOST_FILE_UNBIND`).
const NONE: i32 = -1;

impl VhostNet {
    /// One on `/dev/vhost-net`, opened for it alone.
    ///
    /// # Errors
    /// It is none, or too old.
    pub(super) fn new(device: OwnedFd) -> Result<Self, VhostError> {
        let mut features = 0_u64;
        // SAFETY: VHOST_GET_FEATURES writes one u64, which is there.
        unsafe { request(&device, request::GET_FEATURES, &raw mut features) }
            .map_err(failed("ask for the features"))?;
        Self::with_features(device, features)
    }

    /// One that knows those features.
    pub(super) fn with_features(device: OwnedFd, features: u64) -> Result<Self, VhostError> {
        if features & FEATURE_VERSION_1 == 0 {
            return Err(VhostError::Old(features));
        }
        let event = || EventFd::new(EFD_NONBLOCK).map_err(failed("make an event for the errors"));
        Ok(Self { device, features, errors: [event()?, event()?] })
    }

    /// Of what a device offers, that which the kernel knows as well.
    pub(super) fn limit(&self, offered: u64) -> u64 {
        offered & (self.features | !RING_FEATURES)
    }

    /// What becomes readable when the kernel gives up a ring.
    pub(super) fn errors(&self) -> &[EventFd; RINGS] {
        &self.errors
    }

    /// Lets the kernel serve the rings, receive and transmit, of a driver that has negotiated
    /// `features`, with `tap`. The thread that the kernel makes for it is like the one that calls
    /// this: of its CPUs, cgroup and filters.
    ///
    /// # Errors
    /// [`VhostError`]. It serves none then.
    pub(super) fn start(
        &self,
        features: u64,
        ram: &GuestRam,
        rings: [&ActiveQueue; RINGS],
        tap: &OwnedFd,
    ) -> Result<(), VhostError> {
        self.own()?;
        self.take(features, ram, rings, tap).inspect_err(|_| self.stop())
    }

    fn take(
        &self,
        features: u64,
        ram: &GuestRam,
        rings: [&ActiveQueue; RINGS],
        tap: &OwnedFd,
    ) -> Result<(), VhostError> {
        let acknowledged = features & RING_FEATURES;
        // SAFETY: VHOST_SET_FEATURES reads one u64, which is there.
        unsafe { self.request(request::SET_FEATURES, &raw const acknowledged) }
            .map_err(failed("set the features"))?;
        self.set_memory(ram)?;
        (0..).zip(rings).try_for_each(|(number, ring)| self.set_ring(number, ring))?;
        (0..RINGS as u32)
            .try_for_each(|number| self.set_backend(number, tap.as_raw_fd()))
            .map_err(failed("give the tap to a ring"))
    }

    /// Has the receive ring filled with what comes by a tap, or with nothing any more. How far it is
    /// served, the kernel remembers. Only after [`VhostNet::start`].
    ///
    /// # Errors
    /// [`VhostError`].
    pub(super) fn set_receiving(&self, tap: Option<&OwnedFd>) -> Result<(), VhostError> {
        self.set_backend(RECEIVE, tap.map_or(NONE, AsRawFd::as_raw_fd))
            .map_err(failed("give the tap to a ring, or take it back,"))
    }

    /// Takes the rings from the kernel again. When this returns, it touches neither them nor the
    /// guest's memory.
    pub(super) fn stop(&self) {
        for number in 0..RINGS as u32 {
            let events = [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR];
            let stopped = self.set_backend(number, NONE).and_then(|()| {
                events.into_iter().try_for_each(|event| self.set_event(event, number, NONE))
            });
            if let Err(error) = stopped {
                tracing::error!(ring = number, %error, "vhost-net keeps a ring of the guest's");
            }
        }
    }

    fn own(&self) -> Result<(), VhostError> {
        // SAFETY: VHOST_SET_OWNER takes no argument. What the kernel does with this process' memory
        // from here on, it is told by the requests below.
        let owned = unsafe { self.request(request::SET_OWNER, std::ptr::null::<u8>()) };
        match owned.map_err(|error| (error.raw_os_error(), error)) {
            // Of a driver before this one: nobody else has the descriptor.
            Ok(()) | Err((Some(libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(failed("become the owner")(error)),
        }
    }

    /// All of the guest's memory, that included which may come later: its addresses are those that
    /// it will have.
    fn set_memory(&self, ram: &GuestRam) -> Result<(), VhostError> {
        let table = memory_table(ram);
        // SAFETY: VHOST_SET_MEM_TABLE reads the head and as many regions as that says, which
        // `table` is. The regions are those of the guest's memory, which is mapped for as long as
        // this process lives, and only ever accessed as memory that may change at any moment.
        unsafe { self.request(request::SET_MEM_TABLE, table.as_ptr()) }
            .map_err(failed("set the memory"))
    }

    fn set_ring(&self, number: u32, ring: &ActiveQueue) -> Result<(), VhostError> {
        let [descriptors, available, used] =
            ring.host_addresses().ok_or(VhostError::Ring(number))?;
        let size = OfRing { ring: number, value: u32::from(ring.size()) };
        let base = OfRing { ring: number, value: u32::from(ring.next_available()) };
        let addresses =
            RingAddresses { ring: number, flags: 0, descriptors, used, available, log: 0 };
        // SAFETY: the first two read a `vhost_vring_state`, the third a `vhost_vring_addr`. The
        // addresses are those of whole rings in the guest's memory, of which the same is true as
        // above.
        unsafe {
            self.request(request::SET_VRING_NUM, &raw const size)
                .and_then(|()| self.request(request::SET_VRING_BASE, &raw const base))
                .and_then(|()| self.request(request::SET_VRING_ADDR, &raw const addresses))
        }
        .map_err(failed("set a ring"))?;
        let call = ring.interrupt().event().map_or(NONE, AsRawFd::as_raw_fd);
        let error = self.errors.get(number as usize).map_or(NONE, AsRawFd::as_raw_fd);
        self.set_event(request::SET_VRING_CALL, number, call)
            .and_then(|()| self.set_event(request::SET_VRING_ERR, number, error))
            .and_then(|()| {
                self.set_event(request::SET_VRING_KICK, number, ring.kick_event().as_raw_fd())
            })
            .map_err(failed("set the events of a ring"))
    }

    fn set_event(&self, request: u64, ring: u32, event: i32) -> io::Result<()> {
        let argument = OfRing { ring, value: event };
        // SAFETY: each of these requests reads a `vhost_vring_file`. The kernel has a hold of its
        // own on what it names.
        unsafe { self.request(request, &raw const argument) }
    }

    fn set_backend(&self, ring: u32, tap: i32) -> io::Result<()> {
        self.set_event(request::NET_SET_BACKEND, ring, tap)
    }

    /// # Safety
    /// The argument is what the request reads or writes.
    unsafe fn request<T>(&self, number: u64, argument: *const T) -> io::Result<()> {
        // SAFETY: by the caller's word.
        unsafe { request(&self.device, number, argument) }
    }
}

/// # Safety
/// The argument is what the request reads or writes.
unsafe fn request<T>(device: &OwnedFd, number: u64, argument: *const T) -> io::Result<()> {
    // SAFETY: by the caller's word.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), number, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct vhost_memory`: how many regions, then for each its address in the guest, its size, its
/// address here, and no flags.
pub(super) fn memory_table(ram: &GuestRam) -> Vec<u64> {
    let mut table = vec![ram.num_regions() as u64];
    for region in ram.iter() {
        table.extend([region.start_addr().0, region.len(), region.as_ptr() as u64, 0]);
    }
    table
}
