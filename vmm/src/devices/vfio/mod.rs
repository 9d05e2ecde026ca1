//! PCI functions of the host on the guest's bus, by VFIO (Linux Documentation/driver-api/vfio.rst).
//!
//! Whoever configures the VM opens container and groups and joins them, or opens iommufd and binds
//! the functions to it, and hands over these descriptors and those of the functions; this lets the
//! functions reach the guest's memory and puts them on the bus. When the process ends, however it
//! does, the kernel takes the memory away from the functions and resets them, since nobody else
//! holds the functions' descriptors.
//!
//! - [`requests`]: the requests to the kernel.
//! - [`iommufd`]: those to iommufd.
//! - [`reach`]: which memory functions reach, by the one or the other.
//! - [`registers`]: what the guest sees of configuration space.
//! - [`regions`]: what of a BAR the guest reaches directly.
//! - [`function`]: all of it as a function on the bus.

pub mod function;
pub mod iommufd;
pub mod reach;
pub mod regions;
pub mod registers;
pub mod requests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use function::{PassedFunction, PassedFunctionError, ServedBar, Window, trapped_bytes};
use regions::{Area, HostRegion};
use registers::{Bar, Found, HEADER_BYTES};
use requests::{HostFunction, HostFunctionError, Interrupts};

use crate::arch::layout::{PCI_MMIO_SIZE, PCI_MMIO_START};
use crate::kvm::{KvmError, Vm};
use crate::pci::PciBus;
use crate::pci::bus::BusError;
use crate::pci::config::{ConfigError, ConfigSpace};
use crate::pci::line::MsiError;
use crate::pci::msi::{MsiSetupError, MsiVectors};
use crate::pci::msix::MsixTable;

/// Why functions of the host cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The function itself.
    #[error(transparent)]
    Host(#[from] HostFunctionError),
    /// A part of its memory.
    #[error("map BAR {bar} of the function: {error}")]
    Map {
        /// Which part.
        bar: u8,
        /// What the host said.
        error: io::Error,
    },
    /// A BAR finds no place.
    #[error("place BAR {bar} of {bytes} bytes: {error}; pass fewer functions")]
    Place {
        /// Which one.
        bar: u8,
        /// Its size.
        bytes: u64,
        /// What there is no more of.
        error: BusError,
    },
    /// A BAR is none.
    #[error("show BAR {bar}: {error}")]
    Bar {
        /// Which one.
        bar: u8,
        /// What is wrong.
        error: ConfigError,
    },
    /// Its interrupts.
    #[error(transparent)]
    Msix(#[from] MsiError),
    /// Its interrupts, where it has no MSI-X.
    #[error(transparent)]
    Msi(#[from] MsiSetupError),
    /// Its registers.
    #[error(transparent)]
    Function(#[from] PassedFunctionError),
    /// KVM and the groups or functions.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The address space.
    #[error(
        "put the guest's memory into an address space of iommufd: {0}; install shim and VMM of one \
         release"
    )]
    AddressSpace(io::Error),
    /// The IOMMU needs addresses that the guest's memory has.
    #[error(
        "let the functions reach the guest's memory: {0}; the platform keeps addresses for itself \
         that the memory is at: compare /sys/kernel/iommu_groups/*/reserved_regions, and pass \
         other functions"
    )]
    Reserved(io::Error),
    /// The guest's memory.
    #[error(
        "let the functions reach the guest's {mib} MiB of memory: {error}; all of it is locked, \
         so the node needs as much free, and the VMM a limit of locked memory above it"
    )]
    Memory {
        /// How much there is.
        mib: u64,
        /// What the host said.
        error: io::Error,
    },
}

/// Where a function's BARs are at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// Where the bus has room, for a guest that has not looked yet.
    ByTheBus,
    /// Nowhere: a guest that runs has places of its own for what it finds.
    ByTheGuest,
}

