//! The lives of a sandbox and of a process, as pure functions.
//!
//! ```text
//! sandbox   Empty ──Start──> Starting ──Started──> Running ──Stop──> Stopping ──Stopped──> Stopped
//!                               │ StartFailed         │ VmEnded                               ^
//!                               └──────> Failed <─────┘ ───────────────Stop──> Stopping ──────┘
//!
//! process   Added ──Start──> Starting ──Started──> Running ──Exited──> Stopped ──Delete──> Deleted
//!             │                 ^ │ StartFailed                           ^
//!             │   Created ──────┘ └───────────────────────────────────────┤
//!             │     │     Running <──Resumed── Paused ──────Exited────────┤
//!             │     │        └─Pause─> Pausing ──Paused─> Paused          │
//!             │     └────────────────────────────Exited───────────────────┘
//!             └──Delete──> Deleted
//! ```
//!
//! `Created` is where a container's init process begins: it exists in the guest, stopped before
//! its first instruction. One that is `Pausing` runs again when that fails (`Resumed`). `Added` is where an exec begins: only remembered. The drivers
//! (`sandbox`, `process`) do the work; what is not in these functions is refused before any work
//! is done.

use std::time::SystemTime;

/// A step that does not exist from the present state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a {what} that is {state} cannot be {event}")]
pub struct NoSuchStep {
    what: &'static str,
    state: &'static str,
    event: &'static str,
}

/// The states of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxState {
    /// Nothing was started yet.
    Empty,
    /// The chain of steps runs.
    Starting,
    /// The agent answers.
    Running,
    /// The VM could not be started or has ended; what is left has to be stopped.
    Failed,
    /// The steps are being taken back.
    Stopping,
    /// Nothing is left.
    Stopped,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxEvent {
    /// The first container is to be created.
    Start,
    /// Every step succeeded.
    Started,
    /// A step failed, and those before it were taken back.
    StartFailed,
    /// The VM ended without being asked to.
    VmEnded,
    /// containerd wants the sandbox gone.
    Stop,
    /// Every step was taken back.
    Stopped,
}

/// The sandbox's next state.
///
/// # Errors
/// [`NoSuchStep`].
pub fn sandbox(state: SandboxState, event: SandboxEvent) -> Result<SandboxState, NoSuchStep> {
    use SandboxEvent as E;
    use SandboxState as S;
    Ok(match (state, event) {
        (S::Empty, E::Start) => S::Starting,
        (S::Starting, E::Started) => S::Running,
        (S::Starting, E::StartFailed) | (S::Running | S::Failed, E::VmEnded) => S::Failed,
        (S::Stopping | S::Stopped, E::VmEnded) => state,
        (S::Empty | S::Running | S::Failed, E::Stop) => S::Stopping,
        (S::Stopping, E::Stopped) => S::Stopped,
        _ => {
            return Err(NoSuchStep {
                what: "sandbox",
                state: match state {
                    S::Empty => "not started",
                    S::Starting => "starting",
                    S::Running => "running",
                    S::Failed => "failed",
                    S::Stopping => "stopping",
                    S::Stopped => "stopped",
                },
                event: match event {
                    E::Start | E::Started | E::StartFailed => "started",
                    E::VmEnded => "ended",
                    E::Stop | E::Stopped => "stopped",
                },
            });
        }
    })
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + n when ended by signal n.
    pub status: u32,
    /// When the shim learnt of it.
    pub at: SystemTime,
}

/// The states of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// An exec that was not started yet.
    Added,
    /// An init process that was not started yet.
    Created,
    /// The agent was asked to start it.
    Starting,
    /// It runs.
    Running,
    /// It runs, and the agent was asked to stop it where it is. Only an init process.
    Pausing,
    /// It stands where it was.
    Paused,
    /// It has ended, or could not be started.
    Stopped(Exit),
    /// It is forgotten.
    Deleted,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEvent {
    /// containerd wants it to run.
    Start,
    /// The agent let it go.
    Started,
    /// The agent could not let it go.
    StartFailed(Exit),
    /// containerd wants its container to stand still.
    Pause,
    /// Its container stands still.
    Paused,
    /// Its container runs again, or still.
    Resumed,
    /// The agent reported its end, or the VM ended.
    Exited(Exit),
    /// containerd wants it forgotten.
    Delete,
}

