//! What keeps others off a pod's cores.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, CpuSet, core_scheduling_cookie, sched_setaffinity};

use super::bed::{Bed, Detached, Runtime};
use super::faults::processes;
use super::network::Network;

const SPIN: [&str; 3] = ["sh", "-c", "while :; do :; done"];
/// How long it is measured who runs.
const WINDOW: Duration = Duration::from_secs(4);

/// With `vial-host run --cpus 2 --smt` there are cores of two threads; elsewhere there is nothing to keep off them. A
/// kernel that cannot keep anything off refuses.
pub(crate) fn pod_has_its_cores_to_itself(bed: &Bed) -> Result<()> {
    let annotation = |value| format!("io.vial/core-scheduling={value}");
    let wrong = bed.run(Runtime::Vial, &["--annotation", &annotation("maybe")], &["true"])?;
    ensure!(wrong.status != 0 && wrong.stderr.contains("'maybe'"), "{wrong:?}");

    let log = bed.log_length();
    let asks = annotation("true");
    let smt = fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default();
    if smt.trim() != "1" {
        let asked = bed.run(Runtime::Vial, &["--annotation", &asks], &["true"])?;
        ensure!(asked.status == 0, "there is nothing to be kept off: {asked:?}");
        let told = bed.lines_since(log, "no core of this host has two threads");
        ensure!(told.len() == 1, "a host without SMT is told of {} times", told.len());
        return Ok(());
    }
    if !fs::read_to_string("/proc/kallsyms")?.contains(" sched_core_share_pid") {
        let refused = bed.run(Runtime::Vial, &["--annotation", &asks], &["true"])?;
        ensure!(refused.status != 0, "it runs on cores that it shares: {refused:?}");
        ensure!(refused.stderr.contains("CONFIG_SCHED_CORE"), "{refused:?}");
        return Ok(());
    }
    threads_of_a_pod_have_its_cookie(bed, &asks)?;
    bed.clear();
    bed.nothing_left()?;

    // Who has not asked shares a core: that shows that what is measured can tell.
    let shared = busy_share_of_one_core(bed, &[])?;
    ensure!(shared > 1.5, "two pods that may share a core are {shared:.2} CPUs busy together");
    bed.clear();
    let apart = busy_share_of_one_core(bed, &["--annotation", &asks])?;
    ensure!(apart < 1.1, "two pods that may not share a core are {apart:.2} CPUs busy together");
    ensure!(apart > 0.5, "two pods that may not share a core stand still: {apart:.2} CPUs busy");
    Ok(())
}

/// Starts a container; returns it with its VMM.
fn start(bed: &Bed, options: &[&str], args: &[&str]) -> Result<(Detached, i32)> {
    let before = processes("vial-vmm", "--api-fd")?;
    let pod = bed.detached_with(Runtime::Vial, options, args)?;
    pod.reaches("RUNNING")?;
    let mut all = processes("vial-vmm", "--api-fd")?.into_iter();
    let vmm = all.find(|pid| !before.contains(pid)).context("the pod has no VMM")?;
    Ok((pod, vmm))
}

fn threads_of_a_pod_have_its_cookie(bed: &Bed, asks: &str) -> Result<()> {
    // With what the kernel starts for its packets.
    let network = Network::new()?;
    let with_network = ["--annotation", asks, "--with-ns", &network.option()];
    let sleep = ["sleep", "1000"];
    let (_first, one) = start(bed, &with_network, &sleep)?;
    let (_second, other) = start(bed, &["--annotation", asks], &sleep)?;
    let (_third, none) = start(bed, &[], &sleep)?;
    let tasks = names(one)?;
    ensure!(tasks.iter().any(|name| name.starts_with("vhost-")), "no vhost task: {tasks:?}");
    ensure!(tasks.contains("vcpu0"), "no vCPU's thread: {tasks:?}");

    let [first, second] = [cookies(one)?, cookies(other)?];
    ensure!(first.len() == 1 && second.len() == 1, "threads of one VMM: {first:?}, {second:?}");
    ensure!(first != second && !first.contains(&0) && !second.contains(&0), "no cookie of its own");
    ensure!(cookies(none)? == BTreeSet::from([0]), "who has not asked has one");
    let shims = processes("containerd-shim", "containerd-shim-vial-v2")?;
    ensure!(shims.len() == 3, "{} shims", shims.len());
    for shim in shims {
        ensure!(cookies(shim)? == BTreeSet::from([0]), "a shim has a cookie");
    }
    Ok(())
}

fn tasks(pid: i32) -> Result<Vec<i32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?)).collect()
}

fn names(pid: i32) -> Result<BTreeSet<String>> {
    let name =
        |task| Ok(fs::read_to_string(format!("/proc/{pid}/task/{task}/comm"))?.trim().into());
    tasks(pid)?.into_iter().map(name).collect()
}

/// The cookies of all threads of a process.
fn cookies(pid: i32) -> Result<BTreeSet<u64>> {
    let of = |task| Ok(core_scheduling_cookie(task, CoreSchedulingScope::Thread)?);
    tasks(pid)?.into_iter().filter_map(Pid::from_raw).map(of).collect()
}

/// Lets two pods that never rest have the two threads of one core and nothing else. Returns how many CPUs they were busy
/// with together, by the kernel's own account of how long each ran: over 1 is a time in which both did.
fn busy_share_of_one_core(bed: &Bed, options: &[&str]) -> Result<f64> {
    let core = threads_of_core_0()?;
    let (_first, one) = start(bed, options, &SPIN)?;
    let (_second, other) = start(bed, options, &SPIN)?;
    for task in tasks(one)?.into_iter().chain(tasks(other)?) {
        sched_setaffinity(Pid::from_raw(task), &core)?;
    }
    let ran = || -> Result<u64> {
        let of = |task: &i32| -> Result<u64> {
            let text = fs::read_to_string(format!("/proc/{task}/schedstat"))?;
            Ok(text.split(' ').next().context("no time on a CPU")?.parse()?)
        };
        tasks(one)?.iter().chain(&tasks(other)?).map(of).sum()
    };
    let (start, before) = (Instant::now(), ran()?);
    std::thread::sleep(WINDOW);
    let (elapsed, after) = (start.elapsed(), ran()?);
    Ok((after - before) as f64 / elapsed.as_nanos() as f64)
}

/// The CPUs that are threads of the first core: `0-1` or `0,4` (Linux, Documentation/admin-guide/cputopology.rst).
fn threads_of_core_0() -> Result<CpuSet> {
    let path = "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list";
    let text = fs::read_to_string(path)?;
    let mut core = CpuSet::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        (first.parse()?..=last.parse()?).for_each(|cpu: usize| core.set(cpu));
    }
    ensure!(core.count() == 2, "the first core has the threads {text:?}");
    Ok(core)
}
