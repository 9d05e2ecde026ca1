//! What the guest sees of a function's configuration space: made anew from what the function has,
//! with the capabilities that are named here and no other. Pure.
//!
//! | capability | what becomes of it |
//! | --- | --- |
//! | MSI, MSI-X | the guest's settings stay here; the host's are VFIO's |
//! | PCI Express | that of an integrated endpoint, since nothing is above it on the guest's bus; what is written to device control goes on to the function |
//! | all others, extended ones too | hidden: power management, SR-IOV, resizable BARs, AER, vendors' own |
//!
//! I/O BARs, the expansion ROM and the interrupt pin are not shown either.

use crate::pci::config::{ConfigSpace, Identity};

/// Bytes of configuration space that are looked at: the header, and capabilities.
pub const HEADER_BYTES: usize = 256;

// Offsets in the header (PCI local bus specification 3.0, 6.1) and capability ids (PCI code and
// ID assignment specification, 2).
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const ID_MSI: u8 = 0x05;
const ID_EXPRESS: u8 = 0x10;
const ID_MSIX: u8 = 0x11;

/// Device control's place in the PCI Express capability (PCI Express base specification 6.0,
/// 7.5.3.4).
pub const DEVICE_CONTROL: u16 = 0x08;
/// What of device control goes on to the function: relaxed ordering, payload size, extended tags,
/// no snoop, read request size. Errors are the host's to hear of.
const DEVICE_CONTROL_WRITABLE: u16 = 0x79f0;
/// Begins a function-level reset. Always reads as zero.
pub const FUNCTION_LEVEL_RESET: u16 = 1 << 15;
/// Bytes of the capability that are shown: to the end of device status 2.
const EXPRESS_BYTES: usize = 0x2c;
/// The type of an endpoint integrated into the root complex, in bits 7:4 of the register at 2.
const INTEGRATED_ENDPOINT: u16 = 9 << 4;

/// A BAR of the function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5; a wide one has the next, too.
    pub number: u8,
    /// Whether it has 64 bits.
    pub wide: bool,
    /// Whether reads have no effects.
    pub prefetchable: bool,
}

/// Where the MSI-X table and the pending bits lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msix {
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR and offset of the table.
    pub table: (u8, u64),
    /// BAR and offset of the pending bits.
    pub pending: (u8, u64),
}

/// The MSI capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Vectors, a power of two from 1 to 32.
    pub vectors: u8,
}

/// What a function has, as far as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The memory BARs.
    pub bars: Vec<Bar>,
    /// MSI-X, if there is any.
    pub msix: Option<Msix>,
    /// MSI, if there is any.
    pub msi: Option<Msi>,
    /// Where the PCI Express capability lies on the host, and its first bytes.
    pub express: Option<(u16, [u8; EXPRESS_BYTES])>,
}

/// Reads the header of a function, which is not trusted to be well-formed: a device's firmware may
/// be anything.
pub fn find(header: &[u8; HEADER_BYTES]) -> Found {
    let capability = |id: u8| capabilities(header).find(|(found, _)| *found == id);
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let place = |at: usize| ((u32_at(at) & 7) as u8, u64::from(u32_at(at) & !7));
    let msix = capability(ID_MSIX).filter(|(_, at)| at + 12 <= HEADER_BYTES).map(|(_, at)| Msix {
        vectors: (u16_at(at + 2) & 0x7ff) + 1,
        table: place(at + 4),
        pending: place(at + 8),
    });
    let msi = capability(ID_MSI).filter(|(_, at)| at + 4 <= HEADER_BYTES).map(|(_, at)| {
        // Bits 3:1 are the exponent; 6 and 7 are reserved.
        Msi { vectors: 1 << (u16_at(at + 2) >> 1 & 7).min(5) }
    });
    let express = capability(ID_EXPRESS).filter(|(_, at)| at + EXPRESS_BYTES <= HEADER_BYTES).map(
        |(_, at)| {
            let mut bytes = [0; EXPRESS_BYTES];
            bytes.copy_from_slice(&header[at..at + EXPRESS_BYTES]);
            // Below 256.
            (at as u16, bytes)
        },
    );
    let mut bars = Vec::new();
    let mut number = 0u8;
    while number < 6 {
        let register = u32_at(BAR0 + 4 * usize::from(number));
        let memory = register & 1 == 0;
        let wide = memory && register >> 1 & 3 == 2 && number < 5;
        if memory {
            bars.push(Bar { number, wide, prefetchable: register & 8 != 0 });
        }
        number += 1 + u8::from(wide);
    }
    Found { bars, msix, msi, express }
}

/// Id and offset of each capability.
fn capabilities(header: &[u8; HEADER_BYTES]) -> impl Iterator<Item = (u8, usize)> {
    let status = u16::from_le_bytes([header[STATUS], header[STATUS + 1]]);
    let first = match status & STATUS_CAPABILITIES {
        0 => 0,
        _ => header[CAPABILITIES_POINTER],
    };
    let mut next = usize::from(first & !3);
    // There is room for no more, so a list that goes round ends.
    (0..HEADER_BYTES / 4).map_while(move |_| {
        let at = next;
        if at < 0x40 {
            return None;
        }
        next = usize::from(header[at + 1] & !3);
        Some((header[at], at))
    })
}

