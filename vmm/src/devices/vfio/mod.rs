//! PCI functions of the host on the guest's bus, by VFIO (Linux Documentation/driver-api/vfio.rst).
//!
//! Whoever configures the VM opens the container and the groups, joins them, and hands over their
//! descriptors and those of the functions; this lets the functions reach the guest's memory and
//! puts them on the bus. When the process ends, however it does, the kernel takes the memory away
//! from the functions and resets them, since nobody else holds those descriptors.
//!
//! - [`requests`]: the requests to the kernel.
//! - [`registers`]: what the guest sees of configuration space.
//! - [`regions`]: what of a BAR the guest reaches directly.
//! - [`function`]: all of it as a function on the bus.

pub mod function;
pub mod regions;
pub mod registers;
pub mod requests;

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use function::{PassedFunction, PassedFunctionError, ServedBar, Window, trapped_bytes};
use regions::{Area, HostRegion};
use registers::{Bar, Found, HEADER_BYTES};
use requests::{Container, HostFunction, HostFunctionError, Interrupts};

use crate::arch::layout::{PCI_MMIO_SIZE, PCI_MMIO_START};
use crate::kvm::{KvmError, Vm};
use crate::memory::GuestRam;
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
    /// KVM and the groups.
    #[error(transparent)]
    Kvm(#[from] KvmError),
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

/// What keeps functions joined to a VM. Dropping it takes the guest's memory away from them.
pub struct Joined {
    vm: Arc<Vm>,
    ram: GuestRam,
    container: Container,
    groups: Vec<OwnedFd>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        // Closing the descriptors would do both, unless somebody else had them, too.
        if let Err(error) = self.container.unmap(&self.ram) {
            tracing::warn!(%error, "guest memory of passed functions is not unmapped before");
        }
        if let Err(error) = self.vm.leave_groups(&self.groups) {
            tracing::warn!(%error, "the groups of passed functions stay with KVM");
        }
    }
}

/// Tells KVM of the groups, and lets their functions reach the guest's memory.
///
/// # Errors
/// [`VfioError`].
pub fn join(
    container: OwnedFd,
    groups: Vec<OwnedFd>,
    vm: &Arc<Vm>,
    ram: &GuestRam,
) -> Result<Joined, VfioError> {
    use vm_memory::{GuestMemory, GuestMemoryRegion};
    let container = Container::new(container);
    let mapped = vm.join_groups(&groups).map_err(VfioError::from).and_then(|()| {
        container.map(ram).map_err(|error| {
            let bytes: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
            VfioError::Memory { mib: bytes >> 20, error }
        })
    });
    if let Err(error) = mapped {
        // What is mapped goes with the container.
        let _ = vm.leave_groups(&groups);
        return Err(error);
    }
    Ok(Joined { vm: vm.clone(), ram: ram.clone(), container, groups })
}

/// Where a function's BARs are at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// Where the bus has room, for a guest that has not looked yet.
    ByTheBus,
    /// Nowhere: a guest that runs has places of its own for what it finds.
    ByTheGuest,
}

/// Makes a function of its descriptor; adding it to the bus is the caller's.
///
/// # Errors
/// [`VfioError`].
pub fn function(
    descriptor: OwnedFd,
    vm: &Arc<Vm>,
    bus: &PciBus,
    high_window: Range<u64>,
    placed: Placed,
) -> Result<PassedFunction, VfioError> {
    let host = HostFunction::new(descriptor)?;
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
