//! The vsock device, driven by a hostile driver; the host takes what the guest connects and writes to it.

use std::sync::{Arc, Mutex};

use vial_vmm::{devices::vsock::Vsock, fuzzing::drive};

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    let taken = Arc::new(Mutex::new(Vec::new()));
    let sink = taken.clone();
    let take = move |port, socket: std::os::fd::OwnedFd| {
        assert!(port == 1024, "the guest reached port {port}, which nobody serves");
        let _ = rustix::io::write(&socket, b"from the host");
        sink.lock().expect("one thread").push(socket);
    };
    let (mut device, connector) = Vsock::new(3, vec![1024], Box::new(take)).expect("a device");
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
    connector.connect(1024, theirs.into()).expect("room for one");
    drive(&mut device, script);
    drop(ours);
}
