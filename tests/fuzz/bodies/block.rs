//! The disk, driven by a hostile driver: one that can be written and one that cannot, whose bytes stay, each by system calls
//! with one queue, and by a ring of io_uring with three.

use std::io::{Read, Seek, Write};

use rustix::fs::{MemfdFlags, memfd_create};
use vial_vmm::fuzzing::{disk, drive};

const BYTES: usize = 16 << 10;

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    let Some((&kind, script)) = script.split_first() else { return };
    let (read_only, by_ring) = (kind & 1 == 1, kind & 2 == 2);
    let data = memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory");
    let mut file = std::fs::File::from(data.try_clone().expect("a descriptor"));
    file.write_all(&[7; BYTES]).expect("room");
    drive(&mut disk(data, read_only, by_ring), script);
    let mut after = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut after)).expect("its bytes");
    assert_eq!(after.len(), BYTES, "a disk has the size that it had");
    assert!(!read_only || after == [7; BYTES], "a read-only disk was written to");
}
