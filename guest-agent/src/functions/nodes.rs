//! The device nodes that the guest's drivers make for PCI functions of the host, for the containers that asked
//! for those functions.
//!
//! A device is a function's when sysfs has it below the function, whatever made it: a disk, its partitions,
//! its controller. What a driver makes beside its functions, for all of them together, is nobody's.
//! Only [`read`] and what calls it look at files; what is made of them is pure.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxResources,
    Spec,
};
use vial_agent_protocol::agent::GivenFunction;
use vial_agent_protocol::is_plain_path;

use super::{FunctionError, MAX_NODES, addresses};

const SYS: &str = "/sys";
const DEV: &str = "/dev";
/// Functions, below sysfs.
const FUNCTIONS: &str = "bus/pci/devices";
/// How long a driver may take to make the node that a function of its class has: some do so behind their probing.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks, of which the second has to find what the first has found.
const PAUSE: Duration = Duration::from_millis(10);
/// Base classes of functions whose drivers make nodes: mass storage, displays, and accelerators (PCI Code and ID
/// Assignment Specification, 1.1).
const CLASS_STORAGE: u32 = 0x01;
const CLASS_DISPLAY: u32 = 0x03;
const CLASS_ACCELERATOR: u32 = 0x12;

/// A device of a function's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: LinuxDeviceType,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// Where it is, in the guest and in the container.
    pub(crate) path: PathBuf,
    /// As devtmpfs has them.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The device of the spec by which the container asked for the function, if it did by one.
    pub(crate) asked_by: Option<PathBuf>,
}

/// A device as sysfs lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    kind: LinuxDeviceType,
    major: u32,
    minor: u32,
    /// The device itself, below sysfs.
    at: PathBuf,
}

/// A function that the container gets the nodes of.
#[derive(Debug)]
struct Function {
    address: String,
    asked_by: Option<PathBuf>,
}

/// The nodes of a container's functions, once their drivers have made them.
///
/// # Errors
/// [`FunctionError`].
pub(crate) async fn of(given: &[GivenFunction]) -> Result<Vec<Node>, FunctionError> {
    of_tree(Path::new(SYS), Path::new(DEV), &functions(given)?, PATIENCE).await
}

fn functions(given: &[GivenFunction]) -> Result<Vec<Function>, FunctionError> {
    if given.is_empty() {
        return Ok(Vec::new());
    }
    let devices: Vec<u32> = given.iter().map(|one| one.device).collect();
    let asked_by = |path: &str| match path {
        "" => Ok(None),
        path if is_plain_path(path) => Ok(Some(path.into())),
        path => Err(FunctionError::Path(path.chars().take(64).collect())),
    };
    addresses(&devices)?
        .into_iter()
        .zip(given)
        .map(|(address, one)| Ok(Function { address, asked_by: asked_by(&one.asked_by)? }))
        .collect()
}

async fn of_tree(
    sys: &Path,
    dev: &Path,
    functions: &[Function],
    patience: Duration,
) -> Result<Vec<Node>, FunctionError> {
    if functions.is_empty() {
        return Ok(Vec::new());
    }
    let start = Instant::now();
    let mut before = None;
    loop {
        let nodes = read(sys, dev, functions)?;
        let lacking = lacking(sys, functions, &nodes);
        let makes_none = !functions.iter().any(|one| expected(sys, one).is_some());
        let is_whole = lacking.is_none() && (makes_none || before.as_ref() == Some(&nodes));
        if !is_whole && start.elapsed() < patience {
            before = Some(nodes);
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        if let Some((address, kind)) = lacking {
            tracing::warn!("the guest's driver has made no {kind} device of {address}");
        }
        return Ok(nodes.into_iter().map(|(_, node)| node).collect());
    }
}

/// The function that has a driver, and not yet the kind of node that such functions have.
fn lacking(
    sys: &Path,
    functions: &[Function],
    nodes: &[(usize, Node)],
) -> Option<(String, &'static str)> {
    functions.iter().enumerate().find_map(|(number, function)| {
        let (kind, name) = expected(sys, function)?;
        let has = nodes.iter().any(|(of, node)| *of == number && node.kind == kind);
        (!has).then(|| (function.address.clone(), name))
    })
}

/// The kind of node that a function's class makes its driver have.
fn expected(sys: &Path, function: &Function) -> Option<(LinuxDeviceType, &'static str)> {
    let at = sys.join(FUNCTIONS).join(&function.address);
    // Without a driver, or with one that has given up, nothing comes.
    if !at.join("driver").exists() {
        return None;
    }
    let class = fs::read_to_string(at.join("class")).ok()?;
    let class = u32::from_str_radix(class.trim().strip_prefix("0x")?, 16).ok()?;
    match class >> 16 {
        CLASS_STORAGE => Some((LinuxDeviceType::B, "block")),
        CLASS_DISPLAY | CLASS_ACCELERATOR => Some((LinuxDeviceType::C, "character")),
        _ => None,
    }
}

/// The nodes of functions that are there now, each with the number of its function, by their paths.
fn read(
    sys: &Path,
    dev: &Path,
    functions: &[Function],
) -> Result<Vec<(usize, Node)>, FunctionError> {
    let listed = list(sys)?;
    let mut found = Vec::new();
    for (number, function) in functions.iter().enumerate() {
        let link = Path::new(FUNCTIONS).join(&function.address);
        // One that the kernel has not, has no nodes.
        let target = fs::read_link(sys.join(&link)).ok();
        let Some(at) = target.and_then(|target| resolve(&link, &target)) else { continue };
        for device in beneath(&listed, &at) {
            // One whose node is not made yet, or that has just gone, is found by the next look.
            let Some(node) = node(sys, dev, device, function) else { continue };
            if found.len() == MAX_NODES {
                return Err(FunctionError::TooManyNodes(function.address.clone()));
            }
            found.push((number, node));
        }
    }
    found.sort_by(|(_, one), (_, other)| one.path.cmp(&other.path));
    Ok(found)
}

/// All devices that have numbers.
fn list(sys: &Path) -> Result<Vec<Listed>, FunctionError> {
    let mut listed = Vec::new();
    for (kind, name) in [(LinuxDeviceType::B, "block"), (LinuxDeviceType::C, "char")] {
        let directory = Path::new("dev").join(name);
        let path = sys.join(&directory);
        let failed = |source: io::Error| FunctionError::List { path: path.clone(), source };
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let link = directory.join(&name);
            let numbers = name.to_str().and_then(numbers);
            // It may go meanwhile.
            let target = fs::read_link(entry.path()).ok();
            let at = target.and_then(|target| resolve(&link, &target));
            if let (Some((major, minor)), Some(at)) = (numbers, at) {
                listed.push(Listed { kind, major, minor, at });
            }
        }
    }
    Ok(listed)
}

