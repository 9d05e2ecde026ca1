//! On which CPUs and NUMA nodes of the host VMs are, and in which pages. The host has to have two nodes, as
//! `vial-host run --devices` gives it: the second with memory only, or, for [`vcpus_have_a_cpu_each`] and its like, both
//! with two CPUs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vial_tests::node::Configuration;

use super::bed::{Bed, Detached, Runtime, run};
use super::devices::{
    Bound, annotation, detached, driver, listed, refused, text, virtual_function,
};
use super::faults::process;
use super::hot_plug::{is_free, with};
use super::sizes;
use super::templates::Node;
use crate::cri::pod::{Pod, eventually, idle};
use crate::cri::wire::LinuxContainerResources;

/// The memory of a VM of which nothing is asked, in pages of 4 KiB.
const VM_PAGES: u64 = 128 << 8;
const HUGE_PAGES: &str = "hugepages/hugepages-2048kB";

/// A mapping of memory: its policy, and the pages that come from each node.
#[derive(Debug, Default)]
pub(crate) struct Mapping {
    policy: String,
    pub(crate) huge: bool,
    pub(crate) pages: BTreeMap<String, u64>,
}

/// The mappings that hold a guest's memory: those with more than anything else of the VMM's has.
pub(crate) fn guest_memory(vmm: i32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{vmm}/numa_maps");
    let maps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut mapping = Mapping::default();
        for (number, word) in line.split(' ').enumerate() {
            match word.split_once('=') {
                _ if number == 1 => word.clone_into(&mut mapping.policy),
                Some((node, count)) if node.starts_with('N') => {
                    mapping.pages.insert(node.into(), count.parse()?);
                }
                Some(("kernelpagesize_kB", "2048")) => mapping.huge = true,
                _ => {}
            }
        }
        let least = if mapping.huge { 1 } else { VM_PAGES / 16 };
        if mapping.pages.values().sum::<u64>() >= least {
            found.push(mapping);
        }
    }
    ensure!(!found.is_empty(), "no mapping is large enough for a guest's memory: {maps}");
    Ok(found)
}

/// Fails unless all of the guest's memory comes from that node.
pub(crate) fn comes_from(vmm: i32, node: &str) -> Result<()> {
    let found = guest_memory(vmm)?;
    let there = |mapping: &Mapping| mapping.pages.keys().all(|from| from == node);
    ensure!(found.iter().all(there), "memory comes not from {node} alone: {found:?}");
    Ok(())
}

