//! The kernel's vhost-net between a pod's taps and its guest: that it carries what the VMM carries
//! without it, and that a hostile guest gets no further than its own device.

use std::fs;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vial_tests::node::{Configuration, with};

use super::changes::{Cable, Namespace, has_more};
use super::network::{GATEWAY, addresses};
use super::pod::{Container, Pod, eventually, idle};
use super::queues::pod_of;
use super::wire::*;
use crate::suite::bed::{Bed, Runtime};
use crate::suite::faults::{kill, process, processes};
use crate::suite::isolation::ADVERSARY;
use crate::suite::network::echo;
use crate::suite::sizes::limits;

const DEVICE: &str = "/dev/vhost-net";
const PORT: u16 = 7098;
/// What goes to the host and comes back, in bytes.
const BYTES: u32 = 4_000_000;

/// The node's configuration with `vhost_net` as said, until the result is dropped.
pub(super) fn configured(setting: &str) -> Result<Configuration> {
    let configuration = Configuration::keep();
    let value = format!("\"{setting}\"");
    configuration.write(&with(configuration.text(), "vhost_net", &value))?;
    Ok(configuration)
}

/// The threads that the kernel has made for a VMM's networks.
fn carriers(vmm: i32) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let thread = thread?.path();
        // It may end meanwhile.
        let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        // Before Linux 6.4 they are processes of the kernel's, by the number of the thread that has
        // asked for them.
        let number = thread.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let apart = processes(&format!("vhost-{number}"), "")?;
        found.extend(apart.into_iter().map(|pid| PathBuf::from(format!("/proc/{pid}"))));
        found.extend(name.starts_with("vhost-").then_some(thread));
    }
    Ok(found)
}

pub(super) fn has_carriers(vmm: i32, count: usize) -> Result<Vec<PathBuf>> {
    eventually(|| {
        let found = carriers(vmm)?;
        ensure!(found.len() == count, "the kernel has {} threads for it, not {count}", found.len());
        Ok(found)
    })
}

/// They have no more rights than the VMM's own threads, and count for the same cgroup.
pub(super) fn carriers_are_confined(vmm: i32, threads: &[PathBuf]) -> Result<()> {
    let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup"))?;
    for thread in threads {
        let status = fs::read_to_string(thread.join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).with_context(|| format!("no {name} in {status}"))
        };
        if field("Tgid:")? == vmm.to_string() {
            ensure!(u64::from_str_radix(field("CapEff:")?, 16)? == 0, "capabilities: {status}");
            ensure!(field("Seccomp:")? == "2" && field("NoNewPrivs:")? == "1", "{status}");
        }
        let own = fs::read_to_string(thread.join("cgroup"))?;
        ensure!(own == cgroup, "its cgroup is {own:?} and not {cgroup:?}");
    }
    Ok(())
}

/// Sends data to the host and back, and compares.
fn exchange(container: &Container, host: &str) -> Result<()> {
    let listener = TcpListener::bind((host, PORT))?;
    let server = echo(listener, 1);
    let sums = container.exec(&format!(
        "data() {{ yes 'packets of a pod' | head -c {BYTES}; }}; data | sha256sum; \
         data | nc -w 60 {host} {PORT} | sha256sum"
    ))?;
    let sums: Vec<&str> = sums.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "changed on its way: {sums:?}");
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    Ok(())
}

/// A pod's network from its start to its end, with and without the kernel.
fn is_carried(bed: &Bed, by_kernel: bool) -> Result<()> {
    let count = |interfaces: usize| if by_kernel { interfaces } else { 0 };
    let pod = Pod::new(Runtime::Vial)?;
    let container = pod.start(idle())?;
    let vmm = process("vial-vmm", "--api-fd")?;
    carriers_are_confined(vmm, &has_carriers(vmm, count(1))?)?;
    exchange(&container, GATEWAY)?;
    // A second vCPU and more memory come, where the VM grows, and are asked back.
    let larger = pod.start(idle().resources(limits((2000, 192))))?;
    exchange(&larger, GATEWAY)?;
    larger.stop(5)?;
    larger.remove()?;
    // An interface that comes has a carrier of its own, which goes with it.
    let namespace = Namespace::of_the_only_pod()?;
    let cable = Cable::new(&namespace, 1)?;
    has_more(&container, &["net1 1400", "10.78.1.0/24"], &[])?;
    // One for each pair of queues: as many as the VM has CPUs just then.
    let pairs = container.exec("ls -d /sys/class/net/net1/queues/rx-* | wc -l")?;
    carriers_are_confined(vmm, &has_carriers(vmm, count(1 + pairs.trim().parse::<usize>()?))?)?;
    exchange(&container, "10.77.1.1")?;
    drop(cable);
    has_more(&container, &[], &["net1"])?;
    has_carriers(vmm, count(1))?;
    exchange(&container, GATEWAY)?;
    kill(vmm)?;
    container.reaches(ContainerState::Exited)?;
    pod.end()?;
    bed.nothing_left()
}