fn numbers(name: &str) -> Option<(u32, u32)> {
    let (major, minor) = name.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Where a link of sysfs leads, both from its root on. No directory of sysfs is a link itself.
fn resolve(link: &Path, target: &Path) -> Option<PathBuf> {
    let mut at = link.parent()?.to_owned();
    for part in target.components() {
        match part {
            Component::Normal(name) => at.push(name),
            Component::ParentDir if at.pop() => {}
            Component::CurDir => {}
            // Out of sysfs.
            _ => return None,
        }
    }
    Some(at)
}

/// The devices that are a function's.
fn beneath<'a>(listed: &'a [Listed], function: &'a Path) -> impl Iterator<Item = &'a Listed> {
    listed.iter().filter(move |device| device.at.starts_with(function) && device.at != function)
}

/// What devtmpfs has of a device.
fn node(sys: &Path, dev: &Path, device: &Listed, function: &Function) -> Option<Node> {
    let about = fs::read_to_string(sys.join(&device.at).join("uevent")).ok()?;
    let path = dev.join(name(&about)?);
    let metadata = fs::symlink_metadata(&path).ok()?;
    let is_kind = match device.kind {
        LinuxDeviceType::B => metadata.file_type().is_block_device(),
        _ => metadata.file_type().is_char_device(),
    };
    // A privileged container may have put something else there.
    if !is_kind || metadata.rdev() != rustix::fs::makedev(device.major, device.minor) {
        return None;
    }
    Some(Node {
        kind: device.kind,
        major: device.major,
        minor: device.minor,
        path,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        asked_by: function.asked_by.clone(),
    })
}

/// Where devtmpfs has a device, by its uevent (Linux drivers/base/core.c, `dev_uevent`).
fn name(uevent: &str) -> Option<&str> {
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    is_plain_path(&format!("{DEV}/{name}")).then_some(name)
}

/// The devices of a spec, before they are rewritten, by which the nodes were asked for: those say who may use them.
pub(crate) fn asked_by(spec: &Spec, nodes: &[Node]) -> Vec<LinuxDevice> {
    let devices = spec.linux().iter().filter_map(|linux| linux.devices().as_ref()).flatten();
    let is_one = |device: &&LinuxDevice| {
        nodes.iter().any(|node| node.asked_by.as_ref() == Some(device.path()))
    };
    devices.filter(is_one).cloned().collect()
}

/// Adds nodes to a spec that is the guest's already, for whoever could use the device of the host that the
/// container asked by. Returns those whose places the spec has for something else.
pub(crate) fn add_to(spec: &mut Spec, nodes: &[Node], asked_by: &[LinuxDevice]) -> Vec<PathBuf> {
    let mut taken = Vec::new();
    for node in nodes {
        let is_mount = spec.mounts().iter().flatten().any(|it| *it.destination() == node.path);
        let Some(linux) = spec.linux_mut() else { break };
        let devices = linux.devices_mut().get_or_insert_with(Vec::new);
        if let Some(there) = devices.iter().find(|device| *device.path() == node.path) {
            let numbers = (i64::from(node.major), i64::from(node.minor));
            // A privileged container has it already.
            if there.typ() != node.kind || (there.major(), there.minor()) != numbers {
                taken.push(node.path.clone());
            }
            continue;
        }
        if is_mount {
            taken.push(node.path.clone());
            continue;
        }
        let asked = asked_by.iter().find(|device| node.asked_by.as_ref() == Some(device.path()));
        devices.extend(device(node, asked));
        let rule = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(node.kind)
            .major(node.major)
            .minor(node.minor)
            .access("rw")
            .build();
        let resources = linux.resources_mut().get_or_insert_with(LinuxResources::default);
        resources.devices_mut().get_or_insert_with(Vec::new).extend(rule.ok());
    }
    taken
}

fn device(node: &Node, asked: Option<&LinuxDevice>) -> Option<LinuxDevice> {
    let mode = asked.and_then(LinuxDevice::file_mode).unwrap_or_default() & 0o666;
    // All that the builder asks for is given.
    LinuxDeviceBuilder::default()
        .path(&node.path)
        .typ(node.kind)
        .major(node.major)
        .minor(node.minor)
        .file_mode(node.mode | mode)
        .uid(asked.and_then(LinuxDevice::uid).unwrap_or(node.uid))
        .gid(asked.and_then(LinuxDevice::gid).unwrap_or(node.gid))
        .build()
        .ok()
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
