//! What is left when something goes wrong.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Detached, Runtime};

pub(crate) fn program_that_is_absent_fails_like_with_runc(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let outcome = bed.run(runtime, &[], &["/no/such/program"])?;
        ensure!(
            outcome.status != 0 && outcome.stderr.contains("/no/such/program"),
            "{runtime:?}: {outcome:?}"
        );
        bed.clear();
        bed.nothing_left().with_context(|| format!("{runtime:?}"))?;
    }
    Ok(())
}

/// The number of the only process whose name begins with `prefix` and whose command line
/// mentions `word`.
pub(crate) fn process(prefix: &str, word: &str) -> Result<i32> {
    let found = processes(prefix, word)?;
    ensure!(found.len() == 1, "{} processes are called {prefix} with {word}", found.len());
    Ok(found[0])
}

/// The numbers of all of them.
pub(crate) fn processes(prefix: &str, word: &str) -> Result<Vec<i32>> {
    let found = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| {
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
            (name.starts_with(prefix) && line.contains(word)).then_some(())?;
            entry.file_name().to_str()?.parse().ok()
        })
        .collect();
    Ok(found)
}

pub(crate) fn kill(pid: i32) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).context("a process number")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    Ok(())
}

fn running(bed: &Bed) -> Result<Detached> {
    let container = bed.detached(Runtime::Vial, &["sleep", "1000"])?;
    container.reaches("RUNNING")?;
    Ok(container)
}

pub(crate) fn killed_vmm_ends_its_container(bed: &Bed) -> Result<()> {
    let container = running(bed)?;
    kill(process("vial-vmm", "")?)?;
    container.reaches("STOPPED")?;
    // `ctr` only tells the status of what it deletes.
    let deleted = container.task(&["delete", &container.name])?.expect(0)?;
    ensure!(deleted.stderr.contains("137"), "killed with its VMM: {deleted:?}");
    Ok(())
}

pub(crate) fn killed_shim_is_cleaned_up_after(bed: &Bed) -> Result<()> {
    let container = running(bed)?;
    kill(process("containerd-shim", "vial")?)?;
    drop(container);
    bed.clear();
    Ok(())
}
