//! The functions that a pod's VM has, and which containers use them. Pure.
//!
//! Functions come in sets: those that are known when the VM starts, which it keeps, and those that
//! a container asks for, which go when the last container that uses one of them has gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use vial_agent_protocol::FUNCTION_DEVICES;

use super::{address::Address, binding::Record, wanted::group_path, ways::Node};

/// Functions that came together, and go together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// What the VMM calls them.
    pub number: u32,
    /// Each function, and its device number on the guest's bus 0.
    pub functions: Vec<(Record, u8)>,
    users: Users,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Users {
    /// The pod, as long as it lives.
    Pod,
    /// Containers, by their ids.
    Containers(BTreeSet<String>),
}

impl Set {
    /// Their device numbers.
    pub fn devices(&self) -> Vec<u32> {
        self.functions.iter().map(|(_, device)| u32::from(*device)).collect()
    }

    /// What is kept of them on disk.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.functions.iter().map(|(record, _)| record)
    }

    fn has_any(&self, groups: &BTreeSet<u32>) -> bool {
        self.records().any(|record| groups.contains(&record.group))
    }
}

/// All functions of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Passed {
    sets: Vec<Set>,
}

/// Which functions a container asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// By groups: all of them.
    pub groups: BTreeSet<u32>,
    /// By devices of their own.
    pub nodes: BTreeMap<Address, Node>,
    /// As its pod does, for all its containers.
    pub addresses: BTreeSet<Address>,
}

/// A function that a container asks for, and its VM has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// Its device number on the guest's bus 0.
    pub device: u8,
    /// The device by which the container asks for it, if it is not the pod that does.
    pub asked_by: Option<PathBuf>,
}

/// The VMM tells of numbers that no function can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the VMM does not tell where the pod's PCI functions are; install shim and VMM of one release"
)]
pub struct WrongNumbers;

impl Passed {
    /// Adds functions, where the VMM says that they are. Without a container, they stay as long as
    /// the pod; with one, it is the first that uses them.
    ///
    /// # Errors
    /// [`WrongNumbers`].
    pub fn add(
        &mut self,
        container: Option<&str>,
        number: u32,
        records: &[Record],
        devices: &[u8],
    ) -> Result<(), WrongNumbers> {
        let distinct: BTreeSet<&u8> = devices.iter().collect();
        let known = |device: &u8| {
            self.sets.iter().flat_map(|set| &set.functions).any(|(_, known)| known == device)
        };
        let is_wrong =
            |device: &u8| !FUNCTION_DEVICES.contains(&u32::from(*device)) || known(device);
        if devices.len() != records.len()
            || distinct.len() != devices.len()
            || devices.iter().any(is_wrong)
            || self.sets.iter().any(|set| set.number == number)
        {
            return Err(WrongNumbers);
        }
        let functions = records.iter().cloned().zip(devices.iter().copied()).collect();
        let users = match container {
            None => Users::Pod,
            Some(container) => Users::Containers([container.to_owned()].into()),
        };
        self.sets.push(Set { number, functions, users });
        Ok(())
    }

    /// Which of the groups the VM has not.
    pub fn missing(&self, groups: &BTreeSet<u32>) -> BTreeSet<u32> {
        let has = |group: &u32| self.records().any(|record| record.group == *group);
        groups.iter().filter(|group| !has(group)).copied().collect()
    }

    /// A container uses the groups, as far as the VM has them.
    pub fn join(&mut self, container: &str, groups: &BTreeSet<u32>) {
        for set in self.sets.iter_mut().filter(|set| set.has_any(groups)) {
            if let Users::Containers(users) = &mut set.users {
                users.insert(container.to_owned());
            }
        }
    }

    /// A container has gone. Returns the sets that nobody uses any more, which the VM still has.
    pub fn leave(&mut self, container: &str) -> Vec<Set> {
        let mut unused = Vec::new();
        for set in &mut self.sets {
            if let Users::Containers(users) = &mut set.users {
                users.remove(container);
                if users.is_empty() {
                    unused.push(set.clone());
                }
            }
        }
        unused
    }

