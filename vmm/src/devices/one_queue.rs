//! The worker of a device with a single request queue.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vial_sync::{Turn, turn};

use crate::virtio::queue::Chain;
use crate::virtio::{ActiveQueue, Fault, QueueError};

/// What a device does with its queue.
pub(super) trait Serve: Send {
    /// The device, in the words of a log line.
    const DEVICE: &'static str;

    /// What one wake-up may cost, in what [`Serve::serve`] counts, so that a guest that asks
    /// without end leaves the thread to the other devices in between.
    const MOST: usize;
    /// What a chain costs at least, and a look that finds none.
    const LEAST: usize = 1;

    /// Serves a chain, and gives it back to the driver. Returns what it cost.
    ///
    /// # Errors
    /// The driver broke the queue; it is not served again.
    fn serve(&mut self, queue: &mut ActiveQueue, chain: Chain) -> Result<usize, QueueError>;
}

/// Serves a queue until its driver breaks it.
pub(super) struct QueueWorker<S> {
    queue: ActiveQueue,
    server: S,
    fault: Fault,
    broken: bool,
}

impl<S: Serve> QueueWorker<S> {
    /// A worker for `queue`, which tells `fault` when the driver breaks it.
    pub(super) fn new(queue: ActiveQueue, server: S, fault: Fault) -> Self {
        Self { queue, server, fault, broken: false }
    }

    fn fail(&mut self, what: &dyn std::fmt::Display) {
        self.fault.report(S::DEVICE, what);
        self.broken = true;
    }
}

impl<S: Serve> MutEventSubscriber for QueueWorker<S> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.queue.kick_event(), EventSet::IN)) {
            tracing::error!(device = S::DEVICE, %error, "a device cannot listen to its queue");
            self.fail(&error);
        }
        // The driver may have kicked before the worker listened.
        let _ = self.queue.kick_event().write(1);
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        if self.broken {
            return self.queue.acknowledge_kick();
        }
        let mut spent = 0;
        let served = turn(&mut self.queue, |queue, chain| {
            let cost = chain.map_or(Ok(0), |chain| self.server.serve(queue, chain))?;
            spent += cost.max(S::LEAST);
            Ok(if spent < S::MOST { Turn::GoesOn } else { Turn::IsOver })
        });
        if let Err(error) = served {
            self.fail(&error);
        }
    }
}
