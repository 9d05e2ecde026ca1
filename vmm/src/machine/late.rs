//! Devices that come and go while a machine runs, one kind in each list.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::Platform;
use crate::kvm::Vm;
use crate::memory::GuestRam;
use crate::pci::bus::BusError;
use crate::virtio::VirtioDevice;
use crate::virtio::pci::{TransportError, VirtioPci, Workers};

/// Why a device does not come.
#[derive(Debug, thiserror::Error)]
pub enum LateError {
    /// It gets no place among the devices.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No number is left.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// The devices of one kind that came to a machine after it had begun to run.
#[derive(Clone)]
pub(super) struct Late {
    vm: Arc<Vm>,
    ram: GuestRam,
    platform: Arc<Platform>,
    workers: Workers,
    /// Their numbers on the bus.
    present: BTreeSet<u8>,
}

impl Late {
    /// None yet.
    pub(super) fn new(
        vm: &Arc<Vm>,
        ram: &GuestRam,
        platform: &Arc<Platform>,
        workers: &Workers,
    ) -> Self {
        let (vm, ram, platform) = (vm.clone(), ram.clone(), platform.clone());
        Self { vm, ram, platform, workers: workers.clone(), present: BTreeSet::new() }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.present.len()
    }

    /// Puts a device on the bus, for a guest that looks for it there, and returns its number.
    ///
    /// # Errors
    /// [`LateError`]; it is not there then.
    pub(super) fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8, LateError> {
        let (router, doorbells) = (self.vm.clone(), self.vm.clone());
        let function = VirtioPci::new(
            device,
            // A guest that runs has places of its own for what it finds.
            None,
            self.ram.clone(),
            router,
            doorbells,
            self.workers.clone(),
        )?;
        let number = self.platform.pci.add(Arc::new(Mutex::new(function)))?;
        self.present.insert(number);
        Ok(number)
    }

    /// Takes a device off the bus: its worker has ended and its descriptor is closed when this returns. Returns whether
    /// there was one.
    pub(super) fn remove(&mut self, number: u8) -> bool {
        let present = self.present.remove(&number);
        if present {
            self.platform.pci.remove(number);
        }
        present
    }
}
