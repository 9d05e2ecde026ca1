//! A connection together with the host's socket of it: the bytes move here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use event_manager::EventSet;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::connection::Connection;
use super::packet::{HEADER_BYTES, Sent};
use crate::devices::buffers::{Buffers, Span};
use crate::memory::GuestRam;
use crate::virtio::QueueError;

/// The most data in one packet for the guest.
const MAX_DATA_BYTES: usize = 64 << 10;

/// A connection and the host's socket of it.
pub(super) struct Entry {
    pub(super) machine: Connection,
    /// `None` when the host's end is closed and all of it was read.
    pub(super) socket: Option<OwnedFd>,
    /// Data of the guest that the host has not taken yet. Bounded by the credit given.
    pub(super) backlog: VecDeque<u8>,
    /// What the event loop watches the socket for.
    pub(super) watched: Option<EventSet>,
    /// The socket had data when last asked.
    pub(super) readable: bool,
    /// The host's end is closed. The socket is not watched any more: it would report this
    /// without end.
    pub(super) hung_up: bool,
    /// The guest is done with the connection; only the backlog is still to be passed on.
    pub(super) detached: bool,
    /// It has its turn to come for a packet to the guest.
    pub(super) queued: bool,
}

impl Entry {
    pub(super) fn new(machine: Connection, socket: OwnedFd) -> Self {
        Self {
            machine,
            socket: Some(socket),
            backlog: VecDeque::new(),
            watched: None,
            readable: false,
            hung_up: false,
            detached: false,
            queued: false,
        }
    }

    /// Whether there is a packet to be made for the guest.
    pub(super) fn has_packet(&self) -> bool {
        !self.detached && (self.machine.owes() || self.can_read())
    }

    pub(super) fn can_read(&self) -> bool {
        self.readable
            && self.socket.is_some()
            && !self.machine.is_host_read_over()
            && self.machine.budget() > 0
    }

    /// What the socket is to be watched for.
    pub(super) fn interest(&self) -> Option<EventSet> {
        if self.socket.is_none() || self.hung_up {
            return None;
        }
        // Without any, hang-ups are still reported.
        let mut set = EventSet::empty();
        if !self.detached
            && !self.readable
            && !self.machine.is_host_read_over()
            && self.machine.budget() > 0
        {
            set |= EventSet::IN;
        }
        if !self.backlog.is_empty() {
            set |= EventSet::OUT;
        }
        Some(set)
    }

    /// Throws away what the host does not want.
    pub(super) fn discard_backlog(&mut self) {
        let bytes = self.backlog.len() as u32;
        self.backlog = VecDeque::new();
        self.machine.on_host_refuses();
        self.machine.on_forwarded(bytes);
    }

    /// Passes on data that came in a packet, and keeps what the host does not take at once.
    pub(super) fn deliver(
        &mut self,
        ram: &GuestRam,
        buffers: &Buffers,
        bytes: u32,
    ) -> Result<(), QueueError> {
        let Some(socket) = self.socket.as_ref().filter(|_| !self.machine.is_discarding()) else {
            self.machine.on_forwarded(bytes);
            return Ok(());
        };
        let mut span = Span { offset: HEADER_BYTES, bytes: bytes as usize };
        if self.backlog.is_empty() {
            match buffers.send(ram, socket.as_fd(), span) {
                Ok(sent) => {
                    span = Span { offset: span.offset + sent, bytes: span.bytes - sent };
                    self.machine.on_forwarded(sent as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.discard_backlog();
                    self.machine.on_forwarded(bytes);
                    return Ok(());
                }
            }
        }
        if span.bytes > 0 {
            let mut rest = vec![0; span.bytes];
            buffers.copy_to(ram, span.offset, &mut rest)?;
            // Not by doubling: the credit bounds the bytes, and this the memory.
            self.backlog.reserve_exact(rest.len());
            self.backlog.extend(rest);
        }
        Ok(())
    }

    /// Passes on what the host takes of the backlog now.
    pub(super) fn flush(&mut self) {
        let Some(socket) = &self.socket else { return };
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match send(socket, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => {
                    self.backlog.drain(..sent);
                    self.machine.on_forwarded(sent as u32);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => return self.discard_backlog(),
            }
        }
        self.backlog = VecDeque::new();
        self.shut_down();
    }

    /// Reads data of the host into a chain, behind the header.
    pub(super) fn read(&mut self, ram: &GuestRam, buffers: &Buffers) -> Option<Sent> {
        let socket = self.socket.as_ref()?;
        let room = buffers.len() - HEADER_BYTES;
        let wanted = room.min(MAX_DATA_BYTES).min(self.machine.budget() as usize);
        if wanted == 0 {
            return None;
        }
        match buffers.receive(ram, socket.as_fd(), Span { offset: HEADER_BYTES, bytes: wanted }) {
            Ok(0) => {}
            Ok(bytes) => {
                // Less than asked for is all that there was, unless the host has closed its end.
                self.readable = bytes == wanted || self.hung_up;
                return Some(self.machine.send_data(bytes as u32));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.hung_up => {
                self.readable = false;
                return None;
            }
            Err(_) => {}
        }
        self.readable = false;
        self.machine.on_host_end();
        self.machine.next_owed()
    }

    /// Tells the host of the directions that the guest has ended.
    pub(super) fn shut_down(&self) {
        let Some(socket) = &self.socket else { return };
        // It fails only when the host's end is closed, which shows elsewhere.
        if self.machine.is_guest_refusing() {
            let _ = shutdown(socket, Shutdown::Read);
        }
        if self.machine.is_guest_end() && self.backlog.is_empty() {
            let _ = shutdown(socket, Shutdown::Write);
        }
    }
}

/// Closes a socket so that the host sees the end of the stream and no error: Linux reports a
/// connection reset when data is left unread.
pub(super) fn close(socket: OwnedFd) {
    let _ = shutdown(&socket, Shutdown::Both);
    let mut unread = [0_u8; 16 << 10];
    // Nothing can be added any more, and a socket's buffer is a few hundred KiB.
    for _ in 0..256 {
        match recv(&socket, &mut unread[..], RecvFlags::DONTWAIT) {
            Ok((1.., _)) => {}
            _ => break,
        }
    }
}
