//! A thread that runs device workers: it waits for their events and calls them.

use std::sync::{Arc, OnceLock};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId};

use crate::virtio::Worker;

/// Why an event loop failed.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// The loop's epoll or event descriptors were refused.
    #[error("make the event loop {name}: {reason}")]
    Create {
        /// The thread's name.
        name: &'static str,
        /// What was refused.
        reason: String,
    },
    /// The thread was refused.
    #[error("start the thread {name}: {source}; check the pids limit of the pod's cgroup")]
    Spawn {
        /// The thread's name.
        name: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// The thread could not give up what it does not need.
    #[error("prepare the thread {name}: {reason}")]
    Prepare {
        /// The thread's name.
        name: &'static str,
        /// What was refused.
        reason: String,
    },
    /// The thread does not answer.
    #[error("the event loop has ended: {0}")]
    Gone(event_manager::Error),
}

impl From<event_manager::Error> for EventLoopError {
    fn from(error: event_manager::Error) -> Self {
        Self::Gone(error)
    }
}

type Subscriber = Box<dyn Worker>;

/// The way to an event loop from other threads. Cloning it is cheap.
#[derive(Clone)]
pub struct EventLoop {
    endpoint: RemoteEndpoint<Subscriber>,
}

/// A worker on an event loop, or on its way there.
#[derive(Debug)]
pub struct WorkerId(Arc<OnceLock<SubscriberId>>);

impl EventLoop {
    /// Starts a thread that runs workers. `prepare` runs first on it; there the thread gives up
    /// what it does not need.
    ///
    /// # Errors
    /// The host refused the thread or its descriptors, or `prepare` failed.
    pub fn start(
        name: &'static str,
        prepare: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<Self, EventLoopError> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let body = move || {
            let made = EventManager::<Subscriber>::new()
                .map_err(|error| EventLoopError::Create { name, reason: error.to_string() })
                .and_then(|events| match prepare() {
                    Ok(()) => Ok(events),
                    Err(reason) => Err(EventLoopError::Prepare { name, reason }),
                });
            let mut events = match made {
                Ok(events) => {
                    let _ = sender.send(Ok(events.remote_endpoint()));
                    events
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                    return;
                }
            };
            loop {
                if let Err(error) = events.run() {
                    tracing::error!(thread = name, %error, "the event loop failed: ending the VM");
                    std::process::abort();
                }
            }
        };
        std::thread::Builder::new()
            .name(name.into())
            .spawn(body)
            .map_err(|source| EventLoopError::Spawn { name, source })?;
        let gone = || EventLoopError::Create { name, reason: "its thread ended".into() };
        let endpoint = receiver.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(Self { endpoint })
    }

    /// Moves a worker to the loop's thread. It listens before anything is done that this loop is asked for later; what it
    /// waits for may have happened by then.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn add(&self, worker: Subscriber) -> Result<WorkerId, EventLoopError> {
        let id = Arc::new(OnceLock::new());
        let known = id.clone();
        self.endpoint.fire(move |ops| {
            // Nobody else sets it.
            let _ = known.set(ops.add_subscriber(worker));
        })?;
        Ok(WorkerId(id))
    }

    /// Waits until all workers that were added listen.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn settle(&self) -> Result<(), EventLoopError> {
        self.endpoint.call_blocking(|_| Ok(()))
    }

    /// Takes a worker off the loop and drops it on the loop's thread. When this returns, the
    /// worker touches guest memory no more.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn remove(&self, id: WorkerId) -> Result<(), EventLoopError> {
        self.endpoint.call_blocking::<_, _, EventLoopError>(move |ops| match id.0.get() {
            Some(id) => ops.remove_subscriber(*id).map(drop).map_err(EventLoopError::from),
            // It is asked for in order, so that the worker was added before this.
            None => Err(EventLoopError::Gone(event_manager::Error::InvalidId)),
        })
    }
}
