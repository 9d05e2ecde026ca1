//! Paths below the file system that the host shares.

use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

/// The longest path below the share, in bytes (PATH_MAX).
const MAX_PATH_BYTES: usize = 4096;

/// Why a path below the share is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error(
        "{0:?} is no path below the share: it has to be relative, without . and .., and at most {MAX_PATH_BYTES} bytes long"
    )]
    Path(String),
    #[error("cannot open the share {path}: {source}")]
    Share { path: PathBuf, source: io::Error },
    #[error("{path:?} is not in the share: {source}")]
    Missing { path: String, source: io::Error },
    #[error("{0:?} passes a symbolic link, which is not followed in the share")]
    Link(String),
}

/// The mounted share.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    root: PathBuf,
}

impl Share {
    /// The share mounted on `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        Share { root }
    }

    /// The absolute path of `relative`, which exists and passes no symbolic link.
    ///
    /// # Errors
    /// It is no plain relative path, does not exist or passes a link.
    pub(crate) fn resolve(&self, relative: &str) -> Result<PathBuf, ShareError> {
        check(relative)?;
        let root = File::open(&self.root)
            .map_err(|source| ShareError::Share { path: self.root.clone(), source })?;
        let flags = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match openat2(&root, relative, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), flags) {
            Ok(_) => Ok(self.root.join(relative)),
            Err(rustix::io::Errno::LOOP) => Err(ShareError::Link(relative.to_owned())),
            Err(error) => {
                Err(ShareError::Missing { path: relative.to_owned(), source: error.into() })
            }
        }
    }
}

fn check(relative: &str) -> Result<(), ShareError> {
    let path = Path::new(relative);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    // components() drops a "." in the middle and a slash at the end.
    let same = path.components().collect::<PathBuf>().as_os_str() == relative;
    if relative.is_empty() || relative.len() > MAX_PATH_BYTES || !plain || !same {
        let shown: String = relative.chars().take(100).collect();
        return Err(ShareError::Path(shown));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_that_leave_the_share_are_refused() {
        for bad in ["", "/", "/etc", "..", "a/..", "a/../b", "./a", "a/./b", "a//b", "a/", "."] {
            assert!(matches!(check(bad), Err(ShareError::Path(_))), "{bad:?}");
        }
        assert!(check(&"a".repeat(MAX_PATH_BYTES + 1)).is_err());
        for good in ["a", "a/b", "roots/0/merged", "..a", "a..", &"a".repeat(MAX_PATH_BYTES)] {
            assert!(check(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn symbolic_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let share = Share::new(directory.path().to_owned());
        std::fs::create_dir(directory.path().join("real")).unwrap();
        std::fs::create_dir(directory.path().join("real/root")).unwrap();
        symlink("real", directory.path().join("link")).unwrap();
        symlink("/etc", directory.path().join("out")).unwrap();
        assert_eq!(share.resolve("real/root").unwrap(), directory.path().join("real/root"));
        for link in ["link", "link/root", "out", "out/passwd"] {
            assert!(matches!(share.resolve(link), Err(ShareError::Link(_))), "{link}");
        }
        assert!(matches!(share.resolve("none"), Err(ShareError::Missing { .. })));
    }

    proptest! {
        #[test]
        fn a_path_that_passes_stays_below(relative in "[a./]{0,12}") {
            if check(&relative).is_ok() {
                prop_assert!(!relative.split('/').any(|part| part == ".." || part.is_empty()));
            }
        }
    }
}
