//! A hostile driver of a virtio network device, in a container of the guest that may do everything
//! there: it takes the device from the guest's kernel and writes its rings itself, in pages of its
//! own.
//!
//! Each attempt gives the device something that no driver would, and looks whether it says that it
//! needs a reset. After each the device is to work again.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::{Duration, Instant};

/// Of the device's BAR (`vmm/src/virtio/pci/transport.rs`).
const BAR_BYTES: usize = 0x8000;
const PAIRS: usize = 0x2000 + 8;
const NOTIFY: usize = 0x3000;
/// Fields of the common configuration (virtio 1.2, 4.1.4.3).
const OFFERED_SELECT: usize = 0x00;
const OFFERED: usize = 0x04;
const ACCEPTED_SELECT: usize = 0x08;
const ACCEPTED: usize = 0x0c;
const STATUS: usize = 0x14;
const QUEUE: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_ADDRESSES: [usize; 3] = [0x20, 0x28, 0x30];
/// `ACKNOWLEDGE`, `DRIVER`, `FEATURES_OK`, `DRIVER_OK` and `DEVICE_NEEDS_RESET` (2.1).
const STEPS: [u8; 3] = [1, 1 | 2, 1 | 2 | 8];
const RUNNING: u8 = 1 | 2 | 4 | 8;
const NEEDS_RESET: u8 = 64;
/// `VIRTIO_NET_F_MRG_RXBUF`, `VIRTIO_F_INDIRECT_DESC`; `VIRTIO_F_VERSION_1` of the upper half.
const FEATURES: [u32; 2] = [1 << 15 | 1 << 28, 1];
/// `VIRTIO_NET_F_CTRL_VQ` and `VIRTIO_NET_F_MQ`.
const SEVERAL_PAIRS: u32 = 1 << 17 | 1 << 22;

const PAGE: usize = 4096;
/// How many descriptors a ring has, and where in its page the others begin.
const SIZE: u16 = 16;
const AVAILABLE: usize = 0x400;
const USED: usize = 0x800;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// How long a device may take to say something.
const PATIENCE: Duration = Duration::from_secs(10);
/// A virtio header of zeros, and a frame to everybody of a type that nobody has (IEEE 802, local
/// experiments).
const FRAME_BYTES: u32 = 12 + 60;

/// A page whose address the device understands.
struct Shared {
    at: *mut u8,
    physical: u64,
}

impl Shared {
    fn new() -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_LOCKED;
        // SAFETY: a new mapping, which is never unmapped.
        let at = unsafe { libc::mmap(ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // An entry for each page: bits 0 to 54 are the frame's number (proc_pid_pagemap(5)).
        let mut map = File::open("/proc/self/pagemap")?;
        map.seek(SeekFrom::Start(at as u64 / PAGE as u64 * 8))?;
        let mut entry = [0; 8];
        map.read_exact(&mut entry)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        if frame == 0 {
            return Err(io::Error::other("the page's place is not told; run this privileged"));
        }
        Ok(Self { at: at.cast(), physical: frame * PAGE as u64 })
    }

    fn put<T>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= PAGE && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: within the page, and aligned; the device may see it at any moment.
        unsafe { self.at.add(offset).cast::<T>().write_volatile(value) };
    }

    fn get(&self, offset: usize) -> u16 {
        assert!(offset + 2 <= PAGE && offset.is_multiple_of(2));
        // SAFETY: as above.
        unsafe { self.at.add(offset).cast::<u16>().read_volatile() }
    }

    fn clear(&self) {
        (0..PAGE).step_by(8).for_each(|offset| self.put(offset, 0_u64));
    }
}

