//! A process's standard streams: pipes or a pseudo-terminal on one side, stream connections on
//! the other, and copying in between.
//!
//! - stdout and stderr are copied until every writer is gone, then the stream is shut down and
//!   closed. What was written before the end of the process is in the pipe and so never lost. When
//!   the host's side breaks, output is read on and thrown away: a broken log ends no container.
//! - stdin: the end of the stream closes the pipe; with a terminal it only ends the copying.
//!
//! At most [`BUFFER_BYTES`] a direction are held here.
//!
//! What is written to a stream costs a packet, a kick of the device and an interrupt. Output that
//! comes in pages is therefore gathered, by letting its writer run on ([`gather`]).

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use rustix::fs::{Uid, fchown};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use crate::streams::{Stream, StreamError, Streams};
use crate::terminal::Terminal;
use crate::users;

/// What one direction of one stream holds at most.
pub(crate) const BUFFER_BYTES: usize = 64 << 10;
/// What it holds before there was much to hold.
const FIRST_BYTES: usize = 4096;
/// What a pipe of output holds, so that its writer can go on while a buffer of it is sent. The
/// kernel takes the memory only for what is in the pipe.
const OUTPUT_PIPE_BYTES: usize = 4 * BUFFER_BYTES;
/// What programs write at once when they have much to say: their buffer. Less is somebody's line
/// or prompt, which is sent without delay.
const BULK_BYTES: usize = 4096;

/// Why a process has no stdio.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("a terminal has no separate stderr stream")]
    TerminalStderr,
    #[error("stream {0} is named twice")]
    Twice(u64),
    #[error("cannot make the pipes of the process: {0}")]
    Pipe(io::Error),
}

/// The ids of a process's streams, 0 for none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StdioIds {
    pub(crate) terminal: bool,
    pub(crate) stdin: u64,
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
}

/// The connections of a process that is about to be made. Dropping it closes them.
pub(crate) struct Claimed {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    /// Outside of the pod's user namespace.
    owner: Uid,
}

/// Ends the copying to a process's stdin when the process is no more.
#[derive(Debug, Default)]
pub(crate) struct Input(Option<JoinHandle<()>>);

impl Drop for Input {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Claimed {
    /// Waits for the streams of a process of that user.
    ///
    /// # Errors
    /// One does not come in time, or the ids contradict each other.
    pub(crate) async fn claim(
        streams: &Streams,
        ids: StdioIds,
        user: u32,
    ) -> Result<Self, StdioError> {
        if ids.terminal && ids.stderr != 0 {
            return Err(StdioError::TerminalStderr);
        }
        for (id, other) in
            [(ids.stdin, ids.stdout), (ids.stdin, ids.stderr), (ids.stdout, ids.stderr)]
        {
            if id != 0 && id == other {
                return Err(StdioError::Twice(id));
            }
        }
        Ok(Claimed {
            stdin: streams.claim(ids.stdin).await?,
            stdout: streams.claim(ids.stdout).await?,
            stderr: streams.claim(ids.stderr).await?,
            owner: Uid::from_raw(users::outside(user)),
        })
    }

    /// The child's side as pipes, and ours.
    ///
    /// # Errors
    /// No pipe can be made.
    pub(crate) fn pipes(self) -> Result<([Stdio; 3], Pipes), StdioError> {
        let mut pipes = Pipes { stdin: None, outputs: Vec::new() };
        let stdin = match self.stdin {
            None => Stdio::null(),
            Some(stream) => {
                let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(pipe_error)?;
                belong(&theirs, self.owner)?;
                let sender = pipe::Sender::from_owned_fd(ours).map_err(StdioError::Pipe)?;
                pipes.stdin = Some((stream, sender));
                Stdio::from(theirs)
            }
        };
        let mut output = |stream: Option<Stream>| -> Result<Stdio, StdioError> {
            let Some(stream) = stream else { return Ok(Stdio::null()) };
            let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(pipe_error)?;
            belong(&theirs, self.owner)?;
            // A smaller pipe is only slower.
            let _ = fcntl_setpipe_size(&ours, OUTPUT_PIPE_BYTES);
            let receiver = pipe::Receiver::from_owned_fd(ours).map_err(StdioError::Pipe)?;
            pipes.outputs.push((receiver, stream));
            Ok(Stdio::from(theirs))
        };
        let stdout = output(self.stdout)?;
        let stderr = output(self.stderr)?;
        Ok(([stdin, stdout, stderr], pipes))
    }

