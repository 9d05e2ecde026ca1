//! Pods whose containers come, go, and have their limits changed while the pod runs: that the VM
//! follows them.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vial_tests::node::{self, Configuration};

use super::bed::{Bed, Runtime, run};
use super::faults::process;
use super::sizes::{Size, limits, pod};
use super::templates::Node;
use crate::cri::pod::{Container, Pod, eventually, idle};
use crate::cri::wire::ContainerState;

/// What a VM has for kernel and agent, in MiB.
const OWN_MIB: i64 = 128;
/// What the template's kernel keeps of its memory for itself, at most.
const KERNELS_MIB: i64 = 30;

/// More than 400 MiB in files of 4 MiB.
const FILES: i64 = 101;

/// Fills a file system in memory with files of which no two are the same, and reads some of each back: all would be as much
/// work again as to write them.
fn fill() -> String {
    let mib = FILES * 4 + 8;
    format!(
        "set -e; mkdir -p /fill; mount -t tmpfs -o size={mib}m fill /fill; cd /fill; {BASE}; \
         for at in $(seq {FILES}); do {{ seq $at; cat base; }} >$at; done; \
         for at in $(seq {FILES}); do {READ} <$at; done | md5sum"
    )
}

/// Makes 4 MiB.
const BASE: &str = "seq 99999999 | head -c 4194304 >base";
/// What is read back of a file.
const READ: &str = "head -c 65536";

/// The checksum of all of that, where it is not in a VM's memory.
fn checksum() -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let line = format!(
        "{BASE}; for at in $(seq {FILES}); do {{ seq $at; {READ} base; }} | {READ}; done | md5sum"
    );
    Ok(run(Command::new("sh").args(["-c", &line]).current_dir(scratch.path()))?.expect(0)?.stdout)
}

/// A container that waits, with those limits.
fn waiting(pod: &Pod, size: Size) -> Result<Container<'_>> {
    pod.start(idle().resources(limits(size)))
}

