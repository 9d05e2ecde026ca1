//! Which sockets a volume has on which somebody listens on this host.
//!
//! A volume also shows sockets that the pod's own containers have made. Those work inside the guest,
//! and must be left alone. The kernel tells them apart: to connect with a type that no such socket
//! has is refused as such where a process of this host has bound one (unix(7), EPROTOTYPE), and as
//! refused where none has. Who listens does not notice.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsStr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{
        Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat,
        inotify::{self, WatchFlags},
        openat2,
    },
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

/// The most directories of a volume that are looked into.
pub(super) const MAX_DIRECTORIES: usize = 64;
/// How many directories may lie between a volume and a socket.
pub(super) const MAX_DEPTH: usize = 3;
/// The most names of a volume that are looked at, those of the upper directories first.
pub(super) const MAX_ENTRIES: usize = 1024;
/// The most sockets of one volume.
pub(super) const MAX_SOCKETS: usize = 32;
/// How long after it was made a socket may have nobody who listens, and is looked at again.
pub(super) const YOUNG: Duration = Duration::from_secs(10);

/// What tells a directory that something in it has changed.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// What a socket is: another one of the same name differs in this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    /// With each change of owner and mode, too.
    changed_ns: i128,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            changed_ns: i128::from(stat.st_ctime) * 1_000_000_000 + i128::from(stat.st_ctime_nsec),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & 0o777,
        }
    }
}

/// What a volume has.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Those on which somebody listens, by their paths below the volume. The one of an empty path
    /// is the volume.
    pub(super) sockets: BTreeMap<PathBuf, Identity>,
    /// The others, as many.
    pub(super) others: BTreeMap<PathBuf, Identity>,
    /// When it is worth to look again at sockets without anybody: who makes one listens later.
    pub(super) again_in: Option<Duration>,
}

/// A name of a volume, opened and not read.
fn open(base: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(base, path, flags, Mode::empty(), beneath)
}

/// Opens the socket at `path` below `base`, or `base` itself for an empty path. Never by a link.
///
/// # Errors
/// What the system says; `CONNREFUSED` when it is no socket.
pub(super) fn open_socket(base: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let opened = match path.as_os_str().is_empty() {
        true => rustix::io::fcntl_dupfd_cloexec(base, 0)?,
        false => open(base, path, OFlags::PATH)?,
    };
    match FileType::from_raw_mode(fstat(&opened)?.st_mode) {
        FileType::Socket => Ok(opened),
        _ => Err(Errno::CONNREFUSED),
    }
}

/// Where an open socket is found by connect(2), which takes no descriptor.
pub(super) fn address(socket: &OwnedFd) -> rustix::io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

/// Whether a process of this host has bound it, with a type that has connections.
fn is_of_the_host(socket: &OwnedFd) -> bool {
    let probe = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let probe = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        connect(&probe, &address(socket)?)
    };
    probe() == Err(Errno::PROTOTYPE)
}

/// When to look again at a socket that nobody listens on: when it is twice as old.
fn again_in(changed_ns: i128, now: SystemTime) -> Option<Duration> {
    let now_ns = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let age_ns = (now_ns.cast_signed() - changed_ns).max(0);
    let age = Duration::from_nanos(u64::try_from(age_ns).ok()?);
    (age < YOUNG).then(|| age.max(Duration::from_millis(20)))
}

/// Looks through the volume at `base`, a directory or a socket. Directories are watched by
/// `inotify`, if there is one, before they are looked into: nothing goes unseen in between.
///
/// What cannot be opened is left out: it goes at any time.
pub(super) fn search(base: &OwnedFd, inotify: Option<&OwnedFd>) -> Found {
    let mut found = Found::default();
    let mut budget = MAX_ENTRIES;
    let mut directories = VecDeque::from([(PathBuf::new(), 0)]);
    let mut looked_into = 0;
    if fstat(base).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket) {
        add(base, PathBuf::new(), &mut found);
        return found;
    }
    while let Some((path, depth)) = directories.pop_front() {
        if looked_into == MAX_DIRECTORIES || budget == 0 {
            break;
        }
        looked_into += 1;
        let name = if depth == 0 { Path::new(".") } else { &path };
        let Ok(directory) = open(base, name, OFlags::RDONLY | OFlags::DIRECTORY) else { continue };
        if let Some(inotify) = inotify {
            let place = format!("/proc/self/fd/{}", directory.as_raw_fd());
            // Without a watch it is seen when something else changes.
            let _ = inotify::add_watch(inotify, place, CHANGES);
        }
        for (name, kind) in entries(&directory, &mut budget) {
            let path = path.join(OsStr::from_bytes(&name));
            match kind {
                FileType::Directory if depth < MAX_DEPTH => {
                    directories.push_back((path, depth + 1))
                }
                FileType::Socket => add(base, path, &mut found),
                _ => {}
            }
        }
    }
    found
}

/// The names in a directory, as many as are left.
fn entries(directory: &OwnedFd, budget: &mut usize) -> Vec<(Vec<u8>, FileType)> {
    let mut entries = Vec::new();
    let Ok(listed) = Dir::read_from(directory) else { return entries };
    for entry in listed.flatten() {
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let Some(left) = budget.checked_sub(1) else { break };
        *budget = left;
        let kind = match entry.file_type() {
            // Not every file system tells.
            FileType::Unknown => {
                let stat = rustix::fs::statat(
                    directory,
                    entry.file_name(),
                    rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
                );
                stat.map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode))
            }
            kind => kind,
        };
        if matches!(kind, FileType::Directory | FileType::Socket) {
            entries.push((name.to_vec(), kind));
        }
    }
    entries
}

