//! The configuration space of a function: 256 bytes of registers, of which the guest can change
//! what a mask allows, and the BARs that it moves about.

/// Bytes that are kept. The rest of the 4 KiB reads as zeros: no extended capabilities.
const SIZE: usize = 256;

// Offsets in the header (PCI local bus specification 3.0, 6.1).
const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const BARS: usize = 6;

// Of a BAR's low bits (6.2.5.1).
const BAR_64_BITS: u64 = 1 << 2;
const BAR_PREFETCHABLE: u64 = 1 << 3;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Programming interface, sub-class and class, in that order.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// A BAR that is decoded elsewhere than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarChange {
    /// Its number, 0 to 5.
    pub bar: u8,
    /// Its size in bytes.
    pub size: u64,
    /// Where it was decoded, if anywhere.
    pub old: Option<u64>,
    /// Where it is decoded now, if anywhere.
    pub new: Option<u64>,
}

/// Why a function could not be put together. All of these are mistakes of the VMM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A BAR's size is no power of two of at least 16 bytes.
    #[error("a BAR of {0:#x} bytes: it has to be a power of two of at least 16")]
    BarSize(u64),
    /// There is no such BAR, or it is taken.
    #[error("BAR {0} does not exist or is taken")]
    BarNumber(u8),
    /// The capabilities outgrew their place.
    #[error("no room for another capability of {0} bytes")]
    CapabilityRoom(usize),
}

/// The registers of a function.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Sizes of the memory BARs; 0 where there is none.
    bar_sizes: [u64; BARS],
    /// Whether a BAR has 64 bits, and so the register behind its own.
    wide: [bool; BARS],
    next_capability: usize,
    last_capability_pointer: usize,
}

