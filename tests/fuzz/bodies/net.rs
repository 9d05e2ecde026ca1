//! The network device, driven by a hostile driver and by packets.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vial_vmm::fuzzing::drive_net;

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, network) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
    drive_net(tap, &network, script);
}
