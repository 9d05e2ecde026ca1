//! The block device (virtio 1.2, 5.2) on a raw file or a block device of the host, never a disk
//! format.
//!
//! Requests are served one after the other with `preadv` and `pwritev` straight to guest memory.
//! They can wait for a disk, so the worker runs on the thread that file system calls are made on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, fallocate, fcntl_getfl, fdatasync, fstat, seek,
};

use super::buffers::{Buffers, Span};
use super::one_queue::{QueueWorker, Serve};
use crate::memory::GuestRam;
use crate::virtio::queue::Chain;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, QueueError,
    VirtioDevice, Worker, WorkerThread,
};

const DEVICE: &str = "block";

/// What capacity and positions are counted in, in bytes (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// A request's type, a reserved word and its sector (virtio 1.2, 5.2.6).
const HEADER_BYTES: usize = 16;
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
/// The most requests in one wake-up.
const REQUESTS_PER_WAKE: usize = 64;

// Feature bits (virtio 1.2, 5.2.3).
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

// Request types (virtio 1.2, 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
/// The device may punch a hole to write zeros.
const FLAG_UNMAP: u32 = 1;

/// The last byte of a reply (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The descriptor is of another kind.
    #[error(
        "make the block device: its descriptor is a {0}; give a regular file or a block device"
    )]
    Kind(&'static str),
    /// The file is too small.
    #[error("make the block device: the file has {0} bytes, less than one sector of 512")]
    Empty(u64),
    /// The file cannot be written.
    #[error(
        "make the block device: the file is not open for reading and writing; open it so, or make the device read-only"
    )]
    Access,
    /// The serial number is too long.
    #[error("make the block device: the serial number {0:?} is longer than {SERIAL_BYTES} bytes")]
    Serial(String),
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
    disk: OwnedFd,
    sectors: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
    config: [u8; 60],
}

impl Block {
    /// A device with the data of `disk`: a regular file, whose bytes after the last whole sector
    /// the guest does not see, or a block device. `serial` has at most 20 bytes.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn new(disk: OwnedFd, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        let host = |action| {
            move |error: rustix::io::Errno| BlockError::Host { action, source: error.into() }
        };
        if serial.len() > SERIAL_BYTES {
            return Err(BlockError::Serial(serial.to_owned()));
        }
        let mut serial_bytes = [0; SERIAL_BYTES];
        serial_bytes[..serial.len()].copy_from_slice(serial.as_bytes());
        let kind = fstat(&disk).map_err(host("ask for the kind of the file"))?.st_mode;
        match FileType::from_raw_mode(kind) {
            FileType::RegularFile | FileType::BlockDevice => {}
            FileType::Directory => return Err(BlockError::Kind("directory")),
            FileType::CharacterDevice => return Err(BlockError::Kind("character device")),
            FileType::Socket => return Err(BlockError::Kind("socket")),
            FileType::Fifo => return Err(BlockError::Kind("pipe")),
            _ => return Err(BlockError::Kind("file of another kind")),
        }
        let access = fcntl_getfl(&disk).map_err(host("ask how the file is open"))?;
        let reads = !access.contains(OFlags::PATH) && access & OFlags::ACCMODE != OFlags::WRONLY;
        if !reads || !read_only && access & OFlags::ACCMODE != OFlags::RDWR {
            return Err(BlockError::Access);
        }
        // Both kinds tell their size so.
        let bytes = seek(&disk, SeekFrom::End(0)).map_err(host("measure the file"))?;
        let sectors = bytes / SECTOR_BYTES;
        if sectors == 0 {
            return Err(BlockError::Empty(bytes));
        }
        Ok(Self { disk, sectors, read_only, serial: serial_bytes, config: config_of(sectors) })
    }
}

