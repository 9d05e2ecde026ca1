//! Queues whose packets the host's kernel carries, from activation to reset.
//!
//! Kicks come to it from KVM and its calls go to KVM, so nothing of this process runs for a packet.
//! What the driver has said is fixed by then, and checked; what it writes into the rings, the
//! kernel checks, and a ring that makes no sense to it is told of by an event. The kernel has the
//! rings of a pair from when the driver begins to use it. Which it uses, the driver says by the
//! control queue, which stays here.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::pair::Pair;
use super::vhost::{RINGS, VhostError, VhostNet};
use super::worker::{CONTROL, NetWorker};

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
    carriers: Carriers,
    /// Who has the queues, and serves them where the kernel does not.
    worker: NetWorker,
    server: Server,
}

/// What carries the packets of each pair.
struct Carriers {
    instances: Arc<[VhostNet]>,
    features: u64,
    /// How many of the pairs the kernel has the rings of, the first ones.
    begun: usize,
}

impl Carriers {
    /// Has the first `count` pairs carried, and gives no packets to the others.
    fn set_pairs(&mut self, worker: &NetWorker, count: usize) -> Result<(), VhostError> {
        let (taps, before) = (&worker.taps, worker.taps.attached());
        for (number, Pair { receive, transmit, .. }) in worker.pairs.iter().enumerate().take(count)
        {
            let (instance, tap) = (&self.instances[number], &taps.queues()[number]);
            if number >= self.begun {
                instance.start(self.features, &worker.ram, [receive, transmit], tap)?;
                self.begun = number + 1;
                // The driver may have kicked before the kernel listened.
                for queue in [receive, transmit] {
                    let _ = queue.kick_event().write(1); // Full means pending.
                }
            } else if number >= before {
                instance.set_receiving(Some(tap))?;
            }
        }
        taps.set_attached(count).map_err(VhostError::Queue)?;
        // What the driver has sent by them already goes out.
        for instance in self.instances.iter().take(before).skip(count) {
            instance.set_receiving(None)?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.instances[..self.begun].iter().for_each(VhostNet::stop);
        self.begun = 0;
    }
}

impl KernelWorker {
    /// For the queues that `worker` has, of a driver that has negotiated `features`, with an
    /// instance for each of its pairs.
    pub(super) fn new(instances: Arc<[VhostNet]>, features: u64, worker: NetWorker) -> Self {
        let carriers = Carriers { instances, features, begun: 0 };
        Self { carriers, worker, server: Server::Nobody }
    }

    fn stop(&mut self) {
        self.carriers.stop();
        if self.server == Server::Kernel {
            self.server = Server::Nobody;
        }
    }

    /// Listens to what is for this process though the kernel carries the packets.
    fn listen(&self, ops: &mut EventOps) {
        let errors = self.carriers.instances.iter().flat_map(|instance| instance.errors());
        for (ring, event) in (0..).zip(errors).take(self.worker.pairs.len() * RINGS) {
            if let Err(error) = ops.add(Events::with_data(event, ring, EventSet::IN)) {
                tracing::error!(%error, "a ring that vhost-net gives up will not be seen");
            }
        }
        if let Some(control) = &self.worker.control {
            let kick = control.queue.kick_event();
            if let Err(error) = ops.add(Events::with_data(kick, CONTROL, EventSet::IN)) {
                tracing::error!(%error, "a network keeps one pair of queues");
            }
            let _ = kick.write(1); // The driver may have kicked before.
        }
    }

    fn serve_control(&mut self) {
        let carriers = &mut self.carriers;
        self.worker.serve_control(|worker, count| {
            worker.taps.change(count, || carriers.set_pairs(worker, count))
        });
        if self.worker.is_broken() {
            self.stop();
        }
    }
}

impl MutEventSubscriber for KernelWorker {
    /// Hands the queues over: here, since the thread that the kernel makes takes after the one that
    /// asks for it.
    fn init(&mut self, ops: &mut EventOps) {
        for event in self.carriers.instances.iter().flat_map(|instance| instance.errors()) {
            let _ = event.read(); // Of a driver before; non-blocking: empty is fine.
        }
        if let Err(error) = self.carriers.set_pairs(&self.worker, 1) {
            tracing::warn!(%error, "the VMM carries a network's packets itself");
            self.carriers.stop();
            self.server = Server::Process;
            return self.worker.init(ops);
        }
        self.server = Server::Kernel;
        self.listen(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match (self.server, events.data()) {
            (Server::Process, _) => self.worker.process(events, ops),
            (Server::Kernel, CONTROL) => self.serve_control(),
            (Server::Nobody, CONTROL) => {
                self.worker.control.iter().for_each(|control| control.queue.acknowledge_kick());
            }
            (server, ring) => {
                let errors = self.carriers.instances.iter().flat_map(|instance| instance.errors());
                if let Some(error) = errors.into_iter().nth(ring as usize) {
                    let _ = error.read(); // Non-blocking: empty is fine.
                }
                if server == Server::Kernel {
                    let what = format!("ring {ring} makes no sense to the kernel's vhost-net");
                    self.worker.fail(&what);
                    self.stop();
                }
            }
        }
    }
}

impl Drop for KernelWorker {
    fn drop(&mut self) {
        self.stop();
    }
}
