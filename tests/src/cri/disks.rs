//! Block devices of the host in containers, as a kubelet gives a pod the volumes that have no file system.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

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
