use super::*;
use std::io::{Read, Write};

fn fifo() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
        .unwrap();
    (dir, path)
}

fn pair() -> (UnixStream, std::os::unix::net::UnixStream) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (UnixStream::from_std(ours).unwrap(), theirs)
}

#[test]
fn places_are_told_apart() {
    assert_eq!(place("stdout", "").unwrap(), Place::Null);
    assert_eq!(place("stdout", "/run/x").unwrap(), Place::Pipe("/run/x".into()));
    assert_eq!(place("stdout", "fifo:///run/x").unwrap(), Place::Pipe("/run/x".into()));
    assert_eq!(place("stdout", "file:///log?a=b").unwrap(), Place::File("/log".into()));
    for refused in ["binary:///bin/logger", "file://relative", "npipe://x"] {
        assert!(place("stdout", refused).is_err(), "{refused}");
    }
}

#[tokio::test]
async fn output_waits_for_a_reader_and_arrives_whole() {
    let (_dir, path) = fifo();
    let (ours, mut theirs) = pair();
    let expected: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let sent = expected.clone();
    let writer = std::thread::spawn(move || theirs.write_all(&sent).unwrap());
    let copied = AtomicU64::new(0);
    let reader = std::thread::spawn({
        let path = path.clone();
        move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut got = Vec::new();
            std::fs::File::open(path).unwrap().read_to_end(&mut got).unwrap();
            got
        }
    });
    copy_to_pipe(ours, &path, &copied).await.unwrap();
    writer.join().unwrap();
    assert!(reader.join().unwrap() == expected, "output was changed");
    assert_eq!(copied.into_inner(), expected.len() as u64);
}

#[tokio::test]
async fn input_ends_when_it_is_closed_and_the_last_client_has_gone() {
    let (_dir, path) = fifo();
    let (ours, mut theirs) = pair();
    let streams = Streams::default();
    let source = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    *lock(&streams.stdin) = Some(pipe::OpenOptions::new().open_sender(&path).unwrap());
    let copy = tokio::spawn(copy_in(source, ours));
    for text in [&b"first "[..], b"second"] {
        // A client that goes does not end the input.
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(text).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!copy.is_finished());
    streams.close_stdin();
    let got = tokio::task::spawn_blocking(move || {
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        got
    });
    assert_eq!(got.await.unwrap(), "first second");
    copy.await.unwrap().unwrap();
}

#[tokio::test]
async fn output_that_nobody_reads_is_given_up() {
    let (_dir, path) = fifo();
    let (ours, mut theirs) = pair();
    theirs.write_all(b"unread").unwrap();
    let streams = Streams::default();
    let copied = streams.copied.clone();
    let task = tokio::spawn(async move { drop(copy_to_pipe(ours, &path, &copied).await) });
    streams.outputs.lock().await.push(task);
    let patience = Duration::from_millis(50);
    tokio::time::timeout(Duration::from_secs(5), streams.finish(patience)).await.unwrap();
}

#[tokio::test]
async fn log_file_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("made/log");
    for text in ["one ", "two"] {
        let (ours, mut theirs) = pair();
        theirs.write_all(text.as_bytes()).unwrap();
        drop(theirs);
        let file = open_log(&path).await.unwrap();
        copy_out(ours, file, &AtomicU64::new(0)).await.unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "one two");
}
