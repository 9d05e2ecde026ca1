//! The bundles of a pod's containers, for when containerd forgets one.
//!
//! A container joins its pod's shim, so that containerd has nothing of the container's own to be called for when the shim
//! dies. It deletes the tasks of containers that run. One whose shim dies between the creation and the start of its task it
//! gives up, and leaves its bundle in /run and its work directory in /var/lib until it is started itself. So the shim
//! remembers which bundles it was given, and `delete` removes those that are still there when all of the pod has ended.
//! containerd takes no offence at one that is gone: whatever it removes may be gone.

use std::{
    io::ErrorKind,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use crate::{
    share::{remove_tree, unmount_below},
    spec::{Role, Spec},
    state_dir::StateDir,
};

/// Why a bundle cannot be remembered, or is still there.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {error}; is there room on its file system, and is it writable?")]
pub struct BundleError {
    action: &'static str,
    path: PathBuf,
    error: std::io::Error,
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BundleError {
    move |error| BundleError { action, path: path.into(), error }
}

/// Remembers the bundle of a container of the pod.
///
/// # Errors
/// [`BundleError`].
pub fn remember(dir: &StateDir, container: &str, bundle: &Path) -> Result<(), BundleError> {
    let bundles = dir.bundles();
    match std::fs::create_dir(&bundles) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(io("create", &bundles)(error));
        }
        _ => {}
    }
    let link = bundles.join(container);
    symlink(bundle, &link).map_err(io("create", &link))
}

/// Forgets it: containerd has been told that the container is deleted.
pub fn forget(dir: &StateDir, container: &str) {
    let link = dir.bundles().join(container);
    match std::fs::remove_file(&link) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {error}", link.display());
        }
        _ => {}
    }
}

/// Removes all bundles that are remembered, of a sandbox of which nothing runs any more.
///
/// # Errors
/// The first [`BundleError`]; all are tried.
pub fn remove_all(dir: &StateDir, sandbox: &str) -> Result<(), BundleError> {
    let links = std::fs::read_dir(dir.bundles()).into_iter().flatten().flatten();
    let removed = links.map(|link| match std::fs::read_link(link.path()) {
        Ok(bundle) => remove(&bundle, sandbox),
        Err(error) => Err(io("read", &link.path())(error)),
    });
    let removed: Vec<_> = removed.collect();
    removed.into_iter().collect()
}

/// Removes a bundle as containerd does, and the work directory that belongs to it. Absent is fine, and one that belongs to
/// another sandbox by now stays.
fn remove(bundle: &Path, sandbox: &str) -> Result<(), BundleError> {
    let role = Spec::read(bundle).ok().and_then(|(_, spec)| spec.role().ok());
    if role != Some(Role::Member(sandbox.into())) {
        return Ok(());
    }
    let work = std::fs::read_link(bundle.join("work")).ok();
    let rootfs = bundle.join("rootfs");
    let failed = |error: crate::share::ShareError| std::io::Error::other(error.to_string());
    unmount_below(&rootfs).map_err(failed).map_err(io("unmount what is in", &rootfs))?;
    // What is in there is the container's, and was never the bundle's.
    match std::fs::remove_dir(&rootfs) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(io("remove", &rootfs)(error));
        }
        _ => {}
    }
    remove_tree(bundle).map_err(io("remove", bundle))?;
    match work {
        Some(work) if work.is_absolute() && work.file_name() == bundle.file_name() => {
            remove_tree(&work).map_err(io("remove", &work))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        root: tempfile::TempDir,
        dir: StateDir,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let dir = StateDir::new(&root.path().join("state"), "default", "pod").unwrap();
            dir.create().unwrap();
            Self { root, dir }
        }

        /// Makes the bundle of a container of `sandbox`, and remembers it.
        fn bundle(&self, container: &str, sandbox: &str) -> [PathBuf; 2] {
            let bundle = self.root.path().join("run").join(container);
            let work = self.root.path().join("lib").join(container);
            std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
            std::fs::create_dir_all(work.join("kept")).unwrap();
            symlink(&work, bundle.join("work")).unwrap();
            let spec = serde_json::json!({"ociVersion": "1.2.0", "annotations": {
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": sandbox,
            }});
            std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
            remember(&self.dir, container, &bundle).unwrap();
            [bundle, work]
        }
    }

    fn there(paths: &[PathBuf; 2]) -> [bool; 2] {
        paths.each_ref().map(|path| path.exists())
    }

    #[test]
    fn bundles_that_are_left_go_with_their_work_directories() {
        let host = Host::new();
        let left = host.bundle("left", "pod");
        let deleted = host.bundle("deleted", "pod");
        forget(&host.dir, "deleted");
        let gone = host.bundle("gone", "pod");
        std::fs::remove_dir_all(&gone[0]).unwrap();
        let of_another = host.bundle("of-another", "other");
        remove_all(&host.dir, "pod").unwrap();
        assert_eq!(there(&left), [false, false]);
        for kept in [&deleted, &of_another] {
            assert_eq!(there(kept), [true, true]);
        }
        // Once more, and where no container ever was.
        remove_all(&host.dir, "pod").unwrap();
        remove_all(&Host::new().dir, "pod").unwrap();
    }

    #[test]
    fn what_is_not_the_bundles_own_stays() {
        let host = Host::new();
        let full = host.bundle("full", "pod");
        std::fs::write(full[0].join("rootfs/data"), "").unwrap();
        let elsewhere = host.bundle("elsewhere", "pod");
        std::fs::remove_file(elsewhere[0].join("work")).unwrap();
        symlink(host.root.path().join("state"), elsewhere[0].join("work")).unwrap();
        let error = remove_all(&host.dir, "pod").unwrap_err().to_string();
        assert!(error.contains("full/rootfs"), "{error}");
        assert!(full[0].join("rootfs/data").exists());
        assert_eq!(there(&elsewhere), [false, true]);
        assert!(host.dir.path().exists());
    }

    #[test]
    fn forgetting_twice_is_fine_and_remembering_twice_is_told() {
        let host = Host::new();
        forget(&host.dir, "none");
        let [bundle, _] = host.bundle("one", "pod");
        assert!(remember(&host.dir, "one", &bundle).is_err());
        forget(&host.dir, "one");
        forget(&host.dir, "one");
    }
}
