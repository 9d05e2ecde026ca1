//! Copies of volumes that the host renews as a whole.
//!
//! kubelet writes ConfigMaps, Secrets, tokens and the downward API so: the files are in a directory
//! of their own, whose name begins with `..`; the link `..data` beside it says which such directory
//! is valid; and every name that a user knows is a link through `..data`. A renewal writes another
//! directory and moves `..data` to it, which is atomic. Linux does not tell a guest what the host
//! does in a file system that they share, so inotify(7) would see nothing of it. What is done to a
//! copy it does see, and the copy is renewed in the same order.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{
    DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink,
};
use std::path::{Path, PathBuf};

use vial_agent_protocol::{DATA_LINK, is_data_directory};

/// The name under which the link to the valid directory is made.
const NEW_DATA: &str = "..data_tmp";
/// The most files, directories and links of a copy.
const MAX_ENTRIES: usize = 4096;
/// The most bytes of its files: a few ConfigMaps, which have at most 1 MiB each.
const MAX_BYTES: u64 = 16 << 20;
/// The deepest directory.
const MAX_DEPTH: usize = 32;

/// What a file was when it was looked at, it is when it is opened.
const NO_LINK: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

/// Why a copy is not as its volume.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("cannot {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "a volume that is copied has at most {MAX_ENTRIES} files and {MAX_BYTES} bytes, {MAX_DEPTH} deep"
    )]
    TooLarge,
    #[error("{0:?} is no name of a directory behind {DATA_LINK}")]
    Name(String),
    #[error("{0} is not what a volume is made of: files, directories and links")]
    Kind(PathBuf),
}

type Result<T> = std::result::Result<T, CopyError>;

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    move |source| CopyError::File { action, path: path.into(), source }
}

/// What may still be copied.
struct Budget {
    entries: usize,
    bytes: u64,
}

/// Makes a copy of the volume `source` at `copy`, which is not there yet.
///
/// # Errors
/// [`CopyError`]; nothing of the copy is left.
pub(crate) fn make(source: &Path, copy: &Path) -> Result<()> {
    let like = fs::metadata(source).map_err(failed("look at", source))?;
    let made = make_directory(copy, &like).and_then(|()| renew(source, copy, &valid(source)?));
    if made.is_err() {
        let _ = fs::remove_dir_all(copy);
    }
    made
}

/// Brings `copy` up to date with the volume `source`, whose valid directory is called `data`.
/// Nothing happens when it is.
///
/// # Errors
/// [`CopyError`]; the copy is as it was.
pub(crate) fn renew(source: &Path, copy: &Path, data: &str) -> Result<()> {
    if !is_data_directory(data) {
        return Err(CopyError::Name(data.chars().take(100).collect()));
    }
    let old = fs::read_link(copy.join(DATA_LINK)).ok();
    if old.as_deref() == Some(Path::new(data)) {
        return Ok(());
    }
    let new = copy.join(data);
    let mut budget = Budget { entries: MAX_ENTRIES, bytes: MAX_BYTES };
    let copied = copy_directory(&source.join(data), &new, &mut budget, MAX_DEPTH);
    if let Err(error) = copied.and_then(|()| switch(copy, data)) {
        let _ = fs::remove_dir_all(&new);
        return Err(error);
    }
    name_files(copy, &new)?;
    match old {
        Some(old) => {
            let old = copy.join(old);
            fs::remove_dir_all(&old).map_err(failed("remove", &old))
        }
        None => Ok(()),
    }
}

/// Where `..data` of a volume leads.
fn valid(volume: &Path) -> Result<String> {
    let link = volume.join(DATA_LINK);
    let target = fs::read_link(&link).map_err(failed("read the link", &link))?;
    Ok(target.to_string_lossy().into_owned())
}

