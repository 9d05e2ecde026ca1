//! A connection to a backend: messages with a time limit for each answer.
//!
//! The `vhost` crate's frontend is not used: it repeats a read whose time is up without end
//! (EAGAIN is "try again" to it), so that a backend which says nothing would hold its thread.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

use super::messages::{
    self, FEATURE_PROTOCOL, HEADER_BYTES, InflightArea, MemoryPart, PROTOCOL_MQ,
    PROTOCOL_REPLY_ACK, Request, RingAddresses,
};

/// The most parts of a memory table, and descriptors with a message.
pub(super) const MAX_PARTS: usize = 8;

/// Why a backend does not serve a device.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It closed the connection.
    #[error("the backend closed the connection at {0}; see its log")]
    Gone(&'static str),
    /// It says nothing.
    #[error(
        "the backend does not answer {0} within {1:?}; does it serve another VM, or hang? One \
         serves one VM at a time"
    )]
    Silent(&'static str, Duration),
    /// It says something else.
    #[error("the backend's answer to {0} makes no sense; is it a vhost-user backend?")]
    Nonsense(&'static str),
    /// It says no.
    #[error("the backend refuses {0}; see its log")]
    Refused(&'static str),
    /// It cannot do what the device needs.
    #[error("the backend lacks {0}; use one that has it")]
    Lacks(&'static str),
    /// It serves something else than was asked for.
    #[error("{0}")]
    Unfit(String),
    /// The socket failed.
    #[error("{0} the backend's socket: {1}")]
    Socket(&'static str, Errno),
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    patience: Duration,
    /// Whether each message is answered.
    acknowledged: bool,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    /// Speaks over a connected stream socket, and waits so long for each answer.
    pub(super) fn new(socket: OwnedFd, patience: Duration) -> Self {
        Self { socket, patience, acknowledged: false }
    }

    /// Ends it, so that whoever watches the socket sees its end.
    pub(super) fn break_off(&self) {
        // One that is broken already needs nothing.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// What the device offers.
    pub(super) fn features(&self) -> Result<u64, BackendError> {
        let what = "the question for its features";
        let features = self.number(Request::GetFeatures, what)?;
        match features & FEATURE_PROTOCOL {
            0 => Err(BackendError::Lacks("protocol features (VHOST_USER_F_PROTOCOL_FEATURES)")),
            _ => Ok(features),
        }
    }

    /// Agrees on those of `wanted` that the backend has, takes the device, and returns them, with
    /// the number of queues that it can have: pairs of rings, for a network.
    pub(super) fn agree(&mut self, wanted: u64) -> Result<(u64, u64), BackendError> {
        let what = "the question for its protocol's features";
        let agreed = self.number(Request::GetProtocolFeatures, what)? & wanted;
        let what = "the choice of the protocol's features";
        self.send(Request::SetProtocolFeatures, &agreed.to_le_bytes(), &[], what)?;
        self.acknowledged = agreed & PROTOCOL_REPLY_ACK != 0;
        self.tell(Request::SetOwner, &[], &[], "its owner")?;
        let queues = match agreed & PROTOCOL_MQ {
            0 => 1,
            _ => self.number(Request::GetQueueNum, "the question for its queues")?,
        };
        Ok((agreed, queues))
    }

    /// Fills `config` with the beginning of the configuration space.
    pub(super) fn read_config(&self, config: &mut [u8]) -> Result<(), BackendError> {
        let what = "the question for its configuration";
        let body = messages::config_request(config.len());
        self.send(Request::GetConfig, &body, &[], what)?;
        let (answer, _) = self.receive(Request::GetConfig, what)?;
        // An answer of another size is a refusal.
        match answer.get(12..) {
            Some(bytes) if bytes.len() == config.len() => config.copy_from_slice(bytes),
            _ => return Err(BackendError::Refused(what)),
        }
        Ok(())
    }

    /// Chooses features, and tells where the guest's memory is.
    pub(super) fn begin(
        &self,
        features: u64,
        parts: &[(MemoryPart, BorrowedFd<'_>)],
    ) -> Result<(), BackendError> {
        let chosen = (features | FEATURE_PROTOCOL).to_le_bytes();
        self.tell(Request::SetFeatures, &chosen, &[], "the choice of features")?;
        let (table, files): (Vec<MemoryPart>, Vec<_>) = parts.iter().copied().unzip();
        let table = messages::memory_table(&table);
        self.tell(Request::SetMemTable, &table, &files, "the guest's memory")
    }

    /// Has the backend make an area for what is in flight in rings of that number and size.
    pub(super) fn make_inflight(
        &self,
        rings: u16,
        ring_size: u16,
    ) -> Result<(InflightArea, OwnedFd), BackendError> {
        let what = "the question for memory of what is in flight";
        let wanted = InflightArea { bytes: 0, offset: 0, rings, ring_size };
        self.send(Request::GetInflightFd, &wanted.body(), &[], what)?;
        let (answer, file) = self.receive(Request::GetInflightFd, what)?;
        InflightArea::of_answer(&answer, rings, ring_size)
            .zip(file)
            .ok_or(BackendError::Nonsense(what))
    }

    /// Gives the backend such an area.
    pub(super) fn give_inflight(
        &self,
        area: InflightArea,
        file: BorrowedFd<'_>,
    ) -> Result<(), BackendError> {
        self.tell(Request::SetInflightFd, &area.body(), &[file], "memory of what is in flight")
    }

    /// Gives the backend a ring, for it to serve from `base` on if it is enabled.
    pub(super) fn start_ring(&self, ring: &RingSetup<'_>) -> Result<(), BackendError> {
        let RingSetup { number, size, base, addresses, kick, call, enabled } = *ring;
        let state = |value: u16| messages::ring_state(number, value.into());
        self.tell(Request::SetVringNum, &state(size), &[], "a ring's size")?;
        self.tell(Request::SetVringBase, &state(base), &[], "a ring's beginning")?;
        self.tell(Request::SetVringAddr, &addresses.body(number), &[], "a ring's place")?;
        let event = |given: bool| messages::ring_event(number, given);
        match call {
            Some(call) => self.tell(Request::SetVringCall, &event(true), &[call], "a ring's call"),
            None => self.tell(Request::SetVringCall, &event(false), &[], "a ring without call"),
        }?;
        self.tell(Request::SetVringKick, &event(true), &[kick], "a ring's kick")?;
        self.enable_ring(number, enabled)
    }

    /// Has the backend serve a ring that it was given, or leave it alone.
    pub(super) fn enable_ring(&self, ring: u32, enabled: bool) -> Result<(), BackendError> {
        let state = messages::ring_state(ring, enabled.into());
        self.tell(Request::SetVringEnable, &state, &[], "a ring's start")
    }

    /// Takes a ring back; the backend touches it no more when this returns.
    pub(super) fn stop_ring(&self, ring: u32) -> Result<(), BackendError> {
        let what = "a ring's end";
        self.send(Request::GetVringBase, &messages::ring_state(ring, 0), &[], what)?;
        self.receive(Request::GetVringBase, what).map(drop)
    }

    fn number(&self, request: Request, what: &'static str) -> Result<u64, BackendError> {
        self.send(request, &[], &[], what)?;
        self.receive_number(request, what)
    }

    fn receive_number(&self, request: Request, what: &'static str) -> Result<u64, BackendError> {
        let (answer, _) = self.receive(request, what)?;
        messages::u64_of(&answer).ok_or(BackendError::Nonsense(what))
    }

    /// Sends what has no answer of its own, and waits until it is done where the backend can tell.
    fn tell(
        &self,
        request: Request,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
        what: &'static str,
    ) -> Result<(), BackendError> {
        self.send(request, body, descriptors, what)?;
        if !self.acknowledged {
            return Ok(());
        }
        match self.receive_number(request, what)? {
            0 => Ok(()),
            _ => Err(BackendError::Refused(what)),
        }
    }

    fn send(
        &self,
        request: Request,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
        what: &'static str,
    ) -> Result<(), BackendError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PARTS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(BackendError::Unfit(format!("more than {MAX_PARTS} parts of memory")));
        }
        // A question is answered in any case.
        let header = messages::header(request, body.len(), self.acknowledged);
        let message = [&header[..], body].concat();
        let deadline = Instant::now() + self.patience;
        let mut sent = 0;
        while sent < message.len() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(&message[sent..])], &mut ancillary, flags) {
                Ok(count) => {
                    sent += count;
                    // They went with the first byte.
                    ancillary.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline, what)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(BackendError::Gone(what)),
                Err(error) => return Err(BackendError::Socket("write to", error)),
            }
        }
        Ok(())
    }

    /// The body of an answer, and the descriptor that came with it.
    fn receive(
        &self,
        request: Request,
        what: &'static str,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), BackendError> {
        let deadline = Instant::now() + self.patience;
        let mut header = [0; HEADER_BYTES];
        let file = self.fill(&mut header, deadline, what)?;
        let bytes = messages::answer_bytes(&header, request).ok_or(BackendError::Nonsense(what))?;
        let mut body = vec![0; bytes];
        let later = self.fill(&mut body, deadline, what)?;
        Ok((body, file.or(later)))
    }

    fn fill(
        &self,
        bytes: &mut [u8],
        deadline: Instant,
        what: &'static str,
    ) -> Result<Option<OwnedFd>, BackendError> {
        let (mut filled, mut file) = (0, None);
        while filled < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PARTS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes[filled..])];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Ok(received) if received.bytes == 0 => return Err(BackendError::Gone(what)),
                Ok(received) => filled += received.bytes,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::IN, deadline, what)?;
                    continue;
                }
                Err(Errno::CONNRESET) => return Err(BackendError::Gone(what)),
                Err(error) => return Err(BackendError::Socket("read", error)),
            }
            // More than one is closed again.
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    file = file.or(files.last());
                }
            }
        }
        Ok(file)
    }

    fn wait(
        &self,
        flags: PollFlags,
        deadline: Instant,
        what: &'static str,
    ) -> Result<(), BackendError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BackendError::Silent(what, self.patience));
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.socket, flags)], Some(&left)) {
            // Whoever waits looks again, and comes back here when it was too early.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(BackendError::Socket("wait for", error)),
        }
    }
}

/// All that a backend is told of a ring.
#[derive(Clone, Copy)]
pub(super) struct RingSetup<'a> {
    pub(super) number: u32,
    pub(super) size: u16,
    /// The entry of the available ring to begin with.
    pub(super) base: u16,
    pub(super) addresses: RingAddresses,
    pub(super) kick: BorrowedFd<'a>,
    pub(super) call: Option<BorrowedFd<'a>>,
    pub(super) enabled: bool,
}
