//! The `vial-vmm` process: spawned, listened to, waited for and, if need be, killed.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, prlimit},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader, Interest, unix::AsyncFd},
    sync::watch,
};
use vial_vmm_api::ExitReason;

use crate::jail::{self, Confinement, JailError, rings::Rings};

/// Memory that a VMM with functions of the host may lock beside its guest's, in MiB.
const OTHER_LOCKED_MIB: u64 = 16;
/// Lines of the VMM that are kept to explain its end.
const KEPT_LINES: usize = 8;
/// The longest line that is taken whole, in bytes; the rest comes as a line of its own.
const MAX_LINE_BYTES: u64 = 4096;

/// What failed with the VMM's process.
#[derive(Debug, thiserror::Error)]
pub enum VmmProcessError {
    /// It could not be started.
    #[error(
        "cannot start the VMM {path}: {error}; install it there, or set `vmm` in the configuration"
    )]
    Spawn {
        /// The program.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Its jail could not be made.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Something about its process could not be done.
    #[error("cannot {action} the VMM's process: {error}")]
    Process {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: std::io::Error,
    },
    /// It does not go away.
    #[error("the VMM (process {0}) did not end within {1:?} of being killed")]
    Stuck(u32, Duration),
}

fn process<E: Into<std::io::Error>>(action: &'static str) -> impl FnOnce(E) -> VmmProcessError {
    move |error| VmmProcessError::Process { action, error: error.into() }
}

/// A running, or ended, VMM.
#[derive(Debug)]
pub struct VmmProcess {
    pid: u32,
    pidfd: OwnedFd,
    ended: watch::Receiver<Option<ExitStatus>>,
    lines: Arc<Mutex<VecDeque<String>>>,
    rings: Option<Arc<Rings>>,
}

impl VmmProcess {
    /// Starts `program`, which gets `socket` and nothing else: in a jail, or with the shim's own
    /// rights.
    ///
    /// The VMM ends by itself when the other end of the socket is closed, so it needs no signal
    /// when the shim dies.
    ///
    /// # Errors
    /// [`VmmProcessError`].
    pub async fn spawn(
        program: &Path,
        socket: OwnedFd,
        jail: Option<Confinement<'_>>,
    ) -> Result<Self, VmmProcessError> {
        let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (said, output) = pipe.map_err(process("make a pipe for"))?;
        let (pid, pidfd, rings) = match jail {
            Some(jail) => {
                let jailed = jail::spawn(program, socket, output, &jail).await?;
                (jailed.pid, jailed.pidfd, jailed.rings.map(Arc::new))
            }
            None => {
                let (pid, pidfd) = spawn_unjailed(program, socket, output)?;
                (pid, pidfd, None)
            }
        };
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let said =
            tokio::net::unix::pipe::Receiver::from_owned_fd(said).map_err(process("listen to"))?;
        let watched = watch(&pidfd).map_err(process("watch"))?;
        let (status, ended) = watch::channel(None);
        let kept = lines.clone();
        tokio::spawn(async move {
            // What it last wrote has to be there when its end is told.
            let (exit, ()) = tokio::join!(exit_status(watched), keep_lines(said, &kept));
            match exit {
                Ok(exit) => drop(status.send(Some(exit))),
                Err(error) => tracing::error!("cannot wait for the VMM: {error}"),
            }
        });
        Ok(Self { pid, pidfd, ended, lines, rings })
    }

    /// By which it gets rings for disks, if it can.
    pub fn rings(&self) -> Option<&Arc<Rings>> {
        self.rings.as_ref()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its root directory, as it sees it: nothing leads up from there when it is jailed.
    ///
    /// # Errors
    /// The process is gone.
    pub fn root(&self) -> std::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = format!("/proc/{}/root", self.pid);
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }

    /// Lets it lock a guest's memory of that many MiB, counted so many times, and some for its own:
    /// what the host's PCI functions may write to has to stay where it is.
    ///
    /// # Errors
    /// The process is gone, or the shim may not raise a limit.
    pub fn allow_locked_memory(&self, memory_mib: u32, times: u32) -> Result<(), VmmProcessError> {
        let guest_mib = u64::from(memory_mib).saturating_mul(times.into());
        let most = Some((guest_mib.min(u64::MAX >> 21) + OTHER_LOCKED_MIB) << 20);
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let limit = Rlimit { current: most, maximum: most };
        prlimit(pid, Resource::Memlock, limit)
            .map(drop)
            .map_err(process("raise the limit of locked memory of"))
    }

    /// Waits until it has ended. `None` when nobody will ever know how.
    pub async fn wait(&self) -> Option<ExitStatus> {
        let mut ended = self.ended.clone();
        ended.wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }

    /// Why it ended, in a sentence, with the last thing that it said.
    pub fn explain(&self, status: Option<ExitStatus>) -> String {
        let code = status.and_then(|status| status.code());
        let reason =
            code.and_then(|code| u8::try_from(code).ok()).and_then(ExitReason::from_status);
        let mut text = match (reason, status) {
            // The guest did this; what the VMM says adds nothing.
            (Some(reason), _) if reason != ExitReason::Failed => return reason.to_string(),
            (Some(reason), _) => reason.to_string(),
            (None, Some(status)) if status.signal() == Some(libc::SIGSYS) => format!(
                "the VMM ended with {status}: it made a system call that its filter forbids; the \
                 host's kernel log (dmesg) names it in a line with type=1326, please report that"
            ),
            (None, Some(status)) => format!("the VMM ended with {status}"),
            (None, None) => "the VMM ended".into(),
        };
        let lines = self.lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(line) = telling(&lines) {
            text.push_str(": ");
            text.push_str(line);
        }
        text
    }

