//! MSI-X (PCI local bus specification 3.0, 6.8.2): the table of vectors that the guest writes, and
//! the event that a device triggers for each of them. A vector that is masked keeps what is
//! triggered in its event, and delivers it when it is unmasked.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::line::{Line, MsiError, MsiMessage, MsiRouter};

/// The capability's id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors a function may have.
pub const MAX_VECTORS: u16 = 2048;

const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;
const VECTOR_MASKED: u32 = 1;

#[derive(Debug)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    line: Line,
}

/// What the guest has written to a function's vectors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    /// Message, and whether it is masked.
    vectors: Vec<(MsiMessage, bool)>,
}

/// The vectors of a function.
pub struct MsixTable {
    vectors: Vec<Vector>,
    control: u16,
}

impl MsixTable {
    /// A table of `count` vectors, all masked.
    ///
    /// # Errors
    /// No lines or descriptors are left.
    pub fn new(count: u16, router: Arc<dyn MsiRouter>) -> Result<Self, MsiError> {
        let vectors = (0..count.min(MAX_VECTORS))
            .map(|_| {
                let line = Line::new(router.clone())?;
                Ok(Vector { message: MsiMessage::default(), masked: true, line })
            })
            .collect::<Result<_, MsiError>>()?;
        Ok(Self { vectors, control: 0 })
    }

    /// The capability's body after id and next pointer: control, table and pending bits.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let last = self.vectors.len().saturating_sub(1) as u16;
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        body
    }

    /// The same for a table and pending bits that lie where the function has them: BAR and offset.
    pub fn capability_at(&self, table: (u8, u64), pending: (u8, u64)) -> [u8; 10] {
        let mut body = self.capability(0, 0, 0);
        for ((bar, offset), place) in [table, pending].into_iter().zip([2, 6]) {
            // Offsets have 32 bits, of which the last three tell the BAR.
            let word = offset as u32 & !7 | u32::from(bar & 7);
            body[place..place + 4].copy_from_slice(&word.to_le_bytes());
        }
        body
    }

    /// How many vectors there are.
    pub fn count(&self) -> usize {
        self.vectors.len()
    }

    /// The events that trigger the vectors, in order.
    pub fn events(&self) -> impl Iterator<Item = Arc<EventFd>> + '_ {
        self.vectors.iter().map(|vector| vector.line.event.clone())
    }

    /// The bits of the capability's control register that the guest may write.
    pub const WRITABLE_CONTROL: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

    /// The event that triggers a vector, when there is such a vector.
    pub fn event(&self, vector: u16) -> Option<Arc<EventFd>> {
        self.vectors.get(usize::from(vector)).map(|vector| vector.line.event.clone())
    }

    /// Whether the guest enabled MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// Takes what the guest wrote to the capability's control register.
    pub fn set_control(&mut self, control: u16) {
        if self.control != control & Self::WRITABLE_CONTROL {
            self.control = control & Self::WRITABLE_CONTROL;
            (0..self.vectors.len()).for_each(|index| self.rewire(index));
        }
    }

    /// Reads the table. Accesses are 4 or 8 aligned bytes; others read as ones.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let Some(dwords) = dwords(offset, data.len()) else {
            data.fill(0xff);
            return;
        };
        for (dword, out) in dwords.zip(data.chunks_exact_mut(4)) {
            let value = self.vectors.get(dword / 4).map_or(u32::MAX, |vector| match dword % 4 {
                0 => vector.message.address as u32,
                1 => (vector.message.address >> 32) as u32,
                2 => vector.message.data,
                _ => u32::from(vector.masked),
            });
            out.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes the table. Accesses are 4 or 8 aligned bytes; others do nothing.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Some(dwords) = dwords(offset, data.len()) else { return };
        for (dword, value) in dwords.zip(data.chunks_exact(4)) {
            let Some(vector) = self.vectors.get_mut(dword / 4) else { return };
            let value = u32::from_le_bytes([value[0], value[1], value[2], value[3]]);
            let address = vector.message.address;
            match dword % 4 {
                0 => vector.message.address = address & !0xffff_ffff | u64::from(value & !3),
                1 => vector.message.address = address & 0xffff_ffff | u64::from(value) << 32,
                2 => vector.message.data = value,
                _ => vector.masked = value & VECTOR_MASKED != 0,
            }
            self.rewire(dword / 4);
        }
    }

    /// What the guest has written.
    pub fn state(&self) -> MsixState {
        let vectors = self.vectors.iter().map(|vector| (vector.message, vector.masked)).collect();
        MsixState { control: self.control, vectors }
    }

    /// Takes over what a guest had written to a table of the same size. An interrupt that was under
    /// way when the state was taken is not in it.
    ///
    /// Returns false when the table is of another size.
    pub fn restore(&mut self, state: &MsixState) -> bool {
        if state.vectors.len() != self.vectors.len() {
            return false;
        }
        for (vector, (message, masked)) in self.vectors.iter_mut().zip(&state.vectors) {
            (vector.message, vector.masked) = (*message, *masked);
        }
        self.set_control(state.control);
        true
    }

    /// Masks every vector and turns MSI-X off, as a reset does.
    pub fn reset(&mut self) {
        self.control = 0;
        for index in 0..self.vectors.len() {
            self.vectors[index].masked = true;
            self.vectors[index].message = MsiMessage::default();
            self.rewire(index);
        }
    }

    fn rewire(&mut self, index: usize) {
        let live = self.is_enabled() && self.control & CONTROL_FUNCTION_MASK == 0;
        let vector = &mut self.vectors[index];
        let wanted = (live && !vector.masked).then_some(vector.message);
        vector.line.send(wanted);
    }
}

