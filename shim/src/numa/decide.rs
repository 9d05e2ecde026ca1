//! Where a VM goes, from what its containers ask for and what the host has. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};
use vial_vmm_api::{self as api, MAX_NODES, NodeConfig};

use super::{
    Mode, NumaError, Wanted,
    claim::Claim,
    list::{self, Set, show},
    topology::Topology,
};
use crate::devices::address::Address;

/// The least memory of a guest's node beside others, in MiB: with less, the guest has one node.
const LEAST_MIB: u32 = 64;
/// What the memory of nodes is a multiple of, in MiB: the guest's own huge pages.
const GRAIN_MIB: u32 = 2;

/// What decides.
#[derive(Debug, Clone)]
pub struct Pod<'a> {
    /// Its annotations.
    pub wanted: Wanted,
    /// vCPUs of its VM.
    pub vcpus: u8,
    /// Memory of its VM, in MiB.
    pub memory_mib: u32,
    /// What its containers ask for.
    pub claims: Vec<&'a Claim>,
    /// Its PCI functions and their nodes, where those are known.
    pub functions: &'a [(Address, u32)],
    /// Those that came with containers, which have to be where the pod is and do not decide that: memory that
    /// functions may write to stays where it is.
    pub late: &'a [(Address, u32)],
    /// The CPUs that its cgroup may use.
    pub allowed: &'a Set,
    /// Those that other VMs' vCPUs are pinned to.
    pub taken: &'a Set,
}

/// Where a VM is. Sets that are empty do not bind it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The CPUs that its threads may use.
    pub cpus: Set,
    /// The nodes that its memory may come from.
    pub mems: Set,
    /// The CPU of each vCPU, or nothing.
    pub pins: Vec<u32>,
    /// The CPUs of the other threads, when vCPUs are pinned.
    pub others: Set,
    /// What comes from which node. Of a guest with several, its nodes in their order.
    pub nodes: Vec<Share>,
}

/// What comes from a node of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The node.
    pub node: u32,
    /// In MiB.
    pub memory_mib: u32,
    /// vCPUs that are there.
    pub vcpus: u8,
}

/// What is not as it should be, for whoever runs the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// A function is on a node where the pod has no CPU.
    Function(Address, u32, Set),
    /// The functions are on several nodes, and nothing says which the pod should be on.
    Functions(Set),
    /// The memory is on other nodes than the CPUs.
    Memory(Set, Set),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(address, node, cpus) => write!(
                f,
                "the PCI function {address} is on NUMA node {node}, and the pod's CPUs are on \
                 node {}",
                show(cpus)
            ),
            Self::Functions(nodes) => write!(
                f,
                "the pod's PCI functions are on the NUMA nodes {}, so that none of them decides \
                 where the pod is",
                show(nodes)
            ),
            Self::Memory(cpus, mems) => write!(
                f,
                "the pod's CPUs are on NUMA node {}, and its memory is on node {}",
                show(cpus),
                show(mems)
            ),
        }
    }
}

