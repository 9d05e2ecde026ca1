//! CPUs and NUMA nodes that become known with a container, and change, as the kubelet's managers have it.

use std::fs;

use anyhow::{Result, ensure};

use super::pod::{Pod, idle};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime};
use crate::suite::faults::process;
use crate::suite::placement::{cgroup, comes_from};

fn on(cpus: &str, mems: &str) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_shares: 2,
        cpuset_cpus: cpus.into(),
        cpuset_mems: mems.into(),
        ..Default::default()
    }
}

pub(crate) fn vm_of_a_pod_goes_where_its_containers_are(_: &Bed) -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let vmm = process("vial-vmm", "")?;
    let container = pod.start(idle().resources(on("0", "1")))?;
    // What came from elsewhere before has moved.
    comes_from(vmm, "N1")?;
    ensure!(cgroup(vmm, "cpuset.cpus")? == "0", "its cgroup has other CPUs");
    pod.cri.update(&container.id, on("0", "0"))?;
    comes_from(vmm, "N0")?;
    ensure!(container.exec("echo alive")? == "alive\n", "it did not outlive that");
    let refused = pod.cri.update(&container.id, on("0", "0-7"));
    let text = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(text.contains("memory nodes 2-7"), "a node that there is not: {text:?}");
    ensure!(cgroup(vmm, "cpuset.mems")? == "0", "a refused update changed something");
    container.remove()?;
    ensure!(cgroup(vmm, "cpuset.mems")? == "0-1", "it is kept to a node without a container");
    pod.end()
}

pub(crate) fn container_of_a_strict_pod_that_is_apart_is_refused(_: &Bed) -> Result<()> {
    let pod = Pod::with(Runtime::Vial, |config| {
        config.annotations.insert("io.vial/numa".into(), "strict".into());
    })?;
    let refused = pod.start(idle().resources(on("0", "1"))).err();
    let text = refused.map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(text.contains("CPUs are on NUMA node 0 and its memory on node 1"), "{text:?}");
    let container = pod.start(idle().resources(on("0", "0")))?;
    let vmm = process("vial-vmm", "")?;
    comes_from(vmm, "N0")?;
    let placement = fs::read_dir("/run/vial/k8s.io")?.flatten().next();
    ensure!(placement.is_some_and(|at| at.path().join("placement.json").exists()), "not written");
    container.remove()?;
    pod.end()
}
