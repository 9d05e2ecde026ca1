//! Making a tap, which only an ioctl does.
#![allow(unsafe_code)]

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{OFlags, fcntl_setfl},
    ioctl,
};

use crate::jail::descriptors::open_device;

/// `TUNSETIFF` and the flags that it takes (linux/if_tun.h).
const TUNSETIFF: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 202);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFNAMSIZ: usize = 16;

/// `struct ifreq` (netdevice(7)) as `TUNSETIFF` uses it.
#[repr(C)]
struct Request {
    name: [u8; IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a tap of that name in the network namespace of the calling thread. It lives until its
/// descriptor is closed everywhere.
pub(super) fn make(name: &str) -> io::Result<OwnedFd> {
    if name.len() >= IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let tap = open_device(Path::new("/dev/net/tun"))?;
    fcntl_setfl(&tap, OFlags::NONBLOCK)?;
    let mut request =
        Request { name: [0; IFNAMSIZ], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: for TUNSETIFF the kernel reads and writes one `ifreq` of 40 bytes, as `Request` is,
    // in which any bytes are valid.
    unsafe { ioctl::ioctl(&tap, ioctl::Updater::<TUNSETIFF, Request>::new(&mut request))? };
    Ok(tap.into())
}

const _: () = assert!(size_of::<Request>() == 40);
