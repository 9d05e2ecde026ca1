//! Disks that come and go while a machine runs: each a file or block device of the host, whose descriptor the shim opened.

use std::os::fd::OwnedFd;

use vial_ring::{Layout, Ring};
use vial_vmm_api::{DiskShape, MAX_LATE_DISKS};

use super::MachineError;
use super::late::{Late, LateError};
use crate::devices::block::{Block, BlockError};

/// Why a disk does not come or go.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be a disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// It gets no place.
    #[error(transparent)]
    Late(#[from] LateError),
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
            Self::Late(_) => false,
        }
    }
}

impl From<MachineError> for DiskError {
    fn from(error: MachineError) -> Self {
        Self::Descriptor(error.to_string())
    }
}

/// Asks for the ring of a disk that comes. Without one, its requests are done one after the other.
#[allow(unsafe_code)]
pub(super) fn take_ring(layout: Layout) -> Option<Ring> {
    let taken = vial_ring::request().and_then(|ring| {
        // SAFETY: the shim, which is trusted, answers with the ring that it has sent the layout of.
        unsafe { Ring::adopt(ring, layout) }
    });
    taken.inspect_err(|error| tracing::warn!(%error, "the disk gets no ring of io_uring")).ok()
}

/// The disks that came to a machine after it had begun to run.
pub(super) struct Disks(pub(super) Late);

impl Disks {
    /// Puts a disk on the bus, for a guest that looks for it there, and returns its number.
    ///
    /// # Errors
    /// [`DiskError`]; it is not there then.
    pub(super) fn add(
        &mut self,
        file: OwnedFd,
        read_only: bool,
        serial: &str,
        shape: &DiskShape,
        ring: Option<Ring>,
    ) -> Result<u8, DiskError> {
        if self.0.count() == MAX_LATE_DISKS {
            return Err(DiskError::TooMany);
        }
        Ok(self.0.add(Box::new(Block::new(file, read_only, serial, shape, ring)?))?)
    }

    /// Takes a disk off the bus. Nothing is written to its file any more when this returns.
    ///
    /// # Errors
    /// [`DiskError::None`].
    pub(super) fn remove(&mut self, number: u8) -> Result<(), DiskError> {
        self.0.remove(number).then_some(()).ok_or(DiskError::None(number))
    }
}
