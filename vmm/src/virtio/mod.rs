//! What a virtio device is to the rest of the VMM, and the transport that shows it to the guest.
//!
//! A device in [`crate::devices`] implements [`VirtioDevice`]. The transport ([`pci`]) keeps the
//! registers that the driver writes; when the driver is done with them, the queues move into the
//! device by [`VirtioDevice::activate`] and no register can reach them any more. What the device
//! then does, it does as a [`Worker`] on an event loop thread ([`crate::event_loop`]).

pub mod pci;
pub mod queue;

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use vial_sync::FaultFlag;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
pub use queue::{ActiveQueue, QueueError};

/// `VIRTIO_F_VERSION_1` (virtio 1.2, 6): no legacy interface.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC` (virtio 1.2, 6).
pub const FEATURE_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (virtio 1.2, 6).
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// What serves a device's queues, on an event loop thread, from activation to reset.
pub trait Worker: MutEventSubscriber + Send {}
impl<T: MutEventSubscriber + Send> Worker for T {}

/// The event loop thread that a device's worker runs on. Each has a seccomp filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerThread {
    /// Shared by all devices that never block.
    Io,
    /// Of the devices that make file system calls, which block: the file server and disks.
    FileServer,
    /// Of the devices that vhost-user backends serve, whose answers are waited for.
    VhostUser,
}

/// A device, as the transport needs it.
pub trait VirtioDevice: Send {
    /// The device's id (virtio 1.2, 5).
    fn id(&self) -> u32;

    /// The largest size of each queue: powers of two, 2 to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// What the device offers, besides [`FEATURE_VERSION_1`], which the transport adds.
    fn features(&self) -> u64;

    /// The device-specific configuration space. What is read past its end is zeros.
    fn config(&self) -> &[u8];

    /// Reads it from `offset` on. A device whose configuration changes by itself has its own way.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_at(self.config(), offset, data);
    }

    /// The driver writes to it from `offset` on. Most devices have nothing that it can change.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Whether a driver that goes on in another machine finds the configuration space as it was when
    /// its own was saved, so that it need not look again.
    fn config_is_as_saved(&self) -> bool {
        false
    }

    /// The thread that the worker runs on.
    fn worker_thread(&self) -> WorkerThread {
        WorkerThread::Io
    }

    /// Takes the queues and starts serving them. Called again after each reset, when the earlier
    /// worker has been dropped.
    ///
    /// # Errors
    /// A sentence that says what the host refused. The guest sees a device that needs a reset.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError>;
}

/// Fills `data` with what lies at `offset` of `config`, and zeros behind its end.
pub(crate) fn read_at(config: &[u8], offset: usize, data: &mut [u8]) {
    let there = config.get(offset..).unwrap_or_default();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = there.get(index).copied().unwrap_or(0);
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
#[error("activate {device}: {reason}")]
pub struct ActivateError {
    /// The device, in the words of a log line.
    pub device: &'static str,
    /// What was refused.
    pub reason: String,
}

/// All that a device gets from its driver.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub ram: GuestRam,
    /// What was negotiated: a subset of what was offered.
    pub features: u64,
    /// A queue for each of [`VirtioDevice::queue_sizes`]; `None` where the driver enabled none.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Tells the driver that the configuration space changed.
    pub config_interrupt: Interrupt,
    /// Tells the driver that the device is broken.
    pub fault: Fault,
}

impl Activation {
    /// Takes the queue at `index`.
    ///
    /// # Errors
    /// When the driver enabled none there.
    pub fn take_queue(
        &mut self,
        device: &'static str,
        index: usize,
    ) -> Result<ActiveQueue, ActivateError> {
        self.queues.get_mut(index).and_then(Option::take).ok_or_else(|| ActivateError {
            device,
            reason: format!("the driver left queue {index} disabled"),
        })
    }
}

/// An interrupt to the guest: one MSI-X vector, or none where the driver chose none. Masking is
/// the vector's concern: what is triggered while masked is delivered when unmasked.
#[derive(Debug, Clone)]
pub struct Interrupt(Option<Arc<EventFd>>);

impl Interrupt {
    /// An interrupt that goes nowhere.
    pub fn none() -> Self {
        Self(None)
    }

    /// An interrupt that adds 1 to `event`.
    pub fn new(event: Arc<EventFd>) -> Self {
        Self(Some(event))
    }

    /// What triggers it, if anything does.
    pub fn event(&self) -> Option<&EventFd> {
        self.0.as_deref()
    }

    /// Interrupts the guest.
    pub fn trigger(&self) {
        // An eventfd's write only fails when its counter is full: then it is pending anyway.
        if let Some(event) = &self.0 {
            let _ = event.write(1);
        }
    }
}

/// The way to tell the driver `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.2).
#[derive(Debug, Clone)]
pub struct Fault {
    needs_reset: Arc<FaultFlag>,
    config_interrupt: Interrupt,
}

impl Fault {
    /// A fault flag that also interrupts the driver.
    pub fn new(needs_reset: Arc<FaultFlag>, config_interrupt: Interrupt) -> Self {
        Self { needs_reset, config_interrupt }
    }

    /// Marks the device as broken by what its driver wrote. The worker goes on to ignore its
    /// queues until the reset.
    pub fn report(&self, device: &str, what: &dyn std::fmt::Display) {
        self.needs_reset.raise(|| {
            tracing::warn!(device, %what, "the guest broke the device's queue: it needs a reset");
            self.config_interrupt.trigger();
        });
    }

    /// Whether [`Fault::report`] was called since the last reset.
    pub fn is_reported(&self) -> bool {
        self.needs_reset.is_raised()
    }
}
