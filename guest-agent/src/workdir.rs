//! A container's working directory, which need not be in its image: it is made before the
//! container is, as runc makes it.

use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, openat2};
use rustix::io::Errno;

/// The longest path, in bytes (PATH_MAX).
const MAX_PATH_BYTES: usize = 4096;

/// Why a working directory cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkdirError {
    #[error("the working directory has {0} bytes, more than the {MAX_PATH_BYTES} of a path")]
    TooLong(usize),
    #[error("cannot make the working directory {path}: {source}")]
    Make { path: PathBuf, source: io::Error },
}

/// Makes `directory` and what it lies in, below `root`, as that user's and group's. What is there stays as it is; symbolic links
/// are followed as the container would follow them, and never lead out of `root`.
///
/// # Errors
/// [`WorkdirError`].
pub(crate) fn make(root: &Path, directory: &Path, owner: (u32, u32)) -> Result<(), WorkdirError> {
    let bytes = directory.as_os_str().len();
    if bytes > MAX_PATH_BYTES {
        return Err(WorkdirError::TooLong(bytes));
    }
    make_each(root, directory, owner)
        .map_err(|source| WorkdirError::Make { path: directory.into(), source })
}

fn make_each(root: &Path, directory: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    let root = File::open(root)?;
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&root, path, flags, Mode::empty(), inside)
    };
    let mut parent = open(Path::new("."))?;
    let mut path = PathBuf::from(".");
    for part in directory.components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::ParentDir => path.push(".."),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
        }
        parent = match open(&path) {
            Err(Errno::NOENT) => {
                let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
                match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) => {
                        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                        let flags = AtFlags::SYMLINK_NOFOLLOW;
                        chownat(&parent, name, Some(uid), Some(gid), flags)?;
                        open(&path)?
                    }
                    Err(Errno::EXIST) => open(&path)?,
                    Err(error) => return Err(error.into()),
                }
            }
            opened => opened?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn absent_directories_are_made_and_others_stay() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir(at("there")).unwrap();
        fs::write(at("there/file"), "kept").unwrap();
        for path in ["/there/made/deep", "/there", "/", "new", "/there/../other"] {
            make(root.path(), Path::new(path), (0, 0)).unwrap();
        }
        for path in ["there/made/deep", "new", "other"] {
            assert!(at(path).is_dir(), "{path}");
        }
        assert_eq!(fs::read_to_string(at("there/file")).unwrap(), "kept");
    }

    #[test]
    fn links_stay_in_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("real")).unwrap();
        symlink("/real", root.path().join("link")).unwrap();
        symlink(outside.path(), root.path().join("out")).unwrap();
        make(root.path(), Path::new("/link/made"), (0, 0)).unwrap();
        assert!(root.path().join("real/made").is_dir());
        // The link's target is not in the root, so nothing can be made below it.
        assert!(make(root.path(), Path::new("/out/made"), (0, 0)).is_err());
        make(root.path(), Path::new("/../../up"), (0, 0)).unwrap();
        assert!(root.path().join("up").is_dir());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        assert!(matches!(
            make(root.path(), Path::new("/file/below"), (0, 0)),
            Err(WorkdirError::Make { .. })
        ));
        let long = format!("/{}", "a/".repeat(MAX_PATH_BYTES / 2));
        assert!(matches!(
            make(root.path(), Path::new(&long), (0, 0)),
            Err(WorkdirError::TooLong(_))
        ));
    }
}
