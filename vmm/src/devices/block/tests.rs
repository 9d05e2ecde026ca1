use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vial_vmm_api::DiscardLimits;

use super::request::{FLAG_UNMAP, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use super::*;
use crate::devices::testing::{BUFFERS, Bench, RAM_BYTES, WRITE, ram};

pub(super) const DATA: u64 = BUFFERS + 0x10000;
pub(super) const STATUS: u64 = BUFFERS + 0x8000;
pub(super) const SECTORS: u64 = 64;

pub(super) struct Host {
    pub(super) bench: Bench,
    pub(super) file: File,
}

pub(super) fn disk_file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..SECTORS * 512).map(|index| (index / 512) as u8 + 1).collect();
    file.write_all(&data).unwrap();
    file
}

/// A ring for a file.
pub(super) fn ring(file: &impl AsFd, writes: bool) -> Ring {
    let (ring, layout) = vial_ring::make(file.as_fd(), writes).unwrap();
    // SAFETY: they are of one ring.
    #[allow(unsafe_code)]
    unsafe {
        Ring::adopt(ring, layout).unwrap()
    }
}

fn plain(file: &File, read_only: bool, serial: &str) -> Result<Block, BlockError> {
    let disk = file.try_clone().unwrap().into();
    Block::new(disk, read_only, serial, &DiskShape::default(), None)
}

pub(super) fn with(file: File, read_only: bool, shape: &DiskShape, by_ring: bool) -> Host {
    let ring = by_ring.then(|| ring(&file, !read_only));
    let disk = file.try_clone().unwrap().into();
    let mut device = Block::new(disk, read_only, "vial-disk", shape, ring).unwrap();
    Host { bench: Bench::activate(&mut device, &ram()), file }
}

/// A disk by system calls, and one by a ring: they are the same to a driver.
fn hosts(read_only: bool) -> [Host; 2] {
    [false, true].map(|by_ring| with(disk_file(), read_only, &DiskShape::default(), by_ring))
}

impl Host {
    pub(super) fn header(&self, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.bench.write(BUFFERS, &header);
        self.bench.write(STATUS, &[0xee]);
    }

    pub(super) fn status(&mut self, chain: &[(u64, u32, u16)]) -> u8 {
        assert!(self.bench.answer(0, chain).is_some());
        self.bench.read(STATUS, 1)[0]
    }

    pub(super) fn read(&mut self, sector: u64, bytes: u32) -> u8 {
        self.header(T_IN, sector);
        self.status(&[(BUFFERS, 16, 0), (DATA, bytes, WRITE), (STATUS, 1, WRITE)])
    }

    pub(super) fn write(&mut self, sector: u64, bytes: u32) -> u8 {
        self.header(T_OUT, sector);
        self.status(&[(BUFFERS, 16, 0), (DATA, bytes, 0), (STATUS, 1, WRITE)])
    }

    pub(super) fn clear(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        self.header(kind, 0);
        let mut data = Vec::new();
        for (sector, sectors, flags) in ranges {
            data.extend(sector.to_le_bytes());
            data.extend(sectors.to_le_bytes());
            data.extend(flags.to_le_bytes());
        }
        self.bench.write(DATA, &data);
        self.status(&[(BUFFERS, 16, 0), (DATA, data.len() as u32, 0), (STATUS, 1, WRITE)])
    }
}

#[test]
fn files_that_are_no_disk_are_refused() {
    let directory = File::open("/").unwrap();
    assert!(matches!(plain(&directory, true, ""), Err(BlockError::Kind("directory"))));
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(plain(&null, true, ""), Err(BlockError::Kind(_))));
    let small = tempfile::tempfile().unwrap();
    small.set_len(511).unwrap();
    assert!(matches!(plain(&small, true, ""), Err(BlockError::Empty { bytes: 511, block: 512 })));
    let long = "123456789012345678901";
    assert!(matches!(plain(&disk_file(), true, long), Err(BlockError::Serial(_))));
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(4096).unwrap();
    let reading = || File::open(named.path()).unwrap();
    assert!(matches!(plain(&reading(), false, ""), Err(BlockError::Access)));
    assert!(plain(&reading(), true, "12345678901234567890").is_ok());
}

#[test]
fn features_and_capacity_follow_the_file() {
    let file = disk_file();
    file.set_len(SECTORS * 512 + 511).unwrap();
    let writable = plain(&file, false, "").unwrap();
    assert_eq!(writable.config()[..8], SECTORS.to_le_bytes());
    assert_eq!(writable.features() & RO, 0);
    assert_ne!(writable.features() & DISCARD, 0);
    let read_only = plain(&file, true, "").unwrap();
    assert_ne!(read_only.features() & RO, 0);
    assert_eq!(read_only.features() & (DISCARD | WRITE_ZEROES), 0);
}

