//! How large a pod's VM is: what its containers may use, and the configuration's own for the rest.
//!
//! The kubelet tells the sum of the limits of a pod's containers with the sandbox, and containerd
//! passes it on in annotations: that is what a VM starts with. Later it follows the containers that
//! there are ([`Size::for_containers`]).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use vial_vmm_api::{MEMORY_MIB, VCPUS};

use crate::numa::claim::Resources;

const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// CFS's default period, in microseconds.
const DEFAULT_PERIOD: i64 = 100_000;
/// `cpu.shares` of one CPU, as Kubernetes counts them.
const SHARES_OF_CPU: i64 = 1024;

/// What the containers of a pod may use together. 0 or less: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Microseconds of CPU time in each period.
    pub cpu_quota: i64,
    /// That period, in microseconds; 0 for the default.
    pub cpu_period: i64,
    /// A weight by which Kubernetes tells the CPUs that are asked for.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory: i64,
}

impl Limits {
    /// Those that a sandbox's annotations tell. What is no number tells nothing.
    pub fn of_annotations(annotations: &HashMap<String, String>) -> Self {
        let number = |key: &str| {
            annotations.get(key).and_then(|text| text.trim().parse().ok()).unwrap_or_default()
        };
        Self {
            cpu_quota: number(CPU_QUOTA),
            cpu_period: number(CPU_PERIOD),
            cpu_shares: number(CPU_SHARES),
            memory: number(MEMORY),
        }
    }
}

impl Limits {
    /// These, where resources say nothing else.
    pub fn changed(self, resources: &Resources) -> Self {
        let cpu = resources.cpu.as_ref();
        let memory = resources.memory.as_ref().and_then(|memory| memory.limit);
        Self {
            cpu_quota: cpu.and_then(|cpu| cpu.quota).unwrap_or(self.cpu_quota),
            cpu_period: cpu
                .and_then(|cpu| cpu.period)
                .map_or(self.cpu_period, |period| i64::try_from(period).unwrap_or(i64::MAX)),
            // What it is by shares alone was told with the pod.
            cpu_shares: self.cpu_shares,
            memory: memory.unwrap_or(self.memory),
        }
    }

    /// Thousandths of a CPU, rounded up; none without a limit.
    fn cpu_thousandths(self) -> i64 {
        let period = if self.cpu_period > 0 { self.cpu_period } else { DEFAULT_PERIOD };
        let quota = i128::from(self.cpu_quota.max(0)) * 1000;
        let period = i128::from(period);
        i64::try_from((quota + period - 1) / period).unwrap_or(i64::MAX)
    }
}

/// How large a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs, in [`VCPUS`].
    pub vcpus: u8,
    /// Memory in MiB, in [`MEMORY_MIB`].
    pub memory_mib: u32,
}

impl Size {
    /// What a VM needs that started with this, for the containers that it has now: what it started
    /// with, or the sum of what they may use and, for kernel and agent, `own`.
    pub fn for_containers(self, own: Self, containers: impl Iterator<Item = Limits>) -> Self {
        let none = Limits { cpu_period: 1000, ..Limits::default() };
        let sum = containers.fold(none, |sum, limits| Limits {
            cpu_quota: sum.cpu_quota.saturating_add(limits.cpu_thousandths()),
            memory: sum.memory.saturating_add(limits.memory.max(0)),
            ..sum
        });
        let (vcpus, memory_mib) = of_vm(sum, own.vcpus, own.memory_mib);
        self.at_least(Self { vcpus, memory_mib })
    }

    /// The larger one of each.
    pub fn at_least(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }

    /// The smaller one of each.
    pub fn at_most(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.min(other.vcpus),
            memory_mib: self.memory_mib.min(other.memory_mib),
        }
    }

    /// Whether neither is more than there.
    pub fn within(self, other: Self) -> bool {
        self.at_most(other) == self
    }
}

