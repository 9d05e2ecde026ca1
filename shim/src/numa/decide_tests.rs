//! Tests of decisions.

use proptest::prelude::*;
use vial_vmm_api::HugePages;

use super::*;
use crate::numa::topology::Node;

/// A host with these CPUs on its nodes; nodes without CPUs have memory only.
fn host(nodes: &[&[u32]]) -> Topology {
    let node = |cpus: &&[u32]| Node {
        cpus: cpus.iter().copied().collect(),
        has_memory: true,
        distances: vec![21; nodes.len()],
    };
    Topology { nodes: (0..).zip(nodes.iter().map(node)).collect() }
}

fn two() -> Topology {
    host(&[&[0, 1, 2, 3], &[4, 5, 6, 7]])
}

fn claim(cpus: &[u32], mems: &[u32]) -> Claim {
    Claim {
        cpus: cpus.iter().copied().collect(),
        mems: mems.iter().copied().collect(),
        count: None,
    }
}

fn function(node: u32) -> (Address, u32) {
    (format!("0000:{node:02x}:10.0").parse().unwrap(), node)
}

/// Decides for a VM of 2 vCPUs and 512 MiB.
fn of(
    host: &Topology,
    mode: Mode,
    claims: &[Claim],
    functions: &[(Address, u32)],
) -> Result<(Placement, Vec<Mismatch>), NumaError> {
    with_late(host, mode, claims, functions, &[])
}

/// The same, with functions that came later.
fn with_late(
    host: &Topology,
    mode: Mode,
    claims: &[Claim],
    functions: &[(Address, u32)],
    late: &[(Address, u32)],
) -> Result<(Placement, Vec<Mismatch>), NumaError> {
    let pod = Pod {
        wanted: Wanted { mode, huge_pages: None },
        vcpus: 2,
        memory_mib: 512,
        claims: claims.iter().collect(),
        functions,
        late,
        allowed: &host.cpus(),
        taken: &Set::new(),
    };
    decide(host, &pod)
}

fn placed(host: &Topology, mode: Mode, claims: &[Claim]) -> Placement {
    of(host, mode, claims, &[]).unwrap().0
}

fn share(node: u32, memory_mib: u32, vcpus: u8) -> Share {
    Share { node, memory_mib, vcpus }
}

#[test]
fn pod_that_asks_for_nothing_goes_anywhere() {
    for mode in [Mode::Preferred, Mode::Strict, Mode::None] {
        for claims in [&[][..], &[Claim::default()]] {
            assert_eq!(of(&two(), mode, claims, &[]).unwrap(), Default::default());
        }
        let one = host(&[&[0, 1, 2, 3]]);
        assert_eq!(of(&one, mode, &[], &[function(0)]).unwrap(), Default::default());
    }
}

#[test]
fn own_cpus_get_a_vcpu_each_and_memory_beside_them() {
    let found = placed(&two(), Mode::Preferred, &[claim(&[5, 6, 7], &[])]);
    assert_eq!((&found.pins[..], show(&found.others).as_str()), (&[5, 6][..], "7"));
    assert_eq!((&found.nodes[..], found.mems.len()), (&[share(1, 512, 2)][..], 0));
    let found = placed(&two(), Mode::Strict, &[claim(&[5, 6], &[])]);
    assert_eq!((show(&found.others).as_str(), show(&found.mems).as_str()), ("5-6", "1"));
    assert!(found.for_vmm(&two(), Wanted::default(), &[]).nodes[0].bound);
    // Two containers with a CPU each.
    let found = placed(&two(), Mode::Preferred, &[claim(&[2], &[]), claim(&[3], &[])]);
    assert_eq!(found.pins, [2, 3]);
}

#[test]
fn cpus_on_one_node_are_taken_before_those_on_two() {
    let found = placed(&two(), Mode::Preferred, &[claim(&[3, 4, 5, 6], &[])]);
    assert_eq!((&found.pins[..], show(&found.others).as_str()), (&[4, 5][..], "6"));
    let claims = [claim(&[2, 3, 4, 5], &[])];
    let (found, _) = of(&two(), Mode::Preferred, &claims, &[function(1)]).unwrap();
    assert_eq!(found.pins, [4, 5]);
}

#[test]
fn guest_has_the_nodes_that_its_vcpus_are_on() {
    let found = placed(&two(), Mode::Preferred, &[claim(&[3, 4], &[])]);
    assert_eq!(found.pins, [3, 4]);
    assert_eq!(found.nodes, [share(0, 256, 1), share(1, 256, 1)]);
    let told = found.for_vmm(&two(), Wanted::default(), &[function(1)]);
    assert_eq!((told.distances, told.bus_node), (vec![10, 21, 21, 10], Some(1)));
    // Where the memory may not come from both, the guest is told of one.
    let (found, wrong) = of(&two(), Mode::Preferred, &[claim(&[3, 4], &[1])], &[]).unwrap();
    assert_eq!((&found.nodes[..], wrong.len()), (&[share(1, 512, 2)][..], 1));
}

