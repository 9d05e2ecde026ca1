//! What PID 1 does before it serves: file systems, cgroups, the loopback interface, limits, the
//! share.
//!
//! The kernel starts the agent from a file system that holds little besides it, and that nobody can
//! write: what the agent writes goes to what it mounts.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx, symlink};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, setrlimit};
use vial_agent_protocol::{SHARE_TAG, TEMPLATE_WORD};

use crate::cgroup;
use crate::marks::Mark;

/// Where the host's share is mounted.
pub(crate) const SHARE: &str = "/run/vial/share";
/// Below it are the agent's own files.
pub(crate) const BASE: &str = "/run/vial";

/// As many descriptors as containerd gives to what it starts.
const MAX_OPEN_FILES: u64 = 1 << 20;
/// The largest number that Linux counts pids to on 64-bit machines; far apart, they recur late.
const PID_MAX: &str = "4194304";
/// How much of a mapped file is read where a program touches it. Each page of it is one of the pod's
/// own, although the host has the file in memory, too. By Linux's 128 KiB, nearly all of a program
/// comes of which less than half is used; with less than 32, who reads a file by a few KiB at a time asks the
/// host too often. What a program reads by itself comes in as large pieces as it asks for, up to 128 KiB.
const READ_AHEAD_KIB: &str = "32";
/// The agent's own cgroup: processes may not stay in the root when it controls others.
const OWN_CGROUP: &str = "vial";

/// Why the guest cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("cannot mount {kind} on {target}: {source}")]
    Mount { kind: &'static str, target: String, source: io::Error },
    #[error(
        "cannot mount the share, virtio-fs with the tag {SHARE_TAG:?}: {0}; \
         the VMM has to offer that device and the kernel needs CONFIG_VIRTIO_FS"
    )]
    Share(io::Error),
    #[error("cannot {action} {path}: {source}")]
    File { action: &'static str, path: String, source: io::Error },
    #[error("cannot bring up the loopback interface: {0}")]
    Loopback(io::Error),
}

/// Sets the guest up and answers when each part was done.
///
/// # Errors
/// Anything that containers need is missing.
pub(crate) fn set_up() -> Result<Vec<Mark>, BootError> {
    let mut marks = vec![Mark::now("init")];
    for entry in MOUNTS {
        entry.mount()?;
    }
    link_descriptors()?;
    set_up_cgroups()?;
    marks.push(Mark::now("mounts"));
    if !is_template() {
        mount_share()?;
        marks.push(Mark::now("share"));
    }
    crate::network::bring_up_loopback().map_err(BootError::Loopback)?;
    set_limits();
    Ok(marks)
}

/// Whether this guest is to be saved before it belongs to a pod. Tells when /proc is mounted.
pub(crate) fn is_template() -> bool {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| word == TEMPLATE_WORD)
}

/// One line of what a container host mounts.
struct Entry {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static std::ffi::CStr,
}

