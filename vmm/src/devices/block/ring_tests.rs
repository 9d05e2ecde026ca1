//! Requests that are in flight: of a pipe, whose reader they wait for as long as a test wants.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use proptest::prelude::*;

use super::engine::Engine;
use super::flight::MAX_BYTES;
use super::request::{T_FLUSH, T_IN, T_OUT};
use super::tests::{DATA, SECTORS, STATUS, disk_file, ring, with};
use super::*;
use crate::devices::testing::{BUFFERS, Bench, INDIRECT, RAM_BYTES, WRITE, ram};
use crate::memory::{Discards, GuestRam, map_ram};

/// Where the tests put the header of a request, its data and its status.
fn places(number: u64) -> (u64, u64, u64) {
    (BUFFERS + number * 64, DATA + number * 4096, STATUS + number)
}

fn offer(bench: &mut Bench, queue: usize, number: u64, (kind, sector): (u32, u64)) -> u16 {
    let (header, data, status) = places(number);
    let mut words = kind.to_le_bytes().to_vec();
    words.extend([0; 4]);
    words.extend(sector.to_le_bytes());
    bench.write(header, &words);
    bench.write(status, &[0xee]);
    let flags = if kind == T_IN { WRITE } else { 0 };
    let all = [(header, 16, 0), (data, 512, flags), (status, 1, WRITE)];
    match kind {
        T_FLUSH => bench.queues[queue].offer(&[all[0], all[2]]),
        _ => bench.queues[queue].offer(&all),
    }
}

/// A disk whose reads wait until somebody writes to the pipe.
fn waiting(ram: &GuestRam, queues: u8) -> (Bench, File) {
    let (reads, writes) = rustix::pipe::pipe().unwrap();
    let shape = DiskShape { queues, ..DiskShape::default() };
    let mut device = Block::new(disk_file().into(), false, "", &shape, None).unwrap();
    device.engine = Arc::new(Mutex::new(Some(Engine::by_ring(ring(&reads, true), None))));
    (Bench::activate(&mut device, ram), File::from(writes))
}

fn until(bench: &mut Bench, mut done: impl FnMut(&mut Bench) -> bool) {
    let late = std::time::Instant::now() + Duration::from_secs(20);
    while !done(bench) {
        assert!(std::time::Instant::now() < late, "it does not come");
        std::thread::yield_now();
        bench.settle();
    }
}

#[test]
fn requests_of_all_queues_are_in_flight_together_and_errors_are_their_own() {
    let (mut bench, mut pipe) = waiting(&ram(), 3);
    for queue in 0..3 {
        offer(&mut bench, queue, queue as u64, (T_IN, 0));
        bench.kick(queue);
    }
    // A pipe cannot be flushed: that ends, and fails, while those that came before it wait.
    let flush = offer(&mut bench, 1, 9, (T_FLUSH, 0));
    bench.kick(1);
    let mut used = None;
    until(&mut bench, |bench| {
        used = used.or(bench.queues[1].take_used());
        used.is_some()
    });
    assert_eq!(used, Some((flush, 1)));
    assert_eq!((bench.read(places(9).2, 1), bench.read(STATUS, 3)), (vec![1], vec![0xee; 3]));
    assert!([0, 2].iter().all(|queue| bench.queues[*queue].take_used().is_none()));
    pipe.write_all(&[5; 512 * 3]).unwrap();
    for queue in 0..3 {
        until(&mut bench, |bench| bench.queues[queue].take_used().is_some());
        assert!(bench.queues[queue].interrupted());
        assert_eq!(bench.read(places(queue as u64).1, 512), [5; 512]);
    }
    assert_eq!(bench.read(STATUS, 3), [0; 3]);
}

#[test]
fn request_that_the_host_splits_is_whole() {
    let (mut bench, mut pipe) = waiting(&ram(), 1);
    offer(&mut bench, 0, 0, (T_IN, 0));
    bench.kick(0);
    for part in 0..4u8 {
        assert_eq!(bench.queues[0].take_used(), None);
        pipe.write_all(&[part; 128]).unwrap();
        until(&mut bench, |bench| bench.read(DATA + u64::from(part) * 128, 1) == [part]);
    }
    until(&mut bench, |bench| bench.queues[0].take_used().is_some());
    assert_eq!((bench.read(DATA + 511, 1), bench.read(STATUS, 1)), (vec![3], vec![0]));
}

