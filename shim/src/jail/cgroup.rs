//! The cgroup that a VMM lives in: what its VM costs is accounted for there, and bounded.
//!
//! containerd names it, in one of two forms (`linux.cgroupsPath` of the OCI spec): a path below
//! the hierarchy's root, or `slice:prefix:name` as systemd has it. The cgroup is made here and
//! removed with the pod. Only version 2 is supported.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{CWD, Mode, OFlags};
use vial_agent_protocol::MAX_INTERFACES;
use vial_vmm_api::NETWORK_PAIRS;

use crate::numa::list::{self, Set};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// What the limits need.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// What a place on the host needs, besides.
const CPUSET: [&str; 1] = ["cpuset"];
/// Threads of a VMM besides its vCPUs, those that KVM starts for it, and those of disks' rings ([`vial_ring::WORKERS`]), with
/// room.
const OTHER_TASKS: u64 = 32 + vial_ring::WORKERS as u64;
/// How long a cgroup may stay busy after its processes were killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a cgroup could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no hierarchy of version 2.
    #[error(
        "there is no cgroup hierarchy of version 2 at {ROOT}; boot with \
         systemd.unified_cgroup_hierarchy=1"
    )]
    Absent,
    /// containerd's word for it makes no path.
    #[error(
        "'{0}' cannot be the path of a cgroup: it has to be a path without '..', or \
         'slice:prefix:name'"
    )]
    Path(String),
    /// There are processes in it that are not ours.
    #[error("the cgroup {0} has processes already; end them, or give the pod another cgroup")]
    Occupied(PathBuf),
    /// The system refused.
    #[error("cannot {action} {path}: {error}; {remedy}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
        /// What helps.
        remedy: &'static str,
    },
}

fn io(
    action: &'static str,
    path: &Path,
    remedy: &'static str,
) -> impl FnOnce(std::io::Error) -> CgroupError {
    move |error| CgroupError::Io { action, path: path.into(), error, remedy }
}

const WRITABLE: &str = "the cgroup file system has to be mounted read-write for the shim";
const DELEGATED: &str =
    "a cgroup above it has to let its controllers down (cgroup.subtree_control)";

/// The path below the hierarchy's root that containerd's word stands for.
///
/// # Errors
/// [`CgroupError::Path`].
pub fn path_of(word: &str) -> Result<PathBuf, CgroupError> {
    let wrong = || CgroupError::Path(word.chars().take(256).collect());
    let path = match word.split(':').collect::<Vec<_>>()[..] {
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] if !prefix.contains('/') && !name.contains('/') => {
            let mut path = expand_slice(slice).ok_or_else(wrong)?;
            path.push(match (prefix, name.ends_with(".slice")) {
                (_, true) => name.to_owned(),
                ("", false) => format!("{name}.scope"),
                (prefix, false) => format!("{prefix}-{name}.scope"),
            });
            path
        }
        _ => return Err(wrong()),
    };
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if path.as_os_str().is_empty() || !is_plain || word.contains('\0') {
        return Err(wrong());
    }
    Ok(path)
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    if matches!(slice, "" | "-.slice") {
        return Some(PathBuf::new());
    }
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

/// The most that a VMM may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// vCPUs, which have a thread each.
    pub vcpus: u8,
    /// The guest's memory, in MiB.
    pub memory_mib: u32,
    /// What the VMM and the kernel may use beside it, in MiB.
    pub overhead_mib: u32,
}

impl Limits {
    fn pids_max(self) -> u64 {
        // vhost-net has a task for each pair of queues; those of the first pairs are among the
        // others.
        let pairs = self.vcpus.clamp(*NETWORK_PAIRS.start(), *NETWORK_PAIRS.end());
        let more_pairs = u64::from(pairs - NETWORK_PAIRS.start());
        u64::from(self.vcpus) + OTHER_TASKS + MAX_INTERFACES as u64 * more_pairs
    }

