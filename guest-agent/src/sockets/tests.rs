use std::os::unix::net::UnixListener as HostListener;

use super::*;

fn sockets() -> (tempfile::TempDir, Sockets) {
    let directory = tempfile::tempdir().unwrap();
    let host = Host::Unix(directory.path().join("host"));
    let sockets = Sockets::new(directory.path().to_owned(), host);
    (directory, sockets)
}

/// One that is a volume itself, for which nothing is mounted.
fn itself(number: u64, index: u32) -> HostSocket {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    HostSocket { number, index, uid, gid, mode: 0o640, ..Default::default() }
}

#[test]
fn paths_that_leave_the_volume_are_refused() {
    for bad in ["/", "/a", "..", "a/../b", "./a", "a//b", "a/", "a\0b"] {
        assert!(!is_below(Path::new(bad)), "{bad:?}");
    }
    assert!(!is_below(Path::new(&"a".repeat(MAX_PATH_BYTES + 1))));
    for good in ["", "a", "a/b.sock", "..a"] {
        assert!(is_below(Path::new(good)), "{good:?}");
    }
}

#[tokio::test]
async fn connection_is_led_to_the_host_with_its_number_and_both_ends_are_told() {
    let (directory, sockets) = sockets();
    let host = UnixListener::bind(directory.path().join("host")).unwrap();
    let file = sockets.add("c", &itself(7, 0)).unwrap().unwrap();
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    let mut client = UnixStream::connect(&file).await.unwrap();
    let (mut shim, _) = host.accept().await.unwrap();
    assert_eq!(shim.read_u64_le().await.unwrap(), 7);
    shim.write_u8(SOCKET_REACHED).await.unwrap();
    client.write_all(b"there").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    shim.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "there");
    shim.write_all(b"back").await.unwrap();
    drop(shim);
    text.clear();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "back");
    sockets.remove(7);
    assert!(UnixStream::connect(&file).await.is_err());
}

#[tokio::test]
async fn connection_that_the_host_does_not_take_ends() {
    let (directory, sockets) = sockets();
    let file = sockets.add("c", &itself(7, 0)).unwrap().unwrap();
    let mut client = UnixStream::connect(&file).await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    let host = UnixListener::bind(directory.path().join("host")).unwrap();
    let mut client = UnixStream::connect(&file).await.unwrap();
    let (mut shim, _) = host.accept().await.unwrap();
    shim.write_u8(SOCKET_REACHED + 1).await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn connections_go_with_their_container_and_those_of_others_stay() {
    let (directory, sockets) = sockets();
    let host = UnixListener::bind(directory.path().join("host")).unwrap();
    let mut ends = Vec::new();
    for (container, number) in [("a", 1), ("b", 2)] {
        let file = sockets.add(container, &itself(number, 0)).unwrap().unwrap();
        let client = UnixStream::connect(&file).await.unwrap();
        let (mut shim, _) = host.accept().await.unwrap();
        shim.read_u64_le().await.unwrap();
        shim.write_u8(SOCKET_REACHED).await.unwrap();
        ends.push((client, shim));
    }
    sockets.release("a").unwrap();
    assert_eq!(ends[0].0.read(&mut [0; 1]).await.unwrap(), 0);
    ends[1].0.write_all(b"x").await.unwrap();
    assert_eq!(ends[1].1.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn sockets_and_connections_beyond_the_bounds_are_refused_or_wait() {
    let (directory, sockets) = sockets();
    for number in 1..=MAX_SOCKETS as u64 {
        sockets.add("c", &itself(number, number as u32)).unwrap();
    }
    let more = itself(1000, 1000);
    assert!(matches!(sockets.add("c", &more), Err(SocketError::TooMany)));
    // In place of another there is room.
    let file = sockets.add("c", &itself(1000, 1)).unwrap().unwrap();
    sockets.remove(2);
    for number in [0, 3] {
        let error = sockets.add("d", &itself(number, 0)).unwrap_err();
        assert!(matches!(error, SocketError::Number(_)), "{error}");
    }

    let host = UnixListener::bind(directory.path().join("host")).unwrap();
    let mut held = Vec::new();
    let mut clients = Vec::new();
    for _ in 0..MAX_SOCKET_CONNECTIONS {
        clients.push(UnixStream::connect(&file).await.unwrap());
        held.push(host.accept().await.unwrap());
    }
    clients.push(UnixStream::connect(&file).await.unwrap());
    let waits = tokio::time::timeout(Duration::from_millis(50), host.accept()).await;
    assert!(waits.is_err());
    held.pop();
    let soon = Duration::from_secs(10);
    tokio::time::timeout(soon, host.accept()).await.unwrap().unwrap();
}

#[test]
fn what_is_no_socket_below_the_volume_is_not_covered() {
    let directory = tempfile::tempdir().unwrap();
    let volume = directory.path().join("volume");
    fs::create_dir_all(volume.join("real")).unwrap();
    let _listener = HostListener::bind(volume.join("real/s")).unwrap();
    std::os::unix::fs::symlink("real", volume.join("link")).unwrap();
    std::os::unix::fs::symlink("real/s", volume.join("s")).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    // Of another file system, as the agent's files are.
    let own = tempfile::Builder::new().tempfile_in("/dev/shm").unwrap();
    for path in ["link/s", "s", "file", "none", "none/s", "real"] {
        let error = put_over(&volume, Path::new(path), own.path()).unwrap_err();
        assert!(
            !matches!(&error, SocketError::System { action, .. } if action.contains("mount")),
            "{error}"
        );
    }
    assert!(!volume.join("none").exists());
}

#[test]
fn join_of_too_many_of_what_is_no_path_and_of_what_nobody_has_is_refused() {
    let (directory, sockets) = sockets();
    let place = |path: &str| SocketPlace {
        container_id: "c".into(),
        path: path.into(),
        ..Default::default()
    };
    let volume = directory.path().join("volumes/c/0");
    fs::create_dir_all(&volume).unwrap();
    drop(HostListener::bind(volume.join("left")).unwrap());
    let join = |places: &[SocketPlace]| sockets.join(places).unwrap_err();
    assert!(matches!(join(&vec![place("s"); MAX_SOCKETS + 1]), SocketError::TooMany));
    for bad in ["", "/s", "../s"] {
        assert!(matches!(join(&[place(bad)]), SocketError::Path(_)), "{bad:?}");
    }
    assert!(matches!(join(&[place("none")]), SocketError::Nobody(_)));
    assert!(matches!(join(&[place("left"), place("none")]), SocketError::Nobody(_)));
}
