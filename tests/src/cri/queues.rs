//! Networks of pods with several CPUs: a pair of queues for each, by which packets go in both directions.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::changes::{Cable, Namespace, has_more};
use super::network::GATEWAY;
use super::pod::{Container, Pod, eventually, idle};
use super::vhost_net::{carriers_are_confined, configured, has_carriers, is_there};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime};
use crate::suite::faults::{kill, process};
use crate::suite::isolation::ADVERSARY;
use crate::suite::network::echo_at_once;
use crate::suite::sizes::limits;

const PORT: u16 = 7099;
/// How many connections there are at once, and what each of them carries there and back, in bytes.
const FLOWS: u32 = 8;
const BYTES: u32 = 600_000;
/// Where containers have this program.
const SUITE: &str = "/suite";

/// A pod of that many thousandths of a CPU, whose containers may do everything in its guest.
pub(super) fn pod_of(cpus: i64) -> Result<Pod> {
    Pod::with(Runtime::Vial, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(limits((cpus, 192)));
        linux.security_context.get_or_insert_default().privileged = true;
    })
}

fn privileged(pod: &Pod) -> Result<Container<'_>> {
    let config = idle().security(|security| security.privileged = true);
    pod.start(config.volume(&std::env::current_exe()?, SUITE, true))
}

/// How many pairs an interface uses, and how many it has, as `USED of MOST`.
fn pairs(container: &Container, interface: &str) -> Result<String> {
    Ok(container.exec(&format!("{SUITE} --pairs {interface}"))?.trim().to_owned())
}

fn set_pairs(container: &Container, interface: &str, count: u32) -> Result<String> {
    Ok(container.exec(&format!("{SUITE} --pairs {interface}={count}"))?.trim().to_owned())
}

/// How often each queue of the guest's networks has interrupted it, by the kernel's names.
fn interrupts(container: &Container) -> Result<BTreeMap<String, u64>> {
    let told = container.exec("cat /proc/interrupts")?;
    let of_line = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let count = words.by_ref().map_while(|word| word.parse::<u64>().ok()).sum();
        let name = line.split_whitespace().next_back()?;
        let queue = name.split_once('-')?.1;
        ["input.", "output."]
            .iter()
            .any(|kind| queue.starts_with(kind))
            .then(|| (name.to_owned(), count))
    };
    Ok(told.lines().filter_map(of_line).collect())
}

/// Several connections at once, of which each CPU has half, carry data to the host and back.
fn flows(container: &Container, host: &str) -> Result<()> {
    let address: IpAddr = host.parse()?;
    let listener = TcpListener::bind((address, PORT))?;
    let server = echo_at_once(listener, FLOWS);
    let script = format!(
        "data() {{ yes \"flow $1 of a pod\" | head -c {BYTES}; }}; \
         flow() {{ [ \"$(data $1 | sha256sum)\" = \
           \"$(data $1 | taskset -c $(($1 % 2)) nc -w 60 {host} {PORT} | sha256sum)\" ]; }}; \
         flows=; for n in $(seq {FLOWS}); do flow $n & flows=\"$flows $!\"; done; \
         for flow in $flows; do wait $flow || exit 1; done; echo whole"
    );
    let told = container.exec(&script).context("a flow is changed on its way, or does not end")?;
    ensure!(told == "whole\n", "it says {told:?}");
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    Ok(())
}

