//! Unix sockets of the host in volumes of the pod's containers.
//!
//! What a guest sees of such a socket is its inode, which means nothing to the guest's kernel. So
//! volumes are searched for sockets on which somebody listens on this host ([`search`]), the agent
//! puts one of its own over each (`guest-agent/src/sockets.rs`), and what connects to that comes here
//! over vsock with the socket's number. It is joined with a connection that a process with the
//! container's user and cgroup has made ([`connector`]), from the path below the volume anew each
//! time: a server that made its socket anew is found.
//!
//! The guest names no path, and what it can reach by a number are the sockets that its volumes show.

mod carry;
pub mod connector;
mod search;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::OwnedFd,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use rustix::{
    fs::{
        FileType, Mode, OFlags, fstat,
        inotify::{self, CreateFlags},
    },
    rand::{GetRandomFlags, getrandom},
};
use tokio::{
    net::unix::pipe::Receiver,
    sync::{Notify, Semaphore, watch},
    task::JoinHandle,
};
use vial_agent_protocol::{
    MAX_SOCKET_CONNECTIONS, MAX_SOCKETS,
    agent::{HostSocket, SocketPlace},
};

use self::{
    carry::Caller,
    search::{Found, Identity, search},
};
use crate::{
    agent::Agent,
    share::{Share, Shared},
    spec::Spec,
    state_dir::StateDir,
};

/// The least pause between two looks at the volumes, and how many times as long as a look took: what
/// a guest does in its volumes costs the host a bounded part of its time.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_TIMES: u32 = 8;
/// How often volumes are looked at when the kernel gives no more inotify instances.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// After how long a socket that the guest did not take is told again, and how often.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);
const MOST_TRIES: u32 = 5;

/// A volume of a container, or a socket that is one.
#[derive(Debug, Clone)]
struct Volume {
    /// Into the spec's mounts.
    index: u32,
    /// As it is in the shared tree.
    base: Arc<OwnedFd>,
    is_directory: bool,
}

/// A socket that the guest was told of.
#[derive(Debug, Clone, Copy)]
struct Told {
    identity: Identity,
    number: u64,
    /// Whether the guest has taken it.
    taken: bool,
    failures: u32,
}

/// A socket's place in a container: index into the spec's mounts, and the path below.
type Place = (u32, PathBuf);

/// What a container's volumes have.
#[derive(Debug, Default)]
struct Seen {
    /// Sockets of the host.
    sockets: BTreeMap<Place, Identity>,
    /// Those that no process of the host has bound: a container has, or nobody any more.
    others: BTreeMap<Place, Identity>,
    /// When it is worth to look again.
    again_in: Option<Duration>,
}

/// Where volumes of containers show one and the same socket.
type Group = (Identity, Vec<(String, Place)>);

/// What is known of a container.
#[derive(Debug)]
struct Followed {
    volumes: Vec<Volume>,
    told: BTreeMap<Place, Told>,
    caller: Arc<Caller>,
    /// Ends its connections when it is dropped.
    _gone: watch::Sender<()>,
}

/// A container that is about to be created.
#[derive(Debug)]
pub struct Prepared {
    container: String,
    followed: Followed,
}

#[derive(Debug)]
struct Common {
    containers: Mutex<HashMap<String, Followed>>,
    /// The set has changed, or a socket refuses connections.
    changed: Notify,
    /// Groups of which the guest knows that they are one.
    joined: Mutex<BTreeSet<Group>>,
    /// Connections at one time.
    room: Arc<Semaphore>,
    dir: StateDir,
    /// The cgroup of the pod's VMM, which goes with the pod.
    pod_cgroup: Option<PathBuf>,
}

