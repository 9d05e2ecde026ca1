//! Making a tap, which only an ioctl does.
#![allow(unsafe_code)]

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{OFlags, fcntl_setfl},
    ioctl,
};

use crate::jail::descriptors::open_device;

/// `TUNSETIFF`, `TUNSETQUEUE` and the flags that they take (linux/if_tun.h).
const TUNSETIFF: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 202);
const TUNSETQUEUE: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 217);
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;
const IFNAMSIZ: usize = 16;

/// `struct ifreq` (netdevice(7)) as these use it.
#[repr(C)]
struct Request {
    name: [u8; IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: u16) -> Self {
        let mut request = Self { name: [0; IFNAMSIZ], flags, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request
    }
}

/// Makes a tap of that name in the network namespace of the calling thread, with as many queues as
/// `pairs`, of which the first is attached: the VMM attaches others. Where the kernel has no taps
/// with several queues, it has one. It lives until its descriptors are closed everywhere.
pub(super) fn make(name: &str, pairs: u8) -> io::Result<Vec<OwnedFd>> {
    if pairs > 1 {
        match make_several(name, pairs) {
            Ok(queues) => return Ok(queues),
            Err(error) => tracing::warn!("the tap {name} has one queue, not {pairs}: {error}"),
        }
    }
    Ok(vec![open(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)?])
}

fn make_several(name: &str, pairs: u8) -> io::Result<Vec<OwnedFd>> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    // Another's tap of that name would be given a queue more.
    let mut queues = vec![open(name, flags | IFF_TUN_EXCL)?];
    for _ in 1..pairs {
        let queue = open(name, flags)?;
        // Nothing comes in before the tap is up, so nothing is lost with it.
        let mut request = Request::new("", IFF_DETACH_QUEUE);
        // SAFETY: TUNSETQUEUE reads one `ifreq`, as below.
        unsafe { ioctl::ioctl(&queue, ioctl::Updater::<TUNSETQUEUE, Request>::new(&mut request))? };
        queues.push(queue);
    }
    Ok(queues)
}

/// Another queue of the tap of that name, or the first.
fn open(name: &str, flags: u16) -> io::Result<OwnedFd> {
    if name.len() >= IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let tap = open_device(Path::new("/dev/net/tun"))?;
    fcntl_setfl(&tap, OFlags::NONBLOCK)?;
    let mut request = Request::new(name, flags);
    // SAFETY: for TUNSETIFF the kernel reads and writes one `ifreq` of 40 bytes, as `Request` is,
    // in which any bytes are valid.
    unsafe { ioctl::ioctl(&tap, ioctl::Updater::<TUNSETIFF, Request>::new(&mut request))? };
    Ok(tap.into())
}

const _: () = assert!(size_of::<Request>() == 40);

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::network::{steer::tests::in_a_namespace, traffic};
    use vial_netlink::{Socket, network};

    const TUNGETIFF: ioctl::Opcode = ioctl::opcode::read::<u32>(b'T', 210);

    fn flags(queue: impl AsFd) -> u16 {
        let mut request = Request::new("", 0);
        // SAFETY: TUNGETIFF writes one `ifreq`, as above.
        unsafe { ioctl::ioctl(queue, ioctl::Updater::<TUNGETIFF, Request>::new(&mut request)) }
            .unwrap();
        request.flags
    }

    #[test]
    fn tap_has_a_queue_for_each_pair_and_all_but_the_first_are_detached() {
        in_a_namespace(|_| {
            let one = make("one", 1).unwrap();
            assert_eq!(one.iter().map(flags).collect::<Vec<_>>(), [0x5002]);
            for pairs in [2, 8] {
                let queues = make("several", pairs).unwrap();
                let expected = [vec![0x5102], vec![0x5502; usize::from(pairs) - 1]].concat();
                assert_eq!(queues.iter().map(flags).collect::<Vec<_>>(), expected);
                // The name is free again when they are closed, and was not before.
                make("several", 1).unwrap_err();
                make_several("several", 2).unwrap_err();
            }
            make("a-name-of-16-byte", 2).unwrap_err();
        });
    }

    #[test]
    fn tap_of_several_queues_comes_up_without_a_discipline() {
        in_a_namespace(|_| {
            let _queues = make("several", 2).unwrap();
            let mut socket = Socket::open().unwrap();
            let links = network::links(&mut socket).unwrap();
            let tap = links.iter().find(|link| link.name == "several").unwrap().index;
            socket.change(traffic::without_discipline(tap)).unwrap();
            socket.change(network::up(tap)).unwrap();
            socket.change(traffic::add_ingress(tap)).unwrap();
            assert_eq!(traffic::with_ingress(&mut socket).unwrap(), [tap]);
        });
    }
}
