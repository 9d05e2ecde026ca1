//! The cgroup (v2) of a container: who is in it, stopping or ending them all, removing it. What
//! it counts is in [`stats`], changing its limits in [`resources`], its events in [`events`].

pub(crate) mod events;
pub(crate) mod resources;
pub(crate) mod stats;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sys;

/// Where cgroup v2 is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// Below [`ROOT`], as a spec's `cgroupsPath` says it: where the containers' cgroups are.
pub(crate) const CONTAINERS: &str = "/vial-containers";

/// Process ids that are listed at most.
const MAX_PIDS: usize = 65_536;
/// How deep a container may nest cgroups before the listing stops.
const MAX_DEPTH: usize = 32;
/// Ended processes leave a cgroup a little later than they end: tries, and the pause between them.
const REMOVE_TRIES: u32 = 500;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);
/// How long processes may take to stand still: one in the kernel does when it comes out of there.
const FREEZE_WAIT: Duration = Duration::from_secs(10);

/// What cannot be done with a cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("cannot read the processes of cgroup {path}: {source}")]
    List { path: PathBuf, source: io::Error },
    #[error("cannot end the processes of cgroup {path}: {source}")]
    Kill { path: PathBuf, source: io::Error },
    #[error("cannot remove cgroup {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot {action} the processes of cgroup {path}: {source}")]
    Freeze { action: &'static str, path: PathBuf, source: io::Error },
    #[error("not all processes of cgroup {0} stood still within {FREEZE_WAIT:?}; they run on")]
    Restless(PathBuf),
}

/// A container's cgroup. It exists from the container's creation to its deletion.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of container `id`, which need not exist yet.
    pub(crate) fn of_container(id: &str) -> Self {
        Cgroup { path: PathBuf::from(format!("{ROOT}{CONTAINERS}/{id}")) }
    }

    /// Its name in a spec's `cgroupsPath`.
    pub(crate) fn spec_path(id: &str) -> PathBuf {
        PathBuf::from(format!("{CONTAINERS}/{id}"))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Every process in it and in what the container made below it.
    ///
    /// # Errors
    /// It cannot be read; that it does not exist is no error.
    pub(crate) fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        list(&self.path, 0, &mut pids)
            .map_err(|source| CgroupError::List { path: self.path.clone(), source })?;
        pids.truncate(MAX_PIDS);
        Ok(pids)
    }

    /// Ends every process in it at once.
    ///
    /// # Errors
    /// `cgroup.kill` cannot be written; that the cgroup does not exist is no error.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        gone_is_fine(fs::write(self.path.join("cgroup.kill"), "1"))
            .map_err(|source| CgroupError::Kill { path: self.path.clone(), source })
    }

    /// Sends `signal` to every process in it.
    ///
    /// # Errors
    /// The processes cannot be listed. One that ends meanwhile is no error.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.pids()? {
            // A number beyond i32 is no pid of Linux; a process that is gone needs no signal.
            let _ = i32::try_from(pid).map(|pid| sys::kill(pid, signal));
        }
        Ok(())
    }

    /// Stops every process in it where it is, and waits until all stand.
    ///
    /// # Errors
    /// The kernel refuses, or some process does not stop within 10 seconds; all run on then.
    pub(crate) async fn freeze(&self) -> Result<(), CgroupError> {
        let failed =
            |source| CgroupError::Freeze { action: "pause", path: self.path.clone(), source };
        let events = events::Events::open(&self.path.join("cgroup.events")).map_err(failed)?;
        fs::write(self.path.join("cgroup.freeze"), "1").map_err(failed)?;
        let frozen = async {
            while events.read("frozen")? == 0 {
                events.changed().await?;
            }
            Ok(())
        };
        match tokio::time::timeout(FREEZE_WAIT, frozen).await {
            Ok(result) => result.map_err(failed),
            Err(_) => {
                self.thaw()?;
                Err(CgroupError::Restless(self.path.clone()))
            }
        }
    }

    /// Lets its processes run on.
    ///
    /// # Errors
    /// The kernel refuses; that the cgroup does not exist is no error.
    pub(crate) fn thaw(&self) -> Result<(), CgroupError> {
        gone_is_fine(fs::write(self.path.join("cgroup.freeze"), "0")).map_err(|source| {
            CgroupError::Freeze { action: "resume", path: self.path.clone(), source }
        })
    }

    /// Removes it, what the container made below it included. Its processes have to be ended or
    /// ending.
    ///
    /// # Errors
    /// It is still in use after 5 seconds, or cannot be removed.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        let mut tries = 0;
        loop {
            match gone_is_fine(remove_tree(&self.path, 0)) {
                Ok(()) => return Ok(()),
                Err(error) if tries < REMOVE_TRIES && is_busy(&error) => tries += 1,
                Err(source) => {
                    return Err(CgroupError::Remove { path: self.path.clone(), source });
                }
            }
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
    }
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

/// ENODEV is what a file of a removed cgroup answers that was opened before.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn list(path: &Path, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        Err(error) if is_gone(&error) => return Ok(()),
        // A threaded cgroup below lists its processes at its domain.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    if depth < MAX_DEPTH && pids.len() < MAX_PIDS {
        for child in children(path)? {
            list(&child, depth + 1, pids)?;
        }
    }
    Ok(())
}

fn remove_tree(path: &Path, depth: usize) -> io::Result<()> {
    if depth < MAX_DEPTH {
        for child in children(path)? {
            gone_is_fine(remove_tree(&child, depth + 1))?;
        }
    }
    fs::remove_dir(path)
}