/// The sockets of a pod's containers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Sockets {
    common: Arc<Common>,
    agent: Agent,
    /// There with the first container that has volumes.
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Sockets {
    /// None yet, of the pod with that directory, whose VMM is in that cgroup.
    pub fn new(agent: Agent, dir: StateDir, pod_cgroup: Option<PathBuf>) -> Self {
        let common = Common {
            containers: Mutex::default(),
            changed: Notify::new(),
            joined: Mutex::default(),
            room: Arc::new(Semaphore::new(MAX_SOCKET_CONNECTIONS)),
            dir,
            pod_cgroup,
        };
        Self { common: Arc::new(common), agent, task: Arc::default() }
    }

    /// Looks through the volumes of a container that is in the shared tree. Returns what the guest
    /// is to be told with its creation, and sets [`SharedMount::sockets`](crate::share::SharedMount).
    pub async fn prepare(
        &self,
        container: &str,
        spec: &Spec,
        share: &Share,
        shared: &mut Shared,
    ) -> (Prepared, Vec<HostSocket>) {
        let volumes = volumes(spec, share, shared);
        let (gone, ends) = watch::channel(());
        let caller = Arc::new(Caller::new(spec, container, ends));
        let mut followed = Followed { volumes, told: BTreeMap::new(), caller, _gone: gone };
        let found = look(followed.volumes.clone(), None).await.sockets;
        let left = MAX_SOCKETS.saturating_sub(self.common.count());
        let mut sockets = Vec::new();
        for ((index, path), identity) in found.into_iter().take(left) {
            let number = draw_number();
            sockets.push(host_socket(index, &path, identity, number));
            let told = Told { identity, number, taken: true, failures: 0 };
            followed.told.insert((index, path), told);
        }
        (Prepared { container: container.into(), followed }, sockets)
    }

    /// The container was created: its volumes are watched.
    pub fn follow(&self, prepared: Prepared) {
        if prepared.followed.volumes.is_empty() {
            return;
        }
        lock(&self.common.containers).insert(prepared.container, prepared.followed);
        self.common.changed.notify_one();
        lock(&self.task).get_or_insert_with(|| {
            let (agent, common) = (self.agent.clone(), self.common.clone());
            tokio::spawn(async move { run(&agent, &common).await })
        });
    }

    /// A container has gone: its connections end, and what was made for them.
    pub fn forget(&self, container: &str) {
        let Some(followed) = lock(&self.common.containers).remove(container) else { return };
        let caller = followed.caller.clone();
        drop(followed);
        caller.end(&self.common);
        self.common.changed.notify_one();
    }

    /// Forgets all, for good.
    pub fn end(&self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
        let all: Vec<String> = lock(&self.common.containers).keys().cloned().collect();
        all.iter().for_each(|container| self.forget(container));
    }

    /// The guest has connected to [`vial_agent_protocol::SOCKET_PORT`].
    pub fn take(&self, connection: OwnedFd) {
        let Ok(place) = Arc::clone(&self.common.room).try_acquire_owned() else {
            tracing::warn!(
                "a connection of the guest's to a socket is refused: there are \
                 {MAX_SOCKET_CONNECTIONS}"
            );
            return;
        };
        let common = self.common.clone();
        tokio::spawn(async move {
            carry::carry(&common, connection).await;
            drop(place);
        });
    }
}

impl Common {
    fn count(&self) -> usize {
        lock(&self.containers).values().map(|followed| followed.told.len()).sum()
    }

    /// What a number of the guest's stands for.
    fn target(&self, number: u64) -> Option<(Volume, PathBuf, Arc<Caller>)> {
        let containers = lock(&self.containers);
        containers.values().find_map(|followed| {
            let mut told = followed.told.iter();
            let ((index, path), _) = told.find(|(_, told)| told.number == number)?;
            let volume = followed.volumes.iter().find(|volume| volume.index == *index)?;
            Some((volume.clone(), path.clone(), followed.caller.clone()))
        })
    }
}

/// Hard to guess: any process of the guest can connect to a port of the host.
fn draw_number() -> u64 {
    let mut bytes = [0; 8];
    loop {
        match getrandom(&mut bytes, GetRandomFlags::empty()).map(|_| u64::from_le_bytes(bytes)) {
            Ok(number @ 1..) => return number,
            // The kernel gives so few at once, and a signal is all that can come between.
            _ => continue,
        }
    }
}

fn host_socket(index: u32, path: &Path, identity: Identity, number: u64) -> HostSocket {
    HostSocket {
        index,
        path: path.as_os_str().as_bytes().to_vec(),
        number,
        uid: identity.uid,
        gid: identity.gid,
        mode: identity.mode,
        ..Default::default()
    }
}

