//! What the VMM's other threads tell the one that serves its socket.

use std::os::fd::OwnedFd;

use vial_sync::Board;
use vial_vmm_api::ExitReason;

use crate::wake::Wake;

/// What is to be told to the shim, while the VM goes on.
#[derive(Debug)]
pub enum Notice {
    /// The guest has connected to a port of the host's.
    GuestConnected(u32, OwnedFd),
    /// The connection to a vhost-user backend broke.
    BackendGone(u8),
}

/// Where it is left, and why the VM ended.
pub type News = Board<Notice, ExitReason, Wake>;
