//! A user id for each pod, so that the VMMs of two pods are strangers to each other.
//!
//! A claim is a symbolic link `.uids/<id>` in the state directory that names the sandbox: made
//! whole or not at all, and by one process only. Each sandbox begins to look at a place of its
//! own, so that many that start at once do not meet.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// Why a sandbox has no user id.
#[derive(Debug, thiserror::Error)]
pub enum UserIdError {
    /// All of the range are taken.
    #[error(
        "all {count} user ids from {base} on are taken by other pods; raise `jail_uid_count` in the \
         configuration"
    )]
    Exhausted {
        /// The first.
        base: u32,
        /// How many.
        count: u32,
    },
    /// The system refused.
    #[error("cannot {action} {path}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> UserIdError {
    move |error| UserIdError::Io { action, path: path.into(), error }
}

/// The range that the ids come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub base: u32,
    /// How many.
    pub count: u32,
}

impl Range {
    /// All ids, from a place on that depends on the sandbox.
    fn in_order_for(self, owner: &str) -> impl Iterator<Item = u32> {
        let mut hasher = DefaultHasher::new();
        owner.hash(&mut hasher);
        let count = u64::from(self.count);
        let start = hasher.finish() % count.max(1);
        // The remainder is below the count, which fits.
        (0..count).map(move |n| self.base + ((start + n) % count) as u32)
    }
}

/// The claims in one state directory.
#[derive(Debug, Clone)]
pub struct Claims {
    dir: PathBuf,
}

impl Claims {
    /// Those below the state directory `root`.
    pub fn new(root: &Path) -> Self {
        Self { dir: root.join(".uids") }
    }

    fn place(&self, id: u32) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Claims an id of `range` for the sandbox `owner`, whose name is no other's.
    ///
    /// # Errors
    /// [`UserIdError`].
    pub fn claim(&self, range: Range, owner: &str) -> Result<u32, UserIdError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(io("create", &self.dir))?;
        for id in range.in_order_for(owner) {
            let place = self.place(id);
            match std::os::unix::fs::symlink(owner, &place) {
                Ok(()) => return Ok(id),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    // What a shim left that was killed between its claim and its record.
                    if self.is_owned(id, owner) {
                        return Ok(id);
                    }
                }
                Err(error) => return Err(io("create", &place)(error)),
            }
        }
        Err(UserIdError::Exhausted { base: range.base, count: range.count })
    }

    fn is_owned(&self, id: u32, owner: &str) -> bool {
        std::fs::read_link(self.place(id)).is_ok_and(|found| found == Path::new(owner))
    }

    /// Gives back whatever `owner` has, when it is not known what that is.
    ///
    /// # Errors
    /// [`UserIdError::Io`].
    pub fn release_all(&self, owner: &str) -> Result<(), UserIdError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(io("list", &self.dir))?,
        };
        for entry in entries {
            let name = entry.map_err(io("list", &self.dir))?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok()) {
                self.release(id, owner)?;
            }
        }
        Ok(())
    }

    /// Gives an id back. One that `owner` does not have is no failure.
    ///
    /// # Errors
    /// [`UserIdError::Io`].
    pub fn release(&self, id: u32, owner: &str) -> Result<(), UserIdError> {
        let place = self.place(id);
        if !self.is_owned(id, owner) {
            return Ok(());
        }
        match std::fs::remove_file(&place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(io("remove", &place)(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sandboxes_never_have_the_same_id() {
        let root = tempfile::tempdir().unwrap();
        let claims = Claims::new(root.path());
        let range = Range { base: 1000, count: 32 };
        let mut ids: Vec<u32> = std::thread::scope(|scope| {
            let claim = |n: u32| {
                let claims = &claims;
                scope.spawn(move || claims.claim(range, &format!("ns/pod-{n}")).unwrap())
            };
            let threads: Vec<_> = (0..32).map(claim).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        ids.sort_unstable();
        assert_eq!(ids, (1000..1032).collect::<Vec<_>>());
        let error = claims.claim(range, "ns/one-more").unwrap_err().to_string();
        assert!(error.contains("jail_uid_count") && error.contains("32"), "{error}");
    }

    #[test]
    fn id_is_released_by_its_owner_only() {
        let root = tempfile::tempdir().unwrap();
        let claims = Claims::new(root.path());
        let range = Range { base: 7, count: 1 };
        let id = claims.claim(range, "a/b").unwrap();
        claims.release(id, "a/c").unwrap();
        assert!(claims.claim(range, "a/c").is_err());
        claims.release(id, "a/b").unwrap();
        assert_eq!(claims.claim(range, "a/c").unwrap(), 7);
        claims.release(99, "a/c").unwrap();
    }

    #[test]
    fn id_that_nobody_has_written_down_is_found_by_its_owner() {
        let root = tempfile::tempdir().unwrap();
        let claims = Claims::new(root.path());
        claims.release_all("a/b").unwrap();
        let range = Range { base: 7, count: 2 };
        claims.claim(range, "a/b").unwrap();
        let other = claims.claim(range, "a/c").unwrap();
        claims.release_all("a/b").unwrap();
        assert!(claims.is_owned(other, "a/c"));
        assert_eq!(std::fs::read_dir(&claims.dir).unwrap().count(), 1);
    }
}
