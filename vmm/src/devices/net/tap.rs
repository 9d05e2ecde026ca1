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

/// The flags that a tap was made with (`IFF_...`).
pub(super) fn flags(tap: &OwnedFd) -> io::Result<libc::c_int> {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF fills in the flags, and any bits are valid flags.
    Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff)
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
