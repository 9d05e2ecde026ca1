//! Taps and what carries their packets, misused. A VMM may ask little of those that it was handed; what it may must
//! reach no further than its pod's network, and the rest nothing.

use std::ffi::c_long;

use crate::{Tally, call, handed::is_character_device};

/// `/dev/net/tun` (`TUN_MINOR`, linux/miscdevice.h).
const TUN: (u32, u32) = (10, 200);
/// `struct ifreq` (netdevice(7)).
const REQUEST_BYTES: usize = 40;
/// Where flags are in it.
const FLAGS: usize = 16;
/// Requests of linux/if_tun.h that a VMM makes, and their flags.
const TUNGETIFF: c_long = 0x8004_54d2;
const TUNSETOFFLOAD: c_long = 0x4004_54d0;
const TUNSETVNETHDRSZ: c_long = 0x4004_54d8;
const TUNSETQUEUE: c_long = 0x4004_54d9;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_MULTI_QUEUE: u16 = 0x0100;
/// What else can be asked of a tap (linux/if_tun.h, linux/sockios.h).
const OTHERS: [(&str, c_long); 24] = [
    ("leave checksums out", 0x4004_54c8),
    ("talk to the kernel's log", 0x4004_54c9),
    ("become another interface", 0x4004_54ca),
    ("stay for ever", 0x4004_54cb),
    ("have an owner", 0x4004_54cc),
    ("be of another hardware", 0x4004_54cd),
    ("have a group", 0x4004_54ce),
    ("tell what the kernel can", 0x8004_54cf),
    ("filter addresses", 0x4004_54d1),
    ("tell its buffer", 0x8004_54d3),
    ("have a larger buffer", 0x4004_54d4),
    ("have a filter", 0x4010_54d5),
    ("have no filter", 0x4010_54d6),
    ("have another number", 0x4004_54da),
    ("tell its filter", 0x8010_54db),
    ("have another byte order", 0x4004_54dc),
    ("have a big byte order", 0x4004_54de),
    ("choose queues by a program", 0x8004_54e0),
    ("filter by a program", 0x8004_54e1),
    ("lose its carrier", 0x4004_54e2),
    ("give its namespace away", 0x54e3),
    ("have another address", 0x8924),
    ("give its socket's namespace away", 0x894c),
    ("be bridged", 0x89a2),
];
/// How often a queue is attached and detached, each time under the lock that all networks share.
const CHANGES: u32 = 500;

/// Tries all of it on each tap, and what is for taps on all else.
pub(crate) fn try_all(tally: &mut Tally, handed: &[i32]) {
    let taps: Vec<i32> =
        handed.iter().copied().filter(|one| is_character_device(*one, TUN)).collect();
    tally.note("no tap with several queues was handed over", taps.len() < 2);
    let mut argument = [1u64; REQUEST_BYTES / 8];
    for descriptor in handed {
        for (what, request) in OTHERS {
            let ask = [(*descriptor).into(), request, argument.as_mut_ptr() as c_long, 0, 0, 0];
            tally.call(&format!("{what}: descriptor {descriptor}"), libc::SYS_ioctl, ask);
        }
        if !taps.contains(descriptor) {
            set_queue(tally, *descriptor, IFF_ATTACH_QUEUE, false);
            set_queue(tally, *descriptor, IFF_DETACH_QUEUE, false);
        }
    }
    let before: Vec<_> = taps.iter().map(|tap| kind(*tap)).collect();
    for (at, tap) in taps.iter().enumerate() {
        let number = c_long::from(*tap);
        for (what, request, value) in [
            ("take on work that does not exist", TUNSETOFFLOAD, c_long::from(u32::MAX)),
            ("have no header", TUNSETVNETHDRSZ, [0i32].as_ptr() as c_long),
            ("have a header of less than nothing", TUNSETVNETHDRSZ, [-1i32].as_ptr() as c_long),
        ] {
            tally.call(
                &format!("{what}: tap {tap}"),
                libc::SYS_ioctl,
                [number, request, value, 0, 0, 0],
            );
        }
        // Neither what it is already, nor nothing.
        set_queue(tally, *tap, 0, false);
        let attached = at == 0;
        let again = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        set_queue(tally, *tap, again, false);
        // What a driver may do by its control queue, as fast as that goes.
        let (there, back) = match attached {
            true => (IFF_DETACH_QUEUE, IFF_ATTACH_QUEUE),
            false => (IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE),
        };
        for _ in 0..CHANGES {
            set_queue(tally, *tap, there, true);
            set_queue(tally, *tap, back, true);
        }
    }
    // Whatever name a request carries, a queue stays one of the interface that the shim made it of.
    let same = taps.iter().map(|tap| kind(*tap)).eq(before);
    tally.note("a queue has become one of another tap", !same);
    let named = |kind: &Option<(Vec<u8>, u16)>| {
        kind.as_ref().is_none_or(|(_, flags)| flags & IFF_MULTI_QUEUE == 0)
    };
    tally.note(
        "a tap of several queues is none",
        taps.iter().map(|tap| kind(*tap)).any(|one| named(&one)),
    );
}

/// Attaches or detaches a queue, in the name of another interface, which is to succeed or not.
fn set_queue(tally: &mut Tally, descriptor: i32, flags: u16, may: bool) {
    let mut request = [0u8; REQUEST_BYTES];
    request[..5].copy_from_slice(b"vtap1");
    request[FLAGS..FLAGS + 2].copy_from_slice(&flags.to_ne_bytes());
    let ask = [descriptor.into(), TUNSETQUEUE, request.as_ptr() as c_long, 0, 0, 0];
    let done = call(libc::SYS_ioctl, ask) >= 0;
    // What it may and cannot is told, too: nothing was tried then.
    tally.note(&format!("queue {descriptor} with the flags {flags:#x} is {done}"), done != may);
}

/// The name of a tap and its flags.
fn kind(tap: i32) -> Option<(Vec<u8>, u16)> {
    let mut request = [0u8; REQUEST_BYTES];
    let ask = [tap.into(), TUNGETIFF, request.as_mut_ptr() as c_long, 0, 0, 0];
    if call(libc::SYS_ioctl, ask) < 0 {
        return None;
    }
    let flags = u16::from_ne_bytes([request[FLAGS], request[FLAGS + 1]]);
    Some((request[..FLAGS].to_vec(), flags))
}
