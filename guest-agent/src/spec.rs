//! Makes the OCI spec that containerd wrote for the host one for the guest.
//!
//! Pure: paths come in resolved, the result goes out to be written. What changes:
//!
//! | in the spec | in the guest |
//! | --- | --- |
//! | `root.path`, sources of shared mounts | below the share |
//! | `ro` of a shared mount with others below it that may be written | dropped: the host sees to it |
//! | network, ipc and uts namespaces with a path | no entry: the guest is the pod, its own namespaces are the pod's |
//! | a PID namespace with a path | the pod's, or another container's |
//! | a user namespace | the pod's, which the spec has to map as the pod does |
//! | other namespaces with a path | refused |
//! | `uidMappings` and `gidMappings`, of mounts too; `idmap`, `ridmap` | dropped: the namespace has them, and the host's mounts |
//! | `devices` | see [`devices`] |
//! | addresses of the host's PCI functions in the environment | those of the guest, see [`environment`] |
//! | `cgroupsPath` | the container's cgroup below [`crate::cgroup::CONTAINERS`] |
//! | hooks, `intelRdt`, AppArmor profile, SELinux labels | dropped: programs and facilities of the host |
//! | `noNewPrivileges: false` | absent, which is the same and lets the filter be loaded early |
//! | `cpu.cpus`, `cpu.mems` | dropped: numbers of the host's, by which the shim places the VM |
//! | `cpu.shares` | `cpu.weight` among `unified`, where it is not set by itself |
//! | `rootfsPropagation` of `rslave` and the like | `slave` and the like, which the library takes for the whole tree |
//! | hugepage limits without a hugetlb controller | dropped |
//!
//! Everything else passes as it is: capabilities, seccomp, rlimits, sysctls, resources, masked and
//! read-only paths.

pub(crate) mod devices;
pub(crate) mod environment;

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount,
    Process, Spec,
};

use vial_agent_protocol::users::{Users, UsersError};

use crate::cgroup::resources::weight;

/// Why a spec is not run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SpecError {
    #[error("the spec is no valid config.json: {0}")]
    Spec(String),
    #[error("the process is no valid OCI process: {0}")]
    Process(String),
    #[error("the spec has no {0} section")]
    Section(&'static str),
    #[error("the spec's process has no arguments")]
    NoArguments,
    #[error("shared mount {index} does not exist: the spec has {count} mounts")]
    MountIndex { index: usize, count: usize },
    #[error("the bind mount onto {0} has a source on the host that is not shared")]
    HostMount(PathBuf),
    #[error("joining another container's {0} namespace is not supported")]
    Namespace(String),
    #[error(
        "the container asks for a user namespace, and its pod has none: both have to be asked for it"
    )]
    NoUserNamespace,
    #[error("the container has to be in the user namespace of its pod")]
    NotInUserNamespace,
    #[error("the container's user namespace maps other ids than that of its pod")]
    OtherUsers,
    #[error(transparent)]
    Users(#[from] UsersError),
    #[error(
        "the device {0} is the host's: a guest has none with its numbers; use a container without it"
    )]
    Device(PathBuf),
}

/// What the guest puts in place of the host's.
#[derive(Debug)]
pub(crate) struct Guest {
    /// The container's root, absolute.
    pub(crate) root: PathBuf,
    /// Index into `mounts`, and the source in the guest, absolute.
    pub(crate) sources: BTreeMap<usize, PathBuf>,
    /// Those of them that the host alone keeps from being written.
    pub(crate) host_guards: Vec<usize>,
    /// As `cgroupsPath` says it.
    pub(crate) cgroup: PathBuf,
    pub(crate) terminal: bool,
    /// Whether the guest's cgroups limit huge pages.
    pub(crate) hugetlb: bool,
    /// In place of a PID namespace that the spec joins.
    pub(crate) pid_namespace: Option<PathBuf>,
    /// The pod's user namespace, and whom it maps.
    pub(crate) user_namespace: Option<(PathBuf, Users)>,
    /// The guest's devices, when those of the spec matter ([`devices::has_any`]).
    pub(crate) devices: Vec<LinuxDevice>,
    /// Where the container has disks that are to be put in place of the host's.
    pub(crate) disks: Vec<PathBuf>,
}

/// Reads a config.json.
///
/// # Errors
/// It is none.
pub(crate) fn parse(json: &[u8]) -> Result<Spec, SpecError> {
    serde_json::from_slice(json).map_err(|error| SpecError::Spec(error.to_string()))
}

/// The spec for the guest, and the names of what was dropped that a user may have wanted.
///
/// # Errors
/// It asks for what only the host has.
pub(crate) fn rewrite(
    mut spec: Spec,
    guest: &Guest,
) -> Result<(Spec, Vec<&'static str>), SpecError> {
    let mut dropped = Vec::new();

    let root = spec.root_mut().as_mut().ok_or(SpecError::Section("root"))?;
    root.set_path(guest.root.clone());
    rewrite_mounts(spec.mounts_mut().get_or_insert_with(Vec::new), guest)?;

    let process = spec.process().clone().ok_or(SpecError::Section("process"))?;
    spec.set_process(Some(rewrite_process(process, guest.terminal)?));

    let linux = spec.linux_mut().as_mut().ok_or(SpecError::Section("linux"))?;
    let shares_uts = rewrite_linux(linux, guest)?;
    if shares_uts {
        // The pod's name is set once for all its containers.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    if spec.hooks().is_some() {
        spec.set_hooks(None);
        dropped.push("hooks");
    }
    Ok((spec, dropped))
}

