//! The device nodes that the guest's drivers make for functions of the host: in the containers that asked for the
//! functions, which are not privileged, and in no others.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Runtime, run};
use super::devices::{
    Bound, CLASS_NVME, FIRST, annotation, disk, listed, reaches_driver, virtual_function,
    with_class,
};
use super::hot_plug::{is_free, with};
use crate::cri::pod::{Container, Pod, idle, sh};

/// What is read, and where it is copied to.
const DATA_BYTES: usize = 4 << 20;
const COPY_AT: u64 = 20 << 20;
/// A user of a container who is not root.
const USER: u32 = 1000;
/// All nodes of disks, and what sysfs knows of their controllers and of them.
const NODES: &str = "cd /dev; ls -d nvme* ng* 2>/dev/null; true";
const DUE: &str = "cd /sys/class; ls -d nvme/* nvme-generic/* block/nvme* | sed 's,.*/,,'";

/// The host's disk, with data from its beginning on that differ with `seed`.
fn nvme(seed: u32) -> Result<(String, Vec<u8>)> {
    let function = with_class(CLASS_NVME)?;
    reaches_driver(&function, Some("nvme"))?;
    let data: Vec<u8> =
        (0..DATA_BYTES as u32).map(|at| ((at / 3) ^ (at >> 9) ^ seed) as u8).collect();
    let disk = File::options().write(true).open(disk(&function)?)?;
    disk.write_all_at(&data, 0)?;
    disk.write_all_at(&[0; DATA_BYTES], COPY_AT)?;
    disk.sync_all()?;
    Ok((function, data))
}

/// What a container does with the disk, by its node: tells what it has read, and copies it.
fn copies() -> String {
    let (mib, at) = (DATA_BYTES >> 20, COPY_AT >> 20);
    format!(
        "{FIRST} dd if=/dev/$disk bs=1M count={mib} 2>/dev/null | sha256sum; \
         dd if=/dev/$disk of=/dev/$disk bs=1M count={mib} seek={at} conv=notrunc,fsync 2>/dev/null && echo copied"
    )
}

fn sum(data: &[u8]) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(&file, data)?;
    let told = run(Command::new("sha256sum").arg(file.path()))?.expect(0)?.stdout;
    Ok(told.split(' ').next().unwrap_or_default().to_owned())
}

/// What [`copies`] printed, of a disk that began with `data`.
fn has_copied(told: &str, data: &[u8]) -> Result<()> {
    let due = format!("{}  -\ncopied\n", sum(data)?);
    ensure!(told == due, "{due:?} was due, and not {told:?}");
    Ok(())
}

/// The host's driver has the disk again, and reads there what was copied.
fn copy_is_on_the_disk(function: &str, data: &[u8]) -> Result<()> {
    reaches_driver(function, Some("nvme"))?;
    let mut found = vec![0; DATA_BYTES];
    File::open(disk(function)?)?.read_exact_at(&mut found, COPY_AT)?;
    ensure!(found == data, "the copy on the disk is not what was written");
    Ok(())
}

