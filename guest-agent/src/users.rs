//! The user namespace of a pod whose users are not the guest's, and the namespaces that are its: network,
//! IPC, UTS.
//!
//! The agent enters those three itself, and stays the guest's root. So whatever it does for the pod from
//! then on, it does there, and what it starts begins there. What the kernel has in its first network
//! namespace alone is done by [`in_first_network`].

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MountFlags, mount};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use vial_agent_protocol::users::{Users, UsersError};

use crate::network;

/// The word on the command line that makes the program the maker of the namespaces.
pub(crate) const MAKER_WORD: &str = "user-namespace";

/// The directory of all interfaces, as the agent's own sysfs shows those of the first namespace.
const FIRST_INTERFACES: &str = "/sys/class/net";

/// Why the pod has no users of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserNamespaceError {
    #[error(transparent)]
    Users(#[from] UsersError),
    #[error("the guest has the user namespace of a pod already")]
    Twice,
    #[error("cannot {action} the pod's user namespace: {source}")]
    System { action: &'static str, source: io::Error },
}

impl UserNamespaceError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        !matches!(self, Self::System { .. })
    }
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> UserNamespaceError {
    move |error| UserNamespaceError::System { action, source: error.into() }
}

/// What the agent has entered.
#[derive(Debug)]
pub(crate) struct UserNamespace {
    /// Who the pod's users are outside.
    pub(crate) users: Users,
    namespace: OwnedFd,
    /// The network namespace that the agent began in.
    first_network: OwnedFd,
    network: OwnedFd,
    /// Where a sysfs shows the pod's interfaces.
    sysfs: PathBuf,
}

/// What namespaces a process is in is the whole process's.
static ENTERED: OnceLock<UserNamespace> = OnceLock::new();

/// The pod's user namespace, if it has one.
pub(crate) fn of_pod() -> Option<&'static UserNamespace> {
    ENTERED.get()
}

impl UserNamespace {
    /// The namespace as a file, for processes that the agent starts.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd()).into()
    }

    /// Who the pod's root is outside.
    pub(crate) fn root(&self) -> (u32, u32) {
        // The first of each range is there.
        (self.users.uids.on_host(0).unwrap_or(0), self.users.gids.on_host(0).unwrap_or(0))
    }

    /// The pod's network namespace.
    pub(crate) fn network(&self) -> &OwnedFd {
        &self.network
    }
}

/// Makes the namespaces of a pod with such users, and enters those that are not of users. `sysfs` is a
/// directory to be.
///
/// # Errors
/// [`UserNamespaceError`]. The guest is of no use then if it is one of the system's.
pub(crate) fn enter(users: Users, sysfs: PathBuf) -> Result<(), UserNamespaceError> {
    if ENTERED.get().is_some() {
        return Err(UserNamespaceError::Twice);
    }
    let first_network = File::open("/proc/self/ns/net").map_err(failed("keep what is without"))?;
    let maker = Maker::start(users).map_err(failed("make"))?;
    let namespace = maker.namespace("user").map_err(failed("find"))?;
    let network = maker.namespace("net").map_err(failed("find the network of"))?;
    for (kind, name) in [(CloneFlags::CLONE_NEWIPC, "ipc"), (CloneFlags::CLONE_NEWUTS, "uts")] {
        let namespace = maker.namespace(name).map_err(failed("find what belongs to"))?;
        setns(namespace, kind).map_err(failed("enter what belongs to"))?;
    }
    setns(&network, CloneFlags::CLONE_NEWNET).map_err(failed("enter the network of"))?;
    drop(maker);
    fs::create_dir(&sysfs).map_err(failed("make a directory for"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount("sysfs", &sysfs, "sysfs", flags, None).map_err(failed("mount sysfs for"))?;
    let first_network = first_network.into();
    let (namespace, network) = (namespace.into(), network.into());
    let entered = UserNamespace { users, namespace, first_network, network, sysfs };
    ENTERED.set(entered).map_err(|_| UserNamespaceError::Twice)
}

/// Who a user of the pod is outside. One that is nobody there is refused when it is to run.
pub(crate) fn outside(uid: u32) -> u32 {
    of_pod().and_then(|pod| pod.users.uids.on_host(uid)).unwrap_or(uid)
}

/// Does something in the network namespace in which the kernel finds devices and tells of what happens to
/// them: the first one. The agent has one thread, and nothing else happens meanwhile.
pub(crate) fn in_first_network<T>(work: impl FnOnce() -> T) -> T {
    let Some(entered) = ENTERED.get() else { return work() };
    let go = |namespace: &OwnedFd| {
        // It may do so from the beginning to the end, and holds both.
        if let Err(error) = setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET) {
            panic!("cannot enter a network namespace: {error}");
        }
    };
    go(&entered.first_network);
    let done = work();
    go(&entered.network);
    done
}

/// Does something as the pod's root, without capabilities: kernel parameters of an IPC namespace are its root's
/// to set, and nobody else's.
pub(crate) fn as_root_of_pod<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(entered) = ENTERED.get() else { return work() };
    let (uid, _) = entered.root();
    set_thread_res_uid(None, Uid::from_raw(uid), None)?;
    let done = work();
    // The real and the saved one stay root's, which gives all capabilities back.
    if let Err(error) = set_thread_res_uid(None, Uid::ROOT, None) {
        panic!("cannot become root again: {error}");
    }
    done
}