/// Those mounts of a container that may have sockets: directories, and sockets themselves, of which
/// the guest has no copy. What is mounted below a volume is not bound without `rbind`.
fn volumes(spec: &Spec, share: &Share, shared: &mut Shared) -> Vec<Volume> {
    let mut volumes = Vec::new();
    for mount in shared.mounts.iter_mut().filter(|mount| mount.copied.is_none()) {
        let source = spec.mounts.get(mount.index as usize);
        if !source.is_some_and(|source| source.has_option("rbind")) {
            continue;
        }
        let path = share.containers.join(&mount.path);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(base) = rustix::fs::open(path, flags, Mode::empty()) else { continue };
        let kind = fstat(&base).map(|stat| FileType::from_raw_mode(stat.st_mode));
        mount.sockets = kind == Ok(FileType::Directory);
        if mount.sockets || kind == Ok(FileType::Socket) {
            let (base, is_directory) = (Arc::new(base), mount.sockets);
            volumes.push(Volume { index: mount.index, base, is_directory });
        }
    }
    volumes
}

/// Searches volumes, where a file system that hangs keeps nobody else.
async fn look(volumes: Vec<Volume>, inotify: Option<Arc<OwnedFd>>) -> Seen {
    if volumes.is_empty() {
        return Default::default();
    }
    let searched = tokio::task::spawn_blocking(move || {
        let mut seen = Seen::default();
        for volume in &volumes {
            let Found { sockets, others, again_in } = search(&volume.base, inotify.as_deref());
            let place = |(path, identity)| ((volume.index, path), identity);
            seen.sockets.extend(sockets.into_iter().map(place));
            seen.others.extend(others.into_iter().map(place));
            seen.again_in = [seen.again_in, again_in].into_iter().flatten().min();
        }
        seen
    });
    searched.await.unwrap_or_default()
}

/// Tells the guest whatever changes.
async fn run(agent: &Agent, common: &Common) {
    loop {
        let began = Instant::now();
        // Anew with each look, so that volumes and directories of the past are let go.
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let inotify = inotify.map(Arc::new).inspect_err(|error| {
            tracing::info!("volumes are looked at every {LOOK_EVERY:?}, no inotify: {error}");
        });
        let again_in = tell_all(agent, common, inotify.as_ref().ok()).await;
        tokio::time::sleep(PAUSE.max(began.elapsed() * PAUSE_TIMES)).await;
        tokio::select! {
            () = changed(inotify.ok()) => {}
            () = common.changed.notified() => {}
            () = tokio::time::sleep(again_in.unwrap_or_default()), if again_in.is_some() => {}
        }
    }
}

