//! Queues whose packets the host's kernel carries, from activation to reset.
//!
//! Kicks come to it from KVM and its calls go to KVM, so nothing of this process runs for a packet.
//! What the driver has said is fixed by then, and checked; what it writes into the rings, the
//! kernel checks, and a ring that makes no sense to it is told of by an event.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::vhost::{RINGS, VhostNet};
use super::{DEVICE, NetWorker};

/// Who serves the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    /// The kernel.
    Kernel,
    /// This process, since the kernel does not.
    Process,
    /// Nobody: not yet, or not until the reset, since a ring made no sense to the kernel.
    Nobody,
}

/// See the module.
pub(super) struct KernelWorker {
    vhost: Arc<VhostNet>,
    features: u64,
    /// Who has the queues, and serves them where the kernel does not.
    worker: NetWorker,
    server: Server,
}

impl KernelWorker {
    /// For the queues that `worker` has, of a driver that has negotiated `features`.
    pub(super) fn new(vhost: Arc<VhostNet>, features: u64, worker: NetWorker) -> Self {
        Self { vhost, features, worker, server: Server::Nobody }
    }

    fn stop(&mut self) {
        if self.server == Server::Kernel {
            self.vhost.stop();
            self.server = Server::Nobody;
        }
    }
}

impl MutEventSubscriber for KernelWorker {
    /// Hands the queues over: here, since the thread that the kernel makes takes after the one that
    /// asks for it.
    fn init(&mut self, ops: &mut EventOps) {
        for event in self.vhost.errors() {
            let _ = event.read(); // Of a driver before; non-blocking: empty is fine.
        }
        let NetWorker { receive, transmit, ram, tap, .. } = &self.worker;
        if let Err(error) = self.vhost.start(self.features, ram, [receive, transmit], tap) {
            tracing::warn!(%error, "the VMM carries a network's packets itself");
            self.server = Server::Process;
            return self.worker.init(ops);
        }
        self.server = Server::Kernel;
        for (ring, event) in (0..).zip(self.vhost.errors()) {
            if let Err(error) = ops.add(Events::with_data(event, ring, EventSet::IN)) {
                tracing::error!(%error, "a ring that vhost-net gives up will not be seen");
            }
        }
        // The driver may have kicked before the kernel listened.
        for queue in [&self.worker.receive, &self.worker.transmit] {
            let _ = queue.kick_event().write(1); // Full means pending.
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.server == Server::Process {
            return self.worker.process(events, ops);
        }
        let ring = events.data() as usize % RINGS;
        let _ = self.vhost.errors()[ring].read(); // Non-blocking: empty is fine.
        if self.server == Server::Kernel {
            let what = format!("ring {ring} makes no sense to the kernel's vhost-net");
            self.worker.fault.report(DEVICE, &what);
            self.stop();
        }
    }
}

impl Drop for KernelWorker {
    fn drop(&mut self) {
        self.stop();
    }
}