/// Makes `..data` lead to `data`, at once.
fn switch(copy: &Path, data: &str) -> Result<()> {
    let (new, link) = (copy.join(NEW_DATA), copy.join(DATA_LINK));
    // Of a renewal that was broken off.
    let _ = fs::remove_file(&new);
    self::link(data.as_ref(), &new, &owner_of(copy)?)?;
    fs::rename(&new, &link).map_err(failed("replace the link", &link))
}

/// Makes a link for each file of the valid directory, and removes those of files that are gone.
fn name_files(copy: &Path, valid: &Path) -> Result<()> {
    let owner = owner_of(copy)?;
    for entry in entries(valid)? {
        let (name, link) = (entry.file_name(), copy.join(entry.file_name()));
        if fs::symlink_metadata(&link).is_err() {
            self::link(&Path::new(DATA_LINK).join(name), &link, &owner)?;
        }
    }
    for entry in entries(copy)? {
        let (name, path) = (entry.file_name(), entry.path());
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if is_link && name != DATA_LINK && fs::symlink_metadata(valid.join(&name)).is_err() {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>> {
    let listed = fs::read_dir(directory).and_then(Iterator::collect);
    listed.map_err(failed("list", directory))
}

fn copy_directory(source: &Path, copy: &Path, budget: &mut Budget, depth: usize) -> Result<()> {
    let like = fs::symlink_metadata(source).map_err(failed("look at", source))?;
    if !like.is_dir() {
        return Err(CopyError::Kind(source.into()));
    }
    make_directory(copy, &like)?;
    for entry in entries(source)? {
        let (source, copy) = (entry.path(), copy.join(entry.file_name()));
        budget.entries = budget.entries.checked_sub(1).ok_or(CopyError::TooLarge)?;
        let like = fs::symlink_metadata(&source).map_err(failed("look at", &source))?;
        if like.is_dir() {
            let deeper = depth.checked_sub(1).ok_or(CopyError::TooLarge)?;
            copy_directory(&source, &copy, budget, deeper)?;
        } else if like.is_file() {
            copy_file(&source, &copy, &like, budget)?;
        } else if like.is_symlink() {
            let target = fs::read_link(&source).map_err(failed("read the link", &source))?;
            link(&target, &copy, &like)?;
        } else {
            return Err(CopyError::Kind(source));
        }
    }
    Ok(())
}

fn owner_of(path: &Path) -> Result<Metadata> {
    fs::symlink_metadata(path).map_err(failed("look at", path))
}

/// Makes a link to `target` at `path`, with the owner of another file.
fn link(target: &Path, path: &Path, like: &Metadata) -> Result<()> {
    symlink(target, path).map_err(failed("make the link", path))?;
    lchown(path, Some(like.uid()), Some(like.gid())).map_err(failed("set the owner of", path))
}

fn make_directory(path: &Path, like: &Metadata) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path).map_err(failed("create", path))?;
    belong(path, like)
}

fn copy_file(source: &Path, copy: &Path, like: &Metadata, budget: &mut Budget) -> Result<()> {
    let opened = File::options().read(true).custom_flags(NO_LINK).open(source);
    let opened = opened.map_err(failed("open", source))?;
    let mut bytes = Vec::new();
    opened.take(budget.bytes + 1).read_to_end(&mut bytes).map_err(failed("read", source))?;
    budget.bytes = budget.bytes.checked_sub(bytes.len() as u64).ok_or(CopyError::TooLarge)?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(copy)
        .map_err(failed("create", copy))?;
    file.write_all(&bytes).map_err(failed("write", copy))?;
    if let Ok(modified) = like.modified() {
        file.set_modified(modified).map_err(failed("set the time of", copy))?;
    }
    belong(copy, like)
}

/// Gives a file or directory the owner and the mode of another.
fn belong(path: &Path, like: &Metadata) -> Result<()> {
    lchown(path, Some(like.uid()), Some(like.gid())).map_err(failed("set the owner of", path))?;
    // After the owner: that takes set-user-id away.
    let mode = fs::Permissions::from_mode(like.permissions().mode() & 0o7777);
    fs::set_permissions(path, mode).map_err(failed("set the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a volume as kubelet does.
    fn write(volume: &Path, data: &str, files: &[(&str, &str)]) {
        let directory = volume.join(data);
        for (name, text) in files {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        }
        switch(volume, data).unwrap();
        name_files(volume, &directory).unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = entries(directory)
            .unwrap()
            .iter()
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (volume, copy) = (directory.path().join("volume"), directory.path().join("copy"));
        fs::create_dir(&volume).unwrap();
        (directory, volume, copy)
    }

    #[test]
    fn copy_is_the_volume_and_follows_it() {
        let (_directory, volume, copy) = places();
        write(&volume, "..1", &[("a", "one"), ("deep/b", "two")]);
        make(&volume, &copy).unwrap();
        assert_eq!(names(&copy), ["..1", "..data", "a", "deep"]);
        assert_eq!(fs::read_to_string(copy.join("a")).unwrap(), "one");
        assert_eq!(fs::read_to_string(copy.join("deep/b")).unwrap(), "two");
        let metadata = fs::metadata(copy.join("a")).unwrap();
        let original = fs::metadata(volume.join("a")).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o640);
        assert_eq!(metadata.modified().unwrap(), original.modified().unwrap());

        write(&volume, "..2", &[("a", "three"), ("c", "new")]);
        renew(&volume, &copy, "..2").unwrap();
        assert_eq!(names(&copy), ["..2", "..data", "a", "c"]);
        assert_eq!(fs::read_to_string(copy.join("a")).unwrap(), "three");
        assert_eq!(fs::read_link(copy.join("c")).unwrap(), Path::new("..data/c"));
        // Told twice, it stays.
        renew(&volume, &copy, "..2").unwrap();
        assert_eq!(fs::read_to_string(copy.join("c")).unwrap(), "new");
    }

    #[test]
    fn failed_renewal_leaves_the_copy_as_it_was() {
        let (_directory, volume, copy) = places();
        write(&volume, "..1", &[("a", "one")]);
        make(&volume, &copy).unwrap();
        for absent in ["..2", "..data", "../volume", "..", "x"] {
            assert!(renew(&volume, &copy, absent).is_err(), "{absent}");
        }
        let large = "x".repeat(usize::try_from(MAX_BYTES).unwrap() + 1);
        write(&volume, "..3", &[("a", &large)]);
        assert!(matches!(renew(&volume, &copy, "..3"), Err(CopyError::TooLarge)));
        let deep = "d/".repeat(MAX_DEPTH + 2) + "a";
        write(&volume, "..4", &[(&deep, "")]);
        assert!(matches!(renew(&volume, &copy, "..4"), Err(CopyError::TooLarge)));
        assert_eq!(names(&copy), ["..1", "..data", "a"]);
        assert_eq!(fs::read_to_string(copy.join("a")).unwrap(), "one");
    }

    #[test]
    fn more_entries_than_a_copy_may_have_are_refused() {
        let (_directory, volume, copy) = places();
        let many: Vec<String> = (0..=MAX_ENTRIES).map(|n| n.to_string()).collect();
        let files: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "")).collect();
        write(&volume, "..1", &files);
        assert!(matches!(make(&volume, &copy), Err(CopyError::TooLarge)));
        assert!(!copy.exists());
        fs::remove_file(volume.join("..1/0")).unwrap();
        make(&volume, &copy).unwrap();
    }

    #[test]
    fn pipes_and_sockets_are_not_copied() {
        let (_directory, volume, copy) = places();
        write(&volume, "..1", &[("a", "one")]);
        let _listener = std::os::unix::net::UnixListener::bind(volume.join("..1/s")).unwrap();
        assert!(matches!(make(&volume, &copy), Err(CopyError::Kind(_))));
    }
}