/// Waits until something has changed in what is watched.
async fn changed(inotify: Option<Arc<OwnedFd>>) {
    // Like a pipe it can be waited for until there is something to read.
    let watched = inotify.and_then(|inotify| inotify.try_clone().ok());
    let watched = watched.and_then(|watched| Receiver::from_owned_fd_unchecked(watched).ok());
    let waited = match watched {
        Some(watched) => watched.readable().await.is_ok(),
        None => false,
    };
    if !waited {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Looks at all volumes once. Returns when it is worth to look again.
async fn tell_all(
    agent: &Agent,
    common: &Common,
    inotify: Option<&Arc<OwnedFd>>,
) -> Option<Duration> {
    let watched: Vec<(String, Vec<Volume>)> = {
        let containers = lock(&common.containers);
        let directories = |followed: &Followed| -> Vec<Volume> {
            // A socket that is a volume stays the one it was, as it would on a host.
            followed.volumes.iter().filter(|volume| volume.is_directory).cloned().collect()
        };
        containers.iter().map(|(id, followed)| (id.clone(), directories(followed))).collect()
    };
    let mut again_in: Option<Duration> = None;
    let mut others: BTreeMap<Identity, Vec<(String, Place)>> = BTreeMap::new();
    for (container, volumes) in watched {
        let indices: Vec<u32> = volumes.iter().map(|volume| volume.index).collect();
        let seen = look(volumes, inotify.cloned()).await;
        let failed = tell(agent, common, &container, &indices, &seen.sockets).await;
        let failed = failed.then_some(TRY_AGAIN_AFTER);
        again_in = [again_in, seen.again_in, failed].into_iter().flatten().min();
        for (place, identity) in seen.others {
            others.entry(identity).or_default().push((container.clone(), place));
        }
    }
    join_all(agent, common, others.into_iter().collect()).await;
    again_in
}

/// Joins what several volumes show of one socket, where a container has bound it. One that nobody
/// has bound yet is young, and looked at again.
async fn join_all(agent: &Agent, common: &Common, groups: Vec<Group>) {
    let groups: BTreeSet<Group> =
        groups.into_iter().filter(|(_, places)| places.len() > 1).take(MAX_SOCKETS).collect();
    lock(&common.joined).retain(|group| groups.contains(group));
    for group in groups {
        if lock(&common.joined).contains(&group) {
            continue;
        }
        let places =
            group.1.iter().take(MAX_SOCKETS).map(|(container, (index, path))| SocketPlace {
                container_id: container.clone(),
                index: *index,
                path: path.as_os_str().as_bytes().to_vec(),
                ..Default::default()
            });
        match agent.join_socket(places.collect()).await {
            Ok(true) => drop(lock(&common.joined).insert(group)),
            Ok(false) => {}
            Err(error) => tracing::info!("a socket of the pod's is not shared: {error}"),
        }
    }
}

/// What differs between what was found and what the guest was told of.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    removed: Vec<u64>,
    added: Vec<(Place, Identity, u64)>,
}

/// Brings what is told of a container up to what was found in the volumes of these indices.
/// `left` more sockets have room in the pod.
fn advance(
    told: &mut BTreeMap<Place, Told>,
    indices: &[u32],
    found: &BTreeMap<Place, Identity>,
    left: usize,
    draw: impl Fn() -> u64,
) -> Difference {
    let gone = |place: &Place| indices.contains(&place.0) && !found.contains_key(place);
    let gone: Vec<Place> = told.keys().filter(|place| gone(place)).cloned().collect();
    let removed: Vec<u64> =
        gone.iter().filter_map(|place| Some(told.remove(place)?.number)).collect();
    let mut left = left + removed.len();
    let mut added = Vec::new();
    for (place, identity) in found {
        let failures = match told.get(place) {
            Some(old) if old.identity == *identity => match old.taken {
                true => continue,
                false if old.failures >= MOST_TRIES => continue,
                false => old.failures,
            },
            Some(_) => 0,
            None if left == 0 => continue,
            None => {
                left -= 1;
                0
            }
        };
        let number = draw();
        let fresh = Told { identity: *identity, number, taken: false, failures };
        told.insert(place.clone(), fresh);
        added.push((place.clone(), *identity, number));
    }
    Difference { removed, added }
}

/// Tells the guest of a container's sockets. Returns whether it is worth to try again.
async fn tell(
    agent: &Agent,
    common: &Common,
    container: &str,
    indices: &[u32],
    found: &BTreeMap<Place, Identity>,
) -> bool {
    let left = MAX_SOCKETS.saturating_sub(common.count());
    let difference = match lock(&common.containers).get_mut(container) {
        Some(followed) => advance(&mut followed.told, indices, found, left, draw_number),
        None => return false,
    };
    for number in difference.removed {
        if let Err(error) = agent.remove_socket(number).await {
            tracing::warn!("{container}: a socket stays in the guest: {error}");
        }
    }
    let mut again = false;
    for ((index, path), identity, number) in difference.added {
        let socket = host_socket(index, &path, identity, number);
        let added = agent.add_socket(container, socket).await;
        if let Err(error) = &added {
            tracing::info!("{container}: the socket {} is not there: {error}", path.display());
        }
        let mut containers = lock(&common.containers);
        let followed = containers.get_mut(container);
        let told = followed.and_then(|followed| followed.told.get_mut(&(index, path)));
        if let Some(told) = told.filter(|told| told.number == number) {
            told.taken = added.is_ok();
            told.failures += u32::from(added.is_err());
            again |= !told.taken && told.failures < MOST_TRIES;
        }
    }
    again
}

#[cfg(test)]
mod tests;
