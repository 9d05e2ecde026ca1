//! Unix sockets of the host in volumes of containers.
//!
//! The inode of a socket means nothing in another kernel: connecting to one that a volume shows fails.
//! So the agent listens on a socket of its own, which it mounts over the host's, and leads what
//! connects there to the host over vsock (`vial_agent_protocol::SOCKET_PORT`).
//!
//! A volume that may have sockets is bound to a place of the agent's, which is a shared mount. What
//! a container has of it receives from there, so sockets come and go in a running container without
//! anybody entering its mount namespace, whatever it has made of its paths.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, linkat, open, openat2,
};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use vial_agent_protocol::agent::{HostSocket, SocketPlace};
use vial_agent_protocol::{
    MAX_PATH_BYTES, MAX_SOCKET_CONNECTIONS, MAX_SOCKETS, SOCKET_PORT, SOCKET_REACHED,
};

use crate::streams::Stream;

/// The pause after accept(2) failed, for lack of descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the host may take to reach its own socket.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a socket of the host's is not in a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    #[error("a pod has at most {MAX_SOCKETS} sockets of the host")]
    TooMany,
    #[error("the number of the host's socket {0:?} is 0 or in use")]
    Number(PathBuf),
    #[error("{0:?} is no path of a socket below its volume")]
    Path(PathBuf),
    #[error("mount {index} of container {container} is no volume with sockets")]
    NoVolume { container: String, index: u32 },
    #[error("no process of the guest has bound {0:?}")]
    Nobody(PathBuf),
    #[error("cannot {action} {path}: {source}")]
    System { action: &'static str, path: PathBuf, source: io::Error },
}

impl SocketError {
    /// Whether the request asked for what cannot be.
    pub(crate) fn is_of_the_request(&self) -> bool {
        !matches!(self, Self::System { .. } | Self::Nobody(_))
    }
}

type Result<T> = std::result::Result<T, SocketError>;

fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> SocketError {
    move |error| SocketError::System { action, path: path.into(), source: error.into() }
}

/// Where the host is reached.
#[derive(Clone, Debug)]
pub(crate) enum Host {
    Vsock,
    /// A socket in its place, for tests.
    Unix(PathBuf),
}

impl Host {
    async fn connect(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Vsock => {
                let address = VsockAddr::new(VMADDR_CID_HOST, SOCKET_PORT);
                Box::new(VsockStream::connect(address).await?)
            }
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

/// A socket of the agent's in place of one of the host's.
struct Cover {
    container: String,
    index: u32,
    /// Relative to the volume; empty: it is the volume.
    path: PathBuf,
    /// The socket of the agent's.
    file: PathBuf,
    accepting: AbortHandle,
}

impl Drop for Cover {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = fs::remove_file(&self.file);
    }
}

#[derive(Default)]
struct Table {
    /// By the host's number.
    covers: HashMap<u64, Cover>,
    /// For each container with sockets, what ends its connections when it is dropped.
    containers: HashMap<String, watch::Sender<()>>,
    last_file: u64,
}

/// The sockets of all containers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sockets {
    table: Arc<Mutex<Table>>,
    room: Arc<Semaphore>,
    directory: Arc<PathBuf>,
    host: Host,
}