#[test]
fn sectors_are_read_and_written() {
    for mut host in hosts(false) {
        assert_eq!(host.read(2, 1024), 0);
        assert_eq!(host.bench.read(DATA, 1024), [[3; 512], [4; 512]].concat());
        host.bench.write(DATA, &[9; 512]);
        assert_eq!(host.write(63, 512), 0);
        let mut sector = [0; 512];
        host.file.read_exact_at(&mut sector, 63 * 512).unwrap();
        assert_eq!(sector, [9; 512]);
        host.header(T_FLUSH, 0);
        assert_eq!(host.status(&[(BUFFERS, 16, 0), (STATUS, 1, WRITE)]), 0);
    }
}

#[test]
fn request_beyond_the_disk_fails() {
    for mut host in hosts(false) {
        let before = host.file.metadata().unwrap().len();
        for (sector, bytes) in
            [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (1 << 55, 512)]
        {
            assert_eq!(host.read(sector, bytes), 1, "{sector}");
            assert_eq!(host.write(sector, bytes), 1, "{sector}");
        }
        for bytes in [1, 511, 513] {
            assert_eq!(host.read(0, bytes), 1);
            assert_eq!(host.write(0, bytes), 1);
        }
        assert_eq!(host.file.metadata().unwrap().len(), before);
    }
}

#[test]
fn read_only_disk_is_not_written() {
    for mut host in hosts(true) {
        assert_eq!(host.write(0, 512), 1);
        assert_eq!(host.clear(T_DISCARD, &[(0, 1, 0)]), 1);
        assert_eq!(host.clear(T_WRITE_ZEROES, &[(0, 1, 0)]), 1);
        assert_eq!(host.read(0, 512), 0);
        assert_eq!(host.bench.read(DATA, 512), [1; 512]);
    }
}

#[test]
fn serial_number_is_told() {
    for mut host in hosts(true) {
        host.header(T_GET_ID, 0);
        let chain = [(BUFFERS, 16, 0), (DATA, 20, WRITE), (STATUS, 1, WRITE)];
        assert_eq!(host.status(&chain), 0);
        assert_eq!(&host.bench.read(DATA, 20), b"vial-disk\0\0\0\0\0\0\0\0\0\0\0");
        host.header(T_GET_ID, 0);
        assert_eq!(host.status(&[(BUFFERS, 16, 0), (DATA, 3, WRITE), (STATUS, 1, WRITE)]), 0);
    }
}

#[test]
fn ranges_are_cleared_within_their_bounds() {
    for mut host in hosts(false) {
        let outcome = host.clear(T_WRITE_ZEROES, &[(1, 2, 0), (4, 1, FLAG_UNMAP)]);
        // Not every file system can; then it says so.
        assert!(outcome == 0 || outcome == 2);
        if outcome == 0 {
            let mut data = [0xff; 6 * 512];
            host.file.read_exact_at(&mut data, 0).unwrap();
            let firsts: Vec<u8> = data.chunks(512).map(|sector| sector[511]).collect();
            assert_eq!(firsts, [1, 0, 0, 4, 0, 6]);
        }
        assert_eq!(host.clear(T_DISCARD, &[(63, 2, 0)]), 1);
        assert_eq!(host.clear(T_DISCARD, &[(u64::MAX, u32::MAX, 0)]), 1);
        assert_eq!(host.clear(T_DISCARD, &[(0, 1, 1)]), 2);
        assert_eq!(host.clear(T_WRITE_ZEROES, &[(0, 1, 2)]), 2);
        assert_eq!(host.clear(T_DISCARD, &[(0, 0, 0); MAX_RANGES]), 0);
        assert_eq!(host.clear(T_DISCARD, &[(0, 0, 0); MAX_RANGES + 1]), 1);
        assert_eq!(host.clear(T_DISCARD, &[]), 1);
    }
}

#[test]
fn unknown_request_is_not_supported() {
    for mut host in hosts(false) {
        for kind in [2, 3, 14, u32::MAX] {
            host.header(kind, 0);
            assert_eq!(host.status(&[(BUFFERS, 16, 0), (STATUS, 1, WRITE)]), 2);
        }
    }
}

#[test]
fn request_larger_than_the_limit_fails() {
    for by_ring in [false, true] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let mut host = with(file, true, &DiskShape::default(), by_ring);
        let most = MAX_REQUEST_BYTES as u32;
        assert_eq!(host.read(0, most), 0);
        assert_eq!(host.read(0, most + 512), 1);
    }
}

#[test]
fn file_that_shrinks_fails_the_request_only() {
    for mut host in hosts(false) {
        host.file.set_len(512).unwrap();
        assert_eq!(host.read(8, 512), 1);
        assert!(!host.bench.fault.is_reported());
    }
}

