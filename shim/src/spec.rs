//! What the shim reads out of a bundle's `config.json`.
//!
//! Only what decides something on the host: who the sandbox is, where the root lies, and which
//! mounts have their source here. The bytes themselves go to the agent unchanged.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use vial_agent_protocol::{
    MAX_SPEC_BYTES,
    users::{IdRange, Users, UsersError},
};

use crate::{
    core_scheduling,
    devices::{self, DeviceError, address::Address, wanted::Wanted},
    disks,
    numa::{self, NumaError, claim},
    sockets::connector::User,
    template,
    vhost_user::{self, VhostUserError},
};

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// How annotations begin that are for Vial.
const OURS: &str = "io.vial/";
/// Those that there are.
const ANNOTATIONS: [&str; 7] = [
    devices::ANNOTATION,
    vhost_user::ANNOTATION,
    numa::ANNOTATION,
    numa::HUGE_PAGES,
    template::ANNOTATION,
    core_scheduling::ANNOTATION,
    disks::cache::ANNOTATION,
];
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Where a container has memory to share, and where CRI gives it the pod's.
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";
/// What a pod's shared memory holds unless something else is known, in bytes: as with runc.
pub const DEFAULT_SHARED_MEMORY_BYTES: u64 = 64 << 20;
/// Who has no id (user_namespaces(7), the overflow id).
const NOBODY: u32 = 65534;
/// The type of a mount that the agent makes the pod's shared memory.
const SHARED_MEMORY_KIND: &str = "vial-shared-memory";

/// The part of an OCI spec that the host acts on.
#[derive(Debug, Deserialize)]
pub struct Spec {
    /// The container's root.
    pub root: Option<Root>,
    /// What is mounted into it.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// What only Linux has.
    #[serde(default)]
    pub linux: Linux,
    /// Free words; containerd's CRI plugin says here what belongs to which pod.
    #[serde(default)]
    pub annotations: HashMap<String, String>,
    /// What the container is called, and with it its pod.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Its first process.
    #[serde(default)]
    pub process: Process,
}

/// `process` of a spec.
#[derive(Debug, Default, Deserialize)]
pub struct Process {
    /// As whom it runs.
    #[serde(default)]
    pub user: ProcessUser,
}

/// `process.user` of a spec.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessUser {
    /// Its user.
    #[serde(default)]
    pub uid: u32,
    /// Its group.
    #[serde(default)]
    pub gid: u32,
    /// Its supplementary groups.
    #[serde(default)]
    pub additional_gids: Vec<u32>,
}

/// `linux` of a spec.
#[derive(Debug, Default, Deserialize)]
pub struct Linux {
    /// The namespaces that the container gets.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    /// Which users of the host those of its user namespace are.
    #[serde(default, rename = "uidMappings")]
    pub uid_mappings: Vec<IdMapping>,
    /// The same of groups.
    #[serde(default, rename = "gidMappings")]
    pub gid_mappings: Vec<IdMapping>,
    /// Kernel parameters.
    #[serde(default)]
    pub sysctl: HashMap<String, String>,
    /// Where its processes are accounted for.
    #[serde(default, rename = "cgroupsPath")]
    pub cgroups_path: Option<String>,
    /// The device nodes that it gets.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// What it may use.
    #[serde(default)]
    pub resources: claim::Resources,
}

/// A range of ids that are others on the host.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct IdMapping {
    /// The first in the container.
    #[serde(rename = "containerID")]
    pub container: u32,
    /// The same on the host.
    #[serde(rename = "hostID")]
    pub host: u32,
    /// How many.
    pub size: u32,
}

fn users_of(uids: &[IdMapping], gids: &[IdMapping]) -> Result<Users, UsersError> {
    let ranges = |mappings: &[IdMapping]| -> Vec<(u32, u32, u32)> {
        mappings.iter().map(|one| (one.container, one.host, one.size)).collect()
    };
    Users::new(&ranges(uids), &ranges(gids))
}

