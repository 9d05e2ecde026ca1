//! Numbers for Prometheus, in its text form (OpenMetrics 1.0).
//!
//! What a guest writes, names of its phases for one, is not in them.

use std::path::Path;
use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use super::{EXEC, is_from_template};
use crate::{ps, template, timeline::Mark};

type Labels = Vec<(&'static str, String)>;
type Numbers = Family<Labels, Gauge<f64, AtomicU64>>;
type Sums = Family<Labels, Counter<f64, AtomicU64>>;

/// How far a start may be told to have come: marks that the shim sets itself, in their order.
const PHASES: [&str; 3] = ["VMM spawned", "agent greeted", "pod configured"];

/// What a sandbox costs the host, by the cgroup of its VMM.
#[derive(Debug, Default, PartialEq)]
struct Cost {
    memory_bytes: Option<u64>,
    cpu_microseconds: Option<u64>,
    oom_kills: Option<u64>,
}

impl Cost {
    /// A cgroup that has gone costs nothing that could be told.
    fn of(cgroup: &Path) -> Self {
        let read = |file| std::fs::read_to_string(cgroup.join(file)).unwrap_or_default();
        Self {
            memory_bytes: read("memory.current").trim().parse().ok(),
            cpu_microseconds: number(&read("cpu.stat"), "usage_usec"),
            oom_kills: number(&read("memory.events"), "oom_kill"),
        }
    }
}

/// The number behind a word at the beginning of a line (Linux, Documentation/admin-guide/cgroup-v2.rst, "flat keyed").
fn number(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// All that is measured.
#[derive(Default)]
struct Measured {
    sandboxes: Numbers,
    vcpus: Numbers,
    size: Numbers,
    created: Numbers,
    phases: Numbers,
    memory: Numbers,
    cpu: Sums,
    oom_kills: Sums,
    templates: Numbers,
    template_size: Numbers,
}

impl Measured {
    fn registered(&self) -> Registry {
        let mut all = Registry::with_prefix("vial");
        all.register("build", "This program", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        all.register("sandboxes", "Sandboxes on this host", self.sandboxes.clone());
        all.register("sandbox_vcpus", "vCPUs of the VM", self.vcpus.clone());
        let bytes = |what: &str| (what.to_owned(), Unit::Bytes);
        for (name, (help, unit), family) in [
            ("sandbox_guest_memory", bytes("Memory that the VM's guest has"), &self.size),
            ("sandbox_memory", bytes("Memory that the VM takes of the host"), &self.memory),
            ("template_disk", bytes("What a template takes of the disk"), &self.template_size),
            (
                "sandbox_created_timestamp",
                ("When it was created, since 1970".to_owned(), Unit::Seconds),
                &self.created,
            ),
            (
                "sandbox_start",
                ("From the exec of the shim until a phase of the start".to_owned(), Unit::Seconds),
                &self.phases,
            ),
        ] {
            all.register_with_unit(name, help, unit, family.clone());
        }
        let cpu = "Time that the VM has spent on CPUs of the host";
        all.register_with_unit("sandbox_cpu", cpu, Unit::Seconds, self.cpu.clone());
        let kills = "VMMs killed since the VM wanted more memory than it may have of the host";
        all.register("sandbox_oom_kills", kills, self.oom_kills.clone());
        all.register("templates", "Templates, and whether pods use them", self.templates.clone());
        all
    }

    fn add_sandbox(&self, listed: &ps::Listed, cgroups: &Path) {
        let state = &listed.state;
        let labels = || vec![("namespace", state.namespace.clone()), ("sandbox", state.id.clone())];
        let word = if listed.alive { "running" } else { "ended" };
        self.sandboxes.get_or_create(&vec![("state", word.to_owned())]).inc();
        self.vcpus.get_or_create(&labels()).set(f64::from(state.vcpus));
        let guest_bytes = f64::from(state.memory_mib) * f64::from(1 << 20);
        self.size.get_or_create(&labels()).set(guest_bytes);
        self.created.get_or_create(&labels()).set(state.created_unix_seconds as f64);
        let from = if is_from_template(&listed.timeline) { "template" } else { "kernel" };
        for (phase, seconds) in phases(&listed.timeline) {
            let mut labels = labels();
            labels.extend([("from", from.to_owned()), ("until", phase.to_owned())]);
            self.phases.get_or_create(&labels).set(seconds);
        }
        let Some(jail) = &state.jail else { return };
        let cost = Cost::of(&cgroups.join(&jail.cgroup));
        if let Some(bytes) = cost.memory_bytes {
            self.memory.get_or_create(&labels()).set(bytes as f64);
        }
        if let Some(microseconds) = cost.cpu_microseconds {
            self.cpu.get_or_create(&labels()).inc_by(microseconds as f64 / 1e6);
        }
        if let Some(kills) = cost.oom_kills {
            self.oom_kills.get_or_create(&labels()).inc_by(kills as f64);
        }
    }

    fn add_template(&self, listed: &template::list::Listed) {
        self.templates.get_or_create(&vec![("used", listed.used.to_string())]).inc();
        let labels = vec![("template", listed.name.clone())];
        self.template_size.get_or_create(&labels).set(listed.disk_bytes as f64);
    }
}

/// How many seconds after its beginning a start had come to each of [`PHASES`].
fn phases(timeline: &[Mark]) -> impl Iterator<Item = (&'static str, f64)> {
    let at = |name: &str| timeline.iter().find(|mark| mark.name == name).map(|mark| mark.at_ns);
    PHASES.into_iter().filter_map(move |phase| {
        let since_ns = at(phase)?.checked_sub(at(EXEC)?)?;
        Some((phase, since_ns as f64 / 1e9))
    })
}

/// The sandboxes and templates of this host. `cgroups` is the root of the hierarchy of version 2.
pub fn text(
    sandboxes: &[ps::Listed],
    templates: &[template::list::Listed],
    cgroups: &Path,
) -> String {
    let measured = Measured::default();
    // Who counts none wants a 0, and not that nothing is said.
    for state in ["running", "ended"] {
        measured.sandboxes.get_or_create(&vec![("state", state.to_owned())]).set(0.0);
    }
    for used in [true, false] {
        measured.templates.get_or_create(&vec![("used", used.to_string())]).set(0.0);
    }
    sandboxes.iter().for_each(|one| measured.add_sandbox(one, cgroups));
    templates.iter().for_each(|one| measured.add_template(one));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &measured.registered());
    text
}

#[cfg(test)]
mod tests {
    use super::super::{ADOPTED, listed};
    use super::*;

    fn mark(name: &str, at_ns: u64) -> Mark {
        Mark { name: name.into(), at_ns }
    }

    #[test]
    fn numbers_are_told_of_each_sandbox() {
        let cgroups = tempfile::tempdir().unwrap();
        let cgroup = cgroups.path().join("one");
        std::fs::create_dir(&cgroup).unwrap();
        for (file, content) in [
            ("memory.current", "9437184\n"),
            ("cpu.stat", "usage_usec 1500000\nuser_usec 1\n"),
            ("memory.events", "oom 2\noom_kill 1\noom_group_kill 0\n"),
        ] {
            std::fs::write(cgroup.join(file), content).unwrap();
        }
        let timeline = vec![
            mark(EXEC, 1_000_000_000),
            mark("guest: \"\n} 1", 1_100_000_000),
            mark("agent greeted", 1_250_000_000),
            mark(ADOPTED, 1_300_000_000),
        ];
        let sandboxes = [listed("one", true, timeline), listed("two", false, Vec::new())];
        let text = text(&sandboxes, &[], cgroups.path());
        let of_one = "namespace=\"k8s.io\",sandbox=\"one\"";
        for line in [
            "vial_sandboxes{state=\"running\"} 1.0".to_owned(),
            "vial_sandboxes{state=\"ended\"} 1.0".to_owned(),
            "vial_templates{used=\"true\"} 0.0".to_owned(),
            format!("vial_sandbox_vcpus{{{of_one}}} 2.0"),
            format!("vial_sandbox_guest_memory_bytes{{{of_one}}} 134217728.0"),
            format!("vial_sandbox_memory_bytes{{{of_one}}} 9437184.0"),
            format!("vial_sandbox_cpu_seconds_total{{{of_one}}} 1.5"),
            format!("vial_sandbox_oom_kills_total{{{of_one}}} 1.0"),
            format!(
                "vial_sandbox_start_seconds{{{of_one},from=\"template\",until=\"agent greeted\"}} \
                 0.25"
            ),
        ] {
            assert!(text.lines().any(|has| has == line), "{line}: {text}");
        }
        assert!(!text.contains("guest:") && text.ends_with("# EOF\n"), "{text}");
        assert!(!text.contains("vial_sandbox_memory_bytes{namespace=\"k8s.io\",sandbox=\"two\""));
    }

    #[test]
    fn starts_that_did_not_begin_have_no_phases() {
        assert_eq!(phases(&[mark("agent greeted", 5)]).count(), 0);
        assert_eq!(phases(&[mark(EXEC, 9), mark("agent greeted", 5)]).count(), 0);
    }
}
