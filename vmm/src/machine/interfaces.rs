//! Network interfaces that come and go while a machine runs: each a tap of the host's, which the shim made.

use std::os::fd::OwnedFd;

use vial_vmm_api::MAX_LATE_INTERFACES;

use super::MachineError;
use super::late::{Late, LateError};
use crate::devices::net::{Net, NetError};

/// Why an interface does not come or go.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The descriptor is no such tap, or the address none.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It gets no place.
    #[error(transparent)]
    Late(#[from] LateError),
    /// The descriptor is not there.
    #[error("{0}")]
    Descriptor(String),
    /// There would be too many.
    #[error(
        "the VM would have more than {MAX_LATE_INTERFACES} interfaces that came while it ran; give fewer"
    )]
    TooMany,
    /// There is no such interface.
    #[error("no interface came to the VM as device {0}")]
    None(u8),
}

impl InterfaceError {
    /// Whether the request is at fault, rather than the host.
    pub fn is_invalid_request(&self) -> bool {
        !matches!(self, Self::Late(_))
    }
}

impl From<MachineError> for InterfaceError {
    fn from(error: MachineError) -> Self {
        Self::Descriptor(error.to_string())
    }
}

/// The interfaces that came to a machine after it had begun to run.
pub(super) struct Interfaces(pub(super) Late);

impl Interfaces {
    /// Puts an interface on the bus, for a guest that looks for it there, and returns its number.
    /// With the queues of its tap may come what carries their packets, see [`Net::new`].
    ///
    /// # Errors
    /// [`InterfaceError`]; it is not there then.
    pub(super) fn add(
        &mut self,
        (taps, vhosts): (Vec<OwnedFd>, Vec<OwnedFd>),
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<u8, InterfaceError> {
        if self.0.count() == MAX_LATE_INTERFACES {
            return Err(InterfaceError::TooMany);
        }
        Ok(self.0.add(Box::new(Net::new(taps, mac, mtu, vhosts)?))?)
    }

    /// Takes an interface off the bus. Its tap is closed when this returns.
    ///
    /// # Errors
    /// [`InterfaceError::None`].
    pub(super) fn remove(&mut self, number: u8) -> Result<(), InterfaceError> {
        self.0.remove(number).then_some(()).ok_or(InterfaceError::None(number))
    }
}