#[test]
fn cpus_that_others_use_too_confine_and_pin_nothing() {
    let all = claim(&[0, 1, 2, 3, 4, 5, 6, 7], &[]);
    let shared = Claim { count: Some(2), ..claim(&[1, 2, 3], &[]) };
    let few = claim(&[1], &[]);
    for (claims, cpus) in [
        (vec![all], "0-7"),
        (vec![shared.clone()], "1-3"),
        (vec![claim(&[4, 5], &[]), shared], "1-5"),
        (vec![few], "1"),
    ] {
        let found = placed(&two(), Mode::Preferred, &claims);
        assert_eq!((show(&found.cpus).as_str(), found.pins.len()), (cpus, 0));
    }
    let (host, taken, own) = (two(), Set::from([5]), claim(&[4, 5], &[]));
    let pod = Pod {
        wanted: Wanted::default(),
        vcpus: 1,
        memory_mib: 128,
        claims: vec![&own],
        functions: &[],
        late: &[],
        allowed: &host.cpus(),
        taken: &taken,
    };
    assert!(decide(&host, &pod).unwrap().0.pins.is_empty());
}

#[test]
fn strict_pod_that_is_apart_is_refused_with_both_nodes_named() {
    let apart = claim(&[3, 4], &[]);
    let elsewhere = claim(&[3], &[1]);
    for (claims, functions, words) in [
        (vec![apart], vec![], "3-4 are on the NUMA nodes 0-1"),
        (vec![elsewhere], vec![], "node 0 and its memory on node 1"),
        (
            vec![claim(&[2, 3], &[])],
            vec![function(1)],
            "is on NUMA node 1 and the pod's CPUs are on node 0",
        ),
        (
            vec![],
            vec![function(0), function(1)],
            "is on NUMA node 1 and the pod's CPUs are on node 0",
        ),
    ] {
        let error = of(&two(), Mode::Strict, &claims, &functions).unwrap_err();
        assert!(!error.is_of_the_pod() && error.to_string().contains(words), "{error}");
        let (_, wrong) = of(&two(), Mode::Preferred, &claims, &functions).unwrap();
        assert_eq!(wrong.len(), usize::from(claims.is_empty() || words.contains("on node")));
        assert!(of(&two(), Mode::None, &claims, &functions).unwrap().1.is_empty());
    }
    let memory_only = host(&[&[0, 1, 2, 3], &[]]);
    let error = of(&memory_only, Mode::Strict, &[], &[function(1)]).unwrap_err().to_string();
    assert!(error.contains("node 1") && error.contains("node 0"), "{error}");
}

#[test]
fn function_that_comes_later_has_to_be_where_the_pod_is() {
    let memory_only = host(&[&[0, 1, 2, 3], &[]]);
    let on_0 = claim(&[2, 3], &[]);
    for (host, claims, functions) in [
        (two(), vec![on_0.clone()], vec![]),
        // Where another function has it.
        (two(), vec![], vec![function(0)]),
        (two(), vec![on_0], vec![function(0)]),
        (memory_only, vec![], vec![]),
    ] {
        let with = |mode, late| with_late(&host, mode, &claims, &functions, &[function(late)]);
        let error = with(Mode::Strict, 1).unwrap_err();
        let words = "function 0000:01:10.0 is on NUMA node 1 and the pod's CPUs are on node 0";
        assert!(error.to_string().contains(words), "{error}");
        let (_, wrong) = with(Mode::Preferred, 1).unwrap();
        assert_eq!(wrong, [Mismatch::Function(function(1).0, 1, Set::from([0]))]);
        assert_eq!(with(Mode::None, 1).unwrap().1, []);
        for mode in [Mode::Strict, Mode::Preferred, Mode::None] {
            let without = of(&host, mode, &claims, &functions).unwrap();
            assert_eq!(with(mode, 0).unwrap(), without, "one that is near changes nothing");
        }
    }
    // A pod that may be anywhere is not anywhere else, and one that comes later does not move it.
    let (found, wrong) = with_late(&two(), Mode::Strict, &[], &[], &[function(1)]).unwrap();
    assert_eq!((found, wrong), Default::default());
    let one = host(&[&[0, 1]]);
    assert!(with_late(&one, Mode::Strict, &[], &[], &[function(1)]).is_ok());
}

#[test]
fn pod_with_a_function_goes_to_its_node() {
    let (found, wrong) = of(&two(), Mode::Preferred, &[], &[function(1)]).unwrap();
    assert_eq!((show(&found.cpus).as_str(), &found.nodes[..]), ("4-7", &[share(1, 512, 2)][..]));
    assert!(found.pins.is_empty() && found.mems.is_empty() && wrong.is_empty());
    let (found, _) = of(&two(), Mode::Strict, &[], &[function(1)]).unwrap();
    assert_eq!(show(&found.mems), "1");
    assert_eq!(of(&two(), Mode::None, &[], &[function(1)]).unwrap(), Default::default());
}

