//! Opening what a jailed VMM is handed.
//!
//! A descriptor is more than its use. By that of a file, the file's owner and mode can be
//! changed, and whoever sees it in a directory like `/proc/self/fd` can open it again for
//! writing; by that of a directory, `..` leads up to the host's root. The VMM's user namespace
//! knows the host's users, and its file server has capabilities over their files, so modes do
//! not stand in its way. So each descriptor is of a mount of its own, which is detached from the
//! host's tree and read-only: nothing leads up from it, and nothing but a device's data is
//! written by it.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::OpenTreeFlags,
};

/// A mount of `path` that nothing else is mounted on, with more flags than the one it is taken
/// from.
fn detached(path: &Path, flags: u64) -> io::Result<OwnedFd> {
    let tree = rustix::mount::open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    set(&tree, flags)?;
    Ok(tree)
}

/// Adds flags to a mount.
fn set(tree: &OwnedFd, flags: u64) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: flags, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the descriptor is open, the path is an empty string of C's, and the structure has
    // the size that is told with it; the kernel only reads all of them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const SHUT: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

fn reopen(tree: &OwnedFd, flags: OFlags) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Opens a file for reading; nobody can write it by what is returned.
///
/// # Errors
/// The file is absent, or the caller may not mount.
pub fn open_file(path: &Path) -> io::Result<File> {
    reopen(&detached(path, SHUT | libc::MOUNT_ATTR_NODEV)?, OFlags::RDONLY)
}

/// Opens a device for reading and writing; nobody can change its node by what is returned.
///
/// # Errors
/// The device is absent or refuses, or the caller may not mount.
pub fn open_device(path: &Path) -> io::Result<File> {
    reopen(&detached(path, SHUT)?, OFlags::RDWR)
}

/// Opens a block device for reading, or for reading and writing; nobody can change its node by what is returned, nor open
/// it again, to write what is only to be read. `direct` is without the host's page cache.
///
/// # Errors
/// The device is absent or refuses, or the caller may not mount.
pub fn open_disk(path: &Path, read_only: bool, direct: bool) -> io::Result<File> {
    let tree = detached(path, SHUT)?;
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let cache = if direct { OFlags::DIRECT } else { OFlags::empty() };
    let file = reopen(&tree, access | cache)?;
    set(&tree, libc::MOUNT_ATTR_NODEV)?;
    Ok(file)
}

/// As [`open_device`], and nobody can open it again.
///
/// # Errors
/// As there.
pub fn open_device_once(path: &Path) -> io::Result<File> {
    open_disk(path, false, false)
}

/// The directory in which a process finds its own descriptors, and nothing above it.
///
/// # Errors
/// The process is gone, or the caller may not mount.
pub fn process_descriptors(pid: u32) -> io::Result<OwnedFd> {
    detached(Path::new(&format!("/proc/{pid}/fd")), SHUT | libc::MOUNT_ATTR_NODEV)
}
