//! Tests of placements.

use proptest::prelude::*;
use vial_vmm_api::MEMORY_MIB;

use super::*;
use crate::arch::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::memory::map_placed;

fn node(memory_mib: u32, vcpus: u8) -> NodeConfig {
    NodeConfig { memory_mib, vcpus, host_node: 0, bound: false }
}

fn config() -> VmConfig {
    VmConfig {
        vcpus: 3,
        placement: Placement {
            nodes: vec![node(86, 2), node(42, 1)],
            distances: vec![10, 21, 254, 10],
            bus_node: Some(1),
            huge_pages: Some(HugePages::Mib2),
        },
        ..crate::machine::check::tests::config()
    }
}

#[test]
fn placement_beyond_a_bound_is_refused_by_name() {
    type Change = fn(&mut VmConfig);
    let cases: [(Change, &str); 13] = [
        (|c| c.placement.nodes = vec![node(1, 1); MAX_NODES + 1], "at most 8"),
        (|c| c.placement.nodes[0].host_node = 1024, "0 to 1023"),
        (|c| c.placement.nodes[0].memory_mib += 2, "all of the machine's"),
        (|c| c.placement.nodes[0].vcpus = 1, "all of the machine's"),
        (|c| c.vcpus = 4, "all of the machine's"),
        (|c| c.placement.nodes = vec![node(127, 2), node(1, 1)], "multiple of 2"),
        (|c| c.placement.nodes = vec![node(128, 2), node(0, 1)], "multiple of 2"),
        (|c| c.placement.huge_pages = Some(HugePages::Gib1), "multiple of 1024"),
        (|c| c.placement.distances[1] = 9, "10 to 254"),
        (|c| c.placement.distances[1] = 255, "10 to 254"),
        (|c| c.placement.distances[3] = 11, "a node's own"),
        (|c| c.placement.distances.truncate(3), "give 4"),
        (|c| c.placement.bus_node = Some(2), "near to NUMA node 2"),
    ];
    check(&config()).unwrap();
    for (change, words) in cases {
        let mut config = config();
        change(&mut config);
        let text = check(&config).unwrap_err();
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn nodes_lie_one_behind_the_other_and_around_the_hole() {
    let found = ranges(&[node(2048, 1), node(2048, 1)]);
    let range = |node, start, bytes| NodeRange { node, start: GuestAddress(start), bytes };
    assert_eq!(
        found,
        [
            range(0, 0, 2 << 30),
            range(1, 2 << 30, LOW_RAM_END - (2 << 30)),
            range(1, HIGH_RAM_START, (4 << 30) - LOW_RAM_END),
        ]
    );
    assert!(ranges(&[]).is_empty());
}

/// The policy of a mapping of this process, as numa_maps says it.
fn policy_of(address: *mut u8) -> String {
    let start = format!("{:x}", address as usize);
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
    let words = maps.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut found = words.filter(|words| words[0] == start).map(|words| words[1].to_owned());
    found.next().unwrap_or_else(|| panic!("no {start} in {maps}"))
}

#[test]
fn memory_gets_the_policy_of_its_node() {
    let placement = Placement {
        nodes: vec![NodeConfig { bound: true, ..node(20, 1) }, node(12, 1)],
        ..Default::default()
    };
    let ram = map_placed(32 << 20, &placement).unwrap();
    let address = |at| {
        let slice = ram.get_slice(GuestAddress(at), 1).unwrap();
        slice.ptr_guard_mut().as_ptr()
    };
    assert_eq!((&*policy_of(address(0)), &*policy_of(address(20 << 20))), ("bind:0", "prefer:0"));
}

#[test]
fn node_that_the_host_has_not_is_named() {
    let nodes = vec![NodeConfig { host_node: 1000, bound: true, ..node(32, 1) }];
    let placement = Placement { nodes, ..Default::default() };
    let error = map_placed(32 << 20, &placement).unwrap_err().to_string();
    assert!(error.contains("node 1000"), "{error}");
}

proptest! {
    #[test]
    fn ranges_are_all_of_the_ram_and_each_node_has_its_own(
        sizes in proptest::collection::vec(1u32..9000, 1..=MAX_NODES),
    ) {
        let nodes: Vec<NodeConfig> = sizes.iter().map(|mib| node(*mib, 1)).collect();
        let total: u64 = sizes.iter().map(|mib| u64::from(*mib) << 20).sum();
        prop_assume!(total >> 20 >= u64::from(*MEMORY_MIB.start()));
        let found = ranges(&nodes);
        for (number, mib) in sizes.iter().enumerate() {
            let own = found.iter().filter(|range| range.node == number).map(|range| range.bytes);
            prop_assert_eq!(own.sum::<u64>(), u64::from(*mib) << 20);
        }
        let mut next = 0;
        for range in &found {
            if next == LOW_RAM_END {
                next = HIGH_RAM_START;
            }
            prop_assert_eq!(range.start.0, next);
            prop_assert!(range.bytes > 0);
            next = range.start.0 + range.bytes;
            prop_assert!(next <= LOW_RAM_END || range.start.0 >= HIGH_RAM_START);
        }
    }
}
