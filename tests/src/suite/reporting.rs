//! Memory that a container has used and that its guest has free again: that the host has it back, and the guest, when
//! it wants it once more.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use vial_tests::node::{self, Configuration};

use super::bed::{Bed, Runtime, run};
use super::faults::process;
use super::templates::{COLD, Node, RESTORED};

/// What a case fills, and how much of it comes back at least.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// Files of 4 MiB that are made and removed.
    files: i64,
    least_mib: i64,
}

/// How long it may take. The guest tells of it two seconds later, and of much in several goes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes files of which no two are the same beside one that stays, and tells what is in all of them.
fn fill(Load { files, .. }: Load) -> String {
    format!(
        "set -e; [ -e base ] || seq 99999999 | head -c 4194304 >base; \
         for at in $(seq {files}); do {{ seq $at; cat base; }} >$at; done; cat $(seq {files}) base | md5sum"
    )
}

/// What it tells where nothing is given back to anybody.
fn checksum(load: Load) -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let mut shell = Command::new("sh");
    Ok(run(shell.args(["-c", &fill(load)]).current_dir(scratch.path()))?.expect(0)?.stdout)
}

/// What the VMM has of the host's memory, in MiB: what its processes map, and what its cgroup is charged for.
fn has_mib() -> Result<(i64, i64)> {
    let vmm = process("vial-vmm", "")?;
    let text = fs::read_to_string(format!("/proc/{vmm}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no Private_Dirty")?;
    let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup"))?;
    let cgroup = cgroup.trim().strip_prefix("0::/").context("no cgroup")?;
    let charged = Path::new("/sys/fs/cgroup").join(cgroup).join("memory.current");
    let charged: i64 = fs::read_to_string(charged)?.trim().parse()?;
    Ok((kib.parse::<i64>()? >> 10, charged >> 20))
}

/// That what a container has in memory and removes is the host's again, twice.
fn comes_back(bed: &Bed, load: Load, life: &str) -> Result<()> {
    let log = bed.log_length();
    let options = ["--mount", "type=tmpfs,src=fill,dst=/fill"];
    let pod = bed.detached_with(Runtime::Vial, &options, &["sleep", "1000"])?;
    ensure!(!bed.lines_since(log, life).is_empty(), "the log does not say that {life}");
    let due = checksum(load)?;
    let sh = |line: &str| pod.exec(&[], &["sh", "-c", &format!("cd /fill; {line}")]);
    for round in 0..2 {
        let said = sh(&fill(load))?.expect(0)?.stdout;
        ensure!(said == due, "round {round}: what is in memory sums up to {said:?}, not {due:?}");
        let filled = has_mib()?;
        ensure!(filled.0 >= 4 * load.files, "the VMM has {filled:?} MiB");
        sh(&format!("rm $(seq {})", load.files))?.expect(0)?;
        let start = Instant::now();
        loop {
            let now = has_mib()?;
            if filled.0 - now.0 >= load.least_mib && filled.1 - now.1 >= load.least_mib {
                break;
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "round {round}: of {filled:?} MiB the VMM still has {now:?}, {load:?}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(())
}

pub(crate) fn memory_that_a_guest_frees_is_the_hosts_again(bed: &Bed) -> Result<()> {
    let configuration = Configuration::keep();
    configuration.write(&node::with(configuration.text(), "memory_mib", "512"))?;
    // Its memory is in huge pages, of which only whole ones go back.
    comes_back(bed, Load { files: 50, least_mib: 60 }, COLD)
}

pub(crate) fn memory_that_a_guest_of_a_template_frees_is_the_hosts_again(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    comes_back(bed, Load { files: 12, least_mib: 36 }, RESTORED)
}
