//! How large a pod's VM is: what its containers may use, and the configuration's own for the rest.
//!
//! A VM is as large as it is from its start. The kubelet tells the sum of the limits of a pod's
//! containers with the sandbox, and containerd passes it on in annotations.

use std::collections::HashMap;

use vial_vmm_api::{MEMORY_MIB, VCPUS};

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
        fn more_is_never_less(
            (a, b) in (0..1i64 << 40, 0..1i64 << 40), (q, r) in (0..10_000_000i64, 0..10_000_000i64),
        ) {
            let less = of_vm(limits(q.min(r), 100_000, a.min(b)), 1, 128);
            let more = of_vm(limits(q.max(r), 100_000, a.max(b)), 1, 128);
            prop_assert!(less.0 <= more.0 && less.1 <= more.1);
        }
    }
}
