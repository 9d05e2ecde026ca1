//! Devices that other processes of the host serve to a pod (vhost-user): networks, disks, file
//! systems.
//!
//! The operator's configuration names them, with the sockets of their backends; a pod asks for some
//! by name in its annotation [`ANNOTATION`], and never by socket. The shim connects, and hands the
//! connection to the VMM. When a backend goes away, it connects again, for as long as the pod lives.
//!
//! - [`listed`]: what the configuration says of one, checked. Pure.
//! - [`connect`]: connections, and the memory that backends map.
//! - [`reconnect`]: other connections in place of broken ones.

pub mod connect;
pub mod listed;
pub mod reconnect;

use std::{collections::HashMap, path::PathBuf};

use listed::Listed;
use vial_agent_protocol::{MAX_SERVED_DEVICES, agent};

/// The annotation of a pod that names devices, with commas between them.
pub const ANNOTATION: &str = "io.vial/vhost-user";

/// Why a pod does not get the devices that it asks for.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// The operator has not listed it.
    #[error(
        "the pod's annotation {ANNOTATION} names '{0}', which the node does not give to pods; add \
         it as [[vhost_user]] to Vial's configuration"
    )]
    NotListed(String),
    /// More than a VM can have.
    #[error("the pod's annotation {ANNOTATION} names more than {MAX_SERVED_DEVICES} devices")]
    TooMany,
    /// There is no socket.
    #[error(
        "the vhost-user device '{name}' has no socket {socket}: {error}; start its backend, or set \
         `socket` in Vial's configuration"
    )]
    Absent {
        /// The device.
        name: String,
        /// Where the socket should be.
        socket: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// There is something else.
    #[error(
        "the vhost-user device '{name}' has {socket}, which is no socket; set `socket` in Vial's \
         configuration to that of its backend"
    )]
    NoSocket {
        /// The device.
        name: String,
        /// What is none.
        socket: PathBuf,
    },
    /// Nobody accepts connections.
    #[error(
        "nobody serves the socket {socket} of the vhost-user device '{name}': {error}; start its \
         backend again"
    )]
    NotServed {
        /// The device.
        name: String,
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The memory that is shared with backends.
    #[error("cannot make memory that vhost-user backends can map: {0}")]
    Memory(std::io::Error),
    /// The VMM's answer does not fit.
    #[error(
        "the VMM does not tell where the pod's vhost-user devices are; install shim and VMM of one \
         release"
    )]
    Numbers,
}

impl VhostUserError {
    /// Whether the pod itself asks for what cannot be, on any node.
    pub fn is_of_the_pod(&self) -> bool {
        matches!(self, Self::TooMany)
    }
}

/// What a pod's annotations ask for, each device once.
///
/// # Errors
/// [`VhostUserError::NotListed`] and [`VhostUserError::TooMany`].
pub fn wanted(
    annotations: &HashMap<String, String>,
    listed: &[Listed],
) -> Result<Vec<Listed>, VhostUserError> {
    let words = annotations.get(ANNOTATION).map_or("", String::as_str);
    let mut wanted: Vec<Listed> = Vec::new();
    for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        if wanted.iter().any(|device| device.name == word) {
            continue;
        }
        let known = listed.iter().find(|device| device.name == word);
        let shown = || VhostUserError::NotListed(word.escape_debug().take(64).collect());
        wanted.push(known.ok_or_else(shown)?.clone());
        if wanted.len() > MAX_SERVED_DEVICES {
            return Err(VhostUserError::TooMany);
        }
    }
    Ok(wanted)
}

/// What containers are given of devices, of which `numbers` tells where they are on the guest's PCI
/// bus.
///
/// # Errors
/// [`VhostUserError::Numbers`].
pub fn served(
    devices: &[Listed],
    numbers: &[u8],
) -> Result<Vec<agent::ServedDevice>, VhostUserError> {
    if devices.len() != numbers.len() {
        return Err(VhostUserError::Numbers);
    }
    Ok(devices.iter().zip(numbers).filter_map(|(device, at)| device.served(*at)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::listed::{Entry, Kind};

    fn listed(names: &[String]) -> Vec<Listed> {
        let device = |name: &String| {
            let text = format!(
                "name = \"{name}\"\nkind = \"blk\"\nsocket = \"/run/a\"\npath = \"/dev/{name}\""
            );
            Listed::new(toml::from_str::<Entry>(&text).unwrap()).unwrap()
        };
        names.iter().map(device).collect()
    }

    fn asked(text: &str, listed: &[Listed]) -> Result<Vec<String>, VhostUserError> {
        let annotations = HashMap::from([(ANNOTATION.to_owned(), text.to_owned())]);
        let wanted = wanted(&annotations, listed)?;
        Ok(wanted.into_iter().map(|device| device.name).collect())
    }

    #[test]
    fn listed_devices_are_taken_once_and_others_refused() {
        let listed = listed(&["a".into(), "b".into()]);
        assert_eq!(asked(" b, a,,b", &listed).unwrap(), ["b", "a"]);
        assert!(asked("", &listed).unwrap().is_empty());
        for other in ["c", "/run/a", "a b"] {
            let error = asked(other, &listed).unwrap_err();
            assert!(matches!(error, VhostUserError::NotListed(_)), "{error}");
        }
    }

    #[test]
    fn more_than_a_vm_can_have_are_refused() {
        let names: Vec<String> = (0..=MAX_SERVED_DEVICES).map(|n| format!("d{n}")).collect();
        let listed = listed(&names);
        assert!(asked(&names[1..].join(","), &listed).is_ok());
        assert!(matches!(asked(&names.join(","), &listed), Err(VhostUserError::TooMany)));
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let listed = listed(&["a".into(), "b".into()]);
        assert!(matches!(listed[0].kind, Kind::Block { .. }));
        let served = served(&listed, &[4, 5]).unwrap();
        assert_eq!(served.iter().map(|device| device.disk).collect::<Vec<_>>(), [4, 5]);
        assert!(matches!(super::served(&listed, &[4]), Err(VhostUserError::Numbers)));
    }
}
