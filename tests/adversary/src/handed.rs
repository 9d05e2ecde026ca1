//! What a VMM is handed, misused: descriptors that lead up, are opened again or changed.

use std::ffi::{CString, c_long};

use crate::{Tally, call, taps, text};

/// The most descriptors on one message.
const MOST: usize = 64;

/// Takes the first message's descriptors from the API socket.
pub(crate) fn receive(socket: i32) -> Option<Vec<i32>> {
    let mut bytes = vec![0u8; 64 << 10];
    let mut control = vec![0u64; MOST];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zeros are a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control[..]);
    let receive = [socket.into(), (&raw mut message) as c_long, 0, 0, 0, 0];
    if call(libc::SYS_recvmsg, receive) <= 0 {
        return None;
    }
    // SAFETY: the kernel has filled the buffer with whole messages, as many bytes as it says.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() {
            return None;
        }
        let count = ((*header).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<i32>();
        let first = libc::CMSG_DATA(header).cast::<i32>();
        Some((0..count).map(|index| first.add(index).read_unaligned()).collect())
    }
}

/// Tries all that could lead out by each of them, and by the standard streams.
pub(crate) fn try_all(tally: &mut Tally, handed: &[i32]) {
    tally.note("the VMM is handed nothing", handed.is_empty());
    for descriptor in handed.iter().copied().chain(0..3) {
        climb(tally, descriptor);
        // A pipe's or a socket's mode is nobody's concern.
        if is_of_a_path(descriptor) {
            change(tally, descriptor);
        }
    }
    // Through a directory like /proc/self/fd, each of them again.
    for directory in handed {
        for descriptor in handed.iter().filter(|other| *other != directory) {
            reopen(tally, *directory, *descriptor);
        }
    }
    taps::try_all(tally, handed);
    let mut found = handed.iter().filter(|descriptor| is_vhost_net(**descriptor));
    match found.next() {
        Some(vhost) => misuse_vhost_net(tally, *vhost),
        None => tally.note("no vhost-net was handed over, so nothing was tried on it", true),
    }
}

/// What of vhost-net's requests a VMM has no use for (linux/vhost.h). They are for who owns it.
fn misuse_vhost_net(tally: &mut Tally, vhost: i32) {
    let own = call(libc::SYS_ioctl, [vhost.into(), 0xaf01, 0, 0, 0, 0]);
    tally.note("vhost-net has no owner, so nothing was tried on it", own != 0);
    // A log at an address, and by an event; another byte order of a ring; another thread, and a
    // ring for it; and how long a ring is looked at without a kick.
    let mut argument = [0u64; 2];
    for (what, request) in [
        ("log at an address", 0x4008_af04),
        ("log by an event", 0x4004_af07),
        ("change a ring's byte order", 0x4008_af13),
        ("make a thread", 0x8004_af08),
        ("give a ring to a thread", 0x4008_af15),
        ("look without a kick", 0x4008_af23),
        ("speak of addresses by messages", 0x4008_af25),
        ("leave the owner", 0xaf02),
    ] {
        let ask = [vhost.into(), request, argument.as_mut_ptr() as c_long, 0, 0, 0];
        tally.call(&format!("{what} by vhost-net"), libc::SYS_ioctl, ask);
    }
    // A ring of packets for what is no network: itself, a standard stream, nothing (VHOST_NET_SET_BACKEND).
    for descriptor in [vhost, 2, 1000] {
        let backend = [0i32, descriptor];
        let ask = [vhost.into(), 0x4008_af30, backend.as_ptr() as c_long, 0, 0, 0];
        tally.call(&format!("carry packets for {descriptor}"), libc::SYS_ioctl, ask);
    }
}

fn status(descriptor: i32) -> Option<libc::stat> {
    // SAFETY: all zeros are a valid `stat`.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    let ask = [descriptor.into(), (&raw mut status) as c_long, 0, 0, 0, 0];
    (call(libc::SYS_fstat, ask) == 0).then_some(status)
}

