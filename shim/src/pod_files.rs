//! The files of a pod that was asked for by the Sandbox API: its hosts, host name and resolver.
//!
//! containerd binds them into each container from a directory of its own. With the Sandbox API it
//! leaves them to whoever runs the pod, and binds none, or what was not there, by its version.

use std::{
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::spec::{Mount, SHARED_MEMORY, Spec};

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

/// Binds the files in `directory` where the spec, whose text is `json`, binds none, and the pod's
/// shared memory where a container would have its own. Both change.
///
/// # Errors
/// The text is no JSON.
pub fn substitute(
    spec: &mut Spec,
    json: &mut Vec<u8>,
    directory: &Path,
) -> Result<(), serde_json::Error> {
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
    // As those that containerd makes belong to the pod's root.
    let ours = if spec.has_users() { vec!["idmap".to_owned()] } else { Vec::new() };
    for mount in &mut spec.mounts {
        let is_ours = mount.source.as_ref().is_some_and(|source| source.starts_with(directory));
        if is_ours && mount.is_bind() {
            mount.options.extend_from_slice(&ours);
        }
    }
    let has = |destination: &str| {
        spec.mounts.iter().any(|mount| mount.destination == Path::new(destination))
    };
    let absent: Vec<_> = FILES.iter().filter(|(destination, _)| !has(destination)).collect();
    let own_memory = spec.mounts.iter().position(|mount| {
        mount.destination == Path::new(SHARED_MEMORY) && mount.kind.as_deref() == Some("tmpfs")
    });
    if absent.is_empty() && own_memory.is_none() {
        return Ok(());
    }
    let mut text: Value = serde_json::from_slice(json)?;
    let access = match text.pointer("/root/readonly") {
        Some(Value::Bool(true)) => "ro",
        _ => "rw",
    };
    let mut mounts = match text["mounts"].take() {
        Value::Array(mounts) => mounts,
        _ => Vec::new(),
    };
    if let Some(index) = own_memory {
        // Its source is not there: it stands for the pod's, which is in the guest.
        let mount = json!({
            "destination": SHARED_MEMORY,
            "type": "bind",
            "source": directory.join("shm"),
            "options": ["rbind", "nosuid", "noexec", "nodev"],
        });
        spec.mounts[index] = serde_json::from_value(mount.clone())?;
        mounts[index] = mount;
    }
    for (destination, name) in absent {
        let mount = json!({
            "destination": destination,
            "type": "bind",
            "source": directory.join(name),
            "options": ["rbind", "rprivate", access],
        });
        let mut shared: Mount = serde_json::from_value(mount.clone())?;
        shared.options.extend_from_slice(&ours);
        spec.mounts.push(shared);
        mounts.push(mount);
    }
    text["mounts"] = mounts.into();
    *json = serde_json::to_vec(&text)?;
    Ok(())
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
        let mut text = json.clone().into_bytes();
        substitute(&mut spec, &mut text, &files).unwrap();
        assert_eq!(text, json.as_bytes(), "nothing is added to what has them all");
        let sources: Vec<PathBuf> =
            spec.mounts.into_iter().map(|mount| mount.source.unwrap()).collect();
        let nowhere = PathBuf::from("/nowhere");
        assert_eq!(sources, [files.join("hosts"), own, files.join("resolv.conf"), nowhere]);
    }

    #[test]
    fn files_are_bound_where_the_spec_has_no_mount_for_them() {
        for (root, access) in [("", "rw"), (r#""root": {"path": "r", "readonly": true},"#, "ro")] {
            let json = format!(
                r#"{{{root} "mounts": [{{"destination": "/proc", "type": "proc", "source": "proc"}},
                    {{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}},
                    {{"destination": "/etc/hosts", "type": "bind", "source": "/bin/sh"}}]}}"#
            );
            let mut spec: Spec = serde_json::from_str(&json).unwrap();
            let mut text = json.into_bytes();
            substitute(&mut spec, &mut text, Path::new("/files")).unwrap();
            let text: Value = serde_json::from_slice(&text).unwrap();
            let bound = json!(["rbind", "rprivate", access]);
            assert_eq!(text["mounts"].as_array().unwrap().len(), 5);
            assert_eq!(text["mounts"][1]["type"], "bind");
            assert_eq!(text["mounts"][3]["destination"], "/etc/hostname");
            assert_eq!(text["mounts"][4]["source"], "/files/resolv.conf");
            assert_eq!(text["mounts"][4]["options"], bound);
            assert_eq!(spec.take_shared_memory(), [(1, 64 << 20)]);
            // The two are the same, for mounts are named by their index.
            let seen = spec.mounts.iter().map(|mount| mount.destination.to_str().unwrap());
            let told = text["mounts"].as_array().unwrap().iter();
            assert!(seen.eq(told.map(|mount| mount["destination"].as_str().unwrap())));
        }
    }

    #[test]
    fn directory_that_cannot_be_made_is_named() {
        let error = PodFiles::default().write(Path::new("/nowhere/files")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/files"), "{error}");
    }
}
