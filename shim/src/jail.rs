//! The jail that a VMM lives in, made between its clone and its exec.
//!
//! The VMM is the process that a guest attacks, so nothing here relies on what program it is:
//! all of it holds for any program in its place.
//!
//! - [`user_ids`]: a user and group of its own for each pod, from a configured range.
//! - [`cgroup`]: where the VMM and all that it costs is accounted for, and its limits.
//! - [`descriptors`]: what it is handed cannot lead it out, nor be used to change what it shows.
//! - [`system_calls`]: the base filter, below the filters that the VMM puts on its own threads.
//! - [`rings`]: how it comes to rings of io_uring for its disks, and to no others.
//! - [`child`]: new namespaces, the shared tree as root, capabilities, the exec.
//!
//! `docs/threat-model.md` says what each of them buys.

pub mod cgroup;
mod child;
pub mod descriptors;
pub mod rings;
mod step;
pub mod system_calls;
pub mod user_ids;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Config;

pub use child::{Confinement, JailError, Jailed, spawn};
pub use step::Step;

/// What a jail holds on the host, kept on disk to be given back when the shim cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VMM's user and group.
    pub user_id: u32,
    /// The VMM's cgroup, below the root of the hierarchy.
    pub cgroup: PathBuf,
}

/// Why a jail's holdings could not be taken or given back.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// See [`user_ids::UserIdError`].
    #[error(transparent)]
    UserId(#[from] user_ids::UserIdError),
    /// See [`cgroup::CgroupError`].
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
}

/// Takes a user id for the sandbox, and the name of its cgroup, which is still to be made:
/// `cgroup` as containerd has it, else one of our own.
///
/// # Errors
/// [`RecordError`].
pub fn reserve(
    config: &Config,
    namespace: &str,
    id: &str,
    cgroup: Option<&str>,
) -> Result<Record, RecordError> {
    let owner = format!("{namespace}/{id}");
    let cgroup = match cgroup {
        Some(word) if !word.is_empty() => cgroup::path_of(word)?,
        _ => Path::new("vial").join(&owner),
    };
    let claims = user_ids::Claims::new(&config.state_directory);
    Ok(Record { user_id: claims.claim(config.jail_uids, &owner)?, cgroup })
}

/// Gives back what a sandbox has of which there is no record: a user id. It is claimed before the
/// record is written, and the cgroup is made after that.
///
/// # Errors
/// [`RecordError`].
pub fn release_unrecorded(
    state_directory: &Path,
    namespace: &str,
    id: &str,
) -> Result<(), RecordError> {
    Ok(user_ids::Claims::new(state_directory).release_all(&format!("{namespace}/{id}"))?)
}

/// Gives back what the record names: the cgroup is removed with all that is in it.
///
/// # Errors
/// [`RecordError`]; both are tried.
pub fn release(
    state_directory: &Path,
    namespace: &str,
    id: &str,
    record: &Record,
) -> Result<(), RecordError> {
    let removed = cgroup::Cgroup::new(&record.cgroup).remove();
    let claims = user_ids::Claims::new(state_directory);
    let released = claims.release(record.user_id, &format!("{namespace}/{id}"));
    removed?;
    Ok(released?)
}