#[test]
fn end_of_the_file_fails_the_request() {
    let (mut bench, pipe) = waiting(&ram(), 1);
    offer(&mut bench, 0, 0, (T_IN, 0));
    bench.kick(0);
    drop(pipe);
    until(&mut bench, |bench| bench.queues[0].take_used().is_some());
    assert_eq!(bench.read(STATUS, 1), [1]);
    assert!(!bench.fault.is_reported());
}

/// A disk without room, by either means: the request fails, the device goes on.
#[test]
fn full_disk_fails_the_request() {
    for by_ring in [false, true] {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let shape = DiskShape::default();
        let mut device = Block::new(disk_file().into(), false, "", &shape, None).unwrap();
        let engine = match by_ring {
            true => Engine::by_ring(ring(&full, true), None),
            false => Engine::by_calls(full.into(), None),
        };
        device.engine = Arc::new(Mutex::new(Some(engine)));
        let mut bench = Bench::activate(&mut device, &ram());
        for (kind, status) in [(T_OUT, 1), (T_IN, 0), (T_OUT, 1)] {
            offer(&mut bench, 0, 0, (kind, 0));
            bench.kick(0);
            until(&mut bench, |bench| bench.queues[0].take_used().is_some());
            assert_eq!(bench.read(STATUS, 1), [status]);
        }
        assert!(!bench.fault.is_reported());
    }
}

/// Without a cache in between, a block device of the host is written, flushed and cleared, and one that has lost its bytes
/// fails the requests to them.
#[test]
fn block_device_of_the_host_is_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![3; 1 << 20]).unwrap();
    let losetup = |words: &[&std::ffi::OsStr]| {
        let ended = std::process::Command::new("losetup").args(words).output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
        String::from_utf8(ended.stdout).unwrap().trim().to_owned()
    };
    let node = losetup(&["--find".as_ref(), "--show".as_ref(), path.as_ref()]);
    let mut options = File::options();
    options.read(true).write(true);
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_DIRECT);
    let opened = options.open(&node);
    // It goes when nobody has it.
    losetup(&["--detach".as_ref(), node.as_ref()]);
    let shape = DiskShape { cache: DiskCache::Direct { alignment: 512 }, ..DiskShape::default() };
    let mut host = with(opened.unwrap(), false, &shape, true);
    assert_eq!(host.read(0, 4096), 0);
    assert_eq!(host.bench.read(DATA, 4096), [3; 4096]);
    host.bench.write(DATA, &[4; 4096]);
    assert_eq!(host.write(8, 4096), 0);
    host.header(T_FLUSH, 0);
    assert_eq!(host.status(&[(BUFFERS, 16, 0), (STATUS, 1, WRITE)]), 0);
    assert_eq!(std::fs::read(&path).unwrap()[4096..8192], [4; 4096]);
    // The file's bytes are gone behind the device's back.
    File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
    assert_eq!((host.read(64, 4096), host.read(8, 4096)), (1, 0));
    assert!(!host.bench.fault.is_reported());
}

/// A reset, or unplugging, returns when nothing reads into the guest's memory any more, and not before.
#[test]
fn worker_that_ends_lets_what_is_in_flight_end() {
    let ram = ram();
    let (mut bench, mut pipe) = waiting(&ram, 2);
    for number in 0..4 {
        offer(&mut bench, number as usize % 2, number, (T_IN, 0));
        bench.kick(number as usize % 2);
    }
    let writer = std::thread::spawn(move || {
        for part in 0..4u8 {
            std::thread::sleep(Duration::from_millis(30));
            pipe.write_all(&[part + 1; 512]).unwrap();
        }
        std::time::Instant::now()
    });
    bench.reset();
    let ended = std::time::Instant::now();
    assert!(ended >= writer.join().unwrap() - Duration::from_millis(5));
    let read = |address, bytes: usize| {
        let mut data = vec![0; bytes];
        vm_memory::Bytes::read_slice(&ram, &mut data, vm_memory::GuestAddress(address)).unwrap();
        data
    };
    assert_eq!(read(STATUS, 4), [0; 4]);
    let mut parts: Vec<u8> = (0..4).flat_map(|n| read(places(n).1, 1)).collect();
    parts.sort_unstable();
    assert_eq!(parts, [1, 2, 3, 4]);
}

