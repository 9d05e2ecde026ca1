//! Volumes that the host renews as a whole, which containers have copies of in the guest.
//!
//! Linux does not tell a guest what the host does in a file system that they share: inotify(7) of
//! a container would miss every renewal of a ConfigMap or Secret. So the agent copies such volumes
//! (see `guest-agent/src/copies.rs`), and here the originals are watched: when the link `..data`
//! of one leads elsewhere, the agent is asked to follow.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{net::unix::pipe::Receiver, sync::Notify, task::JoinHandle};
use vial_agent_protocol::{DATA_LINK, is_data_directory};

use crate::{agent::Agent, spec::Mount};

/// The largest volume that is copied, in files and in bytes: it takes memory of the guest.
const MAX_FILES: usize = 1024;
const MAX_BYTES: u64 = 4 << 20;
/// How often volumes are looked at when the kernel gives no more inotify instances: kubelet itself
/// renews them once in a minute.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// After how long a renewal that failed is tried again, and how often.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);
const MOST_TRIES: u32 = 5;

/// Where `..data` of a volume leads, when it is one that is renewed as a whole.
fn data_of(volume: &Path) -> Option<String> {
    let target = std::fs::read_link(volume.join(DATA_LINK)).ok()?;
    target.to_str().filter(|name| is_data_directory(name)).map(str::to_owned)
}

/// Whether the container of that mount is to have a copy of its source: a volume that is renewed
/// as a whole, is small, and is not written to by the container.
pub fn is_copied(mount: &Mount) -> bool {
    let Some(source) = mount.source.as_deref().filter(|_| mount.has_option("ro")) else {
        return false;
    };
    let Some(data) = data_of(source) else { return false };
    let mut left = (MAX_FILES, MAX_BYTES);
    fits(&source.join(data), &mut left).unwrap_or(false)
}

/// Takes the files below `directory` from what is left; whether that is enough.
fn fits(directory: &Path, left: &mut (usize, u64)) -> std::io::Result<bool> {
    if !std::fs::symlink_metadata(directory)?.is_dir() {
        return Ok(false);
    }
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let (Some(files), Some(bytes)) =
            (left.0.checked_sub(1), left.1.checked_sub(metadata.len()))
        else {
            return Ok(false);
        };
        *left = (files, bytes);
        if metadata.is_dir() && !fits(&entry.path(), left)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A container's copy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Copy {
    container: String,
    /// Index into the spec's mounts.
    index: u32,
    /// The volume on the host.
    source: PathBuf,
    /// Where its `..data` led when the guest was told last.
    data: Option<String>,
    /// How often the guest has failed to follow.
    failures: u32,
}

