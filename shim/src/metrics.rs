//! What a container or a VM uses, as containerd takes it: `io.containerd.cgroups.v2.Metrics`.

use std::{collections::HashMap, path::PathBuf};

use containerd_shim_protos::{
    cgroups_v2::metrics::{CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat},
    protobuf::{Message, MessageField, well_known_types::any::Any},
};
use vial_agent_protocol::{MAX_COUNTERS, agent::StatsResponse};

/// The type's name in an `Any`, as containerd's registry has it.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";
/// What the kernel counts time in for user space (USER_HZ of linux/param.h, times(2)).
const TICK_USEC: u64 = 1_000_000 / 100;

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// A file of the VMM's process cannot be used.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// They cannot be encoded.
    #[error("cannot encode the statistics: {0}")]
    Encode(containerd_shim_protos::protobuf::Error),
}

/// As containerd has it on the wire.
///
/// # Errors
/// [`MetricsError::Encode`].
pub fn encode(metrics: &Metrics) -> Result<Any, MetricsError> {
    let value = metrics.write_to_bytes().map_err(MetricsError::Encode)?;
    Ok(Any { type_url: TYPE_URL.into(), value, ..Default::default() })
}

/// What the agent read from a container's cgroup. The guest wrote it: its numbers are anything,
/// and no more of them are taken than there can be.
pub fn of_container(stats: &StatsResponse) -> Metrics {
    let cpu = |name: &str| counter(&stats.cpu, name);
    let devices = stats.devices.iter().take(MAX_COUNTERS).map(|device| IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    });
    let events = |name: &str| counter(&stats.memory_events, name);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids,
            // containerd knows no limit as 0.
            limit: if stats.pids_limit == u64::MAX { 0 } else { stats.pids_limit },
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu("usage_usec"),
            user_usec: cpu("user_usec"),
            system_usec: cpu("system_usec"),
            nr_periods: cpu("nr_periods"),
            nr_throttled: cpu("nr_throttled"),
            throttled_usec: cpu("throttled_usec"),
            nr_bursts: cpu("nr_bursts"),
            burst_usec: cpu("burst_usec"),
            ..Default::default()
        }),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(MemoryEvents {
            low: events("low"),
            high: events("high"),
            max: events("max"),
            oom: events("oom"),
            oom_kill: events("oom_kill"),
            oom_group_kill: events("oom_group_kill"),
            ..Default::default()
        }),
        io: MessageField::some(IOStat { usage: devices.collect(), ..Default::default() }),
        ..Default::default()
    }
}

fn counter(counters: &HashMap<String, u64>, name: &str) -> u64 {
    counters.get(name).copied().unwrap_or(0)
}

fn memory(stats: &StatsResponse) -> MemoryStat {
    let stat = |name: &str| counter(&stats.memory, name);
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        // Split by kind since Linux 5.9.
        workingset_refault: stat("workingset_refault_anon")
            .saturating_add(stat("workingset_refault_file")),
        workingset_activate: stat("workingset_activate_anon")
            .saturating_add(stat("workingset_activate_file")),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: stats.memory_usage,
        usage_limit: stats.memory_limit,
        max_usage: stats.memory_peak,
        swap_usage: stats.swap_usage,
        swap_limit: stats.swap_limit,
        ..Default::default()
    }
}

/// What the VM costs the host: the time and memory of its VMM's process.
///
/// # Errors
/// [`MetricsError::Read`]; the VMM has ended, as a rule.
pub fn of_vmm(pid: u32) -> Result<Metrics, MetricsError> {
    let stat = read(pid, "stat")?;
    let status = read(pid, "status")?;
    Ok(of_process(&stat, &status))
}

fn read(pid: u32, name: &str) -> Result<String, MetricsError> {
    let path = PathBuf::from(format!("/proc/{pid}/{name}"));
    std::fs::read_to_string(&path).map_err(|error| MetricsError::Read { path, error })
}

/// By the content of `stat` and `status` of a process (proc_pid_stat(5), proc_pid_status(5)).
fn of_process(stat: &str, status: &str) -> Metrics {
    // The name in brackets may hold anything; what follows begins with the third field.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let field = |number: usize| -> u64 {
        fields.get(number - 3).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let bytes = |name: &str| -> u64 {
        let mut lines = status.lines().filter_map(|line| line.split_once(':'));
        let value = lines.find_map(|(key, value)| (key == name).then_some(value)).unwrap_or("");
        let kib: u64 =
            value.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0);
        kib.saturating_mul(1024)
    };
    let (user, system) = (field(14) * TICK_USEC, field(15) * TICK_USEC);
    let (anon, file, shmem) = (bytes("RssAnon"), bytes("RssFile"), bytes("RssShmem"));
    Metrics {
        pids: MessageField::some(PidsStat { current: field(20), ..Default::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: user + system,
            user_usec: user,
            system_usec: system,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon,
            file: file + shmem,
            shmem,
            file_mapped: file + shmem,
            pgfault: field(10) + field(12),
            pgmajfault: field(12),
            usage: anon + file + shmem,
            usage_limit: u64::MAX,
            max_usage: bytes("VmHWM"),
            swap_usage: bytes("VmSwap"),
            swap_limit: u64::MAX,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use vial_agent_protocol::agent::DeviceStats;

    use super::*;

    #[test]
    fn containers_numbers_go_where_containerd_looks() {
        let mut stats = StatsResponse::new();
        stats.cpu.insert("usage_usec".into(), 7);
        stats.memory.insert("inactive_file".into(), 8);
        stats.memory_events.insert("oom_kill".into(), 9);
        (stats.memory_usage, stats.memory_limit) = (10, u64::MAX);
        (stats.pids, stats.pids_limit) = (11, u64::MAX);
        stats.devices = vec![DeviceStats { reads: 12, ..Default::default() }; MAX_COUNTERS + 1];
        let any = encode(&of_container(&stats)).unwrap();
        assert_eq!(any.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.inactive_file), (7, 8));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (10, u64::MAX));
        assert_eq!((metrics.memory_events.oom_kill, metrics.pids.current), (9, 11));
        assert_eq!((metrics.pids.limit, metrics.io.usage[0].rios), (0, 12));
        assert_eq!(metrics.io.usage.len(), MAX_COUNTERS);
    }

    #[test]
    fn process_is_read_whatever_its_name_is() {
        let stat = "7 (a) 1 2) S 1 7 7 0 -1 0 100 0 5 0 30 20 0 0 20 0 4 0 99 0 0";
        let status =
            "Name:\ta) 1\nVmHWM:\t  9 kB\nRssAnon:\t 2 kB\nRssFile:\t1 kB\nRssShmem:\t3 kB\n";
        let metrics = of_process(stat, status);
        assert_eq!((metrics.cpu.user_usec, metrics.cpu.system_usec), (300_000, 200_000));
        assert_eq!((metrics.memory.usage, metrics.memory.max_usage), (6 * 1024, 9 * 1024));
        assert_eq!((metrics.pids.current, metrics.memory.pgmajfault), (4, 5));
        assert_eq!(of_process("", "").cpu.usage_usec, 0);
    }

    #[test]
    fn own_process_uses_something() {
        let metrics = of_vmm(std::process::id()).unwrap();
        assert!(metrics.memory.usage > 0 && metrics.pids.current > 0);
        assert!(of_vmm(0).is_err());
    }
}
