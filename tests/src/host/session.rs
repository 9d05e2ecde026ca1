//! One run of the emulated host, from the start of QEMU to its outcome.
//!
//! A single thread polls four things: QEMU's end, the control port, the command's output, and the signals that end us.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::control::{Lines, Message};
use super::emulator::Emulator;

/// Without a sign of life for so long, the host is dead. It sends one every few seconds, and machines can be busy.
const SILENCE_LIMIT: Duration = Duration::from_secs(75);
/// The same where instructions are counted. A second of that clock takes about ten of ours; more than three times as long
/// means that a nested guest spins, see `docs/development.md`.
const SILENCE_LIMIT_ICOUNT: Duration = Duration::from_secs(45);
/// How long QEMU may take to end after the command's status came.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);
/// Lines of the console that go into the reason of a death.
const CONSOLE_LINES: usize = 12;

/// How a run ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The command ended with this status.
    Exited(u8),
    /// The time limit came first.
    TimeLimit,
    /// The emulator or the host's kernel died first; the reason is for a reader.
    Died(String),
    /// We were told to stop.
    Interrupted,
}

/// Where a port's bytes come from: QEMU connects once it runs.
enum Port {
    Waiting(UnixListener),
    Open(UnixStream),
    Closed,
}

impl Port {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Waiting(listener) => Some(listener.as_fd()),
            Self::Open(stream) => Some(stream.as_fd()),
            Self::Closed => None,
        }
    }

    /// Call when readable: accepts the connection, or reads what is there into the buffer and returns how much.
    fn advance(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Waiting(listener) => {
                let (stream, _) = listener.accept()?;
                *self = Self::Open(stream);
                Ok(0)
            }
            Self::Open(stream) => match stream.read(buffer) {
                Ok(0) => {
                    *self = Self::Closed;
                    Ok(0)
                }
                other => other,
            },
            Self::Closed => Ok(0),
        }
    }
}

/// The state of a run.
struct Session<'a> {
    emulator: &'a mut Emulator,
    qemu: OwnedFd,
    signals: &'a mut File,
    control: Port,
    output: Port,
    lines: Lines,
    status: Option<u8>,
    broken: Option<String>,
    last_sign: Instant,
    silence_limit: Duration,
    buffer: Vec<u8>,
}

/// Waits for the run's end, passing the command's output to our standard output as it comes.
/// `limit` counts from now; `icount` is whether the host counts instructions.
pub(crate) fn wait(
    emulator: &mut Emulator,
    signals: &mut File,
    limit: Option<Duration>,
    icount: bool,
) -> Result<Outcome> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let pid = Pid::from_child(&emulator.child);
    let qemu = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch QEMU")?;
    let mut session = Session {
        control: Port::Waiting(emulator.control.try_clone()?),
        output: Port::Waiting(emulator.output.try_clone()?),
        emulator,
        qemu,
        signals,
        lines: Lines::default(),
        status: None,
        broken: None,
        last_sign: Instant::now(),
        silence_limit: if icount { SILENCE_LIMIT_ICOUNT } else { SILENCE_LIMIT },
        buffer: vec![0; 256 * 1024],
    };
    session.run(deadline)
}

