//! Block devices of the host in containers, as a kubelet gives a pod the volumes that have no file system.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use vial_tests::disk_load::Load;
use vial_tests::loop_device::LoopDevice;

use super::pod::{Pod, eventually, idle, same_in_a_pod, sh};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime, run};
use crate::suite::faults::{kill, process};

/// The size of the disks here.
const BYTES: u64 = 8 << 20;

/// A file of the host as a block device, until dropped.
struct Loop {
    device: LoopDevice,
    file: PathBuf,
}

impl Loop {
    fn new(pod: &Pod, name: &str) -> Result<Self> {
        let file = pod.path(name);
        File::create(&file)?.set_len(BYTES)?;
        Ok(Self { device: LoopDevice::new(&file)?, file })
    }

    /// A container that has it there.
    fn given(&self, container: ContainerConfig, path: &str, access: &str) -> ContainerConfig {
        let mut container = container;
        container.devices.push(Device {
            container_path: path.into(),
            host_path: self.device.path.clone(),
            permissions: access.into(),
        });
        container
    }

    /// What the host reads there, all of it.
    fn checksum(&self) -> Result<String> {
        let sum = run(Command::new("sha256sum").arg(&self.device.path))?.expect(0)?.stdout;
        Ok(sum.split(' ').next().unwrap_or_default().to_owned())
    }

    /// Takes it away, which it is not while something holds it.
    fn take(self) -> Result<()> {
        let Self { device, file } = self;
        drop(device);
        eventually(|| {
            let by = run(Command::new("losetup").arg("--associated").arg(&file))?.expect(0)?;
            ensure!(by.stdout.is_empty(), "it is still held: {}", by.stdout.trim());
            Ok(())
        })
    }
}

pub(crate) fn block_volumes_are_the_same_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[("one container", written), ("two containers", shared)])
}

/// All of a disk is written and read; its node has the owner and mode that it has with runc.
fn written(pod: &Pod) -> Result<String> {
    let disk = Loop::new(pod, "written")?;
    let container = pod.start(disk.given(idle(), "/dev/xvda", "rwm"))?;
    let told = container.exec(
        "stat -c '%F %a %u:%g' /dev/xvda; wc -c </dev/xvda; \
         head -c 8388608 /dev/urandom >/tmp/data; dd if=/tmp/data of=/dev/xvda bs=256k conv=fsync 2>/dev/null; \
         cmp /tmp/data /dev/xvda && echo same; dd if=/dev/zero of=/dev/xvda bs=1 seek=8388608 count=1 2>&1 | grep -c 'No space'",
    )?;
    let sum = container.exec("sha256sum </tmp/data")?;
    ensure!(sum.starts_with(&disk.checksum()?), "the host does not read what was written");
    container.stop(0)?;
    container.remove()?;
    // Nobody holds it though the pod lives.
    disk.take()?;
    Ok(told)
}

/// One disk in two containers, of which one may only read it: what one writes, the other reads.
fn shared(pod: &Pod) -> Result<String> {
    let disk = Loop::new(pod, "shared")?;
    let other = Loop::new(pod, "other")?;
    let one = pod.start(disk.given(idle(), "/dev/data", "rwm").named("one", 0))?;
    let two = disk.given(other.given(idle(), "/dev/other", "r"), "/dev/sub/data", "rwm");
    let two = pod.start(two.named("two", 0))?;
    one.exec("echo from one | dd of=/dev/data bs=4k seek=5 conv=notrunc,fsync 2>/dev/null")?;
    let told = two.exec(
        "dd if=/dev/sub/data bs=4k skip=5 count=1 2>/dev/null | head -n 1; \
         head -c 1 /dev/other | wc -c; echo x 2>/dev/null >/dev/other || echo refused",
    )?;
    one.stop(0)?;
    one.remove()?;
    // The second goes on with it.
    let rest = two.exec("dd if=/dev/sub/data bs=4k skip=5 count=1 2>/dev/null | head -n 1")?;
    two.stop(0)?;
    two.remove()?;
    disk.take()?;
    other.take()?;
    Ok(told + &rest)
}

