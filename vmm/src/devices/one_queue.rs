//! The worker of a device with a single request queue.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::virtio::{ActiveQueue, Fault, QueueError};

/// What a device does with its queue.
pub(super) trait Serve: Send {
    /// The device, in the words of a log line.
    const DEVICE: &'static str;

    /// Serves what the driver made available, within a bound. Returns whether there is more, to
    /// be served when the other devices of the thread have had their turn.
    ///
    /// # Errors
    /// The driver broke the queue; it is not served again.
    fn serve(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError>;
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
        self.queue.acknowledge_kick();
        if self.broken {
            return;
        }
        match self.server.serve(&mut self.queue) {
            Ok(false) => {}
            Ok(true) => drop(self.queue.kick_event().write(1)),
            Err(error) => self.fail(&error),
        }
    }
}