/// Where the VM goes, and what is wrong with that.
///
/// # Errors
/// What is asked for is not there, or the pod is strict and cannot have it.
pub fn decide(host: &Topology, pod: &Pod<'_>) -> Result<(Placement, Vec<Mismatch>), NumaError> {
    let (cpus, mems) = asked(host, pod)?;
    let strict = pod.wanted.mode == Mode::Strict;
    let mut mismatches = Vec::new();
    let alone = host.nodes.len() < 2 || pod.wanted.mode == Mode::None;
    if cpus.is_empty() {
        let near = if alone { None } else { by_functions(host, pod, &mut mismatches)? };
        let placement = match near {
            Some((node, cpus)) => of_node(pod, node, cpus, mems),
            None => Placement { mems, ..Default::default() },
        };
        if !alone {
            let own = if placement.cpus.is_empty() { pod.allowed } else { &placement.cpus };
            check_functions(pod, pod.late, &host.nodes_of(own), &mut mismatches)?;
        }
        return Ok((placement, mismatches));
    }
    let online = host.cpus();
    let cpu_nodes = host.nodes_of(&cpus);
    if !alone {
        check_nodes(pod, &cpus, &cpu_nodes, &mems, &mut mismatches)?;
    }
    let own = |claim: &&Claim| claim.cpus.is_empty() || claim.is_exclusive(&online);
    let pinned = pod.claims.iter().all(own)
        && cpus.len() >= usize::from(pod.vcpus)
        && cpus.is_disjoint(pod.taken);
    let mut order: Vec<u32> = cpu_nodes.iter().copied().collect();
    let count = |node: u32| host.nodes[&node].cpus.intersection(&cpus).count();
    let has_function = |node: u32| pod.functions.iter().any(|(_, other)| *other == node);
    order.sort_by_key(|node| {
        let all = count(*node) >= usize::from(pod.vcpus);
        (!all, !has_function(*node), !mems.contains(node), usize::MAX - count(*node), *node)
    });
    let mut placement = Placement { mems, cpus, ..Default::default() };
    if pinned {
        pin(host, pod.vcpus, &order, &mut placement);
    }
    if alone || host.with_memory().len() < 2 {
        return Ok((placement, mismatches));
    }
    if strict && placement.mems.is_empty() {
        placement.mems.clone_from(&cpu_nodes);
    }
    placement.nodes = shares(host, pod, &placement, &cpu_nodes);
    Ok((placement, mismatches))
}

/// All CPUs and memory nodes that containers ask for.
fn asked(host: &Topology, pod: &Pod<'_>) -> Result<(Set, Set), NumaError> {
    let union = |part: fn(&Claim) -> &Set| -> Set {
        pod.claims.iter().flat_map(|claim| part(claim)).copied().collect()
    };
    let (cpus, mems) = (union(|claim| &claim.cpus), union(|claim| &claim.mems));
    for (what, asked, there) in
        [("CPUs", &cpus, pod.allowed), ("memory nodes", &mems, &host.with_memory())]
    {
        let absent: Set = asked.difference(there).copied().collect();
        if !absent.is_empty() {
            return Err(NumaError::Absent { what, asked: show(&absent), allowed: show(there) });
        }
    }
    Ok((cpus, mems))
}

/// The node of the functions and the CPUs of it that the pod may use, when nothing else decides.
fn by_functions(
    host: &Topology,
    pod: &Pod<'_>,
    mismatches: &mut Vec<Mismatch>,
) -> Result<Option<(u32, Set)>, NumaError> {
    let nodes: Set = pod.functions.iter().map(|(_, node)| *node).collect();
    let Some((address, node)) = pod.functions.first().copied() else { return Ok(None) };
    let allowed = host.nodes_of(pod.allowed);
    let cpus: Set = match host.nodes.get(&node) {
        Some(there) => there.cpus.intersection(pod.allowed).copied().collect(),
        None => Set::new(),
    };
    let strict = pod.wanted.mode == Mode::Strict;
    if let Some((address, other)) = pod.functions.iter().find(|(_, other)| *other != node) {
        if strict {
            let (address, node, cpu_nodes) = (*address, *other, node.to_string());
            return Err(NumaError::FunctionApart { address, node, cpu_nodes });
        }
        mismatches.push(Mismatch::Functions(nodes));
        return Ok(None);
    }
    if cpus.is_empty() {
        if strict {
            return Err(NumaError::FunctionApart { address, node, cpu_nodes: show(&allowed) });
        }
        mismatches.push(Mismatch::Function(address, node, allowed));
        return Ok(None);
    }
    // Fewer CPUs than vCPUs would cost more than the distance does.
    Ok((strict || cpus.len() >= usize::from(pod.vcpus)).then_some((node, cpus)))
}

