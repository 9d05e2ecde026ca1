//! What a guest can see of the host's files.
//!
//! A sandbox has one tree that is mounted twice. `containers/` holds directories and mounts for
//! each container:
//!
//! ```text
//! containers/<container>/rootfs        the snapshotter's mounts
//! containers/<container>/mounts/<n>    the source of the n-th mount of the spec
//! ```
//!
//! `share/` receives every mount of `containers/` and is itself read-only. That is what the VMM
//! serves: a guest can write where a container can, and nowhere in the tree above. It cannot
//! put a symbolic link where the shim mounts next.
//!
//! Every mount in the tree is without devices, set-user-id and programs, for the host. The guest
//! sees the files' modes as they are, and its own kernel decides what they mean.
//!
//! The flags of a mount do not spread when they change, so each mount is finished in `staging/`,
//! which spreads nothing, and then moved: read-only is read-only from the first moment.

mod root;

use std::{
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use containerd_shim_protos::types::mount::Mount as RootMount;
use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
};
use vial_agent_protocol::users::{Users, UsersError};

use crate::{
    copies::is_copied,
    idmap::{Extent, Mapped, Namespaces},
    spec::{Mount, Spec},
};

/// The most mounts of one container that have their source on the host.
pub const MAX_BINDS: usize = 1024;

/// What failed with a mount.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
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
    /// A root mount could not be made.
    #[error("cannot mount the container's root: {0}")]
    Root(containerd_shim::Error),
    /// There is nothing to mount as root.
    #[error("neither the request nor the spec says where the container's root is")]
    NoRoot,
    /// The source of a mount is absent or cannot be reached.
    #[error("cannot mount {source_path} at {destination}: {error}")]
    Source {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Its files cannot belong to the pod's users.
    #[error(
        "cannot have the files of {source_path} belong to the pod's users, for its mount at \
         {destination}: {error}; its file system has to support idmapped mounts, as ext4, XFS and Btrfs do, \
         and tmpfs from Linux 6.3 on"
    )]
    Users {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The files of the root cannot.
    #[error(
        "cannot have the files of {path}, a part of the container's root, belong to the pod's users: {error}; \
         its file system has to support idmapped mounts, and overlays on top of them need Linux 5.19"
    )]
    RootUsers {
        /// On the host.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Whom they are to belong to, nobody can be.
    #[error(transparent)]
    NoUsers(#[from] UsersError),
    /// The source is a device.
    #[error(
        "cannot mount the device {source_path} at {destination}: a device of the host does not \
         work in a VM by its node; mount a file or directory"
    )]
    Device {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
    },
    /// The spec asks for too much, or for something that cannot be.
    #[error("{0}")]
    Spec(String),
}

fn io<E: Into<std::io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> ShareError {
    move |error| ShareError::Io { action, path: path.into(), error: error.into() }
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    std::fs::DirBuilder::new().mode(0o755).create(path).map_err(io("create", path))
}

/// The three places of a sandbox's shared tree.
#[derive(Debug, Clone)]
pub struct Share {
    /// Where mounts are made ready.
    pub staging: PathBuf,
    /// Where they live.
    pub containers: PathBuf,
    /// What the VMM serves.
    pub share: PathBuf,
    /// Whom files can belong to.
    pub namespaces: Namespaces,
    /// Whether the VMM has its own copy of the tree, in the mount namespace of its jail. Only once
    /// it is there.
    pub has_own_copy: bool,
}

/// What a container's files became in the shared tree.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Its root, relative to the tree.
    pub root: String,
    /// Those of the spec's mounts that have their source on the host.
    pub mounts: Vec<SharedMount>,
}

/// A mount of the spec, in the shared tree.
#[derive(Debug, PartialEq, Eq)]
pub struct SharedMount {
    /// Into the spec's mounts.
    pub index: u32,
    /// Its source relative to the tree.
    pub path: String,
    /// See [`agent::SharedMount::host_guards`](vial_agent_protocol::agent::SharedMount).
    pub host_guards: bool,
    /// Its source on the host, when the container is to have a copy of it ([`crate::copies`]).
    pub copied: Option<PathBuf>,
    /// Whether sockets of the host are looked for in it ([`crate::sockets`]).
    pub sockets: bool,
}

