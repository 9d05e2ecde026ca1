//! Streams that somebody sits at: exec and attach with and without a terminal, and forwarded ports.

use anyhow::{Result, ensure};

use super::pod::{Pod, idle, same_in_a_pod, sh};
use super::streaming::{STDERR, STDOUT, Stream};
use super::wire::*;
use crate::suite::bed::Bed;

pub(crate) fn streams_work_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[("exec", exec), ("attach", attach)])
}

fn exec(pod: &Pod) -> Result<String> {
    let container = pod.start(idle())?;
    let exec = |line: &str, tty: bool| {
        let url = pod.cri.exec_url(&ExecRequest {
            container_id: container.id.clone(),
            cmd: ["sh", "-c", line].map(String::from).to_vec(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        })?;
        Stream::open(&url)
    };
    let mut told = String::new();
    let mut plain =
        exec("echo ready; echo complaint >&2; read word; echo got $word; exit 7", false)?;
    plain.until(STDOUT, "ready")?;
    plain.write(b"a word\n")?;
    let (status, plain) = plain.finish()?;
    told += &format!("{status} {:?} {:?}\n", plain.text(STDOUT), plain.text(STDERR));

    let mut terminal = exec("test -t 0 && echo terminal; read word; stty size; exit 3", true)?;
    terminal.until(STDOUT, "terminal")?;
    terminal.resize(91, 37)?;
    // The size is there before what is typed after it.
    std::thread::sleep(std::time::Duration::from_secs(1));
    terminal.write(b"\r")?;
    terminal.until(STDOUT, "37 91")?;
    let (status, _) = terminal.finish()?;
    told += &format!("{status}\n");

    // Ctrl-C reaches what runs in the terminal.
    let mut interrupted =
        exec("trap 'echo interrupted; exit 4' INT; echo up; while :; do sleep 0.1; done", true)?;
    interrupted.until(STDOUT, "up")?;
    interrupted.write(&[3])?;
    let (status, interrupted) = interrupted.finish()?;
    ensure!(interrupted.text(STDOUT).contains("interrupted"), "it was not told");
    told += &format!("{status}\n");
    Ok(told)
}

fn attach(pod: &Pod) -> Result<String> {
    let mut config = sh("echo ready; while read word; do echo got $word; done; echo end; exit 6");
    config.stdin = true;
    config.stdin_once = true;
    let container = pod.start(config)?;
    container.logs("ready")?;
    let attach = AttachRequest {
        container_id: container.id.clone(),
        stdin: true,
        tty: false,
        stdout: true,
        stderr: true,
    };
    let mut stream = Stream::open(&pod.cri.attach_url(&attach)?)?;
    stream.write(b"one\ntwo\n")?;
    stream.until(STDOUT, "got two")?;
    // Who attached leaves, and with that the input ends.
    drop(stream);
    let finished = container.finish()?;
    Ok(format!("{finished:?}"))
}
