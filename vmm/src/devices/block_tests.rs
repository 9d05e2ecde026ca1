use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;
use crate::devices::testing::{BUFFERS, Bench, RAM_BYTES, WRITE, ram};

const DATA: u64 = BUFFERS + 0x10000;
const STATUS: u64 = BUFFERS + 0x8000;
const SECTORS: u64 = 64;

struct Host {
    bench: Bench,
    file: File,
}

fn disk_file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..SECTORS * 512).map(|index| (index / 512) as u8 + 1).collect();
    file.write_all(&data).unwrap();
    file
}

fn host(read_only: bool) -> Host {
    let file = disk_file();
    let mut device = Block::new(file.try_clone().unwrap().into(), read_only, "vial-disk").unwrap();
    Host { bench: Bench::activate(&mut device, &ram()), file }
}

impl Host {
    fn header(&self, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.bench.write(BUFFERS, &header);
        self.bench.write(STATUS, &[0xee]);
    }

    fn status(&mut self, chain: &[(u64, u32, u16)]) -> u8 {
        assert!(self.bench.request(0, chain).is_some());
        self.bench.read(STATUS, 1)[0]
    }

    fn read(&mut self, sector: u64, bytes: u32) -> u8 {
        self.header(T_IN, sector);
        self.status(&[(BUFFERS, 16, 0), (DATA, bytes, WRITE), (STATUS, 1, WRITE)])
    }

    fn write(&mut self, sector: u64, bytes: u32) -> u8 {
        self.header(T_OUT, sector);
        self.status(&[(BUFFERS, 16, 0), (DATA, bytes, 0), (STATUS, 1, WRITE)])
    }

    fn clear(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
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
    assert!(matches!(Block::new(directory.into(), true, ""), Err(BlockError::Kind("directory"))));
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Block::new(null.into(), true, ""), Err(BlockError::Kind(_))));
    let small = tempfile::tempfile().unwrap();
    small.set_len(511).unwrap();
    assert!(matches!(Block::new(small.into(), true, ""), Err(BlockError::Empty(511))));
    let long = "123456789012345678901";
    assert!(matches!(Block::new(disk_file().into(), true, long), Err(BlockError::Serial(_))));
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(4096).unwrap();
    let reading = || File::open(named.path()).unwrap();
    assert!(matches!(Block::new(reading().into(), false, ""), Err(BlockError::Access)));
    assert!(Block::new(reading().into(), true, "12345678901234567890").is_ok());
}

#[test]
fn features_and_capacity_follow_the_file() {
    let file = disk_file();
    file.set_len(SECTORS * 512 + 511).unwrap();
    let writable = Block::new(file.try_clone().unwrap().into(), false, "").unwrap();
    assert_eq!(writable.config()[..8], SECTORS.to_le_bytes());
    assert_eq!(writable.features() & RO, 0);
    assert_ne!(writable.features() & DISCARD, 0);
    let read_only = Block::new(file.into(), true, "").unwrap();
    assert_ne!(read_only.features() & RO, 0);
    assert_eq!(read_only.features() & (DISCARD | WRITE_ZEROES), 0);
}

#[test]
fn sectors_are_read_and_written() {
    let mut host = host(false);
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

#[test]
fn request_beyond_the_disk_fails() {
    let mut host = host(false);
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

#[test]
fn read_only_disk_is_not_written() {
    let mut host = host(true);
    assert_eq!(host.write(0, 512), 1);
    assert_eq!(host.clear(T_DISCARD, &[(0, 1, 0)]), 1);
    assert_eq!(host.clear(T_WRITE_ZEROES, &[(0, 1, 0)]), 1);
    assert_eq!(host.read(0, 512), 0);
    assert_eq!(host.bench.read(DATA, 512), [1; 512]);
}

#[test]
fn serial_number_is_told() {
    let mut host = host(true);
    host.header(T_GET_ID, 0);
    let chain = [(BUFFERS, 16, 0), (DATA, 20, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(host.status(&chain), 0);
    assert_eq!(&host.bench.read(DATA, 20), b"vial-disk\0\0\0\0\0\0\0\0\0\0\0");
    host.header(T_GET_ID, 0);
    assert_eq!(host.status(&[(BUFFERS, 16, 0), (DATA, 3, WRITE), (STATUS, 1, WRITE)]), 0);
}

#[test]
fn ranges_are_cleared_within_their_bounds() {
    let mut host = host(false);
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

#[test]
fn unknown_request_is_not_supported() {
    let mut host = host(false);
    for kind in [2, 3, 14, u32::MAX] {
        host.header(kind, 0);
        assert_eq!(host.status(&[(BUFFERS, 16, 0), (STATUS, 1, WRITE)]), 2);
    }
}

#[test]
fn request_larger_than_the_limit_fails() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let mut device = Block::new(file.try_clone().unwrap().into(), true, "").unwrap();
    let mut host = Host { bench: Bench::activate(&mut device, &ram()), file };
    let most = MAX_REQUEST_BYTES as u32;
    assert_eq!(host.read(0, most), 0);
    assert_eq!(host.read(0, most + 512), 1);
}

#[test]
fn file_that_shrinks_fails_the_request_only() {
    let mut host = host(false);
    host.file.set_len(512).unwrap();
    assert_eq!(host.read(8, 512), 1);
    assert!(!host.bench.fault.is_reported());
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
        let mut host = host(false);
        host.header(T_IN, 0);
        assert_eq!(host.bench.request(0, chain), None, "{chain:?}");
        assert!(host.bench.fault.is_reported());
        host.bench.kick(0);
    }
}