impl ConfigSpace {
    /// Registers of a function without BARs or capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_sizes: [0; BARS],
            wide: [false; BARS],
            next_capability: FIRST_CAPABILITY,
            last_capability_pointer: CAPABILITIES_POINTER,
        };
        space.put(VENDOR_ID, &identity.vendor.to_le_bytes());
        space.put(DEVICE_ID, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        space.put(CLASS, &identity.class);
        space.put(SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        space
    }

    /// Adds a 32-bit, non-prefetchable memory BAR that starts out at `address`, decoded.
    ///
    /// # Errors
    /// Its size or number is impossible.
    pub fn add_bar(&mut self, bar: u8, size: u64, address: u32) -> Result<(), ConfigError> {
        if !size.is_power_of_two() || !(16..=1 << 31).contains(&size) {
            return Err(ConfigError::BarSize(size));
        }
        let taken = usize::from(bar).checked_sub(1).is_some_and(|before| self.wide[before % BARS]);
        match self.bar_sizes.get_mut(usize::from(bar)) {
            Some(slot) if *slot == 0 && !taken => *slot = size,
            _ => return Err(ConfigError::BarNumber(bar)),
        }
        let offset = BAR0 + 4 * usize::from(bar);
        self.put(offset, &address.to_le_bytes());
        self.allow(offset, &(!(size as u32 - 1)).to_le_bytes());
        let command = self.command() | COMMAND_MEMORY;
        self.put(COMMAND, &command.to_le_bytes());
        Ok(())
    }

    /// Adds a 64-bit memory BAR that starts out at `address`, decoded. It takes the register behind
    /// its own, too.
    ///
    /// # Errors
    /// Its size or number is impossible.
    pub fn add_wide_bar(
        &mut self,
        bar: u8,
        size: u64,
        address: u64,
        prefetchable: bool,
    ) -> Result<(), ConfigError> {
        if !size.is_power_of_two() || !(16..=1 << 62).contains(&size) {
            return Err(ConfigError::BarSize(size));
        }
        let at = usize::from(bar);
        match self.bar_sizes.get(at..at + 2) {
            Some([0, 0]) if at == 0 || !self.wide[at - 1] => {}
            _ => return Err(ConfigError::BarNumber(bar)),
        }
        (self.bar_sizes[at], self.wide[at]) = (size, true);
        let kind = BAR_64_BITS | if prefetchable { BAR_PREFETCHABLE } else { 0 };
        self.put(BAR0 + 4 * at, &(address | kind).to_le_bytes());
        self.allow(BAR0 + 4 * at, &(!(size - 1)).to_le_bytes());
        let command = self.command() | COMMAND_MEMORY;
        self.put(COMMAND, &command.to_le_bytes());
        Ok(())
    }

    /// Takes the addresses out of all BARs, which are decoded nowhere then, as after a reset.
    pub fn undecode(&mut self) {
        for bar in 0..BARS {
            if self.bar_sizes[bar] == 0 {
                continue;
            }
            let low = self.bytes[BAR0 + 4 * bar] & 0xf;
            self.put(BAR0 + 4 * bar, &[low, 0, 0, 0]);
            if self.wide[bar] {
                self.put(BAR0 + 4 * bar + 4, &[0; 4]);
            }
        }
        let command = self.command() & !COMMAND_MEMORY;
        self.put(COMMAND, &command.to_le_bytes());
    }

    /// Adds a capability: its id, and what follows the next pointer. Returns its offset.
    ///
    /// # Errors
    /// There is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Result<u16, ConfigError> {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        if end > SIZE {
            return Err(ConfigError::CapabilityRoom(body.len()));
        }
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        // An offset below 256, so it fits a byte.
        self.put(self.last_capability_pointer, &[offset as u8]);
        self.last_capability_pointer = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        let status = self.u16_at(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        Ok(offset as u16)
    }

    /// Lets the guest write the set bits of `mask` from `offset` on.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Reads; what lies past the registers is zeros.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    /// Writes what may be written, and returns which BARs are decoded elsewhere since.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let before = self.decoded();
        for (index, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            if let (Some(register), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *register = (*register & !mask) | (byte & mask);
            }
        }
        let after = self.decoded();
        (0u8..)
            .zip(before.into_iter().zip(after))
            .filter(|(_, (old, new))| old != new)
            .map(|(bar, (old, new))| BarChange {
                bar,
                size: self.bar_sizes[usize::from(bar)],
                old,
                new,
            })
            .collect()
    }

    /// All registers, to be given to [`ConfigSpace::restore`].
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over what the guest had written to the same registers of the same function. Returns
    /// which BARs are decoded elsewhere since; nothing when the function is another.
    pub fn restore(&mut self, saved: &[u8]) -> Option<Vec<BarChange>> {
        let fixed = |bytes: &[u8]| -> Vec<u8> {
            bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & !mask).collect()
        };
        let same = saved.len() == SIZE && fixed(saved) == fixed(&self.bytes);
        same.then(|| self.write(0, saved))
    }

    /// The BARs as they are decoded now: number, address and size.
    pub fn decoded_bars(&self) -> impl Iterator<Item = (u8, u64, u64)> + '_ {
        (0u8..)
            .zip(self.decoded())
            .filter_map(|(bar, at)| Some((bar, at?, self.bar_sizes[usize::from(bar)])))
    }

    /// The little-endian 16 bits at `offset`.
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn decoded(&self) -> [Option<u64>; BARS] {
        let mut decoded = [None; BARS];
        if self.command() & COMMAND_MEMORY != 0 {
            for (bar, slot) in decoded.iter_mut().enumerate() {
                *slot = (self.bar_sizes[bar] != 0).then(|| self.bar_address(bar));
            }
        }
        decoded
    }

    fn bar_address(&self, bar: usize) -> u64 {
        let offset = BAR0 + 4 * bar;
        let half = |from: usize| {
            let bytes = [0, 1, 2, 3].map(|index| self.bytes[from + index]);
            u64::from(u32::from_le_bytes(bytes))
        };
        let high = if self.wide[bar] { half(offset + 4) << 32 } else { 0 };
        (high | half(offset)) & !0xf
    }

    fn command(&self) -> u16 {
        self.u16_at(COMMAND)
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: [0, 0, 1],
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(IDENTITY);
        space.add_bar(0, 0x8000, 0xc000_0000).unwrap();
        space
    }

    fn u32_at(space: &ConfigSpace, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        assert!(space.write(0, &[0xff; 4]).is_empty());
        assert_eq!(u32_at(&space, 0), 0x1042_1af4);
    }

    #[test]
    fn bar_written_with_ones_tells_its_size() {
        let mut space = space();
        space.write(0x04, &0u16.to_le_bytes());
        space.write(0x10, &[0xff; 4]);
        assert_eq!(u32_at(&space, 0x10), 0xffff_8000);
    }

    #[test]
    fn bar_moves_when_its_address_or_the_command_changes() {
        let mut space = space();
        let change = |old, new| BarChange { bar: 0, size: 0x8000, old, new };
        let off = space.write(0x04, &0u16.to_le_bytes());
        assert_eq!(off, [change(Some(0xc000_0000), None)]);
        assert!(space.write(0x10, &0xd000_0000u32.to_le_bytes()).is_empty());
        let on = space.write(0x04, &2u16.to_le_bytes());
        assert_eq!(on, [change(None, Some(0xd000_0000))]);
    }

    #[test]
    fn capabilities_are_chained_in_order() {
        let mut space = space();
        let first = space.add_capability(0x09, &[0; 14]).unwrap();
        let second = space.add_capability(0x11, &[0; 10]).unwrap();
        assert_eq!(space.bytes[CAPABILITIES_POINTER], first as u8);
        assert_eq!(space.bytes[usize::from(first) + 1], second as u8);
        assert_eq!(space.bytes[usize::from(second) + 1], 0);
        assert_eq!(space.u16_at(STATUS) & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
        let full = space.add_capability(0x09, &[0; 250]);
        assert_eq!(full, Err(ConfigError::CapabilityRoom(250)));
    }

    #[test]
    fn wide_bar_is_sized_and_moved_by_both_of_its_registers() {
        let mut space = space();
        let (size, address) = (1 << 33, 0x80_0000_0000);
        space.add_wide_bar(2, size, address, true).unwrap();
        assert_eq!(u32_at(&space, 0x18), 0xc);
        assert_eq!(space.decoded_bars().last(), Some((2, address, size)));
        space.write(0x04, &0u16.to_le_bytes());
        space.write(0x18, &[0xff; 4]);
        space.write(0x1c, &[0xff; 4]);
        assert_eq!((u32_at(&space, 0x18), u32_at(&space, 0x1c)), (0xc, 0xffff_fffe));
        space.write(0x18, &0u32.to_le_bytes());
        space.write(0x1c, &0x90u32.to_le_bytes());
        let on = space.write(0x04, &2u16.to_le_bytes());
        assert_eq!(on.last(), Some(&BarChange { bar: 2, size, old: None, new: Some(0x90 << 32) }));
        // The register behind it is taken.
        assert_eq!(space.add_bar(3, 0x1000, 0), Err(ConfigError::BarNumber(3)));
        assert_eq!(space.add_wide_bar(3, 0x1000, 0, false), Err(ConfigError::BarNumber(3)));
        assert_eq!(space.add_wide_bar(5, 0x1000, 0, false), Err(ConfigError::BarNumber(5)));
        assert_eq!(space.add_wide_bar(4, 0x3000, 0, false), Err(ConfigError::BarSize(0x3000)));
    }

    #[test]
    fn bars_without_addresses_are_decoded_where_they_are_put() {
        let mut space = space();
        space.add_wide_bar(2, 1 << 33, 0x80_0000_0000, true).unwrap();
        space.undecode();
        assert_eq!(space.decoded_bars().next(), None);
        let registers = [0x10, 0x18, 0x1c].map(|register| u32_at(&space, register));
        assert_eq!(registers, [0, 0xc, 0]);
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        space.write(0x1c, &0x90u32.to_le_bytes());
        space.write(0x04, &2u16.to_le_bytes());
        let decoded: Vec<_> = space.decoded_bars().collect();
        assert_eq!(decoded, [(0, 0xd000_0000, 0x8000), (2, 0x90 << 32, 1 << 33)]);
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut space = space();
        assert_eq!(space.add_bar(1, 0x3000, 0), Err(ConfigError::BarSize(0x3000)));
        assert_eq!(space.add_bar(0, 0x1000, 0), Err(ConfigError::BarNumber(0)));
        assert_eq!(space.add_bar(6, 0x1000, 0), Err(ConfigError::BarNumber(6)));
    }

    proptest! {
        #[test]
        fn any_writes_leave_the_fixed_registers_alone(
            writes in proptest::collection::vec((0u16..4096, proptest::collection::vec(any::<u8>(), 1..5)), 0..64)
        ) {
            let mut space = space();
            space.add_capability(0x09, &[7; 14]).unwrap();
            for (offset, data) in &writes {
                space.write(*offset, data);
            }
            prop_assert_eq!(u32_at(&space, 0), 0x1042_1af4);
            prop_assert_eq!(space.bytes[0x42..0x50].to_vec(), vec![7; 14]);
            prop_assert_eq!(u32_at(&space, 0x10) & 0x7fff, 0);
        }
    }
}