impl Sockets {
    /// None yet; files and mounts will be below `directory`, which is short.
    pub(crate) fn new(directory: PathBuf, host: Host) -> Self {
        let room = Arc::new(Semaphore::new(MAX_SOCKET_CONNECTIONS));
        Self { table: Arc::default(), room, directory: Arc::new(directory), host }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn volumes(&self, container: &str) -> PathBuf {
        self.directory.join("volumes").join(container)
    }

    fn volume(&self, container: &str, index: u32) -> PathBuf {
        self.volumes(container).join(index.to_string())
    }

    /// Binds a container's volume to where sockets can be put over those of the host, and answers
    /// where that is.
    ///
    /// # Errors
    /// [`SocketError::System`]; what was made is left to [`Sockets::release`].
    pub(crate) fn add_volume(&self, container: &str, index: u32, source: &Path) -> Result<PathBuf> {
        let place = self.volume(container, index);
        fs::create_dir_all(&place).map_err(failed("create directory", &place))?;
        mount_bind(source, &place).map_err(failed("bind a volume to", &place))?;
        mount_change(&place, MountPropagationFlags::SHARED).map_err(failed("share", &place))?;
        Ok(place)
    }

    /// Puts a socket over one of the host's, in place of the one that is there for that path.
    /// Answers the socket's file when it is to be a volume itself.
    ///
    /// # Errors
    /// [`SocketError`]; there is none for the path then.
    pub(crate) fn add(&self, container: &str, socket: &HostSocket) -> Result<Option<PathBuf>> {
        let path = PathBuf::from(OsStr::from_bytes(&socket.path));
        if !is_below(&path) {
            return Err(SocketError::Path(path));
        }
        let (gone, file) = self.reserve(container, socket, &path)?;
        let listener = listen(&file, socket)?;
        let accepting = tokio::spawn(self.clone().accept(listener, socket.number, gone));
        let cover = Cover {
            container: container.to_owned(),
            index: socket.index,
            path: path.clone(),
            file: file.clone(),
            accepting: accepting.abort_handle(),
        };
        if !path.as_os_str().is_empty() {
            let volume = self.volume(container, socket.index);
            put_over(&volume, &path, &file)?;
        }
        let itself = path.as_os_str().is_empty().then_some(file);
        self.table().covers.insert(socket.number, cover);
        Ok(itself)
    }

    /// Checks what is asked for, takes away what is there for the same path, and answers what ends
    /// with the container, and the name of a new file.
    fn reserve(
        &self,
        container: &str,
        socket: &HostSocket,
        path: &Path,
    ) -> Result<(watch::Receiver<()>, PathBuf)> {
        let same = |cover: &Cover| {
            (&*cover.container, cover.index, &*cover.path) == (container, socket.index, path)
        };
        let old = {
            let table = self.table();
            let mut covers = table.covers.iter();
            covers.find_map(|(number, cover)| same(cover).then_some(*number))
        };
        if let Some(old) = old {
            self.remove(old);
        }
        let mut table = self.table();
        if table.covers.len() >= MAX_SOCKETS {
            return Err(SocketError::TooMany);
        }
        if socket.number == 0 || table.covers.contains_key(&socket.number) {
            return Err(SocketError::Number(path.into()));
        }
        let gone = table.containers.entry(container.to_owned()).or_default().subscribe();
        table.last_file += 1;
        Ok((gone, self.directory.join(table.last_file.to_string())))
    }

    /// Mounts a socket that a process of the guest has bound over the same file in other volumes: to
    /// the guest's kernel they are file systems of their own, and their sockets are others.
    ///
    /// # Errors
    /// [`SocketError::Nobody`] and others.
    pub(crate) fn join(&self, places: &[SocketPlace]) -> Result<()> {
        if places.len() > MAX_SOCKETS {
            return Err(SocketError::TooMany);
        }
        let mut opened = Vec::new();
        for place in places {
            let path = Path::new(OsStr::from_bytes(&place.path));
            if !is_below(path) || path.as_os_str().is_empty() {
                return Err(SocketError::Path(path.into()));
            }
            // One that has just gone does not keep the others apart.
            let volume = self.volume(&place.container_id, place.index);
            if let Ok(socket) = find(&volume, path, &self.directory) {
                opened.push((path, socket));
            }
        }
        let (bound, others): (Vec<_>, Vec<_>) =
            opened.iter().partition(|(_, socket)| is_bound(socket));
        let Some((_, bound)) = bound.first() else {
            let path = opened.first().map(|(path, _)| PathBuf::from(path));
            return Err(SocketError::Nobody(path.unwrap_or_default()));
        };
        for (path, other) in others {
            mount_bind(by_number(bound), by_number(other))
                .map_err(failed("mount a socket over", path))?;
        }
        Ok(())
    }

    /// Takes a socket away. Its connections live on.
    pub(crate) fn remove(&self, number: u64) {
        let Some(cover) = self.table().covers.remove(&number) else { return };
        let volume = self.volume(&cover.container, cover.index);
        match take_off(&volume, &cover.path, &cover.file) {
            // The kernel took it off when the host's socket was gone.
            Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
            Err(error) => {
                tracing::warn!("cannot take a socket off {}: {error}", cover.path.display());
            }
        }
    }

    /// Forgets a container that has ended, its sockets and its volumes.
    ///
    /// # Errors
    /// A volume cannot be let go.
    pub(crate) fn release(&self, container: &str) -> Result<()> {
        {
            let mut table = self.table();
            table.covers.retain(|_, cover| cover.container != container);
            table.containers.remove(container);
        }
        let volumes = self.volumes(container);
        let listed = match fs::read_dir(&volumes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            listed => listed.map_err(failed("list", &volumes))?,
        };
        for place in listed {
            let place = place.map_err(failed("list", &volumes))?.path();
            match unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // It did not come to be mounted.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(failed("unmount", &place)(error)),
            }
            // Not with what is in it: that would be the host's.
            fs::remove_dir(&place).map_err(failed("remove", &place))?;
        }
        fs::remove_dir(&volumes).map_err(failed("remove", &volumes))
    }

