//! The client of the socket to `vial-vmm`.
//!
//! Requests are numbered and answered in any order; events come in between. One task reads the
//! socket. The VMM is not trusted: what cannot be decoded, and what comes in greater number than
//! is ever asked for, ends the connection, and with it the VM.

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::{
    io::Interest,
    net::UnixDatagram,
    sync::{mpsc, oneshot},
};
use vial_vmm_api::{
    Action, CodecError, Descriptor, Event, ExitReason, Failure, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES,
    Message, Reply, Request, decode, encode,
};

/// Events that may wait to be taken. The VMM has to wait when there are more.
const WAITING_EVENTS: usize = 64;

/// What the VMM told unasked, with its descriptor.
#[derive(Debug)]
pub enum VmmEvent {
    /// The guest connected to that port of the host.
    GuestConnected {
        /// The host's port.
        port: u32,
        /// The connection.
        socket: OwnedFd,
    },
    /// The connection to a vhost-user backend broke.
    BackendGone(u8),
    /// The VM ended.
    Exited(ExitReason),
}

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VMM refused it and says why.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// The connection to the VMM is gone.
    #[error("the VMM has ended")]
    Closed,
    /// No answer comes.
    #[error("the VMM has not answered within {0:?}")]
    Late(std::time::Duration),
    /// The answer is of another kind than the request.
    #[error("the VMM answered something else than what it was asked")]
    Answer,
    /// The message cannot be encoded.
    #[error("cannot encode a request to the VMM: {0}")]
    Encode(CodecError),
    /// The socket failed.
    #[error("cannot {action} the VMM's socket: {error}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: std::io::Error,
    },
}

type Answer = Result<Reply, Failure>;

/// Requests that wait for their answer; `None` when the connection is gone.
type Waiting = Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>;

fn lock(waiting: &Waiting) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
    waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// One connection to a VMM.
#[derive(Debug)]
pub struct VmmClient {
    socket: Arc<UnixDatagram>,
    waiting: Arc<Waiting>,
    next_id: std::sync::atomic::AtomicU64,
    reader: tokio::task::JoinHandle<()>,
}

impl VmmClient {
    /// Speaks over `socket`, a non-blocking `SOCK_SEQPACKET` one. Events come out of the receiver,
    /// which ends when the connection does.
    ///
    /// # Errors
    /// [`VmmError::Socket`].
    pub fn new(socket: OwnedFd) -> Result<(Self, mpsc::Receiver<VmmEvent>), VmmError> {
        // What tokio calls a datagram socket is any that it can watch; it is never told to read
        // or write by itself here.
        let socket = UnixDatagram::from_std(socket.into())
            .map_err(|error| VmmError::Socket { action: "watch", error })?;
        let socket = Arc::new(socket);
        let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, taken) = mpsc::channel(WAITING_EVENTS);
        let reader = tokio::spawn(read(socket.clone(), waiting.clone(), events));
        let next_id = std::sync::atomic::AtomicU64::new(1);
        Ok((Self { socket, waiting, next_id, reader }, taken))
    }

    /// Asks the VMM, handing it `descriptors`, and waits for the answer.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn request(
        &self,
        action: Action,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Reply, VmmError> {
        let id = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let bytes = encode(&Request { id, action }).map_err(VmmError::Encode)?;
        let (answer, answered) = oneshot::channel();
        lock(&self.waiting).as_mut().ok_or(VmmError::Closed)?.insert(id, answer);
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, || send(self.socket.as_fd(), &bytes, descriptors))
            .await;
        if let Err(error) = sent {
            if let Some(waiting) = lock(&self.waiting).as_mut() {
                waiting.remove(&id);
            }
            return Err(match error.kind() {
                std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => {
                    VmmError::Closed
                }
                _ => VmmError::Socket { action: "write to", error },
            });
        }
        answered.await.map_err(|_| VmmError::Closed)?.map_err(VmmError::Refused)
    }

    /// Whether the connection to the VMM is gone.
    pub fn is_closed(&self) -> bool {
        lock(&self.waiting).is_none()
    }

    /// Connects a new stream to a port of the guest.
    ///
    /// # Errors
    /// [`VmmError`]. A guest that refuses shows as the end of the stream.
    pub async fn connect(&self, port: u32) -> Result<tokio::net::UnixStream, VmmError> {
        let pair = |error| VmmError::Socket { action: "make a stream for", error };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(pair)?;
        ours.set_nonblocking(true).map_err(pair)?;
        let action = Action::VsockConnect { port, socket: Descriptor(0) };
        match self.request(action, &[theirs.as_fd()]).await? {
            Reply::Done => tokio::net::UnixStream::from_std(ours).map_err(pair),
            _ => Err(VmmError::Answer),
        }
    }
}

