//! Limits of containers, and what they use.

use anyhow::{Context, Result, ensure};

use super::pod::{Pod, eventually, idle, same_in_a_pod, sh};
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
