//! By which way functions of the host are passed: by iommufd where the host has that and devices of functions, and by
//! IOMMU groups elsewhere. The descriptors of VMMs tell, so that no case takes the one for the other.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vial_tests::node::{self, Configuration};

use super::bed::{Bed, Runtime, run};
use super::devices::{
    Bound, FUNCTIONS, annotation, checks_out, detached, echo, listed, reaches_driver, refused,
    script, virtual_function,
};
use super::faults::{process, processes};
use super::hot_plug::{is_free, with};
use crate::cri::pod::{Pod, idle};

const IOMMUFD: &str = "/dev/iommu";
const CONTAINER: &str = "/dev/vfio/vfio";

/// The device that a function bound to vfio-pci has for itself.
pub(super) fn own_node(function: &str) -> Option<String> {
    let mut entries = fs::read_dir(Path::new(FUNCTIONS).join(function).join("vfio-dev")).ok()?;
    let entry = entries.next()?.ok()?;
    let node = format!("/dev/vfio/devices/{}", entry.file_name().to_str()?);
    Path::new(&node).exists().then_some(node)
}

/// That of its group.
pub(super) fn group_node(function: &str) -> Option<String> {
    let target = fs::read_link(Path::new(FUNCTIONS).join(function).join("iommu_group")).ok()?;
    let node = format!("/dev/vfio/{}", target.file_name()?.to_str()?);
    Path::new(&node).exists().then_some(node)
}

/// What device plugins name beside functions or groups.
pub(super) fn beside() -> Vec<String> {
    let named = [CONTAINER, IOMMUFD].into_iter().filter(|path| Path::new(path).exists());
    named.map(str::to_owned).collect()
}

/// The character devices that a process has open, by their numbers.
fn open_devices(pid: i32) -> Result<Vec<u64>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let found = entries.filter_map(|entry| fs::metadata(entry.path()).ok());
    Ok(found.filter(|it| it.file_type().is_char_device()).map(|it| it.rdev()).collect())
}

fn number(path: &str) -> Result<u64> {
    Ok(fs::metadata(path).with_context(|| path.to_owned())?.rdev())
}

/// Whether this host passes functions by iommufd, as configured by default.
fn has_iommufd(function: &str) -> bool {
    Path::new(IOMMUFD).exists() && own_node(function).is_some()
}

/// The VMM has the function by the one way, and nothing of the other.
fn is_by(vmm: i32, function: &str, iommufd: bool) -> Result<()> {
    let open = open_devices(vmm)?;
    let own = own_node(function).map(PathBuf::from);
    for (path, due) in [
        (Some(IOMMUFD.into()), iommufd),
        (own, iommufd),
        (Some(CONTAINER.into()), !iommufd),
        (group_node(function).map(PathBuf::from), !iommufd),
    ] {
        let path = path.filter(|path| path.exists());
        let number = path.as_ref().map(|path| number(&path.to_string_lossy())).transpose()?;
        let has = number.is_some_and(|number| open.contains(&number));
        ensure!(has == due, "the VMM has {path:?}: {has}, by iommufd: {iommufd}");
    }
    Ok(())
}

/// The only VMM that runs has the function by the way that this host has.
pub(super) fn is_by_the_hosts_way(function: &str) -> Result<()> {
    is_by(process("vial-vmm", "--api-fd")?, function, has_iommufd(function))
}

/// No VMM has a descriptor of the function's.
pub(super) fn nobody_has(function: &str) -> Result<()> {
    for path in [own_node(function), group_node(function)].into_iter().flatten() {
        let number = number(&path)?;
        for vmm in processes("vial-vmm", "--api-fd")? {
            ensure!(!open_devices(vmm)?.contains(&number), "the VMM {vmm} has {path}");
        }
    }
    Ok(())
}

/// The MiB of memory that a VMM has locked, as its limit counts them.
fn locked_mib(vmm: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{vmm}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let word = line.and_then(|line| line.split_whitespace().next()).context("there is no VmLck")?;
    Ok(word.parse::<u64>()? >> 10)
}

