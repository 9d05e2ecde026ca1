//! What a guest was given of a namespace, looked at again when something has changed there.
//!
//! Both sockets stay in the namespace, so that nobody has to enter it again, and it may lose its
//! name meanwhile.

use std::os::fd::{AsFd, BorrowedFd};

use vial_agent_protocol::agent::ConfigureNetworkRequest;
use vial_netlink::{Socket, Watch, network::Link};

use super::{Joint, Listed, NetworkError, is_for_guests, kernel};

/// A namespace that is watched.
#[derive(Debug)]
pub struct Followed {
    watch: Watch,
    socket: Socket,
    /// The number of each interface that is joined with a tap, and what the guest calls it. Another
    /// that comes with its name is not joined.
    interfaces: Vec<(i32, String)>,
}

impl Followed {
    pub(super) fn new(
        watch: Watch,
        mut socket: Socket,
        joints: &[Joint],
    ) -> Result<Self, NetworkError> {
        let listed = Listed::read(&mut socket)?;
        let interfaces = joints.iter().filter_map(|joint| {
            let link = listed.links.iter().find(|link| link.name == joint.interface)?;
            Some((link.index, link.name.clone()))
        });
        let interfaces = interfaces.collect();
        Ok(Self { watch, socket, interfaces })
    }

    /// Takes what was told of changes up to now. Returns whether it is worth to look.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn drain(&self) -> Result<bool, NetworkError> {
        self.watch.drain().map_err(kernel("watch for changes"))
    }

    /// What the guest is to have of the interfaces that it has.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn look(&mut self) -> Result<ConfigureNetworkRequest, NetworkError> {
        let listed = Listed::read(&mut self.socket)?;
        let links: Vec<Link> = listed.links.iter().filter_map(|link| self.joined(link)).collect();
        listed.describe(&links.iter().collect::<Vec<_>>())
    }

    /// The interface as the guest calls it, if the guest has it.
    fn joined(&self, link: &Link) -> Option<Link> {
        let (_, name) = self.interfaces.iter().find(|(index, _)| *index == link.index)?;
        is_for_guests(link).then(|| Link { name: name.clone(), ..link.clone() })
    }
}

impl AsFd for Followed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

/// What of a description is about interfaces that are joined with taps: those of functions and of
/// backends are no longer, or never were, in the namespace.
pub fn of_joints(described: &ConfigureNetworkRequest, joints: &[Joint]) -> ConfigureNetworkRequest {
    let joined = |name: &str| joints.iter().any(|joint| joint.interface == name);
    let mut own = described.clone();
    own.interfaces.retain(|interface| joined(&interface.name));
    own.routes.retain(|route| joined(&route.device));
    own.neighbours.retain(|neighbour| joined(&neighbour.device));
    own
}
