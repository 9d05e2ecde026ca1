//! The common configuration structure (virtio 1.2, 4.1.4.3), and the driver's way through it
//! (3.1): a pure state machine. What the driver may still write depends on how far it has come:
//! after `FEATURES_OK` no features, after a queue is enabled nothing of that queue.

use serde::{Deserialize, Serialize};

use crate::virtio::FEATURE_VERSION_1;

/// `ACKNOWLEDGE` (virtio 1.2, 2.1).
pub const STATUS_ACKNOWLEDGE: u8 = 1;
/// `DRIVER`.
pub const STATUS_DRIVER: u8 = 2;
/// `DRIVER_OK`.
pub const STATUS_DRIVER_OK: u8 = 4;
/// `FEATURES_OK`.
pub const STATUS_FEATURES_OK: u8 = 8;
/// `DEVICE_NEEDS_RESET`.
pub const STATUS_NEEDS_RESET: u8 = 64;
/// `FAILED`.
pub const STATUS_FAILED: u8 = 128;

/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xffff;

/// What a queue's registers hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The largest size, as offered.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// The MSI-X vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// Whether the driver enabled it. It can not take that back but by a reset.
    pub enabled: bool,
    /// The descriptor table's address.
    pub descriptors: u64,
    /// The available ring's address.
    pub driver: u64,
    /// The used ring's address.
    pub device: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }
}

/// What the transport has to do after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The driver set `DRIVER_OK`: hand the queues to the device.
    Activate,
    /// The driver wrote 0 to the status: take them back.
    Reset,
}

