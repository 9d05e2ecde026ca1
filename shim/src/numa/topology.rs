//! The host's NUMA nodes, as sysfs shows them (Linux
//! Documentation/ABI/stable/sysfs-devices-node).

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    NumaError,
    list::{self, Set},
};

/// Where sysfs shows nodes.
pub const NODES: &str = "/sys/devices/system/node";
const CPUS: &str = "/sys/devices/system/cpu/online";
/// How far a node is from itself, and from one of which nothing is known (ACPI 6.5, 5.2.17).
const OWN_DISTANCE: u8 = 10;
const OTHER_DISTANCE: u8 = 20;

/// The nodes of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// By their numbers.
    pub nodes: BTreeMap<u32, Node>,
}

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Its CPUs.
    pub cpus: Set,
    /// Whether it has memory.
    pub has_memory: bool,
    /// How far other nodes are, in the order of their numbers.
    pub distances: Vec<u8>,
}

impl Topology {
    /// Those of this host. A kernel without NUMA shows none: then there is one node.
    ///
    /// # Errors
    /// [`NumaError::Io`].
    pub fn of_host() -> Result<Self, NumaError> {
        Self::read(Path::new(NODES), Path::new(CPUS))
    }

    fn read(root: &Path, cpus: &Path) -> Result<Self, NumaError> {
        let mut nodes = BTreeMap::new();
        if root.exists() {
            let with_memory = read_list(&root.join("has_memory"))?;
            for number in read_list(&root.join("online"))? {
                let directory = root.join(format!("node{number}"));
                let distances = read(&directory.join("distance"))?;
                let node = Node {
                    cpus: read_list(&directory.join("cpulist"))?,
                    has_memory: with_memory.contains(&number),
                    distances: distances
                        .split_ascii_whitespace()
                        .map(|word| word.parse().unwrap_or(u8::MAX))
                        .collect(),
                };
                nodes.insert(number, node);
            }
        }
        if nodes.is_empty() {
            let node =
                Node { cpus: read_list(cpus)?, has_memory: true, distances: vec![OWN_DISTANCE] };
            nodes.insert(0, node);
        }
        Ok(Self { nodes })
    }

    /// All CPUs that run.
    pub fn cpus(&self) -> Set {
        self.nodes.values().flat_map(|node| &node.cpus).copied().collect()
    }

    /// The nodes that have memory.
    pub fn with_memory(&self) -> Set {
        let with = self.nodes.iter().filter(|(_, node)| node.has_memory);
        with.map(|(number, _)| *number).collect()
    }

    /// The nodes that have any of `cpus`.
    pub fn nodes_of(&self, cpus: &Set) -> Set {
        let has = |node: &Node| !node.cpus.is_disjoint(cpus);
        self.nodes.iter().filter(|(_, node)| has(node)).map(|(number, _)| *number).collect()
    }

    /// How far `to` is for `from`, as a guest can be told: from 10 to 254.
    pub fn distance(&self, from: u32, to: u32) -> u8 {
        if from == to {
            return OWN_DISTANCE;
        }
        let place = self.nodes.keys().position(|number| *number == to);
        let distance = self.nodes.get(&from).zip(place);
        let distance = distance.and_then(|(node, place)| node.distances.get(place));
        distance.copied().unwrap_or(OTHER_DISTANCE).clamp(OWN_DISTANCE, u8::MAX - 1)
    }
}

pub(super) fn read(path: &Path) -> Result<String, NumaError> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// A list from a file.
pub(super) fn read_list(path: &Path) -> Result<Set, NumaError> {
    let none = || io::Error::new(io::ErrorKind::InvalidData, "it is no list of numbers");
    list::parse(&read(path)?).ok_or_else(|| failed("understand", path)(none()))
}

pub(super) fn failed(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> NumaError + use<> {
    let path = PathBuf::from(path);
    move |error| NumaError::Io { action, path, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_read_with_their_distances() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::write(at("online"), "0,2\n").unwrap();
        fs::write(at("has_memory"), "2\n").unwrap();
        for (number, cpus, distance) in [(0, "0-1", "10 21"), (2, "", "31 10")] {
            let node = at(&format!("node{number}"));
            fs::create_dir(&node).unwrap();
            fs::write(node.join("cpulist"), format!("{cpus}\n")).unwrap();
            fs::write(node.join("distance"), format!("{distance}\n")).unwrap();
        }
        let found = Topology::read(root.path(), Path::new("/nowhere")).unwrap();
        assert_eq!(found.cpus(), Set::from([0, 1]));
        assert_eq!(found.with_memory(), Set::from([2]));
        assert_eq!(found.nodes_of(&Set::from([1, 7])), Set::from([0]));
        let distances = [(0, 0), (0, 2), (2, 0), (0, 9)].map(|(a, b)| found.distance(a, b));
        assert_eq!(distances, [10, 21, 31, 20]);
    }

    #[test]
    fn kernel_without_nodes_has_one() {
        let root = tempfile::tempdir().unwrap();
        let cpus = root.path().join("online");
        fs::write(&cpus, "0-3\n").unwrap();
        let found = Topology::read(&root.path().join("node"), &cpus).unwrap();
        assert_eq!((found.nodes.len(), found.cpus().len()), (1, 4));
        fs::write(&cpus, "few\n").unwrap();
        let error = Topology::read(&root.path().join("node"), &cpus).unwrap_err().to_string();
        assert!(error.contains("online"), "{error}");
    }

    #[test]
    fn this_host_has_cpus_and_memory() {
        let found = Topology::of_host().unwrap();
        assert!(!found.cpus().is_empty() && !found.with_memory().is_empty(), "{found:?}");
    }
}