/// The configuration space (virtio 1.2, 5.2.4).
fn config_of(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    config[..8].copy_from_slice(&sectors.to_le_bytes());
    let fields: [(usize, u32); 7] = [
        // seg_max, blk_size.
        (12, MAX_SEGMENTS),
        (20, SECTOR_BYTES as u32),
        // Discards: sectors, segments, alignment in sectors (a page of the host).
        (36, MAX_RANGE_SECTORS),
        (40, MAX_RANGES as u32),
        (44, 8),
        // Zeros: sectors, segments.
        (48, MAX_RANGE_SECTORS),
        (52, MAX_RANGES as u32),
    ];
    for (offset, value) in fields {
        config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    // write_zeroes_may_unmap.
    config[56] = 1;
    config
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn features(&self) -> u64 {
        let writing = if self.read_only { RO } else { DISCARD | WRITE_ZEROES };
        SEG_MAX | BLK_SIZE | FLUSH | writing | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn worker_thread(&self) -> WorkerThread {
        WorkerThread::FileServer
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let disk = self.disk.try_clone().map_err(|error| ActivateError {
            device: DEVICE,
            reason: format!("share the disk's descriptor: {error}"),
        })?;
        let queue = activation.take_queue(DEVICE, 0)?;
        let disk = Disk {
            file: disk,
            sectors: self.sectors,
            read_only: self.read_only,
            serial: self.serial,
            ram: activation.ram,
        };
        Ok(Box::new(QueueWorker::new(queue, disk, activation.fault)))
    }
}

/// The data, and what may be done with it.
struct Disk {
    file: OwnedFd,
    sectors: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
    ram: GuestRam,
}

impl Disk {
    /// Does what a chain asks for; returns how many bytes of it are the device's answer.
    fn answer(&self, chain: Chain) -> Result<u32, QueueError> {
        let (request, reply) = Buffers::of_chain(chain)?;
        let Some(room) = reply.len().checked_sub(1) else {
            return Err(QueueError::Chain("it has no room for a status".into()));
        };
        let mut header = [0; HEADER_BYTES];
        request.copy_to(&self.ram, 0, &mut header)?;
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let data = Span { offset: HEADER_BYTES, bytes: request.len() - HEADER_BYTES };
        let status = match word(0) {
            T_IN => self.read(sector, &reply, room),
            T_OUT => self.write(sector, &request, data),
            T_FLUSH => status_of(fdatasync(&self.file).map_err(io::Error::from)),
            T_GET_ID => {
                let bytes = room.min(SERIAL_BYTES);
                reply.copy_from(&self.ram, 0, &self.serial[..bytes])?;
                Status::Ok
            }
            T_DISCARD => self.clear(&request, data, true)?,
            T_WRITE_ZEROES => self.clear(&request, data, false)?,
            _ => Status::Unsupported,
        };
        reply.copy_from(&self.ram, room, &[status as u8])?;
        Ok(reply.len() as u32)
    }

    /// The position of so many bytes from a sector on, if all of them are on the disk.
    fn position(&self, sector: u64, bytes: u64) -> Option<u64> {
        let count = bytes / SECTOR_BYTES;
        let whole = bytes.is_multiple_of(SECTOR_BYTES);
        let end = sector.checked_add(count)?;
        (whole && end <= self.sectors).then(|| sector * SECTOR_BYTES)
    }

    fn read(&self, sector: u64, reply: &Buffers, bytes: usize) -> Status {
        match self.position(sector, bytes as u64) {
            Some(position) if bytes <= MAX_REQUEST_BYTES => {
                let span = Span { offset: 0, bytes };
                status_of(reply.read_all_at(&self.ram, self.file.as_fd(), span, position))
            }
            _ => Status::IoError,
        }
    }

    fn write(&self, sector: u64, request: &Buffers, data: Span) -> Status {
        match self.position(sector, data.bytes as u64) {
            Some(position) if !self.read_only && data.bytes <= MAX_REQUEST_BYTES => {
                status_of(request.write_all_at(&self.ram, self.file.as_fd(), data, position))
            }
            _ => Status::IoError,
        }
    }

    /// Discards ranges, or writes zeros to them.
    fn clear(&self, request: &Buffers, data: Span, discard: bool) -> Result<Status, QueueError> {
        let count = data.bytes / RANGE_BYTES;
        let whole = data.bytes.is_multiple_of(RANGE_BYTES);
        if self.read_only || count == 0 || count > MAX_RANGES || !whole {
            return Ok(Status::IoError);
        }
        for index in 0..count {
            let mut range = [0; RANGE_BYTES];
            request.copy_to(&self.ram, data.offset + index * RANGE_BYTES, &mut range)?;
            match self.clear_range(&range, discard) {
                Status::Ok => {}
                other => return Ok(other),
            }
        }
        Ok(Status::Ok)
    }

    fn clear_range(&self, range: &[u8; RANGE_BYTES], discard: bool) -> Status {
        let word = |at: usize| {
            u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]])
        };
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (sectors, flags) = (word(8), word(12));
        let unmaps = match (discard, flags) {
            (true, 0) => true,
            (false, 0 | FLAG_UNMAP) => flags == FLAG_UNMAP,
            // What is reserved is not supported (virtio 1.2, 5.2.6.2).
            _ => return Status::Unsupported,
        };
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        let Some(position) = self.position(sector, bytes) else { return Status::IoError };
        if sectors > MAX_RANGE_SECTORS {
            return Status::IoError;
        }
        if bytes == 0 {
            return Status::Ok;
        }
        let how = if unmaps { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let result = fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, position, bytes);
        match result {
            Err(rustix::io::Errno::OPNOTSUPP) => Status::Unsupported,
            other => status_of(other.map_err(io::Error::from)),
        }
    }
}

fn status_of(result: io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            tracing::warn!(%error, "a request to the disk failed");
            Status::IoError
        }
    }
}

impl Serve for Disk {
    const DEVICE: &'static str = DEVICE;

    fn serve(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        queue.disable_kicks()?;
        for _ in 0..REQUESTS_PER_WAKE {
            match queue.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let written = self.answer(chain)?;
                    queue.complete(head, written)?;
                    // One by one: the next request may take long.
                    queue.notify()?;
                }
                None if queue.enable_kicks()? => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
