//! Files of the host that belong to a pod's users: idmapped mounts (mount_setattr(2)).
//!
//! A pod in a user namespace has users that are others on the host. Files in its mounts appear to belong to
//! those, to the file server and so in the guest, and what the pod makes there belongs to the users that it has
//! them be: owner 1000 in the pod is owner 1000 on the disk. Nothing on the disk is changed for it.
#![allow(unsafe_code)]

use std::{
    ffi::c_long,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    process::{WaitId, WaitIdOptions},
};
use vial_agent_protocol::users::Users;

/// `struct mount_attr` (linux/mount.h).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Attributes of mounts (linux/mount.h).
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// User namespaces in which nobody is, that say whom files belong to. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Namespaces {
    /// Nearly all mounts of a pod have the same users.
    last: Arc<Mutex<Option<Made>>>,
}

/// A namespace, and whom it maps.
#[derive(Debug)]
struct Made {
    users: Users,
    namespace: Arc<OwnedFd>,
}

impl Namespaces {
    /// One with such users.
    ///
    /// # Errors
    /// The host allows none.
    pub fn with(&self, users: Users) -> io::Result<Arc<OwnedFd>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = last.as_ref().filter(|made| made.users == users) {
            return Ok(made.namespace.clone());
        }
        let namespace = Arc::new(make_namespace(users)?);
        *last = Some(Made { users, namespace: namespace.clone() });
        Ok(namespace)
    }
}

/// A process that is in a user namespace of its own and does nothing.
struct Idle {
    pid: i32,
    process: OwnedFd,
}

impl Idle {
    fn start() -> io::Result<Self> {
        let mut pidfd: RawFd = -1;
        // SAFETY: no pointers.
        let parent = unsafe { libc::getpid() };
        // SAFETY: all zeros are a valid `clone_args`.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = (libc::CLONE_NEWUSER | libc::CLONE_PIDFD) as u64;
        args.pidfd = (&raw mut pidfd) as u64;
        args.exit_signal = libc::SIGCHLD as u64;
        // SAFETY: without CLONE_VM this is a fork: the child has a copy of all memory and one thread, which
        // never returns from `idle`. `args` is whole, and its pointer is to a live variable.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
        if pid == 0 {
            idle(parent);
        }
        let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0);
        let pid = pid.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just made the descriptor, for us alone.
        Ok(Self { pid, process: unsafe { OwnedFd::from_raw_fd(pidfd) } })
    }
}

/// What the child does, which has copies of all descriptors: it ends with its parent at the latest.
fn idle(parent: libc::pid_t) -> ! {
    // SAFETY: no pointers; only system calls until the end of the process.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // Gone before that was set: then somebody else is the parent.
        if libc::getppid() != parent {
            libc::_exit(0);
        }
        loop {
            libc::pause();
        }
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let kill = rustix::process::Signal::KILL;
        let _ = rustix::process::pidfd_send_signal(&self.process, kill);
        let ended = WaitId::PidFd(self.process.as_fd());
        let _ = rustix::process::waitid(ended, WaitIdOptions::EXITED);
    }
}

fn make_namespace(users: Users) -> io::Result<OwnedFd> {
    let idle = Idle::start()?;
    for (name, range) in [("uid_map", users.uids), ("gid_map", users.gids)] {
        std::fs::write(format!("/proc/{}/{name}", idle.pid), range.to_string())?;
    }
    Ok(std::fs::File::open(format!("/proc/{}/ns/user", idle.pid))?.into())
}

/// A copy of the mount at `source`, from there on, that is nowhere yet, and whose files belong to the users of
/// `namespace`.
#[derive(Debug)]
pub struct Mapped(OwnedFd);

/// What of a mount is copied, and what of that is mapped.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extent {
    /// What is mounted below it comes along.
    pub recursive: bool,
    /// That belongs to the users, too.
    pub maps_below: bool,
    /// It cannot be written.
    pub read_only: bool,
}

impl Mapped {
    /// Makes it.
    ///
    /// # Errors
    /// The kernel or the file system has no idmapped mounts, or this one is mapped already.
    pub fn new(source: &Path, namespace: &OwnedFd, extent: Extent) -> io::Result<Self> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if extent.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(CWD, source, flags)?;
        map(tree.as_fd(), namespace.as_fd(), extent)?;
        Ok(Self(tree))
    }

    /// Puts it there.
    ///
    /// # Errors
    /// Nothing can be mounted there.
    pub fn attach(&self, target: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.0, "", CWD, target, flags)?)
    }
}

fn map(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>, extent: Extent) -> io::Result<()> {
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP | if extent.read_only { MOUNT_ATTR_RDONLY } else { 0 },
        clear: 0,
        propagation: 0,
        // Open descriptors are not negative.
        user_namespace: namespace.as_raw_fd() as u64,
    };
    let flags = libc::AT_EMPTY_PATH | if extent.maps_below { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty string, and the kernel reads as many bytes of `attributes` as it has;
    // both outlive the call, and nothing is written.
    let result: c_long = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use rustix::mount::{UnmountFlags, unmount};

    use super::*;

    fn users(host: u32) -> Users {
        Users::new(&[(0, host, 50)], &[(0, host, 50)]).unwrap()
    }

    #[test]
    fn namespace_is_made_once_for_the_same_users() {
        let namespaces = Namespaces::default();
        let first = namespaces.with(users(1000)).expect("run the tests as root");
        assert!(Arc::ptr_eq(&first, &namespaces.with(users(1000)).unwrap()));
        assert!(!Arc::ptr_eq(&first, &namespaces.with(users(2000)).unwrap()));
    }

    #[test]
    fn files_belong_to_others_in_both_directions() {
        let directory = tempfile::tempdir().unwrap();
        let [source, target] = ["source", "target"].map(|name| directory.path().join(name));
        for path in [&source, &target] {
            std::fs::create_dir(path).unwrap();
        }
        std::fs::write(source.join("roots"), "").unwrap();
        std::fs::write(source.join("foreign"), "").unwrap();
        chown(source.join("foreign"), Some(70), Some(70)).unwrap();
        let namespace = Namespaces::default().with(users(1000)).unwrap();
        let mapped = Mapped::new(&source, &namespace, Extent::default())
            .expect("the file system of temporary files supports idmapped mounts");
        mapped.attach(&target).unwrap();
        let owner = |path: &Path| std::fs::metadata(path).unwrap().uid();
        let seen = (owner(&target.join("roots")), owner(&target.join("foreign")));
        std::fs::write(target.join("made"), "").unwrap_err();
        chown(target.join("roots"), Some(1007), Some(1007)).unwrap();
        unmount(&target, UnmountFlags::DETACH).unwrap();
        // Who is not among them is nobody, and root is not among them.
        assert_eq!(seen, (1000, 65534));
        assert_eq!(owner(&source.join("roots")), 7);
    }

    #[test]
    fn file_system_without_owners_says_so() {
        let namespace = Namespaces::default().with(users(1000)).unwrap();
        Mapped::new(Path::new("/proc/sys"), &namespace, Extent::default()).unwrap_err();
        Mapped::new(Path::new("/nowhere"), &namespace, Extent::default()).unwrap_err();
    }
}
