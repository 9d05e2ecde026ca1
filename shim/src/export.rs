//! What the `vial` command knows of the sandboxes, in forms that other programs read.

pub mod metrics;
pub mod trace;

use crate::timeline::Mark;

/// The mark that a start begins with.
const EXEC: &str = "shim exec";
/// The mark of a guest that has gone on from a template.
const ADOPTED: &str = "guest adopted";

/// Whether a start with those marks went on from a template.
fn is_from_template(timeline: &[Mark]) -> bool {
    timeline.iter().any(|mark| mark.name == ADOPTED)
}

/// A sandbox with that start, and a VMM in the cgroup of its name.
#[cfg(test)]
fn listed(id: &str, alive: bool, timeline: Vec<Mark>) -> crate::ps::Listed {
    use crate::state_dir::{ProcessIdentity, STATE_VERSION, State};

    let state = State {
        version: STATE_VERSION,
        namespace: "k8s.io".into(),
        id: id.into(),
        shim: ProcessIdentity { pid: 1, start_ticks: 1 },
        vmm: None,
        network: None,
        devices: Vec::new(),
        jail: Some(crate::jail::Record { user_id: 1, cgroup: id.into() }),
        socket: "/s".into(),
        vcpus: 2,
        memory_mib: 128,
        created_unix_seconds: 1_700_000_000,
    };
    crate::ps::Listed { state, alive, age_seconds: 1, placement: None, timeline }
}
