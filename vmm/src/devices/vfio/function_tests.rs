use std::sync::Mutex;

use proptest::prelude::*;

use super::super::registers::{self, HEADER_BYTES};
use super::*;
use crate::pci::config::Identity;
use crate::pci::line::{MsiError, MsiMessage, MsiRouter};

/// What was done to the host, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Done {
    Config(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Interrupts(Interrupts, usize),
    Reset,
    Place(u32, Option<u64>),
    Release(u32),
}

#[derive(Default, Clone)]
struct Recorder(Arc<Mutex<Vec<Done>>>);

impl Recorder {
    fn add(&self, done: Done) {
        self.0.lock().unwrap().push(done);
    }

    fn take(&self) -> Vec<Done> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Host for Recorder {
    fn write_config(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.add(Done::Config(offset, data.to_vec()));
        Ok(())
    }
    fn read_region(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.add(Done::Read(offset, data.len()));
        data.fill(0x77);
        Ok(())
    }
    fn write_region(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.add(Done::Write(offset, data.to_vec()));
        Ok(())
    }
    fn set_interrupts(&self, kind: Interrupts, events: &[Arc<EventFd>]) -> io::Result<()> {
        self.add(Done::Interrupts(kind, events.len()));
        Ok(())
    }
    fn reset(&self) -> io::Result<()> {
        self.add(Done::Reset);
        Ok(())
    }
}

impl Windows for Recorder {
    fn place(&self, window: u32, at: Option<u64>) -> io::Result<()> {
        self.add(Done::Place(window, at));
        Ok(())
    }
    fn release(&self, window: u32) {
        self.add(Done::Release(window));
    }
}

impl MsiRouter for Recorder {
    fn allocate(&self) -> Result<u32, MsiError> {
        Ok(24)
    }
    fn attach(&self, _: u32, _: &Arc<EventFd>, _: MsiMessage) -> Result<(), MsiError> {
        Ok(())
    }
    fn detach(&self, _: u32, _: &EventFd) -> Result<(), MsiError> {
        Ok(())
    }
    fn release(&self, _: u32) {}
}

const BAR0: u64 = 0xc000_0000;
const BAR2: u64 = 0x80_0000_0000;
const TABLE: u64 = 0x1000;
const PENDING: u64 = 0x2000;

/// A function like a card's: BAR 0 with registers and the MSI-X table, BAR 2 wide.
fn function() -> (Recorder, PassedFunction) {
    let recorder = Recorder::default();
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x8086,
        device: 0x10ca,
        revision: 1,
        class: [0, 0, 2],
        subsystem_vendor: 0,
        subsystem: 0,
    });
    config.add_bar(0, 0x4000, BAR0 as u32).unwrap();
    config.add_wide_bar(2, 0x1_0000, BAR2, true).unwrap();
    let served = |host_offset, windows: &[(u64, u32)]| {
        let window = |number| Window::new(number, Arc::new(recorder.clone()));
        let windows = windows.iter().map(|(at, number)| (*at, window(*number))).collect();
        Some(ServedBar { host_offset, windows })
    };
    let bars = [
        served(0x10_0000, &[(0, 0), (0x3000, 1)]),
        None,
        served(0x20_0000, &[(0, 2)]),
        None,
        None,
        None,
    ];
    let msix = Msix { vectors: 3, table: (0, TABLE), pending: (0, PENDING) };
    let mut header = [0; HEADER_BYTES];
    // Capabilities: PCI Express, at 0x40.
    (header[0x06], header[0x34], header[0x40], header[0x42]) = (0x10, 0x40, 0x10, 2);
    let found = Found { msix: Some(msix), ..registers::find(&header) };
    let table = MsixTable::new(3, Arc::new(recorder.clone())).unwrap();
    let function = PassedFunction::new(
        Box::new(recorder.clone()),
        [0xc000_0000..0xe000_0000, 1 << 39..1 << 40],
        config,
        bars,
        &found,
        Some(table),
        None,
    )
    .unwrap();
    (recorder, function)
}

/// Where the capability with that id is.
fn capability(function: &PassedFunction, id: u8) -> u16 {
    let mut at = function.config.u16_at(0x34) & 0xff;
    while function.config.u16_at(at.into()) & 0xff != u16::from(id) {
        at = function.config.u16_at(at.into()) >> 8;
        assert_ne!(at, 0, "no capability {id:#x}");
    }
    at
}

#[test]
fn memory_is_placed_and_answers_from_the_start() {
    let (recorder, _function) = function();
    let mut log = recorder.take();
    assert_eq!(log.remove(0), Done::Config(COMMAND, vec![0x02, 0x04]));
    let place = |window, at| Done::Place(window, Some(at));
    assert_eq!(log, [place(0, BAR0), place(1, BAR0 + 0x3000), place(2, BAR2)]);
}

#[test]
fn bar_that_leaves_the_windows_is_shown_nowhere() {
    let (recorder, mut function) = function();
    recorder.take();
    function.write_config(0x10, &0xfee0_0000u32.to_le_bytes());
    assert_eq!(recorder.take(), [Done::Place(0, None), Done::Place(1, None)]);
    function.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    let log = recorder.take();
    assert_eq!(log[2..], [Done::Place(0, Some(0xd000_0000)), Done::Place(1, Some(0xd000_3000))]);
    // A wide one at the very end of all addresses.
    function.write_config(0x18, &u32::MAX.to_le_bytes());
    recorder.take();
    function.write_config(0x1c, &u32::MAX.to_le_bytes());
    assert_eq!(recorder.take(), [Done::Place(2, None)]);
}