#[test]
fn what_is_not_there_is_named() {
    for (asked, words) in [
        (claim(&[3, 999], &[]), "CPUs 999, and its pod may use 0-7"),
        (claim(&[], &[2]), "nodes 2"),
    ] {
        let error = of(&two(), Mode::None, &[asked], &[]).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

fn sets() -> impl Strategy<Value = Set> {
    proptest::collection::btree_set(0u32..16, 0..12)
}

proptest! {
    #[test]
    fn pins_are_the_pods_own_and_nothing_is_lost(
        cpus in proptest::collection::vec((sets(), sets(), proptest::option::of(0u64..8)), 0..3),
        vcpus in 1u8..=8, memory in 32u32..9000, nodes in proptest::collection::vec(0u32..4, 0..3),
        mode in 0usize..3, pages in 0usize..3, taken in sets(),
        late in proptest::collection::vec(0u32..4, 0..3),
    ) {
        let quarter = |n: u32| (n * 4..n * 4 + 4).collect::<Vec<u32>>();
        let quarters: Vec<Vec<u32>> = (0..4).map(quarter).collect();
        let mut host = host(&quarters.iter().map(Vec::as_slice).collect::<Vec<_>>());
        host.nodes.get_mut(&3).unwrap().has_memory = false;
        let claims: Vec<Claim> = cpus
            .into_iter()
            .map(|(cpus, mems, count)| Claim { cpus, mems: mems.into_iter().filter(|n| *n < 3).collect(), count })
            .collect();
        let mode = [Mode::Preferred, Mode::Strict, Mode::None][mode];
        let huge_pages = [None, Some(HugePages::Mib2), Some(HugePages::Gib1)][pages];
        let page = huge_pages.map_or(1, HugePages::mib);
        let memory_mib = memory.next_multiple_of(page);
        let functions: Vec<(Address, u32)> = nodes.into_iter().map(function).collect();
        let late: Vec<(Address, u32)> = late.into_iter().map(function).collect();
        let wanted = Wanted { mode, huge_pages };
        let pod = Pod {
            wanted, vcpus, memory_mib, claims: claims.iter().collect(), functions: &functions,
            late: &late, allowed: &host.cpus(), taken: &taken,
        };
        let Ok((found, wrong)) = decide(&host, &pod) else {
            prop_assert_eq!(mode, Mode::Strict);
            return Ok(());
        };
        let asked: Set = claims.iter().flat_map(|claim| &claim.cpus).copied().collect();
        let pins: Set = found.pins.iter().copied().collect();
        prop_assert!(pins.is_subset(&asked) && pins.is_disjoint(&taken));
        prop_assert!(found.pins.is_empty() || found.pins.len() == usize::from(vcpus));
        prop_assert_eq!(pins.len(), found.pins.len());
        if !asked.is_empty() {
            prop_assert_eq!(&found.cpus, &asked);
        }
        prop_assert!(found.others.is_subset(&found.cpus));
        prop_assert_eq!(found.others.is_empty(), found.pins.is_empty());
        if !found.nodes.is_empty() {
            prop_assert_eq!(found.nodes.iter().map(|n| n.memory_mib).sum::<u32>(), memory_mib);
            prop_assert_eq!(found.nodes.iter().map(|n| n.vcpus).sum::<u8>(), vcpus);
        }
        let given = |n: &Share| found.mems.is_empty() || found.mems.contains(&n.node);
        prop_assert!(found.nodes.iter().all(given));
        prop_assert!(found.nodes.iter().all(|n| n.memory_mib % page == 0));
        // Each vCPU of a node of the guest's is on the host's node.
        let mut pins = found.pins.iter();
        for node in found.nodes.iter().filter(|_| found.nodes.len() > 1) {
            for pin in pins.by_ref().take(node.vcpus.into()) {
                prop_assert_eq!(pin / 4, node.node);
            }
        }
        // What comes later moves nothing, and is told of where it is apart.
        let (without, _) = decide(&host, &Pod { late: &[], ..pod.clone() }).unwrap();
        prop_assert_eq!(&found, &without);
        let bound = if found.cpus.is_empty() { host.cpus() } else { found.cpus.clone() };
        let near = host.nodes_of(&bound);
        let told = |one: &(Address, u32)| {
            wrong.contains(&Mismatch::Function(one.0, one.1, near.clone()))
        };
        prop_assert!(mode == Mode::None || late.iter().all(|one| near.contains(&one.1) || told(one)));
        if mode == Mode::Strict {
            prop_assert!(wrong.is_empty() && host.nodes_of(&found.cpus).len() <= 1);
        }
        let told = found.for_vmm(&host, wanted, &functions);
        let count = told.nodes.len();
        prop_assert_eq!(told.distances.len(), if count > 1 { count * count } else { 0 });
        prop_assert!(told.bus_node.is_none_or(|node| usize::from(node) < count));
    }
}
