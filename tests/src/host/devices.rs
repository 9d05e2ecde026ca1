//! What `--devices` gives the emulated host: an IOMMU, several NUMA nodes, and behind bridges on some of them a network
//! card with SR-IOV and NVMe disks. QEMU 8 or newer.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;

/// Words for the host kernel's command line: the IOMMU translates for all devices.
pub(crate) const APPEND: &str = "intel_iommu=on iommu=nopt";
/// The most memory that such a host can have, in MiB. With more, the firmware puts the window for virtual functions
/// above 4 GiB, and QEMU 10.0 loses the upper half of their addresses: their registers then answer nowhere.
pub(crate) const MEMORY_MIB_MAX: u32 = 2048;
/// The size of a disk.
const DISK_BYTES: u64 = 64 << 20;

/// Where the devices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// Two nodes; on the second the card, and a disk with one namespace.
    TwoNodes,
    /// Three nodes; on the third a card without SR-IOV and behind it the one with, on the second, with higher bus numbers,
    /// a disk with two namespaces.
    ThreeNodes,
}

impl Layout {
    fn nodes(self) -> u32 {
        match self {
            Self::TwoNodes => 2,
            Self::ThreeNodes => 3,
        }
    }

    /// QEMU's arguments for bridges, cards and disks; `drives` are the disks' files.
    fn devices(self, add: &mut impl FnMut(&str, OsString), drives: [OsString; 2]) {
        let [first, second] = drives;
        match self {
            Self::TwoNodes => {
                add("-device", bus("far-bus", 32, 1));
                (1..=2).for_each(|port| add("-device", root_port(port, "far-bus")));
                add("-netdev", "user,id=card,restrict=on".into());
                add("-device", "igb,bus=port1,netdev=card".into());
                add("-drive", first);
                add("-device", "nvme,serial=vial-nvme,drive=nvme1,bus=port2".into());
            }
            Self::ThreeNodes => {
                add("-device", bus("third-bus", 64, 2));
                (1..=2).for_each(|port| add("-device", root_port(port, "third-bus")));
                add("-device", bus("second-bus", 96, 1));
                add("-device", root_port(3, "second-bus"));
                add("-netdev", "user,id=plain,restrict=on".into());
                add("-device", "e1000e,bus=port1,netdev=plain".into());
                add("-netdev", "user,id=card,restrict=on".into());
                add("-device", "igb,bus=port2,netdev=card".into());
                add("-drive", first);
                add("-drive", second);
                add("-device", "nvme,id=disks,serial=other-nvme,bus=port3".into());
                add("-device", "nvme-ns,drive=nvme1,bus=disks,nsid=1".into());
                add("-device", "nvme-ns,drive=nvme2,bus=disks,nsid=2".into());
            }
        }
    }
}

fn bus(id: &str, number: u8, node: u32) -> OsString {
    format!("pxb-pcie,id={id},bus_nr={number},numa_node={node},bus=pcie.0").into()
}

fn root_port(port: u8, bus: &str) -> OsString {
    format!("pcie-root-port,id=port{port},bus={bus},chassis={port},slot={port}").into()
}

/// QEMU's arguments for a host of `cpus` CPUs and `memory_mib` MiB; the disks are files in `directory`. With fewer CPUs
/// than nodes the last nodes have memory only.
pub(crate) fn arguments(
    layout: Layout,
    cpus: u8,
    memory_mib: u32,
    directory: &Path,
) -> Result<Vec<OsString>> {
    let mut drives = [OsString::new(), OsString::new()];
    for (number, drive) in (1..).zip(&mut drives) {
        let disk = directory.join(format!("nvme{number}.img"));
        File::create(&disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .with_context(|| format!("cannot make the disk {}", disk.display()))?;
        *drive = format!("if=none,id=nvme{number},format=raw,cache=unsafe,file=").into();
        drive.push(super::emulator::in_option(&disk));
    }
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| all.extend([option.into(), value]);
    add("-device", "intel-iommu,intremap=on,caching-mode=on".into());
    let nodes = layout.nodes();
    let far = memory_mib / (nodes + 1);
    for node in 0..nodes {
        let mib = match (node, nodes) {
            (_, 2) => memory_mib / 2,
            (0, _) => memory_mib - far * (nodes - 1),
            _ => far,
        };
        add("-object", format!("memory-backend-ram,id=memory{node},size={mib}M").into());
        let first_of = |node: u32| (node * u32::from(cpus)).div_ceil(nodes);
        let own = match first_of(node)..first_of(node + 1) {
            none if none.is_empty() => String::new(),
            some => format!(",cpus={}-{}", some.start, some.end - 1),
        };
        add("-numa", format!("node,nodeid={node}{own},memdev=memory{node}").into());
    }
    layout.devices(&mut add, drives);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(layout: Layout, cpus: u8) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let all = arguments(layout, cpus, 2048, directory.path()).unwrap();
        let all = all.iter().map(|one| one.to_string_lossy().into_owned());
        all.filter(|one| one.starts_with("node,") || one.starts_with("memory-")).collect()
    }

    #[test]
    fn every_cpu_and_all_memory_is_of_one_node() {
        assert_eq!(
            nodes(Layout::TwoNodes, 3),
            [
                "memory-backend-ram,id=memory0,size=1024M",
                "node,nodeid=0,cpus=0-1,memdev=memory0",
                "memory-backend-ram,id=memory1,size=1024M",
                "node,nodeid=1,cpus=2-2,memdev=memory1",
            ]
        );
        assert_eq!(
            nodes(Layout::ThreeNodes, 1),
            [
                "memory-backend-ram,id=memory0,size=1024M",
                "node,nodeid=0,cpus=0-0,memdev=memory0",
                "memory-backend-ram,id=memory1,size=512M",
                "node,nodeid=1,memdev=memory1",
                "memory-backend-ram,id=memory2,size=512M",
                "node,nodeid=2,memdev=memory2",
            ]
        );
    }
}