/// A driver that breaks its queue loses the device, and what is in flight still ends where it was to end.
#[test]
fn queue_that_breaks_with_requests_in_flight_is_not_answered() {
    let (mut bench, mut pipe) = waiting(&ram(), 1);
    offer(&mut bench, 0, 0, (T_IN, 0));
    bench.kick(0);
    bench.queues[0].offer(&[(BUFFERS, 15, 0), (STATUS, 1, WRITE)]);
    bench.kick(0);
    assert!(bench.fault.is_reported());
    pipe.write_all(&[5; 512]).unwrap();
    until(&mut bench, |bench| bench.read(DATA, 1) == [5]);
    bench.settle();
    assert_eq!((bench.queues[0].take_used(), bench.read(STATUS, 1)), (None, vec![0xee]));
    bench.reset();
}

/// A page that the guest gives back while the host reads into it is the host's until the read has ended, and nobody else's.
#[test]
fn memory_that_goes_back_meanwhile_is_no_memory_of_others() {
    let ram = map_ram(RAM_BYTES as u64).unwrap();
    let (mut bench, mut pipe) = waiting(&ram, 1);
    offer(&mut bench, 0, 0, (T_IN, 0));
    bench.kick(0);
    Discards::default().discard(&ram, DATA..DATA + 4096).unwrap();
    let other = vec![7u8; 1 << 20];
    pipe.write_all(&[5; 512]).unwrap();
    until(&mut bench, |bench| bench.queues[0].take_used().is_some());
    assert_eq!(bench.read(STATUS, 1), [0]);
    assert!(other.iter().all(|byte| *byte == 7));
    // A read by copying goes to the page that the guest has now.
    assert_eq!(bench.read(DATA, 512), [5; 512]);
}

/// More than the window holds waits in the queue, and is served when there is room.
#[test]
fn bytes_in_flight_are_bounded() {
    let ram = ram();
    let (mut bench, mut pipe) = waiting(&ram, 1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let large = MAX_REQUEST_BYTES as u32;
    // The same memory in each: nobody looks at it here.
    let mut device = Block::new(file.into(), false, "", &DiskShape::default(), None).unwrap();
    let (reads, writes) = rustix::pipe::pipe().unwrap();
    device.engine = Arc::new(Mutex::new(Some(Engine::by_ring(ring(&reads, true), None))));
    drop((std::mem::replace(&mut bench, Bench::activate(&mut device, &ram)), &mut pipe));
    drop(reads);
    let mut header = T_IN.to_le_bytes().to_vec();
    header.extend([0; 12]);
    bench.write(BUFFERS, &header);
    let most = MAX_BYTES / MAX_REQUEST_BYTES;
    for number in 0..most as u64 + 2 {
        let status = STATUS + number;
        bench.write(status, &[0xee]);
        bench.queues[0].offer(&[(BUFFERS, 16, 0), (DATA, large, WRITE), (status, 1, WRITE)]);
        bench.kick(0);
    }
    // The writer's end ends all: those in flight first, then those that came in when they had gone.
    drop(writes);
    for _ in 0..most + 2 {
        until(&mut bench, |bench| bench.queues[0].take_used().is_some());
    }
    assert_eq!(bench.read(STATUS, most + 2), vec![1; most + 2]);
}

#[test]
fn memory_that_does_not_lie_as_the_disk_wants_it_is_moved_by_a_buffer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![3; 1 << 20]).unwrap();
    let shape = DiskShape { cache: DiskCache::Direct { alignment: 512 }, ..DiskShape::default() };
    let direct = libc::O_DIRECT;
    for by_ring in [false, true] {
        let mut options = File::options();
        options.read(true).write(true);
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, direct);
        let mut host = with(options.open(&path).unwrap(), false, &shape, by_ring);
        for bytes in [1024, 200 << 10] {
            host.header(T_IN, 0);
            let odd = DATA + 3;
            let chain = [(BUFFERS, 16, 0), (odd, bytes, WRITE), (STATUS, 1, WRITE)];
            assert_eq!(host.status(&chain), 0);
            assert!(host.bench.read(odd, bytes as usize).iter().all(|byte| *byte == 3));
            assert_eq!(
                (host.bench.read(DATA, 3), host.bench.read(odd + u64::from(bytes), 1)),
                (vec![0; 3], vec![0])
            );
            host.bench.write(odd, &vec![4; bytes as usize]);
            host.header(T_OUT, 512);
            let half = bytes / 2 + 1;
            let chain = [
                (BUFFERS, 16, 0),
                (odd, half, 0),
                (odd + u64::from(half), bytes - half, 0),
                (STATUS, 1, WRITE),
            ];
            assert_eq!(host.status(&chain), 0);
            let mut written = vec![0; bytes as usize];
            File::open(&path).unwrap().read_exact_at(&mut written, 512 * 512).unwrap();
            assert!(written.iter().all(|byte| *byte == 4));
            host.bench.write(odd, &vec![0; bytes as usize]);
            std::fs::write(&path, vec![3; 1 << 20]).unwrap();
        }
    }
}