/// Makes a function of the host's; adding it to the bus is the caller's.
///
/// # Errors
/// [`VfioError`].
pub fn function(
    host: HostFunction,
    vm: &Arc<Vm>,
    bus: &PciBus,
    high_window: Range<u64>,
    placed: Placed,
) -> Result<PassedFunction, VfioError> {
    let mut header = [0; HEADER_BYTES];
    host.read_config(0, &mut header)
        .map_err(|error| HostFunctionError::Refused { action: "show its registers", error })?;
    let mut found = registers::find(&header);
    // What the host cannot deliver is not shown.
    found.msix = found.msix.filter(|msix| host.vectors(Interrupts::Msix) >= msix.vectors.into());
    found.msi = found.msi.filter(|msi| host.vectors(Interrupts::Msi) >= msi.vectors.into());
    let mut config = ConfigSpace::new(registers::identity(&header));
    let on_bus = (placed == Placed::ByTheBus).then_some(bus);
    let bars = serve_bars(&host, &found, &mut config, vm, on_bus)?;
    if placed == Placed::ByTheGuest {
        config.undecode();
    }
    let table = found.msix.map(|msix| MsixTable::new(msix.vectors, vm.clone())).transpose()?;
    let msi = found.msi.map(|msi| MsiVectors::new(msi.vectors, vm.clone())).transpose()?;
    let windows = [PCI_MMIO_START..PCI_MMIO_START + PCI_MMIO_SIZE, high_window];
    let host = Box::new(host);
    Ok(PassedFunction::new(host, windows, config, bars, &found, table, msi)?)
}

fn serve_bars(
    host: &HostFunction,
    found: &Found,
    config: &mut ConfigSpace,
    vm: &Arc<Vm>,
    bus: Option<&PciBus>,
) -> Result<[Option<ServedBar>; 6], VfioError> {
    let mut bars = [const { None }; 6];
    for bar in &found.bars {
        let number = bar.number;
        let region = host
            .region(number.into())
            .map_err(|error| HostFunctionError::Refused { action: "tell of its memory", error })?;
        if region.size == 0 {
            continue;
        }
        show_bar(config, bus, *bar, region.size)?;
        let windows = regions::direct(region.size, &region.areas, &trapped(found, number))
            .into_iter()
            .map(|area| {
                let memory = host
                    .map(region.offset, area)
                    .map_err(|error| VfioError::Map { bar: number, error })?;
                Ok((area.start, Window::new(vm.add_window(memory), vm.clone())))
            })
            .collect::<Result<_, VfioError>>()?;
        let HostRegion { offset: host_offset, .. } = region;
        bars[usize::from(number)] = Some(ServedBar { host_offset, windows });
    }
    Ok(bars)
}

fn show_bar(
    config: &mut ConfigSpace,
    bus: Option<&PciBus>,
    bar: Bar,
    size: u64,
) -> Result<(), VfioError> {
    let number = bar.number;
    let place = |error| VfioError::Place { bar: number, bytes: size, error };
    let shown = if bar.wide {
        let at = bus.map_or(Ok(0), |bus| bus.allocate_wide_bar(size)).map_err(place)?;
        config.add_wide_bar(number, size, at, bar.prefetchable)
    } else {
        let at = bus.map_or(Ok(0), |bus| bus.allocate_bar(size)).map_err(place)?;
        config.add_bar(number, size, at)
    };
    shown.map_err(|error| VfioError::Bar { bar: number, error })
}

/// What of a BAR is looked at on its way.
fn trapped(found: &Found, bar: u8) -> Vec<Area> {
    let Some(msix) = found.msix else { return Vec::new() };
    let bytes = trapped_bytes(msix.vectors.into());
    [msix.table, msix.pending]
        .into_iter()
        .zip(bytes)
        .filter(|((at, _), _)| *at == bar)
        .map(|((_, start), bytes)| Area { start, end: start + bytes })
        .collect()
}
