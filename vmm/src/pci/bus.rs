//! The bus: which function answers at which address.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::config::{BarChange, ConfigSpace, Identity};
use super::{PciFunction, SharedFunction};
use crate::arch::layout::{ECAM_SIZE, PCI_MMIO_SIZE, PCI_MMIO_START};

/// Devices on a bus.
const DEVICES: usize = 32;

/// Why a function could not be added to the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Every device number is taken.
    #[error("the PCI bus is full: it takes {DEVICES} devices, the host bridge included")]
    Full,
    /// The window for BARs is used up.
    #[error("the window for device registers is used up")]
    NoWindow,
}

/// Where a BAR is decoded: its end, its function, its number.
struct Decoded {
    end: u64,
    function: SharedFunction,
    bar: u8,
}

/// One PCI bus.
pub struct PciBus {
    slots: RwLock<[Option<SharedFunction>; DEVICES]>,
    bars: RwLock<BTreeMap<u64, Decoded>>,
    next_bar: Mutex<u64>,
    /// What is left of the window above the guest's memory.
    high: Mutex<Range<u64>>,
}

/// A panic in another thread ends the process, so a poisoned lock is as good as any.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PciBus {
    /// A bus with nothing but its host bridge, device 0.
    pub fn new() -> Self {
        let mut slots = [const { None }; DEVICES];
        let bridge: SharedFunction = Arc::new(Mutex::new(HostBridge::new()));
        slots[0] = Some(bridge);
        Self {
            slots: RwLock::new(slots),
            bars: RwLock::new(BTreeMap::new()),
            next_bar: Mutex::new(PCI_MMIO_START),
            high: Mutex::new(0..0),
        }
    }

    /// The same, with a window for 64-bit BARs above the guest's memory.
    pub fn with_high_window(window: Range<u64>) -> Self {
        Self { high: Mutex::new(window), ..Self::new() }
    }

    /// Takes a place for a 64-bit BAR of `size` bytes, aligned to its size.
    ///
    /// # Errors
    /// [`BusError::NoWindow`].
    pub fn allocate_wide_bar(&self, size: u64) -> Result<u64, BusError> {
        let mut left = lock(&self.high);
        let start = left.start.checked_next_multiple_of(size.max(1)).ok_or(BusError::NoWindow)?;
        let end =
            start.checked_add(size).filter(|end| *end <= left.end).ok_or(BusError::NoWindow)?;
        left.start = end;
        Ok(start)
    }

    /// Takes a place for a BAR of `size` bytes, aligned to its size.
    ///
    /// # Errors
    /// [`BusError::NoWindow`].
    pub fn allocate_bar(&self, size: u64) -> Result<u32, BusError> {
        let mut next = lock(&self.next_bar);
        let start = next.checked_next_multiple_of(size.max(1)).ok_or(BusError::NoWindow)?;
        let end = start.checked_add(size).ok_or(BusError::NoWindow)?;
        if end > PCI_MMIO_START + PCI_MMIO_SIZE {
            return Err(BusError::NoWindow);
        }
        *next = end;
        u32::try_from(start).map_err(|_| BusError::NoWindow)
    }

    /// Puts a function at the first free device number, and returns that number.
    ///
    /// # Errors
    /// [`BusError::Full`].
    pub fn add(&self, function: SharedFunction) -> Result<u8, BusError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let free = (0u8..).zip(slots.iter_mut()).find(|(_, slot)| slot.is_none());
        let (number, slot) = free.ok_or(BusError::Full)?;
        for (bar, address, size) in lock(&function).config().decoded_bars() {
            self.decode(address, size, bar, &function);
        }
        *slot = Some(function);
        Ok(number)
    }

    /// Takes a function off. What the guest has not let go of answers no more: its registers read
    /// as ones, and its number is free.
    pub fn remove(&self, number: u8) -> Option<SharedFunction> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let function = slots.get_mut(usize::from(number)).and_then(Option::take)?;
        drop(slots);
        // Whoever is at its registers now is done first; who waits for them finds it detached.
        let mut locked = lock(&function);
        locked.detach();
        let mut bars = self.bars.write().unwrap_or_else(PoisonError::into_inner);
        bars.retain(|_, decoded| !Arc::ptr_eq(&decoded.function, &function));
        drop((bars, locked));
        Some(function)
    }

    fn decode(&self, address: u64, size: u64, bar: u8, function: &SharedFunction) {
        // The guest may put a wide BAR to the very end of all addresses.
        let end = address.saturating_add(size);
        let decoded = Decoded { end, function: function.clone(), bar };
        self.bars.write().unwrap_or_else(PoisonError::into_inner).insert(address, decoded);
    }

    fn slot(&self, offset: u64) -> Option<SharedFunction> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        // Bits 19:15 are the device, 14:12 the function; only function 0 exists.
        let device = usize::try_from(offset >> 15).ok().filter(|_| offset >> 12 & 7 == 0)?;
        slots.get(device)?.clone()
    }

    /// Reads configuration space, `offset` bytes into ECAM. Where nothing is, it reads as ones.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        match self.slot(offset).filter(|_| is_config_access(offset, data.len())) {
            Some(function) => lock(&function).config().read((offset & 0xfff) as u16, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space, `offset` bytes into ECAM.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let access = is_config_access(offset, data.len());
        let Some(function) = self.slot(offset).filter(|_| access) else { return };
        let mut locked = lock(&function);
        for change in locked.write_config((offset & 0xfff) as u16, data) {
            self.apply(change, &function);
        }
    }

    fn apply(&self, change: BarChange, function: &SharedFunction) {
        if let Some(old) = change.old {
            let mut bars = self.bars.write().unwrap_or_else(PoisonError::into_inner);
            // Another function may have been moved over it meanwhile; that one stays.
            if bars.get(&old).is_some_and(|at| Arc::ptr_eq(&at.function, function)) {
                bars.remove(&old);
            }
        }
        if let Some(new) = change.new {
            self.decode(new, change.size, change.bar, function);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(SharedFunction, u8, u64)> {
        let bars = self.bars.read().unwrap_or_else(PoisonError::into_inner);
        let (start, decoded) = bars.range(..=address).next_back()?;
        let end = address.checked_add(length as u64)?;
        (end <= decoded.end).then(|| (decoded.function.clone(), decoded.bar, address - start))
    }

    /// Reads from whatever BAR holds `address`. Where none does, it reads as ones.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((function, bar, offset)) => lock(&function).read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to whatever BAR holds `address`.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(address, data.len()) {
            lock(&function).write_bar(bar, offset, data);
        }
    }
}