    /// Starts the copying from and to a terminal.
    pub(crate) fn copy_terminal(self, terminal: &Terminal) -> Input {
        let output = terminal.clone();
        let stdout = self.stdout;
        tokio::spawn(async move { terminal_output(output, stdout).await });
        let stdin = terminal.clone();
        Input(self.stdin.map(|stream| tokio::spawn(terminal_input(stream, stdin))))
    }
}

/// Lets a process open a pipe again by its name: /dev/stdout and the like.
fn belong(pipe: &OwnedFd, owner: Uid) -> Result<(), StdioError> {
    if owner.is_root() {
        return Ok(());
    }
    fchown(pipe, Some(owner), None).map_err(pipe_error)
}

fn pipe_error(error: rustix::io::Errno) -> StdioError {
    StdioError::Pipe(error.into())
}

/// Our side of a process's pipes. Dropping it closes them and the streams.
pub(crate) struct Pipes {
    stdin: Option<(Stream, pipe::Sender)>,
    outputs: Vec<(pipe::Receiver, Stream)>,
}

impl Pipes {
    /// Starts the copying.
    pub(crate) fn copy(self) -> Input {
        for (pipe, stream) in self.outputs {
            tokio::spawn(pipe_output(pipe, stream));
        }
        Input(self.stdin.map(|(stream, pipe)| tokio::spawn(pipe_input(stream, pipe))))
    }
}

/// A pipe by which a process says why it could not run: our end, and its.
///
/// # Errors
/// No pipe can be made.
pub(crate) fn error_pipe() -> Result<(pipe::Receiver, OwnedFd), StdioError> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(pipe_error)?;
    Ok((pipe::Receiver::from_owned_fd(ours).map_err(StdioError::Pipe)?, theirs))
}

/// Where output goes until its stream breaks.
struct Sink(Option<Stream>);

impl Sink {
    async fn write(&mut self, bytes: &[u8]) {
        if let Some(stream) = &mut self.0
            && stream.write_all(bytes).await.is_err()
        {
            self.0 = None;
        }
    }

    async fn end(self) {
        if let Some(mut stream) = self.0 {
            let _ = stream.shutdown().await;
        }
    }
}

async fn pipe_output(mut pipe: pipe::Receiver, stream: Stream) {
    let mut sink = Sink(Some(stream));
    // No memory for a stream that never says anything.
    if pipe.readable().await.is_ok() {
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
            let length = gather(&pipe, &mut buffer, length);
            sink.write(&buffer[..length]).await;
        }
    }
    sink.end().await;
}

/// Adds to the `length` bytes in `buffer` what their writer writes when it may go on at once, as
/// long as it does, and answers how much there is then. An end or error of the pipe is left to the
/// next read.
fn gather(pipe: &pipe::Receiver, buffer: &mut [u8], mut length: usize) -> usize {
    let mut read = length;
    while read >= BULK_BYTES && length < buffer.len() {
        rustix::thread::sched_yield();
        // Not the runtime's: it takes a pipe that was read empty for empty until it polls again.
        read = rustix::io::read(pipe, &mut buffer[length..]).unwrap_or(0);
        length += read;
    }
    length
}

async fn pipe_input(mut stream: Stream, mut pipe: pipe::Sender) {
    // Most stdin is silent: it has a whole buffer only once it has filled a small one.
    let mut buffer = vec![0; FIRST_BYTES];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        // An error of the pipe: nobody reads stdin any more.
        if pipe.write_all(&buffer[..length]).await.is_err() {
            return;
        }
        if length == FIRST_BYTES {
            buffer.resize(BUFFER_BYTES, 0);
        }
    }
}

async fn terminal_output(terminal: Terminal, stream: Option<Stream>) {
    let mut sink = Sink(stream);
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(length @ 1..) = terminal.read(&mut buffer).await {
        sink.write(&buffer[..length]).await;
    }
    sink.end().await;
}