/// The copies of a pod's containers.
#[derive(Debug)]
pub struct Copies {
    agent: Agent,
    shared: Arc<Shared>,
    /// There with the first copy: most pods of `ctr` have none.
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    copies: Mutex<Vec<Copy>>,
    /// The set has changed.
    changed: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Copies {
    /// None yet.
    pub fn new(agent: Agent) -> Self {
        Self { agent, shared: Arc::default(), task: Mutex::default() }
    }

    /// A container was made with copies of these volumes: index into the spec's mounts, and the volume.
    pub fn follow(&self, container: &str, volumes: Vec<(u32, PathBuf)>) {
        if volumes.is_empty() {
            return;
        }
        let copies = volumes.into_iter().map(|(index, source)| Copy {
            container: container.to_owned(),
            index,
            source,
            // Asked once in any case: it may have been renewed while the container was made.
            data: None,
            failures: 0,
        });
        lock(&self.shared.copies).extend(copies);
        self.shared.changed.notify_one();
        lock(&self.task).get_or_insert_with(|| {
            let (agent, shared) = (self.agent.clone(), self.shared.clone());
            tokio::spawn(async move { run(&agent, &shared).await })
        });
    }

    /// A container has gone.
    pub fn forget(&self, container: &str) {
        lock(&self.shared.copies).retain(|copy| copy.container != container);
        self.shared.changed.notify_one();
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

/// Asks the agent to follow, whenever a volume is renewed.
async fn run(agent: &Agent, shared: &Shared) {
    loop {
        // Anew with each change of the set, so that volumes of the past are let go.
        let watch = Watch::new(&lock(&shared.copies));
        let failed = follow_all(agent, shared).await;
        tokio::select! {
            () = watch.changed() => {}
            () = shared.changed.notified() => {}
            () = tokio::time::sleep(TRY_AGAIN_AFTER), if failed => {}
        }
    }
}

/// Tells the agent of each volume whose `..data` leads elsewhere than it knows. Returns whether it
/// is worth to try again.
async fn follow_all(agent: &Agent, shared: &Shared) -> bool {
    let copies = lock(&shared.copies).clone();
    let mut again = false;
    for copy in copies {
        let Some(data) = data_of(&copy.source) else { continue };
        if copy.data.as_ref() == Some(&data) {
            continue;
        }
        let renewed = agent.renew_copy(&copy.container, copy.index, &data).await;
        let failures = if renewed.is_ok() { 0 } else { copy.failures + 1 };
        if let Err(error) = renewed {
            tracing::warn!(
                "{}: {} was not followed: {error}",
                copy.container,
                copy.source.display()
            );
        }
        let done = failures == 0 || failures >= MOST_TRIES;
        again |= !done;
        let mut copies = lock(&shared.copies);
        let same =
            |known: &&mut Copy| (&known.container, known.index) == (&copy.container, copy.index);
        if let Some(known) = copies.iter_mut().find(same) {
            known.failures = if done { 0 } else { failures };
            if done {
                known.data = Some(data);
            }
        }
    }
    again
}

/// Tells of a change in one of some directories.
enum Watch {
    /// By the kernel.
    Inotify(Receiver),
    /// By looking now and then.
    Timer,
    /// There is nothing to watch.
    Nothing,
}

impl Watch {
    fn new(copies: &[Copy]) -> Self {
        if copies.is_empty() {
            return Self::Nothing;
        }
        let watch = || -> std::io::Result<Receiver> {
            let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            for copy in copies {
                let flags = WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
                match inotify::add_watch(&inotify, &copy.source, flags) {
                    // A volume that has been taken away is not renewed any more.
                    Ok(_) | Err(rustix::io::Errno::NOENT) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            // Like a pipe it can be waited for until there is something to read.
            Receiver::from_owned_fd_unchecked(inotify)
        };
        watch().map_or_else(
            |error| {
                tracing::info!(
                    "volumes are looked at every {LOOK_EVERY:?}, since inotify fails: {error}"
                );
                Self::Timer
            },
            Self::Inotify,
        )
    }

    /// Whatever came first is enough: all volumes are looked at then, by a new watch.
    async fn changed(&self) {
        match self {
            Self::Inotify(inotify) => {
                if inotify.readable().await.is_err() {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
            Self::Timer => tokio::time::sleep(LOOK_EVERY).await,
            Self::Nothing => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn volume(data: &str) -> tempfile::TempDir {
        let volume = tempfile::tempdir().unwrap();
        std::fs::create_dir(volume.path().join(data)).unwrap();
        symlink(data, volume.path().join("..data")).unwrap();
        volume
    }

    fn mount(source: &Path, option: &str) -> Mount {
        Mount {
            destination: "/etc/config".into(),
            kind: Some("bind".into()),
            source: Some(source.into()),
            options: vec!["rbind".into(), option.into()],
            ..Mount::default()
        }
    }

    fn copy(source: &Path) -> Copy {
        let source = source.to_owned();
        Copy { container: "c".into(), index: 0, source, data: None, failures: 0 }
    }

    #[test]
    fn small_volumes_behind_a_link_are_copied_and_others_are_not() {
        let volume = volume("..1");
        assert!(is_copied(&mount(volume.path(), "ro")));
        assert!(!is_copied(&mount(volume.path(), "rw")));
        assert!(!is_copied(&mount(&volume.path().join("..1"), "ro")));
        assert!(!is_copied(&mount(Path::new("/nowhere"), "ro")));
        let file = std::fs::File::create(volume.path().join("..1/large")).unwrap();
        file.set_len(MAX_BYTES - 1).unwrap();
        assert!(is_copied(&mount(volume.path(), "ro")));
        file.set_len(MAX_BYTES + 1).unwrap();
        assert!(!is_copied(&mount(volume.path(), "ro")));
    }

    #[test]
    fn volumes_of_too_many_files_are_not_copied() {
        let volume = volume("..1");
        std::fs::create_dir(volume.path().join("..1/d")).unwrap();
        for n in 1..MAX_FILES {
            std::fs::write(volume.path().join(format!("..1/d/{n}")), "").unwrap();
        }
        assert!(is_copied(&mount(volume.path(), "ro")));
        std::fs::write(volume.path().join("..1/more"), "").unwrap();
        assert!(!is_copied(&mount(volume.path(), "ro")));
    }

    #[test]
    fn link_that_leads_out_of_the_volume_is_none() {
        for target in ["../..", "..", "/etc", "..a/b", "plain"] {
            let volume = tempfile::tempdir().unwrap();
            symlink(target, volume.path().join("..data")).unwrap();
            assert_eq!(data_of(volume.path()), None, "{target}");
        }
    }

    #[tokio::test]
    async fn watch_tells_of_a_link_that_is_replaced() {
        let volume = volume("..1");
        let watch = Watch::new(&[copy(volume.path()), copy(Path::new("/nowhere"))]);
        assert!(matches!(watch, Watch::Inotify(_)));
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, watch.changed()).await.is_err());
        symlink("..2", volume.path().join("..data_tmp")).unwrap();
        assert!(tokio::time::timeout(soon, watch.changed()).await.is_err());
        let data = volume.path().join("..data");
        std::fs::rename(volume.path().join("..data_tmp"), data).unwrap();
        tokio::time::timeout(Duration::from_secs(10), watch.changed()).await.unwrap();
        assert_eq!(data_of(volume.path()).as_deref(), Some("..2"));
    }
}