fn is_of_a_path(descriptor: i32) -> bool {
    let kind = status(descriptor).map_or(0, |status| status.st_mode & libc::S_IFMT);
    matches!(kind, libc::S_IFREG | libc::S_IFDIR | libc::S_IFCHR | libc::S_IFBLK)
}

/// `/dev/vhost-net` (`VHOST_NET_MINOR`, linux/miscdevice.h).
fn is_vhost_net(descriptor: i32) -> bool {
    is_character_device(descriptor, (10, 238))
}

/// Whether it is one of these numbers.
pub(crate) fn is_character_device(descriptor: i32, (major, minor): (u32, u32)) -> bool {
    status(descriptor).is_some_and(|status| {
        status.st_mode & libc::S_IFMT == libc::S_IFCHR
            && status.st_rdev == libc::makedev(major, minor)
    })
}

/// `..` from a directory must stay there.
fn climb(tally: &mut Tally, directory: i32) {
    let path = c"../../../../../../etc/passwd";
    let open = [directory.into(), text(path), 0, 0, 0, 0];
    tally.call(&format!("open {path:?} from {directory}"), libc::SYS_openat, open);
    let flags = c_long::from(libc::O_PATH | libc::O_DIRECTORY);
    let up = call(libc::SYS_openat, [directory.into(), text(c".."), flags, 0, 0, 0]);
    if let (Ok(up), Some(here)) = (i32::try_from(up), status(directory))
        && let Some(above) = status(up)
    {
        let same = (here.st_dev, here.st_ino) == (above.st_dev, above.st_ino);
        tally.note(&format!("go up from descriptor {directory}"), !same);
    }
}

/// Owner, mode and content of what is shown.
fn change(tally: &mut Tally, descriptor: i32) {
    let own = |what: &str| format!("{what} of descriptor {descriptor}");
    let number = c_long::from(descriptor);
    tally.call(&own("mode"), libc::SYS_fchmod, [number, 0o666, 0, 0, 0, 0]);
    tally.call(&own("owner"), libc::SYS_fchown, [number, 1, 1, 0, 0, 0]);
    let empty = c_long::from(libc::AT_EMPTY_PATH);
    let owner = [number, text(c""), 1, 1, empty, 0];
    tally.call(&own("owner by path"), libc::SYS_fchownat, owner);
    tally.call(&own("size"), libc::SYS_ftruncate, [number, 0, 0, 0, 0, 0]);
    let times = [number, 0, 0, 0, 0, 0];
    tally.call(&own("times"), libc::SYS_utimensat, times);
    let name = text(c"user.a");
    let attribute = [number, name, name, 1, 0, 0];
    tally.call(&own("attributes"), libc::SYS_fsetxattr, attribute);
    let kind = status(descriptor).map_or(0, |status| status.st_mode & libc::S_IFMT);
    if kind == libc::S_IFREG {
        tally.call(&own("content"), libc::SYS_pwrite64, [number, name, 1, 0, 0, 0]);
    }
}

/// Opens a descriptor again, for writing, by its name in a directory of descriptors.
fn reopen(tally: &mut Tally, directory: i32, descriptor: i32) {
    let is_file =
        status(descriptor).is_some_and(|status| status.st_mode & libc::S_IFMT == libc::S_IFREG);
    if !is_file && !is_vhost_net(descriptor) {
        return;
    }
    let Ok(name) = CString::new(descriptor.to_string()) else { return };
    let flags = c_long::from(libc::O_RDWR);
    let open = [directory.into(), text(&name), flags, 0, 0, 0];
    tally.call(&format!("open {descriptor} again for writing"), libc::SYS_openat, open);
    let mode = [directory.into(), text(&name), 0o666, 0, 0, 0];
    tally.call(&format!("mode of {descriptor} by its name"), libc::SYS_fchmodat, mode);
}
