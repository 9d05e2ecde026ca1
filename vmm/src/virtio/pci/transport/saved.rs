//! A device's registers, taken out of one machine and put into another.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::{QueueRegisters, Registers, VirtioPci};
use crate::event_loop::EventLoopError;
use crate::memory::GuestRam;
use crate::pci::msix::MsixState;
use crate::virtio::FEATURE_EVENT_IDX;

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
        if self.needs_reset.is_raised() {
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
    /// the same device in another machine. Its queues are served from a moment on that comes soon, so
    /// memory and interrupt controllers have to be in place. Whether they are is told by
    /// [`VirtioPci::check_queues`], once the workers have settled ([`super::Workers::settle`]): to
    /// wait for each device's by itself would be two switches of threads for each.
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
        self.interrupt_what_is_due(&state.positions);
        if self.registers.is_active() {
            self.activate();
        }
        self.check_queues()
    }

    /// Whether the device has taken its queues.
    ///
    /// # Errors
    /// [`RestoreError::Queues`].
    pub fn check_queues(&self) -> Result<(), RestoreError> {
        match self.needs_reset.is_raised() {
            true => Err(RestoreError::Queues(self.device.id())),
            false => Ok(()),
        }
    }

    /// Interrupts once by each vector by which the guest may be owed an interrupt: one that was under
    /// way when the state was taken is not in it, and drivers bear one that has no reason. But each
    /// costs a guest that has just begun to go on some of its time, and most of its pages are to come.
    fn interrupt_what_is_due(&self, positions: &[(u16, u16)]) {
        let config = (!self.device.config_is_as_saved()).then(|| self.registers.config_vector());
        let events = self.registers.features() & FEATURE_EVENT_IDX != 0;
        let queues = self.registers.queues().iter().zip(positions.iter().map(|(_, used)| *used));
        let mut due = vectors_due(&self.ram, events, queues);
        due.extend(config);
        due.into_iter().for_each(|vector| self.interrupt(vector).trigger());
    }
}

/// The vectors of queues, each with how much of it was used, of which the driver may not have taken all. Only one that has
/// negotiated `events` (`VIRTIO_F_EVENT_IDX`) tells.
fn vectors_due<'a>(
    ram: &GuestRam,
    events: bool,
    queues: impl Iterator<Item = (&'a QueueRegisters, u16)>,
) -> BTreeSet<u16> {
    queues
        .filter(|(queue, used)| queue.enabled && !(events && is_up_to_date(ram, queue, *used)))
        .map(|(queue, _)| queue.vector)
        .collect()
}

/// Whether the driver has taken all that the device has used of a queue, `used` in all: it has said that it wants to know
/// of what comes behind that (virtio 1.3, 2.7.7.1, `used_event`, which follows the available ring's entries).
fn is_up_to_date(ram: &GuestRam, queue: &QueueRegisters, used: u16) -> bool {
    let offset = 4 + 2 * u64::from(queue.size);
    let event = queue.driver.checked_add(offset).map(|at| ram.read_obj::<u16>(GuestAddress(at)));
    matches!(event, Some(Ok(event)) if u16::from_le(event) == used)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map_ram;

    #[test]
    fn driver_that_waits_for_more_is_owed_nothing() {
        let ram = map_ram(32 << 20).unwrap();
        let queue = QueueRegisters {
            max_size: 64,
            size: 16,
            vector: 1,
            enabled: true,
            descriptors: 0x1000,
            driver: 0x2000,
            device: 0x3000,
        };
        ram.write_obj(7u16.to_le(), GuestAddress(0x2000 + 4 + 32)).unwrap();
        let cases = [(7, true), (8, false), (6, false), (0, false), (u16::MAX, false)];
        for (used, up_to_date) in cases {
            assert_eq!(is_up_to_date(&ram, &queue, used), up_to_date, "{used}");
        }
        // Where there is no ring, nothing is known.
        for driver in [u64::MAX - 1, 1 << 40, (32 << 20) - 36] {
            assert!(!is_up_to_date(&ram, &QueueRegisters { driver, ..queue }, 0), "{driver:#x}");
        }
    }

    #[test]
    fn driver_that_may_have_missed_something_is_interrupted() {
        let ram = map_ram(32 << 20).unwrap();
        let queue = |vector: u16, enabled| QueueRegisters {
            max_size: 16,
            size: 16,
            vector,
            enabled,
            descriptors: 0,
            driver: u64::from(vector) << 12,
            device: 0,
        };
        let queues = [queue(1, true), queue(2, true), queue(3, false)];
        for queue in &queues {
            ram.write_obj(7u16.to_le(), GuestAddress(queue.driver + 4 + 32)).unwrap();
        }
        let due = |events, used: [u16; 3]| {
            Vec::from_iter(vectors_due(&ram, events, queues.iter().zip(used)))
        };
        // The last is none that a driver has.
        assert!(due(true, [7, 7, 8]).is_empty());
        assert_eq!(due(true, [7, 8, 8]), [2]);
        assert_eq!(due(true, [8, 6, 8]), [1, 2]);
        assert_eq!(due(false, [7, 7, 7]), [1, 2]);
    }
}
