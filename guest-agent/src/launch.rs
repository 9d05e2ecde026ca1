//! Starts a helper (see [`crate::helper`]) and brings back its answer.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::time::timeout;

use crate::helper::{self, Answer, EXEC_PREFIX, Order};
use crate::reaper::Reaper;
use crate::sys;

/// The longest text of a helper that travels on, in bytes.
const MAX_TEXT: usize = 1024;
/// The largest answer that is read, in bytes.
const MAX_ANSWER: u64 = 16 << 10;
/// How long a helper may take: longer than any takes on a busy machine, and shorter than the shim
/// waits for its answer.
const HELPER_WAIT: Duration = Duration::from_secs(45);
/// Descendants of a helper that are ended with it: it has three at most.
const MAX_DESCENDANTS: usize = 64;
/// How often one of them is looked at until it has stopped, and how long between.
const STOP_TRIES: u32 = 200;
const STOP_PAUSE: Duration = Duration::from_millis(1);

/// Why no process was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("cannot start a helper process: {0}")]
    Spawn(io::Error),
    #[error("cannot prepare {path}: {source}")]
    Prepare { path: PathBuf, source: io::Error },
    /// The container's program is not there or cannot run.
    #[error("{0}")]
    Executable(String),
    #[error("{0}")]
    Container(String),
    #[error("the helper process ended with status {0} and no answer")]
    NoAnswer(u8),
    #[error(
        "the container's root or one of its mounts does not answer: the helper process was ended \
         after {HELPER_WAIT:?}"
    )]
    Stuck,
}

impl LaunchError {
    /// Sorts a helper's text by what it is about.
    pub(crate) fn from_text(text: &str) -> Self {
        match text.find(EXEC_PREFIX) {
            Some(at) => LaunchError::Executable(shorten(&text[at..])),
            None => LaunchError::Container(shorten(text)),
        }
    }
}

fn shorten(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default().trim();
    match line.char_indices().find(|(at, character)| at + character.len_utf8() > MAX_TEXT) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

/// Runs `order` in a helper whose stdio is `stdio`, and answers the pid of the process that it
/// made. `inherited` stays open in it, under its number.
///
/// # Errors
/// The helper cannot be started, or could not do it; nothing but files in the order's directory
/// is left then.
pub(crate) async fn run(
    reaper: &Reaper,
    order: &Order,
    stdio: [Stdio; 3],
    inherited: Option<OwnedFd>,
) -> Result<i32, LaunchError> {
    File::create(&order.errors)
        .map_err(|source| LaunchError::Prepare { path: order.errors.clone(), source })?;
    let helper = spawn(order, stdio, inherited)?;
    let status = match timeout(HELPER_WAIT, reaper.watch(helper)).await {
        Ok(status) => status.map_or(255, |status| status.0),
        Err(_) => {
            end_with_descendants(helper);
            return Err(LaunchError::Stuck);
        }
    };
    let Some(answer) = read_answer(&order.answer) else {
        return Err(LaunchError::NoAnswer(status));
    };
    answer.map_err(|text| match LaunchError::from_text(&text) {
        // The first error line says the cause; the answer may only say what it led to.
        LaunchError::Container(text) => LaunchError::Container(match first_line(&order.errors) {
            Some(line) if !text.contains(&line) => shorten(&format!("{text} ({line})")),
            _ => text,
        }),
        other => other,
    })
}

/// No other process is started meanwhile, the server being single-threaded: so none but the
/// helper inherits the descriptor.
fn spawn(
    order: &Order,
    [stdin, stdout, stderr]: [Stdio; 3],
    inherited: Option<OwnedFd>,
) -> Result<i32, LaunchError> {
    if let Some(fd) = &inherited {
        fcntl_setfd(fd, FdFlags::empty()).map_err(|error| LaunchError::Spawn(error.into()))?;
    }
    let json = serde_json::to_string(order).map_err(|error| LaunchError::Spawn(error.into()))?;
    let child = Command::new("/proc/self/exe")
        .arg(helper::WORD)
        .arg(json)
        .env_clear()
        .current_dir("/")
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .map_err(LaunchError::Spawn)?;
    // The reaper waits for it; std's handle is only its number. Linux's pids fit an i32.
    Ok(child.id() as i32)
}

/// Ends a process that has one thread, and all that come from it.
fn end_with_descendants(pid: i32) {
    let mut all = vec![pid];
    let mut at = 0;
    while at < all.len() && all.len() < MAX_DESCENDANTS {
        let pid = all[at];
        let _ = sys::kill(pid, libc::SIGSTOP);
        // A fork that is under way goes on (Linux `copy_process`: only what kills ends it): there may be one more child until
        // the process has stopped. One that waits for a child's execve(2) cannot, and has that child by then.
        let mut tries = 0;
        while !is_at_rest(pid) && tries < STOP_TRIES {
            std::thread::sleep(STOP_PAUSE);
            tries += 1;
        }
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let text = text.unwrap_or_default();
        all.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        at += 1;
    }
    for pid in all {
        // One that is gone needs no signal.
        let _ = sys::kill(pid, libc::SIGKILL);
    }
}

/// Whether a process has stopped, or is no more.
fn is_at_rest(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The name before the state can have any characters (proc_pid_stat(5)).
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, None | Some('T' | 't' | 'Z' | 'X'))
}

/// The number under which a helper finds a descriptor that it inherits.
pub(crate) fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}

fn read_answer(path: &Path) -> Option<Answer> {
    let mut json = Vec::new();
    File::open(path).ok()?.take(MAX_ANSWER).read_to_end(&mut json).ok()?;
    // Another try of the same order must not find this one.
    let _ = fs::remove_file(path);
    serde_json::from_slice(&json).ok()
}

fn first_line(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_TEXT as u64).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().next().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_about_an_executable_loses_what_stands_before_it() {
        let text = "failed: exec process failed: exec: \"foo\": executable file not found in $PATH";
        match LaunchError::from_text(text) {
            LaunchError::Executable(text) => {
                assert_eq!(text, "exec: \"foo\": executable file not found in $PATH");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn process_ends_with_its_descendants() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'echo up; sleep 600; true'; true"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = child.stdout.take().unwrap();
        output.read_exact(&mut [0; 3]).unwrap();
        end_with_descendants(child.id() as i32);
        // Its end: nobody has the pipe open any more.
        assert_eq!(output.read(&mut [0; 1]).unwrap(), 0);
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let text = shorten(&"ä".repeat(MAX_TEXT));
        assert!(text.len() <= MAX_TEXT + 3 && text.ends_with("..."), "{}", text.len());
        assert_eq!(shorten("one\ntwo"), "one");
    }
}