    /// In bytes. A page of the guest costs the host up to 16 bytes in page tables, its own and
    /// KVM's, and 8 in KVM's reverse map; a part of 64 has room for that twice over.
    fn memory_max(self) -> u64 {
        let mib = u64::from(self.memory_mib) + u64::from(self.memory_mib / 64) + 1;
        (mib + u64::from(self.overhead_mib)) << 20
    }
}

/// The cgroup at `path` below the root of the hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    root: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// What [`path_of`] or a record names.
    pub fn new(path: &Path) -> Self {
        Self::below(Path::new(ROOT), path)
    }

    fn below(root: &Path, path: &Path) -> Self {
        Self { root: root.into(), path: root.join(path) }
    }

    /// Makes it with its limits, and opens it for a process to start in.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn make(&self, limits: Limits) -> Result<OwnedFd, CgroupError> {
        if !self.root.join("cgroup.controllers").exists() {
            return Err(CgroupError::Absent);
        }
        let parent = self.path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(parent).map_err(io("create", parent, WRITABLE))?;
        self.pass_controllers_down(parent, &CONTROLLERS)?;
        match std::fs::create_dir(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let processes = self.path.join("cgroup.procs");
                let text = std::fs::read(&processes).map_err(io("read", &processes, WRITABLE))?;
                if !text.is_empty() {
                    return Err(CgroupError::Occupied(self.path.clone()));
                }
            }
            result => result.map_err(io("create", &self.path, WRITABLE))?,
        }
        self.allow(limits)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, &self.path, flags, Mode::empty())
            .map_err(|error| io("open", &self.path, WRITABLE)(error.into()))
    }

    /// Sets its limits.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn allow(&self, limits: Limits) -> Result<(), CgroupError> {
        self.set("pids.max", limits.pids_max())?;
        self.set("memory.max", limits.memory_max())
    }

    /// Lets the controllers reach the children of `parent`. Most have them already.
    fn pass_controllers_down(
        &self,
        parent: &Path,
        controllers: &[&str],
    ) -> Result<(), CgroupError> {
        let mut ancestors: Vec<&Path> =
            parent.ancestors().take_while(|ancestor| ancestor.starts_with(&self.root)).collect();
        ancestors.reverse();
        for ancestor in ancestors {
            let file = ancestor.join("cgroup.subtree_control");
            let has = std::fs::read_to_string(&file).map_err(io("read", &file, WRITABLE))?;
            let wanted: Vec<String> = controllers
                .iter()
                .filter(|name| !has.split_ascii_whitespace().any(|other| other == **name))
                .map(|name| format!("+{name}"))
                .collect();
            if !wanted.is_empty() {
                std::fs::write(&file, wanted.join(" ")).map_err(io(
                    "let controllers down by",
                    &file,
                    DELEGATED,
                ))?;
            }
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps what is in it to these CPUs and memory nodes, lists of which an empty one means all
    /// that there are above it.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn confine(&self, cpus: &str, mems: &str) -> Result<(), CgroupError> {
        let is_confined = self.path.join("cpuset.cpus").exists();
        if cpus.is_empty() && mems.is_empty() && !is_confined {
            return Ok(());
        }
        let parent = self.path.parent().unwrap_or(&self.root);
        if !is_confined {
            self.pass_controllers_down(parent, &CPUSET)?;
        }
        for (name, list) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
            let file = self.path.join(name);
            let read =
                |path: &Path| std::fs::read_to_string(path).map_err(io("read", path, DELEGATED));
            let list = match list {
                "" if read(&file)?.trim().is_empty() => continue,
                // With a process in it, it cannot be empty again.
                "" => read(&parent.join(format!("{name}.effective")))?,
                list => list.into(),
            };
            std::fs::write(&file, list.trim()).map_err(io("write", &file, DELEGATED))?;
        }
        Ok(())
    }

    /// The CPUs that what is above it may use; `None` when nobody says.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn cpus_of_parent(&self) -> Result<Option<Set>, CgroupError> {
        let above = self.path.ancestors().skip(1).take_while(|path| path.starts_with(&self.root));
        for directory in above {
            let file = directory.join("cpuset.cpus.effective");
            match std::fs::read_to_string(&file) {
                Ok(text) => return Ok(list::parse(&text)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(io("read", &file, WRITABLE)(error)),
            }
        }
        Ok(None)
    }

    fn set(&self, name: &str, value: u64) -> Result<(), CgroupError> {
        let file = self.path.join(name);
        std::fs::write(&file, value.to_string()).map_err(io("write", &file, DELEGATED))
    }

    /// Kills what is in it and removes it, with what is below. Absent is fine. The cgroups above
    /// stay, as they do with other runtimes.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        // Only Linux before 5.14 has no such file; then its processes were killed one by one.
        if let Ok(mut kill) = File::options().write(true).open(self.path.join("cgroup.kill")) {
            let _ = std::io::Write::write_all(&mut kill, b"1");
        }
        let start = Instant::now();
        loop {
            match remove_empty(&self.path) {
                Err(error)
                    if error.kind() == std::io::ErrorKind::ResourceBusy
                        && start.elapsed() < PATIENCE =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                result => return result.map_err(io("remove", &self.path, "its processes hang")),
            }
        }
    }
}

