//! A device whose tap is a packet socket, which keeps packets apart as a tap does: for tests.

use std::os::fd::OwnedFd;

use super::{MRG_RXBUF, NetWorker};
use crate::virtio::{ActivateError, Activation, FEATURE_EVENT_IDX, VirtioDevice, Worker};

/// The device.
pub(crate) struct OnSocket {
    pub(crate) tap: OwnedFd,
    /// The most bytes of a packet.
    pub(crate) payload: usize,
}

impl VirtioDevice for OnSocket {
    fn id(&self) -> u32 {
        1
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }
    fn features(&self) -> u64 {
        MRG_RXBUF | FEATURE_EVENT_IDX
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let tap = self.tap.try_clone().unwrap();
        Ok(Box::new(NetWorker::new(tap, self.payload, activation)?))
    }
}
