//! A sandbox's directory, `/run/vial/<namespace>/<sandbox>/`, and what is kept in it.
//!
//! - `state.json`: what is needed to clean up when the shim is no longer there ([`State`]).
//! - `timeline.json`: the phases of the start.
//! - `placement.json`: the CPUs and NUMA nodes of the VM, when it does not have them all.
//! - `size.json`: the VM's size, when it is not what the VM started with or was not for some time.
//! - `staging/`, `containers/`, `share/`: what the guest sees, see [`crate::share`].
//! - `bundles/`: a link to the bundle of each container, see [`crate::bundles`].
//! - `console.log`: the guest's serial console, with `debug_console`.
//!
//! Files are written beside their place and renamed, so that a reader never sees half of one.

use std::{
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vial_agent_protocol::is_valid_id;

use crate::{numa::decide::Placement, size::Size};

/// What is kept about a sandbox that started, or tried to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The version of this shape.
    pub version: u32,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// The shim's process.
    pub shim: ProcessIdentity,
    /// The VMM's process, once there is one.
    pub vmm: Option<ProcessIdentity>,
    /// What was, or is about to be, changed in the pod's network namespace.
    #[serde(default)]
    pub network: Option<crate::network::Attachment>,
    /// The functions of the host that it has, or is about to get.
    #[serde(default)]
    pub devices: Vec<crate::devices::binding::Record>,
    /// What its VMM's jail holds on the host.
    #[serde(default)]
    pub jail: Option<crate::jail::Record>,
    /// The socket that the shim serves.
    pub socket: PathBuf,
    /// vCPUs of the VM: in the file at its start, see [`StateDir::read_now`].
    pub vcpus: u8,
    /// Memory of the VM, in MiB, as the vCPUs.
    pub memory_mib: u32,
    /// When the sandbox was created, in seconds since 1970.
    pub created_unix_seconds: u64,
}

/// The version of [`State`].
pub const STATE_VERSION: u32 = 1;

/// A process that cannot be confused with a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// The process that has this number now, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in field 2 may hold anything, so count from its closing bracket.
        let (_, fields) = stat.rsplit_once(')')?;
        let start_ticks = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, start_ticks })
    }

    /// Whether that very process is still there.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// What failed with a state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// The namespace or the id is no safe file name.
    #[error("'{0}' cannot be the name of a namespace or a sandbox")]
    Name(String),
    /// There is a directory already.
    #[error("{0} exists already: a sandbox of that name lives or was not cleaned up")]
    Exists(PathBuf),
    /// The system refused.
    #[error("cannot {action} {path}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// A file holds something else.
    #[error("{path} is damaged: {error}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        error: serde_json::Error,
    },
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StateDirError {
    move |error| StateDirError::Io { action, path: path.into(), error }
}

