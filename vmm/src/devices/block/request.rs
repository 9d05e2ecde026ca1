//! What a driver asks a disk for (virtio 1.2, 5.2.6): read out of its chain once, checked, and answered once.

use super::{
    MAX_RANGE_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES, RANGE_BYTES, SECTOR_BYTES, SERIAL_BYTES,
};
use crate::devices::buffers::{Buffers, Span};
use crate::memory::GuestRam;
use crate::virtio::QueueError;
use crate::virtio::queue::Chain;

/// A request's type, a reserved word and its sector (virtio 1.2, 5.2.6).
const HEADER_BYTES: usize = 16;

// Request types (virtio 1.2, 5.2.6).
pub(super) const T_IN: u32 = 0;
pub(super) const T_OUT: u32 = 1;
pub(super) const T_FLUSH: u32 = 4;
pub(super) const T_GET_ID: u32 = 8;
pub(super) const T_DISCARD: u32 = 11;
pub(super) const T_WRITE_ZEROES: u32 = 13;
/// The device may punch a hole to write zeros.
pub(super) const FLAG_UNMAP: u32 = 1;

/// The last byte of a reply (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a disk is, as far as requests are held against it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Its size in units of [`SECTOR_BYTES`].
    pub(super) sectors: u64,
    /// The smallest unit that can be addressed, in bytes.
    pub(super) block: u64,
    pub(super) read_only: bool,
    /// Whether ranges can be discarded.
    pub(super) discards: bool,
    pub(super) serial: [u8; SERIAL_BYTES],
}

impl Extent {
    /// The position of so many bytes from a sector on, if all of them are on the disk and whole blocks.
    fn position(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR_BYTES)?;
        let is_whole = |bytes: u64| bytes.is_multiple_of(self.block);
        // The sectors of a disk are counted from its bytes, so those of one of its sectors are a number.
        let position = (end <= self.sectors).then(|| sector * SECTOR_BYTES)?;
        (is_whole(bytes) && is_whole(position)).then_some(position)
    }
}

/// A range that is to be zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) position: u64,
    pub(super) bytes: u64,
    /// Whether the host's storage may be given back.
    pub(super) unmaps: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// Nothing: that is the answer.
    Answered(Status),
    /// The span of the chain's writable part is read from the disk.
    Read(Span, u64),
    /// The span of the chain's readable part is written to the disk.
    Write(Span, u64),
    Flush,
    /// All of them, in their order.
    Clear(Vec<Range>),
}

/// A request out of its chain.
#[derive(Debug)]
pub(super) struct Request {
    readable: Buffers,
    /// The last byte is the status.
    writable: Buffers,
}

impl Request {
    /// Reads a request. What the driver writes to the chain's header or ranges from then on is not looked at.
    ///
    /// # Errors
    /// The chain is none of a request.
    pub(super) fn of_chain(
        chain: Chain,
        ram: &GuestRam,
        disk: &Extent,
    ) -> Result<(Self, Work), QueueError> {
        let (readable, writable) = Buffers::of_chain(chain)?;
        let Some(room) = writable.len().checked_sub(1) else {
            return Err(QueueError::Chain("it has no room for a status".into()));
        };
        let mut header = [0; HEADER_BYTES];
        readable.copy_to(ram, 0, &mut header)?;
        let request = Self { readable, writable };
        let sector = u64::from(word(&header, 8)) | u64::from(word(&header, 12)) << 32;
        let data = Span { offset: HEADER_BYTES, bytes: request.readable.len() - HEADER_BYTES };
        let work = match word(&header, 0) {
            T_IN => transfer(disk, sector, Span { offset: 0, bytes: room }, Work::Read),
            T_OUT if disk.read_only => Work::Answered(Status::IoError),
            T_OUT => transfer(disk, sector, data, Work::Write),
            T_FLUSH => Work::Flush,
            T_GET_ID => {
                let bytes = room.min(SERIAL_BYTES);
                request.writable.copy_from(ram, 0, &disk.serial[..bytes])?;
                Work::Answered(Status::Ok)
            }
            T_DISCARD if disk.discards => request.clear(ram, disk, data, true)?,
            T_WRITE_ZEROES => request.clear(ram, disk, data, false)?,
            _ => Work::Answered(Status::Unsupported),
        };
        Ok((request, work))
    }

    /// The memory that a transfer goes to or comes from.
    pub(super) fn data(&self, write: bool) -> &Buffers {
        if write { &self.readable } else { &self.writable }
    }

    /// Writes the status; returns how many bytes of the chain are the device's answer.
    ///
    /// # Errors
    /// The memory is none.
    pub(super) fn answer(&self, ram: &GuestRam, status: Status) -> Result<u32, QueueError> {
        let bytes = self.writable.len();
        self.writable.copy_from(ram, bytes - 1, &[status as u8])?;
        Ok(bytes as u32)
    }

    /// The ranges of a request to discard, or to write zeros.
    fn clear(
        &self,
        ram: &GuestRam,
        disk: &Extent,
        data: Span,
        discard: bool,
    ) -> Result<Work, QueueError> {
        let count = data.bytes / RANGE_BYTES;
        let whole = data.bytes.is_multiple_of(RANGE_BYTES);
        if disk.read_only || count == 0 || count > MAX_RANGES || !whole {
            return Ok(Work::Answered(Status::IoError));
        }
        let mut ranges = Vec::with_capacity(count);
        for index in 0..count {
            let mut range = [0; RANGE_BYTES];
            self.readable.copy_to(ram, data.offset + index * RANGE_BYTES, &mut range)?;
            match range_of(disk, &range, discard) {
                Ok(range) if range.bytes > 0 => ranges.push(range),
                Ok(_) => {}
                Err(status) => return Ok(Work::Answered(status)),
            }
        }
        let empty = ranges.is_empty();
        Ok(if empty { Work::Answered(Status::Ok) } else { Work::Clear(ranges) })
    }
}

fn word(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn transfer(disk: &Extent, sector: u64, span: Span, work: fn(Span, u64) -> Work) -> Work {
    match disk.position(sector, span.bytes as u64) {
        Some(_) if span.bytes == 0 => Work::Answered(Status::Ok),
        Some(position) if span.bytes <= MAX_REQUEST_BYTES => work(span, position),
        _ => Work::Answered(Status::IoError),
    }
}

fn range_of(disk: &Extent, range: &[u8; RANGE_BYTES], discard: bool) -> Result<Range, Status> {
    let sector = u64::from(word(range, 0)) | u64::from(word(range, 4)) << 32;
    let (sectors, flags) = (word(range, 8), word(range, 12));
    let unmaps = match (discard, flags) {
        (true, 0) => true,
        (false, 0 | FLAG_UNMAP) => flags == FLAG_UNMAP,
        // What is reserved is not supported (virtio 1.2, 5.2.6.2).
        _ => return Err(Status::Unsupported),
    };
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    match disk.position(sector, bytes) {
        Some(position) if sectors <= MAX_RANGE_SECTORS => Ok(Range { position, bytes, unmaps }),
        _ => Err(Status::IoError),
    }
}
