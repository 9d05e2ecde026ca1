//! The messages of vhost-user that a frontend sends and reads (QEMU docs/interop/vhost-user.rst):
//! their numbers, and their bytes. Pure.

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the device's features.
pub(super) const FEATURE_PROTOCOL: u64 = 1 << 30;

// Protocol features.
/// Several queues.
pub(super) const PROTOCOL_MQ: u64 = 1 << 0;
/// An answer to each message.
pub(super) const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
/// The backend has the configuration space.
pub(super) const PROTOCOL_CONFIG: u64 = 1 << 9;
/// The backend keeps what is in flight in memory that outlives it.
pub(super) const PROTOCOL_INFLIGHT: u64 = 1 << 12;

/// Of a message: request, flags, size of the body.
pub(super) const HEADER_BYTES: usize = 12;
/// The largest body that a backend sends: a configuration space and what it is in.
pub(super) const MAX_BODY_BYTES: usize = 12 + 256;
/// Of the flags: the version of the protocol.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In place of a descriptor with a ring's number: there is none.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
    GetInflightFd = 31,
    SetInflightFd = 32,
}

/// A message's header.
pub(super) fn header(request: Request, body: usize, need_reply: bool) -> [u8; HEADER_BYTES] {
    let flags = VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
    let words = [request as u32, flags, body as u32];
    let mut bytes = [0; HEADER_BYTES];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// The size of the body that follows the header of an answer; none when it is no answer to
/// `request`, or larger than any can be.
pub(super) fn answer_bytes(header: &[u8; HEADER_BYTES], request: Request) -> Option<usize> {
    let (number, flags) = (u32_at(header, 0)?, u32_at(header, 4)?);
    let bytes = u32_at(header, 8)? as usize;
    let fits = number == request as u32
        && flags & VERSION_MASK == VERSION
        && flags & FLAG_REPLY != 0
        && bytes <= MAX_BODY_BYTES;
    fits.then_some(bytes)
}

/// The number at a place, if it is there.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

/// The number that is all of a body.
pub(super) fn u64_of(body: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(body.try_into().ok()?))
}

/// A ring and a number of it.
pub(super) fn ring_state(ring: u32, number: u32) -> [u8; 8] {
    (u64::from(ring) | u64::from(number) << 32).to_le_bytes()
}

/// A ring whose descriptor comes along, or which has none.
pub(super) fn ring_event(ring: u32, has_descriptor: bool) -> [u8; 8] {
    let none = if has_descriptor { 0 } else { NO_DESCRIPTOR };
    (u64::from(ring) | none).to_le_bytes()
}

/// Where a ring's parts are, as the memory table's frontend addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl RingAddresses {
    /// The body that tells of them: ring, flags, descriptors, used, available, log.
    pub(super) fn body(self, ring: u32) -> [u8; 40] {
        let mut body = [0; 40];
        body[..4].copy_from_slice(&ring.to_le_bytes());
        let words = [self.descriptors, self.used, self.available, 0];
        for (place, word) in body[8..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        body
    }
}

/// A part of the guest's memory and where it is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemoryPart {
    pub(super) guest: u64,
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

/// The body of a memory table. What it calls the frontend's addresses are the guest's here: where
/// the VMM has its memory is nobody's business.
pub(super) fn memory_table(parts: &[MemoryPart]) -> Vec<u8> {
    let mut body = (parts.len() as u64).to_le_bytes().to_vec();
    for part in parts {
        for word in [part.guest, part.bytes, part.guest, part.offset] {
            body.extend(word.to_le_bytes());
        }
    }
    body
}

/// What a request for the configuration space consists of, and an answer begins with: offset, size,
/// flags. As many bytes as are asked for go along.
pub(super) fn config_request(bytes: usize) -> Vec<u8> {
    let mut body = vec![0; 12 + bytes];
    body[4..8].copy_from_slice(&(bytes as u32).to_le_bytes());
    body
}

/// The memory that requests in flight are kept in: its size, where it is in its file, and for how
/// many rings of which size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InflightArea {
    pub(super) bytes: u64,
    pub(super) offset: u64,
    pub(super) rings: u16,
    pub(super) ring_size: u16,
}

impl InflightArea {
    pub(super) fn body(self) -> [u8; 24] {
        let mut body = [0; 24];
        body[..8].copy_from_slice(&self.bytes.to_le_bytes());
        body[8..16].copy_from_slice(&self.offset.to_le_bytes());
        body[16..18].copy_from_slice(&self.rings.to_le_bytes());
        body[18..20].copy_from_slice(&self.ring_size.to_le_bytes());
        body
    }

    /// The area that a backend has made for rings of ours.
    pub(super) fn of_answer(body: &[u8], rings: u16, ring_size: u16) -> Option<Self> {
        let (bytes, rest) = body.split_first_chunk()?;
        let (offset, _) = rest.split_first_chunk()?;
        let area = Self {
            bytes: u64::from_le_bytes(*bytes),
            offset: u64::from_le_bytes(*offset),
            rings,
            ring_size,
        };
        (area.bytes > 0).then_some(area)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(words: [u32; 3]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn answers_to_something_else_and_past_the_bound_are_none() {
        let bytes = |words| answer_bytes(&answer(words), Request::GetConfig);
        assert_eq!(bytes([24, 5, 72]), Some(72));
        assert_eq!(bytes([24, 5, MAX_BODY_BYTES as u32]), Some(MAX_BODY_BYTES));
        assert_eq!(bytes([24, 5, MAX_BODY_BYTES as u32 + 1]), None);
        assert_eq!(bytes([24, 5, u32::MAX]), None);
        assert_eq!(bytes([25, 5, 72]), None, "another request");
        assert_eq!(bytes([24, 1, 72]), None, "a request");
        assert_eq!(bytes([24, 6, 72]), None, "another version");
    }

    #[test]
    fn numbers_have_their_places() {
        assert_eq!(header(Request::SetOwner, 8, true), answer([3, 9, 8]));
        assert_eq!(ring_state(2, 256), [2, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(ring_event(2, false), [2, 1, 0, 0, 0, 0, 0, 0]);
        let part = MemoryPart { guest: 7, bytes: 8, offset: 9 };
        let table = memory_table(&[part]);
        assert_eq!(table.iter().step_by(8).copied().collect::<Vec<u8>>(), [1, 7, 8, 7, 9]);
        let ring = RingAddresses { descriptors: 3, available: 4, used: 5 }.body(1);
        assert_eq!(ring.iter().step_by(8).copied().collect::<Vec<u8>>(), [1, 3, 5, 4, 0]);
    }

    #[test]
    fn inflight_area_survives_its_body() {
        let area = InflightArea { bytes: 4096, offset: 8, rings: 2, ring_size: 256 };
        assert_eq!(InflightArea::of_answer(&area.body(), 2, 256), Some(area));
        assert_eq!(InflightArea::of_answer(&[0; 24], 2, 256), None);
        assert_eq!(InflightArea::of_answer(&[1; 15], 2, 256), None);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_within_the_bound(header: [u8; HEADER_BYTES], body: Vec<u8>) {
            if let Some(bytes) = answer_bytes(&header, Request::GetFeatures) {
                prop_assert!(bytes <= MAX_BODY_BYTES);
            }
            let _ = u64_of(&body);
            let _ = InflightArea::of_answer(&body, 1, 1);
        }
    }
}
