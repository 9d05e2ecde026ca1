//! Pods of every size that start from the one template: that they have what pods of that size have.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vial_tests::node::{self, Configuration};

use super::bed::{Bed, Runtime, run};
use super::templates::{COLD, Node, RESTORED};
use crate::cri::pod::{Pod, eventually, idle, sh};
use crate::cri::wire::{ContainerState, LinuxContainerResources};

const MIB: i64 = 1 << 20;

/// What a pod's containers may use together: thousandths of a CPU, and MiB of memory; 0 is no limit.
pub(super) type Size = (i64, i64);

/// The configuration's own, one that is more, and one with all CPUs that a template serves.
const SIZES: [Size; 3] = [(0, 0), (1500, 65), (8000, 1200)];
/// One with more CPUs than a template serves.
const BEYOND: Size = (9000, 64);

/// What a guest has: the CPUs of a new process, those that are online, and all memory in KiB.
const HAS: &str =
    "nproc; cat /sys/devices/system/cpu/online; awk '/MemTotal/ { print $2 }' /proc/meminfo";

pub(crate) fn limits((cpus, mib): Size) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpus * 100,
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    }
}

/// A pod of that size, by what a kubelet tells with it.
pub(super) fn pod(size: Size) -> Result<Pod> {
    Pod::with(Runtime::Vial, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(limits(size));
        linux.security_context.get_or_insert_default().privileged = true;
    })
}

fn cpus((thousandths, _): Size) -> i64 {
    (thousandths + 999).max(1000) / 1000
}

/// The CPUs of a pod that is new, which have to be those that it is to have, and its memory in KiB.
fn memory_kib(size: Size) -> Result<f64> {
    let pod = pod(size)?;
    let said = pod.prints(sh(HAS))?;
    let lines: Vec<&str> = said.lines().collect();
    let [count, online, memory] = lines[..] else { anyhow::bail!("it says {said:?}") };
    let wanted = cpus(size);
    let range = if wanted == 1 { "0".into() } else { format!("0-{}", wanted - 1) };
    ensure!(count == wanted.to_string() && online == range, "{size:?}: CPUs {count}, {online}");
    let memory = memory.parse()?;
    pod.end()?;
    Ok(memory)
}

fn all_from_the_template(bed: &Bed, log: usize, count: usize) -> Result<()> {
    let restored = bed.lines_since(log, RESTORED);
    let names: BTreeSet<&str> = restored
        .iter()
        .filter_map(|line| line.split_once(RESTORED))
        .map(|(_, name)| name)
        .collect();
    let cold = bed.lines_since(log, COLD);
    ensure!(cold.is_empty(), "not every VM came from the template: {cold:?}");
    ensure!(restored.len() == count && names.len() == 1, "{count} were due: {restored:?}");
    Ok(())
}

pub(crate) fn cri_pod_of_every_size_starts_from_one_template(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let log = bed.log_length();
    let from_template = SIZES.map(memory_kib);
    all_from_the_template(bed, log, SIZES.len())?;
    let configuration = Configuration::keep();
    configuration.write(&node::with(configuration.text(), "templates", "\"off\""))?;
    for (size, kib) in SIZES.into_iter().zip(from_template).skip(1) {
        let (kib, cold) = (kib?, memory_kib(size)?);
        ensure!((kib / cold - 1.0).abs() < 0.05, "{size:?}: {kib} KiB, cold {cold}");
    }
    Ok(())
}

pub(crate) fn cri_pod_beyond_the_template_boots_cold(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let log = bed.log_length();
    memory_kib(BEYOND)?;
    let cold = bed.lines_since(log, COLD);
    ensure!(cold.iter().any(|line| line.contains("no more than 8 vCPUs")), "{cold:?}");
    ensure!(bed.lines_since(log, RESTORED).is_empty(), "it came from the template");
    Ok(())
}

/// How many files of 4 MiB and a little are more than the template has memory in all.
const FILES: i64 = 29;

/// Writes what each of the files begins with, and all have, to standard output. No two pages are the same.
fn content(at: &str) -> String {
    format!("{{ seq {at}; cat base; }}")
}

/// Makes what all files have.
fn base() -> String {
    format!("seq 99999999 | head -c {} >base", 4 * MIB)
}

/// Fills a file system in memory, and reads all of it back.
fn fill() -> String {
    let (mib, base, content) = (FILES * 4 + 8, base(), content("$at"));
    format!(
        "set -e; mkdir /fill; mount -t tmpfs -o size={mib}m fill /fill; cd /fill; {base}; \
         for at in $(seq {FILES}); do {content} >$at; done; cat $(seq {FILES}) | md5sum"
    )
}

/// The checksum of all of that, where it is not in a VM's memory.
fn checksum() -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let (base, content) = (base(), content("$at"));
    let line = format!("{base}; for at in $(seq {FILES}); do {content}; done | md5sum");
    Ok(run(Command::new("sh").args(["-c", &line]).current_dir(scratch.path()))?.expect(0)?.stdout)
}

pub(crate) fn cri_memory_that_came_later_is_the_pods_to_use(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let log = bed.log_length();
    let pod = pod((2000, 64))?;
    let container = pod.start(idle().security(|security| security.privileged = true))?;
    let (said, due) = (container.exec(&fill())?, checksum()?);
    ensure!(said == due, "what is in memory has the checksum {said:?} and not {due:?}");
    // Each limit holds as if all memory had been there from the start.
    container.exec("umount /fill")?;
    let hungry = pod.start(sh("exec tail /dev/zero").resources(limits((0, 32))))?;
    hungry.reaches(ContainerState::Exited)?;
    eventually(|| {
        let status = hungry.status()?;
        ensure!(status.reason == "OOMKilled", "it ended with {status:?}");
        Ok(())
    })?;
    let said = container
        .exec("cat /proc/sys/kernel/threads-max; awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
    let numbers: Vec<u64> = said.lines().map(str::parse).collect::<Result<_, _>>()?;
    // The kernel's own measure: a thread for each 128 KiB.
    let [threads, kib] = numbers[..] else { anyhow::bail!("it says {said:?}") };
    ensure!(threads > kib / 160, "{threads} threads for {kib} KiB");
    all_from_the_template(bed, log, 1)?;
    pod.end()
}

pub(crate) fn cri_ten_pods_of_different_sizes_start_at_once(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let log = bed.log_length();
    let sizes: Vec<Size> = (0..10).map(|number| (number % 4 * 1000, number * 37)).collect();
    let pods: Vec<Result<Pod>> = std::thread::scope(|scope| {
        let starts: Vec<_> = sizes.iter().map(|size| scope.spawn(|| pod(*size))).collect();
        starts
            .into_iter()
            .map(|start| start.join().map_err(|_| anyhow::anyhow!("a start panicked"))?)
            .collect()
    });
    let pods: Vec<Pod> = pods.into_iter().collect::<Result<_>>()?;
    for (pod, size) in pods.iter().zip(&sizes) {
        let container = pod.start(idle())?;
        let said = container.exec(HAS)?;
        let count = said.lines().next().context("it says nothing")?;
        ensure!(count == cpus(*size).to_string(), "{size:?}: {said:?}");
        let kib: i64 = said.lines().last().unwrap_or_default().parse()?;
        // What the kernel of the template has for itself is not counted.
        let whole = (128 + size.1) << 10;
        ensure!((whole - (30 << 10)..=whole + (2 << 10)).contains(&kib), "{size:?}: {kib} KiB");
    }
    all_from_the_template(bed, log, sizes.len())?;
    for pod in pods {
        pod.end()?;
    }
    Ok(())
}
