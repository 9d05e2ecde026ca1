//! The process that connects to sockets of the host for a container.
//!
//! Who listens on a socket learns who connects: process, user, group, and by the process its cgroup
//! (unix(7), SO_PEERCRED). That must not be the shim, which may do everything. So a small process
//! of each container's that needs it has the container's user, groups and cgroup, and nothing else:
//! no capability, no new privileges. It is this program again, connects when the shim asks it to,
//! and hands the connection over. It never sees a byte of the guest's.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, connect, socket_with},
    process::{DumpableBehavior, set_dumpable_behavior, setsid},
    thread::{
        CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set, set_capabilities,
        set_name, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use tokio::{io::Interest, net::UnixDatagram};
use vial_agent_protocol::MAX_PATH_BYTES;

use super::search::{address, open_socket};
use crate::{
    jail::cgroup::{self, CgroupError},
    vmm_client::{receive, send, socket_pair},
};

/// The word on the command line that makes the program a connector.
pub const WORD: &str = "connect-as";
/// The most supplementary groups (limits.h, NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;
/// How long the process may take for an answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// Who connects, as the container's OCI spec says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

impl User {
    /// As one word of a command line.
    fn word(&self) -> String {
        let ids = [self.uid, self.gid].into_iter().chain(self.groups.iter().copied());
        ids.map(|id| id.to_string()).collect::<Vec<_>>().join(",")
    }

    fn of_word(word: &str) -> Option<Self> {
        let ids = word.split(',').map(|id| id.parse().ok()).collect::<Option<Vec<u32>>>()?;
        // The last number stands for none (setresuid(2)).
        if ids.contains(&u32::MAX) {
            return None;
        }
        let [uid, gid, groups @ ..] = &ids[..] else { return None };
        Some(Self { uid: *uid, gid: *gid, groups: groups.to_vec() })
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no process for it.
    #[error("cannot {action} the process that connects for the container: {error}")]
    Process {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: io::Error,
    },
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The spec names more groups than a process can have, or a user that is none.
    #[error("the container's user or groups cannot be those of a process")]
    User,
    /// The listener or its socket's permissions.
    #[error("{0}")]
    Refused(Errno),
}

fn process<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ConnectError {
    move |error| ConnectError::Process { action, error: error.into() }
}

/// A running connector.
#[derive(Debug)]
pub(super) struct Connector {
    child: Child,
    socket: UnixDatagram,
}

impl Drop for Connector {
    fn drop(&mut self) {
        // It has no state, and ends at once.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Connector {
    /// Starts one in `cgroup`, a directory that is there.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub(super) fn start(user: &User, cgroup: &Path) -> Result<Self, ConnectError> {
        if user.groups.len() > MAX_GROUPS || User::of_word(&user.word()).is_none() {
            return Err(ConnectError::User);
        }
        let (ours, theirs) =
            socket_pair().map_err(|error| process("reach")(io::Error::other(error)))?;
        let socket = UnixDatagram::from_std(ours.into()).map_err(process("watch"))?;
        let child = Command::new("/proc/self/exe")
            .arg0("vial-connector")
            .args([WORD, &user.word()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(process("start"))?;
        let connector = Self { child, socket };
        // Before it is asked for anything.
        std::fs::write(cgroup.join("cgroup.procs"), connector.child.id().to_string())
            .map_err(process("place"))?;
        Ok(connector)
    }

    /// One that is a thread of this process.
    #[cfg(test)]
    pub(super) fn of_this_process() -> Self {
        let (ours, theirs) = socket_pair().unwrap();
        std::thread::spawn(move || serve(&theirs));
        let child = Command::new("true").spawn().unwrap();
        Self { child, socket: UnixDatagram::from_std(ours.into()).unwrap() }
    }

    /// Connects to the socket at `path` below `base`, without waiting for a place in its queue.
    ///
    /// # Errors
    /// [`ConnectError`]; after one of [`ConnectError::Process`] it is of no use any more.
    pub(super) async fn connect(
        &self,
        base: &OwnedFd,
        path: &Path,
    ) -> Result<OwnedFd, ConnectError> {
        let answered = tokio::time::timeout(ANSWER_PATIENCE, self.ask(base, path)).await;
        let late = |_| process("hear")(io::Error::from(io::ErrorKind::TimedOut));
        answered.map_err(late)?
    }

    async fn ask(&self, base: &OwnedFd, path: &Path) -> Result<OwnedFd, ConnectError> {
        // A packet of no bytes would look like the end.
        let words = [b"/", path.as_os_str().as_bytes()].concat();
        let asks = || send(self.socket.as_fd(), &words, &[base.as_fd()]);
        let asked = self.socket.async_io(Interest::WRITABLE, asks).await;
        asked.map_err(process("ask"))?;
        let mut errno = [0; 4];
        let hears = || receive(self.socket.as_fd(), &mut errno);
        let heard = self.socket.async_io(Interest::READABLE, hears).await;
        let gone = || process("hear")(io::Error::from(io::ErrorKind::UnexpectedEof));
        let (_, connection) = heard.map_err(process("hear"))?.ok_or_else(gone)?;
        match connection.into_iter().next() {
            Some(connection) => Ok(connection),
            None => Err(ConnectError::Refused(Errno::from_raw_os_error(i32::from_ne_bytes(errno)))),
        }
    }
}

/// Makes the cgroup of a container for its connector. Nothing is limited there: what the container
/// uses, it uses in its guest.
///
/// # Errors
/// [`ConnectError::Process`].
pub(super) fn make_cgroup(path: &Path) -> Result<PathBuf, ConnectError> {
    let place = Path::new(cgroup::ROOT).join(path);
    std::fs::create_dir_all(&place).map_err(process("make the cgroup of"))?;
    Ok(place)
}

/// The program as a connector, for the user of that word, by its standard input. Ends when the
/// shim does.
pub fn run(word: &str) -> ExitCode {
    let Some(user) = User::of_word(word) else { return ExitCode::from(2) };
    let shim = || rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
    match confine(&user).and_then(|()| serve(&shim()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(u8::try_from(error.raw_os_error()).unwrap_or(1)),
    }
}

/// Gives up all but the user's rights.
fn confine(user: &User) -> rustix::io::Result<()> {
    set_name(c"vial-connector")?;
    // The shim is spared when memory is short, and this is part of the container.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    setsid()?;
    let groups: Vec<Gid> = user.groups.iter().map(|id| Gid::from_raw(*id)).collect();
    set_thread_groups(&groups)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    set_no_new_privs(true)?;
    // Nobody else of that user's looks into it, or stops it in the middle.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Connects whenever it is asked to.
fn serve(shim: &OwnedFd) -> rustix::io::Result<()> {
    let mut words = vec![0; MAX_PATH_BYTES + 1];
    loop {
        let received = match receive(shim.as_fd(), &mut words) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        };
        let Some((length, descriptors)) = received else { return Ok(()) };
        let path = Path::new(std::ffi::OsStr::from_bytes(&words[1..length]));
        let connected = match descriptors.into_iter().next() {
            Some(base) => connect_to(&base, path),
            None => Err(Errno::BADF),
        };
        let answered = match &connected {
            Ok(connection) => send(shim.as_fd(), &0i32.to_ne_bytes(), &[connection.as_fd()]),
            Err(error) => send(shim.as_fd(), &error.raw_os_error().to_ne_bytes(), &[]),
        };
        answered.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    }
}

/// All checks of permissions, those of directories among them, are made for the user.
fn connect_to(base: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let target = open_socket(base, path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connection = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&connection, &address(&target)?)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn user_survives_its_word() {
        for groups in [vec![], vec![5], vec![1, 2, 3]] {
            let user = User { uid: 1000, gid: 0, groups };
            assert_eq!(User::of_word(&user.word()), Some(user));
        }
        for bad in ["", "1", "1,", "1,2,x", "-1,0", "4294967295,0", "0,0,4294967295"] {
            assert_eq!(User::of_word(bad), None, "{bad}");
        }
    }

    #[test]
    fn connection_is_that_of_the_socket_below_the_volume() {
        let volume = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(volume.path().join("s")).unwrap();
        let flags = rustix::fs::OFlags::PATH;
        let base = rustix::fs::open(volume.path(), flags, rustix::fs::Mode::empty()).unwrap();
        let connection = connect_to(&base, Path::new("s")).unwrap();
        let (_, _) = listener.accept().unwrap();
        drop(connection);
        drop(listener);
        assert_eq!(connect_to(&base, Path::new("s")).unwrap_err(), Errno::CONNREFUSED);
        assert_eq!(connect_to(&base, Path::new("none")).unwrap_err(), Errno::NOENT);
    }
}