/// One of a spec's `linux.devices`.
#[derive(Debug, Deserialize)]
pub struct Device {
    /// Where the container has it; on the host, too, as a rule.
    pub path: PathBuf,
    /// `b`, `c` or another letter.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The host's number of its kind.
    #[serde(default)]
    pub major: i64,
    /// The host's number of it among those of its kind.
    #[serde(default)]
    pub minor: i64,
}

/// One of a spec's `linux.namespaces`.
#[derive(Debug, Deserialize)]
pub struct Namespace {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The one to join; a new one without it.
    #[serde(default)]
    pub path: PathBuf,
}

/// `root` of a spec.
#[derive(Debug, Deserialize)]
pub struct Root {
    /// Absolute, or relative to the bundle.
    pub path: PathBuf,
}

/// One of a spec's `mounts`.
#[derive(Debug, Default, Deserialize)]
pub struct Mount {
    /// Where in the container.
    pub destination: PathBuf,
    /// The file system's type.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// What is mounted.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// How.
    #[serde(default)]
    pub options: Vec<String>,
    /// Which users own the files in the container, by those who own them on the host.
    #[serde(default, rename = "uidMappings")]
    pub uid_mappings: Vec<IdMapping>,
    /// The same of groups.
    #[serde(default, rename = "gidMappings")]
    pub gid_mappings: Vec<IdMapping>,
}

impl Mount {
    /// Whether the source is a file or directory of the host.
    pub fn is_bind(&self) -> bool {
        self.kind.as_deref() == Some("bind") || self.has_option("bind") || self.has_option("rbind")
    }

    /// Whether the option is among the mount's.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.iter().any(|other| other == option)
    }
}

/// What a container is to its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Its own sandbox: whatever is not started by a CRI plugin.
    Alone,
    /// The pod's pause container. The VM is what it stands for; no process is needed.
    Sandbox,
    /// A container of the sandbox with that id.
    Member(String),
}

