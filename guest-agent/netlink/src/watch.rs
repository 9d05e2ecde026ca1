//! Being told when a network namespace changes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::network::is_shown;
use crate::{RECEIVE_BYTES, parts};

/// The groups that tell of links, neighbours, addresses and routes, as bits (linux/rtnetlink.h,
/// `RTMGRP_...`).
const RTMGRP_LINK: u32 = 1;
const RTMGRP_NEIGH: u32 = 4;
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
const RTMGRP_IPV4_ROUTE: u32 = 0x40;
const RTMGRP_IPV6_IFADDR: u32 = 0x100;
const RTMGRP_IPV6_ROUTE: u32 = 0x400;
const GROUPS: u32 = RTMGRP_LINK
    | RTMGRP_NEIGH
    | RTMGRP_IPV4_IFADDR
    | RTMGRP_IPV4_ROUTE
    | RTMGRP_IPV6_IFADDR
    | RTMGRP_IPV6_ROUTE;

/// A socket that tells of changes in the network namespace that its opener was in.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
}

impl Watch {
    /// Opens it. What changes from here on is told.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // NETLINK_ROUTE is protocol 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        // The kernel picks the number that it is known by.
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self { socket })
    }

    /// Takes all that was told up to now. Returns whether anything was that [`crate::network`] lists:
    /// an interface, an address, a route, a neighbour; or that there was more than the socket holds, so
    /// that nobody knows.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn drain(&self) -> io::Result<bool> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let mut changed = false;
        loop {
            match recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC) {
                Ok((_, length)) => {
                    // One that is cut off may be about anything.
                    changed |= length > buffer.len()
                        || parts(&buffer[..length]).any(|part| is_shown(part.kind, part.body));
                }
                Err(Errno::AGAIN) => return Ok(changed),
                Err(Errno::INTR) => {}
                Err(Errno::NOBUFS) => changed = true,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;
    use crate::{Socket, network};

    /// Does `work` in a network namespace of its own.
    #[allow(unsafe_code)]
    fn in_a_namespace(work: impl FnOnce() + Send) {
        let inside = || {
            // SAFETY: no memory or descriptors stop being shared; the thread ends in the namespace.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("run the tests as root");
            work();
        };
        std::thread::scope(|scope| scope.spawn(inside).join()).unwrap();
    }

    #[test]
    fn what_changes_is_told_and_what_stays_is_not() {
        in_a_namespace(|| {
            let mut socket = Socket::open().unwrap();
            let watch = Watch::open().unwrap();
            assert!(!watch.drain().unwrap());
            // The loopback is the first interface of every namespace.
            socket.change(network::up(1)).unwrap();
            assert!(watch.drain().unwrap());
            assert!(!watch.drain().unwrap());
            network::links(&mut socket).unwrap();
            assert!(!watch.drain().unwrap());
            let cidr = "10.0.0.1/24".parse().unwrap();
            for message in [network::add_address(1, cidr), network::remove_address(1, cidr)] {
                socket.change(message).unwrap();
                assert!(watch.drain().unwrap());
            }
        });
    }

    #[test]
    fn more_than_the_socket_holds_is_a_change() {
        in_a_namespace(|| {
            let mut socket = Socket::open().unwrap();
            socket.change(network::up(1)).unwrap();
            let watch = Watch::open().unwrap();
            for n in 0..2000u16 {
                let [high, low] = n.to_be_bytes();
                let cidr = format!("10.1.{high}.{low}/32").parse().unwrap();
                socket.change(network::add_address(1, cidr)).unwrap();
            }
            // Of that many some are lost; what comes after is told again.
            assert!(watch.drain().unwrap());
            socket.change(network::remove_address(1, "10.1.0.0/32".parse().unwrap())).unwrap();
            assert!(watch.drain().unwrap());
        });
    }
}
