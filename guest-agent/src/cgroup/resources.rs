//! New limits for a running container: an OCI `linux.resources` as what is written to which file.
//!
//! [`changes`] is pure. Rules for devices are not read, for an update comes with those that the
//! container was created with; neither are huge pages, which a guest has none of, nor the numbers
//! of CPUs and nodes, which are the host's.

use std::fs;
use std::io;
use std::path::{Component, Path};

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::Cgroup;

/// CFS's default period, in microseconds (Documentation/scheduler/sched-bwc.rst).
const DEFAULT_PERIOD: u64 = 100_000;
/// What `cpu.shares` of cgroup v1 and `cpu.weight` of v2 can be.
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=10_000;
/// Entries of `unified` that are taken.
const MAX_UNIFIED: usize = 256;
/// The longest value of one, in bytes: what a write to a cgroup's file can have (PAGE_SIZE).
const MAX_VALUE_BYTES: usize = 4095;

/// Why limits are not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResourceError {
    #[error("the resources are no valid OCI linux.resources: {0}")]
    Parse(String),
    #[error(
        "memory.swap is {swap}, the sum of memory and swap, and so has to be at least memory.limit, {limit:?}, or -1"
    )]
    Swap { swap: i64, limit: Option<i64> },
    #[error("{0} of block devices of the host means nothing in a guest")]
    BlockIo(&'static str),
    #[error("'{0}' in unified is no file of a cgroup's controller")]
    Unified(String),
    #[error("there are more than {MAX_UNIFIED} entries in unified, or one is too long")]
    UnifiedSize,
    #[error("cannot set {file} of the container's cgroup to {value:?}: {source}")]
    Write { file: String, value: String, source: io::Error },
}

impl ResourceError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        match self {
            ResourceError::Write { source, .. } => {
                let request = [libc::EINVAL, libc::ERANGE, libc::ENOENT, libc::ENOSPC, libc::EBUSY];
                source.raw_os_error().is_some_and(|number| request.contains(&number))
            }
            _ => true,
        }
    }
}

/// A file of the cgroup, and its new content.
type Change = (String, String);

/// Changes what `json` names, or nothing.
///
/// # Errors
/// It is no `linux.resources`, or the kernel refuses a value.
pub(crate) fn update(cgroup: &Cgroup, json: &[u8]) -> Result<(), ResourceError> {
    let resources = serde_json::from_slice(json)
        .map_err(|error: serde_json::Error| ResourceError::Parse(error.to_string()))?;
    apply(cgroup.path(), &changes(&resources)?)
}

fn apply(cgroup: &Path, changes: &[Change]) -> Result<(), ResourceError> {
    let mut before: Vec<(&str, String)> = Vec::new();
    for (file, value) in changes {
        let path = cgroup.join(file);
        let was = fs::read_to_string(&path).unwrap_or_default();
        match write_existing(&path, value) {
            Ok(()) => before.push((file, was)),
            // A guest without swap uses none.
            Err(error) if file == "memory.swap.max" && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                for (file, was) in before.iter().rev() {
                    if let Err(error) = write_existing(&cgroup.join(file), was) {
                        tracing::warn!("{file} is left changed: {error}");
                    }
                }
                return Err(ResourceError::Write {
                    file: file.clone(),
                    value: value.clone(),
                    source,
                });
            }
        }
    }
    Ok(())
}

fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
    io::Write::write_all(&mut file, value.as_bytes())
}

/// What is to be written for `resources`, in that order.
///
/// # Errors
/// A value that no cgroup can have, or that means the host.
fn changes(resources: &LinuxResources) -> Result<Vec<Change>, ResourceError> {
    let mut changes = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_changes(cpu, &mut changes)?;
    }
    if let Some(memory) = resources.memory() {
        memory_changes(memory, &mut changes)?;
    }
    if let Some(pids) = resources.pids() {
        push_limit(&mut changes, "pids.max", Some(pids.limit()));
    }
    if let Some(block) = resources.block_io() {
        if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
            changes.push(("io.weight".into(), weight.to_string()));
        }
        let lists = [
            block.throttle_read_bps_device().is_some(),
            block.throttle_write_bps_device().is_some(),
            block.throttle_read_iops_device().is_some(),
            block.throttle_write_iops_device().is_some(),
        ];
        if lists.contains(&true) {
            return Err(ResourceError::BlockIo("a limit"));
        }
    }
    for (file, value) in unified(resources)? {
        changes.push((file, value));
    }
    Ok(changes)
}

fn cpu_changes(cpu: &LinuxCpu, changes: &mut Vec<Change>) -> Result<(), ResourceError> {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        changes.push(("cpu.weight".into(), weight(shares).to_string()));
    }
    let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
    if quota != 0 || period != 0 {
        let quota = if quota > 0 { quota.to_string() } else { "max".into() };
        let period = if period == 0 { DEFAULT_PERIOD } else { period };
        changes.push(("cpu.max".into(), format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst() {
        changes.push(("cpu.max.burst".into(), burst.to_string()));
    }
    if let Some(idle) = cpu.idle() {
        changes.push(("cpu.idle".into(), idle.to_string()));
    }
    Ok(())
}

/// The weight that stands for shares: a curve through the least, the default and the most of both
/// (2 and 1, 1024 and 100, 262144 and 10000), as runc has it since 1.3.
pub(crate) fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(*SHARES.start(), *SHARES.end());
    // Exact: the number is below 2^53.
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // What is whole but for the last bit is not to be rounded up.
    let weight = (10f64.powf(exponent) - 1e-6).ceil();
    // Between 1 and 10000 but for that bit.
    (weight as u64).clamp(*WEIGHTS.start(), *WEIGHTS.end())
}

fn memory_changes(memory: &LinuxMemory, changes: &mut Vec<Change>) -> Result<(), ResourceError> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    push_limit(changes, "memory.max", limit);
    match memory.swap() {
        None | Some(0) => {}
        Some(swap @ ..=-1) => push_limit(changes, "memory.swap.max", Some(swap)),
        Some(swap) => {
            let only = limit.filter(|limit| *limit > 0).and_then(|limit| swap.checked_sub(limit));
            let Some(only @ 0..) = only else {
                return Err(ResourceError::Swap { swap, limit });
            };
            changes.push(("memory.swap.max".into(), only.to_string()));
        }
    }
    push_limit(changes, "memory.low", memory.reservation());
    Ok(())
}