/// Why a spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// It is too large to be sent.
    #[error("{path} has {bytes} bytes, more than the {MAX_SPEC_BYTES} that a spec can have")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is no OCI spec.
    #[error("{path} is no OCI runtime spec: {error}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: serde_json::Error,
    },
    /// The annotations of the CRI plugin contradict themselves.
    #[error(
        "the annotation {CONTAINER_TYPE} is '{0}', which is neither 'sandbox' nor 'container' with {SANDBOX_ID} set"
    )]
    Role(String),
    /// The pod wants something of the host that a VM keeps from it.
    #[error(
        "the pod asks for {0}, which a pod in a VM of its own cannot have; leave that out, or use \
         another runtimeClassName"
    )]
    OfTheHost(&'static str),
    /// The users of the pod's user namespace.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// The container is not in the user namespace of its pod.
    #[error(
        "the container asks for other users than its pod: all containers of a pod are in its user namespace, \
         with the same ids, or the pod has none"
    )]
    OtherUsers,
    /// A namespace mode that makes no sense for users.
    #[error(
        "the pod asks for users of a kind that there is not ({0}): they are its own, or those of the host"
    )]
    UsersMode(u64),
    /// An annotation of ours that there is not.
    #[error("the annotation {0} is none of Vial's; it knows {known}", known = ANNOTATIONS.join(", "))]
    Annotation(String),
    /// The devices that are asked for.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The block devices that are asked for.
    #[error(transparent)]
    Disk(#[from] disks::DiskError),
    /// The devices of other processes that are asked for.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// The CPUs, nodes or pages that are asked for.
    #[error(transparent)]
    Numa(#[from] NumaError),
}

impl Spec {
    /// Reads `config.json` of a bundle: its bytes, and what they mean here.
    ///
    /// # Errors
    /// [`SpecError`].
    pub fn read(bundle: &Path) -> Result<(Vec<u8>, Self), SpecError> {
        let path = bundle.join("config.json");
        let read = |error| SpecError::Read { path: path.clone(), error };
        let bytes = std::fs::metadata(&path).map_err(read)?.len();
        if bytes > MAX_SPEC_BYTES as u64 {
            return Err(SpecError::TooLarge { path, bytes });
        }
        let text = std::fs::read(&path).map_err(read)?;
        let spec = Self::parse(&text).map_err(|error| SpecError::Parse { path, error })?;
        Ok((text, spec))
    }

    /// What the bytes of a `config.json` mean here.
    ///
    /// # Errors
    /// They are no JSON, or not of the specification's form.
    pub fn parse(text: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(text)
    }

    /// The network namespace that somebody made for the container, CNI as a rule.
    pub fn network_namespace(&self) -> Option<&Path> {
        let network = self.linux.namespaces.iter().find(|namespace| namespace.kind == "network")?;
        (!network.path.as_os_str().is_empty()).then_some(&network.path)
    }

    /// Whether the pod whose sandbox this is asks for nothing of the host. containerd's CRI plugin
    /// leaves the namespaces out of a sandbox's spec that its pod shares with the host.
    ///
    /// # Errors
    /// [`SpecError::OfTheHost`].
    pub fn check_sandbox(&self) -> Result<(), SpecError> {
        let has = |kind: &str| self.linux.namespaces.iter().any(|namespace| namespace.kind == kind);
        for (kind, asked) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            if !has(kind) {
                return Err(SpecError::OfTheHost(asked));
            }
        }
        Ok(())
    }

    /// Whether the container has, or joins, a user namespace.
    pub fn has_users(&self) -> bool {
        self.linux.namespaces.iter().any(|namespace| namespace.kind == "user")
    }

    /// Which users of the host those of the container are, if it is in a user namespace.
    ///
    /// # Errors
    /// [`SpecError::Users`].
    pub fn users(&self) -> Result<Option<Users>, SpecError> {
        match self.has_users() {
            true => Ok(Some(users_of(&self.linux.uid_mappings, &self.linux.gid_mappings)?)),
            false => Ok(None),
        }
    }

    /// Which users of the host those are that the files in a mount belong to, if they are others than on the
    /// disk.
    ///
    /// # Errors
    /// There are no such users.
    pub fn users_of(&self, mount: &Mount) -> Result<Option<Users>, UsersError> {
        let (uids, gids) = (&mount.uid_mappings, &mount.gid_mappings);
        match (
            uids.is_empty() && gids.is_empty(),
            mount.has_option("idmap") || mount.has_option("ridmap"),
        ) {
            (true, false) => Ok(None),
            // They are the container's.
            (true, true) => users_of(&self.linux.uid_mappings, &self.linux.gid_mappings).map(Some),
            (false, _) => users_of(uids, gids).map(Some),
        }
    }

    /// What the container, or the pod whose sandbox this is, asks for of the host's functions.
    ///
    /// # Errors
    /// [`SpecError::Annotation`] and [`SpecError::Device`].
    pub fn wanted_devices(&self, listed: &[Address]) -> Result<Wanted, SpecError> {
        check_annotations(&self.annotations)?;
        let nodes = self.linux.devices.iter().map(|device| device.path.as_path());
        Ok(Wanted::new(&self.annotations, nodes, listed)?)
    }

    /// The block devices of the host that the container asks for.
    ///
    /// # Errors
    /// [`SpecError::Disk`].
    pub fn wanted_disks(&self) -> Result<Vec<disks::Wanted>, SpecError> {
        Ok(disks::wanted(&self.linux.devices, &self.linux.resources.devices)?)
    }

    /// What the container asks for of the host's CPUs and nodes. Only Kubernetes tells by limits
    /// and weights how many CPUs a container is meant to have; others mean those that they name.
    ///
    /// # Errors
    /// [`SpecError::Numa`] and [`SpecError::Role`].
    pub fn claim(&self) -> Result<claim::Claim, SpecError> {
        let claim = claim::Claim::new(&self.linux.resources)?;
        Ok(match self.role()? {
            Role::Alone => claim::Claim { count: None, ..claim },
            Role::Sandbox | Role::Member(_) => claim,
        })
    }

    /// As whom the container's first process runs, on the host. Who is nobody there, the guest refuses to run.
    pub fn user(&self) -> User {
        let ProcessUser { uid, gid, additional_gids } = &self.process.user;
        let users = self.users().ok().flatten();
        let on_host = |id: u32, range: Option<IdRange>| match range {
            Some(range) => range.on_host(id).unwrap_or(NOBODY),
            None => id,
        };
        let user = |id: u32| on_host(id, users.map(|users| users.uids));
        let group = |id: u32| on_host(id, users.map(|users| users.gids));
        let groups = additional_gids.iter().map(|id| group(*id)).collect();
        User { uid: user(*uid), gid: group(*gid), groups }
    }

    /// Whether the container joins a PID namespace.
    pub fn joins_pids(&self) -> bool {
        let is = |namespace: &Namespace| {
            namespace.kind == "pid" && !namespace.path.as_os_str().is_empty()
        };
        self.linux.namespaces.iter().any(is)
    }

    /// The mounts of the pod's shared memory, which CRI binds from the host and the guest has
    /// itself: index and size in bytes. They are no bind mounts afterwards.
    pub fn take_shared_memory(&mut self) -> Vec<(u32, u64)> {
        let mut taken = Vec::new();
        for (index, mount) in self.mounts.iter_mut().enumerate() {
            if mount.destination != Path::new(SHARED_MEMORY) || !mount.is_bind() {
                continue;
            }
            let bytes = mount.source.as_deref().and_then(tmpfs_bytes);
            mount.kind = Some(SHARED_MEMORY_KIND.into());
            mount.options.clear();
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            taken.push((index, bytes.unwrap_or(DEFAULT_SHARED_MEMORY_BYTES)));
        }
        taken
    }

    /// What the container is to its sandbox.
    ///
    /// # Errors
    /// [`SpecError::Role`].
    pub fn role(&self) -> Result<Role, SpecError> {
        let sandbox = self.annotations.get(SANDBOX_ID);
        match (self.annotations.get(CONTAINER_TYPE).map(String::as_str), sandbox) {
            (None, _) => Ok(Role::Alone),
            (Some("sandbox"), _) => Ok(Role::Sandbox),
            (Some("container"), Some(id)) => Ok(Role::Member(id.clone())),
            (Some(other), _) => Err(SpecError::Role(other.chars().take(64).collect())),
        }
    }
}

