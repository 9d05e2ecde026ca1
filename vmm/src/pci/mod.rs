//! One PCI bus: configuration space by ECAM, functions numbered by device, memory BARs only, and
//! interrupts by message only, MSI-X but for some passed functions (PCI Express base specification
//! 6.0, 7.2.2, 7.5; PCI local bus specification 3.0, 6.8).

pub mod bus;
pub mod config;
pub mod line;
pub mod msi;
pub mod msix;

use std::sync::{Arc, Mutex};

pub use bus::PciBus;
pub use config::{BarChange, ConfigSpace};

/// A function (they are all function 0 of their device), as the bus needs it.
///
/// The bus calls it with the function's lock held, from any vCPU thread.
pub trait PciFunction: Send {
    /// The function's configuration space.
    fn config(&self) -> &ConfigSpace;

    /// Writes 1, 2 or 4 aligned bytes of configuration space, and returns which BARs are decoded
    /// elsewhere since.
    fn write_config(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange>;

    /// Reads from a BAR. `offset` and the end of `data` lie in it.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes to a BAR. `offset` and the end of `data` lie in it.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// It is taken off the bus: from here on it decodes nothing, whatever is written to it by who
    /// found it there just before.
    fn detach(&mut self) {}
}

/// A function on the bus.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;