impl Share {
    /// Makes the three places.
    ///
    /// # Errors
    /// [`ShareError::Io`]. What was made until then is left to [`unmount_below`] and
    /// [`remove_tree`].
    pub fn prepare(&self) -> Result<(), ShareError> {
        use MountPropagationFlags as P;
        for dir in [&self.staging, &self.containers, &self.share] {
            make_dir(dir)?;
        }
        let (staging, containers, share) = (&self.staging, &self.containers, &self.share);
        rustix::mount::mount_bind(staging, staging).map_err(io("bind", staging))?;
        rustix::mount::mount_change(staging, P::PRIVATE).map_err(io("isolate", staging))?;
        rustix::mount::mount_bind(containers, containers).map_err(io("bind", containers))?;
        // Private first, lest mounts spread to what /run is shared with.
        rustix::mount::mount_change(containers, P::PRIVATE).map_err(io("isolate", containers))?;
        rustix::mount::mount_change(containers, P::SHARED).map_err(io("share", containers))?;
        rustix::mount::mount_bind(containers, share).map_err(io("bind", share))?;
        rustix::mount::mount_change(share, P::DOWNSTREAM)
            .map_err(io("make a receiver of", share))?;
        remount(share, MountFlags::RDONLY | HOST_SAFE)
    }

    /// Makes a container's directory, its root and its bind mounts.
    ///
    /// # Errors
    /// [`ShareError`]. What was made until then is left to [`Share::remove_container`].
    pub async fn add_container(
        &self,
        id: &str,
        bundle: &Path,
        root_mounts: &[RootMount],
        spec: &Spec,
    ) -> Result<Shared, ShareError> {
        let dir = self.containers.join(id);
        let staging = self.staging.join(id);
        make_dir(&dir)?;
        make_dir(&dir.join("rootfs"))?;
        make_dir(&staging)?;
        let root = staging.join("rootfs");
        make_dir(&root)?;
        let own = (staging.as_path(), &self.namespaces);
        root::mount(&root, bundle, (root_mounts, spec), own).await?;
        let binds = stage(spec, &staging, &dir, &self.namespaces)?;
        // Until each is safe, it is where nothing spreads from: the VMM's file server, to which what is published comes at
        // once, has no way to the staging directory.
        let staged = staged(&staging, &root, root_mounts, &binds)?;
        make_host_safe(&staged, &root, ReadOnly::None)?;
        publish(&root, &dir.join("rootfs"))?;
        let mut mounts = Vec::with_capacity(binds.len());
        for bind in binds {
            let Bind { index, mount, name, receives, .. } = bind;
            let from = staging.join(&name);
            let read_only = ReadOnly::of(mount);
            let has_below = make_host_safe(&staged, &from, read_only)?;
            publish(&from, &dir.join("mounts").join(&name))?;
            if has_below && self.has_own_copy {
                self.hide_below(&Path::new(id).join("mounts").join(&name))?;
            }
            mounts.push(SharedMount {
                index,
                path: format!("{id}/mounts/{index}"),
                host_guards: read_only == ReadOnly::Top && (has_below || receives),
                copied: mount.source.clone().filter(|_| is_copied(mount)),
                sockets: false,
            });
        }
        remove_places(&staging).map_err(io("remove", &staging))?;
        Ok(Shared { root: format!("{id}/rootfs"), mounts })
    }

    /// Takes what is mounted below a volume away from the host, where nobody needs it: the VMM has
    /// it already. A directory that something is mounted on cannot be removed in that mount's
    /// namespace. The host could not clear a volume away before its container.
    fn hide_below(&self, volume: &Path) -> Result<(), ShareError> {
        // In this order: then the VMM's copies receive from whatever the first one received from,
        // and none receives an end from it.
        for place in [self.containers.join(volume), self.share.join(volume)] {
            let isolated = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change(&place, isolated).map_err(io("isolate", &place))?;
            let mounts = mounts_below(&place).map_err(io("list the mounts below", &place))?;
            for mount in mounts.iter().rev().filter(|mount| **mount != place) {
                rustix::mount::unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .map_err(io("unmount", mount))?;
            }
        }
        Ok(())
    }

    /// Takes a container out of the tree; one that is not there is no failure.
    ///
    /// # Errors
    /// [`ShareError::Io`].
    pub fn remove_container(&self, id: &str) -> Result<(), ShareError> {
        for dir in [self.staging.join(id), self.containers.join(id)] {
            unmount_below(&dir)?;
            remove_tree(&dir).map_err(io("remove", &dir))?;
        }
        Ok(())
    }
}

/// Moves a finished mount to where it spreads from.
fn publish(staged: &Path, place: &Path) -> Result<(), ShareError> {
    rustix::mount::mount_move(staged, place).map_err(io("move a mount to", place))
}