/// The CPUs of the guest, as one of its processes finds them, and its memory in MiB.
fn has(container: &Container<'_>) -> Result<(i64, i64)> {
    let said = container.exec("nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
    let (cpus, kib) = said.trim().split_once('\n').context("it says too little")?;
    Ok((cpus.parse()?, kib.parse::<i64>()? >> 10))
}

/// That the guest has as much as containers with limits of `mib` in all need, and so many CPUs.
fn holds(container: &Container<'_>, (cpus, mib): (i64, i64)) -> Result<()> {
    let (found_cpus, found_mib) = has(container)?;
    let wanted = OWN_MIB + mib - KERNELS_MIB..=OWN_MIB + mib + 4;
    ensure!(
        found_cpus == cpus && wanted.contains(&found_mib),
        "the guest has {found_cpus} CPUs and {found_mib} MiB, and {cpus} and {wanted:?} are due"
    );
    Ok(())
}

/// What the VMM takes of the host's memory, in MiB.
fn vmm_mib() -> Result<i64> {
    let path = format!("/proc/{}/smaps_rollup", process("vial-vmm", "")?);
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    let number = line.split_whitespace().next().context("no number")?;
    Ok(number.parse::<i64>()? >> 10)
}

/// That the only VM is listed with so many vCPUs and so much memory, in MiB.
fn is_listed(vcpus: i64, mib: i64) -> Result<()> {
    let text = run(Command::new("vial").args(["ps", "--json"]))?.expect(0)?.stdout;
    let listed: serde_json::Value = serde_json::from_str(&text)?;
    let told = (listed[0]["vcpus"].as_i64(), listed[0]["memory_mib"].as_i64());
    ensure!(told == (Some(vcpus), Some(mib)), "{vcpus} vCPUs and {mib} MiB are due: {text}");
    Ok(())
}

fn update(container: &Container<'_>, size: Size) -> Result<()> {
    container.pod.cri.update(&container.id, limits(size))
}

/// That an update is refused in these words and that the container's limits are what they were.
fn refused(container: &Container<'_>, size: Size, words: &str) -> Result<()> {
    const LIMITS: &str = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let before = container.exec(LIMITS)?;
    let error = update(container, size).err().context("it was not refused")?;
    ensure!(format!("{error:#}").contains(words), "{error:#}");
    let after = container.exec(LIMITS)?;
    ensure!(before == after, "a refused update changed {before:?} to {after:?}");
    ensure!(container.status()?.state() == ContainerState::Running, "it ended the container");
    Ok(())
}

pub(crate) fn cri_vm_follows_limits_that_are_raised_and_lowered(_: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let pod = pod((1000, 128))?;
    let config = idle().resources(limits((1000, 128)));
    let container = pod.start(config.security(|security| security.privileged = true))?;
    holds(&container, (1, 128))?;
    is_listed(1, OWN_MIB + 128)?;
    update(&container, (3000, 512))?;
    // At once: it is there when the update is answered.
    holds(&container, (3, 512))?;
    is_listed(3, OWN_MIB + 512)?;
    let (said, due) = (container.exec(&fill())?, checksum()?);
    ensure!(said == due, "what is in memory has the checksum {said:?} and not {due:?}");
    let used = vmm_mib()?;
    container.exec("umount /fill")?;
    // What is free goes back before less is asked for.
    eventually(|| {
        let now = vmm_mib()?;
        ensure!(now + 200 < used, "the VMM has {now} MiB and had {used}, of which 400 are free");
        Ok(())
    })?;
    update(&container, (1000, 128))?;
    eventually(|| {
        let (cpus, mib) = has(&container)?;
        ensure!(cpus == 1 && mib < OWN_MIB + 256, "the guest has {cpus} CPUs and {mib} MiB");
        is_listed(1, OWN_MIB + 128)
    })?;
    // What was given back can be had again.
    update(&container, (2000, 512))?;
    holds(&container, (2, 512))?;
    let status = container.status()?;
    ensure!(status.state() == ContainerState::Running, "{status:?}");
    pod.end()
}

pub(crate) fn cri_vm_follows_containers_that_come_and_go(_: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let pod = pod((1000, 64))?;
    let first = waiting(&pod, (1000, 64))?;
    holds(&first, (1, 64))?;
    let second = waiting(&pod, (1000, 200))?;
    holds(&second, (2, 264))?;
    // Both at once: each is as if the other had been before it.
    let sizes: [(Size, Size); 3] =
        [((2000, 300), (2000, 100)), ((500, 80), (1500, 400)), ((1500, 150), (1500, 250))];
    for (one, other) in sizes {
        std::thread::scope(|scope| {
            let updates = [(&first, one), (&second, other)]
                .map(|(container, size)| scope.spawn(move || update(container, size)));
            updates.into_iter().try_for_each(|update| {
                update.join().map_err(|_| anyhow::anyhow!("an update panicked"))?
            })
        })?;
        // Less is asked for later.
        let (cpus, mib) = has(&first)?;
        let wanted = ((one.0 + other.0 + 999) / 1000, one.1 + other.1 + OWN_MIB - KERNELS_MIB);
        ensure!(cpus >= wanted.0 && mib >= wanted.1, "{cpus} CPUs and {mib} MiB, not {wanted:?}");
    }
    second.stop(0)?;
    second.remove()?;
    update(&first, (1000, 64))?;
    eventually(|| {
        let (cpus, mib) = has(&first)?;
        ensure!(cpus == 1 && mib < OWN_MIB + 200, "the guest has {cpus} CPUs and {mib} MiB");
        Ok(())
    })?;
    pod.end()
}

pub(crate) fn cri_vm_grows_no_further_than_the_operator_allows(_: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let configuration = Configuration::keep();
    let text = node::with(configuration.text(), "max_memory_mib", "400");
    configuration.write(&node::with(&text, "max_vcpus", "2"))?;
    let pod = pod((1000, 64))?;
    let container = waiting(&pod, (1000, 64))?;
    refused(&container, (1000, 1024), "max_memory_mib")?;
    refused(&container, (3000, 64), "can grow to 2 and 400")?;
    holds(&container, (1, 64))?;
    update(&container, (2000, 256))?;
    holds(&container, (2, 256))?;
    // A container that may have more than the node grants has what there is.
    let greedy = waiting(&pod, (4000, 4096))?;
    holds(&greedy, (2, 400 - OWN_MIB))?;
    pod.end()
}

pub(crate) fn cri_vm_of_its_own_kernel_keeps_its_size_and_says_so(_: &Bed) -> Result<()> {
    let configuration = Configuration::keep();
    configuration.write(&node::with(configuration.text(), "templates", "\"off\""))?;
    let pod = pod((1000, 64))?;
    let container = waiting(&pod, (1000, 64))?;
    refused(&container, (1000, 128), "a kernel of its own")?;
    update(&container, (500, 32))?;
    update(&container, (1000, 64))?;
    // Whose limits nobody told, it is not held to.
    let untold = Pod::new(Runtime::Vial)?;
    let container = waiting(&untold, (1000, 64))?;
    update(&container, (1000, 96))?;
    let told = container.exec("cat /sys/fs/cgroup/memory.max")?;
    ensure!(told.trim() == (96i64 << 20).to_string(), "its limit is {told:?}");
    untold.end()?;
    pod.end()
}