#[test]
fn malformed_chains_break_the_device() {
    let chains: [&[(u64, u32, u16)]; 5] = [
        &[(BUFFERS, 15, 0), (STATUS, 1, WRITE)],
        &[(BUFFERS, 16, 0)],
        &[(BUFFERS, 16, WRITE)],
        &[(BUFFERS, 16, 0), (RAM_BYTES as u64, 512, WRITE), (STATUS, 1, WRITE)],
        &[(STATUS, 1, WRITE), (BUFFERS, 16, 0)],
    ];
    for chain in chains {
        for mut host in hosts(false) {
            host.header(T_IN, 0);
            assert_eq!(host.bench.answer(0, chain), None, "{chain:?}");
            host.bench.kick(0);
            assert_eq!(host.bench.queues[0].take_used(), None);
        }
    }
}

#[test]
fn configuration_tells_the_shape() {
    let shape = DiskShape {
        queues: 8,
        logical_block: 4096,
        physical_block: 16384,
        io_sizes: (8192, 1 << 20),
        cache: DiskCache::Direct { alignment: 512 },
        discard: Some(DiscardLimits { granularity: 65536, bytes: 1 << 40 }),
    };
    let file = disk_file();
    let mut device = Block::new(file.try_clone().unwrap().into(), false, "", &shape, None).unwrap();
    let told = |offset: usize, bytes: usize| {
        let mut eight = [0; 8];
        eight[..bytes].copy_from_slice(&device.config()[offset..offset + bytes]);
        u64::from_le_bytes(eight)
    };
    assert_eq!((told(0, 8), told(20, 4), told(24, 1)), (SECTORS, 4096, 2));
    assert_eq!((told(26, 2), told(28, 4), told(34, 2)), (2, 256, 8));
    assert_eq!((told(36, 4), told(44, 4), told(56, 1)), (MAX_RANGE_SECTORS.into(), 128, 1));
    assert_eq!((device.queue_sizes(), device.features() & MQ), (&[QUEUE_SIZE; 8][..], MQ));
    // Of the whole space, the driver changes one byte.
    device.write_config(0, &[0; CONFIG_BYTES]);
    let mut after = [0; CONFIG_BYTES];
    device.read_config(0, &mut after);
    let mut expected = device.config;
    expected[WRITEBACK] = 0;
    assert_eq!(after, expected);
    device.write_config(WRITEBACK, &[7]);
    device.read_config(WRITEBACK, &mut after[..1]);
    assert_eq!(after[0], 1);
    device.write_config(WRITEBACK + 1, &[0; 64]);
    device.write_config(usize::MAX, &[0]);
    device.read_config(WRITEBACK, &mut after[..1]);
    assert_eq!(after[0], 1);
    let none = DiskShape { discard: None, ..shape };
    let device = Block::new(file.into(), false, "", &none, None).unwrap();
    assert_eq!(
        (device.features() & (DISCARD | WRITE_ZEROES), device.config[56]),
        (WRITE_ZEROES, 0)
    );
}

#[test]
fn shapes_past_the_bounds_are_refused() {
    let good = DiskShape::default;
    let direct = |alignment| DiskCache::Direct { alignment };
    for shape in [
        DiskShape { queues: 0, ..good() },
        DiskShape { queues: 9, ..good() },
        DiskShape { logical_block: 256, ..good() },
        DiskShape { logical_block: 1000, physical_block: 4096, ..good() },
        DiskShape { logical_block: 128 << 10, physical_block: 128 << 10, ..good() },
        DiskShape { logical_block: 4096, physical_block: 512, ..good() },
        DiskShape { physical_block: 2 << 20, ..good() },
        DiskShape { physical_block: 1536, ..good() },
        DiskShape { cache: direct(0), ..good() },
        DiskShape { cache: direct(3), ..good() },
        DiskShape { cache: direct(8192), ..good() },
    ] {
        let refused = Block::new(disk_file().into(), true, "", &shape, None);
        assert!(matches!(refused, Err(BlockError::Shape(_))), "{shape:?}");
    }
}

#[test]
fn requests_of_parts_of_blocks_fail() {
    let shape = DiskShape { logical_block: 4096, physical_block: 4096, ..DiskShape::default() };
    for by_ring in [false, true] {
        let mut host = with(disk_file(), false, &shape, by_ring);
        for (sector, bytes) in [(0, 512), (1, 4096), (8, 2048), (4, 8192)] {
            assert_eq!((host.read(sector, bytes), host.write(sector, bytes)), (1, 1));
        }
        assert_eq!((host.read(8, 4096), host.write(56, 4096)), (0, 0));
        assert_eq!(host.clear(T_WRITE_ZEROES, &[(1, 8, 0)]), 1);
    }
}