/// Whether there is no annotation that looks like one of ours and is not.
///
/// # Errors
/// [`SpecError::Annotation`].
pub fn check_annotations(annotations: &HashMap<String, String>) -> Result<(), SpecError> {
    let unknown = |key: &&String| key.starts_with(OURS) && !ANNOTATIONS.contains(&key.as_str());
    match annotations.keys().find(unknown) {
        Some(key) => Err(SpecError::Annotation(key.chars().take(64).collect())),
        None => Ok(()),
    }
}

/// How a value of an annotation begins, for the sentence that refuses it.
pub(crate) fn start_of(text: &str) -> String {
    text.chars().take(32).flat_map(char::escape_debug).collect()
}

/// The size of the tmpfs at `path`; none when it is none, or without a size.
fn tmpfs_bytes(path: &Path) -> Option<u64> {
    // linux/magic.h
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let about = rustix::fs::statfs(path).ok()?;
    // The types' widths differ between architectures.
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
    let (kind, block) = (about.f_type as u64, about.f_bsize as u64);
    let bytes = block.checked_mul(about.f_blocks)?;
    (kind == TMPFS_MAGIC && bytes > 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn role_follows_the_annotations() {
        assert_eq!(spec("{}").role().unwrap(), Role::Alone);
        let sandbox = r#"{"annotations": {"io.kubernetes.cri.container-type": "sandbox"}}"#;
        assert_eq!(spec(sandbox).role().unwrap(), Role::Sandbox);
        let member = r#"{"annotations": {"io.kubernetes.cri.container-type": "container",
                         "io.kubernetes.cri.sandbox-id": "pod"}}"#;
        assert_eq!(spec(member).role().unwrap(), Role::Member("pod".into()));
        let orphan = r#"{"annotations": {"io.kubernetes.cri.container-type": "container"}}"#;
        assert!(spec(orphan).role().is_err());
    }

    #[test]
    fn annotation_that_only_looks_like_ours_is_refused() {
        let with = |key: &str| check_annotations(&HashMap::from([(key.into(), "x".into())]));
        with("io.vial/pci-devices").unwrap();
        with("io.vial/numa").unwrap();
        with("example.org/io.vial/else").unwrap();
        let error = with("io.vial/pci-device").unwrap_err().to_string();
        assert!(error.contains("io.vial/pci-device ") && error.contains("-devices"), "{error}");
    }

    #[test]
    fn devices_are_read_by_their_paths() {
        let json = r#"{"linux": {"devices": [{"path": "/dev/vfio/7", "type": "c", "major": 243,
                       "minor": 0}, {"path": "/dev/fuse", "type": "c"}]}}"#;
        let wanted = spec(json).wanted_devices(&[]).unwrap();
        assert!(wanted.groups.contains(&7) && wanted.groups.len() == 1);
    }

    #[test]
    fn weight_tells_of_cpus_in_kubernetes_alone() {
        let resources = r#""linux": {"resources": {"cpu": {"cpus": "2-3", "shares": 1024}}}"#;
        let alone = spec(&format!("{{{resources}}}")).claim().unwrap();
        assert_eq!((alone.cpus.len(), alone.count), (2, None));
        let member = r#""annotations": {"io.kubernetes.cri.container-type": "container",
                        "io.kubernetes.cri.sandbox-id": "pod"}"#;
        let member = spec(&format!("{{{resources}, {member}}}")).claim().unwrap();
        assert_eq!(member.count, Some(1));
    }

    #[test]
    fn pods_that_share_with_the_host_are_refused() {
        let kinds = ["network", "pid", "ipc", "uts", "mount"];
        let with = |kinds: &[&str]| {
            let list: Vec<String> =
                kinds.iter().map(|kind| format!(r#"{{"type": "{kind}"}}"#)).collect();
            spec(&format!(r#"{{"linux": {{"namespaces": [{}]}}}}"#, list.join(","))).check_sandbox()
        };
        with(&kinds).unwrap();
        for (kind, asked) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let less: Vec<&str> = kinds.into_iter().filter(|other| *other != kind).collect();
            let error = with(&less).unwrap_err().to_string();
            assert!(error.contains(asked), "{error}");
        }
        with(&[&kinds[..], &["user"]].concat()).unwrap();
    }

    #[test]
    fn users_are_those_of_the_user_namespace() {
        let mapping =
            |host: u64| format!(r#"[{{"containerID": 0, "hostID": {host}, "size": 50}}]"#);
        let linux = |uids: &str| {
            format!(
                r#"{{"linux": {{"namespaces": [{{"type": "user", "path": "/proc/7/ns/user"}}],
                    "uidMappings": {uids}, "gidMappings": {}}},
                    "process": {{"user": {{"uid": 7, "gid": 8, "additionalGids": [9, 50]}}}}}}"#,
                mapping(2000)
            )
        };
        let found = spec(&linux(&mapping(1000)));
        assert_eq!(found.users().unwrap().unwrap().gids.on_host(49), Some(2049));
        let user = found.user();
        assert_eq!((user.uid, user.gid, user.groups), (1007, 2008, vec![2009, NOBODY]));
        assert!(matches!(spec(&linux("[]")).users(), Err(SpecError::Users(_))));
        // No id of the host.
        assert!(Spec::parse(linux(&mapping(1 << 32)).as_bytes()).is_err());
        let none = spec(r#"{"process": {"user": {"uid": 7}}}"#);
        assert_eq!((none.users().unwrap(), none.user().uid), (None, 7));
    }

    #[test]
    fn files_of_a_mount_belong_to_whom_it_says_or_to_the_container() {
        let spec = spec(
            r#"{"linux": {"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 5}],
                          "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 5}]},
                "mounts": [{"destination": "/a"}, {"destination": "/b", "options": ["ridmap"]},
                    {"destination": "/c",
                     "uidMappings": [{"containerID": 0, "hostID": 3000, "size": 5}],
                     "gidMappings": [{"containerID": 0, "hostID": 3000, "size": 5}]},
                    {"destination": "/d",
                     "uidMappings": [{"containerID": 0, "hostID": 3000, "size": 5}]}]}"#,
        );
        let root = |index: usize| {
            let users = spec.users_of(&spec.mounts[index]).unwrap();
            users.map(|users| users.uids.on_host(0).unwrap())
        };
        assert_eq!([root(0), root(1), root(2)], [None, Some(1000), Some(3000)]);
        spec.users_of(&spec.mounts[3]).unwrap_err();
    }

    #[test]
    fn shared_memory_is_taken_out_of_the_binds() {
        let dir = tempfile::tempdir().unwrap();
        let json = format!(
            r#"{{"mounts": [{{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}},
                {{"destination": "/dev/shm", "type": "bind", "source": "/nowhere/shm"}},
                {{"destination": "/dev/shm", "type": "bind", "source": "/dev/shm"}},
                {{"destination": "/data", "type": "bind", "source": {:?}}}]}}"#,
            dir.path()
        );
        let mut spec = spec(&json);
        let taken = spec.take_shared_memory();
        assert_eq!(taken[0], (1, DEFAULT_SHARED_MEMORY_BYTES));
        assert_eq!((taken[1].0, taken.len()), (2, 2));
        let binds: Vec<bool> = spec.mounts.iter().map(Mount::is_bind).collect();
        assert_eq!(binds, [false, false, false, true]);
    }

    #[test]
    fn joined_pid_namespace_is_one_with_a_path() {
        let joins = |namespaces: &str| {
            spec(&format!(r#"{{"linux": {{"namespaces": [{namespaces}]}}}}"#)).joins_pids()
        };
        assert!(!joins("") && !joins(r#"{"type": "pid"}"#));
        assert!(!joins(r#"{"type": "ipc", "path": "/proc/7/ns/ipc"}"#));
        assert!(joins(r#"{"type": "pid", "path": "/proc/7/ns/pid"}"#));
    }

    #[test]
    fn network_namespace_is_one_with_a_path() {
        let with = |more: &str| {
            let json = format!(r#"{{"linux": {{"namespaces": [{{"type": "pid"}} {more}]}}}}"#);
            spec(&json).network_namespace().map(Path::to_path_buf)
        };
        assert_eq!(with(""), None);
        assert_eq!(with(r#", {"type": "network"}"#), None);
        let path = Some("/run/netns/a".into());
        assert_eq!(with(r#", {"type": "network", "path": "/run/netns/a"}"#), path);
        assert_eq!(spec("{}").network_namespace(), None);
    }

    #[test]
    fn binds_are_told_by_type_or_option() {
        let spec = spec(
            r#"{"mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/a", "type": "bind", "source": "/a"},
                {"destination": "/b", "type": "none", "source": "/b", "options": ["rbind"]},
                {"destination": "/c", "source": "/c", "options": ["ro", "bind"]}]}"#,
        );
        let binds: Vec<bool> = spec.mounts.iter().map(Mount::is_bind).collect();
        assert_eq!(binds, [false, true, true, true]);
    }

    #[test]
    fn spec_over_the_limit_is_refused() {
        let bundle = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(bundle.path().join("config.json")).unwrap();
        file.set_len(MAX_SPEC_BYTES as u64 + 1).unwrap();
        assert!(matches!(Spec::read(bundle.path()), Err(SpecError::TooLarge { .. })));
    }
}