impl Drop for VmmClient {
    fn drop(&mut self) {
        // The task holds the socket; the VMM ends when the last end of it is closed.
        self.reader.abort();
    }
}

async fn read(socket: Arc<UnixDatagram>, waiting: Arc<Waiting>, events: mpsc::Sender<VmmEvent>) {
    loop {
        let received = socket.async_io(Interest::READABLE, || receive_next(socket.as_fd())).await;
        let (message, descriptors) = match received {
            Ok(Some((bytes, descriptors))) => match decode::<Message>(&bytes) {
                Ok(message) => (message, descriptors),
                Err(error) => {
                    tracing::error!("the VMM sent what it must not: {error}");
                    break;
                }
            },
            Ok(None) => break,
            Err(error) => {
                tracing::error!("cannot read from the VMM's socket: {error}");
                break;
            }
        };
        match message {
            Message::Reply { id, result } => {
                let asked = lock(&waiting).as_mut().and_then(|waiting| waiting.remove(&id));
                match asked {
                    // Whoever asked may have gone.
                    Some(answer) => drop(answer.send(result)),
                    None => tracing::warn!("the VMM answered request {id}, which nobody made"),
                }
            }
            Message::Event(event) => {
                let Some(event) = with_descriptor(event, descriptors) else {
                    tracing::error!("the VMM sent an event without its descriptor");
                    break;
                };
                if events.send(event).await.is_err() {
                    break;
                }
            }
        }
    }
    // Dropping the senders tells everyone who waits.
    lock(&waiting).take();
}

fn with_descriptor(event: Event, descriptors: Vec<OwnedFd>) -> Option<VmmEvent> {
    match event {
        Event::GuestConnected { port, socket: Descriptor(index) } => {
            let socket = descriptors.into_iter().nth(index.into())?;
            Some(VmmEvent::GuestConnected { port, socket })
        }
        Event::BackendGone { backend } => Some(VmmEvent::BackendGone(backend)),
        Event::Exited(reason) => Some(VmmEvent::Exited(reason)),
    }
}

/// Sends one packet with descriptors.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            format!("more than {MAX_DESCRIPTORS} descriptors on one message"),
        ));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// One packet and its descriptors, in no more memory than it needs: a shim waits for the next for as long as its pod lives.
fn receive_next(socket: BorrowedFd<'_>) -> std::io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let look = RecvFlags::PEEK | RecvFlags::TRUNC;
    let next = rustix::net::recvmsg(socket, &mut [], &mut RecvAncillaryBuffer::default(), look);
    let next = match next {
        Ok(packet) => packet.bytes.min(MAX_MESSAGE_BYTES),
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = vec![0; next];
    Ok(receive(socket, &mut bytes)?.map(|(_, descriptors)| (bytes, descriptors)))
}

/// One packet: its length and descriptors; `None` when the other end is closed.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> std::io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = match rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        Ok(received) => received,
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "a message over the limits of the protocol",
        ));
    }
    Ok((received.bytes > 0).then_some((received.bytes, descriptors)))
}