#[test]
fn switching_memory_off_hides_it_from_the_guest_and_not_from_the_host() {
    let (recorder, mut function) = function();
    recorder.take();
    function.write_config(COMMAND, &0u16.to_le_bytes());
    let hidden = [0, 1, 2].map(|window| Done::Place(window, None));
    assert_eq!(recorder.take(), hidden);
    function.write_config(COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    let log = recorder.take();
    assert_eq!(log.len(), 4);
    assert_eq!(log[3], Done::Config(COMMAND, vec![0x06, 0x04]));
}

#[test]
fn table_stays_here_and_the_rest_goes_to_the_host() {
    let (recorder, mut function) = function();
    recorder.take();
    function.write_bar(0, TABLE + 16, &0x1234_5678_u64.to_le_bytes());
    let mut data = [0; 8];
    function.read_bar(0, TABLE + 16, &mut data);
    assert_eq!(u64::from_le_bytes(data), 0x1234_5678);
    function.write_bar(0, PENDING, &[0xff; 8]);
    function.read_bar(0, PENDING, &mut data);
    assert_eq!(data, [0; 8]);
    assert!(recorder.take().is_empty());
    function.read_bar(0, TABLE + 48, &mut data[..4]);
    function.write_bar(2, 0x10, &[1, 2, 3, 4]);
    assert_eq!(
        recorder.take(),
        [Done::Read(0x10_0000 + TABLE + 48, 4), Done::Write(0x20_0010, vec![1, 2, 3, 4])]
    );
    // An access that begins before the table and ends in it.
    function.write_bar(0, TABLE - 4, &[0xff; 8]);
    function.read_bar(0, TABLE, &mut data[..4]);
    assert_eq!(data[..4], [0; 4]);
    assert!(recorder.take().is_empty());
}

#[test]
fn all_vectors_are_delivered_when_msix_is_turned_on_and_none_after() {
    let (recorder, mut function) = function();
    let control = capability(&function, 0x11) + 2;
    recorder.take();
    function.write_config(control, &0xc000u16.to_le_bytes());
    function.write_config(control, &0x8000u16.to_le_bytes());
    assert_eq!(recorder.take(), [Done::Interrupts(Interrupts::Msix, 3)]);
    function.write_config(control, &0u16.to_le_bytes());
    assert_eq!(recorder.take(), [Done::Interrupts(Interrupts::Msix, 0)]);
}

#[test]
fn function_that_is_taken_off_is_stopped_and_follows_no_write_any_more() {
    let (recorder, mut function) = function();
    let control = capability(&function, 0x11) + 2;
    function.write_config(control, &0x8000u16.to_le_bytes());
    recorder.take();
    function.detach();
    let released = [0, 1, 2].map(Done::Release);
    let log = recorder.take();
    assert_eq!(log[..2], [Done::Interrupts(Interrupts::Msix, 0), Done::Reset]);
    assert_eq!(log[2..], released);
    // What was found on the bus just before.
    let changes = function.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert!(changes.is_empty());
    function.write_bar(0, 0x10, &[1; 4]);
    let mut data = [0; 4];
    for offset in [0x10, TABLE, PENDING] {
        function.read_bar(0, offset, &mut data);
        assert_eq!(data, [0xff; 4], "{offset:#x}");
    }
    function.detach();
    drop(function);
    assert_eq!(recorder.take(), []);
}

#[test]
fn reset_by_the_guest_goes_on_and_memory_answers_again() {
    let (recorder, mut function) = function();
    let (_, here) = function.control.unwrap();
    recorder.take();
    function.write_config(here, &(0x2810u16 | registers::FUNCTION_LEVEL_RESET).to_le_bytes());
    let log = recorder.take();
    assert_eq!(log[0], Done::Config(0x48, vec![0x10, 0xa8]));
    assert_eq!(log[1], Done::Config(COMMAND, vec![0x02, 0x04]));
    assert_eq!(function.config.u16_at(here.into()), 0x2810);
}

proptest! {
    /// Whatever the guest writes, the host only hears of the command register and of device
    /// control, in which no bit is set that is not let through, and windows stay in their places.
    #[test]
    fn any_writes_reach_little_of_the_host(
        writes in proptest::collection::vec(
            (0u16..1024, proptest::collection::vec(any::<u8>(), 1..5), any::<bool>()),
            0..64,
        )
    ) {
        let (recorder, mut function) = function();
        recorder.take();
        for (at, data, bar) in &writes {
            if *bar {
                function.write_bar(0, TABLE + u64::from(at % 48), data);
            } else {
                function.write_config(at & !3, data);
            }
        }
        for done in recorder.take() {
            match done {
                Done::Config(COMMAND, command) => {
                    prop_assert!(command == [0x02, 0x04] || command == [0x06, 0x04]);
                }
                Done::Config(at, control) => {
                    prop_assert_eq!(at, 0x48);
                    prop_assert_eq!(u16::from_le_bytes([control[0], control[1]]) & !0xf9f0, 0);
                }
                Done::Place(_, Some(at)) => {
                    prop_assert!((0xc000_0000..0xe000_0000).contains(&at) || at >> 39 == 1);
                }
                Done::Place(_, None) | Done::Interrupts(Interrupts::Msix, 0 | 3) => {}
                Done::Write(at, _) => prop_assert!(at >= 0x10_0000 + TABLE + 48),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
