//! What `--devices` gives the emulated host: an IOMMU, two NUMA nodes, and behind a bridge on the second node a
//! network card with SR-IOV and an NVMe disk. QEMU 8 or newer.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};

/// Words for the host kernel's command line: the IOMMU translates for all devices.
pub(crate) const APPEND: &str = "intel_iommu=on iommu=nopt";
/// The most memory that such a host can have, in MiB. With more, the firmware puts the window for virtual functions
/// above 4 GiB, and QEMU 10.0 loses the upper half of their addresses: their registers then answer nowhere.
pub(crate) const MEMORY_MIB_MAX: u32 = 2048;
/// The disk's size.
const DISK_BYTES: u64 = 64 << 20;

/// QEMU's arguments for a host of `cpus` CPUs and `memory_mib` MiB; the disk is a file in `directory`. With one CPU
/// the second node has memory only.
pub(crate) fn arguments(cpus: u8, memory_mib: u32, directory: &Path) -> Result<Vec<OsString>> {
    let disk = directory.join("nvme.img");
    File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .with_context(|| format!("cannot make the disk {}", disk.display()))?;
    let (near, far) = (cpus.div_ceil(2), memory_mib / 2);
    let far_cpus = match cpus - near {
        0 => String::new(),
        _ => format!(",cpus={near}-{}", cpus - 1),
    };
    let mut drive = OsString::from("if=none,id=nvme,format=raw,cache=unsafe,file=");
    drive.push(super::emulator::in_option(&disk));
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| all.extend([option.into(), value]);
    add("-device", "intel-iommu,intremap=on,caching-mode=on".into());
    add("-object", format!("memory-backend-ram,id=near,size={}M", memory_mib - far).into());
    add("-object", format!("memory-backend-ram,id=far,size={far}M").into());
    add("-numa", format!("node,nodeid=0,cpus=0-{},memdev=near", near - 1).into());
    add("-numa", format!("node,nodeid=1{far_cpus},memdev=far").into());
    add("-device", "pxb-pcie,id=far-bus,bus_nr=32,numa_node=1,bus=pcie.0".into());
    for port in 1..=2 {
        let value = format!("pcie-root-port,id=port{port},bus=far-bus,chassis={port},slot={port}");
        add("-device", value.into());
    }
    add("-netdev", "user,id=card,restrict=on".into());
    add("-device", "igb,bus=port1,netdev=card".into());
    add("-drive", drive);
    add("-device", "nvme,serial=vial-nvme,drive=nvme,bus=port2".into());
    Ok(all)
}