    /// Takes the connections to one socket.
    async fn accept(self, listener: UnixListener, number: u64, gone: watch::Receiver<()>) {
        loop {
            let client = match listener.accept().await {
                Ok((client, _)) => client,
                Err(error) => {
                    tracing::warn!("cannot accept a connection to a host's socket: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Those beyond wait where the kernel keeps them.
            let Ok(place) = Arc::clone(&self.room).acquire_owned().await else { return };
            let (host, mut gone) = (self.host.clone(), gone.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = carry(client, &host, number) => {}
                    // The table drops the sender with the container.
                    _ = gone.changed() => {}
                }
                drop(place);
            });
        }
    }
}

/// Carries one connection to its end.
async fn carry(mut client: UnixStream, host: &Host, number: u64) {
    let reached = async {
        let mut host = host.connect().await?;
        host.write_u64_le(number).await?;
        match host.read_u8().await? {
            SOCKET_REACHED => Ok(host),
            _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
        }
    };
    match tokio::time::timeout(PATIENCE, reached).await {
        Ok(Ok(mut host)) => {
            // An end of either side that is no good one ends both.
            let _ = copy_bidirectional(&mut client, &mut host).await;
        }
        Ok(Err(error)) => tracing::info!("a socket of the host's is not reached: {error}"),
        Err(_) => tracing::info!("a socket of the host's is not reached within {PATIENCE:?}"),
    }
}

/// Whether `path` names something below a directory, or nothing at all.
fn is_below(path: &Path) -> bool {
    let same = path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
    path.as_os_str().len() <= MAX_PATH_BYTES
        && !path.as_os_str().as_bytes().contains(&0)
        && same
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A socket with the owner and the permissions of the host's.
fn listen(file: &Path, like: &HostSocket) -> Result<UnixListener> {
    let listener = UnixListener::bind(file).map_err(failed("listen on", file))?;
    let belong = || {
        chown(file, Some(like.uid), Some(like.gid))?;
        fs::set_permissions(file, fs::Permissions::from_mode(like.mode & 0o777))
    };
    match belong() {
        Ok(()) => Ok(listener),
        Err(error) => {
            let _ = fs::remove_file(file);
            Err(failed("set the owner and mode of", file)(error))
        }
    }
}

/// Opens what a volume has at `path`, without a link on the way.
fn open_below(volume: &Path, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open(volume, flags, Mode::empty())?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(&root, path, flags, Mode::empty(), beneath)
}

fn by_number(descriptor: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Mounts `file` over the host's socket.
fn put_over(volume: &Path, path: &Path, file: &Path) -> Result<()> {
    let target = find(volume, path, file)?;
    mount_bind(file, by_number(&target)).map_err(failed("mount a socket over", path))
}

/// Whether a process of the guest has bound it: the kernel refuses a type that it has not as such.
fn is_bound(socket: &OwnedFd) -> bool {
    let probe = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let probe = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        connect(&probe, &SocketAddrUnix::new(by_number(socket))?)
    };
    probe() == Err(Errno::PROTOTYPE)
}

/// Opens the socket that a volume has at `path`, or what is mounted over it. `own` is any file of
/// the agent's.
fn find(volume: &Path, path: &Path, own: &Path) -> Result<OwnedFd> {
    let refused = || SocketError::Path(path.into());
    let parent = path.parent().unwrap_or(Path::new(""));
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let name = path.file_name().ok_or_else(refused)?;
    let directory = open_below(volume, parent).map_err(failed("open the directory of", path))?;
    // What the guest remembers of the name may be a second old, and of a socket that is gone: a
    // mount on that would go with it. To make a link the kernel asks the host, and this one cannot
    // be made, since it would lead from one file system to another.
    match linkat(CWD, own, &directory, name, AtFlags::empty()) {
        Err(Errno::EXIST) => {}
        Err(Errno::XDEV) => return Err(failed("find", path)(Errno::NOENT)),
        Err(error) => return Err(failed("look again at", path)(error)),
        Ok(()) => return Err(refused()),
    }
    let target = open_below(volume, path).map_err(failed("open", path))?;
    let found = fstat(&target).map_err(failed("look at", path))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(refused());
    }
    Ok(target)
}

/// Takes `file` off the host's socket.
fn take_off(volume: &Path, path: &Path, file: &Path) -> rustix::io::Result<()> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let top = open_below(volume, path)?;
    let (found, own) = (fstat(&top)?, fs::symlink_metadata(file).map_err(|_| Errno::NOENT)?);
    if (found.st_dev, found.st_ino) != (own.dev(), own.ino()) {
        return Err(Errno::NOENT);
    }
    unmount(by_number(&top), UnmountFlags::DETACH)
}

#[cfg(test)]
mod tests;
