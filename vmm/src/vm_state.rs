//! The life of a VM, as its owner sees it.
//!
//! ```text
//! Empty ──boot──> Running ──end, saved──> Ended
//!   └─────────────────end─────────────────>┘
//! ```

use vial_vmm_api::VmState;

/// What can happen to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmEvent {
    /// The owner asks for a boot.
    Boot,
    /// The owner asks for it to be saved.
    Save,
    /// It was saved: nothing of it is left to run.
    Saved,
    /// The owner connects to a port of the guest.
    Connect,
    /// The owner gives it functions or disks of the host, or takes them.
    Pass,
    /// The owner changes its size, or asks for it.
    Resize,
    /// The guest ended, or is ended.
    End,
}

/// Why something cannot happen now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the VM is {state:?}: it cannot {what}")]
pub struct WrongState {
    /// The state that it is in.
    pub state: VmState,
    /// What was asked for.
    pub what: &'static str,
}

/// The state after `event`.
///
/// # Errors
/// The event does not fit the state.
pub fn next(state: VmState, event: VmEvent) -> Result<VmState, WrongState> {
    match (state, event) {
        (VmState::Empty, VmEvent::Boot) => Ok(VmState::Running),
        (VmState::Running, VmEvent::Connect | VmEvent::Save | VmEvent::Pass | VmEvent::Resize) => {
            Ok(VmState::Running)
        }
        (VmState::Empty | VmState::Running, VmEvent::End) => Ok(VmState::Ended),
        (VmState::Running, VmEvent::Saved) => Ok(VmState::Ended),
        (_, VmEvent::Boot) => Err(WrongState { state, what: "boot; a VM boots once" }),
        (_, VmEvent::Connect) => {
            Err(WrongState { state, what: "take a connection; it has to run" })
        }
        (_, VmEvent::Pass) => {
            Err(WrongState { state, what: "be given devices or lose them; it has to run" })
        }
        (_, VmEvent::Resize) => Err(WrongState { state, what: "grow; it has to run" }),
        (_, VmEvent::Save | VmEvent::Saved) => {
            Err(WrongState { state, what: "be saved; it has to run" })
        }
        (VmState::Ended, VmEvent::End) => Err(WrongState { state, what: "end again" }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn vm_boots_at_most_once_and_stays_ended(
            events in proptest::collection::vec(
                proptest::sample::select(vec![
                    VmEvent::Boot, VmEvent::Connect, VmEvent::Save, VmEvent::Saved, VmEvent::Pass,
                    VmEvent::Resize, VmEvent::End,
                ]), 0..20)
        ) {
            let mut state = VmState::Empty;
            let (mut boots, mut ended) = (0, false);
            for event in events {
                if let Ok(next) = next(state, event) {
                    prop_assert!(!ended);
                    boots += u32::from(event == VmEvent::Boot);
                    ended = next == VmState::Ended;
                    prop_assert!(event != VmEvent::Saved || boots == 1);
                    state = next;
                }
                prop_assert!(boots <= 1);
                prop_assert_eq!(ended, state == VmState::Ended);
            }
        }
    }
}