/// Both ends of a new socket between a shim and a VMM; the first one does not block.
///
/// # Errors
/// [`VmmError::Socket`].
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), VmmError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let make = || {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok((ours, theirs))
    };
    make().map_err(|error: rustix::io::Errno| VmmError::Socket {
        action: "make",
        error: error.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use vial_vmm_api::{FailureKind, VmState};

    fn take(socket: &OwnedFd) -> (Request, Vec<OwnedFd>) {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let (bytes, descriptors) = receive(socket.as_fd(), &mut buffer).unwrap().unwrap();
        (decode(&buffer[..bytes]).unwrap(), descriptors)
    }

    fn give(socket: &OwnedFd, message: &Message, descriptors: &[BorrowedFd<'_>]) {
        send(socket.as_fd(), &encode(message).unwrap(), descriptors).unwrap();
    }

    #[tokio::test]
    async fn replies_reach_their_requests_in_any_order() {
        let (ours, theirs) = socket_pair().unwrap();
        let (client, _events) = VmmClient::new(ours).unwrap();
        let vmm = tokio::task::spawn_blocking(move || {
            let (first, second) = (take(&theirs).0, take(&theirs).0);
            for request in [second, first] {
                let result = match request.action {
                    Action::Status => Ok(Reply::Status(VmState::Running)),
                    _ => Err(Failure { kind: FailureKind::State, message: "not now".into() }),
                };
                give(&theirs, &Message::Reply { id: request.id, result }, &[]);
            }
        });
        let (status, stop) =
            tokio::join!(client.request(Action::Status, &[]), client.request(Action::Stop, &[]));
        assert_eq!(status.unwrap(), Reply::Status(VmState::Running));
        assert_eq!(stop.unwrap_err().to_string(), "not now");
        vmm.await.unwrap();
    }

    #[tokio::test]
    async fn connect_hands_over_one_end_of_a_stream() {
        let (ours, theirs) = socket_pair().unwrap();
        let (client, _events) = VmmClient::new(ours).unwrap();
        let vmm = tokio::task::spawn_blocking(move || {
            let (request, descriptors) = take(&theirs);
            let wanted = Action::VsockConnect { port: 1025, socket: Descriptor(0) };
            assert_eq!(request.action, wanted);
            give(&theirs, &Message::Reply { id: request.id, result: Ok(Reply::Done) }, &[]);
            let mut stream =
                std::os::unix::net::UnixStream::from(descriptors.into_iter().next().unwrap());
            stream.write_all(b"hello").unwrap();
        });
        let stream = client.connect(1025).await.unwrap().into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        let mut text = String::new();
        (&stream).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        vmm.await.unwrap();
    }

    #[tokio::test]
    async fn requests_fail_when_the_vmm_is_gone() {
        let (ours, theirs) = socket_pair().unwrap();
        let (client, mut events) = VmmClient::new(ours).unwrap();
        let vmm = tokio::task::spawn_blocking(move || {
            take(&theirs);
            give(&theirs, &Message::Event(Event::Exited(ExitReason::Panic)), &[]);
        });
        assert!(matches!(client.request(Action::Status, &[]).await, Err(VmmError::Closed)));
        assert!(matches!(events.recv().await, Some(VmmEvent::Exited(ExitReason::Panic))));
        assert!(events.recv().await.is_none());
        assert!(matches!(client.request(Action::Status, &[]).await, Err(VmmError::Closed)));
        vmm.await.unwrap();
    }

    #[tokio::test]
    async fn event_without_its_descriptor_ends_the_connection() {
        let (ours, theirs) = socket_pair().unwrap();
        let (_client, mut events) = VmmClient::new(ours).unwrap();
        let event = Event::GuestConnected { port: 1, socket: Descriptor(0) };
        give(&theirs, &Message::Event(event), &[]);
        assert!(events.recv().await.is_none());
    }

    #[tokio::test]
    async fn message_over_the_limit_ends_the_connection() {
        let (ours, theirs) = socket_pair().unwrap();
        let (_client, mut events) = VmmClient::new(ours).unwrap();
        send(theirs.as_fd(), &vec![0; MAX_MESSAGE_BYTES + 1], &[]).unwrap();
        assert!(events.recv().await.is_none());
    }

    #[tokio::test]
    async fn damaged_message_ends_the_connection() {
        let (ours, theirs) = socket_pair().unwrap();
        let (_client, mut events) = VmmClient::new(ours).unwrap();
        send(theirs.as_fd(), &[0xff; 32], &[]).unwrap();
        assert!(events.recv().await.is_none());
    }
}
