//! An event by which one thread wakes another that waits in poll(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vial_sync::Bell;

/// The event. Cloning it is cheap: all clones are the same event.
#[derive(Debug, Clone)]
pub struct Wake(Arc<OwnedFd>);

impl Wake {
    /// An event that has not happened.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> Result<Self, rustix::io::Errno> {
        eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map(Arc::new).map(Self)
    }
}

impl Bell for Wake {
    fn ring(&self) {
        // A full counter is an event that has happened already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn clear(&self) {
        // It is non-blocking: nothing to read is fine too.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
