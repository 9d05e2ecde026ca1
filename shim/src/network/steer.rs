//! The loopback of a pod's network namespace, led to one listener whatever the port.
//!
//! Whoever forwards a port to a pod connects to 127.0.0.1 in its network namespace, where nothing of
//! the pod's listens: its processes are in the guest. A program of type `BPF_PROG_TYPE_SK_LOOKUP`
//! (linux/bpf.h; Linux 5.9) picks the shim's listener for each such connection. It goes with its
//! link, which is a descriptor, so nothing is left when the shim is gone.
#![allow(unsafe_code)]

use std::{
    io,
    net::{Ipv4Addr, TcpListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// Commands of bpf(2).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;

const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
/// The place in a network namespace, as `enum bpf_attach_type` has it.
const BPF_SK_LOOKUP: u32 = 36;

/// `struct bpf_insn`: a byte of operation, the registers, an offset, a number.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Instruction {
    operation: u8,
    /// The destination in the low half, the source in the high one.
    registers: u8,
    offset: i16,
    number: i32,
}

const fn instruction(
    operation: u8,
    destination: u8,
    source: u8,
    offset: i16,
    number: i32,
) -> Instruction {
    Instruction { operation, registers: source << 4 | destination, offset, number }
}

/// Operations (linux/bpf_common.h and linux/bpf.h), as sums of their class, size and mode.
const LOAD_WORD: u8 = 0x61;
const LOAD_BYTE: u8 = 0x71;
const LOAD_NUMBER_64: u8 = 0x18;
const STORE_NUMBER_WORD: u8 = 0x62;
const ADD_NUMBER: u8 = 0x07;
const MOVE_NUMBER: u8 = 0xb7;
const MOVE: u8 = 0xbf;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// The source register that makes a 64-bit number a map's descriptor.
const BPF_PSEUDO_MAP_FD: u8 = 1;
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

/// Offsets in `struct bpf_sk_lookup`. The address is in network order, so its first byte is that of
/// the network.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOOPBACK_NETWORK: i32 = 127;

/// Takes the listener in the map's only place for TCP connections to 127.0.0.0/8, and lets all
/// others find their socket as ever.
fn program(map: RawFd) -> [Instruction; 23] {
    // What calls leave alone, and where the stack is.
    let (context, listener, stack) = (6, 7, 10);
    [
        instruction(MOVE, context, 1, 0, 0),
        instruction(LOAD_WORD, 2, context, PROTOCOL, 0),
        instruction(JUMP_IF_NOT_EQUAL, 2, 0, 18, libc::IPPROTO_TCP),
        instruction(LOAD_WORD, 2, context, FAMILY, 0),
        instruction(JUMP_IF_NOT_EQUAL, 2, 0, 16, libc::AF_INET),
        instruction(LOAD_BYTE, 2, context, LOCAL_IP4, 0),
        instruction(JUMP_IF_NOT_EQUAL, 2, 0, 14, LOOPBACK_NETWORK),
        instruction(STORE_NUMBER_WORD, stack, 0, -4, 0),
        instruction(MOVE, 2, stack, 0, 0),
        instruction(ADD_NUMBER, 2, 0, 0, -4),
        // A number of 64 bits takes the place of two.
        instruction(LOAD_NUMBER_64, 1, BPF_PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(CALL, 0, 0, 0, BPF_FUNC_MAP_LOOKUP_ELEM),
        instruction(JUMP_IF_EQUAL, 0, 0, 7, 0),
        instruction(MOVE, listener, 0, 0, 0),
        instruction(MOVE, 1, context, 0, 0),
        instruction(MOVE, 2, listener, 0, 0),
        instruction(MOVE_NUMBER, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, BPF_FUNC_SK_ASSIGN),
        instruction(MOVE, 1, listener, 0, 0),
        instruction(CALL, 0, 0, 0, BPF_FUNC_SK_RELEASE),
        // Where every jump leads.
        instruction(MOVE_NUMBER, 0, 0, 0, SK_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// A command of bpf(2) whose result is a descriptor or 0.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is as long as it is said to be, and of the layout that the command has in
    // `union bpf_attr`; the kernel takes what lies beyond as zeros. Pointers in it are to values that
    // outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[repr(C)]
struct CreateMap {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
}

#[repr(C)]
struct UpdateElement {
    map: RawFd,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LoadProgram {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    place: u32,
}

#[repr(C)]
struct CreateLink {
    program: RawFd,
    target: RawFd,
    place: u32,
    flags: u32,
}

/// A listener that gets all TCP connections to the loopback of a network namespace.
#[derive(Debug)]
pub struct Loopback {
    /// Where they come; the local address of each is the one that was asked for.
    pub listener: TcpListener,
    /// What leads them there, as long as it is open.
    _link: OwnedFd,
}

impl Loopback {
    /// Takes the loopback of `namespace`, which the calling thread is in.
    ///
    /// # Errors
    /// Whatever the kernel says: it may be older than 5.9, or the caller not privileged.
    pub(super) fn take(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let map = descriptor(
            BPF_MAP_CREATE,
            &CreateMap { kind: BPF_MAP_TYPE_SOCKMAP, key_bytes: 4, value_bytes: 8, entries: 1 },
        )?;
        let (key, value) = (0u32, u64::from(listener.as_raw_fd().cast_unsigned()));
        let update = UpdateElement {
            map: map.as_raw_fd(),
            _padding: 0,
            key: (&raw const key) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        bpf(BPF_MAP_UPDATE_ELEM, &update)?;
        let program = load(map.as_fd())?;
        let link = descriptor(
            BPF_LINK_CREATE,
            &CreateLink {
                program: program.as_raw_fd(),
                target: namespace.as_raw_fd(),
                place: BPF_SK_LOOKUP,
                flags: 0,
            },
        )?;
        Ok(Self { listener, _link: link })
    }
}

fn load(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let instructions = program(map.as_raw_fd());
    let mut name = [0; 16];
    name[..NAME.len()].copy_from_slice(NAME);
    descriptor(
        BPF_PROG_LOAD,
        &LoadProgram {
            kind: BPF_PROG_TYPE_SK_LOOKUP,
            count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
            instructions: instructions.as_ptr() as u64,
            licence: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_bytes: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
            interface: 0,
            place: BPF_SK_LOOKUP,
        },
    )
}

/// What `bpftool` shows it as.
const NAME: &[u8] = b"vial_loopback";

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::{
        fs::File,
        io::{Read, Write},
        net::TcpStream,
    };
    use vial_netlink::Socket;

    /// Does `work` in a network namespace of its own, whose loopback is up.
    pub(in crate::network) fn in_a_namespace(work: impl FnOnce(BorrowedFd<'_>) + Send) {
        let inside = || {
            // SAFETY: no pointers; the thread ends in the namespace.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "run the tests as root");
            // The loopback is the first interface of every namespace.
            Socket::open().unwrap().change(vial_netlink::network::up(1)).unwrap();
            work(File::open("/proc/thread-self/ns/net").unwrap().as_fd());
        };
        std::thread::scope(|scope| scope.spawn(inside).join()).unwrap();
    }

    #[test]
    fn every_port_of_the_loopback_leads_to_the_listener() {
        in_a_namespace(|namespace| {
            let here = Loopback::take(namespace).unwrap();
            for port in [1, 80, 65535] {
                let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
                let (mut server, _) = here.listener.accept().unwrap();
                assert_eq!(server.local_addr().unwrap().port(), port);
                server.write_all(b"here").unwrap();
                drop(server);
                let mut text = String::new();
                client.read_to_string(&mut text).unwrap();
                assert_eq!(text, "here");
            }
        });
    }

    #[test]
    fn loopback_is_as_before_once_it_is_let_go() {
        in_a_namespace(|namespace| {
            let others = TcpListener::bind("127.0.0.1:81").unwrap();
            drop(Loopback::take(namespace).unwrap());
            TcpStream::connect("127.0.0.1:80").unwrap_err();
            let _client = TcpStream::connect("127.0.0.1:81").unwrap();
            others.accept().unwrap();
        });
    }
}
