//! A device's registers, taken out of one machine and put into another.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Registers, VirtioPci};
use crate::event_loop::EventLoopError;
use crate::pci::msix::MsixState;

/// What the guest has made of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// What the device is (virtio 1.2, 5).
    pub id: u32,
    config: Vec<u8>,
    msix: MsixState,
    registers: Registers,
    /// How far each queue was served: available ring, used ring.
    positions: Vec<(u16, u16)>,
}

/// Why a device could not be taken out of its machine.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its worker's thread does not answer.
    #[error(transparent)]
    Stop(#[from] EventLoopError),
    /// The guest broke it.
    #[error("the guest has broken virtio device {0}; its state is of no use")]
    Broken(u32),
}

/// Why a device could not be put into another machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is another device.
    #[error("the state is that of virtio device {saved}, and the machine has {own} there")]
    Other {
        /// The device of the state.
        saved: u32,
        /// That of the machine.
        own: u32,
    },
    /// The device has other registers.
    #[error("the {what} of virtio device {id} are not as this VMM makes them")]
    Registers {
        /// The device.
        id: u32,
        /// Which registers.
        what: &'static str,
    },
    /// The device does not take its queues.
    #[error("virtio device {0} does not go on with its queues; the log says why")]
    Queues(u32),
}

impl VirtioPci {
    /// Stops the device and takes its state. The guest must not be running, and cannot be run
    /// again.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&mut self) -> Result<DeviceState, SaveError> {
        self.stop()?;
        let id = self.device.id();
        if self.needs_reset.load(Ordering::Acquire) {
            return Err(SaveError::Broken(id));
        }
        Ok(DeviceState {
            id,
            config: self.config.bytes().to_vec(),
            msix: self.msix.state(),
            registers: self.registers.clone(),
            positions: self.positions.iter().map(|position| position.get()).collect(),
        })
    }

    /// Gives the device, which no guest has seen yet and which is not on the bus, the state of
    /// the same device in another machine. Its queues are served from here on, so memory and
    /// interrupt controllers have to be in place.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let id = self.device.id();
        if state.id != id {
            return Err(RestoreError::Other { saved: state.id, own: id });
        }
        let wrong = |what| RestoreError::Registers { id, what };
        if state.positions.len() != self.positions.len() {
            return Err(wrong("queues"));
        }
        let moved = self.config.restore(&state.config).ok_or(wrong("PCI registers"))?;
        moved.into_iter().for_each(|change| self.move_doorbells(change));
        if !self.registers.restore(&state.registers) {
            return Err(wrong("virtio registers"));
        }
        for (own, (available, used)) in self.positions.iter().zip(&state.positions) {
            own.set(*available, *used);
        }
        if !self.msix.restore(&state.msix) {
            return Err(wrong("MSI-X vectors"));
        }
        if self.registers.is_active() {
            self.activate();
        }
        match self.needs_reset.load(Ordering::Acquire) {
            true => Err(RestoreError::Queues(id)),
            false => Ok(()),
        }
    }
}
