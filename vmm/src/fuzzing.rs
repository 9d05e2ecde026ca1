//! What fuzz targets drive (`tests/fuzz`): devices and the bus, by a script of what a guest does.
//!
//! A script is a run of bytes. Each step begins with one that says what is done, and takes its
//! numbers, little endian, from those behind it; the script ends where it has too few. Every run of
//! bytes is a script, so a mutated one is, too.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};

use vial_vmm_api::DiskShape;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::ECAM_SIZE;
use crate::devices::block::Block;
use crate::devices::net::on_socket::OnSocket;
use crate::devices::testing::{BUFFERS, Bench, NEXT, WRITE, ram};
use crate::event_loop::EventLoop;
use crate::pci::bus::lock;
use crate::pci::line::{MsiError, MsiMessage, MsiRouter};
use crate::pci::{PciBus, SharedFunction};
use crate::snapshot::Snapshot;
use crate::virtio::VirtioDevice;
use crate::virtio::pci::{Doorbells, TransportError, VirtioPci, Workers};

/// The most buffers of a chain that a script offers whole. Longer ones it links by hand.
const CHAIN: u8 = 6;
/// The virtio transport's place for the device's status in its BAR (virtio 1.2, 4.1.4.3).
const DEVICE_STATUS: u64 = 0x14;

struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number<const BYTES: usize>(&mut self) -> Option<u64> {
        let mut eight = [0; 8];
        eight[..BYTES].copy_from_slice(self.bytes(BYTES)?);
        Some(u64::from_le_bytes(eight))
    }

    fn byte(&mut self) -> Option<u8> {
        self.number::<1>().map(|number| number as u8)
    }

    /// An address: most often of a buffer, sometimes of the rings, sometimes any.
    fn address(&mut self) -> Option<u64> {
        match self.byte()? % 8 {
            0 => self.number::<8>(),
            1 => self.number::<4>(),
            2 => self.number::<2>(),
            _ => Some(BUFFERS + self.number::<2>()?),
        }
    }
}

/// Lets a driver do to a device what a script says, up to a reset.
///
/// # Panics
/// When the device does, or does not come to rest.
pub fn drive(device: &mut dyn VirtioDevice, script: &[u8]) {
    let mut script = Script(script);
    let mut bench = Bench::activate(device, &ram());
    bench.settle();
    while step(&mut bench, &mut script).is_some() {}
    bench.settle();
    bench.reset();
}

fn step(bench: &mut Bench, script: &mut Script<'_>) -> Option<()> {
    let kind = script.byte()?;
    let queue = usize::from(script.byte()?) % bench.queues.len();
    match kind % 8 {
        0 | 1 => {
            let at = script.number::<2>()?;
            let count = script.byte()?;
            bench.write(BUFFERS + at, script.bytes(usize::from(count))?);
        }
        2 | 3 => {
            let mut chain = Vec::new();
            for _ in 0..=script.byte()? % CHAIN {
                let flags = u16::from(script.byte()? & 7) & !NEXT;
                let address = script.address()?;
                chain.push((address, script.number::<2>()? as u32, flags));
            }
            bench.queues[queue].offer(&chain);
        }
        4 => {
            let (index, address) = (script.byte()?, script.address()?);
            let (bytes, flags, next) =
                (script.number::<4>()? as u32, script.number::<2>()? as u16, script.byte()?);
            let table = bench.queues[queue].table();
            let descriptor = (address, bytes, flags, u16::from(next));
            bench.queues[queue].write_descriptor(table, u16::from(index), descriptor);
        }
        5 => bench.queues[queue].offer_head(script.number::<2>()? as u16),
        6 => bench.queues[queue].set_available_index(script.number::<2>()? as u16),
        _ => bench.kick(queue),
    }
    Some(())
}

/// A disk with that data: with three queues by a ring of io_uring, where the kernel makes one, or with one queue.
///
/// # Panics
/// When it can be no disk.
#[allow(unsafe_code)]
pub fn disk(data: OwnedFd, read_only: bool, by_ring: bool) -> Block {
    let made = by_ring.then(|| vial_ring::make(data.as_fd(), !read_only).ok()).flatten();
    let ring = made.map(|(ring, layout)| {
        // SAFETY: they are of one ring.
        unsafe { vial_ring::Ring::adopt(ring, layout).expect("its memory") }
    });
    let shape = DiskShape { queues: if by_ring { 3 } else { 1 }, ..DiskShape::default() };
    Block::new(data, read_only, "fuzzed", &shape, ring).expect("a disk")
}

/// Offers a queue of the device `count` buffers that the device may write to, before any script.
fn offer_room(bench: &mut Bench, queue: usize, count: u64, bytes: u32) {
    for index in 0..count {
        let address = BUFFERS + (1 << 20) + index * u64::from(bytes);
        bench.queues[queue].offer(&[(address, bytes, WRITE)]);
    }
    bench.kick(queue);
}