async fn terminal_input(mut stream: Stream, terminal: Terminal) {
    let mut buffer = vec![0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if terminal.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Stdio of a helper whose container has a terminal.
pub(crate) fn null() -> [Stdio; 3] {
    [Stdio::null(), Stdio::null(), Stdio::null()]
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    async fn run(script: &str, input: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut stdin, far_in) = tokio::io::duplex(1000);
        let (mut stdout, far_out) = tokio::io::duplex(1000);
        let (mut stderr, far_err) = tokio::io::duplex(1000);
        let claimed = Claimed {
            stdin: Some(Box::new(far_in)),
            stdout: Some(Box::new(far_out)),
            stderr: Some(Box::new(far_err)),
            owner: Uid::ROOT,
        };
        let ([child_in, child_out, child_err], pipes) = claimed.pipes().unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(child_in)
            .stdout(child_out)
            .stderr(child_err)
            .spawn()
            .unwrap();
        let _copying = pipes.copy();
        let input = input.to_vec();
        tokio::spawn(async move {
            stdin.write_all(&input).await.unwrap();
            stdin.shutdown().await.unwrap();
        });
        let (mut out, mut err) = (Vec::new(), Vec::new());
        tokio::try_join!(stdout.read_to_end(&mut out), stderr.read_to_end(&mut err)).unwrap();
        child.wait().unwrap();
        (out, err)
    }

    #[tokio::test]
    async fn end_of_stdin_reaches_the_process_and_all_output_comes_back() {
        let input: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
        let (out, err) = run("cat; echo done >&2", &input).await;
        assert!(out == input);
        assert_eq!(err, b"done\n");
    }

    #[tokio::test]
    async fn bulk_output_is_gathered_and_a_line_is_not() {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let pipe = pipe::Receiver::from_owned_fd(ours).unwrap();
        let mut writer = std::fs::File::from(theirs);
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut fill = |writes: usize, bytes: usize| {
            for _ in 0..writes {
                io::Write::write_all(&mut writer, &vec![b'x'; bytes]).unwrap();
            }
        };
        fill(3, BULK_BYTES);
        assert_eq!(gather(&pipe, &mut buffer, BULK_BYTES), 4 * BULK_BYTES);
        fill(1, 10);
        assert_eq!(gather(&pipe, &mut buffer, 20), 20);
        assert_eq!(gather(&pipe, &mut buffer, BUFFER_BYTES), BUFFER_BYTES);
        assert_eq!(gather(&pipe, &mut buffer, BUFFER_BYTES - 4), BUFFER_BYTES);
        assert_eq!(rustix::io::read(&pipe, &mut buffer).unwrap(), 6);
    }

    #[tokio::test]
    async fn input_that_nobody_reads_ends_quietly() {
        let (out, _) = run("exec 0<&-; echo hello", &vec![b'x'; 200_000]).await;
        assert_eq!(out, b"hello\n");
    }

    #[tokio::test]
    async fn output_that_nobody_reads_blocks_no_process() {
        let (stdout, far_out) = tokio::io::duplex(10);
        drop(stdout);
        let claimed = Claimed {
            stdin: None,
            stdout: Some(Box::new(far_out)),
            stderr: None,
            owner: Uid::ROOT,
        };
        let ([_, child_out, _], pipes) = claimed.pipes().unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", "head -c 1000000 /dev/zero"])
            .stdin(Stdio::null())
            .stdout(child_out)
            .spawn()
            .unwrap();
        let _copying = pipes.copy();
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        assert!(status.success());
    }

    #[tokio::test]
    async fn contradicting_ids_are_refused() {
        let streams = Streams::new();
        let terminal = StdioIds { terminal: true, stderr: 3, ..StdioIds::default() };
        let error = Claimed::claim(&streams, terminal, 0).await.err().unwrap();
        assert!(matches!(error, StdioError::TerminalStderr));
        let twice = StdioIds { stdin: 4, stderr: 4, ..StdioIds::default() };
        let error = Claimed::claim(&streams, twice, 0).await.err().unwrap();
        assert!(matches!(error, StdioError::Twice(4)));
    }
}
