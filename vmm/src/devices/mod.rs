//! The virtio devices: a folder or file each. They know queues and descriptors of the host, and
//! nothing of PCI, KVM or the machine that they are in. Functions of the host ([`vfio`]) are no
//! virtio devices, and are on the bus by themselves.

pub mod balloon;
pub mod block;
pub(crate) mod buffers;
pub mod fs;
pub mod mem;
pub mod net;
mod one_queue;
pub mod rng;
#[cfg(any(test, feature = "fuzzing"))]
// Fuzz targets use a part of what tests do.
#[cfg_attr(feature = "fuzzing", allow(dead_code))]
pub(crate) mod testing;
pub mod vfio;
pub mod vhost_user;
pub mod vsock;
