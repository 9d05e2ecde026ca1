//! What inotify(7) tells of some files, for a case to run in a container.

use std::mem::MaybeUninit;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

/// Prints a line for each thing that happens to one of `paths`, for ever.
pub(crate) fn watch(paths: &[PathBuf]) -> Result<()> {
    let inotify = inotify::init(CreateFlags::CLOEXEC)?;
    let of = WatchFlags::CREATE
        | WatchFlags::MOVE
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MODIFY;
    let mut watched = Vec::new();
    for path in paths {
        let number = inotify::add_watch(&inotify, path, of)
            .with_context(|| format!("watch {}", path.display()))?;
        watched.push((number, path));
    }
    println!("watching");
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&inotify, &mut buffer);
    loop {
        let event = reader.next()?;
        let path = watched.iter().find(|(number, _)| *number == event.wd());
        let path = path.map(|(_, path)| path.display().to_string()).unwrap_or_default();
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
        let kinds: Vec<&str> =
            (event.events() - ReadFlags::ISDIR).iter_names().map(|(name, _)| name).collect();
        println!("{path}: {} {}", kinds.join("|"), name.unwrap_or_default());
    }
}
