//! The VMM's side of its socket: it takes requests one after the other, and tells of what happens
//! meanwhile, until the VM ends.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vial_vmm_api::{
    Action, CodecError, Descriptor, Event, ExitReason, Failure, FailureKind, MAX_DESCRIPTORS,
    MAX_MESSAGE_BYTES, Message, Reply, Request, VmState, decode, encode,
};

use crate::devices::vhost_user::BackendGone;
use crate::machine::{
    Descriptors, DiskError, GuestConnected, InterfaceError, Machine, MachineError, PassError,
    Purpose, ResizeError, RunningMachine,
};
use crate::news::{News, Notice};
use crate::vcpu::EndOfVm;
use crate::vm_state::{self, VmEvent};
use crate::wake::Wake;

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// An operation on the socket, or the wait for it.
    #[error("{0} the API socket: {1}")]
    Socket(&'static str, rustix::io::Errno),
    /// The other side sent what is no message.
    #[error("a request on the API socket: {0}")]
    Codec(#[from] CodecError),
    /// The other side sent more than a message may have.
    #[error(
        "a request on the API socket has over {MAX_MESSAGE_BYTES} bytes or over \
         {MAX_DESCRIPTORS} descriptors"
    )]
    Truncated,
    /// An event descriptor.
    #[error("make an event descriptor: {0}; raise the limit of open files")]
    Event(rustix::io::Errno),
}

/// The socket and the VM behind it.
pub struct Control {
    socket: OwnedFd,
    state: VmState,
    machine: Option<RunningMachine>,
    /// What other threads tell this one.
    news: Arc<News>,
    end: EndOfVm,
}

