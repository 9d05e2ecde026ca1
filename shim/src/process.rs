//! One process of a container, as containerd sees it: its state, its streams, its end.

use std::{
    sync::{Mutex, MutexGuard, OnceLock},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use crate::{
    life::{self, Exit, NoSuchStep, ProcessEvent, ProcessState},
    stdio::{Places, Streams},
};

/// The status of a process that ended with its VM, as if killed.
pub const KILLED: u32 = 128 + 9;
/// The status of a process that could not be started.
pub const NOT_STARTED: u32 = 128;

/// A process: the init of a container, or an exec.
#[derive(Debug)]
pub struct Process {
    /// Empty for the init process.
    pub exec_id: String,
    /// Where its streams go.
    pub places: Places,
    /// The OCI `process` object of an exec, as containerd passed it.
    pub spec: Vec<u8>,
    /// Held while the process is started, ends or is deleted, so that containerd hears of each
    /// in order.
    pub step: tokio::sync::Mutex<()>,
    streams: OnceLock<Streams>,
    state: Mutex<ProcessState>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A container's init process, which the agent has made.
    pub fn init(places: Places, streams: Streams) -> Self {
        let process = Self::new(String::new(), places, Vec::new(), ProcessState::Created);
        process.attach(streams);
        process
    }

    /// An exec, which the agent does not know of yet.
    pub fn exec(exec_id: String, places: Places, spec: Vec<u8>) -> Self {
        Self::new(exec_id, places, spec, ProcessState::Added)
    }

    fn new(exec_id: String, places: Places, spec: Vec<u8>, state: ProcessState) -> Self {
        Self {
            exec_id,
            places,
            spec,
            step: tokio::sync::Mutex::new(()),
            streams: OnceLock::new(),
            state: Mutex::new(state),
            exit: watch::Sender::new(None),
        }
    }

    /// Its streams, once they are open. They are opened once.
    pub fn attach(&self, streams: Streams) {
        if self.streams.set(streams).is_err() {
            tracing::error!("the streams of a process were opened twice");
        }
    }

    fn state_mut(&self) -> MutexGuard<'_, ProcessState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What it is doing.
    pub fn state(&self) -> ProcessState {
        *self.state_mut()
    }

    /// Takes a step, if there is one.
    ///
    /// # Errors
    /// [`NoSuchStep`].
    pub fn advance(&self, event: ProcessEvent) -> Result<ProcessState, NoSuchStep> {
        let mut state = self.state_mut();
        *state = life::process(*state, event)?;
        Ok(*state)
    }

    /// Tells everyone who waits that it has ended.
    pub fn tell_exit(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// Waits until it has ended.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The sender lives as long as `self`, so there always is an end to be told.
        ended.unwrap_or(Exit { status: KILLED, at: SystemTime::now() })
    }

    /// Lets its stdin end.
    pub fn close_stdin(&self) {
        if let Some(streams) = self.streams.get() {
            streams.close_stdin();
        }
    }

    /// Waits for its output, as [`Streams::finish`].
    pub async fn finish_streams(&self, patience: Duration) {
        if let Some(streams) = self.streams.get() {
            streams.finish(patience).await;
        }
    }
}