/// What keeps a mount's files from being more than files to the host's programs.
const HOST_SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

fn remount(path: &Path, flags: MountFlags) -> Result<(), ShareError> {
    rustix::mount::mount_remount(path, MountFlags::BIND | flags, c"")
        .map_err(io("set the flags of", path))
}

/// Which mounts become read-only.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadOnly {
    None,
    /// The one itself, and not what is mounted below it.
    Top,
    All,
}

impl ReadOnly {
    fn of(mount: &Mount) -> Self {
        match (mount.has_option("rro"), mount.has_option("ro")) {
            (true, _) => Self::All,
            (false, true) => Self::Top,
            (false, false) => Self::None,
        }
    }
}

/// What is mounted in the staging directory of a container.
///
/// For each reading, the kernel makes the table of all mounts of the host anew, those of all other pods among them. So it is
/// read once, and only if a mount may have brought others along.
fn staged(
    staging: &Path,
    root: &Path,
    root_mounts: &[RootMount],
    binds: &[Bind<'_>],
) -> Result<Vec<PathBuf>, ShareError> {
    let root_is_one = match root_mounts {
        [mount] => !mount.options.iter().any(|option| option == "rbind"),
        _ => false,
    };
    if root_is_one && !binds.iter().any(|bind| bind.recursive) {
        let binds = binds.iter().map(|bind| staging.join(&bind.name));
        return Ok(std::iter::once(root.to_path_buf()).chain(binds).collect());
    }
    mounts_below(staging).map_err(io("list the mounts below", staging))
}

/// Makes those of all staged mounts safe for the host that are at and below a finished one, and
/// answers whether there are any below. Those are few: what was mounted below a volume's source.
fn make_host_safe(
    all: &[PathBuf],
    finished: &Path,
    read_only: ReadOnly,
) -> Result<bool, ShareError> {
    let mut has_below = false;
    for path in all.iter().filter(|path| path.starts_with(finished)) {
        let is_top = path == finished;
        let protect = read_only == ReadOnly::All || (read_only == ReadOnly::Top && is_top);
        let more = if protect { MountFlags::RDONLY } else { MountFlags::empty() };
        remount(path, present_flags(path)? | HOST_SAFE | more)?;
        has_below |= !is_top;
    }
    Ok(has_below)
}

/// A volume that is bound in the staging directory.
struct Bind<'a> {
    index: u32,
    mount: &'a Mount,
    /// What it is called there, and will be called in the tree.
    name: String,
    /// Whether it receives what the host mounts below its source later.
    receives: bool,
    /// Whether what is mounted below its source came with it.
    recursive: bool,
}

/// Binds all volumes of a container in `staging`, and makes their places in `dir`.
fn stage<'a>(
    spec: &'a Spec,
    staging: &Path,
    dir: &Path,
    namespaces: &Namespaces,
) -> Result<Vec<Bind<'a>>, ShareError> {
    let mut binds = Vec::new();
    for (index, mount) in (0..).zip(&spec.mounts).filter(|(_, mount)| mount.is_bind()) {
        if binds.is_empty() {
            make_dir(&dir.join("mounts"))?;
        }
        if binds.len() == MAX_BINDS {
            return Err(ShareError::Spec(format!(
                "the container has more than {MAX_BINDS} mounts from the host"
            )));
        }
        let name = index.to_string();
        let places = (staging.join(&name), dir.join("mounts").join(&name));
        let users = (spec.users_of(mount)?, namespaces);
        let bound = bind(mount, (&places.0, &places.1), users)?;
        let Bound { receives, recursive } = bound;
        binds.push(Bind { index, mount, name, receives, recursive });
    }
    Ok(binds)
}

/// What a bind mount has that its source has. See [`Bind`].
struct Bound {
    receives: bool,
    recursive: bool,
}