/// A negative limit is none, and 0 none that is asked for.
fn push_limit(changes: &mut Vec<Change>, file: &str, limit: Option<i64>) {
    match limit {
        None | Some(0) => {}
        Some(..=-1) => changes.push((file.into(), "max".into())),
        Some(limit) => changes.push((file.into(), limit.to_string())),
    }
}

fn unified(resources: &LinuxResources) -> Result<Vec<Change>, ResourceError> {
    let Some(unified) = resources.unified() else { return Ok(Vec::new()) };
    if unified.len() > MAX_UNIFIED || unified.values().any(|value| value.len() > MAX_VALUE_BYTES) {
        return Err(ResourceError::UnifiedSize);
    }
    let mut changes: Vec<Change> =
        unified.iter().map(|(file, value)| (file.clone(), value.clone())).collect();
    changes.sort();
    for (file, _) in &changes {
        let single = Path::new(file).components().collect::<Vec<_>>();
        let plain = matches!(single[..], [Component::Normal(name)] if name == file.as_str());
        // cgroup.procs and its like move processes and cgroups.
        if !plain || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(ResourceError::Unified(file.chars().take(80).collect()));
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn of(json: Value) -> Result<Vec<Change>, ResourceError> {
        changes(&serde_json::from_value(json).unwrap())
    }

    fn expect(json: Value, expected: &[(&str, &str)]) {
        let changes = of(json).unwrap();
        let got: Vec<_> = changes.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn limits_become_files() {
        expect(json!({}), &[]);
        expect(
            json!({"cpu": {"shares": 1024, "quota": 50000, "period": 100_000, "cpus": "0"}}),
            &[("cpu.weight", "100"), ("cpu.max", "50000 100000")],
        );
        expect(json!({"cpu": {"quota": -1}}), &[("cpu.max", "max 100000")]);
        for (shares, weight) in
            [(1, "1"), (2, "1"), (512, "59"), (262_144, "10000"), (1u64 << 40, "10000")]
        {
            expect(json!({"cpu": {"shares": shares}}), &[("cpu.weight", weight)]);
        }
        expect(
            json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500}}),
            &[("memory.max", "1000"), ("memory.swap.max", "500"), ("memory.low", "500")],
        );
        expect(json!({"memory": {"limit": -1}}), &[("memory.max", "max")]);
        expect(json!({"pids": {"limit": 7}}), &[("pids.max", "7")]);
        expect(json!({"pids": {"limit": -1}}), &[("pids.max", "max")]);
        expect(json!({"unified": {"memory.high": "5"}}), &[("memory.high", "5")]);
        let devices = json!({"devices": [{"allow": false, "access": "rwm"}]});
        expect(devices, &[]);
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        for wrong in [
            json!({"memory": {"swap": 5}}),
            json!({"memory": {"limit": 10, "swap": 5}}),
            json!({"unified": {"cgroup.procs": "1"}}),
            json!({"unified": {"../other/memory.max": "1"}}),
            json!({"unified": {"/memory.max": "1"}}),
            json!({"unified": {"memory": "1"}}),
            json!({"unified": {"memory.max": "1".repeat(MAX_VALUE_BYTES + 1)}}),
            json!({"blockIO": {"throttleReadBpsDevice": []}}),
        ] {
            let error = of(wrong.clone()).unwrap_err();
            assert!(error.is_of_the_request(), "{wrong}: {error}");
        }
        let many: serde_json::Map<_, _> =
            (0..=MAX_UNIFIED).map(|n| (format!("a.{n}"), json!("1"))).collect();
        assert!(matches!(of(json!({"unified": many})), Err(ResourceError::UnifiedSize)));
    }

    #[test]
    fn refused_change_takes_the_others_back() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pids.max"), "max").unwrap();
        let change = |file: &str, value: &str| (file.to_owned(), value.to_owned());
        let changes =
            [change("memory.swap.max", "0"), change("pids.max", "5"), change("memory.high", "7")];
        let error = apply(directory.path(), &changes).unwrap_err();
        assert!(error.to_string().contains("memory.high"), "{error}");
        assert_eq!(fs::read_to_string(directory.path().join("pids.max")).unwrap(), "max");
        apply(directory.path(), &changes[..2]).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("pids.max")).unwrap(), "5");
    }

    proptest! {
        #[test]
        fn weight_is_within_the_kernels_range_and_grows_with_shares(
            (low, high) in (SHARES, SHARES),
        ) {
            let weight = |shares: u64| -> u64 {
                let changes = of(json!({"cpu": {"shares": shares}})).unwrap();
                changes[0].1.parse().unwrap()
            };
            prop_assert!((1..=10_000).contains(&weight(low)));
            prop_assert_eq!(low <= high || weight(low) >= weight(high), true);
        }

        #[test]
        fn unified_never_names_another_directory(file in "[a-z./]{0,20}") {
            if of(json!({"unified": {&file: "1"}})).is_ok() {
                prop_assert!(!file.contains('/') && file != ".." && file != ".");
            }
        }
    }
}
