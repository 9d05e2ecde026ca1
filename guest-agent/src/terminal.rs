//! A process's pseudo-terminal, as seen from its master.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};

use crate::sys;

/// The master of a pseudo-terminal. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Terminal {
    master: Arc<AsyncFd<OwnedFd>>,
}

impl Terminal {
    fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&master)?;
        rustix::fs::fcntl_setfl(&master, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Terminal { master: Arc::new(sys::async_fd(master)?) })
    }

    /// Bytes that the process wrote; 0 when nothing has the terminal open any more.
    ///
    /// # Errors
    /// The terminal is broken.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self
            .master
            .async_io(Interest::READABLE, |master| Ok(rustix::io::read(master, &mut *buffer)?));
        match read.await {
            // What Linux answers when every other end is closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        }
    }

    /// Types `bytes`.
    ///
    /// # Errors
    /// Nothing has the terminal open any more.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .master
                .async_io(Interest::WRITABLE, |master| Ok(rustix::io::write(master, bytes)?))
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Sets the size in characters, which the process learns by SIGWINCH.
    ///
    /// # Errors
    /// The terminal is broken.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(self.master.get_ref(), size)?)
    }
}

/// The socket on which libcontainer hands over a terminal's master. Its file goes with it.
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl ConsoleSocket {
    /// Listens on `path`, which must be shorter than 108 bytes (unix(7)).
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn bind(path: PathBuf) -> io::Result<Self> {
        Ok(ConsoleSocket { listener: UnixListener::bind(&path)?, path })
    }

    /// The master, once it comes.
    ///
    /// # Errors
    /// The message holds no descriptor, or the connection breaks.
    pub(crate) async fn receive(&self) -> io::Result<Terminal> {
        let (connection, _) = self.listener.accept().await?;
        let master = connection
            .async_io(Interest::READABLE, || receive_fd(&connection))
            .await?
            .ok_or_else(|| io::Error::other("no terminal came with the message"))?;
        Terminal::new(master)
    }
}

fn receive_fd(connection: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 256];
    recvmsg(connection, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.next().and_then(|mut fds| fds.next()))
}