/// Binds the source of `mount` at `staged`, with a like file or directory made at `place`. Its files belong to
/// `users`, if there are some.
fn bind(
    mount: &Mount,
    (staged, place): (&Path, &Path),
    (users, namespaces): (Option<Users>, &Namespaces),
) -> Result<Bound, ShareError> {
    let Some(source) = mount.source.as_ref().filter(|source| source.is_absolute()) else {
        return Err(ShareError::Spec(format!(
            "the mount at {} has no absolute source",
            mount.destination.display()
        )));
    };
    let absent = |error| ShareError::Source {
        source_path: source.clone(),
        destination: mount.destination.clone(),
        error,
    };
    let metadata = std::fs::metadata(source).map_err(absent)?;
    let kind = metadata.file_type();
    if kind.is_block_device() || (kind.is_char_device() && !is_memory_device(metadata.rdev())) {
        return Err(ShareError::Device {
            source_path: source.clone(),
            destination: mount.destination.clone(),
        });
    }
    for path in [staged, place] {
        if kind.is_dir() {
            make_dir(path)?;
        } else {
            std::fs::File::create_new(path).map_err(io("create", path))?;
        }
    }
    // Nothing is mounted below what is no directory.
    let recursive = kind.is_dir() && (mount.has_option("rbind") || !mount.has_option("bind"));
    if let Some(users) = users {
        let maps_below = recursive && mount.has_option("ridmap");
        let extent = Extent { recursive, maps_below, read_only: false };
        let mapped = namespaces.with(users).and_then(|users| Mapped::new(source, &users, extent));
        let mapped = mapped.map_err(|error| ShareError::Users {
            source_path: source.clone(),
            destination: mount.destination.clone(),
            error,
        })?;
        mapped.attach(staged).map_err(io("attach a volume at", staged))?;
    } else {
        let bound = match recursive {
            true => rustix::mount::mount_bind_recursive(source, staged),
            false => rustix::mount::mount_bind(source, staged),
        };
        bound.map_err(|error| absent(error.into()))?;
    }
    // What the host mounts below the source later is the container's to see only when its spec
    // says so; what is mounted in the shared tree must never reach the source.
    let receives = ["rslave", "slave", "rshared", "shared"];
    let receives = receives.iter().any(|option| mount.has_option(option));
    let propagation = if receives {
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC
    } else {
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC
    };
    rustix::mount::mount_change(staged, propagation).map_err(io("isolate", staged))?;
    Ok(Bound { receives, recursive })
}

/// `/dev/null` and its like, which the guest's kernel has too: the "mem" class, major 1, less
/// those that reach memory or ports.
fn is_memory_device(device: u64) -> bool {
    rustix::fs::major(device) == 1 && [3, 5, 7, 8, 9].contains(&rustix::fs::minor(device))
}

/// The flags that a mount has, which a remount would else take away.
fn present_flags(path: &Path) -> Result<MountFlags, ShareError> {
    use rustix::fs::StatVfsMountFlags as Has;
    let has = rustix::fs::statvfs(path).map_err(io("inspect", path))?.f_flag;
    Ok([
        (Has::RDONLY, MountFlags::RDONLY),
        (Has::NOSUID, MountFlags::NOSUID),
        (Has::NODEV, MountFlags::NODEV),
        (Has::NOEXEC, MountFlags::NOEXEC),
        (Has::NOATIME, MountFlags::NOATIME),
        (Has::NODIRATIME, MountFlags::NODIRATIME),
        (Has::RELATIME, MountFlags::RELATIME),
    ]
    .into_iter()
    .filter(|(flag, _)| has.contains(*flag))
    .fold(MountFlags::empty(), |flags, (_, flag)| flags | flag))
}

/// Unmounts `dir` and whatever is mounted below it, the latest first. What is in use goes when it
/// no longer is.
///
/// # Errors
/// [`ShareError::Io`].
pub fn unmount_below(dir: &Path) -> Result<(), ShareError> {
    // A mount that is stacked on another shows twice, so look again until nothing is there.
    for _ in 0..16 {
        let mounts = mounts_below(dir).map_err(io("list the mounts below", dir))?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts.iter().rev() {
            match rustix::mount::unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // Gone with another one, which passed its end on to it.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(io("unmount", mount)(error)),
            }
        }
    }
    Err(io("unmount all below", dir)(Errno::BUSY))
}

/// Removes `dir` with everything in it unless something is mounted there. Absent is fine.
///
/// # Errors
/// Of kind `ResourceBusy` when there is a mount, else what the system says.
pub fn remove_tree(dir: &Path) -> std::io::Result<()> {
    // Removing goes through mounts, into what they show. So none may be left.
    if !mounts_below(dir)?.is_empty() {
        return Err(std::io::ErrorKind::ResourceBusy.into());
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes `dir` with the empty places for mounts that are in it. None of them can be one where something is mounted, or of
/// which something is left: so no table of mounts needs to be looked at before.
fn remove_places(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => std::fs::remove_dir(entry.path())?,
            false => std::fs::remove_file(entry.path())?,
        }
    }
    std::fs::remove_dir(dir)
}