/// A VM beside its functions, whose containers have no CPUs of their own.
fn of_node(pod: &Pod<'_>, node: u32, cpus: Set, mems: Set) -> Placement {
    let strict = pod.wanted.mode == Mode::Strict;
    let mems = if strict && mems.is_empty() { Set::from([node]) } else { mems };
    let (memory_mib, vcpus) = (pod.memory_mib, pod.vcpus);
    let nodes = match mems.is_empty() || mems.contains(&node) {
        true => vec![Share { node, memory_mib, vcpus }],
        false => Vec::new(),
    };
    Placement { cpus, mems, nodes, ..Default::default() }
}

/// Whether CPUs, memory and functions are together.
fn check_nodes(
    pod: &Pod<'_>,
    cpus: &Set,
    cpu_nodes: &Set,
    mems: &Set,
    mismatches: &mut Vec<Mismatch>,
) -> Result<(), NumaError> {
    let strict = pod.wanted.mode == Mode::Strict;
    if strict && cpu_nodes.len() > 1 {
        return Err(NumaError::CpusApart { cpus: show(cpus), nodes: show(cpu_nodes) });
    }
    if !mems.is_empty() && mems != cpu_nodes {
        if strict {
            let (cpu_nodes, memory_nodes) = (show(cpu_nodes), show(mems));
            return Err(NumaError::MemoryApart { cpu_nodes, memory_nodes });
        }
        mismatches.push(Mismatch::Memory(cpu_nodes.clone(), mems.clone()));
    }
    check_functions(pod, pod.functions, cpu_nodes, mismatches)?;
    check_functions(pod, pod.late, cpu_nodes, mismatches)
}

/// Whether functions are where the pod has CPUs.
fn check_functions(
    pod: &Pod<'_>,
    functions: &[(Address, u32)],
    cpu_nodes: &Set,
    mismatches: &mut Vec<Mismatch>,
) -> Result<(), NumaError> {
    for (address, node) in functions.iter().copied().filter(|(_, node)| !cpu_nodes.contains(node)) {
        if pod.wanted.mode == Mode::Strict {
            return Err(NumaError::FunctionApart { address, node, cpu_nodes: show(cpu_nodes) });
        }
        mismatches.push(Mismatch::Function(address, node, cpu_nodes.clone()));
    }
    Ok(())
}

/// A CPU for each vCPU, from the first node on, and what is left of those nodes for the others.
fn pin(host: &Topology, vcpus: u8, order: &[u32], placement: &mut Placement) {
    let cpus = &placement.cpus;
    let of_node = |node: &u32| host.nodes[node].cpus.intersection(cpus).copied();
    placement.pins = order.iter().flat_map(of_node).take(usize::from(vcpus)).collect();
    let pins: Set = placement.pins.iter().copied().collect();
    let used = host.nodes_of(&pins);
    let near: Set = used.iter().flat_map(of_node).filter(|cpu| !pins.contains(cpu)).collect();
    let left: Set = cpus.difference(&pins).copied().collect();
    let most = [near, left, cpus.clone()].into_iter().find(|set| !set.is_empty());
    placement.others = most.unwrap_or_default();
}

/// What comes from which node: as the vCPUs are pinned, or all from the one node that has them.
fn shares(host: &Topology, pod: &Pod<'_>, placement: &Placement, cpu_nodes: &Set) -> Vec<Share> {
    let all = |node: u32| vec![Share { node, memory_mib: pod.memory_mib, vcpus: pod.vcpus }];
    let gives = |node: &u32| {
        host.nodes[node].has_memory && (placement.mems.is_empty() || placement.mems.contains(node))
    };
    let mut used: Vec<(u32, u8)> = Vec::new();
    for cpu in &placement.pins {
        let node = host.nodes_of(&Set::from([*cpu])).first().copied().unwrap_or_default();
        match used.last_mut() {
            Some((last, count)) if *last == node => *count += 1,
            _ => used.push((node, 1)),
        }
    }
    if used.is_empty() {
        used = cpu_nodes.iter().map(|node| (*node, pod.vcpus)).take(2).collect();
        used.truncate(if cpu_nodes.len() == 1 { 1 } else { 0 });
    }
    match &used[..] {
        [(node, _)] if gives(node) => all(*node),
        [_, _, ..] if used.len() <= MAX_NODES && used.iter().all(|(node, _)| gives(node)) => {
            let grain = pod.wanted.huge_pages.map_or(GRAIN_MIB, api::HugePages::mib);
            split(pod.memory_mib, pod.vcpus, grain, &used).unwrap_or_default()
        }
        _ => match placement.mems.first() {
            Some(node) if placement.mems.len() == 1 => all(*node),
            _ => Vec::new(),
        },
    }
}