fn add(base: &OwnedFd, path: PathBuf, found: &mut Found) {
    let Ok(socket) = open_socket(base, &path) else { return };
    let Ok(stat) = fstat(&socket) else { return };
    let identity = Identity::of(&stat);
    if is_of_the_host(&socket) {
        if found.sockets.len() < MAX_SOCKETS {
            found.sockets.insert(path, identity);
        }
        return;
    }
    if found.others.len() < MAX_SOCKETS {
        found.others.insert(path, identity);
    }
    let again = again_in(identity.changed_ns, SystemTime::now());
    found.again_in = [found.again_in, again].into_iter().flatten().min();
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        fs::{PermissionsExt, symlink},
        net::{UnixDatagram, UnixListener},
    };

    use rustix::fs::{CWD, inotify::CreateFlags};

    use super::*;

    fn base(path: &Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap()
    }

    fn paths(found: &Found) -> Vec<&str> {
        found.sockets.keys().map(|path| path.to_str().unwrap()).collect()
    }

    #[test]
    fn sockets_that_somebody_has_are_found_and_others_are_not() {
        let volume = tempfile::tempdir().unwrap();
        let at = |path: &str| volume.path().join(path);
        std::fs::create_dir_all(at("a/b/c/d")).unwrap();
        let listener = UnixListener::bind(at("top")).unwrap();
        let _deep = UnixListener::bind(at("a/b/c/deep")).unwrap();
        let _deeper = UnixListener::bind(at("a/b/c/d/deeper")).unwrap();
        let _datagrams = UnixDatagram::bind(at("datagrams")).unwrap();
        drop(UnixListener::bind(at("left")).unwrap());
        symlink("top", at("link")).unwrap();
        symlink("a", at("directory")).unwrap();
        std::fs::write(at("file"), "").unwrap();
        let found = search(&base(volume.path()), None);
        assert_eq!(paths(&found), ["a/b/c/deep", "top"]);
        // The one that is left may be about to be listened on.
        assert!(found.again_in.is_some());
        // Who listens has seen nothing of it.
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err());
        // A socket that is the volume.
        assert_eq!(paths(&search(&base(&at("top")), None)), [""]);
        assert!(search(&base(&at("left")), None).sockets.is_empty());
    }

    #[test]
    fn change_of_mode_and_another_socket_of_the_name_show() {
        let volume = tempfile::tempdir().unwrap();
        let path = volume.path().join("s");
        let look = || search(&base(volume.path()), None).sockets[Path::new("s")];
        let listener = UnixListener::bind(&path).unwrap();
        let first = look();
        assert_eq!(first, look());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let second = look();
        assert!(second != first && second.mode == 0o600);
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let _listener = UnixListener::bind(&path).unwrap();
        assert_ne!(look(), second);
    }

    #[test]
    fn search_ends_at_its_bounds() {
        let volume = tempfile::tempdir().unwrap();
        let listeners: Vec<UnixListener> = (0..=MAX_SOCKETS)
            .map(|n| UnixListener::bind(volume.path().join(n.to_string())).unwrap())
            .collect();
        assert_eq!(search(&base(volume.path()), None).sockets.len(), MAX_SOCKETS);
        drop(listeners);
        let volume = tempfile::tempdir().unwrap();
        let mut budget = MAX_ENTRIES;
        for n in 0..=MAX_ENTRIES {
            std::fs::create_dir(volume.path().join(n.to_string())).unwrap();
        }
        let opened = open(base(volume.path()), Path::new("."), OFlags::RDONLY).unwrap();
        assert_eq!(entries(&opened, &mut budget).len(), MAX_ENTRIES);
        assert!(entries(&opened, &mut budget).is_empty());
        // One watch a directory that is looked into.
        let volume = tempfile::tempdir().unwrap();
        for n in 0..=MAX_DIRECTORIES {
            std::fs::create_dir(volume.path().join(n.to_string())).unwrap();
        }
        let inotify = inotify::init(CreateFlags::CLOEXEC).unwrap();
        search(&base(volume.path()), Some(&inotify));
        let info = format!("/proc/self/fdinfo/{}", inotify.as_raw_fd());
        let watches = std::fs::read_to_string(info).unwrap();
        assert_eq!(watches.matches("inotify wd:").count(), MAX_DIRECTORIES);
    }

    #[test]
    fn socket_is_opened_below_the_volume_alone() {
        let outside = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(outside.path().join("s")).unwrap();
        let volume = tempfile::tempdir().unwrap();
        symlink(outside.path(), volume.path().join("out")).unwrap();
        symlink(outside.path().join("s"), volume.path().join("s")).unwrap();
        std::fs::write(volume.path().join("file"), "").unwrap();
        let base = base(volume.path());
        for path in ["out/s", "s", "../s", "/s", "file", "none"] {
            assert!(open_socket(&base, Path::new(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn young_sockets_are_looked_at_again_and_old_ones_are_not() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let at = |seconds: i128| again_in(seconds * 1_000_000_000, now);
        assert_eq!(at(997), Some(Duration::from_secs(3)));
        assert_eq!(at(1000), Some(Duration::from_millis(20)));
        // The clock was set back.
        assert_eq!(at(2000), Some(Duration::from_millis(20)));
        assert_eq!(at(990), None);
    }
}
