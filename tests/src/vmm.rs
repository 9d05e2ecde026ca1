//! A `vial-vmm` without a shim: started, given a machine, and listened to.
//!
//! For cases and measurements that are about the VMM alone. Everything here blocks, within a time limit.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vial_vmm_api::{
    Action, BootReport, Descriptor, Event, ExitReason, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, Message,
    Reply, Request, VmConfig, decode, encode,
};

/// A VMM process with its socket. Dropping it kills the process.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    socket: OwnedFd,
    patience: Duration,
    /// Events that came while a reply was due.
    early: Vec<Event>,
}

impl Vmm {
    /// Starts `program`, which has `patience` for whatever it is asked.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path, patience: Duration) -> Result<Self> {
        // Not close-on-exec: the child finds its end under the same number.
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None)
                .context("make a socket pair")?;
        fcntl_setfd(&ours, FdFlags::CLOEXEC)?;
        let child = Command::new(program)
            .args(["--api-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { child, socket: ours, patience, early: Vec::new() })
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Boots a machine, whose configuration names `files` by their places.
    ///
    /// # Errors
    /// The VMM refuses or does not answer.
    pub fn boot(&mut self, config: VmConfig, files: &Files) -> Result<BootReport> {
        let request = Request { id: 1, action: Action::Boot(Box::new(config)) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let given = files.borrowed();
        ancillary.push(SendAncillaryMessage::ScmRights(&given));
        let bytes = encode(&request)?;
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)
            .context("send the machine to the VMM")?;
        loop {
            match self.receive()? {
                Some(Message::Reply { result: Ok(Reply::Booted(report)), .. }) => {
                    return Ok(report);
                }
                Some(Message::Reply { result, .. }) => bail!("the VMM answers {result:?}"),
                Some(Message::Event(event)) => self.early.push(event),
                None => bail!("the VMM ended instead of booting the machine"),
            }
        }
    }

    /// Waits until the guest connects to `port` of the host. The connection is dropped.
    ///
    /// # Errors
    /// The machine ended, or nothing came in time.
    pub fn guest_connected(&mut self, port: u32) -> Result<()> {
        loop {
            match self.event()? {
                Event::GuestConnected { port: connected, .. } if connected == port => {
                    return Ok(());
                }
                Event::GuestConnected { .. } | Event::BackendGone { .. } => {}
                Event::Exited(reason) => bail!("the machine ended: {reason}"),
            }
        }
    }

    /// Waits for the machine's end: what the VMM told of it, and how its process ended.
    ///
    /// # Errors
    /// It does not end in time, or without telling why.
    pub fn ended(&mut self) -> Result<(ExitReason, ExitStatus)> {
        let reason = loop {
            if let Event::Exited(reason) = self.event()? {
                break reason;
            }
        };
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok((reason, status));
            }
            if start.elapsed() > self.patience {
                bail!("the VMM said that the machine ended, and goes on for {:?}", self.patience);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn event(&mut self) -> Result<Event> {
        if !self.early.is_empty() {
            return Ok(self.early.remove(0));
        }
        match self.receive()? {
            Some(Message::Event(event)) => Ok(event),
            Some(reply) => bail!("the VMM answers {reply:?} and was not asked"),
            None => bail!("the VMM ended without saying why"),
        }
    }

    /// The next message; descriptors that come with it are closed. Nothing when the VMM is gone.
    fn receive(&self) -> Result<Option<Message>> {
        let mut waiting = [PollFd::new(&self.socket, PollFlags::IN)];
        let limit = Timespec { tv_sec: self.patience.as_secs().try_into()?, tv_nsec: 0 };
        if poll(&mut waiting, Some(&limit))? == 0 {
            bail!("the VMM said nothing for {:?}", self.patience);
        }
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let length = match recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::CONNRESET) => 0,
            received => received.context("read from the VMM")?.bytes,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptors.for_each(drop);
            }
        }
        if length == 0 { Ok(None) } else { Ok(Some(decode(&bytes[..length])?)) }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail only when it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Descriptors to hand over, each with its number.
#[derive(Debug, Default)]
pub struct Files(Vec<OwnedFd>);

impl Files {
    /// Adds one. There are far fewer than a message can carry.
    pub fn add(&mut self, file: impl Into<OwnedFd>) -> Descriptor {
        let number = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        self.0.push(file.into());
        Descriptor(number)
    }

    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }
}
