//! One process of a container, as containerd sees it: its state, its streams, its end.
//!
//! What is done to it are steps, one at a time: each asks the guest, changes the state, and tells containerd. So
//! containerd hears of each process in the order in which things happened, and of its end once.

#[cfg(test)]
mod order_tests;

use std::{
    sync::{Mutex, MutexGuard, OnceLock},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use crate::{
    error::ServiceError,
    life::{self, Exit, NoSuchStep, ProcessEvent, ProcessState},
    stdio::{Places, Streams},
};

/// The status of a process that ended with its VM, as if killed.
pub const KILLED: u32 = 128 + 9;
/// The status of a process that could not be started.
pub const NOT_STARTED: u32 = 128;

/// How long a deletion waits for output that does not move.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// A process: the init of a container, or an exec.
#[derive(Debug)]
pub struct Process {
    /// Empty for the init process.
    pub exec_id: String,
    /// Where its streams go.
    pub places: Places,
    /// The OCI `process` object of an exec, as containerd passed it.
    pub spec: Vec<u8>,
    /// Held for as long as a step takes.
    step: tokio::sync::Mutex<()>,
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

    fn advance(&self, event: ProcessEvent) -> Result<(), NoSuchStep> {
        let mut state = self.state_mut();
        *state = life::process(*state, event)?;
        Ok(())
    }

    /// Lets it go, by what `ask` asks of the guest, and then tells containerd by `tell`. When the guest refuses, it counts
    /// as ended, and can be deleted.
    ///
    /// # Errors
    /// [`ServiceError::State`] and those of `ask`.
    pub async fn start_by(
        &self,
        ask: impl Future<Output = Result<(), ServiceError>>,
        tell: impl Future<Output = ()>,
    ) -> Result<(), ServiceError> {
        let _step = self.step.lock().await;
        self.advance(ProcessEvent::Start)?;
        if let Err(error) = ask.await {
            let exit = Exit { status: NOT_STARTED, at: SystemTime::now() };
            self.advance(ProcessEvent::StartFailed(exit))?;
            self.finish_streams(Duration::ZERO).await;
            self.exit.send_replace(Some(exit));
            return Err(error);
        }
        self.advance(ProcessEvent::Started)?;
        tell.await;
        Ok(())
    }

    /// Has it stand still, as [`Process::start_by`] starts it. It runs on when the guest refuses.
    ///
    /// # Errors
    /// [`ServiceError::State`] and those of `ask`.
    pub async fn pause_by(
        &self,
        ask: impl Future<Output = Result<(), ServiceError>>,
        tell: impl Future<Output = ()>,
    ) -> Result<(), ServiceError> {
        let _step = self.step.lock().await;
        self.advance(ProcessEvent::Pause)?;
        if let Err(error) = ask.await {
            self.advance(ProcessEvent::Resumed)?;
            return Err(error);
        }
        self.advance(ProcessEvent::Paused)?;
        tell.await;
        Ok(())
    }

    /// Lets it run on, as [`Process::start_by`] starts it. The guest refuses when it does not stand still.
    ///
    /// # Errors
    /// [`ServiceError::State`] and those of `ask`.
    pub async fn resume_by(
        &self,
        ask: impl Future<Output = Result<(), ServiceError>>,
        tell: impl Future<Output = ()>,
    ) -> Result<(), ServiceError> {
        let _step = self.step.lock().await;
        ask.await?;
        self.advance(ProcessEvent::Resumed)?;
        tell.await;
        Ok(())
    }

    /// It has ended with that status: after `reason`, which may tell why, containerd hears of it by `tell`, and then whoever
    /// waits. Nothing but the reason is told of one that has ended before.
    pub async fn end_by<T: Future<Output = ()>>(
        &self,
        status: u32,
        reason: impl Future<Output = ()>,
        tell: impl FnOnce(Exit) -> T,
    ) {
        let _step = self.step.lock().await;
        reason.await;
        let exit = Exit { status, at: SystemTime::now() };
        if self.advance(ProcessEvent::Exited(exit)).is_ok() {
            tell(exit).await;
            self.exit.send_replace(Some(exit));
        }
    }

    /// Forgets it, by `remove`, which gets how it ended and whether the guest can know of it. Returns how it ended.
    ///
    /// # Errors
    /// [`ServiceError::State`] while it runs, and those of `remove`: it can be tried again then.
    pub async fn delete_by<R: Future<Output = Result<(), ServiceError>>>(
        &self,
        remove: impl FnOnce(Exit, bool) -> R,
    ) -> Result<Exit, ServiceError> {
        let _step = self.step.lock().await;
        let state = self.state();
        life::process(state, ProcessEvent::Delete)?;
        let exit = match state {
            ProcessState::Stopped(exit) => exit,
            _ => Exit { status: 0, at: SystemTime::now() },
        };
        self.finish_streams(OUTPUT_PATIENCE).await;
        remove(exit, state != ProcessState::Added).await?;
        self.advance(ProcessEvent::Delete)?;
        Ok(exit)
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
