//! What crosses the border between shim and agent, and nothing that does I/O.
//!
//! Five kinds of vsock connections exist:
//!
//! - **ready**: once, when its listeners stand, the agent connects to the host's
//!   [`READY_PORT`] and keeps that connection open. Its end is the agent's end. In a template
//!   ([`TEMPLATE_WORD`]) it closes it at once, and opens it again when a pod adopts the guest.
//! - **control**: the shim connects to the guest's [`AGENT_PORT`] and speaks ttrpc
//!   ([`agent`], [`agent_ttrpc`]).
//! - **stream**: the shim connects to the guest's [`STREAM_PORT`], writes the stream's id
//!   (8 bytes, little endian, see [`stream_header`]) and then nothing but the stream's bytes. A
//!   half-close in either direction is the end of the stream in that direction. The shim may open
//!   a stream before or after the request that names it; the agent waits [`STREAM_WAIT_SECONDS`].
//! - **forward**: the shim connects to the guest's [`FORWARD_PORT`] and writes the number of a TCP
//!   port (2 bytes, little endian). The agent connects to that port of the guest's loopback and
//!   answers [`FORWARDED`]; then the two are one connection. Without that byte there is none.
//! - **socket**: a process of a container has connected to a socket of the host's. The agent connects
//!   to the host's [`SOCKET_PORT`] and writes the socket's number (8 bytes, little endian). The shim
//!   connects to the socket and answers [`SOCKET_REACHED`]; then the two are one connection. Without
//!   that byte there is none.

pub mod users;

use std::path::{Component, Path};

/// The messages of `proto/agent.proto`.
#[allow(warnings, clippy::all)] // Generated.
#[rustfmt::skip]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The client and the server trait of `proto/agent.proto`.
#[allow(warnings, clippy::all)] // Generated.
#[rustfmt::skip]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// The version of this protocol. Shim and agent refuse each other when it differs.
pub const PROTOCOL_VERSION: u32 = 13;

/// The host's vsock port that the agent connects to when it can serve.
pub const READY_PORT: u32 = 1024;
/// The guest's vsock port that serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// The guest's vsock port that takes stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// The guest's vsock port that leads to the TCP ports of its loopback.
pub const FORWARD_PORT: u32 = 1026;
/// What the agent writes when it has reached a port.
pub const FORWARDED: u8 = 1;
/// The most connections to the guest's loopback at one time.
pub const MAX_FORWARDS: usize = 128;

/// The host's vsock port that leads to Unix sockets of the host.
pub const SOCKET_PORT: u32 = 1025;
/// What the shim writes when it has reached a socket.
pub const SOCKET_REACHED: u8 = 1;
/// The most sockets of the host that a pod can have.
pub const MAX_SOCKETS: usize = 128;
/// The most connections to them at one time.
pub const MAX_SOCKET_CONNECTIONS: usize = 256;

/// The word on the kernel's command line of a guest that is to be a template.
pub const TEMPLATE_WORD: &str = "vial.template";
/// How many random bytes a guest gets that goes on from a template.
pub const SEED_BYTES: std::ops::RangeInclusive<usize> = 32..=512;

/// How long a request waits for the streams it names, and a stream for its request.
pub const STREAM_WAIT_SECONDS: u64 = 10;
/// Streams that may wait for their request at one time.
pub const MAX_WAITING_STREAMS: usize = 256;
/// The largest OCI spec or process object, in bytes. ttrpc itself ends at 4 MiB a message.
pub const MAX_SPEC_BYTES: usize = 2 << 20;
/// The longest container or exec id, in bytes: what a file name can have (NAME_MAX).
pub const MAX_ID_BYTES: usize = 255;
/// The longest path, in bytes (limits.h, PATH_MAX, without the zero byte).
pub const MAX_PATH_BYTES: usize = 4095;

/// The most interfaces of a pod.
pub const MAX_INTERFACES: usize = 8;
/// The most addresses of one interface.
pub const MAX_ADDRESSES: usize = 64;
/// The most routes of a pod.
pub const MAX_ROUTES: usize = 1024;
/// The most neighbours of a pod that are set for good.
pub const MAX_NEIGHBOURS: usize = 1024;