/// A file of the cgroup that a process is in.
pub(crate) fn cgroup(pid: i32, file: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path =
        text.trim().rsplit(':').next().unwrap_or_default().trim_start_matches('/').to_owned();
    let path = Path::new("/sys/fs/cgroup").join(path).join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// What `vial ps` tells of where the only VM is.
fn told() -> Result<Value> {
    let text = run(Command::new("vial").args(["ps", "--json"]))?.expect(0)?.stdout;
    let listed: Vec<Value> = serde_json::from_str(&text)?;
    ensure!(listed.len() == 1, "{} sandboxes: {text}", listed.len());
    Ok(listed[0]["placement"].clone())
}

pub(crate) fn memory_comes_from_the_node_that_the_spec_names(bed: &Bed) -> Result<()> {
    for (node, other) in [(1, 0), (0, 1)] {
        let mems = node.to_string();
        let container = detached(bed, &["--cpuset-cpus", "0", "--cpuset-mems", &mems])?;
        let vmm = process("vial-vmm", "")?;
        comes_from(vmm, &format!("N{node}"))?;
        let policy = format!("bind:{node}");
        let found = guest_memory(vmm)?;
        ensure!(found.iter().all(|mapping| mapping.policy == policy), "{found:?}");
        ensure!(cgroup(vmm, "cpuset.mems.effective")? == mems, "the cgroup may use node {other}");
        let placement = told()?;
        ensure!(
            placement["mems"] == json!([node]) && placement["cpus"] == json!([0]),
            "{placement}"
        );
        // The container starts, though the guest has no such node.
        container.exec(&[], &["true"])?.expect(0)?;
    }
    Ok(())
}

pub(crate) fn pod_that_asks_for_no_place_has_none(bed: &Bed) -> Result<()> {
    let _container = detached(bed, &[])?;
    let vmm = process("vial-vmm", "")?;
    let found = guest_memory(vmm)?;
    ensure!(found.iter().all(|mapping| mapping.policy == "default"), "{found:?}");
    ensure!(told()?.is_null(), "it is told of a place: {}", told()?);
    Ok(())
}

pub(crate) fn strict_pod_that_is_apart_is_refused(bed: &Bed) -> Result<()> {
    let strict = ["--annotation", "io.vial/numa=strict", "--cpuset-cpus", "0"];
    let apart = [&strict[..], &["--cpuset-mems", "1"]].concat();
    refused(bed, &apart, &["CPUs are on NUMA node 0", "memory on node 1", "io.vial/numa"])?;
    refused(bed, &["--annotation", "io.vial/numa=yes"], &["'yes'", "preferred, strict or none"])?;
    refused(bed, &["--cpuset-cpus", "0,77"], &["CPUs 77"])?;
    let nodes = fs::read_to_string("/sys/devices/system/node/online")?;
    let last: u32 = nodes.trim().rsplit(['-', ',']).next().unwrap_or_default().parse()?;
    let absent = format!("memory nodes {}-9", last + 1);
    refused(bed, &["--cpuset-mems", "0-9"], &[&absent])?;

    // The function's node has no CPU at all.
    let function = virtual_function(0)?;
    let node = text(&function, "numa_node")?;
    let _configuration = listed(&[&function])?;
    let annotation = annotation(&[&function]);
    let before = driver(&function);
    let with = [&strict[..], &["--annotation", annotation.as_str()]].concat();
    refused(bed, &with, &[&function, &format!("on NUMA node {node}"), "CPUs are on node 0"])?;
    ensure!(driver(&function) == before, "the refused pod keeps {function}");
    let log = bed.log_length();
    bed.run(Runtime::Vial, &["--annotation", &annotation], &["true"])?.expect(0)?;
    let words = format!("is on NUMA node {node}, and the pod's CPUs are on node 0");
    let warned = bed.lines_since(log, &words);
    ensure!(warned.len() == 1, "{} warnings of the function's node", warned.len());
    Ok(())
}

/// A function that comes with a container, in pods whose CPUs are elsewhere.
pub(crate) fn cri_function_of_a_container_that_is_apart_is_refused_before_it_is_touched(
    bed: &Bed,
) -> Result<()> {
    let bound = Bound::new(virtual_function(0)?)?;
    let node = text(&bound.function, "numa_node")?;
    let on_0 = || {
        idle().resources(LinuxContainerResources {
            cpu_shares: 2,
            cpuset_cpus: "0".into(),
            ..Default::default()
        })
    };
    let pod = |mode: &str| {
        Pod::with(Runtime::Vial, |config| {
            config.annotations.insert("io.vial/numa".into(), mode.into());
        })
    };
    let strict = pod("strict")?;
    let log = bed.log_length();
    for round in 0..2 {
        let refused = strict.start(with(&bound, on_0())?).err();
        let told = refused.map(|error| format!("{error:#}")).unwrap_or_default();
        for words in [
            &bound.function,
            &format!("on NUMA node {node}"),
            "CPUs are on node 0",
            "topology manager",
        ] {
            ensure!(told.contains(words), "round {round}: {words:?} was due in {told:?}");
        }
        let opened = bed.lines_since(log, "opened by");
        ensure!(opened.is_empty(), "the function was opened: {opened:?}");
        is_free(&bound)?;
        // The pod goes on, where it was.
        let container = strict.start(on_0())?;
        let seen = container.exec("grep -l 0x10ca /sys/bus/pci/devices/*/device; true")?;
        ensure!(seen.is_empty(), "the guest has {seen}");
        container.remove()?;
    }
    strict.end()?;

    let words =
        format!("{} is on NUMA node {node}, and the pod's CPUs are on node 0", bound.function);
    for (mode, warnings) in [("preferred", 1), ("none", 0)] {
        let log = bed.log_length();
        let pod = pod(mode)?;
        let container = pod.start(with(&bound, on_0())?)?;
        container.exec("grep -l 0x10ca /sys/bus/pci/devices/*/device")?;
        let warned = bed.lines_since(log, &words);
        ensure!(warned.len() == warnings, "{mode}: {} warnings", warned.len());
        container.remove()?;
        is_free(&bound)?;
        pod.end()?;
    }
    bed.nothing_left()
}

/// Huge pages of a node, until dropped.
pub(super) struct Reserved(PathBuf);

impl Reserved {
    pub(super) fn new(node: &str, pages: u32) -> Result<Self> {
        let reserved = Self(Path::new("/sys/devices/system/node").join(node).join(HUGE_PAGES));
        fs::write(reserved.0.join("nr_hugepages"), pages.to_string())?;
        ensure!(reserved.count("nr_hugepages")? == pages, "the host has too little memory");
        Ok(reserved)
    }

    pub(super) fn count(&self, file: &str) -> Result<u32> {
        Ok(fs::read_to_string(self.0.join(file))?.trim().parse()?)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.0.join("nr_hugepages"), "0") {
            println!("    | the huge pages stay reserved: {error}");
        }
    }
}