/// Memory in proportion to the vCPUs, in multiples of `grain` MiB but for what the first node has
/// beside. `None` when a node would have next to nothing.
fn split(memory_mib: u32, vcpus: u8, grain: u32, used: &[(u32, u8)]) -> Option<Vec<Share>> {
    let part = |count: u8| {
        let exact = u64::from(memory_mib) * u64::from(count) / u64::from(vcpus);
        // At most the memory, which fits.
        u32::try_from(exact).unwrap_or(memory_mib) / grain * grain
    };
    let rest: u32 = used.iter().skip(1).map(|(_, count)| part(*count)).sum();
    let first = memory_mib.checked_sub(rest)?;
    let shares: Vec<Share> = (used.iter().enumerate())
        .map(|(number, (node, count))| {
            let memory_mib = if number == 0 { first } else { part(*count) };
            Share { node: *node, memory_mib, vcpus: *count }
        })
        .collect();
    shares.iter().all(|share| share.memory_mib >= LEAST_MIB).then_some(shares)
}

impl Placement {
    /// What the VMM is told of it.
    pub fn for_vmm(
        &self,
        host: &Topology,
        wanted: Wanted,
        functions: &[(Address, u32)],
    ) -> api::Placement {
        let bound = !self.mems.is_empty();
        let nodes: Option<Vec<NodeConfig>> = (self.nodes.iter())
            .map(|share| {
                let host_node = u16::try_from(share.node).ok()?;
                let known = api::HOST_NODES.contains(&host_node);
                let Share { memory_mib, vcpus, .. } = *share;
                known.then_some(NodeConfig { memory_mib, vcpus, host_node, bound })
            })
            .collect();
        let nodes = nodes.unwrap_or_default();
        let distances = match nodes.len() {
            0 | 1 => Vec::new(),
            _ => (self.nodes.iter())
                .flat_map(|a| self.nodes.iter().map(|b| host.distance(a.node, b.node)))
                .collect(),
        };
        let bus_node = match functions {
            [(_, node), rest @ ..] if rest.iter().all(|(_, other)| other == node) => {
                let place = self.nodes.iter().position(|share| share.node == *node);
                place.and_then(|place| u8::try_from(place).ok())
            }
            _ => None,
        };
        let bus_node = bus_node.filter(|_| !nodes.is_empty());
        api::Placement { nodes, distances, bus_node, huge_pages: wanted.huge_pages }
    }

    /// The nodes as `vial ps` shows them.
    pub fn nodes_shown(&self) -> String {
        let own: Vec<String> = self.nodes.iter().map(|share| share.node.to_string()).collect();
        match (own.is_empty(), self.mems.is_empty()) {
            (false, _) => own.join("+"),
            (true, false) => list::show(&self.mems),
            (true, true) => "-".into(),
        }
    }

    /// The CPUs as `vial ps` shows them: with an equals sign when each vCPU has its own.
    pub fn cpus_shown(&self) -> String {
        match (self.pins.is_empty(), self.cpus.is_empty()) {
            (false, _) => format!("={}", list::show(&self.pins.iter().copied().collect())),
            (true, false) => list::show(&self.cpus),
            (true, true) => "-".into(),
        }
    }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
