//! Where a pod's VM runs on the host: which CPUs its threads have, which NUMA nodes its memory
//! comes from, and in which pages.
//!
//! What decides are the CPUs and memory nodes of the pod's containers, as the kubelet's managers
//! give them, the nodes of its PCI functions, and the annotations [`ANNOTATION`] and [`HUGE_PAGES`].
//! The kubelet tells of CPUs only when a container is created, and changes them later: the VM's
//! threads are then pinned anew, from outside, and what its cgroup may use is changed. So the VMM
//! needs no right to move itself. Only what the guest is told of nodes is settled at its start.
//!
//! - [`list`]: sets of CPUs and nodes as the kernel writes them.
//! - [`topology`]: the host's nodes.
//! - [`claim`]: what a container asks for.
//! - [`decide`]: what becomes of it. Pure.
//! - [`huge_pages`]: whether there are enough.
//! - `migrate`: moves memory that is elsewhere.
//! - [`placed`]: carries it out, again and again, for as long as the VM lives.

pub mod claim;
pub mod decide;
pub mod huge_pages;
pub mod list;
mod migrate;
pub mod placed;
pub mod topology;

use std::{collections::HashMap, path::PathBuf};

use vial_vmm_api::HugePages;

use crate::{devices::address::Address, jail::cgroup::CgroupError, spec::start_of};

/// The annotation of a pod that says how much its nodes matter, see [`Mode`].
pub const ANNOTATION: &str = "io.vial/numa";
/// The annotation of a pod that says of which huge pages its VM's memory is to consist.
pub const HUGE_PAGES: &str = "io.vial/hugepages";

/// How much it matters that CPUs, memory and functions are on one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// They are put together where that can be, and a warning says where not.
    #[default]
    Preferred,
    /// A pod that cannot have it is refused.
    Strict,
    /// CPUs and memory nodes are what the containers ask for, and no more is made of them.
    None,
}

/// What a pod's annotations ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// See [`ANNOTATION`].
    pub mode: Mode,
    /// See [`HUGE_PAGES`].
    pub huge_pages: Option<HugePages>,
}

impl Wanted {
    /// What annotations say.
    ///
    /// # Errors
    /// [`NumaError::Mode`] and [`NumaError::PageSize`].
    pub fn new(annotations: &HashMap<String, String>) -> Result<Self, NumaError> {
        let mode = match annotations.get(ANNOTATION).map(String::as_str) {
            None | Some("preferred") => Mode::Preferred,
            Some("strict") => Mode::Strict,
            Some("none") => Mode::None,
            Some(other) => return Err(NumaError::Mode(start_of(other))),
        };
        let huge_pages = match annotations.get(HUGE_PAGES).map(String::as_str) {
            None => None,
            Some("2Mi") => Some(HugePages::Mib2),
            Some("1Gi") => Some(HugePages::Gib1),
            Some(other) => return Err(NumaError::PageSize(start_of(other))),
        };
        Ok(Self { mode, huge_pages })
    }
}

