//! Waiting for a change of a cgroup's file: `cgroup.events` and `memory.events`.
//!
//! The kernel tells of one to whoever polls the file (poll(2), POLLPRI) since it last read it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::stats::counters;
use crate::sys;

/// More than either file can hold.
const MAX_BYTES: usize = 4096;

/// An open `*.events` file.
pub(super) struct Events {
    file: AsyncFd<OwnedFd>,
}

impl Events {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Events { file: sys::priority_fd(File::open(path)?.into())? })
    }

    /// What the counter `name` stands at, 0 when there is none.
    pub(super) fn read(&self, name: &str) -> io::Result<u64> {
        let mut buffer = [0; MAX_BYTES];
        // From the start every time; that also is what makes the kernel tell of the next change.
        let length = rustix::io::pread(self.file.get_ref(), &mut buffer, 0)?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        Ok(counters(&text).get(name).copied().unwrap_or(0))
    }

    /// Comes back when the file may have changed since it was read.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.file.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// Counts the processes of a container that the kernel ended for want of memory.
pub(crate) struct OomWatch {
    kills: watch::Receiver<u64>,
    path: std::path::PathBuf,
    task: JoinHandle<()>,
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl OomWatch {
    /// Watches the cgroup at `cgroup`, which exists, until it is dropped.
    ///
    /// # Errors
    /// The cgroup has no memory controller.
    pub(crate) fn start(cgroup: &Path) -> io::Result<Self> {
        let path = cgroup.join("memory.events");
        let events = Events::open(&path)?;
        let (sender, kills) = watch::channel(0);
        let task = tokio::spawn(async move {
            // An error: the cgroup is gone.
            while let Ok(count) = events.read("oom_kill") {
                sender.send_if_modified(|known| std::mem::replace(known, count) != count);
                if events.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(OomWatch { kills, path, task })
    }

    /// The number at this moment.
    pub(crate) fn count(&self) -> u64 {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        counters(&text).get("oom_kill").copied().unwrap_or(0).max(*self.kills.borrow())
    }

    /// Changes with the number; ends with the container.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.kills.clone()
    }
}