/// The vCPUs and the memory, in MiB, of a VM for `limits`.
///
/// The containers may use all of the vCPUs, which are at least the configuration's: the agent needs
/// none for itself. A pod with CPUs of its own may have no limit (a quota of -1): then what it asks
/// for counts, which is the same. Memory is the limit and, for kernel and agent, the configuration's. Both within
/// [`VCPUS`] and [`MEMORY_MIB`].
pub fn of_vm(limits: Limits, vcpus: u8, memory_mib: u32) -> (u8, u32) {
    let period = if limits.cpu_period > 0 { limits.cpu_period } else { DEFAULT_PERIOD };
    // Rounded up, without a sum that could overflow.
    let cpus = |number: i64, one: i64| number / one + i64::from(number % one != 0);
    let wanted = match limits.cpu_quota {
        1.. => cpus(limits.cpu_quota, period),
        ..=-1 if limits.cpu_shares >= SHARES_OF_CPU => cpus(limits.cpu_shares, SHARES_OF_CPU),
        _ => 0,
    };
    let wanted = u8::try_from(wanted).unwrap_or(u8::MAX);
    let limit = u64::try_from(limits.memory).unwrap_or(0).div_ceil(1 << 20);
    let memory = u32::try_from(limit).unwrap_or(u32::MAX).saturating_add(memory_mib);
    (
        wanted.max(vcpus).clamp(*VCPUS.start(), *VCPUS.end()),
        memory.clamp(*MEMORY_MIB.start(), *MEMORY_MIB.end()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(cpu_quota: i64, cpu_period: i64, memory: i64) -> Limits {
        Limits { cpu_quota, cpu_period, cpu_shares: 0, memory }
    }

    #[test]
    fn annotations_are_read_and_nonsense_is_not() {
        let annotations = |quota: &str| {
            [(CPU_QUOTA, quota), (CPU_PERIOD, "100000"), (MEMORY, "268435456")]
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .into()
        };
        assert_eq!(
            Limits::of_annotations(&annotations("150000")),
            limits(150_000, 100_000, 256 << 20)
        );
        assert_eq!(Limits::of_annotations(&annotations("much")).cpu_quota, 0);
        assert_eq!(Limits::of_annotations(&HashMap::new()), Limits::default());
    }

    #[test]
    fn update_changes_what_it_names() {
        let limits = limits(50_000, 100_000, 64 << 20);
        let changed = |json| limits.changed(&serde_json::from_str(json).unwrap());
        assert_eq!(changed("{}"), limits);
        assert_eq!(changed(r#"{"memory": {"limit": 7}}"#), Limits { memory: 7, ..limits });
        let cpu = changed(r#"{"cpu": {"quota": -1, "shares": 4096}}"#);
        assert_eq!(cpu, Limits { cpu_quota: -1, ..limits });
        let size = |containers: &[Limits]| {
            let own = Size { vcpus: 1, memory_mib: 128 };
            own.for_containers(own, containers.iter().copied())
        };
        assert_eq!(size(&[limits, limits]), Size { vcpus: 1, memory_mib: 256 });
        assert_eq!(size(&[limits, limits, limits]), Size { vcpus: 2, memory_mib: 320 });
        assert_eq!(size(&[cpu]), Size { vcpus: 1, memory_mib: 192 });
    }

    #[test]
    fn limits_become_a_size() {
        assert_eq!(of_vm(Limits::default(), 1, 128), (1, 128));
        assert_eq!(of_vm(limits(150_000, 100_000, 256 << 20), 1, 128), (2, 384));
        assert_eq!(of_vm(limits(200_000, 0, 1), 1, 128), (2, 129));
        assert_eq!(of_vm(limits(50_000, 100_000, 0), 4, 128), (4, 128));
        assert_eq!(of_vm(limits(-1, 100_000, -1), 1, 128), (1, 128));
        let own = Limits { cpu_shares: 3072, ..limits(-1, 0, 0) };
        assert_eq!(of_vm(own, 1, 128), (3, 128));
        assert_eq!(of_vm(Limits { cpu_quota: 0, ..own }, 1, 128), (1, 128));
    }

    proptest! {
        #[test]
        fn size_is_within_bounds_and_holds_what_is_asked_for(
            quota in any::<i64>(), period in any::<i64>(), memory in any::<i64>(),
            vcpus in VCPUS, memory_mib in MEMORY_MIB,
        ) {
            let (cpus, mib) = of_vm(limits(quota, period, memory), vcpus, memory_mib);
            prop_assert!(VCPUS.contains(&cpus) && MEMORY_MIB.contains(&mib));
            prop_assert!(cpus >= vcpus && mib >= memory_mib);
            if mib < *MEMORY_MIB.end() && memory > 0 {
                prop_assert!((u64::from(mib - memory_mib) << 20) >= memory.unsigned_abs());
            }
            if cpus < *VCPUS.end() && quota > 0 && period > 0 {
                prop_assert!(i128::from(cpus) * i128::from(period) >= i128::from(quota));
            }
        }

        #[test]
        fn pod_has_room_for_its_containers_and_never_less_than_at_its_start(
            (vcpus, memory_mib) in (VCPUS, MEMORY_MIB), (start_vcpus, start_mib) in (VCPUS, MEMORY_MIB),
            containers in proptest::collection::vec((-1..800_000i64, -1..8i64 << 30), 0..8),
        ) {
            let (own, start) = (Size { vcpus, memory_mib }, Size { vcpus: start_vcpus, memory_mib: start_mib });
            let all: Vec<Limits> =
                containers.iter().map(|(quota, memory)| limits(*quota, 100_000, *memory)).collect();
            let size = start.for_containers(own, all.iter().copied());
            prop_assert!(start.within(size) && VCPUS.contains(&size.vcpus) && MEMORY_MIB.contains(&size.memory_mib));
            let quotas: i64 = containers.iter().map(|(quota, _)| quota.max(&0)).sum();
            prop_assert!(size.vcpus == *VCPUS.end() || i64::from(size.vcpus) * 100_000 >= quotas);
            let bytes: i64 = containers.iter().map(|(_, bytes)| bytes.max(&0)).sum();
            let room = i64::from(size.memory_mib - memory_mib.min(size.memory_mib)) << 20;
            prop_assert!(size.memory_mib == *MEMORY_MIB.end() || room >= bytes);
            // One that goes takes no more than it brought.
            let fewer = start.for_containers(own, all.iter().skip(1).copied());
            prop_assert!(fewer.within(size));
            prop_assert_eq!(start.for_containers(own, std::iter::empty()), start.at_least(own));
        }

        #[test]
        fn more_is_never_less(
            (a, b) in (0..1i64 << 40, 0..1i64 << 40), (q, r) in (0..10_000_000i64, 0..10_000_000i64),
        ) {
            let less = of_vm(limits(q.min(r), 100_000, a.min(b)), 1, 128);
            let more = of_vm(limits(q.max(r), 100_000, a.max(b)), 1, 128);
            prop_assert!(less.0 <= more.0 && less.1 <= more.1);
        }
    }
}