/// Reads and rewrites the process of an exec.
///
/// # Errors
/// It is none, or has nothing to run.
pub(crate) fn exec_process(json: &[u8], terminal: bool) -> Result<Process, SpecError> {
    let process =
        serde_json::from_slice(json).map_err(|error| SpecError::Process(error.to_string()))?;
    rewrite_process(process, terminal)
}

fn rewrite_process(mut process: Process, terminal: bool) -> Result<Process, SpecError> {
    if process.args().as_ref().is_none_or(|args| args.is_empty() || args[0].is_empty()) {
        return Err(SpecError::NoArguments);
    }
    process.set_terminal(Some(terminal));
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    Ok(process)
}

fn rewrite_mounts(mounts: &mut [Mount], guest: &Guest) -> Result<(), SpecError> {
    let count = mounts.len();
    if let Some(&index) = guest.sources.keys().find(|&&index| index >= count) {
        return Err(SpecError::MountIndex { index, count });
    }
    for (index, mount) in mounts.iter_mut().enumerate() {
        mount.set_uid_mappings(None);
        mount.set_gid_mappings(None);
        if let Some(options) = mount.options_mut() {
            options.retain(|option| option != "idmap" && option != "ridmap");
        }
        match guest.sources.get(&index) {
            Some(source) => {
                mount.set_source(Some(source.clone()));
                if guest.host_guards.contains(&index)
                    && let Some(options) = mount.options_mut()
                {
                    options.retain(|option| option != "ro");
                }
            }
            None if is_bind(mount) => {
                return Err(SpecError::HostMount(mount.destination().clone()));
            }
            None => {}
        }
    }
    Ok(())
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount
            .options()
            .iter()
            .flatten()
            .any(|option| matches!(option.as_str(), "bind" | "rbind"))
}

/// Answers whether the container shares the pod's uts namespace.
fn rewrite_linux(linux: &mut Linux, guest: &Guest) -> Result<bool, SpecError> {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    rewrite_user_namespace(linux, &mut namespaces, guest)?;
    let kept = namespaces
        .into_iter()
        .filter_map(|namespace| keep_namespace(namespace, guest))
        .collect::<Result<Vec<LinuxNamespace>, SpecError>>()?;
    let shares_uts = !kept.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    linux.set_namespaces(Some(kept));
    devices::rewrite(linux, &guest.devices, &guest.disks)?;
    linux.set_cgroups_path(Some(guest.cgroup.clone()));
    linux.set_intel_rdt(None);
    linux.set_mount_label(None);
    if let Some(propagation) = linux.rootfs_propagation() {
        linux.set_rootfs_propagation(Some(library_propagation(propagation).into()));
    }
    if let Some(resources) = linux.resources_mut() {
        if !guest.hugetlb {
            resources.set_hugepage_limits(None);
        }
        if let Some(cpu) = resources.cpu_mut() {
            cpu.set_cpus(None);
            cpu.set_mems(None);
        }
        weigh_shares(resources);
    }
    Ok(shares_uts)
}

/// Puts the pod's in place of the container's, whatever that is called on the host.
fn rewrite_user_namespace(
    linux: &mut Linux,
    namespaces: &mut [LinuxNamespace],
    guest: &Guest,
) -> Result<(), SpecError> {
    let asked = namespaces.iter_mut().find(|one| one.typ() == LinuxNamespaceType::User);
    match (asked, &guest.user_namespace) {
        (None, None) => {}
        (Some(_), None) => return Err(SpecError::NoUserNamespace),
        (None, Some(_)) => return Err(SpecError::NotInUserNamespace),
        (Some(asked), Some((path, users))) => {
            let uids = ranges(linux.uid_mappings().as_deref());
            if Users::new(&uids, &ranges(linux.gid_mappings().as_deref()))? != *users {
                return Err(SpecError::OtherUsers);
            }
            asked.set_path(Some(path.clone()));
        }
    }
    linux.set_uid_mappings(None);
    linux.set_gid_mappings(None);
    Ok(())
}

fn ranges(mappings: Option<&[LinuxIdMapping]>) -> Vec<(u32, u32, u32)> {
    let mappings = mappings.unwrap_or_default().iter();
    mappings.map(|one| (one.container_id(), one.host_id(), one.size())).collect()
}

/// libcontainer knows the propagations without the `r` of "recursive", and means them so. What is
/// none passes, for the library to refuse it.
fn library_propagation(propagation: &str) -> &str {
    match propagation {
        "rshared" => "shared",
        "rslave" => "slave",
        "rprivate" => "private",
        "runbindable" => "unbindable",
        other => other,
    }
}

/// libcontainer would weigh them by a formula of its own.
fn weigh_shares(resources: &mut LinuxResources) {
    let Some(cpu) = resources.cpu_mut() else { return };
    let Some(shares) = cpu.shares().filter(|shares| *shares != 0) else { return };
    cpu.set_shares(None);
    let mut unified = resources.unified().clone().unwrap_or_default();
    unified.entry("cpu.weight".into()).or_insert_with(|| weight(shares).to_string());
    resources.set_unified(Some(unified));
}

fn keep_namespace(
    mut namespace: LinuxNamespace,
    guest: &Guest,
) -> Option<Result<LinuxNamespace, SpecError>> {
    let joins = namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty());
    match namespace.typ() {
        _ if !joins => Some(Ok(namespace)),
        LinuxNamespaceType::Network | LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => None,
        LinuxNamespaceType::User => Some(Ok(namespace)),
        LinuxNamespaceType::Pid if guest.pid_namespace.is_some() => {
            namespace.set_path(guest.pid_namespace.clone());
            Some(Ok(namespace))
        }
        other => Some(Err(SpecError::Namespace(other.to_string()))),
    }
}

#[cfg(test)]
mod tests;