/// Why a pod does not get the place that it asks for.
#[derive(Debug, thiserror::Error)]
pub enum NumaError {
    /// The annotation says something else.
    #[error("the annotation {ANNOTATION} is '{0}'; it can be preferred, strict or none")]
    Mode(String),
    /// The annotation says something else.
    #[error("the annotation {HUGE_PAGES} is '{0}'; it can be 2Mi or 1Gi")]
    PageSize(String),
    /// A list that is none.
    #[error("{what} '{text}' of a container is no list of numbers such as 0-3,8")]
    List {
        /// Of what.
        what: &'static str,
        /// How it begins.
        text: String,
    },
    /// They are not there, or not for this pod.
    #[error("a container asks for {what} {asked}, and its pod may use {allowed} on this host")]
    Absent {
        /// CPUs or memory nodes.
        what: &'static str,
        /// Those that there are not.
        asked: String,
        /// Those that there are.
        allowed: String,
    },
    /// Strict, and the CPUs are on several nodes.
    #[error(
        "the pod's CPUs {cpus} are on the NUMA nodes {nodes}, and its annotation {ANNOTATION} is \
         strict; set the kubelet's topology manager to single-numa-node, or let the pod do \
         without strict"
    )]
    CpusApart {
        /// The CPUs.
        cpus: String,
        /// Their nodes.
        nodes: String,
    },
    /// Strict, and the memory is elsewhere.
    #[error(
        "the pod's CPUs are on NUMA node {cpu_nodes} and its memory on node {memory_nodes}, and \
         its annotation {ANNOTATION} is strict; give it both from one node"
    )]
    MemoryApart {
        /// The nodes of its CPUs.
        cpu_nodes: String,
        /// Those of its memory.
        memory_nodes: String,
    },
    /// Strict, and a function is elsewhere.
    #[error(
        "the PCI function {address} is on NUMA node {node} and the pod's CPUs are on node \
         {cpu_nodes}, and its annotation {ANNOTATION} is strict; set the kubelet's topology \
         manager to single-numa-node, or give the pod a function of the other node"
    )]
    FunctionApart {
        /// The function.
        address: Address,
        /// Its node.
        node: u32,
        /// The nodes of the pod's CPUs.
        cpu_nodes: String,
    },
    /// Too few huge pages.
    #[error(
        "the pod's VM needs {wanted} free pages of {page_mib} MiB{node}, and there are {free}; \
         reserve more ({path}/nr_hugepages), or give the pod less memory"
    )]
    TooFewPages {
        /// How many it needs.
        wanted: u64,
        /// Their size.
        page_mib: u32,
        /// Where, if not anywhere.
        node: String,
        /// How many there are.
        free: u64,
        /// Where they are counted.
        path: PathBuf,
    },
    /// More than a cgroup above allows.
    #[error(
        "the pod's VM needs {wanted_mib} MiB in pages of {page_mib} MiB, and {path} allows \
         {allowed_mib} MiB more; raise the limits hugepages-{name} of the pod's containers: \
         together they have to be the VM's memory, which `vial ps` shows"
    )]
    PageLimit {
        /// How much it needs.
        wanted_mib: u64,
        /// The pages' size.
        page_mib: u32,
        /// The limit.
        path: PathBuf,
        /// What it leaves.
        allowed_mib: u64,
        /// What Kubernetes calls the pages.
        name: &'static str,
    },
    /// A file of the system.
    #[error("cannot {action} {path}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// See [`CgroupError`].
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A thread stays where it is.
    #[error("cannot keep the VMM's thread {thread} to the CPUs {cpus}: {error}")]
    Pin {
        /// Its name.
        thread: String,
        /// Where it should be.
        cpus: String,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Memory stays where it is.
    #[error("cannot move the VM's memory to the NUMA nodes {nodes}: {error}")]
    Migrate {
        /// Where it should be.
        nodes: String,
        /// What went wrong.
        error: std::io::Error,
    },
    /// It is not written down.
    #[error(transparent)]
    StateDir(#[from] crate::state_dir::StateDirError),
}

impl NumaError {
    /// Whether the pod itself asks for what cannot be, on any host.
    pub fn is_of_the_pod(&self) -> bool {
        matches!(self, Self::Mode(_) | Self::PageSize(_) | Self::List { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_words_and_others_are_named() {
        let wanted = |key: &str, word: &str| {
            Wanted::new(&HashMap::from([(key.to_owned(), word.to_owned())]))
        };
        assert_eq!(Wanted::new(&HashMap::new()).unwrap(), Wanted::default());
        assert_eq!(wanted(ANNOTATION, "strict").unwrap().mode, Mode::Strict);
        assert_eq!(wanted(ANNOTATION, "none").unwrap().mode, Mode::None);
        assert_eq!(wanted(HUGE_PAGES, "1Gi").unwrap().huge_pages, Some(HugePages::Gib1));
        for (key, word) in [(ANNOTATION, "Strict"), (ANNOTATION, ""), (HUGE_PAGES, "4Ki")] {
            let error = wanted(key, word).unwrap_err();
            assert!(error.is_of_the_pod() && error.to_string().contains(key), "{error}");
        }
        let long = wanted(ANNOTATION, &"x\n".repeat(4000)).unwrap_err().to_string();
        assert!(long.len() < 200 && !long.contains('\n'), "{long}");
    }
}
