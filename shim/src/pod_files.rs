//! The files of a pod that was asked for by the Sandbox API: its hosts, host name and resolver.
//!
//! containerd binds them into each container from a directory of its own. With the Sandbox API it
//! leaves them to whoever runs the pod, and makes empty directories where there are none.

use std::{
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::spec::Spec;

/// Where containers find them, and what they are called here.
const FILES: [(&str, &str); 3] =
    [("/etc/hosts", "hosts"), ("/etc/hostname", "hostname"), ("/etc/resolv.conf", "resolv.conf")];

/// Why a file of the pod is not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the pod's {path}: {error}")]
pub struct PodFileError {
    path: PathBuf,
    error: io::Error,
}

/// What is in the files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// The pod's host name.
    pub hostname: String,
    /// The resolver's configuration; without one the pod has the host's.
    pub resolver: Option<String>,
}

impl PodFiles {
    /// Writes them to `directory`, which is made.
    ///
    /// # Errors
    /// [`PodFileError`].
    pub fn write(&self, directory: &Path) -> Result<(), PodFileError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |error| PodFileError { path, error }
        };
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o755).create(directory).map_err(failed(directory))?;
        for (destination, name) in FILES {
            let path = directory.join(name);
            let content = match name {
                "hostname" => format!("{}\n", self.hostname),
                "resolv.conf" => self.resolver.clone().unwrap_or_else(|| of_host(destination)),
                _ => of_host(destination),
            };
            std::fs::write(&path, content).map_err(failed(&path))?;
        }
        Ok(())
    }
}

/// The host's own; a host without one has an empty one.
fn of_host(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Binds the files in `directory` where the spec binds none.
pub fn substitute(spec: &mut Spec, directory: &Path) {
    for mount in &mut spec.mounts {
        let Some((_, name)) =
            FILES.iter().find(|(destination, _)| mount.destination == Path::new(destination))
        else {
            continue;
        };
        let is_file = mount.source.as_ref().is_some_and(|source| source.is_file());
        if mount.is_bind() && !is_file {
            mount.source = Some(directory.join(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_bound_where_containerd_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path().join("files");
        let resolver = Some("nameserver 192.0.2.1\n".to_string());
        PodFiles { hostname: "web".into(), resolver }.write(&files).unwrap();
        assert_eq!(std::fs::read_to_string(files.join("hostname")).unwrap(), "web\n");
        let text = std::fs::read_to_string(files.join("resolv.conf")).unwrap();
        assert_eq!(text, "nameserver 192.0.2.1\n");

        let own = dir.path().join("own");
        std::fs::write(&own, "").unwrap();
        let json = format!(
            r#"{{"mounts": [{{"destination": "/etc/hosts", "type": "bind", "source": "/nowhere"}},
                {{"destination": "/etc/hostname", "type": "bind", "source": {own:?}}},
                {{"destination": "/etc/resolv.conf", "type": "bind", "source": {:?}}},
                {{"destination": "/etc/other", "type": "bind", "source": "/nowhere"}}]}}"#,
            dir.path()
        );
        let mut spec: Spec = serde_json::from_str(&json).unwrap();
        substitute(&mut spec, &files);
        let sources: Vec<PathBuf> =
            spec.mounts.into_iter().map(|mount| mount.source.unwrap()).collect();
        let nowhere = PathBuf::from("/nowhere");
        assert_eq!(sources, [files.join("hosts"), own, files.join("resolv.conf"), nowhere]);
    }

    #[test]
    fn directory_that_cannot_be_made_is_named() {
        let error = PodFiles::default().write(Path::new("/nowhere/files")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/files"), "{error}");
    }
}
