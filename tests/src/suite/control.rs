//! Statistics, pausing, a want of memory, and devices.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Detached, Runtime};

/// The numbers that `ctr task metrics` shows, by their names.
fn metrics(container: &Detached) -> Result<Vec<(String, f64)>> {
    let shown = container.task(&["metrics", &container.name])?.expect(0)?.stdout;
    let pair = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    Ok(shown.lines().filter_map(pair).collect())
}

pub(crate) fn statistics_are_not_zero(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let container = bed.detached(runtime, &["sh", "-c", "while :; do :; done"])?;
        container.reaches("RUNNING")?;
        std::thread::sleep(std::time::Duration::from_secs(1));
        let metrics = metrics(&container)?;
        for name in ["pids.current", "memory.usage", "cpu.usage_usec", "cpu.user_usec"] {
            // ctr of another version may call them otherwise, so the last part counts.
            let end = name.rsplit('.').next().unwrap_or(name);
            let found = metrics.iter().find(|(shown, _)| shown.ends_with(end));
            ensure!(
                found.is_some_and(|(_, value)| *value > 0.0),
                "{runtime:?}: {name} is {found:?} in {metrics:?}"
            );
        }
    }
    Ok(())
}

pub(crate) fn paused_container_stands_still(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let container = bed.detached(runtime, &["sh", "-c", "while :; do :; done"])?;
        container.reaches("RUNNING")?;
        let name = container.name.as_str();
        container.task(&["pause", name])?.expect(0)?;
        container.reaches("PAUSED")?;
        let refused = container.exec(&[], &["true"])?;
        ensure!(refused.status != 0, "{runtime:?}: a process was added: {refused:?}");
        container.task(&["resume", name])?.expect(0)?;
        container.reaches("RUNNING")?;
        container.exec(&[], &["true"])?.expect(0)?;
        container.task(&["pause", name])?.expect(0)?;
        container.task(&["kill", "-s", "SIGKILL", name])?.expect(0)?;
        container.reaches("STOPPED")?;
    }
    Ok(())
}

pub(crate) fn want_of_memory_is_told(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let mut events = Command::new("ctr").arg("events").stdout(Stdio::piped()).spawn()?;
        let output = events.stdout.take().context("the events")?;
        // One container whose events show that they are being listened to.
        let told = bed
            .run(runtime, &["--memory-limit", "25165824"], &["sh", "-c", "tail /dev/zero"])
            .map(|outcome| outcome.status);
        let ended = bed.run(Runtime::Runc, &[], &["true"]);
        std::thread::sleep(std::time::Duration::from_secs(1));
        events.kill()?;
        events.wait()?;
        let lines: Vec<String> = BufReader::new(output).lines().map_while(Result::ok).collect();
        let status = told?;
        ended?.expect(0)?;
        ensure!(status == 137, "{runtime:?}: it ended with {status}");
        let at = |topic: &str| lines.iter().position(|line| line.contains(topic));
        let (oom, exit) = (at("/tasks/oom"), at("/tasks/exit"));
        ensure!(oom.is_some(), "{runtime:?}: no /tasks/oom in {lines:?}");
        // runc's shim promises no order.
        ensure!(runtime == Runtime::Runc || oom < exit, "{runtime:?}: {lines:?}");
    }
    Ok(())
}

pub(crate) fn devices_are_the_guests(bed: &Bed) -> Result<()> {
    let outcome = bed.run(Runtime::Vial, &["--privileged"], &["ls", "/dev"])?.expect(0)?;
    let devices = outcome.stdout;
    let has = |name: &str| devices.lines().any(|device| device == name);
    // The host has the last two, as every host of Vial's does.
    ensure!(has("fuse") && has("null") && !has("kvm") && !has("vhost-net"), "{devices}");

    let refused = bed.run(Runtime::Vial, &["--device", "/dev/kvm"], &["true"])?;
    ensure!(
        refused.status != 0 && refused.stderr.contains("/dev/kvm is the host's"),
        "a device of the host: {refused:?}"
    );
    Ok(())
}
