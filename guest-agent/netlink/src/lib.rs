//! The few rtnetlink(7) messages that the shim reads a pod's network by, and that the agent sets
//! it up with in the guest.
//!
//! [`Message`] and [`attributes`] are the encoding, [`Socket`] speaks it with the kernel of the
//! network namespace that its opener was in; [`network`] holds what is said about interfaces,
//! addresses, routes and neighbours, and is pure; [`Watch`] tells when any of it changes. The kernel
//! is trusted, but nothing here relies on a length that it gives.

pub mod network;
mod watch;

pub use watch::Watch;

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// `struct nlmsghdr` (netlink(7)).
const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
/// Fails when there is one already.
pub const NLM_F_EXCL: u16 = 0x200;
/// Makes what there is not.
pub const NLM_F_CREATE: u16 = 0x400;
/// Changes what there is.
pub const NLM_F_REPLACE: u16 = 0x100;
/// Adds to what there is.
pub const NLM_F_APPEND: u16 = 0x800;

/// More than the kernel puts into one packet of a dump (32 KiB).
const RECEIVE_BYTES: usize = 64 << 10;
/// How often a listing is asked for again that changed while it was made.
const MAX_DUMP_TRIES: u32 = 8;

/// A request, with room for its header and attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A message of `kind` (`RTM_...`) with more flags than every request has, and the fixed part
    /// that kind begins with.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        let mut message = Self { bytes };
        message.align();
        message
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, payload: &[u8]) -> Self {
        let length = (4 + payload.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.align();
        self
    }

    /// Adds an attribute that is a string with its NUL.
    #[must_use]
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// Adds an attribute that holds those that `fill` adds.
    #[must_use]
    pub fn with_nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self = fill(self.with(kind, &[]));
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// What follows the header, as the kernel would read it.
    pub fn body(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..]
    }

    fn finish(&mut self, sequence: u32, flags: u16) {
        let length = self.bytes.len() as u32;
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | flags;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// The attributes in `bytes`, kind and payload, up to the first that is cut off.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        // The two highest bits say what is inside.
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// One message of an answer.
struct Part<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// The messages of a packet.
fn parts(mut bytes: &[u8]) -> impl Iterator<Item = Part<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER_BYTES)?;
        let length = u32::from_ne_bytes(header[..4].try_into().ok()?) as usize;
        let body = bytes.get(HEADER_BYTES..length)?;
        let part = Part {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes(header[8..12].try_into().ok()?),
            body,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(part)
    })
}

/// The error in the body of an `NLMSG_ERROR` or `NLMSG_DONE`: 0 or a negated errno.
fn outcome(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::Error::other("the kernel's answer is cut off")),
    }
}

/// A socket to the kernel, in the network namespace that its opener was in.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> io::Result<Self> {
        // NETLINK_ROUTE is protocol 0.
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, sequence: 0 })
    }

    fn send(&mut self, mut message: Message, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        message.finish(self.sequence, flags);
        send(&self.socket, &message.bytes, SendFlags::empty())?;
        Ok(self.sequence)
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (_, length) = recv(&self.socket, &mut *buffer, RecvFlags::TRUNC)?;
        if length > buffer.len() {
            return Err(io::Error::other("the kernel's answer is larger than any should be"));
        }
        Ok(length)
    }

    /// Asks for a change, and waits until it is made.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn change(&mut self, message: Message) -> io::Result<()> {
        let sequence = self.send(message, NLM_F_ACK)?;
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            let length = self.receive(&mut buffer)?;
            let mut own = parts(&buffer[..length]).filter(|part| part.sequence == sequence);
            if let Some(part) = own.find(|part| part.kind == NLMSG_ERROR) {
                return outcome(part.body);
            }
        }
    }

    /// Asks for a listing, and returns the bodies of its messages of `kind`.
    ///
    /// # Errors
    /// What the kernel answers, or that the listing did not stand still.
    pub fn list(&mut self, message: &Message, kind: u16) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..MAX_DUMP_TRIES {
            if let Some(bodies) = self.list_once(message.clone(), kind)? {
                return Ok(bodies);
            }
        }
        Err(io::Error::from(io::ErrorKind::ResourceBusy))
    }

    fn list_once(&mut self, message: Message, kind: u16) -> io::Result<Option<Vec<Vec<u8>>>> {
        let sequence = self.send(message, NLM_F_DUMP)?;
        let mut bodies = Vec::new();
        let mut changed = false;
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            let length = self.receive(&mut buffer)?;
            for part in parts(&buffer[..length]).filter(|part| part.sequence == sequence) {
                changed |= part.flags & NLM_F_DUMP_INTR != 0;
                match part.kind {
                    NLMSG_ERROR => {
                        outcome(part.body)?;
                    }
                    NLMSG_DONE => return Ok((!changed).then_some(bodies)),
                    other if other == kind => bodies.push(part.body.to_vec()),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_come_back_as_they_went_in() {
        let message = Message::new(1, 0, &[0; 4])
            .with(3, b"abc")
            .with_text(4, "name")
            .with_nested(5, |message| {
                message.with(6, &[7; 6]).with_nested(8, |message| message.with(9, &[1]))
            });
        let all: Vec<_> = attributes(&message.body()[4..]).collect();
        assert_eq!(all[0], (3, &b"abc"[..]));
        assert_eq!(all[1], (4, &b"name\0"[..]));
        let nested: Vec<_> = attributes(all[2].1).collect();
        assert_eq!((all[2].0, nested[0]), (5, (6, &[7; 6][..])));
        assert_eq!(attributes(nested[1].1).next(), Some((9, &[1][..])));
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn refusals_are_errors() {
        assert!(outcome(&0i32.to_ne_bytes()).is_ok());
        assert_eq!(outcome(&(-17i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(17));
        assert!(outcome(&[1]).is_err());
    }

    #[test]
    fn kernel_lists_its_loopback() {
        let mut socket = Socket::open().unwrap();
        let links = network::links(&mut socket).unwrap();
        assert!(links.iter().any(|link| link.name == "lo" && link.index == 1));
        assert!(socket.change(network::up(i32::MAX)).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            parts(&bytes).for_each(drop);
            attributes(&bytes).for_each(drop);
        }
    }
}