/// The disks that a guest has.
const DISKS: &str = "ls /sys/block | grep -c ^vd; true";

/// They come into the VM and go with their containers, and nobody holds them when the VM is dead.
pub(crate) fn block_volumes_come_and_go_and_are_free_when_the_vmm_is_killed(
    bed: &Bed,
) -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let disk = Loop::new(&pod, "disk")?;
    for _ in 0..2 {
        let told = pod.prints(disk.given(sh(DISKS), "/dev/xvda", "rw"))?;
        ensure!(told.trim() == "1", "a guest with a disk has {told:?}");
        let told = pod.prints(sh(DISKS))?;
        ensure!(told.trim() == "0", "the disk is left to the guest: {told:?}");
    }
    let busy = pod.start(disk.given(
        sh("echo up; while dd if=/dev/zero of=/dev/xvda bs=64k conv=fsync 2>/dev/null; do :; done"),
        "/dev/xvda",
        "rw",
    ))?;
    busy.logs("up")?;
    kill(process("vial-vmm", "")?)?;
    busy.reaches(ContainerState::Exited)?;
    disk.take()?;
    pod.end()?;
    bed.nothing_left()
}

/// What [`SUITE`] writes in a container: more threads than CPUs, so that several requests of each are in flight.
pub(crate) const LOAD: Load = Load { threads: 8, blocks: 48 };
/// Where containers have this program.
const SUITE: &str = "/suite";

/// A container that writes its disk for ever, on two CPUs.
fn writer(disk: &Loop) -> Result<ContainerConfig> {
    let line = format!("exec {SUITE} --load /dev/xvda");
    let container = sh(&line).volume(&std::env::current_exe()?, SUITE, true);
    let resources =
        LinuxContainerResources { cpu_period: 100_000, cpu_quota: 200_000, ..Default::default() };
    Ok(disk.given(container.resources(resources), "/dev/xvda", "rw"))
}

/// The numbers of the VMM's descriptors of rings.
fn rings(vmm: i32) -> Result<Vec<String>> {
    open(vmm, |path| {
        fs::read_link(path).is_ok_and(|end| end.to_string_lossy().contains("[io_uring]"))
    })
}

/// Those of its descriptors of a block device.
fn opened(vmm: i32, device: &str) -> Result<Vec<String>> {
    let device = fs::metadata(device)?.rdev();
    open(vmm, |path| {
        fs::metadata(path).is_ok_and(|it| it.file_type().is_block_device() && it.rdev() == device)
    })
}

fn open(vmm: i32, is: impl Fn(&Path) -> bool) -> Result<Vec<String>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{vmm}/fd"))? {
        let entry = entry?;
        if is(&entry.path()) {
            numbers.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(numbers)
}

pub(crate) fn block_volume_is_written_by_several_cpus_and_holds_what_was_flushed_when_the_vmm_is_killed(
    bed: &Bed,
) -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let disk = Loop::new(&pod, "disk")?;
    let vmm = process("vial-vmm", "")?;
    ensure!(rings(vmm)?.is_empty(), "a VMM without a disk has a ring");
    let busy = pod.start(writer(&disk)?)?;
    busy.logs("round 2 is there")?;
    let told = busy.exec(
        "cd /sys/block/vda; ls mq | wc -l; cat queue/write_cache queue/logical_block_size; \
         echo 'write through' >queue/write_cache 2>/dev/null; true",
    )?;
    let host = queue_of(&disk, "logical_block_size")?;
    ensure!(told == format!("2\nwrite back\n{host}"), "the guest's disk is {told:?}");
    ensure!(rings(vmm)?.len() == 1, "the disk has no ring");
    ensure!(opened(vmm, &disk.device.path)?.is_empty(), "the VMM has the disk beside its ring");
    busy.logs("round 5 is there")?;
    kill(vmm)?;
    busy.reaches(ContainerState::Exited)?;
    let text = fs::read_to_string(busy.log_path())?;
    let last = text
        .lines()
        .filter_map(|line| line.split("round ").nth(1)?.split(' ').next()?.parse::<u64>().ok());
    let last = last.max().context("no round was told of")?;
    LOAD.check(Path::new(&disk.device.path), last)?;
    disk.take()?;
    pod.end()?;
    bed.nothing_left()
}