    /// The VM has lost a set.
    pub fn remove(&mut self, number: u32) {
        self.sets.retain(|set| set.number != number);
    }

    /// How many sets there are.
    pub fn sets(&self) -> usize {
        self.sets.len()
    }

    /// All functions, as they are kept on disk.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.sets.iter().flat_map(Set::records)
    }

    /// Those of the groups that the VM has by containers, and not by its pod.
    pub fn brought<'a>(&'a self, groups: &'a BTreeSet<u32>) -> impl Iterator<Item = &'a Record> {
        let brought = self.sets.iter().filter(|set| set.users != Users::Pod);
        brought.flat_map(Set::records).filter(|record| groups.contains(&record.group))
    }

    /// The functions that are a container's, by what it asks for, in the order in which they came.
    pub fn given(&self, asked: &Asked) -> Vec<Granted> {
        let functions = self.sets.iter().flat_map(|set| &set.functions);
        let given = |(record, device): &(Record, u8)| {
            let asked_by = match asked.nodes.get(&record.address) {
                Some(node) => Some(node.path()),
                None if asked.groups.contains(&record.group) => Some(group_path(record.group)),
                None if asked.addresses.contains(&record.address) => None,
                None => return None,
            };
            Some(Granted { device: *device, asked_by })
        };
        functions.filter_map(given).collect()
    }

    /// All functions, and their device numbers.
    pub fn devices(&self) -> impl Iterator<Item = (&Record, u8)> {
        let functions = self.sets.iter().flat_map(|set| &set.functions);
        functions.map(|(record, device)| (record, *device))
    }

    /// What each function is called on the host and in the guest.
    pub fn names(&self) -> Vec<(Address, Address)> {
        let functions = self.sets.iter().flat_map(|set| &set.functions);
        functions.map(|(record, device)| (record.address, Address::on_guest_bus(*device))).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(group: u32) -> Record {
        Record {
            address: format!("0000:3b:{:02x}.{}", group / 8, group % 8).parse().unwrap(),
            group,
            bound_here: false,
            driver: Some("vfio-pci".into()),
        }
    }

    fn groups(numbers: &[u32]) -> BTreeSet<u32> {
        numbers.iter().copied().collect()
    }

    #[test]
    fn functions_go_with_the_last_container_that_uses_them() {
        let mut passed = Passed::default();
        passed.add(None, 0, &[record(1)], &[5]).unwrap();
        assert_eq!(passed.missing(&groups(&[1, 2, 3])), groups(&[2, 3]));
        passed.add(Some("a"), 1, &[record(2), record(3)], &[6, 7]).unwrap();
        passed.join("b", &groups(&[1, 3]));
        assert_eq!(passed.leave("a"), []);
        let unused = passed.leave("b");
        assert_eq!(unused.iter().map(|set| set.number).collect::<Vec<_>>(), [1]);
        assert_eq!(unused[0].devices(), [6, 7]);
        // One that the VMM did not let go of is told again.
        assert_eq!(passed.leave("c"), unused);
        passed.remove(1);
        assert_eq!(passed.leave("c"), []);
        assert_eq!(passed.missing(&groups(&[1, 2])), groups(&[2]));
    }

    #[test]
    fn container_has_the_functions_that_it_or_its_pod_asks_for() {
        let mut passed = Passed::default();
        let twin = Record { address: "0000:3b:07.7".parse().unwrap(), ..record(2) };
        passed.add(None, 0, &[record(1)], &[5]).unwrap();
        passed.add(Some("a"), 1, &[record(2), twin.clone()], &[6, 7]).unwrap();
        passed.add(Some("b"), 2, &[record(3)], &[8]).unwrap();
        let given = |asked: &Asked| -> Vec<(u8, Option<String>)> {
            let path = |path: PathBuf| path.display().to_string();
            let given = passed.given(asked).into_iter();
            given.map(|one| (one.device, one.asked_by.map(path))).collect()
        };
        assert_eq!(given(&Asked::default()), []);
        let by_pod = Asked { addresses: [record(1).address].into(), ..Default::default() };
        assert_eq!(given(&by_pod), [(5, None)]);
        let group = |number: u32| Some(format!("/dev/vfio/{number}"));
        let by_groups = Asked { groups: groups(&[2, 4]), ..by_pod.clone() };
        assert_eq!(given(&by_groups), [(5, None), (6, group(2)), (7, group(2))]);
        // One function of a group, by its own device.
        let nodes = [(twin.address, Node(9)), (record(5).address, Node(1))].into();
        let by_node = Asked { nodes, ..Default::default() };
        assert_eq!(given(&by_node), [(7, Some("/dev/vfio/devices/vfio9".into()))]);
        // What the pod asks for is the container's own to ask for, too.
        let both = Asked { groups: groups(&[1]), ..by_pod };
        assert_eq!(given(&both), [(5, group(1))]);
        let brought = |numbers: &[u32]| -> Vec<Record> {
            passed.brought(&groups(numbers)).cloned().collect()
        };
        assert_eq!(brought(&[1, 2, 4]), [record(2), twin]);
    }

    #[test]
    fn names_are_those_of_host_and_guest() {
        let mut passed = Passed::default();
        passed.add(Some("a"), 1, &[record(2), record(9)], &[6, 0x1f]).unwrap();
        let names = passed.names().into_iter();
        let names: Vec<_> =
            names.map(|(host, guest)| (host.to_string(), guest.to_string())).collect();
        let pair = |host: &str, guest: &str| (host.to_owned(), guest.to_owned());
        assert_eq!(
            names,
            [pair("0000:3b:00.2", "0000:00:06.0"), pair("0000:3b:01.1", "0000:00:1f.0")]
        );
    }

    #[test]
    fn numbers_that_no_function_can_have_are_refused() {
        let mut passed = Passed::default();
        passed.add(None, 0, &[record(1)], &[5]).unwrap();
        let wrong: [(u32, &[u8]); 7] = [
            (1, &[]),
            (1, &[6]),
            (1, &[6, 6]),
            (1, &[0, 6]),
            (1, &[6, 32]),
            (1, &[5, 6]),
            (0, &[6, 7]),
        ];
        for (number, devices) in wrong {
            let added = passed.add(Some("a"), number, &[record(2), record(3)], devices);
            assert_eq!(added, Err(WrongNumbers), "{number} {devices:?}");
        }
        assert_eq!(passed.sets(), 1);
    }

    proptest! {
        /// Containers come with groups and go, in any order: the VM has exactly what somebody uses.
        #[test]
        fn vm_has_what_its_containers_use(
            steps in proptest::collection::vec(
                (0u8..4, proptest::collection::btree_set(0u32..6, 0..4), any::<bool>()), 0..40)
        ) {
            let mut passed = Passed::default();
            let mut using: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
            let mut number = 0;
            for (container, wanted, comes) in steps {
                let container = container.to_string();
                if comes && !using.contains_key(&container) {
                    let missing: Vec<Record> =
                        passed.missing(&wanted).into_iter().map(record).collect();
                    if !missing.is_empty() {
                        // As the VMM does: the lowest that are free.
                        let taken: BTreeSet<u32> =
                            passed.sets.iter().flat_map(Set::devices).collect();
                        let free = (1u8..=31).filter(|device| !taken.contains(&(*device).into()));
                        let devices: Vec<u8> = free.take(missing.len()).collect();
                        number += 1;
                        passed.add(Some(&container), number, &missing, &devices).unwrap();
                    }
                    passed.join(&container, &wanted);
                    prop_assert!(passed.missing(&wanted).is_empty());
                    using.insert(container, wanted);
                } else if !comes {
                    using.remove(&container);
                    for set in passed.leave(&container) {
                        passed.remove(set.number);
                    }
                }
                let used: BTreeSet<u32> = using.values().flatten().copied().collect();
                let has: BTreeSet<u32> = passed.records().map(|record| record.group).collect();
                prop_assert!(has.is_superset(&used));
                // Nothing stays of which no function is used.
                prop_assert!(passed.sets.iter().all(|set| set.has_any(&used)));
            }
        }
    }
}