/// The common configuration structure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    status: u8,
    config_vector: u16,
    vectors: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    /// The registers of a device that offers `features`, with a queue for each of `queue_sizes`
    /// and `vectors` MSI-X vectors.
    pub fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered: features | FEATURE_VERSION_1,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            status: 0,
            config_vector: NO_VECTOR,
            vectors,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
        }
    }

    /// What was negotiated.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the queues are the device's.
    pub fn is_active(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    /// The MSI-X vector of configuration changes, or [`NO_VECTOR`].
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The queues' registers.
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Takes over the registers of the same device in another machine. Returns false, and changes
    /// nothing, when the device is another or a driver could not have brought them there.
    pub fn restore(&mut self, saved: &Self) -> bool {
        let queue_fits = |(own, saved): (&QueueRegisters, &QueueRegisters)| {
            own.max_size == saved.max_size
                && saved.size.is_power_of_two()
                && saved.size <= saved.max_size
                && self.valid_vector(saved.vector) == saved.vector
        };
        let fits = self.offered == saved.offered
            && self.vectors == saved.vectors
            && self.queues.len() == saved.queues.len()
            && self.queues.iter().zip(&saved.queues).all(queue_fits)
            && saved.accepted & !saved.offered == 0
            && self.valid_vector(saved.config_vector) == saved.config_vector
            && saved.status & (STATUS_NEEDS_RESET | STATUS_FAILED) == 0;
        if fits {
            *self = saved.clone();
        }
        fits
    }

    /// Tells the driver that the device is broken.
    pub fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// Reads 1, 2 or 4 bytes; 8 are read as two fields. Where no field begins, it reads as zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if data.len() == 8 {
            let (low, high) = data.split_at_mut(4);
            self.read(offset, low);
            self.read(offset.wrapping_add(4), high);
            return;
        }
        let queue = self.selected();
        let word = |value: u64, half: u64| (value >> (32 * half)) as u32;
        let value = match (offset, data.len()) {
            (0x00, 4) => self.offered_select,
            (0x04, 4) => feature_word(self.offered, self.offered_select),
            (0x08, 4) => self.accepted_select,
            (0x0c, 4) => feature_word(self.accepted, self.accepted_select),
            (0x10, 2) => self.config_vector.into(),
            (0x12, 2) => self.queues.len() as u32,
            (0x14, 1) => self.status.into(),
            (0x15, 1) => 0, // The configuration space never changes while it is read.
            (0x16, 2) => self.queue_select.into(),
            (0x18, 2) => queue.map_or(0, |queue| queue.size.into()),
            (0x1a, 2) => queue.map_or(NO_VECTOR, |queue| queue.vector).into(),
            (0x1c, 2) => queue.is_some_and(|queue| queue.enabled).into(),
            (0x1e, 2) => queue.map_or(0, |_| self.queue_select.into()),
            (0x20 | 0x24, 4) => queue.map_or(0, |q| word(q.descriptors, (offset - 0x20) / 4)),
            (0x28 | 0x2c, 4) => queue.map_or(0, |q| word(q.driver, (offset - 0x28) / 4)),
            (0x30 | 0x34, 4) => queue.map_or(0, |q| word(q.device, (offset - 0x30) / 4)),
            _ => 0,
        };
        let length = data.len().min(4);
        data[..length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    /// Writes a field: 1, 2 or 4 bytes, or 8 as two fields. What is not writable at this point of
    /// the driver's way is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match *data {
            [a] => self.write_field(offset, 1, a.into()),
            [a, b] => self.write_field(offset, 2, u16::from_le_bytes([a, b]).into()),
            [a, b, c, d] => self.write_field(offset, 4, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_field(offset, 4, u32::from_le_bytes([a, b, c, d]));
                self.write_field(offset.wrapping_add(4), 4, u32::from_le_bytes([e, f, g, h]))
            }
            _ => Action::None,
        }
    }

    fn write_field(&mut self, offset: u64, length: usize, value: u32) -> Action {
        let half = value as u16; // Fields of 2 bytes come with 2 bytes.
        match (offset, length) {
            (0x00, 4) => self.offered_select = value,
            (0x08, 4) => self.accepted_select = value,
            (0x0c, 4) => self.accept_features(value),
            (0x10, 2) if !self.is_active() => self.config_vector = self.valid_vector(half),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = half,
            (0x18, 2) => self.change_queue(|queue| {
                if half.is_power_of_two() && half <= queue.max_size {
                    queue.size = half;
                }
            }),
            (0x1a, 2) => {
                let vector = self.valid_vector(half);
                self.change_queue(|queue| queue.vector = vector);
            }
            (0x1c, 2) if half == 1 => self.change_queue(|queue| queue.enabled = true),
            (0x20 | 0x24, 4) => {
                self.change_queue(|queue| set_half(&mut queue.descriptors, offset != 0x20, value))
            }
            (0x28 | 0x2c, 4) => {
                self.change_queue(|queue| set_half(&mut queue.driver, offset != 0x28, value));
            }
            (0x30 | 0x34, 4) => {
                self.change_queue(|queue| set_half(&mut queue.device, offset != 0x30, value));
            }
            _ => {}
        }
        Action::None
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Changes the selected queue, unless its registers are frozen.
    fn change_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        let frozen = self.is_active() || self.status & STATUS_FEATURES_OK == 0;
        let selected = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = selected.filter(|queue| !frozen && !queue.enabled) {
            change(queue);
        }
    }

    fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn accept_features(&mut self, value: u32) {
        let negotiating = self.status & STATUS_DRIVER != 0 && self.status & STATUS_FEATURES_OK == 0;
        if negotiating && self.accepted_select < 2 {
            set_half(&mut self.accepted, self.accepted_select == 1, value);
        }
    }

    fn write_status(&mut self, status: u8) -> Action {
        if status == 0 {
            let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
            *self = Self::new(self.offered, &sizes, self.vectors);
            return Action::Reset;
        }
        // A driver adds bits, one step after the other, and never takes one back.
        let added = status & !self.status;
        if self.status & !status & !STATUS_NEEDS_RESET != 0 || self.status & STATUS_FAILED != 0 {
            return Action::None;
        }
        let acceptable =
            self.accepted & !self.offered == 0 && self.accepted & FEATURE_VERSION_1 != 0;
        let mut allowed = STATUS_ACKNOWLEDGE | STATUS_FAILED;
        let reached = self.status | added;
        if reached & STATUS_ACKNOWLEDGE != 0 {
            allowed |= STATUS_DRIVER;
        }
        if reached & STATUS_DRIVER != 0 && acceptable {
            allowed |= STATUS_FEATURES_OK;
        }
        if self.status & STATUS_FEATURES_OK != 0 && self.status & STATUS_NEEDS_RESET == 0 {
            allowed |= STATUS_DRIVER_OK;
        }
        self.status |= added & allowed;
        if added & allowed & STATUS_DRIVER_OK != 0 { Action::Activate } else { Action::None }
    }
}

