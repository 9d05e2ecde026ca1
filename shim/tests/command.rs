//! The programs as a shell and containerd run them.

use std::{
    process::Command,
    time::{Duration, Instant},
};

#[test]
fn reader_that_has_seen_enough_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let vial = Command::new(env!("CARGO_BIN_EXE_vial")).arg("check").stdout(writer).output();
    let vial = vial.unwrap();
    let said = String::from_utf8_lossy(&vial.stderr);
    assert!(vial.status.success() && said.is_empty(), "{}: {said}", vial.status);
}

#[test]
fn shim_whose_starter_is_gone_ends_and_leaves_no_socket() {
    let bundle = tempfile::tempdir().unwrap();
    let (log, socket) = (bundle.path().join("log"), bundle.path().join("socket"));
    // As containerd leaves it when the starter was killed: a log that nobody reads.
    let made = Command::new("mkfifo").arg(&log).status().unwrap();
    assert!(made.success());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut shim = Command::new(env!("CARGO_BIN_EXE_containerd-shim-vial-v2"))
        .args(["-namespace", "test", "-id", "orphan", "-socket"])
        .arg(format!("unix://{}", socket.display()))
        .current_dir(bundle.path())
        .stdout(writer)
        .spawn()
        .unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        if let Some(status) = shim.try_wait().unwrap() {
            assert!(!status.success() && !socket.exists(), "{status}");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    shim.kill().unwrap();
    shim.wait().unwrap();
    panic!("it waits for somebody to read its log");
}