/// How often each of these threads has waited for more to do.
fn waits(threads: &[PathBuf]) -> Result<Vec<u64>> {
    let of = |thread: &PathBuf| {
        let status = fs::read_to_string(thread.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Ok(line.with_context(|| status.clone())?.trim().parse()?)
    };
    threads.iter().map(of).collect()
}

/// Both pairs carry packets: the guest is interrupted for each, and each has a busy carrier.
fn both_carry(container: &Container, carriers: &[PathBuf], host: &str) -> Result<()> {
    let (before, waited) = (interrupts(container)?, waits(carriers)?);
    flows(container, host)?;
    let after = interrupts(container)?;
    for queue in ["input.0", "input.1"] {
        let risen = after
            .iter()
            .filter(|(name, _)| name.ends_with(queue))
            .any(|(name, count)| *count > before.get(name).copied().unwrap_or(0) + 3);
        ensure!(risen, "nothing has come by {queue}: {before:?}, then {after:?}");
    }
    for (before, after) in waited.iter().zip(waits(carriers)?) {
        ensure!(after > before + 3, "a carrier has had nothing to do: {before}, then {after}");
    }
    Ok(())
}

/// A pod of two CPUs from its start to the death of its VMM.
fn are_used(bed: &Bed, by_kernel: bool) -> Result<()> {
    let count = |pairs: usize| if by_kernel { pairs } else { 0 };
    let pod = pod_of(2000)?;
    let container = privileged(&pod)?;
    ensure!(pairs(&container, "eth0")? == "2 of 2", "it has {}", pairs(&container, "eth0")?);
    let vmm = process("vial-vmm", "--api-fd")?;
    let carriers = has_carriers(vmm, count(2))?;
    carriers_are_confined(vmm, &carriers)?;
    both_carry(&container, &carriers, GATEWAY)?;
    // One pair is turned off and on again, before the flows and in the midst of them.
    ensure!(set_pairs(&container, "eth0", 1)? == "1 of 2", "it keeps both");
    flows(&container, GATEWAY).context("by one pair")?;
    ensure!(set_pairs(&container, "eth0", 2)? == "2 of 2", "it keeps one");
    both_carry(&container, &carriers, GATEWAY).context("by both again")?;
    let turning = format!(
        "for n in 1 2 1 2 1 2; do {SUITE} --pairs eth0=$n; sleep 0.3; done >/dev/null; echo turned"
    );
    std::thread::scope(|scope| -> Result<()> {
        let turned = scope.spawn(|| container.exec(&turning));
        let carried = (0..2).try_for_each(|_| flows(&container, GATEWAY));
        let turned = turned.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        ensure!(turned == "turned\n", "{turned:?}");
        carried.context("while pairs are turned off and on")
    })?;
    // Nobody can have more than there are, or none.
    for wrong in [0, 3, 9] {
        ensure!(set_pairs(&container, "eth0", wrong).is_err(), "it has {wrong} pairs");
    }
    // A CPU that the guest takes offline leaves its pair to the other.
    let cpu = "/sys/devices/system/cpu/cpu1/online";
    container.exec(&format!("echo 0 >{cpu}"))?;
    let script = "taskset -c 0 true; nproc";
    ensure!(container.exec(script)? == "1\n", "the CPU is online");
    exchange_on_one_cpu(&container)?;
    container.exec(&format!("echo 1 >{cpu}"))?;
    both_carry(&container, &carriers, GATEWAY).context("with the CPU that came again")?;
    // An interface that comes later has as many, and they go with it.
    let namespace = Namespace::of_the_only_pod()?;
    let cable = Cable::new(&namespace, 1)?;
    has_more(&container, &["net1 1400", "10.78.1.0/24"], &[])?;
    ensure!(pairs(&container, "net1")? == "2 of 2", "net1 has {}", pairs(&container, "net1")?);
    let all = has_carriers(vmm, count(4))?;
    carriers_are_confined(vmm, &all)?;
    both_carry(&container, &[], "10.77.1.1").context("by the interface that came")?;
    drop(cable);
    has_more(&container, &[], &["net1"])?;
    has_carriers(vmm, count(2))?;
    flows(&container, GATEWAY)?;
    kill(vmm)?;
    container.reaches(ContainerState::Exited)?;
    pod.end()?;
    bed.nothing_left()
}

/// The same flows without the second CPU, to which nothing can be bound.
fn exchange_on_one_cpu(container: &Container) -> Result<()> {
    let server = echo_at_once(TcpListener::bind((GATEWAY, PORT))?, 4);
    let told = container.exec(&format!(
        "for n in 1 2 3 4; do (yes data | head -c {BYTES} | nc -w 60 {GATEWAY} {PORT} | wc -c) & \
         done; wait"
    ))?;
    let counts: Vec<&str> = told.lines().collect();
    ensure!(counts == vec![BYTES.to_string(); 4], "{counts:?} bytes have come");
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    Ok(())
}

pub(crate) fn network_of_several_cpus_has_a_pair_of_queues_for_each(bed: &Bed) -> Result<()> {
    is_there()?;
    let _configuration = configured("auto")?;
    are_used(bed, true)
}

pub(crate) fn network_of_several_cpus_has_its_queues_without_vhost_net(bed: &Bed) -> Result<()> {
    let _configuration = configured("off")?;
    are_used(bed, false)
}

/// The same for a VM that boots. Not by the name of this list.
pub(crate) fn cri_network_of_several_cpus_has_its_queues_in_a_vm_that_boots(
    bed: &Bed,
) -> Result<()> {
    is_there()?;
    are_used(bed, true)
}

/// A network has the pairs that the VM had CPUs when it came, eight at most, and keeps them when the VM grows.
pub(crate) fn network_has_the_pairs_of_the_cpus_that_were_there_when_it_came(
    bed: &Bed,
) -> Result<()> {
    let pod = pod_of(1000)?;
    let vmm = process("vial-vmm", "--api-fd")?;
    let container = privileged(&pod)?;
    ensure!(pairs(&container, "eth0")? == "1 of 1", "it has {}", pairs(&container, "eth0")?);
    has_carriers(vmm, 1)?;
    let larger = pod.start(idle().resources(limits((2000, 64))))?;
    eventually(|| {
        let online = larger.exec("cat /sys/devices/system/cpu/online")?;
        ensure!(online.trim() != "0", "the VM has not grown");
        Ok(())
    })?;
    ensure!(pairs(&container, "eth0")? == "1 of 1", "it has {}", pairs(&container, "eth0")?);
    let namespace = Namespace::of_the_only_pod()?;
    let cable = Cable::new(&namespace, 1)?;
    has_more(&container, &["net1 1400"], &[])?;
    let told = pairs(&container, "net1")?;
    let (used, most) = told.split_once(" of ").context("what it tells")?;
    ensure!(used == most && most != "1", "an interface that came to a larger VM has {told}");
    flows(&container, "10.77.1.1")?;
    drop(cable);
    has_more(&container, &[], &["net1"])?;
    pod.end()?;
    // As many CPUs as a template serves.
    let pod = pod_of(8000)?;
    let container = privileged(&pod)?;
    ensure!(pairs(&container, "eth0")? == "8 of 8", "it has {}", pairs(&container, "eth0")?);
    has_carriers(process("vial-vmm", "--api-fd")?, 8)?;
    flows(&container, GATEWAY)?;
    pod.end()?;
    bed.nothing_left()
}

/// The shim in a filter of system calls that knows no TUNSETQUEUE (linux/if_tun.h), as on a kernel without taps of
/// several queues, until dropped.
struct OneQueue;

const SHIM: &str = "/usr/local/bin/containerd-shim-vial-v2";
const KEPT: &str = "/usr/local/bin/containerd-shim-vial-v2.kept";

impl OneQueue {
    fn new() -> Result<Self> {
        fs::rename(SHIM, KEPT)?;
        let one = Self;
        fs::write(
            SHIM,
            format!("#!/bin/sh\nexec {ADVERSARY} --without 0x400454d9 {KEPT} \"$@\"\n"),
        )?;
        fs::set_permissions(SHIM, fs::Permissions::from_mode(0o755))?;
        Ok(one)
    }
}

impl Drop for OneQueue {
    fn drop(&mut self) {
        if let Err(error) = fs::rename(KEPT, SHIM) {
            println!("    | the shim is still called {KEPT}: {error}");
        }
    }
}

pub(crate) fn network_has_one_pair_where_the_host_has_no_taps_of_several(bed: &Bed) -> Result<()> {
    let lacking = OneQueue::new()?;
    let log = bed.log_length();
    let pod = pod_of(2000)?;
    let container = privileged(&pod)?;
    ensure!(pairs(&container, "eth0")? == "1 of 1", "it has {}", pairs(&container, "eth0")?);
    let cpus = container.exec("nproc")?;
    ensure!(cpus.trim() == "2", "the pod has {cpus:?} CPUs");
    let warned = bed.lines_since(log, "has one queue, not 2");
    ensure!(warned.len() == 1, "{} warnings of one queue", warned.len());
    flows(&container, GATEWAY)?;
    pod.end()?;
    drop(lacking);
    bed.nothing_left()
}

pub(crate) fn network_of_several_cpus_leaves_nothing_when_vmm_or_shim_is_killed(
    bed: &Bed,
) -> Result<()> {
    for (program, word) in [("vial-vmm", "--api-fd"), ("containerd-shim", "vial")] {
        let pod = pod_of(2000)?;
        let container = privileged(&pod)?;
        ensure!(pairs(&container, "eth0")? == "2 of 2", "it has {}", pairs(&container, "eth0")?);
        kill(process(program, word)?)?;
        container.reaches(ContainerState::Exited)?;
        pod.end()?;
        bed.nothing_left().with_context(|| program)?;
    }
    Ok(())
}