/// Where the answer to a command lies in the page for data, and what no device answers.
const ANSWER: usize = 0x100;
const NO_ANSWER: u8 = 0x77;
/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR`.
const DONE: u8 = 0;
const REFUSED: u8 = 1;

/// The device, with a page for each ring and one for data.
struct Device {
    bar: *mut u8,
    /// Two for each pair of queues, and where there are several pairs, that of commands.
    rings: Vec<Shared>,
    data: Shared,
    features: [u32; 2],
}

impl Device {
    /// That of an interface, which is gone by this.
    fn take(interface: &str) -> io::Result<Self> {
        let virtio = fs::canonicalize(Path::new("/sys/class/net").join(interface).join("device"))?;
        let name = virtio.file_name().unwrap_or_default().to_owned();
        let function: PathBuf = virtio.parent().unwrap_or(&virtio).into();
        fs::write(virtio.join("driver/unbind"), name.as_encoded_bytes())?;
        let resource = File::options().read(true).write(true).open(function.join("resource0"))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let descriptor = resource.as_raw_fd();
        // SAFETY: a new mapping, which is never unmapped.
        let bar = unsafe {
            libc::mmap(ptr::null_mut(), BAR_BYTES, protection, libc::MAP_SHARED, descriptor, 0)
        };
        if bar == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut device =
            Self { bar: bar.cast(), rings: Vec::new(), data: Shared::new()?, features: FEATURES };
        device.write(OFFERED_SELECT, 0_u32);
        let count = match device.read::<u32>(OFFERED) & SEVERAL_PAIRS {
            SEVERAL_PAIRS => {
                device.features[0] |= SEVERAL_PAIRS;
                2 * usize::from(device.read::<u16>(PAIRS)) + 1
            }
            _ => 2,
        };
        device.rings = (0..count).map(|_| Shared::new()).collect::<io::Result<_>>()?;
        Ok(device)
    }

    fn write<T>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= BAR_BYTES && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: within the BAR, whose registers take each write.
        unsafe { self.bar.add(offset).cast::<T>().write_volatile(value) };
    }

    fn read<T>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= BAR_BYTES && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: within the BAR; only read as numbers.
        unsafe { self.bar.add(offset).cast::<T>().read_volatile() }
    }

    fn status(&self) -> u8 {
        self.read(STATUS)
    }

    /// The ring of commands, if the device has one.
    fn control(&self) -> Option<usize> {
        (self.rings.len() > 2).then(|| self.rings.len() - 1)
    }

    fn reset(&self) {
        self.write(STATUS, 0_u8);
        let since = Instant::now();
        while self.status() != 0 && since.elapsed() < PATIENCE {}
        self.rings.iter().chain([&self.data]).for_each(Shared::clear);
    }

    /// Lets the device begin, with its rings where `place` says.
    fn begin(&self, place: impl Fn(usize) -> u64) {
        STEPS[..2].iter().for_each(|status| self.write(STATUS, *status));
        for (half, features) in (0_u32..).zip(self.features) {
            self.write(ACCEPTED_SELECT, half);
            self.write(ACCEPTED, features);
        }
        self.write(STATUS, STEPS[2]);
        for ring in 0..self.rings.len() {
            self.write(QUEUE, ring as u16);
            self.write(QUEUE_SIZE, SIZE);
            for (field, within) in QUEUE_ADDRESSES.into_iter().zip([0, AVAILABLE, USED]) {
                let at = place(ring) + within as u64;
                self.write(field, at as u32);
                self.write(field + 4, (at >> 32) as u32);
            }
            self.write(QUEUE_ENABLE, 1_u16);
        }
        self.write(STATUS, RUNNING);
    }

    fn describe(&self, ring: usize, index: u16, (at, bytes, flags, next): (u64, u32, u16, u16)) {
        let (page, offset) = (&self.rings[ring], usize::from(index) * 16);
        page.put(offset, at);
        page.put(offset + 8, bytes);
        page.put(offset + 12, flags);
        page.put(offset + 14, next);
    }

    /// Makes `head` available as the first of `count` chains, and kicks.
    fn offer(&self, ring: usize, head: u16, count: u16) {
        self.rings[ring].put(AVAILABLE + 4, head);
        self.rings[ring].put(AVAILABLE + 2, count);
        self.write(NOTIFY + 4 * ring, ring as u16);
    }

    fn is_broken_soon(&self) -> bool {
        let since = Instant::now();
        while since.elapsed() < PATIENCE {
            if self.status() & NEEDS_RESET != 0 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Gives a command of so many bytes at `at`, the first since the device has begun.
    fn command(&self, ring: usize, at: u64, bytes: u32) {
        self.data.put(ANSWER, NO_ANSWER);
        self.describe(ring, 0, (at, bytes, NEXT, 1));
        self.describe(ring, 1, (self.data.physical + ANSWER as u64, 1, WRITE, 0));
        self.offer(ring, 0, 1);
    }

    /// What the device answers to it. `count` commands have been given by then.
    fn answer(&self, ring: usize, count: u16) -> u8 {
        let since = Instant::now();
        while self.rings[ring].get(USED + 2) != count && since.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        (self.data.get(ANSWER) & 0xff) as u8
    }

    /// Whether a device that is asked for other numbers of pairs, over and over, answers each time,
    /// and says no at last.
    fn bears_changes(&self, ring: usize) -> bool {
        self.reset();
        self.begin(|ring| self.rings[ring].physical);
        let mut answers = [0_u32; 2];
        for count in 1..=400_u16 {
            self.data.put(0, [4_u8, 0, 1 + (count % 2) as u8, 0]);
            self.data.put(ANSWER, NO_ANSWER);
            if count == 1 {
                self.command(ring, self.data.physical, 4);
            } else {
                // The ring has the same head at each of its places: they are zeros.
                self.offer(ring, 0, count);
            }
            match self.answer(ring, count) {
                answer @ (DONE | REFUSED) => answers[usize::from(answer)] += 1,
                _ => return false,
            }
        }
        // Each second one asks for what is already, once the other has been refused.
        answers[usize::from(REFUSED)] > 100 && self.status() == RUNNING
    }

    /// Whether a frame is sent as it should be.
    fn works(&self) -> bool {
        self.reset();
        self.data.put(12, [0xff_u8; 6]);
        self.data.put(18, [2_u8, 0, 0, 0, 0, 1]);
        self.data.put(24, 0xb588_u16);
        self.begin(|ring| self.rings[ring].physical);
        self.describe(TRANSMIT, 0, (self.data.physical, FRAME_BYTES, 0, 0));
        self.offer(TRANSMIT, 0, 1);
        let since = Instant::now();
        while self.rings[TRANSMIT].get(USED + 2) != 1 && since.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.rings[TRANSMIT].get(USED + 2) == 1 && self.status() == RUNNING
    }
}

/// What makes no sense: a name, and what is done to the rings of a device that has begun.
type Attempt = (&'static str, fn(&Device));

/// What is asked of the device by its ring of commands, with the length of what it is to read: it is
/// to say no, and go on.
const COMMANDS: [(&str, [u8; 8], u32); 10] = [
    ("no pairs", [4, 0, 0, 0, 0, 0, 0, 0], 4),
    ("nine pairs", [4, 0, 9, 0, 0, 0, 0, 0], 4),
    ("65535 pairs", [4, 0, 0xff, 0xff, 0, 0, 0, 0], 4),
    ("a number of pairs in one byte", [4, 0, 1, 0, 0, 0, 0, 0], 3),
    ("a number of pairs in six bytes", [4, 0, 1, 0, 0, 0, 0, 0], 8),
    ("pairs by hashes, which it has not offered", [4, 1, 1, 0, 0, 0, 0, 0], 4),
    ("promiscuous mode, which it has not offered", [0, 0, 1, 0, 0, 0, 0, 0], 3),
    ("another address, which it has not offered", [1, 1, 2, 0, 0, 0, 0, 1], 8),
    ("a class that nobody knows", [255, 255, 1, 0, 0, 0, 0, 0], 4),
    ("a command of one byte", [4, 0, 1, 0, 0, 0, 0, 0], 1),
];

/// The same that makes no sense at all.
type ControlAttempt = (&'static str, fn(&Device, usize));

const CONTROL_ATTEMPTS: [ControlAttempt; 5] = [
    ("a command without room for an answer", |device, ring| {
        device.describe(ring, 0, (device.data.physical, 4, 0, 0));
        device.offer(ring, 0, 1);
    }),
    ("a command that is no memory", |device, ring| device.command(ring, 1 << 45, 4)),
    ("a command after its answer", |device, ring| {
        let at = device.data.physical;
        device.describe(ring, 0, (at + ANSWER as u64, 1, NEXT | WRITE, 1));
        device.describe(ring, 1, (at, 4, 0, 0));
        device.offer(ring, 0, 1);
    }),
    ("an answer that is no memory", |device, ring| {
        device.describe(ring, 0, (device.data.physical, 4, NEXT, 1));
        device.describe(ring, 1, (1 << 45, 1, WRITE, 0));
        device.offer(ring, 0, 1);
    }),
    ("more commands than the ring has", |device, ring| device.offer(ring, 0, 1000)),
];

const ATTEMPTS: [Attempt; 9] = [
    ("more chains than the ring has", |device| device.offer(TRANSMIT, 0, 1000)),
    ("a chain beyond the ring", |device| device.offer(TRANSMIT, SIZE, 1)),
    ("a buffer that is no memory", |device| {
        device.describe(TRANSMIT, 0, (1 << 45, FRAME_BYTES, 0, 0));
        device.offer(TRANSMIT, 0, 1);
    }),
    ("a buffer that ends beyond all addresses", |device| {
        device.describe(TRANSMIT, 0, (u64::MAX - 8, FRAME_BYTES, 0, 0));
        device.offer(TRANSMIT, 0, 1);
    }),
    ("a chain that never ends", |device| {
        for index in 0..SIZE {
            let next = (index + 1) % SIZE;
            device.describe(TRANSMIT, index, (device.data.physical, 12, NEXT, next));
        }
        device.offer(TRANSMIT, 0, 1);
    }),
    ("a chain that goes on beyond the ring", |device| {
        device.describe(TRANSMIT, 0, (device.data.physical, FRAME_BYTES, NEXT, u16::MAX));
        device.offer(TRANSMIT, 0, 1);
    }),
    ("an indirect table of half a descriptor", |device| {
        device.describe(TRANSMIT, 0, (device.data.physical, 24, INDIRECT, 0));
        device.offer(TRANSMIT, 0, 1);
    }),
    ("a packet to be sent that is to be written", |device| {
        device.describe(TRANSMIT, 0, (device.data.physical, FRAME_BYTES, WRITE, 0));
        device.offer(TRANSMIT, 0, 1);
    }),
    // Not looked at before a packet comes.
    ("room for packets that is no memory", |device| {
        for index in 0..SIZE {
            device.rings[RECEIVE].put(AVAILABLE + 4 + 2 * usize::from(index), index);
            device.describe(RECEIVE, index, (1 << 45, 60_000, WRITE, 0));
        }
        device.offer(RECEIVE, 0, SIZE);
    }),
];

/// Tries all on an interface's device. Returns what did not go as it should.
///
/// # Errors
/// The device cannot be taken.
pub(crate) fn try_all(interface: &str) -> io::Result<Vec<String>> {
    let device = Device::take(interface)?;
    let mut wrong = Vec::new();
    let mut note = |what: &str, is_right: bool| {
        println!("{} {what}", if is_right { "ok" } else { "WRONG" });
        wrong.extend((!is_right).then(|| what.to_owned()));
    };
    note("a packet of a driver that keeps to the rules goes out", device.works());
    for (name, attempt) in ATTEMPTS {
        device.reset();
        device.begin(|ring| device.rings[ring].physical);
        attempt(&device);
        note(name, device.is_broken_soon());
        note("it works again after a reset", device.works());
    }
    if let Some(ring) = device.control() {
        for (name, bytes, count) in COMMANDS {
            device.reset();
            device.data.put(0, bytes);
            device.begin(|ring| device.rings[ring].physical);
            device.command(ring, device.data.physical, count);
            let refused = device.answer(ring, 1) == REFUSED && device.status() == RUNNING;
            note(&format!("{name} is refused"), refused);
        }
        for (name, attempt) in CONTROL_ATTEMPTS {
            device.reset();
            device.data.put(0, [4_u8, 0, 2, 0]);
            device.begin(|ring| device.rings[ring].physical);
            attempt(&device, ring);
            note(name, device.is_broken_soon());
            note("it works again after a reset", device.works());
        }
        note("changes without end are refused", device.bears_changes(ring));
        note("it works again after a reset", device.works());
    }
    for place in [1 << 45, device.rings[RECEIVE].physical + 1] {
        device.reset();
        device.begin(|_| place);
        note(&format!("rings at {place:#x}"), device.is_broken_soon());
    }
    note("it works again after a reset", device.works());
    device.reset();
    Ok(wrong)
}