/// The directory of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The directory of that sandbox, whether it exists or not.
    ///
    /// # Errors
    /// [`StateDirError::Name`].
    pub fn new(root: &Path, namespace: &str, id: &str) -> Result<Self, StateDirError> {
        for name in [namespace, id] {
            if !is_valid_id(name) {
                return Err(StateDirError::Name(name.escape_debug().take(300).collect()));
            }
        }
        Ok(Self { path: root.join(namespace).join(id) })
    }

    /// Makes the directory, for its owner only.
    ///
    /// # Errors
    /// [`StateDirError::Exists`] and [`StateDirError::Io`].
    pub fn create(&self) -> Result<(), StateDirError> {
        let mut tries = 0;
        loop {
            if let Some(parent) = self.path.parent() {
                let mut builder = std::fs::DirBuilder::new();
                builder.recursive(true).mode(0o700).create(parent).map_err(io("create", parent))?;
            }
            tries += 1;
            return match std::fs::DirBuilder::new().mode(0o700).create(&self.path) {
                Ok(()) => Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    Err(StateDirError::Exists(self.path.clone()))
                }
                // The last sandbox of the namespace may just have taken the parent with it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && tries < 100 => {
                    continue;
                }
                Err(error) => Err(io("create", &self.path)(error)),
            };
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tree that the guest sees.
    pub fn share(&self) -> crate::share::Share {
        crate::share::Share {
            namespaces: crate::idmap::Namespaces::default(),
            staging: self.path.join("staging"),
            containers: self.path.join("containers"),
            share: self.path.join("share"),
            has_own_copy: false,
        }
    }

    /// The pod's own files, see [`crate::pod_files`].
    pub fn pod_files(&self) -> PathBuf {
        self.path.join("files")
    }

    /// Where the bundles of the pod's containers are remembered.
    pub fn bundles(&self) -> PathBuf {
        self.path.join("bundles")
    }

    /// Where the guest's serial console goes.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// Replaces `state.json`.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn write_state(&self, state: &State) -> Result<(), StateDirError> {
        self.write_json("state.json", state)
    }

    /// Reads `state.json`; `None` when there is none.
    ///
    /// # Errors
    /// [`StateDirError::Io`] and [`StateDirError::Json`].
    pub fn read_state(&self) -> Result<Option<State>, StateDirError> {
        read_json(&self.path.join("state.json"))
    }

    /// As [`StateDir::read_state`], with the size that the VM has now.
    ///
    /// # Errors
    /// [`StateDirError::Io`] and [`StateDirError::Json`].
    pub fn read_now(&self) -> Result<Option<State>, StateDirError> {
        let Some(state) = self.read_state()? else { return Ok(None) };
        let size: Option<Size> = read_json(&self.path.join("size.json"))?;
        Ok(Some(match size {
            Some(Size { vcpus, memory_mib }) => State { vcpus, memory_mib, ..state },
            None => state,
        }))
    }

    /// Replaces `size.json`.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn write_size(&self, size: Size) -> Result<(), StateDirError> {
        self.write_json("size.json", &size)
    }

    /// Replaces `timeline.json`.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn write_timeline(&self, marks: &[crate::timeline::Mark]) -> Result<(), StateDirError> {
        self.write_json("timeline.json", &marks)
    }

    /// Reads `timeline.json`; `None` when there is none.
    ///
    /// # Errors
    /// [`StateDirError::Io`] and [`StateDirError::Json`].
    pub fn read_timeline(&self) -> Result<Option<Vec<crate::timeline::Mark>>, StateDirError> {
        read_json(&self.path.join("timeline.json"))
    }

    /// Replaces `placement.json`.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn write_placement(&self, placement: &Placement) -> Result<(), StateDirError> {
        self.write_json("placement.json", placement)
    }

    /// Reads `placement.json`; `None` when there is none.
    ///
    /// # Errors
    /// [`StateDirError::Io`] and [`StateDirError::Json`].
    pub fn read_placement(&self) -> Result<Option<Placement>, StateDirError> {
        read_json(&self.path.join("placement.json"))
    }

    /// Replaces `container-cgroups.json`: those that the shim has made for containers, below the
    /// hierarchy's root.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn write_container_cgroups(&self, cgroups: &[PathBuf]) -> Result<(), StateDirError> {
        self.write_json("container-cgroups.json", &cgroups)
    }

    /// Reads `container-cgroups.json`; empty when there is none.
    ///
    /// # Errors
    /// [`StateDirError::Io`] and [`StateDirError::Json`].
    pub fn read_container_cgroups(&self) -> Result<Vec<PathBuf>, StateDirError> {
        Ok(read_json(&self.path.join("container-cgroups.json"))?.unwrap_or_default())
    }

    /// The directories of all sandboxes below `root`, as far as they can be listed.
    pub fn all(root: &Path) -> Vec<Self> {
        let names = |directory: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        let mut all = Vec::new();
        for namespace in names(root) {
            for id in names(&root.join(&namespace)) {
                // What has no proper name was not made by a shim.
                all.extend(Self::new(root, &namespace, &id));
            }
        }
        all
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), StateDirError> {
        let path = self.path.join(name);
        let beside = self.path.join(format!(".{name}.new"));
        let text = serde_json::to_vec(value)
            .map_err(|error| StateDirError::Json { path: path.clone(), error })?;
        std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)
            .and_then(|mut file| file.write_all(&text))
            .map_err(io("write", &beside))?;
        std::fs::rename(&beside, &path).map_err(io("replace", &path))
    }

    /// Removes the directory with everything in it, and those above it that are empty then.
    /// Refuses while anything is mounted below, since that would reach into what is mounted.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn remove(&self) -> Result<(), StateDirError> {
        crate::share::remove_tree(&self.path).map_err(io("remove", &self.path))?;
        for parent in self.path.ancestors().skip(1).take(2) {
            // Others may live in it.
            if std::fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateDirError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| StateDirError::Json { path: path.into(), error }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for (namespace, id) in [("..", "a"), ("a", "../b"), ("a", ""), ("a/b", "c"), ("a", ".")] {
            assert!(StateDir::new(Path::new("/run/vial"), namespace, id).is_err());
        }
    }

    #[test]
    fn state_survives_its_file_and_goes_with_the_directory() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), "default", "demo").unwrap();
        dir.create().unwrap();
        assert!(matches!(dir.create(), Err(StateDirError::Exists(_))));
        assert_eq!(dir.read_state().unwrap(), None);
        let state = State {
            version: STATE_VERSION,
            namespace: "default".into(),
            id: "demo".into(),
            shim: ProcessIdentity::of(std::process::id()).unwrap(),
            vmm: None,
            network: None,
            devices: Vec::new(),
            jail: Some(crate::jail::Record { user_id: 1, cgroup: "a/b".into() }),
            socket: "/run/containerd/s/0".into(),
            vcpus: 1,
            memory_mib: 128,
            created_unix_seconds: 1,
        };
        dir.write_state(&state).unwrap();
        assert_eq!(dir.read_state().unwrap(), Some(state.clone()));
        assert_eq!(dir.read_now().unwrap(), Some(state.clone()));
        dir.write_size(Size { vcpus: 3, memory_mib: 640 }).unwrap();
        let grown = State { vcpus: 3, memory_mib: 640, ..state.clone() };
        assert_eq!(dir.read_now().unwrap(), Some(grown));
        assert_eq!(dir.read_state().unwrap(), Some(state));
        dir.remove().unwrap();
        assert!(!root.path().exists());
    }

    #[test]
    fn identity_of_another_start_is_not_alive() {
        let mine = ProcessIdentity::of(std::process::id()).unwrap();
        assert!(mine.is_alive());
        assert!(!ProcessIdentity { start_ticks: mine.start_ticks + 1, ..mine }.is_alive());
    }
}