pub(crate) fn huge_pages_are_the_vms_from_its_start_and_given_back(bed: &Bed) -> Result<()> {
    let options = ["--annotation", "io.vial/hugepages=2Mi", "--cpuset-cpus", "0", "--cpuset-mems"];
    let of = |node: &'static str| [&options[..], &[node]].concat();
    refused(bed, &of("1"), &["needs 64 free pages of 2 MiB", "there are 0", "nr_hugepages"])?;
    let reserved = Reserved::new("node1", 80)?;
    refused(bed, &of("0"), &["needs 64 free pages of 2 MiB on NUMA node 0", "there are 0"])?;
    let gigantic = ["--annotation", "io.vial/hugepages=1Gi"];
    refused(bed, &gigantic, &["needs 1 free pages of 1024 MiB", "there are 0"])?;
    let container = detached(bed, &of("1"))?;
    let vmm = process("vial-vmm", "")?;
    comes_from(vmm, "N1")?;
    let found = guest_memory(vmm)?;
    let huge: u64 = found
        .iter()
        .filter(|mapping| mapping.huge)
        .flat_map(|mapping| mapping.pages.values())
        .sum();
    ensure!(huge == 64, "{huge} huge pages: {found:?}");
    ensure!(reserved.count("free_hugepages")? == 16, "others are free");
    let more = bed.run(Runtime::Vial, &of("1"), &["true"])?;
    ensure!(more.status != 0 && more.stderr.contains("there are 16"), "{more:?}");
    container.exec(&[], &["sh", "-c", "head -c 5000000 /dev/zero >/big"])?.expect(0)?;
    drop(container);
    bed.nothing_left()?;
    ensure!(reserved.count("free_hugepages")? == 80, "they are not given back");
    Ok(())
}

/// The CPUs of each of a VMM's threads, by their names.
fn threads(vmm: i32) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let at = entry?.path();
        let status = fs::read_to_string(at.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let name = fs::read_to_string(at.join("comm"))?.trim().to_owned();
        found.insert(name, line.unwrap_or_default().trim().to_owned());
    }
    Ok(found)
}

/// VMs of two vCPUs, until dropped.
fn two_vcpus() -> Result<Configuration> {
    let configuration = Configuration::keep();
    configuration.write(&format!("{}\nvcpus = 2\n", configuration.text()))?;
    Ok(configuration)
}

fn on(bed: &Bed, cpus: &str) -> Result<(Detached, i32)> {
    let container = detached(bed, &["--cpuset-cpus", cpus])?;
    Ok((container, process("vial-vmm", "")?))
}

pub(crate) fn vcpus_have_a_cpu_each(bed: &Bed) -> Result<()> {
    let _configuration = two_vcpus()?;
    for (cpus, first, second, others) in
        [("2-3", "2", "3", "2-3"), ("0-2", "0", "1", "0-1"), ("1,3", "1", "3", "1,3")]
    {
        let (_container, vmm) = on(bed, cpus)?;
        let threads = threads(vmm)?;
        for (name, list) in [("vcpu0", first), ("vcpu1", second), ("io", others)] {
            // Beside the vCPUs where a CPU of their node is left, else wherever the pod may be.
            let others = name == "io" && cpus == "0-2";
            let list = if others { "2" } else { list };
            ensure!(threads.get(name).is_some_and(|own| own == list), "{cpus}: {threads:?}");
        }
        ensure!(cgroup(vmm, "cpuset.cpus.effective")? == cpus, "the cgroup has other CPUs");
    }
    // All CPUs are nobody's own.
    let (_container, vmm) = on(bed, "0-3")?;
    let threads = threads(vmm)?;
    ensure!(threads.values().all(|list| list == "0-3"), "{threads:?}");
    Ok(())
}

