//! Whether others than root can change a file of the operator's.
//!
//! The configuration names programs that run as root, and the directories are where they keep what they trust. Whoever can
//! write one of these, or put another in its place, is root on the node.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Everyone but the owner may write, by mode (inode(7), `S_IWGRP`, `S_IWOTH`).
const OTHERS_WRITE: u32 = 0o022;
/// Who may write in a directory may not replace what is another's there (inode(7), `S_ISVTX`).
const STICKY: u32 = 0o1000;

/// Why a file is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Others can change it, or put another in its place.
    #[error(
        "{path} belongs to user {owner} and has mode {mode:04o}, so that others than root can change {of}; \
         `chown root {path}` and `chmod go-w {path}`"
    )]
    Others {
        /// The file, or a directory above it.
        path: PathBuf,
        /// What is wanted.
        of: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// It cannot be looked at.
    #[error("cannot look whose {path} is: {error}")]
    Look {
        /// The file, or a directory above it.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
}

/// Whether only root can change what is at `path`, an absolute path, whatever links lead there. Of what is not there yet,
/// the directories are looked at that it will be in.
///
/// # Errors
/// [`TrustError`].
pub fn check(path: &Path) -> Result<(), TrustError> {
    let there = path.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(path);
    let look = |path: &Path, error| TrustError::Look { path: path.into(), error };
    let real = there.canonicalize().map_err(|error| look(there, error))?;
    // The way by names, and, where links are on it, that by which it really goes.
    for place in there.ancestors().chain(real.ancestors()) {
        let about = place.metadata().map_err(|error| look(place, error))?;
        let link = place.symlink_metadata().map_err(|error| look(place, error))?;
        let mode = about.mode() & 0o7777;
        // What is not there yet, whoever may write there may make.
        let makes = there != path && (place == there || place == real);
        let sticky = about.is_dir() && mode & STICKY != 0 && !makes;
        let owner = if link.uid() == 0 { about.uid() } else { link.uid() };
        if owner != 0 || (mode & OTHERS_WRITE != 0 && !sticky) {
            return Err(TrustError::Others { path: place.into(), of: path.into(), owner, mode });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, chown, lchown, symlink},
    };

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Who is named as the one that others can change.
    fn blamed(path: &Path) -> Option<PathBuf> {
        match check(path) {
            Ok(()) => None,
            Err(TrustError::Others { path, .. }) => Some(path),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn file_that_others_can_change_or_replace_is_not_trusted() {
        let top = tempfile::tempdir().expect("run the tests as root");
        let top = top.path().canonicalize().unwrap();
        let (directory, file) = (top.join("etc"), top.join("etc/config.toml"));
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "").unwrap();
        for mode in [0o644, 0o600, 0o400] {
            set_mode(&file, mode);
            assert_eq!(blamed(&file), None, "{mode:o}");
        }
        for mode in [0o664, 0o646, 0o666, 0o1666] {
            set_mode(&file, mode);
            assert_eq!(blamed(&file).as_ref(), Some(&file), "{mode:o}");
        }
        set_mode(&file, 0o644);
        chown(&file, Some(1000), None).unwrap();
        assert_eq!(blamed(&file).as_ref(), Some(&file));
        chown(&file, Some(0), Some(1000)).unwrap();
        assert_eq!(blamed(&file), None, "a group that may not write is nobody");
        for mode in [0o775, 0o757] {
            set_mode(&directory, mode);
            assert_eq!(blamed(&file).as_ref(), Some(&directory), "{mode:o}");
        }
        // As /tmp: nobody replaces what is root's.
        set_mode(&directory, 0o1777);
        assert_eq!(blamed(&file), None);
        chown(&directory, Some(1000), None).unwrap();
        assert_eq!(blamed(&file).as_ref(), Some(&directory));
        let error = check(&file).unwrap_err().to_string();
        assert!(error.contains("user 1000") && error.contains("chown root"), "{error}");
    }

    #[test]
    fn both_ends_of_a_link_are_looked_at() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path().canonicalize().unwrap();
        let [theirs, ours] = ["theirs", "ours"].map(|name| top.join(name));
        for directory in [&theirs, &ours] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join("file"), "").unwrap();
        }
        chown(&theirs, Some(1000), None).unwrap();
        symlink(theirs.join("file"), ours.join("out")).unwrap();
        symlink(ours.join("file"), theirs.join("in")).unwrap();
        assert_eq!(blamed(&ours.join("out")).as_ref(), Some(&theirs));
        assert_eq!(blamed(&theirs.join("in")).as_ref(), Some(&theirs));
        assert_eq!(blamed(&ours.join("file")), None);
        // Where the link leads is its owner's to say.
        let link = ours.join("link");
        symlink(ours.join("file"), &link).unwrap();
        assert_eq!(blamed(&link), None);
        lchown(&link, Some(1000), None).unwrap();
        assert_eq!(blamed(&link), Some(link));
    }

    #[test]
    fn place_of_what_is_not_there_yet_is_looked_at() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path().canonicalize().unwrap();
        assert_eq!(blamed(&top.join("run/vial")), None);
        for mode in [0o777, 0o1777] {
            set_mode(&top, mode);
            assert_eq!(blamed(&top.join("run/vial")).as_ref(), Some(&top), "{mode:o}");
        }
    }
}