fn dwords(offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let aligned = matches!(length, 4 | 8) && offset.is_multiple_of(length as u64);
    let first = usize::try_from(offset / 4).ok()?;
    aligned.then_some(first..first + length / 4)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, Option<MsiMessage>)>>, Mutex<Vec<u32>>);

    impl MsiRouter for Recorder {
        fn allocate(&self) -> Result<u32, MsiError> {
            Ok(24)
        }
        fn attach(&self, gsi: u32, _: &Arc<EventFd>, message: MsiMessage) -> Result<(), MsiError> {
            self.0.lock().unwrap().push((gsi, Some(message)));
            Ok(())
        }
        fn detach(&self, gsi: u32, _: &EventFd) -> Result<(), MsiError> {
            self.0.lock().unwrap().push((gsi, None));
            Ok(())
        }
        fn release(&self, gsi: u32) {
            self.1.lock().unwrap().push(gsi);
        }
    }

    fn table(count: u16) -> (Arc<Recorder>, MsixTable) {
        let recorder = Arc::new(Recorder::default());
        let table = MsixTable::new(count, recorder.clone()).unwrap();
        (recorder, table)
    }

    const MESSAGE: MsiMessage = MsiMessage { address: 0x1_fee0_1000, data: 0x41 };

    fn program(table: &mut MsixTable, vector: u64) {
        let base = vector * ENTRY_SIZE;
        table.write_table(base, &MESSAGE.address.to_le_bytes());
        table.write_table(base + 8, &MESSAGE.data.to_le_bytes());
        table.write_table(base + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn vector_is_attached_when_enabled_and_unmasked_and_detached_when_masked() {
        let (recorder, mut table) = table(2);
        program(&mut table, 1);
        assert!(recorder.0.lock().unwrap().is_empty());
        table.set_control(CONTROL_ENABLE);
        table.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        table.set_control(CONTROL_ENABLE);
        table.write_table(ENTRY_SIZE + 12, &1u32.to_le_bytes());
        let log = recorder.0.lock().unwrap();
        assert_eq!(*log, [(24, Some(MESSAGE)), (24, None), (24, Some(MESSAGE)), (24, None)]);
    }

    #[test]
    fn table_that_goes_detaches_its_vectors_and_gives_their_lines_back() {
        let (recorder, mut table) = table(2);
        program(&mut table, 1);
        table.set_control(CONTROL_ENABLE);
        drop(table);
        assert_eq!(*recorder.0.lock().unwrap(), [(24, Some(MESSAGE)), (24, None)]);
        assert_eq!(*recorder.1.lock().unwrap(), [24, 24]);
    }

    #[test]
    fn table_reads_what_was_written() {
        let (_, mut table) = table(2);
        program(&mut table, 1);
        let mut entry = [0; 8];
        table.read_table(ENTRY_SIZE, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), MESSAGE.address);
        table.read_table(ENTRY_SIZE + 8, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), u64::from(MESSAGE.data));
    }

    #[test]
    fn accesses_past_the_table_or_misaligned_do_nothing() {
        let (recorder, mut table) = table(1);
        table.set_control(CONTROL_ENABLE);
        for offset in [1, 2, 6, ENTRY_SIZE, ENTRY_SIZE * 100, u64::MAX - 3, u64::MAX - 7] {
            for length in [1, 2, 4, 8] {
                table.write_table(offset, &[0; 8][..length]);
                let mut data = [0; 8];
                table.read_table(offset, &mut data[..length]);
                assert_eq!(data[..length], [0xff; 8][..length], "{offset} {length}");
            }
        }
        assert!(recorder.0.lock().unwrap().is_empty());
    }

    #[test]
    fn state_wires_the_same_vectors_of_another_table() {
        let (_, mut first) = table(2);
        program(&mut first, 1);
        first.set_control(CONTROL_ENABLE);
        let (recorder, mut second) = table(2);
        assert!(second.restore(&first.state()));
        assert_eq!(*recorder.0.lock().unwrap(), [(24, Some(MESSAGE))]);
        assert_eq!(second.state(), first.state());
        let (recorder, mut third) = table(3);
        assert!(!third.restore(&first.state()));
        assert!(recorder.0.lock().unwrap().is_empty());
    }

    #[test]
    fn capability_tells_the_last_vector_and_the_places() {
        let (_, table) = table(3);
        let body = table.capability(0, 0x4000, 0x5000);
        assert_eq!(body, [2, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
        let body = table.capability_at((3, 0), (4, 0x2000));
        assert_eq!(body, [2, 0, 3, 0, 0, 0, 4, 0x20, 0, 0]);
    }
}
