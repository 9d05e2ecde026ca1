//! The `vial-vmm` process: spawned, listened to, waited for and, if need be, killed.

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    sync::watch,
};
use vial_vmm_api::ExitReason;

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

/// A running, or ended, VMM.
#[derive(Debug)]
pub struct VmmProcess {
    pid: u32,
    pidfd: OwnedFd,
    ended: watch::Receiver<Option<ExitStatus>>,
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl VmmProcess {
    /// Starts `program`, which inherits `socket` and nothing else that is not closed on exec.
    ///
    /// The VMM ends by itself when the other end of the socket is closed, so it needs no signal
    /// when the shim dies.
    ///
    /// # Errors
    /// [`VmmProcessError`].
    pub fn spawn(program: &Path, socket: OwnedFd) -> Result<Self, VmmProcessError> {
        let process = |action| move |error| VmmProcessError::Process { action, error };
        // The shim has one thread that starts processes, this one: nobody else can inherit the
        // socket between here and its closing below.
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty())
            .map_err(std::io::Error::from)
            .map_err(process("hand the socket to"))?;
        let spawned = tokio::process::Command::new(program)
            .arg("--api-fd")
            .arg(socket.as_raw_fd().to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        drop(socket);
        let mut child =
            spawned.map_err(|error| VmmProcessError::Spawn { path: program.into(), error })?;
        // tokio has not waited for it yet, so the number is there and is the child's.
        let pid = child.id().unwrap_or_default();
        let pidfd = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
            .map_err(std::io::Error::from)
            .map_err(process("watch"));
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // Its socket is closed already, so it ends in any case.
                let _ = child.start_kill();
                return Err(error);
            }
        };
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take();
        let (status, ended) = watch::channel(None);
        let kept = lines.clone();
        tokio::spawn(async move {
            let log = async {
                if let Some(stderr) = stderr {
                    keep_lines(stderr, &kept).await;
                }
            };
            // What it last wrote has to be there when its end is told.
            let (waited, ()) = tokio::join!(child.wait(), log);
            match waited {
                Ok(exit) => drop(status.send(Some(exit))),
                Err(error) => tracing::error!("cannot wait for the VMM: {error}"),
            }
        });
        Ok(Self { pid, pidfd, ended, lines })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.pid
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
        let error = VmmProcess::spawn(Path::new("/nowhere/vial-vmm"), theirs).unwrap_err();
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
        let process = VmmProcess::spawn(&program, theirs).unwrap();
        while process.lines.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process.kill(Duration::from_secs(10)).await.unwrap();
        let text = process.explain(process.wait().await);
        assert!(text.contains("signal: 9") && text.contains("last words"), "{text}");
        process.kill(Duration::from_secs(1)).await.unwrap();
    }
}
