//! Guests of a few dozen bytes, and the requests that boot them.
#![allow(dead_code)] // Each test program uses a part of it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use vial_vmm_api::{API_VERSION, Placement, VmConfig};

use crate::client::{Attachments, Vmm};

pub(crate) const LOAD_ADDRESS: u64 = 0x100_0000;

/// An ELF kernel whose only segment is `code`.
pub(crate) fn kernel(code: &[u8]) -> File {
    let mut bytes = vec![0u8; 120];
    bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    bytes[16..21].copy_from_slice(&[2, 0, 0x3e, 0, 1]);
    bytes[24..32].copy_from_slice(&LOAD_ADDRESS.to_le_bytes());
    bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
    bytes[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    bytes[64..72].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    let length = code.len() as u64;
    let fields = [120, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 0x1000];
    for (index, value) in fields.into_iter().enumerate() {
        bytes[72 + index * 8..80 + index * 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    bytes.extend_from_slice(code);
    file(&bytes)
}

pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// `mov al, value; mov dx, port; out dx, al`
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xb0, value, 0x66, 0xba, low, high, 0xee]
}

pub(crate) const POWER_OFF: (u16, u8) = (0x600, 0x34);

pub(crate) struct Request {
    pub(crate) config: VmConfig,
    pub(crate) files: Attachments,
}

pub(crate) fn request(kernel: File) -> Request {
    let mut files = Attachments::default();
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let kvm = files.add(kvm.expect("these tests need /dev/kvm, open for reading and writing"));
    let kernel = files.add(kernel);
    let config = VmConfig {
        version: API_VERSION,
        kvm,
        vcpus: 1,
        memory_mib: 32,
        kernel,
        image: None,
        command_line: String::new(),
        console: None,
        devices: Vec::new(),
        hot_plug: false,
        placement: Placement::default(),
        shared_memory: None,
    };
    Request { config, files }
}

pub(crate) fn start() -> Vmm {
    Vmm::start(Path::new(env!("CARGO_BIN_EXE_vial-vmm")))
}

/// A tap of the host's, as the shim makes one, until it is closed.
pub(crate) fn tap() -> File {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    tap_of([0; libc::IFNAMSIZ], flags).0
}

/// The queues of a new tap, all but the first detached.
pub(crate) fn tap_queues(count: usize) -> Vec<File> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let (first, name) = tap_of([0; libc::IFNAMSIZ], flags);
    let others = (1..count).map(|_| {
        let queue = tap_of(name, flags).0;
        attach(&queue, false);
        queue
    });
    std::iter::once(first).chain(others).collect()
}

/// Attaches a queue of a tap, or detaches it.
#[allow(unsafe_code)]
pub(crate) fn attach(queue: &File, attached: bool) {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
    let set = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// A queue of a tap of that name, and the name.
#[allow(unsafe_code)]
fn tap_of(
    name: [libc::c_char; libc::IFNAMSIZ],
    flags: libc::c_int,
) -> (File, [libc::c_char; libc::IFNAMSIZ]) {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("load tun");
    // SAFETY: zeros are a valid `ifreq`; without a name the kernel picks one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name = name;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "run the tests as root: {}", std::io::Error::last_os_error());
    (tap, request.ifr_name)
}
