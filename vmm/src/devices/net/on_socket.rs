//! A device whose tap is a packet socket, which keeps packets apart as a tap does: for tests.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::kernel::KernelWorker;
use super::vhost::VhostNet;
use super::{MRG_RXBUF, NetWorker};
use crate::virtio::{ActivateError, Activation, FEATURE_EVENT_IDX, VirtioDevice, Worker};

/// The device.
pub(crate) struct OnSocket {
    tap: OwnedFd,
    /// The most bytes of a packet.
    payload: usize,
    /// What is asked to carry the packets first.
    vhost: Option<Arc<VhostNet>>,
}

impl OnSocket {
    /// One on a socket that gives packets of at most so many bytes.
    pub(crate) fn new(tap: OwnedFd, payload: usize) -> Self {
        Self { tap, payload, vhost: None }
    }

    /// The same with what is asked to carry the packets first.
    #[cfg(test)]
    pub(super) fn with(self, vhost: VhostNet) -> Self {
        Self { vhost: Some(Arc::new(vhost)), ..self }
    }
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
        let features = activation.features;
        let worker = NetWorker::new(tap, self.payload, activation)?;
        Ok(match &self.vhost {
            Some(vhost) => Box::new(KernelWorker::new(vhost.clone(), features, worker)),
            None => Box::new(worker),
        })
    }
}
