//! The block device (virtio 1.2, 5.2) on a raw file or a block device of the host, never a disk
//! format.
//!
//! With a ring of io_uring, requests of all queues are in flight together, straight between guest memory and the disk, on the
//! thread of devices that never wait. Without, they are done one after the other by system calls, on the thread that file
//! system calls are made on.

mod engine;
mod flight;
mod request;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fstat, seek};
use vial_ring::Ring;
use vial_vmm_api::{DISK_QUEUES, DiskCache, DiskShape, LOGICAL_BLOCKS};

use self::engine::{Engine, MemoryAlignment};
use self::request::Extent;
use self::worker::{Durability, Parked, Plan, Server};
use crate::virtio::{
    ActivateError, Activation, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, VirtioDevice, Worker,
    WorkerThread, read_at,
};

const DEVICE: &str = "block";

/// What capacity and positions are counted in, in bytes (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// The size of the serial number.
const SERIAL_BYTES: usize = 20;
/// The most buffers with data in one request: a queue of them, less header and status.
const MAX_SEGMENTS: u32 = 254;
/// The most data in one request. Linux stays far below.
const MAX_REQUEST_BYTES: usize = 32 << 20;
/// The most ranges in one request to discard or to write zeros.
const MAX_RANGES: usize = 16;
/// The most sectors in one such range: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// One such range in a request: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;
/// The size of each queue.
const QUEUE_SIZE: u16 = 256;
/// The largest physical block, in bytes: what one page of the largest kind has.
const MAX_PHYSICAL_BLOCK: u32 = 1 << 20;
/// The most that memory can be aligned to for a file without a cache: a page.
const MAX_ALIGNMENT: u32 = 4096;

// Feature bits (virtio 1.2, 5.2.3).
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Where `writeback` is in the configuration space (virtio 1.2, 5.2.4).
const WRITEBACK: usize = 32;
const CONFIG_BYTES: usize = 60;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The descriptor is of another kind.
    #[error(
        "make the block device: its descriptor is a {0}; give a regular file or a block device"
    )]
    Kind(&'static str),
    /// The file is too small.
    #[error("make the block device: the file has {bytes} bytes, less than one sector of {block}")]
    Empty {
        /// What it has.
        bytes: u64,
        /// The size of a logical block.
        block: u64,
    },
    /// The file cannot be written.
    #[error(
        "make the block device: the file is not open for reading and writing; open it so, or make the device read-only"
    )]
    Access,
    /// The serial number is too long.
    #[error("make the block device: the serial number {0:?} is longer than {SERIAL_BYTES} bytes")]
    Serial(String),
    /// What the guest is to be told makes no sense.
    #[error("make the block device: {0}; give another shape")]
    Shape(String),
    /// The host refused.
    #[error("make the block device: {action}: {source}")]
    Host {
        /// What was to be done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// The device.
#[derive(Debug)]
pub struct Block {
    extent: Extent,
    sizes: Vec<u16>,
    features: u64,
    config: [u8; CONFIG_BYTES],
    /// Whether what is written may stay in caches until a flush.
    writeback: Arc<AtomicBool>,
    engine: Parked,
    thread: WorkerThread,
}

impl Block {
    /// A device with the data of `disk`: a regular file, whose bytes after the last whole logical block
    /// the guest does not see, or a block device. `serial` has at most 20 bytes.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn new(
        disk: OwnedFd,
        read_only: bool,
        serial: &str,
        shape: &DiskShape,
        ring: Option<Ring>,
    ) -> Result<Self, BlockError> {
        check(shape)?;
        if serial.len() > SERIAL_BYTES {
            return Err(BlockError::Serial(serial.to_owned()));
        }
        let mut serial_bytes = [0; SERIAL_BYTES];
        serial_bytes[..serial.len()].copy_from_slice(serial.as_bytes());
        let block = u64::from(shape.logical_block);
        let bytes = measure(&disk, read_only)?;
        let sectors = bytes / block * (block / SECTOR_BYTES);
        if sectors == 0 {
            return Err(BlockError::Empty { bytes, block });
        }
        let alignment = match shape.cache {
            DiskCache::Writeback => None,
            DiskCache::Direct { alignment } => {
                Some(MemoryAlignment { address: alignment.into(), length: block })
            }
        };
        let thread = if ring.is_some() { WorkerThread::Io } else { WorkerThread::FileServer };
        let engine = match ring {
            Some(ring) => Engine::by_ring(ring, alignment),
            None => Engine::by_calls(disk, alignment),
        };
        let discards = shape.discard.is_some();
        Ok(Self {
            extent: Extent { sectors, block, read_only, discards, serial: serial_bytes },
            sizes: vec![QUEUE_SIZE; usize::from(shape.queues)],
            features: features(read_only, shape),
            config: config(sectors, shape),
            writeback: Arc::new(AtomicBool::new(true)),
            engine: Arc::new(Mutex::new(Some(engine))),
            thread,
        })
    }
}

