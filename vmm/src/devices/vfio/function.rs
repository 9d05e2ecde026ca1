//! A function of the host on the guest's bus.
//!
//! Its registers in configuration space are made here ([`super::registers`]); its memory the guest
//! reaches by memory slots of KVM, but for the pages with the MSI-X table and the pending bits.
//! An interrupt goes from VFIO to KVM by an event, without this process.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::regions::Area;
use super::registers::{self, Found, Msix};
use super::requests::Interrupts;
use crate::pci::PciFunction;
use crate::pci::config::{BarChange, ConfigError, ConfigSpace};
use crate::pci::msi::{self, MsiVectors};
use crate::pci::msix::{self, ENTRY_SIZE, MsixTable};

// In the header of the function on the host (PCI local bus specification 3.0, 6.2.2).
const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// What the function does on the host.
pub trait Host: Send {
    /// Writes configuration space.
    ///
    /// # Errors
    /// The host refuses.
    fn write_config(&self, offset: u16, data: &[u8]) -> io::Result<()>;

    /// Reads at an offset of the function's descriptor.
    ///
    /// # Errors
    /// The host refuses.
    fn read_region(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes there.
    ///
    /// # Errors
    /// The host refuses.
    fn write_region(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Lets each vector write to its event; none turns the kind off.
    ///
    /// # Errors
    /// The host refuses.
    fn set_interrupts(&self, kind: Interrupts, events: &[Arc<EventFd>]) -> io::Result<()>;

    /// Stops whatever it does, and makes it as it is when switched on.
    ///
    /// # Errors
    /// The host refuses.
    fn reset(&self) -> io::Result<()>;
}

/// A host that has been let go of.
struct Gone;

impl Host for Gone {
    fn write_config(&self, _: u16, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn read_region(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn write_region(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn set_interrupts(&self, _: Interrupts, _: &[Arc<EventFd>]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn reset(&self) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Memory slots for what the guest reaches directly.
pub trait Windows: Send + Sync {
    /// Shows window `window` at a guest address, or nowhere.
    ///
    /// # Errors
    /// KVM refuses, because something else is there as a rule.
    fn place(&self, window: u32, at: Option<u64>) -> io::Result<()>;

    /// Shows it nowhere, and forgets it.
    fn release(&self, window: u32);
}

/// A window, released when dropped.
pub struct Window {
    number: u32,
    windows: Arc<dyn Windows>,
}

impl Window {
    /// The window of that number.
    pub fn new(number: u32, windows: Arc<dyn Windows>) -> Self {
        Self { number, windows }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.windows.release(self.number);
    }
}

/// A BAR, as it is served.
pub struct ServedBar {
    /// Where it begins in the function's descriptor.
    pub host_offset: u64,
    /// Where each window begins in the BAR.
    pub windows: Vec<(u64, Window)>,
}

/// A function of the host's.
pub struct PassedFunction {
    host: Box<dyn Host>,
    /// Where in the guest's address space there are BARs and nothing else.
    places: [Range<u64>; 2],
    config: ConfigSpace,
    bars: [Option<ServedBar>; 6],
    table: Option<(Msix, MsixTable, u16)>,
    msi: Option<MsiVectors>,
    /// Where device control is on the host, and here.
    control: Option<(u16, u16)>,
    /// What VFIO was told to deliver.
    enabled: Option<Interrupts>,
    bus_master: bool,
    gone: bool,
    complaints: AtomicU32,
}

/// The most lines that one function's guest can make the log longer by.
const MAX_COMPLAINTS: u32 = 32;

impl PassedFunction {
    /// Puts a function together. `config` has its identity and its BARs; the capabilities are
    /// added here.
    ///
    /// # Errors
    /// The capabilities do not fit, or the host refuses the command register.
    pub fn new(
        host: Box<dyn Host>,
        places: [Range<u64>; 2],
        mut config: ConfigSpace,
        bars: [Option<ServedBar>; 6],
        found: &Found,
        table: Option<MsixTable>,
        mut msi: Option<MsiVectors>,
    ) -> Result<Self, PassedFunctionError> {
        let table = match (found.msix, table) {
            (Some(place), Some(table)) => {
                let body = table.capability_at(place.table, place.pending);
                let at = config.add_capability(msix::CAPABILITY_ID, &body)?;
                let control = at + 2;
                config.allow(usize::from(control), &MsixTable::WRITABLE_CONTROL.to_le_bytes());
                Some((place, table, control))
            }
            _ => None,
        };
        if let Some(msi) = &mut msi {
            msi.add_to(&mut config)?;
        }
        let control = found.express.as_ref().and_then(|(on_host, bytes)| {
            let here = registers::add_express(&mut config, bytes)?;
            let (host, here) =
                (on_host + registers::DEVICE_CONTROL, here + registers::DEVICE_CONTROL);
            Some((host, here))
        });
        let this = Self {
            host,
            places,
            config,
            bars,
            table,
            msi,
            control,
            enabled: None,
            bus_master: false,
            gone: false,
            complaints: AtomicU32::new(0),
        };
        this.write_command().map_err(PassedFunctionError::Command)?;
        this.config.decoded_bars().for_each(|(bar, at, _)| this.place(bar, Some(at)));
        Ok(this)
    }

    /// The function's memory always answers on the host: the guest's switch only moves windows.
    /// An access to what does not answer would be a fault of this process.
    fn write_command(&self) -> io::Result<()> {
        let master = if self.bus_master { COMMAND_BUS_MASTER } else { 0 };
        let command = COMMAND_MEMORY | COMMAND_INTX_DISABLE | master;
        self.host.write_config(COMMAND, &command.to_le_bytes())
    }

    fn place(&self, bar: u8, at: Option<u64>) {
        let Some(served) = &self.bars[usize::from(bar)] else { return };
        for (offset, window) in &served.windows {
            let at = at.map(|at| at + offset);
            // It fails where the guest chose an address that something else has. Accesses there
            // reach whatever that is; this BAR answers by exits, if it is asked at all.
            self.tell("be where the guest put it", window.windows.place(window.number, at));
        }
    }

    fn apply(&self, change: &BarChange) {
        if change.old.is_some() {
            self.place(change.bar, None);
        }
        let fits = |new: &u64| {
            let end = new.saturating_add(change.size);
            self.places.iter().any(|place| place.start <= *new && end <= place.end)
        };
        if let Some(new) = change.new.filter(fits) {
            self.place(change.bar, Some(new));
        }
    }

    /// Takes what was written to the capabilities.
    fn follow(&mut self, offset: u16, data: &[u8]) {
        if let Some((_, table, at)) = &mut self.table {
            table.set_control(self.config.u16_at(usize::from(*at)));
        }
        if let Some(msi) = &mut self.msi {
            msi.follow(&self.config);
        }
        self.deliver();
        let master = self.config.u16_at(usize::from(COMMAND)) & COMMAND_BUS_MASTER != 0;
        if master != self.bus_master {
            self.bus_master = master;
            self.tell("have its command register set", self.write_command());
        }
        self.pass_on_control(offset, data);
    }

    /// Lets VFIO deliver what the guest has turned on: one kind at a time, all its vectors at
    /// once. A vector that is masked keeps what comes in its event.
    fn deliver(&mut self) {
        let msix = self.table.as_ref().is_some_and(|(_, table, _)| table.is_enabled());
        let msi = self.msi.as_ref().is_some_and(MsiVectors::is_enabled);
        let wanted = match (msix, msi) {
            (true, _) => Some(Interrupts::Msix),
            (false, true) => Some(Interrupts::Msi),
            (false, false) => None,
        };
        if wanted == self.enabled {
            return;
        }
        if let Some(before) = self.enabled.take() {
            self.tell("have its interrupts turned off", self.host.set_interrupts(before, &[]));
        }
        let events: Vec<Arc<EventFd>> = match wanted {
            None => return,
            Some(Interrupts::Msix) => {
                self.table.iter().flat_map(|(_, table, _)| table.events()).collect()
            }
            Some(Interrupts::Msi) => self.msi.iter().flat_map(MsiVectors::events).collect(),
        };
        if let Some(kind) = wanted {
            let set = self.host.set_interrupts(kind, &events);
            // Tried again when the guest next writes: it may have fewer vectors by then.
            self.enabled = set.is_ok().then_some(kind);
            self.tell("have its interrupts turned on", set);
        }
    }

    fn pass_on_control(&self, offset: u16, data: &[u8]) {
        let Some((host, here)) = self.control else { return };
        let touched = Area { start: here.into(), end: u64::from(here) + 2 };
        if !touched.touches(offset.into(), data.len()) {
            return;
        }
        let reset = registers::resets(here, offset, data);
        let bits = if reset { registers::FUNCTION_LEVEL_RESET } else { 0 };
        let control = self.config.u16_at(usize::from(here)) | bits;
        self.tell(
            "have its device control set",
            self.host.write_config(host, &control.to_le_bytes()),
        );
        if reset {
            // Which takes away that it answers.
            self.tell("have its command register set", self.write_command());
        }
    }

    fn tell(&self, what: &'static str, result: io::Result<()>) {
        if let Err(error) = result
            && self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS
        {
            tracing::warn!(%error, "the host does not let a passed function {what}");
        }
    }

    /// Where an access lies in the MSI-X table or in the pending bits, if it does.
    fn trapped(&self, bar: u8, offset: u64, length: usize) -> Option<Trapped> {
        let (place, table, _) = self.table.as_ref()?;
        let inside = |(at, start): (u8, u64), bytes: u64| {
            let area = Area { start, end: start + bytes };
            at == bar && area.touches(offset, length)
        };
        let [table_bytes, pending_bytes] = trapped_bytes(table.count());
        if inside(place.table, table_bytes) {
            // Before its start is nothing of the table's: read_table takes whole accesses.
            return Some(
                offset.checked_sub(place.table.1).map_or(Trapped::Nothing, Trapped::Table),
            );
        }
        inside(place.pending, pending_bytes).then_some(Trapped::Nothing)
    }
}

enum Trapped {
    /// The table, at an offset.
    Table(u64),
    /// What reads as zeros and cannot be written.
    Nothing,
}

/// Bytes of a table of that many vectors, and of its pending bits.
pub fn trapped_bytes(vectors: usize) -> [u64; 2] {
    [vectors as u64 * ENTRY_SIZE, (vectors as u64).div_ceil(64) * 8]
}

impl PciFunction for PassedFunction {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        if self.gone {
            return Vec::new();
        }
        let changes = self.config.write(offset, data);
        changes.iter().for_each(|change| self.apply(change));
        self.follow(offset, data);
        changes
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        match (self.trapped(bar, offset, data.len()), &self.bars[usize::from(bar)]) {
            (Some(Trapped::Table(offset)), _) => {
                if let Some((_, table, _)) = &self.table {
                    table.read_table(offset, data);
                }
            }
            (Some(Trapped::Nothing), _) => data.fill(0),
            (None, Some(served)) => {
                if self.host.read_region(served.host_offset + offset, data).is_err() {
                    data.fill(0xff);
                }
            }
            (None, None) => data.fill(0xff),
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match (self.trapped(bar, offset, data.len()), &self.bars[usize::from(bar)]) {
            (Some(Trapped::Table(offset)), _) => {
                if let Some((_, table, _)) = &mut self.table {
                    table.write_table(offset, data);
                }
            }
            (Some(Trapped::Nothing), _) | (None, None) => {}
            (None, Some(served)) => {
                // As on real hardware, a write that is not taken is lost.
                let _ = self.host.write_region(served.host_offset + offset, data);
            }
        }
    }

    /// Stops the function, and closes and gives back all that it has: descriptor, windows, lines.
    fn detach(&mut self) {
        if self.gone {
            return;
        }
        self.gone = true;
        if let Some(kind) = self.enabled.take() {
            self.tell("have its interrupts turned off", self.host.set_interrupts(kind, &[]));
        }
        self.tell("be reset", self.host.reset());
        self.bars = [const { None }; 6];
        (self.table, self.msi, self.control) = (None, None, None);
        self.host = Box::new(Gone);
    }
}

/// Why a function could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum PassedFunctionError {
    /// Its registers do not fit.
    #[error("put the function's registers together: {0}")]
    Config(#[from] ConfigError),
    /// MSI could not be had.
    #[error(transparent)]
    Msi(#[from] msi::MsiSetupError),
    /// The host refused its command register.
    #[error("set the function's command register: {0}")]
    Command(io::Error),
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
