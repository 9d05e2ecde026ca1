//! Disks that come and go while a machine runs: each a file or block device of the host, whose descriptor the shim opened.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vial_vmm_api::MAX_LATE_DISKS;

use super::{MachineError, Platform};
use crate::devices::block::{Block, BlockError};
use crate::kvm::Vm;
use crate::memory::GuestRam;
use crate::pci::bus::BusError;
use crate::virtio::pci::{TransportError, VirtioPci, Workers};

/// Why a disk does not come or go.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be a disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// It gets no place among the devices.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No number is left.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The descriptor is not there.
    #[error("{0}")]
    Descriptor(String),
    /// There would be too many.
    #[error("the VM would have more than {MAX_LATE_DISKS} disks of its containers; give fewer")]
    TooMany,
    /// There is no such disk.
    #[error("no disk came to the VM as device {0}")]
    None(u8),
}

impl DiskError {
    /// Whether the request is at fault, rather than the host.
    pub fn is_invalid_request(&self) -> bool {
        match self {
            Self::Block(error) => !matches!(error, BlockError::Host { .. }),
            Self::Descriptor(_) | Self::TooMany | Self::None(_) => true,
            Self::Transport(_) | Self::Bus(_) => false,
        }
    }
}

impl From<MachineError> for DiskError {
    fn from(error: MachineError) -> Self {
        Self::Descriptor(error.to_string())
    }
}

/// The disks that came to a machine after it had begun to run.
pub(super) struct Disks {
    vm: Arc<Vm>,
    ram: GuestRam,
    platform: Arc<Platform>,
    workers: Workers,
    /// Their numbers on the bus.
    present: BTreeSet<u8>,
}

impl Disks {
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

    /// Puts a disk on the bus, for a guest that looks for it there, and returns its number.
    ///
    /// # Errors
    /// [`DiskError`]; it is not there then.
    pub(super) fn add(
        &mut self,
        file: OwnedFd,
        read_only: bool,
        serial: &str,
    ) -> Result<u8, DiskError> {
        if self.present.len() == MAX_LATE_DISKS {
            return Err(DiskError::TooMany);
        }
        let (router, doorbells) = (self.vm.clone(), self.vm.clone());
        let function = VirtioPci::new(
            Box::new(Block::new(file, read_only, serial)?),
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

    /// Takes a disk off the bus. Nothing is written to its file any more when this returns.
    ///
    /// # Errors
    /// [`DiskError::None`].
    pub(super) fn remove(&mut self, number: u8) -> Result<(), DiskError> {
        if !self.present.remove(&number) {
            return Err(DiskError::None(number));
        }
        self.platform.pci.remove(number);
        Ok(())
    }
}
