//! The sandboxes that run on this machine, read from their state directories.

use std::{
    fmt::Write,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::{
    numa::decide::Placement,
    state_dir::{State, StateDir, StateDirError},
    timeline::Mark,
};

/// One sandbox.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// What its shim wrote about it, with the size that its VM has now.
    #[serde(flatten)]
    pub state: State,
    /// Whether its VMM runs.
    pub alive: bool,
    /// How long ago it was created.
    pub age_seconds: u64,
    /// Where on the host it is; none when it may be anywhere.
    pub placement: Option<Placement>,
    /// The phases of its start.
    pub timeline: Vec<Mark>,
}

/// All sandboxes below `root`, by namespace and id.
///
/// # Errors
/// [`StateDirError`]. A root that does not exist holds no sandboxes.
pub fn list(root: &Path) -> Result<Vec<Listed>, StateDirError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut listed = Vec::new();
    for namespace in names(root)? {
        for id in names(&root.join(&namespace))? {
            // What has no proper name was not made by a shim.
            let Ok(dir) = StateDir::new(root, &namespace, &id) else { continue };
            // A sandbox may come and go while it is looked at.
            let Some(state) = dir.read_now()? else { continue };
            listed.push(Listed {
                alive: state.vmm.is_some_and(|vmm| vmm.is_alive()),
                age_seconds: now.saturating_sub(state.created_unix_seconds),
                placement: dir.read_placement()?,
                timeline: dir.read_timeline()?.unwrap_or_default(),
                state,
            });
        }
    }
    Ok(listed)
}

fn names(dir: &Path) -> Result<Vec<String>, StateDirError> {
    let io = |error| StateDirError::Io { action: "list", path: dir.into(), error };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
}

/// The sandboxes as a table.
pub fn table(sandboxes: &[Listed]) -> String {
    let mut text = format!(
        "{:<12} {:<24} {:>8} {:>6} {:>10} {:>8}  {:<8} {:<6} {:<6}\n",
        "NAMESPACE", "SANDBOX", "VMM", "VCPUS", "MEMORY", "AGE", "STATE", "NODES", "CPUS"
    );
    for Listed { state, alive, age_seconds, placement, .. } in sandboxes {
        let shown = |what: fn(&Placement) -> String| placement.as_ref().map_or("-".into(), what);
        let pid = state.vmm.map_or_else(|| "-".into(), |vmm| vmm.pid.to_string());
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<12} {:<24} {pid:>8} {:>6} {:>6} MiB {age_seconds:>6} s  {:<8} {:<6} {}",
            state.namespace,
            state.id,
            state.vcpus,
            state.memory_mib,
            if *alive { "running" } else { "ended" },
            shown(Placement::nodes_shown),
            shown(Placement::cpus_shown),
        );
    }
    text
}

/// The phases of each sandbox's start, in milliseconds since the shim was executed.
pub fn timelines(sandboxes: &[Listed]) -> String {
    let mut text = String::new();
    for Listed { state, timeline, .. } in sandboxes {
        let _ = writeln!(text, "{}/{}", state.namespace, state.id);
        let zero_ns = timeline
            .iter()
            .find(|mark| mark.name == "shim exec")
            .or(timeline.first())
            .map_or(0, |mark| mark.at_ns);
        let mut before_ns = zero_ns;
        for mark in timeline {
            let _ = writeln!(
                text,
                "{:>10.1} ms {:>+10.1}  {}",
                milliseconds(zero_ns, mark.at_ns),
                milliseconds(before_ns, mark.at_ns),
                mark.name
            );
            before_ns = mark.at_ns;
        }
    }
    text
}

fn milliseconds(from_ns: u64, to_ns: u64) -> f64 {
    // Of boots, which take less than the hours by which a double would lose a nanosecond.
    (to_ns as f64 - from_ns as f64) / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        size::Size,
        state_dir::{ProcessIdentity, STATE_VERSION},
    };

    #[test]
    fn sandboxes_are_listed_with_their_phases() {
        let root = tempfile::tempdir().unwrap();
        assert!(list(&root.path().join("absent")).unwrap().is_empty());
        let dir = StateDir::new(root.path(), "default", "demo").unwrap();
        dir.create().unwrap();
        let me = ProcessIdentity::of(std::process::id()).unwrap();
        dir.write_state(&State {
            version: STATE_VERSION,
            namespace: "default".into(),
            id: "demo".into(),
            shim: me,
            vmm: Some(me),
            network: None,
            devices: Vec::new(),
            jail: None,
            socket: "/s".into(),
            vcpus: 2,
            memory_mib: 256,
            created_unix_seconds: 0,
        })
        .unwrap();
        let placement = Placement {
            cpus: [2, 3].into(),
            pins: vec![3, 2],
            mems: [1].into(),
            ..Default::default()
        };
        dir.write_placement(&placement).unwrap();
        dir.write_size(Size { vcpus: 3, memory_mib: 384 }).unwrap();
        let mark = |name: &str, at_ns| Mark { name: name.into(), at_ns };
        dir.write_timeline(&[mark("shim exec", 1_000_000), mark("booted", 3_500_000)]).unwrap();
        let sandboxes = list(root.path()).unwrap();
        assert!(sandboxes[0].alive);
        let table = table(&sandboxes);
        assert!(table.contains("demo") && table.contains("    3    384 MiB "), "{table}");
        assert!(table.ends_with("running  1      =2-3\n"), "{table}");
        assert!(timelines(&sandboxes).contains("2.5 ms"), "{}", timelines(&sandboxes));
    }
}