/// For each place in which the pod's interfaces can be: does something in that network namespace with the
/// directory of a sysfs that shows those there.
pub(crate) fn for_interfaces(mut work: impl FnMut(&Path)) {
    in_first_network(|| work(Path::new(FIRST_INTERFACES)));
    if let Some(entered) = ENTERED.get() {
        work(&entered.sysfs.join("class/net"));
    }
}

/// Makes this process, which has one thread, root in a user namespace.
///
/// # Errors
/// It is none, or the caller may not.
pub(crate) fn become_root_in(namespace: &Path) -> io::Result<()> {
    setns(File::open(namespace)?, CloneFlags::CLONE_NEWUSER)?;
    become_root()
}

fn become_root() -> io::Result<()> {
    set_thread_groups(&[])?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    Ok(set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?)
}

/// A process in the namespaces, which ends when this is dropped.
struct Maker {
    pid: u32,
    _go_on: ChildStdin,
}

impl Maker {
    /// The agent cannot do this itself: there is no way back from a user namespace.
    fn start(users: Users) -> io::Result<Self> {
        let mut maker = Command::new("/proc/self/exe")
            .arg(MAKER_WORD)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let pid = maker.id();
        let (Some(mut go_on), Some(mut step)) = (maker.stdin.take(), maker.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let mut hear = || {
            step.read_exact(&mut [0])
                .map_err(|_| io::Error::other("its maker failed; see the kernel's log"))
        };
        hear()?;
        for (name, range) in [("uid_map", users.uids), ("gid_map", users.gids)] {
            fs::write(format!("/proc/{pid}/{name}"), range.to_string())?;
        }
        go_on.write_all(b"x")?;
        hear()?;
        Ok(Self { pid, _go_on: go_on })
    }

    fn namespace(&self, name: &str) -> io::Result<File> {
        File::open(format!("/proc/{}/ns/{name}", self.pid))
    }
}

/// Makes the namespaces, is told in between that its users are known, and waits to be no longer needed.
pub(crate) fn make() -> ExitCode {
    let (mut word, mut step) = (io::stdin(), io::stdout());
    let mut made = || -> io::Result<()> {
        let mut tell = || step.write_all(b"x").and_then(|()| step.flush());
        unshare(CloneFlags::CLONE_NEWUSER)?;
        tell()?;
        word.read_exact(&mut [0])?;
        become_root()?;
        let flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
        unshare(flags)?;
        network::bring_up_loopback()?;
        tell()?;
        word.read_to_end(&mut Vec::new())?;
        Ok(())
    };
    match made() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vial-agent: cannot make a user namespace: {error}");
            ExitCode::FAILURE
        }
    }
}
