//! A line of the guest's interrupt controllers that a message goes by, and the event that sends it:
//! what MSI and MSI-X have in common.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A message-signalled interrupt: what is written, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MsiMessage {
    /// The address.
    pub address: u64,
    /// The data.
    pub data: u32,
}

/// Why an interrupt could not be wired.
#[derive(Debug, thiserror::Error)]
#[error("{action} interrupt line {gsi}: {reason}")]
pub struct MsiError {
    /// What was tried.
    pub action: &'static str,
    /// The line.
    pub gsi: u32,
    /// What KVM said.
    pub reason: String,
}

/// What wires events to the guest's interrupt controllers: KVM, or a fake in tests.
pub trait MsiRouter: Send + Sync {
    /// Takes a line of its own for a vector.
    ///
    /// # Errors
    /// There is none left.
    fn allocate(&self) -> Result<u32, MsiError>;

    /// Lets each write to `event` send `message` to the guest.
    ///
    /// # Errors
    /// KVM refuses.
    fn attach(&self, gsi: u32, event: &Arc<EventFd>, message: MsiMessage) -> Result<(), MsiError>;

    /// Ends what [`MsiRouter::attach`] began. What is written meanwhile stays in `event`.
    ///
    /// # Errors
    /// KVM refuses.
    fn detach(&self, gsi: u32, event: &EventFd) -> Result<(), MsiError>;

    /// Gives back a line that is not attached, for another vector to take.
    fn release(&self, gsi: u32);
}

/// A line, its event, and what the event sends now. Given back when dropped.
pub(super) struct Line {
    gsi: u32,
    pub(super) event: Arc<EventFd>,
    attached: Option<MsiMessage>,
    router: Arc<dyn MsiRouter>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gsi, attached, .. } = self;
        f.debug_struct("Line").field("gsi", gsi).field("attached", attached).finish()
    }
}

impl Line {
    /// One that sends nothing yet.
    ///
    /// # Errors
    /// No lines or descriptors are left.
    pub(super) fn new(router: Arc<dyn MsiRouter>) -> Result<Self, MsiError> {
        let gsi = router.allocate()?;
        let event = EventFd::new(EFD_NONBLOCK).map_err(|error| {
            router.release(gsi);
            MsiError { action: "make an event for", gsi, reason: error.to_string() }
        })?;
        Ok(Self { gsi, event: Arc::new(event), attached: None, router })
    }

    /// Lets the event send `wanted` from here on, or nothing.
    pub(super) fn send(&mut self, wanted: Option<MsiMessage>) {
        if wanted == self.attached {
            return;
        }
        let result = match wanted {
            // A message that changes while attached only changes the route.
            Some(message) => self.router.attach(self.gsi, &self.event, message),
            None => self.router.detach(self.gsi, &self.event),
        };
        match result {
            Ok(()) => self.attached = wanted,
            Err(error) => tracing::warn!(%error, "an interrupt of a device cannot be delivered"),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.send(None);
        // One that KVM does not let go of would send another vector's message.
        if self.attached.is_none() {
            self.router.release(self.gsi);
        }
    }
}
