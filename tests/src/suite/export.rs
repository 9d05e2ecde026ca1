//! What `vial metrics` and `vial trace` tell other programs of a pod.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Runtime, run};

fn vial(args: &[&str], status: i32) -> Result<String> {
    let outcome = run(Command::new("vial").args(args))?.expect(status)?;
    Ok(if status == 0 { outcome.stdout } else { outcome.stderr })
}

/// The value of the line that begins with `name` and names `of`.
fn value(text: &str, name: &str, of: &str) -> Result<f64> {
    let mut lines = text.lines().filter(|line| line.starts_with(name) && line.contains(of));
    let line = lines.next().with_context(|| format!("no {name} of {of}: {text}"))?;
    Ok(line.rsplit_once(' ').context("no value")?.1.parse()?)
}

pub(crate) fn metrics_and_traces_tell_of_a_pod(bed: &Bed) -> Result<()> {
    let before = value(&vial(&["metrics"], 0)?, "vial_sandboxes", "running")?;
    ensure!(before == 0.0, "{before} run before any was started");
    let container = bed.detached(Runtime::Vial, &["sleep", "1000"])?;
    container.reaches("RUNNING")?;

    let text = vial(&["metrics"], 0)?;
    let of = format!("sandbox=\"{}\"", container.name);
    ensure!(value(&text, "vial_sandboxes", "running")? == 1.0, "{text}");
    for (name, least, most) in [
        ("vial_sandbox_guest_memory_bytes", 64e6, 64e9),
        ("vial_sandbox_memory_bytes", 1e6, 1e9),
        ("vial_sandbox_cpu_seconds_total", 0.001, 1000.0),
        ("vial_sandbox_vcpus", 1.0, 64.0),
    ] {
        let found = value(&text, name, &of)?;
        ensure!((least..=most).contains(&found), "{name} is {found}");
    }
    let phase = |until| value(&text, "vial_sandbox_start_seconds", &format!("until=\"{until}\""));
    ensure!(0.0 < phase("VMM spawned")? && phase("VMM spawned")? < phase("agent greeted")?);

    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vial.prom");
    let name = file.display().to_string();
    vial(&["metrics", "--output", &name], 0)?;
    ensure!(value(&fs::read_to_string(&file)?, "vial_sandbox_vcpus", &of)? >= 1.0);
    ensure!(fs::read_dir(&directory)?.count() == 1, "something is left beside it");
    let error = vial(&["metrics", "--output", "/no/such/directory/vial.prom"], 1)?;
    ensure!(error.contains("/no/such/directory/vial.prom"), "{error}");

    let trace = vial(&["trace", &container.name], 0)?;
    let trace: serde_json::Value = serde_json::from_str(&trace)?;
    let spans = trace["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array();
    let spans = spans.context("no spans")?;
    let time = |index: usize, key: &str| -> Result<u64> {
        Ok(spans[index][key].as_str().context("no time")?.parse()?)
    };
    ensure!(spans.len() > 5 && spans[0]["name"] == "start sandbox", "{trace}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos();
    let ago = now.saturating_sub(time(0, "startTimeUnixNano")?.into());
    ensure!(ago < 300_000_000_000, "it says that it started {ago} ns ago");
    for index in 1..spans.len() {
        ensure!(time(index, "startTimeUnixNano")? <= time(index, "endTimeUnixNano")?, "{trace}");
        ensure!(time(index, "endTimeUnixNano")? <= time(0, "endTimeUnixNano")?, "{trace}");
    }
    let error = vial(&["trace", "no-such-sandbox"], 1)?;
    ensure!(error.contains("'no-such-sandbox'"), "{error}");
    bed.clear();
    let after = value(&vial(&["metrics"], 0)?, "vial_sandboxes", "running")?;
    ensure!(after == 0.0, "{after} run after the last was removed");
    Ok(())
}