#[test]
fn write_without_a_writeback_cache_is_on_the_disk_when_it_is_answered() {
    let file = disk_file();
    let mut device = Block::new(
        file.try_clone().unwrap().into(),
        false,
        "",
        &DiskShape::default(),
        Some(ring(&file, true)),
    )
    .unwrap();
    device.write_config(WRITEBACK, &[0]);
    let writeback = device.writeback.clone();
    let mut bench = Bench::activate(&mut device, &ram());
    offer(&mut bench, 0, 0, (T_OUT, 1));
    bench.kick(0);
    until(&mut bench, |bench| bench.queues[0].take_used().is_some());
    assert_eq!(bench.read(STATUS, 1), [0]);
    assert!(!writeback.load(Ordering::Relaxed));
    bench.reset();
    // The next driver finds it as the first did.
    assert!(writeback.load(Ordering::Relaxed));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever several queues ask for at the same time, each request is answered once, and the disk has what was written.
    #[test]
    fn disk_holds_what_was_written(writes in prop::collection::vec((0..4usize, 0..SECTORS, any::<u8>()), 1..60)) {
        let shape = DiskShape { queues: 4, ..DiskShape::default() };
        let host = with(disk_file(), false, &shape, true);
        let (mut bench, file) = (host.bench, host.file);
        let mut model: Vec<u8> = (0..SECTORS).map(|sector| sector as u8 + 1).collect();
        // Of each sector one write is in flight at most, as a file system has it.
        let mut writes = writes;
        writes.sort_by_key(|write| write.1);
        writes.dedup_by_key(|write| write.1);
        let mut expected = [0usize; 4];
        for (number, (queue, sector, byte)) in writes.iter().enumerate() {
            bench.write(places(number as u64).1, &[*byte; 512]);
            offer(&mut bench, *queue, number as u64, (T_OUT, *sector));
            model[*sector as usize] = *byte;
            expected[*queue] += 1;
            if number % 3 == 0 {
                bench.queues[*queue].kick();
            }
        }
        for (queue, count) in expected.into_iter().enumerate() {
            bench.kick(queue);
            for _ in 0..count {
                until(&mut bench, |bench| bench.queues[queue].take_used().is_some());
            }
            prop_assert_eq!(bench.queues[queue].take_used(), None);
        }
        prop_assert_eq!(bench.read(STATUS, writes.len()), vec![0; writes.len()]);
        let mut data = vec![0; SECTORS as usize * 512];
        file.read_exact_at(&mut data, 0).unwrap();
        for (sector, byte) in model.iter().enumerate() {
            prop_assert!(data[sector * 512..(sector + 1) * 512].iter().all(|b| b == byte));
        }
    }
}

/// A chain of more pieces than one operation takes, by a table beside the ring.
#[test]
fn request_of_many_pieces_is_whole() {
    const PIECES: u16 = 400;
    for by_ring in [false, true] {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&(0..64 * 1024u32).map(|n| (n / 128) as u8).collect::<Vec<_>>(), 0)
            .unwrap();
        let mut host = with(file, false, &DiskShape::default(), by_ring);
        host.header(T_IN, 0);
        let table = BUFFERS + 0x40000;
        let queue = &host.bench.queues[0];
        queue.write_descriptor(table, 0, (BUFFERS, 16, 1, 1));
        for piece in 0..PIECES {
            let at = DATA + u64::from(piece) * 256;
            queue.write_descriptor(table, piece + 1, (at, 128, 1 | WRITE, piece + 2));
        }
        queue.write_descriptor(table, PIECES + 1, (STATUS, 1, WRITE, 0));
        let bytes = u32::from(PIECES + 2) * 16;
        assert_eq!(host.status(&[(table, bytes, INDIRECT)]), 0);
        for piece in 0..u64::from(PIECES) {
            assert_eq!(
                host.bench.read(DATA + piece * 256, 129),
                [vec![piece as u8; 128], vec![0]].concat()
            );
        }
    }
}