pub(super) fn is_there() -> Result<()> {
    ensure!(Path::new(DEVICE).exists(), "this host has no {DEVICE}; `modprobe vhost_net`");
    Ok(())
}

/// The device's node under another name, until dropped.
struct Hidden;

impl Hidden {
    const NAME: &str = "/dev/vial-suite-vhost-net";

    fn new() -> Result<Self> {
        fs::rename(DEVICE, Self::NAME)?;
        Ok(Self)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Err(error) = fs::rename(Self::NAME, DEVICE) {
            eprintln!("{DEVICE} is not as it was: {error}");
        }
    }
}

pub(crate) fn vhost_net_carries_the_packets_of_a_pod(bed: &Bed) -> Result<()> {
    is_there()?;
    let _configuration = configured("auto")?;
    is_carried(bed, true)
}

pub(crate) fn pod_without_vhost_net_has_its_network_all_the_same(bed: &Bed) -> Result<()> {
    is_there()?;
    {
        let _configuration = configured("off")?;
        is_carried(bed, false).context("with `vhost_net = \"off\"`")?;
    }
    let _hidden = Hidden::new()?;
    let pod = Pod::new(Runtime::Vial)?;
    let container = pod.start(idle())?;
    has_carriers(process("vial-vmm", "--api-fd")?, 0)?;
    exchange(&container, GATEWAY).with_context(|| format!("without {DEVICE}"))?;
    pod.end()
}

/// The same for a VM that boots. Not by the name of this list.
pub(crate) fn cri_vhost_net_carries_the_packets_of_a_vm_that_boots(bed: &Bed) -> Result<()> {
    is_there()?;
    is_carried(bed, true)
}

/// Packets from the host to an address, one after the other, until dropped.
struct Noise {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Noise {
    fn to(address: IpAddr) -> Result<Self> {
        let socket = UdpSocket::bind((GATEWAY, 0))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let _ = socket.send_to(b"noise", (address, 9));
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the guest's kernel would never write into its rings breaks the device that it is written
/// for, until that is reset.
pub(crate) fn hostile_driver_breaks_its_network_device_and_nothing_else(_: &Bed) -> Result<()> {
    is_there()?;
    let tainted = || fs::read_to_string("/proc/sys/kernel/tainted");
    let before = tainted()?;
    for (setting, count) in [("auto", 1), ("off", 0)] {
        let _configuration = configured(setting)?;
        driver_is_survived(count).with_context(|| format!("with `vhost_net = \"{setting}\"`"))?;
        ensure!(tainted()? == before, "the host's kernel complains; see its log");
    }
    Ok(())
}

fn driver_is_survived(count: usize) -> Result<()> {
    let other = Pod::new(Runtime::Vial)?;
    let neighbour = other.start(idle())?;
    let its = process("vial-vmm", "--api-fd")?;
    // Of two CPUs, so that its device has two pairs of queues and one by which it is told of them.
    let pod = pod_of(2000)?;
    let programs = Path::new(ADVERSARY).parent().context("where the programs are")?;
    let hostile = idle().security(|security| security.privileged = true);
    let hostile = pod.start(hostile.volume(programs, "/host", true))?;
    let vmm = processes("vial-vmm", "--api-fd")?;
    let vmm = *vmm.iter().find(|pid| **pid != its).context("the hostile pod has no VMM")?;
    has_carriers(vmm, 2 * count)?;
    exchange(&hostile, GATEWAY)?;
    let noise = Noise::to(addresses(&pod)?[0])?;
    let told = hostile.exec("/host/vial-adversary --driver eth0")?;
    drop(noise);
    ensure!(told.lines().count() > 40 && !told.contains("WRONG"), "{told}");
    // The VM lives without its interface, and the other one has its own.
    ensure!(hostile.exec("echo alive")? == "alive\n", "the guest does not answer");
    has_carriers(vmm, 2 * count)?;
    has_carriers(its, count)?;
    exchange(&neighbour, GATEWAY)?;
    pod.end()?;
    other.end()
}
