//! What a container uses, out of the files of its cgroup.
//!
//! The formats are those of the kernel's Documentation/admin-guide/cgroup-v2.rst. A file that is
//! absent, for its controller is not there, counts as empty.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use vial_agent_protocol::MAX_COUNTERS;
use vial_agent_protocol::agent::{DeviceStats, StatsResponse};

use super::{Cgroup, CgroupError, is_gone};

/// Reads them all.
///
/// # Errors
/// A file is there and cannot be read, or the cgroup is gone.
pub(crate) fn read(cgroup: &Cgroup) -> Result<StatsResponse, CgroupError> {
    let text = |name: &str| content(cgroup.path(), name);
    let mut stats = StatsResponse::new();
    // Without its controllers a cgroup still counts the time of its processes.
    let path = cgroup.path().join("cpu.stat");
    let cpu = fs::read_to_string(&path).map_err(|source| CgroupError::Read { path, source })?;
    stats.cpu = counters(&cpu);
    stats.memory = counters(&text("memory.stat")?);
    stats.memory_events = counters(&text("memory.events")?);
    stats.memory_usage = amount(&text("memory.current")?, 0);
    stats.memory_limit = amount(&text("memory.max")?, u64::MAX);
    stats.memory_peak = amount(&text("memory.peak")?, stats.memory_usage);
    stats.swap_usage = amount(&text("memory.swap.current")?, 0);
    stats.swap_limit = amount(&text("memory.swap.max")?, u64::MAX);
    stats.pids = amount(&text("pids.current")?, 0);
    stats.pids_limit = amount(&text("pids.max")?, u64::MAX);
    stats.devices = devices(&text("io.stat")?);
    Ok(stats)
}

fn content(cgroup: &Path, name: &str) -> Result<String, CgroupError> {
    let path = cgroup.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(error) if is_gone(&error) => Ok(String::new()),
        Err(source) => Err(CgroupError::Read { path, source }),
    }
}

/// Lines of a name and a number.
pub(super) fn counters(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    });
    pairs.take(MAX_COUNTERS).collect()
}

/// A number, or `max` for no limit; `absent` without either.
fn amount(text: &str, absent: u64) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(absent),
    }
}

/// Lines like `253:0 rbytes=0 wbytes=4096 rios=0 wios=1 dbytes=0 dios=0`.
fn devices(text: &str) -> Vec<DeviceStats> {
    let device = |line: &str| {
        let (number, rest) = line.split_once(' ')?;
        let (major, minor) = number.split_once(':')?;
        let value = |key: &str| {
            let words = rest.split_whitespace();
            let mut pairs = words.filter_map(|word| word.split_once('='));
            pairs.find_map(|(name, value)| (name == key).then(|| value.parse().ok())?).unwrap_or(0)
        };
        Some(DeviceStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            read_bytes: value("rbytes"),
            written_bytes: value("wbytes"),
            reads: value("rios"),
            writes: value("wios"),
            ..Default::default()
        })
    };
    text.lines().filter_map(device).take(MAX_COUNTERS).collect()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let cgroup = Cgroup { path: directory.path().to_owned() };
        (directory, cgroup)
    }

    #[test]
    fn files_are_read_as_the_kernel_writes_them() {
        let (_directory, cgroup) = cgroup(&[
            ("cpu.stat", "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_throttled 2\n"),
            ("memory.stat", "anon 4096\ninactive_file 8192\n"),
            ("memory.current", "20480\n"),
            ("memory.max", "max\n"),
            ("memory.events", "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            ("io.stat", "253:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:0 \n"),
        ]);
        let stats = read(&cgroup).unwrap();
        assert_eq!((stats.cpu["usage_usec"], stats.cpu["nr_throttled"]), (1500, 2));
        assert_eq!((stats.memory["anon"], stats.memory["inactive_file"]), (4096, 8192));
        assert_eq!((stats.memory_usage, stats.memory_limit), (20480, u64::MAX));
        assert_eq!(stats.memory_peak, 20480);
        assert_eq!(stats.memory_events["oom_kill"], 1);
        assert_eq!((stats.pids, stats.pids_limit), (3, 100));
        let device = &stats.devices[0];
        assert_eq!((device.major, device.minor, device.writes), (253, 16, 4));
        assert_eq!((device.read_bytes, device.written_bytes, device.reads), (1, 2, 3));
        assert_eq!((stats.devices.len(), stats.devices[1].reads), (2, 0));
    }

    #[test]
    fn cgroup_that_is_gone_is_an_error() {
        let (_directory, cgroup) = cgroup(&[]);
        assert!(matches!(read(&cgroup), Err(CgroupError::Read { .. })));
    }

    #[test]
    fn counters_beyond_the_bound_are_left_out() {
        let (mut lines, mut disks) = (String::new(), String::new());
        for n in 0..2 * MAX_COUNTERS {
            writeln!(lines, "counter{n} {n}").unwrap();
            writeln!(disks, "1:{n} rbytes=1").unwrap();
        }
        assert_eq!(counters(&lines).len(), MAX_COUNTERS);
        assert_eq!(devices(&disks).len(), MAX_COUNTERS);
        assert!(counters("no number\nbroken\n-1 -1").is_empty());
    }
}
