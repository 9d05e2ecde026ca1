//! Streams that somebody sits at: exec and attach with and without a terminal, and forwarded ports.

use anyhow::{Result, ensure};

use super::pod::{Pod, eventually, idle, same_in_a_pod, sh};
use super::streaming::{DATA, STDERR, STDOUT, Stream, WRONG};
use super::wire::*;
use crate::suite::bed::Bed;

pub(crate) fn streams_work_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[("exec", exec), ("attach", attach), ("port-forward", forward)])
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

/// What a forwarded port sends behind its number, and whether something went wrong.
fn forwarded(pod: &Pod, port: u16) -> Result<(String, bool)> {
    let url = pod.cri.forward_url(&pod.id, &[port.into()])?;
    let stream = Stream::open(&url)?.end()?;
    let behind_the_number = |channel| {
        let text = stream.text(channel);
        let number = String::from_utf8_lossy(&port.to_le_bytes()).into_owned();
        text.strip_prefix(&number).map(str::to_owned)
    };
    let (data, wrong) = (behind_the_number(DATA), behind_the_number(WRONG));
    ensure!(data.is_some() && wrong.is_some(), "the streams of port {port} begin without it");
    Ok((data.unwrap_or_default(), wrong.is_some_and(|text| !text.is_empty())))
}

/// Ports of the pod's loopback, where most servers that are only for a port-forward listen.
fn forward(pod: &Pod) -> Result<String> {
    let many = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done";
    let line = format!(
        "echo '{many}' >/tmp/many; chmod +x /tmp/many; nc -ll -p 90 -e /bin/sh /tmp/many & \
         exec nc -ll -p 91 -e echo everywhere"
    );
    let server = pod.start(sh(&line))?;
    eventually(|| {
        server.exec("nc -w 5 127.0.0.1 90 </dev/null >/dev/null && nc -w 5 127.0.0.1 91 </dev/null")
    })?;
    let (lines, _) = forwarded(pod, 90)?;
    ensure!(lines.lines().count() == 20000, "{} lines came", lines.lines().count());
    let (text, _) = forwarded(pod, 91)?;
    let (nothing, wrong) = forwarded(pod, 92)?;
    Ok(format!("{} {text} {nothing:?} {wrong}\n", lines.len()))
}