impl Session<'_> {
    fn run(&mut self, deadline: Option<Instant>) -> Result<Outcome> {
        let mut power_off: Option<Instant> = None;
        loop {
            if self.step()? {
                return Ok(Outcome::Interrupted);
            }
            if self.status.is_some() || self.broken.is_some() {
                let since = *power_off.get_or_insert_with(Instant::now);
                if self.ended()? || since.elapsed() > POWER_OFF_LIMIT {
                    self.drain_output()?;
                    return Ok(match (self.status, self.broken.take()) {
                        (Some(status), _) => Outcome::Exited(status),
                        (None, reason) => self.died(&reason.unwrap_or_default()),
                    });
                }
            } else if self.ended()? {
                // The status may have been written just before the end.
                self.drain_control()?;
                self.drain_output()?;
                return Ok(match self.status {
                    Some(status) => Outcome::Exited(status),
                    None => self.died("QEMU ended before the command did"),
                });
            } else if self.last_sign.elapsed() > self.silence_limit {
                let seconds = self.silence_limit.as_secs();
                return Ok(self.died(&format!("no sign of life for {seconds} seconds")));
            } else if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(Outcome::TimeLimit);
            }
        }
    }

    /// Waits up to half a second for anything, and handles it. True when a signal tells us to end.
    fn step(&mut self) -> Result<bool> {
        let pause = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
        let (signal, control, output);
        {
            // A port that has closed is replaced by the QEMU descriptor, which is polled anyway.
            let qemu = self.qemu.as_fd();
            let mut fds = [
                PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.control.fd().unwrap_or(qemu), PollFlags::IN),
                PollFd::from_borrowed_fd(self.output.fd().unwrap_or(qemu), PollFlags::IN),
                PollFd::from_borrowed_fd(qemu, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&pause)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot poll the emulated host"),
            }
            signal = !fds[0].revents().is_empty();
            control = !fds[1].revents().is_empty();
            output = !fds[2].revents().is_empty();
        }
        if signal {
            let _ = self.signals.read(&mut self.buffer)?;
            return Ok(true);
        }
        if output {
            self.pass_output()?;
        }
        if control {
            self.take_messages()?;
        }
        Ok(false)
    }

    fn ended(&mut self) -> Result<bool> {
        Ok(self.emulator.child.try_wait().context("cannot wait for QEMU")?.is_some())
    }

    /// Returns how many bytes there were.
    fn take_messages(&mut self) -> Result<usize> {
        // A reset connection is QEMU's end, which is seen elsewhere.
        let count = self.control.advance(&mut self.buffer).unwrap_or(0);
        for message in self.lines.push(&self.buffer[..count]) {
            self.last_sign = Instant::now();
            match message {
                Message::Started | Message::Alive => {}
                Message::Exit(status) => self.status = Some(status),
                Message::Broken(reason) => self.broken = Some(reason),
            }
        }
        Ok(count)
    }

    fn pass_output(&mut self) -> Result<usize> {
        let count = self.output.advance(&mut self.buffer).unwrap_or(0);
        if count > 0 {
            let mut stdout = io::stdout().lock();
            stdout
                .write_all(&self.buffer[..count])
                .and_then(|()| stdout.flush())
                .context("cannot write the command's output to standard output")?;
        }
        Ok(count)
    }

    /// Reads on after QEMU's end; its closed sockets end the loop.
    fn drain_control(&mut self) -> Result<()> {
        while matches!(self.control, Port::Open(_)) && self.take_messages()? > 0 {}
        Ok(())
    }

    fn drain_output(&mut self) -> Result<()> {
        if !self.ended()? {
            let _ = self.emulator.child.kill();
            let _ = self.emulator.child.wait();
        }
        while matches!(self.output, Port::Open(_)) && self.pass_output()? > 0 {}
        Ok(())
    }

    fn died(&self, what: &str) -> Outcome {
        let console = fs::read(&self.emulator.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let complaints = self.emulator.complaints();
        let mut reason = match console
            .lines()
            .find(|line| line.contains("Kernel panic") || line.contains("corrupted stack end"))
        {
            Some(line) => format!("{what}: {}", line.trim()),
            None => what.to_owned(),
        };
        if !complaints.trim().is_empty() {
            reason.push_str(&format!("\nQEMU: {}", complaints.trim()));
        }
        let lines: Vec<&str> = console.lines().collect();
        let tail = &lines[lines.len().saturating_sub(CONSOLE_LINES)..];
        if !tail.is_empty() {
            reason.push_str("\nthe end of the host's console:");
        }
        for line in tail {
            reason.push_str("\n  ");
            reason.push_str(line.trim_end());
        }
        Outcome::Died(reason)
    }
}
