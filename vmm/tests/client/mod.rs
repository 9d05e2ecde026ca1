//! The shim's side of the VMM's socket, for tests and examples: as short as can be.
#![allow(dead_code)] // Each test program uses a part of it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vial_vmm_api::{
    Action, Event, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, Message, Request, decode, encode,
};

/// How long a test waits for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A VMM process and its socket.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    socket: Option<OwnedFd>,
    next_id: u64,
    events: Vec<(Event, Vec<OwnedFd>)>,
}

impl Vmm {
    /// Starts `program`.
    pub(crate) fn start(program: &Path) -> Self {
        // Not close-on-exec: the child finds its end under the same number.
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None)
                .expect("make a socket pair");
        rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).expect("keep our end");
        let child = Command::new(program)
            .args(["--api-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .expect("start the VMM");
        Self { child, socket: Some(ours), next_id: 1, events: Vec::new() }
    }

    /// Closes this end of the socket.
    pub(crate) fn hang_up(&mut self) {
        self.socket = None;
    }

    fn socket(&self) -> &OwnedFd {
        self.socket.as_ref().expect("a socket that was not hung up")
    }

    /// Sends bytes as they are.
    pub(crate) fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(self.socket(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
            .expect("send to the VMM");
    }

    /// The next message, or nothing when the VMM closed its end.
    pub(crate) fn receive(&self) -> Option<(Message, Vec<OwnedFd>)> {
        let mut events = [PollFd::new(self.socket(), PollFlags::IN)];
        let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        assert_ne!(poll(&mut events, Some(&limit)), Ok(0), "the VMM says nothing");
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = match recvmsg(
            self.socket(),
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::CONNRESET) => return None,
            result => result.expect("read from the VMM").bytes,
        };
        let descriptors = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        let text = &bytes[..received];
        (received > 0).then(|| (decode(text).expect("a message of the VMM"), descriptors))
    }

    /// Asks for `action` and returns its reply. Events that come first are kept.
    pub(crate) fn ask(
        &mut self,
        action: Action,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<vial_vmm_api::Reply, vial_vmm_api::Failure> {
        let id = self.next_id;
        self.next_id += 1;
        self.send_raw(&encode(&Request { id, action }).expect("encode"), descriptors);
        loop {
            match self.receive().expect("a reply") {
                (Message::Reply { id: answered, result }, _) => {
                    assert_eq!(answered, id);
                    return result;
                }
                (Message::Event(event), descriptors) => self.events.push((event, descriptors)),
            }
        }
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> (Event, Vec<OwnedFd>) {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.receive().expect("an event") {
            (Message::Event(event), descriptors) => (event, descriptors),
            (reply, _) => panic!("an event was due, not {reply:?}"),
        }
    }

    /// Waits for the process to end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for the VMM") {
                return status;
            }
            if start.elapsed() > PATIENCE {
                let _ = self.child.kill();
                panic!("the VMM does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Descriptors to attach, each with its number.
#[derive(Default)]
pub(crate) struct Attachments(Vec<OwnedFd>);

impl Attachments {
    /// Adds one.
    pub(crate) fn add(&mut self, descriptor: impl Into<OwnedFd>) -> vial_vmm_api::Descriptor {
        self.0.push(descriptor.into());
        vial_vmm_api::Descriptor(u8::try_from(self.0.len() - 1).expect("few descriptors"))
    }

    /// All of them, in order.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }
}