/// A VM that grows for a container of three CPUs of its own.
pub(crate) fn cri_vcpus_that_come_later_have_a_cpu_each(_: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let pod = sizes::pod((1000, 64))?;
    let vmm = process("vial-vmm", "")?;
    let vcpus = || -> Result<Vec<String>> {
        let all = threads(vmm)?.into_iter();
        Ok(all.filter(|(name, _)| name.starts_with("vcpu")).map(|(_, list)| list).collect())
    };
    ensure!(vcpus()? == ["0-3"], "{:?}", vcpus()?);
    let own = |cpus: &str, count: i64| LinuxContainerResources {
        cpuset_cpus: cpus.into(),
        cpu_shares: 1024 * count,
        ..sizes::limits((1000 * count, 64))
    };
    let container = pod.start(idle().resources(own("1-3", 3)))?;
    let each: BTreeSet<String> = vcpus()?.into_iter().collect();
    ensure!(each == ["1", "2", "3"].map(String::from).into(), "{:?}", vcpus()?);
    let placement = told()?;
    ensure!(placement["pins"].as_array().is_some_and(|pins| pins.len() == 3), "{placement}");
    // The guest leaves the third alone, which nobody's CPU is for then.
    pod.cri.update(&container.id, own("2-3", 2))?;
    eventually(|| {
        let found = vcpus()?;
        ensure!(found == ["2", "3", "2-3"], "{found:?}");
        Ok(())
    })?;
    pod.end()
}

pub(crate) fn vms_with_the_same_cpus_are_not_pinned_to_them(bed: &Bed) -> Result<()> {
    let _configuration = two_vcpus()?;
    let (first, vmm) = on(bed, "2-3")?;
    let name = bed.name();
    let options = ["-d", "--null-io", "--cpuset-cpus", "1-2"];
    run(&mut bed.command(Runtime::Vial, &options, &name, &["sleep", "1000"]))?.expect(0)?;
    let second = Detached { name };
    second.reaches("RUNNING")?;
    ensure!(threads(vmm)?["vcpu0"] == "2", "{:?}", threads(vmm)?);
    drop(first);
    let other = process("vial-vmm", "")?;
    let threads = threads(other)?;
    ensure!(threads.values().all(|list| list == "1-2"), "{threads:?}");
    Ok(())
}

pub(crate) fn guest_of_two_nodes_sees_them(bed: &Bed) -> Result<()> {
    let _configuration = two_vcpus()?;
    let (container, vmm) = on(bed, "1,2")?;
    let script = "cd /sys/devices/system/node; cat online node0/cpulist node1/cpulist node0/distance; \
                  awk '/MemTotal/ { print ($4 > 40000) }' node0/meminfo node1/meminfo; \
                  dmesg | grep -c 'not on the same node'; true";
    let seen = container.exec(&[], &["sh", "-c", script])?.expect(0)?.stdout;
    let words: Vec<&str> = seen.split_whitespace().collect();
    ensure!(words[..3] == ["0-1", "0", "1"] && words[3] == "10", "{seen}");
    ensure!(words[5..7] == ["1", "1"], "{seen}");
    let policies: Vec<String> =
        guest_memory(vmm)?.into_iter().map(|mapping| mapping.policy).collect();
    ensure!(policies.contains(&"prefer:0".to_owned()), "{policies:?}");
    let placement = told()?;
    let nodes = &placement["nodes"];
    ensure!(
        nodes
            == &json!([
                {"node": 0, "memory_mib": 64, "vcpus": 1},
                {"node": 1, "memory_mib": 64, "vcpus": 1},
            ]),
        "{placement}"
    );
    ensure!(placement["pins"] == json!([1, 2]), "{placement}");
    Ok(())
}