/// A file of the host's queue of a disk.
fn queue_of(disk: &Loop, name: &str) -> Result<String> {
    let device = disk.device.path.rsplit('/').next().unwrap_or_default();
    Ok(fs::read_to_string(format!("/sys/block/{device}/queue/{name}"))?)
}

/// A container ends in the midst of its requests: the disk is free, the pod lives, and takes it again.
pub(crate) fn block_volume_goes_while_it_is_written(bed: &Bed) -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let disk = Loop::new(&pod, "disk")?;
    let vmm = process("vial-vmm", "")?;
    for _ in 0..3 {
        let busy = pod.start(writer(&disk)?)?;
        busy.logs("round 1 is there")?;
        busy.stop(0)?;
        busy.remove()?;
        eventually(|| {
            ensure!(rings(vmm)?.is_empty(), "the VMM keeps the ring of a disk that has gone");
            Ok(())
        })?;
        LOAD.check(Path::new(&disk.device.path), 1)?;
    }
    ensure!(pod.prints(sh(DISKS))?.trim() == "0", "the guest keeps its disk");
    disk.take()?;
    pod.end()?;
    bed.nothing_left()
}

/// What the kernel lets nobody make rings by, until dropped.
struct WithoutRings(String);

const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

impl WithoutRings {
    fn new() -> Result<Self> {
        let before = fs::read_to_string(SYSCTL).with_context(|| format!("read {SYSCTL}"))?;
        fs::write(SYSCTL, "2")?;
        Ok(Self(before))
    }
}

impl Drop for WithoutRings {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SYSCTL, self.0.trim()) {
            eprintln!("{SYSCTL} stays as it is: {error}");
        }
    }
}

pub(crate) fn block_volumes_are_cached_as_the_pod_says_and_go_without_io_uring(
    bed: &Bed,
) -> Result<()> {
    let without = WithoutRings::new()?;
    let told = run(Command::new("vial").arg("check"))?;
    let line = told.stdout.lines().find(|line| line.contains(" io_uring "));
    ensure!(
        line.is_some_and(|line| line.starts_with("broken") && line.contains("io_uring_disabled")),
        "vial check says {told:?}"
    );
    for (cache, direct) in [(None, true), (Some("writeback"), false), (Some("direct"), true)] {
        let pod = Pod::with(Runtime::Vial, |config| {
            let said = cache.map(|cache| ("io.vial/disk-cache".into(), cache.into()));
            config.annotations.extend(said);
        })?;
        let disk = Loop::new(&pod, "disk")?;
        let vmm = process("vial-vmm", "")?;
        let busy = pod.start(writer(&disk)?)?;
        busy.logs("round 1 is there")?;
        ensure!(rings(vmm)?.is_empty(), "a ring was made though none can be");
        let disks = opened(vmm, &disk.device.path)?;
        ensure!(disks.len() == 1, "the VMM has the disk by {disks:?}");
        // In octal (proc_pid_fdinfo(5)).
        let told = fs::read_to_string(format!("/proc/{vmm}/fdinfo/{}", disks[0]))?;
        let flags = told.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = i32::from_str_radix(flags.context("no flags")?.trim(), 8)?;
        ensure!((flags & libc::O_DIRECT != 0) == direct, "with {cache:?} it is open by {flags:o}");
        busy.stop(0)?;
        busy.remove()?;
        LOAD.check(Path::new(&disk.device.path), 1)?;
        disk.take()?;
        pod.end()?;
    }
    drop(without);
    let refused = Pod::with(Runtime::Vial, |config| {
        config.annotations.insert("io.vial/disk-cache".into(), "unsafe".into());
    });
    let error = format!("{:#}", refused.err().context("a pod with a wrong annotation starts")?);
    ensure!(error.contains("direct or writeback"), "{error}");
    bed.nothing_left()
}