const fn entry(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static std::ffi::CStr,
) -> Entry {
    Entry { kind, target, flags, options }
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NO_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

const MOUNTS: &[Entry] = &[
    entry("proc", "/proc", SAFE, c""),
    entry("sysfs", "/sys", SAFE, c""),
    entry("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=755"),
    entry("devpts", "/dev/pts", DEVICES, c"newinstance,ptmxmode=0666,mode=0620,gid=5"),
    entry("tmpfs", "/dev/shm", SAFE, c"mode=1777"),
    entry("mqueue", "/dev/mqueue", SAFE, c""),
    entry("cgroup2", "/sys/fs/cgroup", SAFE, c""),
    entry("tmpfs", "/run", NO_DEVICES, c"mode=755"),
    entry("tmpfs", "/tmp", NO_DEVICES, c"mode=1777"),
];

impl Entry {
    fn mount(&self) -> Result<(), BootError> {
        let failed = |source: io::Error| BootError::Mount {
            kind: self.kind,
            target: self.target.to_owned(),
            source,
        };
        // In the image and on sysfs the directory is there already.
        if !Path::new(self.target).is_dir() {
            fs::create_dir_all(self.target).map_err(failed)?;
        }
        match mount(self.kind, self.target, self.kind, self.flags, self.options) {
            Ok(()) => Ok(()),
            // The kernel may have mounted devtmpfs itself.
            Err(rustix::io::Errno::BUSY) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }
}

/// What shells and languages expect in /dev besides devices.
fn link_descriptors() -> Result<(), BootError> {
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (target, path) in links {
        match symlink(target, path) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => {
                return Err(BootError::File {
                    action: "make the link",
                    path: path.to_owned(),
                    source: error.into(),
                });
            }
        }
    }
    Ok(())
}

fn set_up_cgroups() -> Result<(), BootError> {
    let own = format!("{}/{OWN_CGROUP}", cgroup::ROOT);
    let containers = format!("{}{}", cgroup::ROOT, cgroup::CONTAINERS);
    for path in [&own, &containers] {
        fs::create_dir_all(path).map_err(|source| BootError::File {
            action: "make cgroup",
            path: path.clone(),
            source,
        })?;
    }
    let procs = format!("{own}/cgroup.procs");
    write("enter cgroup", &procs, "1")?;
    let controllers = format!("{}/cgroup.controllers", cgroup::ROOT);
    let controllers = fs::read_to_string(&controllers).map_err(|source| BootError::File {
        action: "read",
        path: controllers,
        source,
    })?;
    let all: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    for path in [cgroup::ROOT, &containers] {
        write("enable controllers in", &format!("{path}/cgroup.subtree_control"), &all.join(" "))?;
    }
    Ok(())
}

fn write(action: &'static str, path: &str, text: &str) -> Result<(), BootError> {
    fs::write(path, text).map_err(|source| BootError::File {
        action,
        path: path.to_owned(),
        source,
    })
}

/// Without nosuid and nodev: containers' roots lie there, and what their programs may do is for
/// the spec to say.
pub(crate) fn mount_share() -> Result<(), BootError> {
    fs::create_dir_all(SHARE).map_err(|source| BootError::File {
        action: "make directory",
        path: SHARE.to_owned(),
        source,
    })?;
    mount(SHARE_TAG, SHARE, "virtiofs", MountFlags::empty(), None)
        .map_err(|error| BootError::Share(error.into()))?;
    // Without it containers run as well, and take more memory.
    if let Err(error) = set_read_ahead(SHARE) {
        tracing::warn!("cannot set how far the share is read ahead: {error}");
    }
    Ok(())
}

/// Lets files of a share, and of what is mounted below it, be read in pieces of [`READ_AHEAD_KIB`]
/// around what a program touches.
fn set_read_ahead(share: &str) -> io::Result<()> {
    // The device's number is in the kernel: no request goes to the server.
    let found = statx(CWD, share, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    let (major, minor) = (found.stx_dev_major, found.stx_dev_minor);
    fs::write(format!("/sys/devices/virtual/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KIB)
}

/// Comfort, without which containers still run: failures are only logged.
///
/// Compaction ahead of any want of it would wake an idle guest twice a second, to find that there
/// is nothing to do.
fn set_limits() {
    let limit = Rlimit { current: Some(MAX_OPEN_FILES), maximum: Some(MAX_OPEN_FILES) };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("cannot raise the number of open files: {error}");
    }
    if let Err(error) = rustix::system::sethostname(b"vial") {
        tracing::warn!("cannot set the host name: {error}");
    }
    if let Err(error) = fs::write("/proc/sys/kernel/pid_max", PID_MAX) {
        tracing::warn!("cannot raise kernel.pid_max: {error}");
    }
    if let Err(error) = fs::write("/proc/sys/vm/compaction_proactiveness", "0") {
        tracing::warn!("cannot set vm.compaction_proactiveness: {error}");
    }
}