/// The process's next state.
///
/// # Errors
/// [`NoSuchStep`].
pub fn process(state: ProcessState, event: ProcessEvent) -> Result<ProcessState, NoSuchStep> {
    use ProcessEvent as E;
    use ProcessState as S;
    Ok(match (state, event) {
        (S::Added | S::Created, E::Start) => S::Starting,
        (S::Starting, E::Started) => S::Running,
        (S::Starting, E::StartFailed(exit)) => S::Stopped(exit),
        (S::Running, E::Pause) => S::Pausing,
        (S::Pausing, E::Paused) => S::Paused,
        (S::Pausing | S::Paused, E::Resumed) => S::Running,
        (S::Created | S::Running | S::Pausing | S::Paused, E::Exited(exit)) => S::Stopped(exit),
        (S::Added | S::Stopped(_), E::Delete) => S::Deleted,
        _ => {
            return Err(NoSuchStep {
                what: "process",
                state: match state {
                    S::Added | S::Created => "created",
                    S::Starting => "starting",
                    S::Running => "running",
                    S::Pausing => "being paused",
                    S::Paused => "paused",
                    S::Stopped(_) => "stopped",
                    S::Deleted => "deleted",
                },
                event: match event {
                    E::Start | E::Started | E::StartFailed(_) => "started",
                    E::Pause | E::Paused => "paused",
                    E::Resumed => "resumed",
                    E::Exited(_) => "ended",
                    E::Delete => "deleted",
                },
            });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exit() -> impl Strategy<Value = Exit> {
        (0..=255u32).prop_map(|status| Exit { status, at: SystemTime::UNIX_EPOCH })
    }

    fn process_event() -> impl Strategy<Value = ProcessEvent> {
        prop_oneof![
            Just(ProcessEvent::Start),
            Just(ProcessEvent::Started),
            Just(ProcessEvent::Pause),
            Just(ProcessEvent::Paused),
            Just(ProcessEvent::Resumed),
            exit().prop_map(ProcessEvent::StartFailed),
            exit().prop_map(ProcessEvent::Exited),
            Just(ProcessEvent::Delete),
        ]
    }

    fn sandbox_event() -> impl Strategy<Value = SandboxEvent> {
        prop_oneof![
            Just(SandboxEvent::Start),
            Just(SandboxEvent::Started),
            Just(SandboxEvent::StartFailed),
            Just(SandboxEvent::VmEnded),
            Just(SandboxEvent::Stop),
            Just(SandboxEvent::Stopped),
        ]
    }

    proptest! {
        #[test]
        fn process_ends_at_most_once_and_starts_at_most_once(
            exec in any::<bool>(),
            events in proptest::collection::vec(process_event(), 0..40),
        ) {
            let mut state = if exec { ProcessState::Added } else { ProcessState::Created };
            let (mut starts, mut ends) = (0, 0);
            for event in events {
                let Ok(next) = process(state, event) else { continue };
                prop_assert_ne!(state, ProcessState::Deleted, "nothing follows a deletion");
                let starting = state == ProcessState::Starting;
                starts += usize::from(starting && next == ProcessState::Running);
                ends += usize::from(matches!(next, ProcessState::Stopped(_)));
                state = next;
            }
            prop_assert!(starts <= 1 && ends <= 1);
        }

        #[test]
        fn process_is_never_deleted_while_it_runs(
            events in proptest::collection::vec(process_event(), 0..40),
        ) {
            let mut state = ProcessState::Created;
            for event in events {
                if let Ok(next) = process(state, event) {
                    if next == ProcessState::Deleted {
                        prop_assert!(matches!(state, ProcessState::Stopped(_)));
                    }
                    state = next;
                }
            }
        }

        #[test]
        fn sandbox_runs_once_and_can_always_be_stopped(
            events in proptest::collection::vec(sandbox_event(), 0..40),
        ) {
            let (mut state, mut runs) = (SandboxState::Empty, 0);
            for event in events {
                if let Ok(next) = sandbox(state, event) {
                    runs += usize::from(next == SandboxState::Running && state != next);
                    prop_assert!(state != SandboxState::Stopped || next == state);
                    state = next;
                }
            }
            prop_assert!(runs <= 1);
            if !matches!(state, SandboxState::Starting | SandboxState::Stopping | SandboxState::Stopped) {
                prop_assert!(sandbox(state, SandboxEvent::Stop).is_ok());
            }
        }
    }
}
