//! What a tap is asked for beside its packets: whether it fits, and what it may leave undone.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// What of the work on packets for the guest is left to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Offloads {
    /// Packets may come with a checksum to be filled in.
    pub(super) checksum: bool,
    /// TCP segments over IPv4 may come joined.
    pub(super) tcp4: bool,
    /// TCP segments over IPv6 may come joined.
    pub(super) tcp6: bool,
}

/// Of which interface a descriptor is a queue, and how it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    name: [libc::c_char; libc::IFNAMSIZ],
    /// `IFF_...`.
    pub(super) flags: libc::c_int,
}

impl Kind {
    /// Whether the other is a queue of the same tap.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// What kind of tap it is.
pub(super) fn kind(tap: &OwnedFd) -> io::Result<Kind> {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF fills in the flags, and any bits are valid flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff;
    Ok(Kind { name: request.ifr_name, flags })
}

/// Attaches a queue to its tap behind those that are attached, or detaches it.
pub(super) fn attach_queue(queue: &OwnedFd, attached: bool) -> io::Result<()> {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

/// Sets the size of the header before each packet, in bytes.
pub(super) fn set_header_bytes(tap: &OwnedFd, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

/// Sets what is left to the guest.
pub(super) fn set_offloads(tap: &OwnedFd, offloads: Offloads) -> io::Result<()> {
    let mut bits = 0;
    for (wanted, bit) in [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tcp4, libc::TUN_F_TSO4),
        (offloads.tcp6, libc::TUN_F_TSO6),
    ] {
        if wanted {
            bits |= bit;
        }
    }
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