/// Drives a network device, of one pair of queues or of three with a control queue, whose other
/// side sends the first packets of `network`, each with its length in a byte before it.
///
/// # Panics
/// As [`drive`].
pub fn drive_net(tap: OwnedFd, network: &OwnedFd, script: &[u8]) {
    let mut script = Script(script);
    let first = script.byte().unwrap_or_default();
    let (packets, has_several) = (first % 4, first & 4 != 0);
    let others = (0..2).filter(|_| has_several).map(|_| tap.try_clone().expect("a descriptor"));
    let taps = others.collect::<Vec<_>>().into_iter().chain([tap]).collect();
    let mut device = OnSocket::new(taps, 1500);
    let mut bench = Bench::activate(&mut device, &ram());
    offer_room(&mut bench, 0, 8, 2048);
    for _ in 0..packets {
        let packet = script.byte().and_then(|bytes| script.bytes(usize::from(bytes)));
        // A full socket drops it, as a network may.
        let _ = rustix::io::write(network, packet.unwrap_or_default());
    }
    while step(&mut bench, &mut script).is_some() {}
    bench.settle();
    bench.reset();
}

/// Reads the state of a machine, without the checksum that keeps accidents out, but not an author.
pub fn read_state(body: &[u8]) {
    if let Ok(snapshot) = Snapshot::of_body(body) {
        let mut file = Vec::new();
        snapshot.write(&mut file).expect("what was read can be written");
    }
}

/// Lines that lead nowhere.
#[derive(Default)]
struct NoLines(Mutex<u32>);

impl MsiRouter for NoLines {
    fn allocate(&self) -> Result<u32, MsiError> {
        let mut next = lock(&self.0);
        *next += 1;
        Ok(*next)
    }
    fn attach(&self, _: u32, _: &Arc<EventFd>, _: MsiMessage) -> Result<(), MsiError> {
        Ok(())
    }
    fn detach(&self, _: u32, _: &EventFd) -> Result<(), MsiError> {
        Ok(())
    }
    fn release(&self, _: u32) {}
}

struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn watch(&self, _: u64, _: &EventFd) -> Result<(), TransportError> {
        Ok(())
    }
    fn unwatch(&self, _: u64, _: &EventFd) -> Result<(), TransportError> {
        Ok(())
    }
}

/// Lets a guest read and write configuration space and BARs of a bus with these devices.
///
/// # Panics
/// When something there does.
pub fn drive_bus(devices: Vec<Box<dyn VirtioDevice>>, script: &[u8]) {
    static LOOP: OnceLock<EventLoop> = OnceLock::new();
    let io = LOOP.get_or_init(|| EventLoop::start("fuzzed", || Ok(())).expect("a thread"));
    let bus = PciBus::new();
    let router = Arc::new(NoLines::default());
    let mut functions: Vec<SharedFunction> = Vec::new();
    for device in devices {
        let workers = Workers { io: io.clone(), file_server: None, vhost_user: None };
        let function = VirtioPci::new(
            device,
            Some(&bus),
            ram(),
            router.clone(),
            Arc::new(NoDoorbells),
            workers,
        );
        let function: SharedFunction = Arc::new(Mutex::new(function.expect("a function")));
        bus.add(function.clone()).expect("a place on the bus");
        functions.push(function);
    }
    let mut script = Script(script);
    while access(&bus, &functions, &mut script).is_some() {}
    for function in functions {
        // Takes the worker off its loop.
        lock(&function).write_bar(0, DEVICE_STATUS, &[0]);
    }
}

fn access(bus: &PciBus, functions: &[SharedFunction], script: &mut Script<'_>) -> Option<()> {
    let kind = script.byte()?;
    let bytes = [1, 2, 4, 8][usize::from(kind >> 6)];
    let which = usize::from(script.byte()?) % functions.len();
    let mut data = [0; 8];
    match kind % 8 {
        0 => bus.read_config(script.number::<4>()? % (2 * ECAM_SIZE), &mut data[..bytes]),
        1 => {
            let at = script.number::<4>()? % (2 * ECAM_SIZE);
            bus.write_config(at, script.bytes(bytes)?);
        }
        2 | 3 => {
            // The host bridge is device 0.
            let at = (which as u64 + 1) << 15 | script.number::<2>()? & 0xfff;
            bus.write_config(at, script.bytes(bytes)?);
        }
        4 => bus.read_memory(script.number::<8>()?, &mut data[..bytes]),
        5 => bus.write_memory(script.number::<8>()?, script.bytes(bytes)?),
        _ => {
            let base = lock(&functions[which]).config().decoded_bars().next()?.1;
            let address = base.checked_add(script.number::<2>()? & 0x7fff)?;
            bus.write_memory(address, script.bytes(bytes)?);
            bus.read_memory(address, &mut data[..bytes]);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::balloon::Balloon;
    use crate::devices::mem::{Mem, Room};
    use crate::devices::rng::Rng;
    use crate::memory::Discards;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_script_leaves_a_device_that_can_be_reset(script: Vec<u8>) {
            drive(&mut Rng::new(), &script);
        }

        #[test]
        fn any_script_leaves_the_memory_device_a_region(script: Vec<u8>) {
            let room = Room { start: 32 << 20, bytes: 1 << 30, present: 32 << 20 };
            let mut device = Mem::new(room, Discards::default());
            drive(&mut device, &script);
            let mut plugged = [0; 8];
            device.read_config(40, &mut plugged);
            prop_assert!(u64::from_le_bytes(plugged) <= room.present);
        }

        #[test]
        fn any_script_leaves_a_balloon_that_can_be_reset(script: Vec<u8>) {
            drive(&mut Balloon::new(Discards::default()), &script);
        }

        #[test]
        fn any_access_leaves_a_bus_that_can_be_left(script: Vec<u8>) {
            drive_bus(vec![Box::new(Rng::new()), Box::new(Rng::new())], &script);
        }
    }
}