/// Who the function is, as its header says.
pub fn identity(header: &[u8; HEADER_BYTES]) -> Identity {
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    Identity {
        vendor: u16_at(0x00),
        device: u16_at(0x02),
        revision: header[0x08],
        class: [header[0x09], header[0x0a], header[0x0b]],
        subsystem_vendor: u16_at(0x2c),
        subsystem: u16_at(0x2e),
    }
}

/// Adds the PCI Express capability and returns where, if there is room.
pub fn add_express(config: &mut ConfigSpace, bytes: &[u8; EXPRESS_BYTES]) -> Option<u16> {
    let mut shown = *bytes;
    let kind = u16::from_le_bytes([bytes[2], bytes[3]]) & !0x3ff0 | INTEGRATED_ENDPOINT;
    shown[2..4].copy_from_slice(&kind.to_le_bytes());
    // Device status has nothing to tell; an integrated endpoint has no link and no slot.
    shown[0x0a..0x24].fill(0);
    // Of the second device capabilities, completion time-outs.
    shown[0x24] &= 0x1f;
    shown[0x25..0x28].fill(0);
    shown[0x28..].fill(0);
    let at = config.add_capability(ID_EXPRESS, &shown[2..]).ok()?;
    let control = usize::from(at + DEVICE_CONTROL);
    config.allow(control, &DEVICE_CONTROL_WRITABLE.to_le_bytes());
    Some(at)
}

/// What of a write to `offset` sets the bit that begins a function-level reset, device control
/// being at `control`.
pub fn resets(control: u16, offset: u16, data: &[u8]) -> bool {
    let high = u32::from(control) + 1;
    let at = high.checked_sub(u32::from(offset));
    at.and_then(|at| data.get(at as usize)).is_some_and(|byte| byte & 0x80 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header with capabilities at their places.
    fn header(capabilities: &[(u8, u8, &[u8])]) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[STATUS] = STATUS_CAPABILITIES as u8;
        let mut pointer = CAPABILITIES_POINTER;
        for &(at, id, body) in capabilities {
            header[pointer] = at;
            let at = usize::from(at);
            header[at] = id;
            header[at + 2..at + 2 + body.len()].copy_from_slice(body);
            pointer = at + 1;
        }
        header
    }

    #[test]
    fn capabilities_and_bars_are_found() {
        let msix = [4, 0, 3, 0, 0, 0, 3, 0x20, 0, 0];
        let mut header = header(&[
            (0x40, 0x01, &[0; 6]),
            (0x50, ID_MSI, &[0x8a, 0]),
            (0x70, ID_MSIX, &msix),
            (0xa0, ID_EXPRESS, &[2, 0, 1, 2, 3, 4]),
        ]);
        // A narrow BAR, one of I/O, a wide one that can be prefetched, and one behind it.
        header[0x14] = 1;
        header[0x18] = 0xc;
        let found = find(&header);
        let bar = |number, wide| Bar { number, wide, prefetchable: wide };
        assert_eq!(found.bars, [bar(0, false), bar(2, true), bar(4, false), bar(5, false)]);
        assert_eq!(found.msix, Some(Msix { vectors: 5, table: (3, 0), pending: (3, 0x2000) }));
        assert_eq!(found.msi, Some(Msi { vectors: 32 }));
        assert_eq!(found.express.unwrap().0, 0xa0);
    }

    #[test]
    fn express_capability_becomes_that_of_an_integrated_endpoint() {
        let mut config = ConfigSpace::new(identity(&[0; HEADER_BYTES]));
        let mut bytes = [0xff; EXPRESS_BYTES];
        bytes[2] = 0x02;
        let at = add_express(&mut config, &bytes).unwrap();
        assert_eq!(config.u16_at(usize::from(at) + 2) & 0xf0, INTEGRATED_ENDPOINT);
        for register in [0x0a, 0x0c, 0x10, 0x12, 0x14, 0x20, 0x26, 0x28, 0x2a] {
            assert_eq!(config.u16_at(usize::from(at) + register), 0, "{register:#x}");
        }
        let control = at + DEVICE_CONTROL;
        config.write(control, &0u16.to_le_bytes());
        config.write(control, &0xffffu16.to_le_bytes());
        // What was there before and cannot be written stays.
        let fixed = !DEVICE_CONTROL_WRITABLE;
        assert_eq!(config.u16_at(usize::from(control)) & !fixed, DEVICE_CONTROL_WRITABLE);
    }

    #[test]
    fn reset_bit_is_seen_in_accesses_of_every_size() {
        assert!(resets(0x48, 0x48, &[0, 0x80]) && resets(0x48, 0x49, &[0x80]));
        assert!(resets(0x48, 0x48, &[0, 0x80, 0, 0]));
        assert!(!resets(0x48, 0x48, &[0x80]) && !resets(0x48, 0x4a, &[0x80, 0x80]));
        assert!(!resets(0x48, 0x48, &[0x80, 0x7f]) && !resets(0x48, 0, &[0xff; 4]));
    }

    proptest! {
        #[test]
        fn any_header_is_read(bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES)) {
            let header: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            let found = find(&header);
            prop_assert!(found.msix.is_none_or(|msix| (1..=2048).contains(&msix.vectors)));
            prop_assert!(found.msi.is_none_or(|msi| msi.vectors <= 32));
            for bar in &found.bars {
                prop_assert!(bar.number < 6 && !(bar.wide && bar.number == 5));
            }
        }
    }
}