    /// Ends it and waits until it is gone. One that has ended already is no failure.
    ///
    /// # Errors
    /// [`VmmProcessError`].
    pub async fn kill(&self, patience: Duration) -> Result<(), VmmProcessError> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                return Err(VmmProcessError::Process { action: "kill", error: error.into() });
            }
        }
        tokio::time::timeout(patience, self.wait())
            .await
            .map(drop)
            .map_err(|_| VmmProcessError::Stuck(self.pid, patience))
    }
}

/// Starts the VMM with the rights of the shim.
fn spawn_unjailed(
    program: &Path,
    socket: OwnedFd,
    output: OwnedFd,
) -> Result<(u32, OwnedFd), VmmProcessError> {
    // The shim has one thread that starts processes, this one: nobody else can inherit the
    // socket between here and its closing below.
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty())
        .map_err(process("hand the socket to"))?;
    let spawned = std::process::Command::new(program)
        .arg("--api-fd")
        .arg(socket.as_raw_fd().to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .spawn();
    drop(socket);
    let mut child =
        spawned.map_err(|error| VmmProcessError::Spawn { path: program.into(), error })?;
    // Nobody waits for it before its descriptor does, so the number is the child's.
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
    match pidfd {
        Ok(pidfd) => Ok((child.id(), pidfd)),
        Err(error) => {
            // Its socket is closed already, so it ends in any case.
            let _ = child.kill();
            let _ = child.wait();
            Err(process("watch")(error))
        }
    }
}

/// Readable when the process has ended.
#[allow(unsafe_code)]
fn watch(pidfd: &OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    let own = pidfd.try_clone()?;
    // SAFETY: the descriptor is open, and its owner moves into what watches it, where nothing
    // closes or replaces it before that is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) };
    Ok(watched?)
}

/// Waits for a child's end, and takes its status.
async fn exit_status(process: AsyncFd<OwnedFd>) -> std::io::Result<ExitStatus> {
    loop {
        let mut ready = process.readable().await?;
        let child = WaitId::PidFd(process.get_ref().as_fd());
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(child, options)? {
            // As wait(2) would tell it.
            Some(status) => {
                let code = status.exit_status().unwrap_or_default() << 8;
                let signal = status.terminating_signal().unwrap_or_default();
                return Ok(ExitStatus::from_raw(code | signal));
            }
            None => ready.clear_ready(),
        }
    }
}

/// The line that tells most: the last error, else the last of any kind.
fn telling(lines: &VecDeque<String>) -> Option<&String> {
    let is_error = |line: &&String| line.split_ascii_whitespace().next() == Some("ERROR");
    lines.iter().rev().find(is_error).or(lines.back())
}

async fn keep_lines(stderr: impl AsyncRead + Unpin, kept: &Mutex<VecDeque<String>>) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stderr).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line).trim().to_string();
                if text.is_empty() {
                    continue;
                }
                match text.split_ascii_whitespace().next() {
                    Some("INFO") => tracing::info!("vmm: {text}"),
                    Some("DEBUG" | "TRACE") => tracing::debug!("vmm: {text}"),
                    _ => tracing::warn!("vmm: {text}"),
                }
                let mut kept = kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(text);
            }
            Err(error) => {
                tracing::warn!("cannot read what the VMM says: {error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::unix::fs::OpenOptionsExt};

    #[tokio::test]
    async fn lines_beyond_the_bounds_are_cut() {
        let kept = Mutex::new(VecDeque::new());
        let mut text = "x".repeat(3 * MAX_LINE_BYTES as usize);
        for n in 0..20 {
            text.push_str(&format!("\nline {n}"));
        }
        keep_lines(text.as_bytes(), &kept).await;
        let kept = kept.into_inner().unwrap();
        assert_eq!(kept.len(), KEPT_LINES);
        assert_eq!(kept.back().unwrap(), "line 19");
        assert!(kept.iter().all(|line| line.len() as u64 <= MAX_LINE_BYTES));
    }

    #[test]
    fn last_error_tells_more_than_what_follows_it() {
        let lines = |text: &str| text.lines().map(str::to_string).collect::<VecDeque<_>>();
        let told = lines("ERROR first\nERROR vm: KVM failed\nWARN the console is gone");
        assert_eq!(telling(&told).unwrap(), "ERROR vm: KVM failed");
        assert_eq!(telling(&lines("INFO a\nWARN ERROR b")).unwrap(), "WARN ERROR b");
        assert_eq!(telling(&lines("")), None);
    }

    #[tokio::test]
    async fn absent_program_is_named() {
        let (_ours, theirs) = crate::vmm_client::socket_pair().unwrap();
        let error =
            VmmProcess::spawn(Path::new("/nowhere/vial-vmm"), theirs, None).await.unwrap_err();
        assert!(error.to_string().contains("/nowhere/vial-vmm"), "{error}");
    }

    #[tokio::test]
    async fn killed_process_is_gone_and_explained() {
        let (_ours, theirs) = crate::vmm_client::socket_pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        let text = "#!/bin/sh\necho last words >&2\nexec 2>&-\nexec sleep 600\n";
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o700)
            .open(&program)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .unwrap();
        let process = VmmProcess::spawn(&program, theirs, None).await.unwrap();
        while process.lines.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process.kill(Duration::from_secs(10)).await.unwrap();
        let text = process.explain(process.wait().await);
        assert!(text.contains("signal: 9") && text.contains("last words"), "{text}");
        process.kill(Duration::from_secs(1)).await.unwrap();
    }
}