fn feature_word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_half(target: &mut u64, high: bool, value: u32) {
    *target = if high {
        *target & 0xffff_ffff | u64::from(value) << 32
    } else {
        *target & !0xffff_ffff | u64::from(value)
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FEATURE: u64 = 1 << 5;

    fn registers() -> Registers {
        Registers::new(FEATURE, &[256, 64], 3)
    }

    fn status(registers: &mut Registers, bits: u8) -> Action {
        registers.write(0x14, &[bits])
    }

    fn negotiate(registers: &mut Registers) {
        status(registers, 1);
        status(registers, 3);
        registers.write(0x08, &1u32.to_le_bytes());
        registers.write(0x0c, &1u32.to_le_bytes());
        status(registers, 11);
        assert_eq!(registers.status(), 11);
    }

    #[test]
    fn driver_that_follows_the_steps_activates_the_device() {
        let mut registers = registers();
        negotiate(&mut registers);
        registers.write(0x16, &1u16.to_le_bytes());
        registers.write(0x18, &32u16.to_le_bytes());
        registers.write(0x1a, &2u16.to_le_bytes());
        registers.write(0x20, &0x1_2345_6000u64.to_le_bytes());
        registers.write(0x28, &0x7000u32.to_le_bytes());
        registers.write(0x30, &0x8000u32.to_le_bytes());
        registers.write(0x1c, &1u16.to_le_bytes());
        assert_eq!(status(&mut registers, 15), Action::Activate);
        let queue = registers.queues()[1];
        assert!(queue.enabled && !registers.queues()[0].enabled);
        assert_eq!((queue.size, queue.vector), (32, 2));
        assert_eq!(
            (queue.descriptors, queue.driver, queue.device),
            (0x1_2345_6000, 0x7000, 0x8000)
        );
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let mut registers = registers();
        status(&mut registers, 3);
        registers.write(0x0c, &u32::MAX.to_le_bytes());
        registers.write(0x08, &1u32.to_le_bytes());
        registers.write(0x0c, &1u32.to_le_bytes());
        status(&mut registers, 11);
        assert_eq!(registers.status() & STATUS_FEATURES_OK, 0);
    }

    #[test]
    fn legacy_driver_is_refused() {
        let mut registers = registers();
        status(&mut registers, 3);
        status(&mut registers, 11);
        assert_eq!(registers.status() & STATUS_FEATURES_OK, 0);
        assert_eq!(status(&mut registers, 15), Action::None);
    }

    #[test]
    fn enabled_queue_and_negotiated_features_are_frozen() {
        let mut registers = registers();
        negotiate(&mut registers);
        registers.write(0x20, &0x1000u32.to_le_bytes());
        registers.write(0x1c, &1u16.to_le_bytes());
        let before = registers.clone();
        registers.write(0x20, &0x2000u32.to_le_bytes());
        registers.write(0x18, &2u16.to_le_bytes());
        registers.write(0x1a, &1u16.to_le_bytes());
        registers.write(0x1c, &0u16.to_le_bytes());
        registers.write(0x0c, &0u32.to_le_bytes());
        assert_eq!(registers.queues(), before.queues());
        assert_eq!(registers.features(), before.features());
    }

    #[test]
    fn vector_that_does_not_exist_reads_back_as_none() {
        let mut registers = registers();
        negotiate(&mut registers);
        registers.write(0x1a, &3u16.to_le_bytes());
        let mut vector = [0; 2];
        registers.read(0x1a, &mut vector);
        assert_eq!(u16::from_le_bytes(vector), NO_VECTOR);
    }

    #[test]
    fn reset_forgets_everything() {
        let mut registers = registers();
        negotiate(&mut registers);
        registers.write(0x1c, &1u16.to_le_bytes());
        status(&mut registers, 15);
        assert_eq!(status(&mut registers, 0), Action::Reset);
        assert_eq!((registers.status(), registers.features()), (0, 0));
        assert!(!registers.queues()[0].enabled);
    }

    #[test]
    fn registers_that_no_driver_can_write_are_not_taken_over() {
        let mut saved = registers();
        negotiate(&mut saved);
        status(&mut saved, 15);
        let mut fresh = registers();
        assert!(fresh.restore(&saved));
        assert_eq!(fresh, saved);
        let spoils: [fn(&mut Registers); 9] = [
            |r| r.offered |= 1,
            |r| r.vectors += 1,
            |r| r.accepted |= 1 << 60,
            |r| r.config_vector = 3,
            |r| r.status |= STATUS_NEEDS_RESET,
            |r| r.queues[0].max_size = 512,
            |r| r.queues[0].size = 512,
            |r| r.queues[1].vector = 3,
            |r| r.queues.truncate(1),
        ];
        for spoil in spoils {
            let mut spoilt = saved.clone();
            spoil(&mut spoilt);
            let mut fresh = registers();
            assert!(!fresh.restore(&spoilt), "{spoilt:?}");
            assert_eq!(fresh, registers());
        }
    }

    proptest! {
        /// Whatever a driver writes, once active the device's queues stay as they were handed
        /// over, sizes are within bounds, and activation comes once a reset.
        #[test]
        fn any_writes_keep_the_promises(
            writes in proptest::collection::vec(
                (0u64..0x40, proptest::sample::select(vec![1usize, 2, 4, 8]), any::<u64>(), any::<bool>()),
                0..200,
            )
        ) {
            let mut registers = registers();
            let mut active: Option<Vec<QueueRegisters>> = None;
            for (offset, length, value, small) in writes {
                let value = if small { value & 0xf } else { value };
                match registers.write(offset, &value.to_le_bytes()[..length]) {
                    Action::Activate => {
                        prop_assert!(active.is_none());
                        prop_assert_eq!(registers.features() & !(FEATURE | FEATURE_VERSION_1), 0);
                        active = Some(registers.queues().to_vec());
                    }
                    Action::Reset => active = None,
                    Action::None => {}
                }
                if let Some(queues) = &active {
                    prop_assert_eq!(registers.queues(), queues.as_slice());
                }
                for queue in registers.queues() {
                    prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
                    prop_assert!(queue.vector < 3 || queue.vector == NO_VECTOR);
                }
                let mut data = [0; 8];
                registers.read(offset, &mut data[..length]);
            }
        }
    }
}