fn is_config_access(offset: u64, length: usize) -> bool {
    matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length as u64) && offset < ECAM_SIZE
}

/// Device 0: what a PCI bus hangs from.
struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    fn new() -> Self {
        Self {
            config: ConfigSpace::new(Identity {
                // A generic PCI Express host bridge, as its vendor and id say.
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: [0, 0, 6],
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            }),
        }
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        self.config.write(offset, data)
    }

    fn read_bar(&mut self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _: u8, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory {
        config: ConfigSpace,
        bytes: [u8; 16],
        detached: bool,
    }

    impl PciFunction for Memory {
        fn config(&self) -> &ConfigSpace {
            &self.config
        }
        fn write_config(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
            if self.detached { Vec::new() } else { self.config.write(offset, data) }
        }
        fn detach(&mut self) {
            self.detached = true;
        }
        fn read_bar(&mut self, _: u8, offset: u64, data: &mut [u8]) {
            let at = offset as usize;
            data.copy_from_slice(&self.bytes[at..at + data.len()]);
        }
        fn write_bar(&mut self, _: u8, offset: u64, data: &[u8]) {
            let at = offset as usize;
            self.bytes[at..at + data.len()].copy_from_slice(data);
        }
    }

    fn memory(bus: &PciBus) -> SharedFunction {
        let mut config = ConfigSpace::new(Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: [0; 3],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.add_bar(0, 16, bus.allocate_bar(16).unwrap()).unwrap();
        Arc::new(Mutex::new(Memory { config, bytes: [0; 16], detached: false }))
    }

    #[test]
    fn function_answers_at_its_device_number_and_nowhere_else() {
        let bus = PciBus::new();
        assert_eq!(bus.add(memory(&bus)), Ok(1));
        let mut id = [0; 4];
        bus.read_config(1 << 15, &mut id);
        assert_eq!(id, [1, 0, 2, 0]);
        for absent in [2 << 15, 1 << 15 | 1 << 12, ECAM_SIZE, u64::MAX - 3] {
            bus.read_config(absent, &mut id);
            assert_eq!(id, [0xff; 4]);
            bus.write_config(absent, &id);
        }
    }

    #[test]
    fn bar_follows_its_register() {
        let bus = PciBus::new();
        bus.add(memory(&bus)).unwrap();
        bus.write_memory(PCI_MMIO_START + 4, &[1, 2, 3, 4]);
        bus.write_config(1 << 15 | 0x10, &0xd000_0000u32.to_le_bytes());
        let mut data = [0; 4];
        bus.read_memory(PCI_MMIO_START + 4, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read_memory(0xd000_0004, &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
    }

    #[test]
    fn function_that_is_removed_answers_nowhere_and_its_number_is_free() {
        let bus = PciBus::new();
        bus.add(memory(&bus)).unwrap();
        let stays = bus.add(memory(&bus)).unwrap();
        // Where its guest put it.
        bus.write_config(1 << 15 | 0x10, &0xd000_0000u32.to_le_bytes());
        bus.write_memory(0xd000_0000, &[7; 4]);
        let removed = bus.remove(1).unwrap();
        let mut data = [0; 4];
        bus.read_config(1 << 15, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read_memory(0xd000_0000, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read_config(u64::from(stays) << 15, &mut data);
        assert_eq!(data, [1, 0, 2, 0]);
        assert!(bus.remove(1).is_none() && bus.remove(255).is_none());
        assert!(lock(&removed).write_config(0x10, &0xd100_0000u32.to_le_bytes()).is_empty());
        assert_eq!(bus.add(memory(&bus)), Ok(1));
    }

    #[test]
    fn access_over_the_end_of_a_bar_reaches_nobody() {
        let bus = PciBus::new();
        bus.add(memory(&bus)).unwrap();
        let mut data = [0; 4];
        bus.read_memory(PCI_MMIO_START + 14, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write_memory(u64::MAX, &data);
    }

    #[test]
    fn full_bus_says_so() {
        let bus = PciBus::new();
        for _ in 1..DEVICES {
            bus.add(memory(&bus)).unwrap();
        }
        assert_eq!(bus.add(memory(&bus)), Err(BusError::Full));
    }

    #[test]
    fn window_for_registers_ends() {
        let bus = PciBus::new();
        bus.allocate_bar(PCI_MMIO_SIZE).unwrap();
        assert_eq!(bus.allocate_bar(16), Err(BusError::NoWindow));
        assert_eq!(bus.allocate_wide_bar(16), Err(BusError::NoWindow));
        let bus = PciBus::with_high_window(1 << 38..1 << 39);
        assert_eq!(bus.allocate_wide_bar(0x1000), Ok(1 << 38));
        assert_eq!(bus.allocate_wide_bar(1 << 37), Ok(3 << 37));
        assert_eq!(bus.allocate_wide_bar(16), Err(BusError::NoWindow));
        assert_eq!(bus.allocate_wide_bar(1 << 63), Err(BusError::NoWindow));
    }
}
