//! Limits of containers, and what they use.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::pod::{Pod, eventually, idle, same, same_in_a_pod, sh};
use super::wire::*;
use crate::suite::bed::Bed;

const MIB: i64 = 1 << 20;

/// The limits that a container finds in its cgroup. Not the weight: what shares become as one is
/// computed differently from one version of runc to the next.
const LIMITS: &str = "cd /sys/fs/cgroup; cat memory.max cpu.max";

pub(crate) fn limits_and_statistics_are_there_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[
        ("limits", limits_and_changes),
        ("want of memory", want_of_memory),
        ("statistics", statistics),
    ])
}

fn limits_and_changes(pod: &Pod) -> Result<String> {
    let limits = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 48 * MIB,
        ..Default::default()
    };
    let container = pod.start(idle().resources(limits.clone()))?;
    let mut told = container.exec(LIMITS)?;
    pod.cri.update(
        &container.id,
        LinuxContainerResources {
            cpu_quota: 80_000,
            memory_limit_in_bytes: 64 * MIB,
            ..limits.clone()
        },
    )?;
    told += &container.exec(LIMITS)?;
    ensure!(
        pod.cri
            .update(
                &container.id,
                LinuxContainerResources { cpuset_cpus: "999".into(), ..limits.clone() }
            )
            .is_err(),
        "a CPU that is not there was given to it"
    );
    ensure!(container.status()?.state() == ContainerState::Running, "updates ended it");
    Ok(told)
}

fn want_of_memory(pod: &Pod) -> Result<String> {
    let limits = LinuxContainerResources { memory_limit_in_bytes: 24 * MIB, ..Default::default() };
    // What tail holds back until a line ends is without end.
    let hungry = pod.start(sh("exec tail /dev/zero").resources(limits))?;
    let neighbour = pod.start(idle())?;
    hungry.finish()?;
    let status = eventually(|| {
        let status = hungry.status()?;
        ensure!(status.reason == "OOMKilled", "it ended with {status:?}");
        Ok(status)
    })?;
    ensure!(neighbour.exec("echo alive")? == "alive\n", "its neighbour did not live");
    Ok(format!("{} {}", status.exit_code, status.reason))
}

fn statistics(pod: &Pod) -> Result<String> {
    let container = pod.start(sh(
        "head -c 3000000 /dev/urandom >/file; trap 'exit 0' TERM; echo up; while :; do sleep 1; done",
    ))?;
    container.logs("up")?;
    // containerd looks at file systems every ten seconds.
    eventually(|| {
        let stats = container.pod.cri.stats(&container.id)?;
        let (cpu, memory) = (stats.cpu.context("no CPU")?, stats.memory.context("no memory")?);
        let layer = stats.writable_layer.context("no writable layer")?;
        for (what, value) in [
            ("CPU", cpu.usage_core_nano_seconds),
            ("working set", memory.working_set_bytes),
            ("memory", memory.usage_bytes),
            ("resident", memory.rss_bytes),
            ("inodes", layer.inodes_used),
        ] {
            ensure!(value.as_ref().is_some_and(|value| value.value > 0), "{what} is {value:?}");
        }
        let used = layer.used_bytes.map_or(0, |bytes| bytes.value);
        ensure!(used >= 3_000_000, "the writable layer has {used} bytes");
        Ok(())
    })?;
    Ok("told".into())
}

/// A cgroup for a pod, as a kubelet makes one for each, until dropped.
struct PodCgroup;

impl PodCgroup {
    /// As CRI names it.
    const NAME: &str = "/vial-suite-pod";
    const PATH: &str = "/sys/fs/cgroup/vial-suite-pod";
    const ABOVE: &str = "/sys/fs/cgroup/cgroup.subtree_control";

    fn new() -> Result<Self> {
        fs::write(Self::ABOVE, "+cpu +memory +pids").context("let cgroups have controllers")?;
        fs::create_dir(Self::PATH).context("make the pod's cgroup")?;
        Ok(Self)
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // What stays is found by the next look at the host. Those of containers may go a bit later.
        let _ = eventually(|| match Path::new(Self::PATH).exists() {
            true => Ok(fs::remove_dir(Self::PATH)?),
            false => Ok(()),
        });
    }
}

/// containerd reads a pod's from the cgroup that the kubelet made for it, and those of its containers from their tasks.
pub(crate) fn statistics_of_pods_are_there_as_with_runc(_: &Bed) -> Result<()> {
    same(|runtime| {
        let _cgroup = PodCgroup::new()?;
        let pod = Pod::with(runtime, |config| {
            config.linux.get_or_insert_default().cgroup_parent = PodCgroup::NAME.into();
        })?;
        let busy = "trap 'exit 0' TERM; echo up; while :; do :; done";
        let containers = [pod.start(idle())?, pod.start(sh(busy))?];
        containers.iter().try_for_each(|container| container.logs("up"))?;
        eventually(|| {
            let all = pod.cri.all_pod_stats()?;
            let of_all =
                all.iter().find(|one| one.attributes.as_ref().is_some_and(|a| a.id == pod.id));
            check(
                of_all.context("not among those of all pods")?,
                &pod,
                &containers.each_ref().map(|c| c.id.as_str()),
            )?;
            check(&pod.cri.pod_stats(&pod.id)?, &pod, &containers.each_ref().map(|c| c.id.as_str()))
        })?;
        drop(containers);
        pod.end()?;
        Ok(String::new())
    })
}

/// Whether a pod's statistics are whole.
fn check(stats: &PodSandboxStats, pod: &Pod, containers: &[&str]) -> Result<()> {
    let attributes = stats.attributes.as_ref().context("no attributes")?;
    ensure!(attributes.metadata == pod.config.metadata, "they are of {attributes:?}");
    let linux = stats.linux.as_ref().context("none of Linux")?;
    let interface = linux.network.as_ref().and_then(|network| network.default_interface.as_ref());
    let interface = interface.context("no interface")?;
    ensure!(interface.name == "eth0", "the interface is {interface:?}");
    let processes = linux.process.as_ref().and_then(|process| process.process_count.as_ref());
    let mut values = vec![("processes", processes), ("received", interface.rx_bytes.as_ref())];
    values.extend(usage(linux.cpu.as_ref(), linux.memory.as_ref())?);
    let mut listed = Vec::new();
    for container in &linux.containers {
        let attributes = container.attributes.as_ref().context("a container without a name")?;
        listed.push(attributes.id.as_str());
        values.extend(usage(container.cpu.as_ref(), container.memory.as_ref())?);
    }
    for (what, value) in values {
        ensure!(value.is_some_and(|value| value.value > 0), "{what}: {value:?} in {stats:?}");
    }
    listed.sort_unstable();
    let mut wanted = containers.to_vec();
    wanted.sort_unstable();
    ensure!(listed == wanted, "{listed:?} are listed, not {wanted:?}");
    Ok(())
}

type Named<'a> = (&'static str, Option<&'a UInt64Value>);

fn usage<'a>(cpu: Option<&'a CpuUsage>, memory: Option<&'a MemoryUsage>) -> Result<[Named<'a>; 3]> {
    let (cpu, memory) = (cpu.context("no CPU")?, memory.context("no memory")?);
    Ok([
        ("CPU", cpu.usage_core_nano_seconds.as_ref()),
        ("working set", memory.working_set_bytes.as_ref()),
        ("memory", memory.usage_bytes.as_ref()),
    ])
}
