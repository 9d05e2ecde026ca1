//! Virtio over PCI (virtio 1.2, 4.1): modern only, one 32-bit memory BAR.
//!
//! ```text
//! BAR 0  0x0000  common configuration   ([`registers`])
//!        0x1000  interrupt status: always 0, interrupts are MSI-X
//!        0x2000  device configuration
//!        0x3000  notification: 4 bytes a queue, by ioeventfd
//!        0x4000  MSI-X table
//!        0x5000  MSI-X pending bits
//! ```

pub mod registers;
mod transport;

pub use transport::{
    DeviceState, Doorbells, RestoreError, SaveError, TransportError, VirtioPci, Workers,
};