/// The container has a node for everything that the drivers of disks made, and no other of theirs.
fn has_all_nodes(container: &Container) -> Result<()> {
    let sorted = |text: String| -> Vec<String> {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let (found, due) = (sorted(container.exec(NODES)?), sorted(container.exec(DUE)?));
    ensure!(found == due, "the nodes are {found:?}, and the guest has {due:?}");
    for name in ["nvme0", "nvme0n1"] {
        ensure!(found.iter().any(|one| one == name), "{name} is not among {found:?}");
    }
    Ok(())
}

/// The container has no node of the disk, and cannot open one that it makes itself.
fn is_kept_from_the_disk(container: &Container) -> Result<()> {
    let found = container.exec(NODES)?;
    ensure!(found.is_empty(), "it has {found}");
    for (at, kind) in [("block/nvme0n1", "b"), ("class/nvme/nvme0", "c")] {
        let script = format!(
            "mknod /dev/own {kind} $(tr : ' ' < /sys/{at}/dev) && {{ cat /dev/own 2>&1; echo $?; rm /dev/own; }}"
        );
        let told = container.exec(&script)?;
        ensure!(told.ends_with("Operation not permitted\n1\n"), "{at}: {told:?}");
    }
    Ok(())
}

pub(crate) fn cri_container_has_the_nodes_of_its_function_and_others_have_not(
    bed: &Bed,
) -> Result<()> {
    let (function, data) = nvme(1)?;
    let other = Bound::new(virtual_function(0)?)?;
    let bound = Bound::new(function.clone())?;
    let pod = Pod::new(Runtime::Vial)?;
    let before = pod.start(idle())?;
    for round in 0..2 {
        let container = pod.start(with(&bound, idle().named("disk", round))?)?;
        has_all_nodes(&container)?;
        has_copied(&container.exec(&copies())?, &data).with_context(|| format!("round {round}"))?;
        // One that was there, and ones that come, with a function of their own or without.
        let after = pod.start(idle().named("after", round))?;
        let with_other = pod.start(with(&other, idle().named("other", round))?)?;
        for one in [&before, &after, &with_other] {
            is_kept_from_the_disk(one)?;
        }
        for one in [container, after, with_other] {
            one.stop(0)?;
            one.remove()?;
        }
        is_free(&bound)?;
        let left = before.exec("ls /sys/block; true")?;
        ensure!(!left.contains("nvme"), "round {round}: the guest still has {left}");
    }
    pod.end()?;
    drop(bound);
    copy_is_on_the_disk(&function, &data)?;
    bed.nothing_left()
}

/// Those that a pod asks for are there before its containers are, and all of those have them.
pub(crate) fn cri_containers_have_the_nodes_of_their_pods_functions(bed: &Bed) -> Result<()> {
    let (function, data) = nvme(2)?;
    let configuration = listed(&[&function])?;
    let pod = Pod::with(Runtime::Vial, |config| {
        config.annotations.insert("io.vial/pci-devices".into(), function.clone());
    })?;
    let first = pod.start(idle())?;
    has_copied(&pod.prints(sh(&copies()))?, &data)?;
    has_all_nodes(&first)?;
    pod.end()?;
    drop(configuration);
    copy_is_on_the_disk(&function, &data)?;
    bed.nothing_left()
}

/// Who may use the host's device of the function, may use its nodes.
pub(crate) fn nodes_of_a_function_are_the_users_who_may_have_it(bed: &Bed) -> Result<()> {
    let (function, data) = nvme(3)?;
    let user = USER.to_string();
    let script = format!("stat -c '%u %a' /dev/nvme0n1; {}", copies());
    let bound = Bound::new(function.clone())?;
    for node in bound.nodes() {
        let options = ["--device", node.as_str(), "--user", user.as_str()];
        let refused = bed.run(Runtime::Vial, &options, &["cat", "/dev/nvme0n1"])?;
        ensure!(refused.stderr.contains("Permission denied"), "{node} is root's: {refused:?}");
        let owner = fs::metadata(&node)?.uid();
        chown(&node, Some(USER), None)?;
        let told = bed.run(Runtime::Vial, &options, &["sh", "-c", &script])?;
        chown(&node, Some(owner), None)?;
        let told = told.expect(0)?.stdout;
        let rest = told.strip_prefix(&format!("{USER} 600\n"));
        has_copied(rest.with_context(|| format!("{node}: {told}"))?, &data)?;
    }
    drop(bound);
    copy_is_on_the_disk(&function, &data)?;
    // By annotation, it is root's.
    let _configuration = listed(&[&function])?;
    let annotation = annotation(&[&function]);
    let options = ["--annotation", annotation.as_str()];
    let told = bed.run(Runtime::Vial, &options, &["sh", "-c", &script])?.expect(0)?.stdout;
    let rest = told.strip_prefix("0 600\n");
    has_copied(rest.with_context(|| told.clone())?, &data)?;
    reaches_driver(&function, Some("nvme"))
}
