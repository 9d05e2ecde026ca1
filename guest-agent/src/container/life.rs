//! The life of a container and of a process added to it, as pure functions.
//!
//! ```text
//! container:  Creating ──Made──> Created ──Start──> Starting ──Started──> Running
//!                                   │                   │                 │  ^ Pause, Resume
//!                                   │                   │                 v  │
//!                                   │                   │                Paused
//!                                   ├──────Exited───────┴───────Exited───────┤
//!                                   │                                        v
//!                                   └───Delete───> Deleting <───Delete─── Stopped
//!                                                     │  └──DeleteFailed──────^
//!                                                     └──Deleted──> (forgotten)
//!
//! exec:       Starting ──Started──> Running ──Exited──> Stopped ──Delete──> (forgotten)
//! ```
//!
//! A container that could not be made, and an exec that could not be started, are forgotten
//! without an event.

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContainerState {
    /// Its init process is being made.
    Creating,
    /// Its init process stands before its first instruction.
    Created,
    /// Its init process was told to go.
    Starting,
    Running,
    /// Its processes stand where they were.
    Paused,
    /// Its init process has ended.
    Stopped,
    /// Its cgroup and files are being removed.
    Deleting,
    /// It is no more.
    Deleted,
}

/// What happens to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContainerEvent {
    Made,
    Start,
    Started,
    Pause,
    Resume,
    Exited,
    Delete,
    DeleteFailed,
    Deleted,
}

/// An event that a state does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is {state}")]
pub(crate) struct Refused {
    state: &'static str,
}

impl ContainerState {
    fn name(self) -> &'static str {
        match self {
            ContainerState::Creating => "still being created",
            ContainerState::Created => "created but not started",
            ContainerState::Starting => "starting",
            ContainerState::Running => "running",
            ContainerState::Paused => "paused",
            ContainerState::Stopped => "stopped",
            ContainerState::Deleting => "being deleted",
            ContainerState::Deleted => "deleted",
        }
    }

    /// The state after `event`.
    ///
    /// # Errors
    /// The state does not take the event; it stays as it was.
    pub(crate) fn next(self, event: ContainerEvent) -> Result<Self, Refused> {
        use ContainerEvent as E;
        use ContainerState as S;
        match (self, event) {
            (S::Creating, E::Made) => Ok(S::Created),
            (S::Created, E::Start) => Ok(S::Starting),
            (S::Starting, E::Started) => Ok(S::Running),
            // It ran and ended before its start was noticed.
            (S::Stopped, E::Started) => Ok(S::Stopped),
            (S::Running, E::Pause) => Ok(S::Paused),
            (S::Paused, E::Resume) => Ok(S::Running),
            (S::Created | S::Starting | S::Running | S::Paused, E::Exited) => Ok(S::Stopped),
            // Deleting a container that never ran ends its init process.
            (S::Deleting, E::Exited) => Ok(S::Deleting),
            (S::Created | S::Stopped, E::Delete) => Ok(S::Deleting),
            (S::Deleting, E::DeleteFailed) => Ok(S::Stopped),
            (S::Deleting, E::Deleted) => Ok(S::Deleted),
            _ => Err(Refused { state: self.name() }),
        }
    }

    /// Whether a process can be added.
    ///
    /// # Errors
    /// It is not running.
    pub(crate) fn takes_exec(self) -> Result<(), Refused> {
        match self {
            ContainerState::Running => Ok(()),
            _ => Err(Refused { state: self.name() }),
        }
    }
}

/// Where an added process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExecState {
    Starting,
    Running,
    Stopped,
    Deleted,
}

/// What happens to an added process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExecEvent {
    Started,
    Exited,
    Delete,
}

impl ExecState {
    fn name(self) -> &'static str {
        match self {
            ExecState::Starting => "starting",
            ExecState::Running => "running",
            ExecState::Stopped => "stopped",
            ExecState::Deleted => "deleted",
        }
    }

    /// The state after `event`.
    ///
    /// # Errors
    /// The state does not take the event; it stays as it was.
    pub(crate) fn next(self, event: ExecEvent) -> Result<Self, Refused> {
        match (self, event) {
            (ExecState::Starting, ExecEvent::Started) => Ok(ExecState::Running),
            (ExecState::Running, ExecEvent::Exited) => Ok(ExecState::Stopped),
            (ExecState::Stopped, ExecEvent::Delete) => Ok(ExecState::Deleted),
            _ => Err(Refused { state: self.name() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn container_event() -> impl Strategy<Value = ContainerEvent> {
        use ContainerEvent as E;
        prop::sample::select(vec![
            E::Made,
            E::Start,
            E::Started,
            E::Pause,
            E::Resume,
            E::Exited,
            E::Delete,
            E::DeleteFailed,
            E::Deleted,
        ])
    }

    fn exec_event() -> impl Strategy<Value = ExecEvent> {
        prop::sample::select(vec![ExecEvent::Started, ExecEvent::Exited, ExecEvent::Delete])
    }

    proptest! {
        #[test]
        fn container_runs_at_most_once_and_stays_deleted(
            events in prop::collection::vec(container_event(), 0..60),
        ) {
            let mut state = ContainerState::Creating;
            let mut starts = 0;
            let mut was_running = false;
            for event in events {
                let Ok(next) = state.next(event) else { continue };
                starts += usize::from(next == ContainerState::Starting);
                prop_assert_eq!(next == ContainerState::Paused, event == ContainerEvent::Pause);
                prop_assert_ne!(state, ContainerState::Deleted);
                if was_running {
                    let back = matches!(next, ContainerState::Creating | ContainerState::Created);
                    prop_assert!(!back);
                }
                was_running |= next == ContainerState::Running;
                prop_assert_eq!(next.takes_exec().is_ok(), next == ContainerState::Running);
                state = next;
            }
            prop_assert!(starts <= 1);
        }

        #[test]
        fn running_container_is_deleted_only_after_its_end(
            events in prop::collection::vec(container_event(), 0..60),
        ) {
            let mut state = ContainerState::Creating;
            let mut exited = false;
            for event in events {
                let Ok(next) = state.next(event) else { continue };
                exited |= event == ContainerEvent::Exited;
                let runs = matches!(
                    state,
                    ContainerState::Starting | ContainerState::Running | ContainerState::Paused
                );
                if runs && next == ContainerState::Deleting {
                    prop_assert!(exited);
                }
                prop_assert!(!(runs && next == ContainerState::Deleting));
                state = next;
            }
        }

        #[test]
        fn exec_goes_one_way(events in prop::collection::vec(exec_event(), 0..20)) {
            let rank = |state| match state {
                ExecState::Starting => 0,
                ExecState::Running => 1,
                ExecState::Stopped => 2,
                ExecState::Deleted => 3,
            };
            let mut state = ExecState::Starting;
            for event in events {
                if let Ok(next) = state.next(event) {
                    prop_assert_eq!(rank(next), rank(state) + 1);
                    state = next;
                }
            }
        }
    }
}