/// What `vial check` and `vial devices` say of the way.
fn is_told(words: &str) -> Result<()> {
    let check = run(Command::new("vial").arg("check"))?.expect(0)?.stdout;
    let line = check.lines().find(|line| line.contains("PCI functions")).unwrap_or_default();
    ensure!(line.contains(words), "{words:?} was due in {line:?}");
    let table = run(Command::new("vial").arg("devices"))?.expect(0)?.stdout;
    let line = table.lines().last().unwrap_or_default();
    ensure!(line.contains(words), "{words:?} was due in {line:?}");
    Ok(())
}

pub(crate) fn function_goes_by_the_way_that_the_host_has_or_the_operator_says(
    bed: &Bed,
) -> Result<()> {
    let function = virtual_function(1)?;
    let by = |container_is_by_iommufd: bool| -> Result<()> {
        let option = annotation(&[&function]);
        let options = ["--annotation", &option, "--net-host", "--cap-add", "CAP_NET_ADMIN"];
        let container = detached(bed, &options)?;
        let server = echo()?;
        is_by(process("vial-vmm", "--api-fd")?, &function, container_is_by_iommufd)?;
        let outcome = container.exec(&[], &["sh", "-c", &script()])?.expect(0)?;
        ensure!(server.is_finished(), "the host was not reached: {outcome:?}");
        checks_out(&outcome.stdout)?;
        drop(container);
        bed.clear();
        reaches_driver(&function, Some("igbvf"))
    };
    let configuration = listed(&[&function])?;
    // Whether it has a device is seen once it is bound.
    let iommufd = {
        let bound = Bound::new(function.clone())?;
        has_iommufd(&bound.function)
    };
    reaches_driver(&function, Some("igbvf"))?;
    println!("    | by {}", if iommufd { "iommufd" } else { "IOMMU groups" });
    is_told(if iommufd { "are passed by iommufd" } else { "are passed by IOMMU groups" })?;
    by(iommufd).context("by default")?;
    let text = fs::read_to_string(node::path())?;
    let forced = Configuration::keep();
    forced.write(&format!("{text}\niommufd = false\n"))?;
    if Path::new(CONTAINER).exists() {
        is_told("are passed by IOMMU groups")?;
        by(false).context("by groups")?;
    } else {
        is_told("iommufd = true")?;
        let option = annotation(&[&function]);
        refused(bed, &["--annotation", &option], &[CONTAINER, "iommufd = true"])?;
    }
    drop((forced, configuration));
    Ok(())
}

/// One goes and comes again while the other is there, whether they share an address space or not.
pub(crate) fn cri_functions_of_two_containers_come_and_go_by_themselves(bed: &Bed) -> Result<()> {
    let bound = [Bound::new(virtual_function(0)?)?, Bound::new(virtual_function(1)?)?];
    let iommufd = has_iommufd(&bound[0].function);
    let pod = Pod::new(Runtime::Vial)?;
    let vmm = process("vial-vmm", "--api-fd")?;
    ensure!(locked_mib(vmm)? == 0, "memory is locked before there is a function");
    let first = pod.start(with(&bound[0], idle())?)?;
    let once = locked_mib(vmm)?;
    ensure!(once >= 64, "{once} MiB are locked for a function");
    for round in 0..2 {
        let second = pod.start(with(&bound[1], idle().named("second", round))?)?;
        for bound in &bound {
            is_by(vmm, &bound.function, iommufd)?;
        }
        // An address space of each set's own pins and counts the memory for itself.
        let due = if iommufd { once } else { 2 * once };
        let locked = locked_mib(vmm)?;
        ensure!(locked == due, "{locked} MiB are locked for two, {once} MiB for one");
        second.stop(0)?;
        second.remove()?;
        nobody_has(&bound[1].function)?;
        is_free(&bound[1])?;
        ensure!(locked_mib(vmm)? == once, "round {round}: what is locked is not {once} MiB again");
        let server = echo()?;
        let told = first.exec(&script())?;
        ensure!(server.is_finished(), "the host was not reached in round {round}: {told:?}");
        checks_out(&told).with_context(|| format!("round {round}"))?;
    }
    first.stop(0)?;
    first.remove()?;
    ensure!(locked_mib(vmm)? == 0, "memory stays locked without a function");
    is_free(&bound[0])?;
    pod.end()?;
    bed.nothing_left()
}
