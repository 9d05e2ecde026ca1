//! Where guest memory lies among the host's nodes, and which of the guest's nodes has what of it.
//!
//! A machine's memory stays one mapping for each range of RAM, whatever nodes there are: a buffer
//! of the guest's may lie across the border of two.
#![allow(unsafe_code)]

use std::io;
use std::ops::RangeInclusive;

use vial_vmm_api::{DISTANCES, HOST_NODES, HugePages, MAX_NODES, NodeConfig, Placement, VmConfig};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::memory::{GuestRam, ram_ranges};

/// A range of a guest node's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRange {
    /// The guest's node.
    pub node: usize,
    /// Where it begins.
    pub start: GuestAddress,
    /// Its length, more than 0.
    pub bytes: u64,
}

/// Why memory is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum NumaError {
    /// The host has no such node, or the pod's cgroup may not use it.
    #[error(
        "take {mib} MiB of guest memory from node {host_node} of the host: {error}; the pod's \
         cgroup has to allow that node (cpuset.mems), which has to have memory"
    )]
    Bind {
        /// How much.
        mib: u64,
        /// From where.
        host_node: u16,
        /// What the host said.
        error: io::Error,
    },
    /// The pages are not there.
    #[error(
        "take {mib} MiB of guest memory in pages of {page_mib} MiB: {error}; too few of them are \
         free on the nodes that the pod may use, or the pod's cgroup may not have so many \
         (hugetlb.*.max)"
    )]
    Populate {
        /// How much.
        mib: u64,
        /// A page's size.
        page_mib: u32,
        /// What the host said.
        error: io::Error,
    },
}

/// Checks a placement for a machine of that size.
///
/// # Errors
/// What is wrong, as a sentence.
pub fn check(config: &VmConfig) -> Result<(), String> {
    let Placement { nodes, distances, bus_node, huge_pages } = &config.placement;
    if nodes.len() > MAX_NODES {
        return Err(format!("{} NUMA nodes: give at most {MAX_NODES}", nodes.len()));
    }
    let page_mib = huge_pages.map_or(1, HugePages::mib);
    let whole = |mib: u32| mib > 0 && mib.is_multiple_of(page_mib);
    if !whole(config.memory_mib) || !nodes.iter().all(|node| whole(node.memory_mib)) {
        return Err(format!("a node of no memory, or of no multiple of {page_mib} MiB; give one"));
    }
    if let Some(node) = nodes.iter().find(|node| !HOST_NODES.contains(&node.host_node)) {
        return Err(format!("node {} of the host: give {}", node.host_node, shown(&HOST_NODES)));
    }
    let mib: u64 = nodes.iter().map(|node| u64::from(node.memory_mib)).sum();
    let vcpus: u64 = nodes.iter().map(|node| u64::from(node.vcpus)).sum();
    if !nodes.is_empty() && (mib, vcpus) != (config.memory_mib.into(), config.vcpus.into()) {
        return Err(format!(
            "NUMA nodes with {mib} MiB and {vcpus} vCPUs together: give them all of the machine's, \
             and no more"
        ));
    }
    let count = nodes.len();
    let wanted = if count > 1 { count * count } else { 0 };
    if distances.len() != wanted {
        return Err(format!("{} distances of {count} NUMA nodes: give {wanted}", distances.len()));
    }
    let own = *DISTANCES.start();
    let is_right = |(at, distance): (usize, &u8)| {
        DISTANCES.contains(distance) && (at / count != at % count || *distance == own)
    };
    if !distances.iter().enumerate().all(is_right) {
        let bounds = shown(&DISTANCES);
        return Err(format!("a distance of NUMA nodes: give {bounds}, {own} for a node's own"));
    }
    match bus_node {
        Some(node) if usize::from(*node) >= count => {
            Err(format!("the PCI bus is near to NUMA node {node}, which there is not"))
        }
        _ => Ok(()),
    }
}

fn shown<T: std::fmt::Display>(bounds: &RangeInclusive<T>) -> String {
    format!("{} to {}", bounds.start(), bounds.end())
}

/// What each node has of the RAM, from the lowest address on.
pub fn ranges(nodes: &[NodeConfig]) -> Vec<NodeRange> {
    let bytes = |node: &NodeConfig| u64::from(node.memory_mib) << 20;
    let mut rest = ram_ranges(nodes.iter().map(bytes).sum()).into_iter();
    let mut range = rest.next();
    let mut found = Vec::new();
    for (number, node) in nodes.iter().enumerate() {
        let mut wanted = bytes(node);
        while let (1.., Some((start, length))) = (wanted, range) {
            let taken = wanted.min(length);
            found.push(NodeRange { node: number, start, bytes: taken });
            wanted -= taken;
            range = match length - taken {
                0 => rest.next(),
                left => Some((GuestAddress(start.0 + taken), left)),
            };
        }
    }
    found
}

/// Has memory that nobody has touched yet come from where the placement says, and takes all of it
/// at once when it consists of huge pages: one that is missing later would end the process.
///
/// # Errors
/// [`NumaError`].
pub fn place(ram: &GuestRam, placement: &Placement) -> Result<(), NumaError> {
    for range in ranges(&placement.nodes) {
        let NodeConfig { host_node, bound, .. } = placement.nodes[range.node];
        let failed = |error| NumaError::Bind { mib: range.bytes >> 20, host_node, error };
        let slice = ram
            .get_slice(range.start, range.bytes as usize)
            .map_err(|error| failed(io::Error::other(error)))?;
        bind(slice.ptr_guard_mut().as_ptr(), slice.len(), host_node, bound).map_err(failed)?;
    }
    let Some(pages) = placement.huge_pages else { return Ok(()) };
    for region in ram.iter() {
        populate(region.as_ptr(), region.size()).map_err(|error| NumaError::Populate {
            mib: region.len() >> 20,
            page_mib: pages.mib(),
            error,
        })?;
    }
    Ok(())
}

/// mbind(2) of one node.
fn bind(start: *mut u8, bytes: usize, host_node: u16, bound: bool) -> io::Result<()> {
    const WORDS: usize = (*HOST_NODES.end() as usize + 1) / 64;
    let mut mask = [0u64; WORDS];
    mask[usize::from(host_node / 64)] = 1 << (host_node % 64);
    let mode = if bound { libc::MPOL_BIND } else { libc::MPOL_PREFERRED };
    // The kernel counts one bit less than it is told.
    let bits = mask.len() * 64 + 1;
    // SAFETY: the range is a mapping of guest memory, whose content a policy does not change; the
    // mask is as long as it says, and only read.
    let result =
        unsafe { libc::syscall(libc::SYS_mbind, start, bytes, mode, mask.as_ptr(), bits, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes pages as if each had been written to, or says why there are too few.
fn populate(start: *mut u8, bytes: usize) -> io::Result<()> {
    // SAFETY: the range is a mapping of guest memory, whose content stays as it is.
    let result = unsafe { libc::madvise(start.cast(), bytes, libc::MADV_POPULATE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
#[path = "numa_tests.rs"]
mod tests;