fn check(shape: &DiskShape) -> Result<(), BlockError> {
    let wrong = |text: String| Err(BlockError::Shape(text));
    let (logical, physical) = (shape.logical_block, shape.physical_block);
    if !DISK_QUEUES.contains(&shape.queues) {
        return wrong(format!("it cannot have {} queues", shape.queues));
    }
    if !LOGICAL_BLOCKS.contains(&logical) || !logical.is_power_of_two() {
        return wrong(format!("it cannot have logical blocks of {logical} bytes"));
    }
    if !(logical..=MAX_PHYSICAL_BLOCK).contains(&physical) || !physical.is_power_of_two() {
        return wrong(format!("it cannot have physical blocks of {physical} bytes"));
    }
    match shape.cache {
        DiskCache::Direct { alignment }
            if alignment > MAX_ALIGNMENT || !alignment.is_power_of_two() =>
        {
            wrong(format!("memory cannot be aligned to {alignment} bytes"))
        }
        _ => Ok(()),
    }
}

/// The size of a file that can be a disk.
fn measure(disk: &OwnedFd, read_only: bool) -> Result<u64, BlockError> {
    let host =
        |action| move |error: rustix::io::Errno| BlockError::Host { action, source: error.into() };
    let kind = fstat(disk).map_err(host("ask for the kind of the file"))?.st_mode;
    match FileType::from_raw_mode(kind) {
        FileType::RegularFile | FileType::BlockDevice => {}
        FileType::Directory => return Err(BlockError::Kind("directory")),
        FileType::CharacterDevice => return Err(BlockError::Kind("character device")),
        FileType::Socket => return Err(BlockError::Kind("socket")),
        FileType::Fifo => return Err(BlockError::Kind("pipe")),
        _ => return Err(BlockError::Kind("file of another kind")),
    }
    let access = fcntl_getfl(disk).map_err(host("ask how the file is open"))?;
    let reads = !access.contains(OFlags::PATH) && access & OFlags::ACCMODE != OFlags::WRONLY;
    if !reads || !read_only && access & OFlags::ACCMODE != OFlags::RDWR {
        return Err(BlockError::Access);
    }
    // Both kinds tell their size so.
    seek(disk, SeekFrom::End(0)).map_err(host("measure the file"))
}

fn features(read_only: bool, shape: &DiskShape) -> u64 {
    let writing = match (read_only, shape.discard) {
        (true, _) => RO,
        (false, None) => WRITE_ZEROES,
        (false, Some(_)) => WRITE_ZEROES | DISCARD,
    };
    let queues = if shape.queues > 1 { MQ } else { 0 };
    SEG_MAX
        | BLK_SIZE
        | TOPOLOGY
        | FLUSH
        | CONFIG_WCE
        | writing
        | queues
        | FEATURE_INDIRECT_DESC
        | FEATURE_EVENT_IDX
}

/// The configuration space (virtio 1.2, 5.2.4).
fn config(sectors: u64, shape: &DiskShape) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    let logical = shape.logical_block;
    put(0, &sectors.to_le_bytes());
    // seg_max, blk_size.
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &logical.to_le_bytes());
    // The topology: the physical block as a power of two of the logical one, no offset, then sizes in logical blocks.
    put(24, &[(shape.physical_block / logical).trailing_zeros() as u8]);
    let (least, best) = shape.io_sizes;
    put(26, &u16::try_from(least / logical).unwrap_or(0).to_le_bytes());
    put(28, &(best / logical).to_le_bytes());
    put(WRITEBACK, &[1]);
    // num_queues.
    put(34, &u16::from(shape.queues).to_le_bytes());
    let sector = SECTOR_BYTES as u32;
    if let Some(discard) = shape.discard {
        // Discards: sectors, segments, alignment in sectors.
        let most = u32::try_from(discard.bytes / SECTOR_BYTES).unwrap_or(u32::MAX);
        put(36, &most.clamp(logical / sector, MAX_RANGE_SECTORS).to_le_bytes());
        put(40, &(MAX_RANGES as u32).to_le_bytes());
        put(44, &(discard.granularity / sector).max(logical / sector).to_le_bytes());
    }
    // Zeros: sectors, segments, write_zeroes_may_unmap.
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &(MAX_RANGES as u32).to_le_bytes());
    put(56, &[u8::from(shape.discard.is_some())]);
    config
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = self.config;
        config[WRITEBACK] = self.writeback.load(Ordering::Relaxed).into();
        read_at(&config, offset, data);
    }

    /// Of all that the driver writes, `writeback` counts, and of it whether it is zero.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let byte = WRITEBACK.checked_sub(offset).and_then(|index| data.get(index));
        if let Some(byte) = byte {
            self.writeback.store(*byte != 0, Ordering::Relaxed);
        }
    }

    fn worker_thread(&self) -> WorkerThread {
        self.thread
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        // A driver may use fewer queues than there are, but never none.
        let first = activation.take_queue(DEVICE, 0)?;
        let others = activation.queues.into_iter().flatten();
        let plan = Plan {
            queues: std::iter::once(first).chain(others).collect(),
            disk: self.extent,
            durability: Durability {
                writeback: self.writeback.clone(),
                flushes: activation.features & FLUSH != 0,
            },
            ram: activation.ram,
            fault: activation.fault,
            parked: self.engine.clone(),
        };
        let server = Server::new(plan).ok_or_else(|| ActivateError {
            device: DEVICE,
            reason: "another worker still serves the disk".into(),
        })?;
        Ok(Box::new(server))
    }
}

#[cfg(test)]
mod ring_tests;
#[cfg(test)]
mod tests;
