//! The I/O ports: the serial console, and the registers by which the guest ends itself. Every
//! other port reads as ones and swallows what is written.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use vial_vmm_api::ExitReason;
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::acpi::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::arch::layout::{
    PVPANIC_PORT, RESET_PORT, SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::pci::bus::lock;

/// The guest's kernel panicked (QEMU's pvpanic specification, bit 0), which is all that the
/// device offers.
const PVPANIC_PANICKED: u8 = 1;
/// Sleep enable, in the sleep control register (ACPI 6.5, 4.8.3.7.1).
const SLEEP_ENABLE: u8 = 1 << 5;
/// Where the sleep type begins in the sleep control register.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// An interrupt pin.
pub struct Pin(EventFd);

impl Trigger for Pin {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// A 16550 serial port whose other end is a file.
pub struct Console {
    serial: Serial<Pin, NoEvents, File>,
    input: Option<File>,
}

impl Console {
    /// A port that writes to `output`, and reads from it when that is possible too. `pin` raises
    /// its interrupt.
    pub fn new(output: File, pin: EventFd) -> Self {
        let input = output.try_clone().ok();
        Self { serial: Serial::new(Pin(pin), output), input }
    }

    /// What to watch for input, when there is any to come.
    pub fn input_descriptor(&self) -> Option<RawFd> {
        self.input.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Moves what came from the other end to the guest, as much as fits the port's buffer.
    /// Returns whether more can come.
    pub fn take_input(&mut self) -> bool {
        let Some(input) = &mut self.input else { return false };
        let mut buffer = [0; 64];
        let room = self.serial.fifo_capacity().min(buffer.len());
        match input.read(&mut buffer[..room]) {
            Ok(0) => self.input = None,
            Ok(count) => {
                // The count fits the room that there was, so nothing is refused.
                let _ = self.serial.enqueue_raw_bytes(&buffer[..count]);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => self.input = None,
        }
        self.input.is_some()
    }
}

/// All I/O ports.
pub struct Ports {
    console: Option<Arc<Mutex<Console>>>,
}

impl Ports {
    /// The ports of a machine with or without a console.
    pub fn new(console: Option<Arc<Mutex<Console>>>) -> Self {
        Self { console }
    }

    /// The guest reads a port.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            match (port, serial_offset(port), &self.console) {
                (PVPANIC_PORT, ..) => *byte = PVPANIC_PANICKED,
                (SLEEP_STATUS_PORT | SLEEP_CONTROL_PORT, ..) => *byte = 0,
                (_, Some(offset), Some(console)) => *byte = lock(console).serial.read(offset),
                _ => {}
            }
        }
    }

    /// The guest writes a port. Returns the reason when that ends it.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        let [byte] = *data else { return None };
        match port {
            PVPANIC_PORT if byte & PVPANIC_PANICKED != 0 => return Some(ExitReason::Panic),
            SLEEP_CONTROL_PORT
                if byte & SLEEP_ENABLE != 0 && byte >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_OFF =>
            {
                return Some(ExitReason::PowerOff);
            }
            RESET_PORT if byte == RESET_VALUE => return Some(ExitReason::Reset),
            _ => {}
        }
        if let (Some(offset), Some(console)) = (serial_offset(port), &self.console)
            && let Err(error) = lock(console).serial.write(offset, byte)
        {
            // The guest's text is lost, the guest is not.
            tracing::debug!(%error, "the console's other end does not take the guest's output");
        }
        None
    }

    /// Writes what the console holds back.
    pub fn flush(&self) {
        if let Some(console) = &self.console {
            let _ = lock(console).serial.writer_mut().flush(); // A file holds nothing back.
        }
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT).and_then(|offset| u8::try_from(offset).ok()).filter(|o| *o < 8)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use super::*;

    #[test]
    fn guest_ends_itself_by_the_registers_that_acpi_names() {
        let ports = Ports::new(None);
        let off = SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
        assert_eq!(ports.write(SLEEP_CONTROL_PORT, &[off]), Some(ExitReason::PowerOff));
        assert_eq!(ports.write(SLEEP_CONTROL_PORT, &[off & !SLEEP_ENABLE]), None);
        assert_eq!(ports.write(RESET_PORT, &[RESET_VALUE]), Some(ExitReason::Reset));
        assert_eq!(ports.write(PVPANIC_PORT, &[1]), Some(ExitReason::Panic));
        assert_eq!(ports.write(PVPANIC_PORT, &[2]), None);
    }

    #[test]
    fn absent_ports_read_as_ones() {
        let ports = Ports::new(None);
        for (port, length) in [(0x60, 1), (SERIAL_PORT, 1), (0xcf8, 4), (u16::MAX, 2)] {
            let mut data = [0; 4];
            ports.read(port, &mut data[..length]);
            assert_eq!(data[..length], [0xff; 4][..length]);
            assert_eq!(ports.write(port, &data[..length]), None);
        }
    }

    #[test]
    fn console_writes_to_its_file() {
        let mut file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap(), EventFd::new(0).unwrap());
        let ports = Ports::new(Some(Arc::new(Mutex::new(console))));
        for byte in b"hello" {
            assert_eq!(ports.write(SERIAL_PORT, &[*byte]), None);
        }
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
}