impl Control {
    /// Serves `socket`, one end of a `SOCK_SEQPACKET` pair.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(socket: OwnedFd) -> Result<Self, ControlError> {
        let wake = Wake::new().map_err(ControlError::Event)?;
        let news = Arc::new(News::new(wake));
        let end = EndOfVm::new(news.clone());
        Ok(Self { socket, state: VmState::Empty, machine: None, news, end })
    }

    /// Serves until the VM ends, and returns why it did.
    ///
    /// # Errors
    /// The socket fails, or brings what is no request.
    pub fn run(&mut self) -> Result<ExitReason, ControlError> {
        loop {
            let (readable, woken) = self.wait()?;
            if woken {
                let told = self.news.take();
                self.forward(told.notices);
                if let Some(reason) = told.end {
                    return Ok(self.finish(reason));
                }
            }
            if readable && let Some(reason) = self.serve_request()? {
                return Ok(self.finish(reason));
            }
        }
    }

    fn wait(&self) -> Result<(bool, bool), ControlError> {
        let mut events = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(self.news.bell(), PollFlags::IN),
        ];
        loop {
            match poll(&mut events, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(ControlError::Socket("wait for", error)),
            }
        }
        Ok((!events[0].revents().is_empty(), !events[1].revents().is_empty()))
    }

    fn forward(&mut self, notices: impl IntoIterator<Item = Notice>) {
        for notice in notices {
            match notice {
                Notice::GuestConnected(port, socket) => {
                    let event = Event::GuestConnected { port, socket: Descriptor(0) };
                    // A guest that connects faster than the shim reads loses its connections.
                    if let Err(error) =
                        self.send(&Message::Event(event), &[socket.as_fd()], SendFlags::DONTWAIT)
                    {
                        tracing::warn!(port, %error, "a connection of the guest's is dropped");
                    }
                }
                Notice::BackendGone(backend) => {
                    // The guest has nothing to say about these, so the shim's reading is waited for.
                    let event = Message::Event(Event::BackendGone { backend });
                    if let Err(error) = self.send(&event, &[], SendFlags::empty()) {
                        tracing::error!(backend, %error, "nobody connects to its backend again");
                    }
                }
            }
        }
    }

    fn finish(&mut self, reason: ExitReason) -> ExitReason {
        self.state = vm_state::next(self.state, VmEvent::End).unwrap_or(VmState::Ended);
        if let Some(machine) = &self.machine {
            machine.flush_console();
        }
        let farewell = Message::Event(Event::Exited(reason));
        if let Err(error) = self.send(&farewell, &[], SendFlags::DONTWAIT) {
            // The exit status says the same.
            tracing::debug!(%error, "nobody hears why the VM ended");
        }
        reason
    }

    /// Serves one request. Returns a reason when that ends the VM.
    fn serve_request(&mut self) -> Result<Option<ExitReason>, ControlError> {
        let Some((bytes, descriptors)) = self.receive()? else {
            return Ok(Some(ExitReason::Stopped));
        };
        let Request { id, action } = decode(&bytes)?;
        let mut end = None;
        let result = match action {
            Action::Boot(config) => {
                let gone = self.backend_gone();
                self.boot(|connected| {
                    Machine::build(*config, descriptors, connected, gone, Purpose::Run)
                })
            }
            Action::BootTemplate(config) => {
                let gone = self.backend_gone();
                let purpose = Purpose::Template { max_vcpus: config.max_vcpus };
                self.boot(|connected| {
                    Machine::build(config.machine, descriptors, connected, gone, purpose)
                })
            }
            Action::Restore(config) => {
                self.boot(|connected| Machine::restore(*config, descriptors, connected))
            }
            Action::Save { memory, state } => {
                let (result, stops) = self.save(memory, state, descriptors);
                end = stops.then_some(match result {
                    Ok(_) => ExitReason::Stopped,
                    Err(_) => ExitReason::Failed,
                });
                result
            }
            Action::VsockConnect { port, socket } => self.connect(port, socket, descriptors),
            Action::AddFunctions { way, functions } => {
                let add = |machine: &mut RunningMachine| {
                    machine.add_functions(way, functions, descriptors)
                };
                self.change(VmEvent::Pass, add, PassError::is_invalid_request)
                    .map(Reply::FunctionsAdded)
            }
            Action::RemoveFunctions { set } => self
                .change(
                    VmEvent::Pass,
                    |machine| machine.remove_functions(set),
                    PassError::is_invalid_request,
                )
                .map(|()| Reply::Done),
            Action::AddDisk { file, read_only, serial, shape, ring } => {
                let add = |machine: &mut RunningMachine| {
                    machine.add_disk(file, read_only, &serial, (&shape, ring), descriptors)
                };
                self.change(VmEvent::Pass, add, DiskError::is_invalid_request)
                    .map(|device| Reply::DiskAdded { device })
            }
            Action::RemoveDisk { device } => self
                .change(
                    VmEvent::Pass,
                    |machine| machine.remove_disk(device),
                    DiskError::is_invalid_request,
                )
                .map(|()| Reply::Done),
            Action::AddInterface { taps, mac, mtu, vhosts } => {
                let add = |machine: &mut RunningMachine| {
                    machine.add_interface((taps, vhosts), mac, mtu, descriptors)
                };
                self.change(VmEvent::Pass, add, InterfaceError::is_invalid_request)
                    .map(|device| Reply::InterfaceAdded { device })
            }
            Action::RemoveInterface { device } => self
                .change(
                    VmEvent::Pass,
                    |machine| machine.remove_interface(device),
                    InterfaceError::is_invalid_request,
                )
                .map(|()| Reply::Done),
            Action::ReconnectBackend { backend, socket } => {
                self.reconnect(backend, socket, descriptors)
            }
            Action::Resize { vcpus, memory_mib } => {
                let resize = |machine: &mut RunningMachine| machine.resize(vcpus, memory_mib);
                self.change(VmEvent::Resize, resize, ResizeError::is_invalid_request)
                    .map(Reply::Size)
            }
            Action::Size => self
                .change(VmEvent::Resize, |machine| machine.size(), ResizeError::is_invalid_request)
                .map(Reply::Size),
            Action::Status => Ok(Reply::Status(self.state)),
            Action::Stop => {
                end = Some(ExitReason::Stopped);
                Ok(Reply::Done)
            }
        };
        if let Err(failure) = &result {
            tracing::warn!(request = id, reason = %failure.message, "a request failed");
        }
        self.send(&Message::Reply { id, result }, &[], SendFlags::empty())?;
        Ok(end)
    }

    fn advance(&self, event: VmEvent) -> Result<VmState, Failure> {
        vm_state::next(self.state, event)
            .map_err(|error| Failure { kind: FailureKind::State, message: error.to_string() })
    }

    fn boot(
        &mut self,
        build: impl FnOnce(GuestConnected) -> Result<Machine, MachineError>,
    ) -> Result<Reply, Failure> {
        let next = self.advance(VmEvent::Boot)?;
        let news = self.news.clone();
        let connected = Box::new(move |port, socket| {
            // A guest that connects faster than this thread tells of it loses its connections.
            let _ = news.offer(Notice::GuestConnected(port, socket));
        });
        let (machine, report) = build(connected)
            .and_then(|machine| machine.start(&self.end))
            .map_err(|error| Failure {
                kind: match error.is_invalid_request() {
                    true => FailureKind::Invalid,
                    false => FailureKind::Host,
                },
                message: error.to_string(),
            })?;
        self.machine = Some(machine);
        self.state = next;
        Ok(Reply::Booted(report))
    }

    /// Saves the machine; tells whether the VM is at its end by that.
    fn save(
        &mut self,
        memory: Descriptor,
        state: Descriptor,
        mut descriptors: Descriptors,
    ) -> (Result<Reply, Failure>, bool) {
        let failure = |kind, error: &dyn std::fmt::Display| {
            (Err(Failure { kind, message: error.to_string() }), false)
        };
        if let Err(error) = self.advance(VmEvent::Save) {
            return (Err(error), false);
        }
        let Some(machine) = &self.machine else {
            return failure(FailureKind::State, &"no VM runs; boot one first");
        };
        let mut take = |which, what| descriptors.take(which, what).map(File::from);
        let files =
            take(memory, "the memory").and_then(|file| Ok((file, take(state, "the state")?)));
        let (memory, state) = match files {
            Ok(files) => files,
            Err(error) => return failure(FailureKind::Invalid, &error),
        };
        match machine.save(&memory, state) {
            Ok(()) => {
                self.state = self.advance(VmEvent::Saved).unwrap_or(VmState::Ended);
                (Ok(Reply::Done), true)
            }
            Err(error) if error.is_harmless() => failure(FailureKind::State, &error),
            Err(error) => (failure(FailureKind::Host, &error).0, true),
        }
    }

    fn connect(
        &mut self,
        port: u32,
        socket: Descriptor,
        mut descriptors: Descriptors,
    ) -> Result<Reply, Failure> {
        self.state = self.advance(VmEvent::Connect)?;
        let failure = |kind, message| Failure { kind, message };
        let socket = descriptors
            .take(socket, "the connection")
            .map_err(|error| failure(FailureKind::Invalid, error.to_string()))?;
        match &self.machine {
            Some(machine) => machine
                .connect(port, socket)
                .map(|()| Reply::Done)
                .map_err(|message| failure(FailureKind::Host, message)),
            None => Err(failure(FailureKind::State, "no VM runs; boot one first".into())),
        }
    }

    /// What tells of a backend that is gone.
    fn backend_gone(&self) -> BackendGone {
        let news = self.news.clone();
        // Each backend goes once before it is connected again, so that these are few.
        Arc::new(move |backend| news.tell(Notice::BackendGone(backend)))
    }

    /// Gives a device another connection to its backend.
    fn reconnect(
        &mut self,
        backend: u8,
        socket: Descriptor,
        mut descriptors: Descriptors,
    ) -> Result<Reply, Failure> {
        self.state = self.advance(VmEvent::Connect)?;
        let invalid = |message| Failure { kind: FailureKind::Invalid, message };
        let socket = descriptors
            .take(socket, "the connection to the backend")
            .map_err(|error| invalid(error.to_string()))?;
        match &self.machine {
            Some(machine) => machine.reconnect(backend, socket).map_err(invalid)?,
            None => return Err(invalid("no VM runs; boot one first".into())),
        }
        Ok(Reply::Done)
    }

    /// Changes the machine while it runs, where `event` fits the VM's state.
    fn change<T, E: std::fmt::Display>(
        &mut self,
        event: VmEvent,
        change: impl FnOnce(&mut RunningMachine) -> Result<T, E>,
        is_invalid_request: impl FnOnce(&E) -> bool,
    ) -> Result<T, Failure> {
        self.state = self.advance(event)?;
        let Some(machine) = &mut self.machine else {
            let message = "no VM runs; boot one first".into();
            return Err(Failure { kind: FailureKind::State, message });
        };
        change(machine).map_err(|error| Failure {
            kind: match is_invalid_request(&error) {
                true => FailureKind::Invalid,
                false => FailureKind::Host,
            },
            message: error.to_string(),
        })
    }

    /// How long the next packet is.
    fn next_bytes(&self) -> rustix::io::Result<usize> {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
        loop {
            match recvmsg(&self.socket, &mut [], &mut RecvAncillaryBuffer::default(), flags) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result.map(|packet| packet.bytes),
            }
        }
    }

    /// The next packet and its descriptors, or nothing when the other side is gone.
    fn receive(&self) -> Result<Option<(Vec<u8>, Descriptors)>, ControlError> {
        let next = match self.next_bytes() {
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            result => result.map_err(|error| ControlError::Socket("look at", error))?,
        };
        // Not as long as any can be: most have a hundredth of that, and what was written once stays with the process.
        let mut bytes = vec![0; next.min(MAX_MESSAGE_BYTES)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                result => break result.map_err(|error| ControlError::Socket("read", error))?,
            }
        };
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ControlError::Truncated);
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        bytes.truncate(received.bytes);
        Ok(Some((bytes, Descriptors::new(descriptors))))
    }

    fn send(
        &self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), ControlError> {
        let bytes = encode(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let flags = flags | SendFlags::NOSIGNAL;
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags)
            .map(drop)
            .map_err(|error| ControlError::Socket("write to", error))
    }
}