/// Removes a cgroup and those below it, the lowest first.
fn remove_empty(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        result => return result,
    }
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    std::fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_path_are_understood() {
        for (word, path) in [
            ("/default/demo", "default/demo"),
            ("kubepods/pod1/c", "kubepods/pod1/c"),
            ("system.slice:vial:demo", "system.slice/vial-demo.scope"),
            ("a-b-c.slice:cri:x", "a.slice/a-b.slice/a-b-c.slice/cri-x.scope"),
            ("-.slice::x", "x.scope"),
            (":cri:x.slice", "x.slice"),
        ] {
            assert_eq!(path_of(word).unwrap(), Path::new(path), "{word}");
        }
        for word in ["", "/", "/a/../b", "..", "a:b", "a:b:c:d", "a.slice:p:../x", "a--b.slice:p:x"]
        {
            assert!(path_of(word).is_err(), "{word}");
        }
    }

    #[test]
    fn limits_leave_room_for_a_healthy_vm() {
        let limits = Limits { vcpus: 64, memory_mib: 65536, overhead_mib: 128 };
        // Eight networks with seven pairs more than one.
        assert_eq!(limits.pids_max(), 100 + 8 * 7);
        assert_eq!(Limits { vcpus: 1, ..limits }.pids_max(), 37);
        assert_eq!(Limits { vcpus: 2, ..limits }.pids_max(), 38 + 8);
        let pages = u64::from(limits.memory_mib) << 8;
        assert!(limits.memory_max() >= ((65536 + 128) << 20) + pages * 24 * 2);
    }

    #[test]
    fn cpus_are_those_of_the_nearest_that_says() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::below(root.path(), Path::new("a/b/c"));
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        assert_eq!(cgroup.cpus_of_parent().unwrap(), None);
        std::fs::write(root.path().join("cpuset.cpus.effective"), "0-7\n").unwrap();
        std::fs::write(root.path().join("a/cpuset.cpus.effective"), "2-3\n").unwrap();
        assert_eq!(cgroup.cpus_of_parent().unwrap(), Some(Set::from([2, 3])));
        // Nothing is made of a cgroup that nothing is asked of.
        cgroup.confine("", "").unwrap();
        assert!(cgroup.confine("2", "").is_err());
    }

    #[test]
    fn absent_hierarchy_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::below(dir.path(), Path::new("a/b"));
        let limits = Limits { vcpus: 1, memory_mib: 128, overhead_mib: 1 };
        assert!(matches!(cgroup.make(limits), Err(CgroupError::Absent)));
        cgroup.remove().unwrap();
    }
}
