//! What the shim reads out of a bundle's `config.json`.
//!
//! Only what decides something on the host: who the sandbox is, where the root lies, and which
//! mounts have their source here. The bytes themselves go to the agent unchanged.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use vial_agent_protocol::MAX_SPEC_BYTES;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// The part of an OCI spec that the host acts on.
#[derive(Debug, Deserialize)]
pub struct Spec {
    /// The container's root.
    pub root: Option<Root>,
    /// What is mounted into it.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// What only Linux has.
    #[serde(default)]
    pub linux: Linux,
    /// Free words; containerd's CRI plugin says here what belongs to which pod.
    #[serde(default)]
    pub annotations: HashMap<String, String>,
}

/// `linux` of a spec.
#[derive(Debug, Default, Deserialize)]
pub struct Linux {
    /// The namespaces that the container gets.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
}

/// One of a spec's `linux.namespaces`.
#[derive(Debug, Deserialize)]
pub struct Namespace {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The one to join; a new one without it.
    #[serde(default)]
    pub path: PathBuf,
}

/// `root` of a spec.
#[derive(Debug, Deserialize)]
pub struct Root {
    /// Absolute, or relative to the bundle.
    pub path: PathBuf,
}

/// One of a spec's `mounts`.
#[derive(Debug, Deserialize)]
pub struct Mount {
    /// Where in the container.
    pub destination: PathBuf,
    /// The file system's type.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// What is mounted.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// How.
    #[serde(default)]
    pub options: Vec<String>,
}

impl Mount {
    /// Whether the source is a file or directory of the host.
    pub fn is_bind(&self) -> bool {
        self.kind.as_deref() == Some("bind") || self.has_option("bind") || self.has_option("rbind")
    }

    /// Whether the option is among the mount's.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.iter().any(|other| other == option)
    }
}

/// What a container is to its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Its own sandbox: whatever is not started by a CRI plugin.
    Alone,
    /// The pod's pause container. The VM is what it stands for; no process is needed.
    Sandbox,
    /// A container of the sandbox with that id.
    Member(String),
}

/// Why a spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// It is too large to be sent.
    #[error("{path} has {bytes} bytes, more than the {MAX_SPEC_BYTES} that a spec can have")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is no OCI spec.
    #[error("{path} is no OCI runtime spec: {error}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: serde_json::Error,
    },
    /// The annotations of the CRI plugin contradict themselves.
    #[error(
        "the annotation {CONTAINER_TYPE} is '{0}', which is neither 'sandbox' nor 'container' with {SANDBOX_ID} set"
    )]
    Role(String),
}

impl Spec {
    /// Reads `config.json` of a bundle: its bytes, and what they mean here.
    ///
    /// # Errors
    /// [`SpecError`].
    pub fn read(bundle: &Path) -> Result<(Vec<u8>, Self), SpecError> {
        let path = bundle.join("config.json");
        let read = |error| SpecError::Read { path: path.clone(), error };
        let bytes = std::fs::metadata(&path).map_err(read)?.len();
        if bytes > MAX_SPEC_BYTES as u64 {
            return Err(SpecError::TooLarge { path, bytes });
        }
        let text = std::fs::read(&path).map_err(read)?;
        let spec =
            serde_json::from_slice(&text).map_err(|error| SpecError::Parse { path, error })?;
        Ok((text, spec))
    }

    /// The network namespace that somebody made for the container, CNI as a rule.
    pub fn network_namespace(&self) -> Option<&Path> {
        let network = self.linux.namespaces.iter().find(|namespace| namespace.kind == "network")?;
        (!network.path.as_os_str().is_empty()).then_some(&network.path)
    }

    /// What the container is to its sandbox.
    ///
    /// # Errors
    /// [`SpecError::Role`].
    pub fn role(&self) -> Result<Role, SpecError> {
        let sandbox = self.annotations.get(SANDBOX_ID);
        match (self.annotations.get(CONTAINER_TYPE).map(String::as_str), sandbox) {
            (None, _) => Ok(Role::Alone),
            (Some("sandbox"), _) => Ok(Role::Sandbox),
            (Some("container"), Some(id)) => Ok(Role::Member(id.clone())),
            (Some(other), _) => Err(SpecError::Role(other.chars().take(64).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn role_follows_the_annotations() {
        assert_eq!(spec("{}").role().unwrap(), Role::Alone);
        let sandbox = r#"{"annotations": {"io.kubernetes.cri.container-type": "sandbox"}}"#;
        assert_eq!(spec(sandbox).role().unwrap(), Role::Sandbox);
        let member = r#"{"annotations": {"io.kubernetes.cri.container-type": "container",
                         "io.kubernetes.cri.sandbox-id": "pod"}}"#;
        assert_eq!(spec(member).role().unwrap(), Role::Member("pod".into()));
        let orphan = r#"{"annotations": {"io.kubernetes.cri.container-type": "container"}}"#;
        assert!(spec(orphan).role().is_err());
    }

    #[test]
    fn network_namespace_is_one_with_a_path() {
        let with = |more: &str| {
            let json = format!(r#"{{"linux": {{"namespaces": [{{"type": "pid"}} {more}]}}}}"#);
            spec(&json).network_namespace().map(Path::to_path_buf)
        };
        assert_eq!(with(""), None);
        assert_eq!(with(r#", {"type": "network"}"#), None);
        let path = Some("/run/netns/a".into());
        assert_eq!(with(r#", {"type": "network", "path": "/run/netns/a"}"#), path);
        assert_eq!(spec("{}").network_namespace(), None);
    }

    #[test]
    fn binds_are_told_by_type_or_option() {
        let spec = spec(
            r#"{"mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/a", "type": "bind", "source": "/a"},
                {"destination": "/b", "type": "none", "source": "/b", "options": ["rbind"]},
                {"destination": "/c", "source": "/c", "options": ["ro", "bind"]}]}"#,
        );
        let binds: Vec<bool> = spec.mounts.iter().map(Mount::is_bind).collect();
        assert_eq!(binds, [false, true, true, true]);
    }

    #[test]
    fn spec_over_the_limit_is_refused() {
        let bundle = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(bundle.path().join("config.json")).unwrap();
        file.set_len(MAX_SPEC_BYTES as u64 + 1).unwrap();
        assert!(matches!(Spec::read(bundle.path()), Err(SpecError::TooLarge { .. })));
    }
}
