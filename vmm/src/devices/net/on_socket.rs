//! A device whose tap is packet sockets, which keep packets apart as a tap does: for tests.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::kernel::KernelWorker;
use super::taps::Taps;
use super::vhost::VhostNet;
use super::worker::NetWorker;
use super::{MRG_RXBUF, pairs_features};
use crate::virtio::{ActivateError, Activation, FEATURE_EVENT_IDX, VirtioDevice, Worker};

/// The device.
pub(crate) struct OnSocket {
    pub(super) taps: Arc<Taps>,
    sizes: Vec<u16>,
    /// The most bytes of a packet.
    payload: usize,
    /// What is asked to carry the packets first.
    vhosts: Arc<[VhostNet]>,
}

impl OnSocket {
    /// One on sockets, one a pair, that give packets of at most so many bytes.
    pub(crate) fn new(sockets: Vec<OwnedFd>, payload: usize) -> Self {
        Self::with_attachments(sockets, payload, |_, _| Ok(()))
    }

    /// The same, where queues are attached so.
    pub(super) fn with_attachments(
        sockets: Vec<OwnedFd>,
        payload: usize,
        attach: fn(&OwnedFd, bool) -> io::Result<()>,
    ) -> Self {
        let mut sizes = vec![64; 2 * sockets.len()];
        sizes.extend((sockets.len() > 1).then_some(16));
        let taps = Arc::new(Taps::with(sockets, attach));
        Self { taps, sizes, payload, vhosts: Arc::new([]) }
    }

    /// The same with what is asked to carry the packets first, for each of the pairs.
    #[cfg(test)]
    pub(super) fn with(self, vhosts: Vec<VhostNet>) -> Self {
        Self { vhosts: vhosts.into(), ..self }
    }
}

impl VirtioDevice for OnSocket {
    fn id(&self) -> u32 {
        1
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn features(&self) -> u64 {
        MRG_RXBUF | FEATURE_EVENT_IDX | pairs_features(self.taps.queues().len())
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let features = activation.features;
        let worker = NetWorker::new(&self.taps, self.payload, activation)?;
        Ok(match self.vhosts.is_empty() {
            true => Box::new(worker),
            false => Box::new(KernelWorker::new(self.vhosts.clone(), features, worker)),
        })
    }
}