/// The most counters of one kind that a container's statistics have. What is beyond is left out.
pub const MAX_COUNTERS: usize = 128;

/// The most kernel parameters that a pod can set.
pub const MAX_SYSCTLS: usize = 256;

/// The most PCI functions of the host in one request.
pub const MAX_FUNCTIONS: usize = 16;
/// The device numbers on the guest's PCI bus that they can have.
pub const FUNCTION_DEVICES: std::ops::RangeInclusive<u32> = 1..=31;

/// The most devices of other processes of the host that a pod can have.
pub const MAX_SERVED_DEVICES: usize = 8;
/// The most block devices of the host that a pod can have besides.
pub const MAX_DISKS: usize = 8;

/// The tag of the shared file system, as the guest mounts it.
pub const SHARE_TAG: &str = "vial";

/// The first bytes of a stream connection.
pub fn stream_header(id: u64) -> [u8; 8] {
    id.to_le_bytes()
}

/// The stream's id out of the first bytes of its connection.
pub fn stream_id(header: [u8; 8]) -> u64 {
    u64::from_le_bytes(header)
}

/// The link in a volume that leads to its valid files, see `SharedMount.copied`.
pub const DATA_LINK: &str = "..data";

/// Whether `name` can be what the link `..data` of a volume leads to, as kubelet's writer of
/// ConfigMaps names them: one part of a path, two dots and something behind them, and not a name
/// that the writer itself uses for links.
pub fn is_data_directory(name: &str) -> bool {
    name.len() > 2
        && name.len() <= MAX_ID_BYTES
        && name.starts_with("..")
        && !name.contains(['/', '\0'])
        && !name.starts_with(DATA_LINK)
}

/// Whether `id` can name a container or an exec: 1 to [`MAX_ID_BYTES`] bytes of
/// `[A-Za-z0-9_.-]`, the first one a letter or digit, so that it is a safe file name too.
pub fn is_valid_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    (1..=MAX_ID_BYTES).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(b))
}

/// Whether `path` can be where a container has a device or a mount: absolute, below the root, never
/// upwards, at most [`MAX_PATH_BYTES`] long and without a zero byte.
pub fn is_plain_path(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    parts.next() == Some(Component::RootDir)
        && parts.clone().next().is_some()
        && parts.all(|part| matches!(part, Component::Normal(_)))
        && path.len() <= MAX_PATH_BYTES
        && !path.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_directories_are_beside_their_link() {
        for good in
            ["..2026_11_22_14_00_00.123456789", "..x", "...", &format!("..{}", "a".repeat(253))]
        {
            assert!(is_data_directory(good), "{good}");
        }
        for bad in ["", ".", "..", "a", "..a/b", "../a", "..data", "..data_tmp", "..a\0", "/..a"] {
            assert!(!is_data_directory(bad), "{bad}");
        }
        assert!(!is_data_directory(&format!("..{}", "a".repeat(254))));
    }

    #[test]
    fn stream_id_survives_its_header() {
        for id in [1, 0x0102_0304_0506_0708, u64::MAX] {
            assert_eq!(stream_id(stream_header(id)), id);
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let longest = format!("/{}", "a/".repeat(MAX_PATH_BYTES / 2));
        for good in ["/dev/fast", "/a", "/a/./b", &longest] {
            assert!(is_plain_path(good), "{good:?}");
        }
        let longer = longest + "a";
        for bad in ["", "/", "a", "./a", "/a/../b", "/..", "/a\0", &longer] {
            assert!(!is_plain_path(bad), "{bad:?}");
        }
    }

    #[test]
    fn ids_that_are_no_safe_file_name_are_refused() {
        for bad in ["", ".", "..", "a/b", "-a", ".a", "a b", "a\n", "ä"] {
            assert!(!is_valid_id(bad), "{bad:?}");
        }
        assert!(!is_valid_id(&"a".repeat(MAX_ID_BYTES + 1)));
        for good in ["a", "0", "demo_1.x-y", &"a".repeat(MAX_ID_BYTES)] {
            assert!(is_valid_id(good), "{good:?}");
        }
    }
}