/// The mount points at and below `dir`, in the order of their mounting.
fn mounts_below(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        // The fifth field is the mount point (proc_pid_mountinfo(5)).
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|path| path.starts_with(dir))
        .collect())
}

/// A path of mountinfo: blanks, tabs, line feeds and backslashes are in octal.
fn unescape(field: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let octal = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        path.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    std::ffi::OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_in_mount_points_is_read() {
        assert_eq!(unescape(br"/a\040b\134c\011"), Path::new("/a b\\c\t"));
        assert_eq!(unescape(br"/a\04"), Path::new(r"/a\04"));
    }

    #[test]
    fn devices_but_the_harmless_are_refused() {
        assert!(is_memory_device(rustix::fs::makedev(1, 3)));
        assert!(!is_memory_device(rustix::fs::makedev(1, 1)));
        assert!(!is_memory_device(rustix::fs::makedev(10, 232)));
    }

    #[test]
    fn tree_with_a_mount_in_it_is_not_removed() {
        assert_eq!(
            remove_tree(Path::new("/proc")).unwrap_err().kind(),
            std::io::ErrorKind::ResourceBusy
        );
    }

    fn volume(source: &Path, option: &str) -> Mount {
        Mount {
            destination: "/data".into(),
            kind: Some("bind".into()),
            source: Some(source.into()),
            options: vec![option.into()],
            ..Mount::default()
        }
    }

    /// Unmounts what a test has mounted, however it ends.
    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = unmount_below(self.0);
        }
    }

    #[test]
    fn places_are_removed_and_what_is_mounted_there_is_not() {
        let make_file = |path: &Path| std::fs::write(path, b"kept").unwrap();
        let make_directory = |path: &Path| make_dir(path).unwrap();
        for make in [&make_file as &dyn Fn(&Path), &make_directory] {
            let dir = tempfile::tempdir().unwrap();
            let (source, places) = (dir.path().join("source"), dir.path().join("places"));
            let place = places.join("0");
            make_directory(&places);
            make_directory(&places.join("empty"));
            make(&source);
            make(&place);
            rustix::mount::mount_bind(&source, &place).expect("run the tests as root");
            let mounted = Mounted(dir.path());
            let error = remove_places(&places).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy);
            drop(mounted);
            remove_places(&places).unwrap();
            assert!(!places.exists() && source.exists());
        }
    }

    #[test]
    fn mounts_that_may_have_come_along_are_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let [source, file, staging, places] =
            ["source", "source/file", "staging", "places"].map(|name| dir.path().join(name));
        for path in [&source, &staging, &places] {
            make_dir(path).unwrap();
        }
        std::fs::write(&file, b"text").unwrap();
        make_dir(&source.join("below")).unwrap();
        let _mounted = Mounted(dir.path());
        let below = source.join("below");
        rustix::mount::mount_bind(&below, &below).expect("run the tests as root");

        let root = staging.join("rootfs");
        let volumes = [(&file, "rbind"), (&source, "bind"), (&source, "rbind")];
        let volumes = volumes.map(|(source, option)| volume(source, option));
        let mut binds = Vec::new();
        for (index, mount) in (0..).zip(&volumes) {
            let name = index.to_string();
            let at = (staging.join(&name), places.join(&name));
            let nobodys = (None, &Namespaces::default());
            let bound = bind(mount, (&at.0, &at.1), nobodys).unwrap();
            let Bound { receives, recursive } = bound;
            binds.push(Bind { index, mount, name, receives, recursive });
        }
        let overlay =
            |option: &str| vec![RootMount { options: vec![option.into()], ..RootMount::default() }];
        let list = |options: &str, binds: &[Bind<'_>]| {
            let mounts = staged(&staging, &root, &overlay(options), binds).unwrap();
            let names = mounts.iter().map(|mount| mount.strip_prefix(&staging).unwrap());
            names.map(|name| name.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        // Nothing is mounted as root here, so the table does not have it.
        assert_eq!(list("lowerdir=/a", &binds[..2]), ["rootfs", "0", "1"]);
        assert_eq!(list("lowerdir=/a", &binds), ["0", "1", "2", "2/below"]);
        assert_eq!(list("rbind", &binds[..2]), ["0", "1", "2", "2/below"]);
    }

    #[test]
    fn absent_source_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mount = volume(Path::new("/nowhere/data"), "rbind");
        let (staged, place) = (dir.path().join("0"), dir.path().join("1"));
        let nobodys = (None, &Namespaces::default());
        let error = bind(&mount, (&staged, &place), nobodys).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("/nowhere/data") && error.contains("/data"), "{error}");
    }
}
