//! What a guest was given of a namespace, looked at again when something has changed there.
//!
//! Both sockets stay in the namespace, so that nobody has to enter it again, and it may lose its
//! name meanwhile.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, BorrowedFd},
};

use vial_agent_protocol::agent::{ConfigureNetworkRequest, Interface};
use vial_netlink::{Socket, Watch, network::Link};

use super::{Joint, Listed, NetworkError, index, is_for_guests, kernel};

/// An interface that is, or was, joined with a tap.
#[derive(Debug, Clone)]
pub struct Known {
    /// The two.
    pub joint: Joint,
    /// Its number while it is in the namespace. Another that comes with its name is not joined.
    index: Option<i32>,
    /// The number of the device in the VM, if that came while it ran.
    pub device: Option<u8>,
}

/// What a look has shown.
#[derive(Debug, Default)]
pub struct Looked {
    /// What the guest is to have of the interfaces that are joined.
    pub now: ConfigureNetworkRequest,
    /// Interfaces that the guest could have, and has not. Each is told of once.
    pub came: Vec<Interface>,
    /// Those that are in the namespace no more.
    pub went: Vec<Known>,
}

/// A namespace that is watched.
#[derive(Debug)]
pub struct Followed {
    watch: Watch,
    socket: Socket,
    known: Vec<Known>,
    /// The numbers of those that came and are not joined.
    left: BTreeSet<i32>,
}

impl Followed {
    pub(super) fn new(
        watch: Watch,
        mut socket: Socket,
        joints: &[Joint],
    ) -> Result<Self, NetworkError> {
        let listed = Listed::read(&mut socket)?;
        let known = joints.iter().map(|joint| Known {
            joint: joint.clone(),
            index: index(&listed.links, &joint.interface).ok(),
            device: None,
        });
        let known = known.collect();
        Ok(Self { watch, socket, known, left: BTreeSet::new() })
    }

    /// Takes what was told of changes up to now. Returns whether it is worth to look.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn drain(&self) -> Result<bool, NetworkError> {
        self.watch.drain().map_err(kernel("watch for changes"))
    }

    /// Looks at the namespace.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn look(&mut self) -> Result<Looked, NetworkError> {
        let listed = Listed::read(&mut self.socket)?;
        let is_there = |index: i32| listed.links.iter().any(|link| link.index == index);
        let links: Vec<Link> = listed.links.iter().filter_map(|link| self.joined(link)).collect();
        let now = listed.describe(&links.iter().collect::<Vec<_>>())?;
        let mut looked = Looked { now, ..Looked::default() };
        for known in &mut self.known {
            if known.index.take_if(|index| !is_there(*index)).is_some() {
                looked.went.push(known.clone());
            }
        }
        self.left.retain(|index| is_there(*index));
        let new: Vec<&Link> = listed.links.iter().filter(|link| self.is_new(link)).collect();
        for link in new {
            self.left.insert(link.index);
            match listed.describe(&[link]) {
                Ok(described) => looked.came.extend(described.interfaces),
                Err(error) => tracing::warn!("the guest does not get {}: {error}", link.name),
            }
        }
        Ok(looked)
    }

    /// The interface as the guest calls it, if the guest has it.
    fn joined(&self, link: &Link) -> Option<Link> {
        let known = self.known.iter().find(|known| known.index == Some(link.index))?;
        let name = known.joint.interface.clone();
        is_for_guests(link).then(|| Link { name, ..link.clone() })
    }

    fn is_new(&self, link: &Link) -> bool {
        is_for_guests(link)
            && !self.left.contains(&link.index)
            && self
                .known
                .iter()
                .all(|known| known.index != Some(link.index) && known.joint.tap != link.name)
    }

    /// The interface of that name, which is in the namespace no more.
    pub fn absent(&self, name: &str) -> Option<&Known> {
        let is = |known: &&Known| known.joint.interface == name && known.index.is_none();
        self.known.iter().find(is)
    }

    /// A joint for an interface of that name, with a tap that none has.
    pub fn draw_joint(&self, name: &str) -> Joint {
        let is_free = |tap: &String| self.known.iter().all(|known| known.joint.tap != *tap);
        // There are more numbers than interfaces.
        let tap = (0..).map(|n| format!("vtap{n}")).find(is_free).unwrap_or_default();
        Joint { interface: name.into(), tap }
    }

    /// How many interfaces the guest has of the namespace, or had.
    pub fn count(&self) -> usize {
        self.known.len()
    }

    /// An interface is joined now, and the guest has it, by the device of that number if it came
    /// while the VM ran.
    ///
    /// # Errors
    /// [`NetworkError`]: it has gone meanwhile.
    pub fn add(&mut self, joint: Joint, device: Option<u8>) -> Result<(), NetworkError> {
        let index = index(&Listed::read(&mut self.socket)?.links, &joint.interface)?;
        match self.known.iter_mut().find(|known| known.joint == joint) {
            Some(known) => known.index = Some(index),
            None => self.known.push(Known { joint, index: Some(index), device }),
        }
        self.left.remove(&index);
        Ok(())
    }

    /// The guest has an interface no more.
    pub fn remove(&mut self, joint: &Joint) {
        self.known.retain(|known| known.joint != *joint);
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

#[cfg(test)]
mod tests {
    use vial_netlink::{Message, NLM_F_CREATE, network};

    use super::{super::steer::tests::in_a_namespace, *};

    /// rtnetlink(7), linux/if_link.h.
    const RTM_NEWLINK: u16 = 16;
    const RTM_DELLINK: u16 = 17;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;

    /// Makes an interface, whose other end stays down, and brings it up.
    fn make(socket: &mut Socket, name: &str) {
        let pair = Message::new(RTM_NEWLINK, NLM_F_CREATE, &network::link_header(0, 0, 0))
            .with_text(IFLA_IFNAME, name)
            .with_nested(IFLA_LINKINFO, |info| info.with_text(IFLA_INFO_KIND, "veth"));
        socket.change(pair).unwrap();
        let links = network::links(socket).unwrap();
        socket.change(network::up(index(&links, name).unwrap())).unwrap();
    }

    fn delete(socket: &mut Socket, name: &str) {
        let index = index(&network::links(socket).unwrap(), name).unwrap();
        let fixed = network::link_header(index, 0, 0);
        socket.change(Message::new(RTM_DELLINK, 0, &fixed)).unwrap();
    }

    fn names(interfaces: &[Interface]) -> Vec<&str> {
        interfaces.iter().map(|interface| interface.name.as_str()).collect()
    }

    #[test]
    fn interfaces_that_come_are_told_once_and_those_that_go_are_too() {
        in_a_namespace(|_| {
            let mut socket = Socket::open().unwrap();
            let joint = Joint { interface: "eth0".into(), tap: "vtap0".into() };
            for name in ["eth0", "vtap0"] {
                make(&mut socket, name);
            }
            let own = [joint.clone()];
            let watch = Watch::open().unwrap();
            let mut followed = Followed::new(watch, Socket::open().unwrap(), &own).unwrap();
            assert!(!followed.drain().unwrap());
            let looked = followed.look().unwrap();
            assert_eq!(names(&looked.now.interfaces), ["eth0"]);
            assert!(looked.came.is_empty() && looked.went.is_empty());

            make(&mut socket, "net1");
            assert!(followed.drain().unwrap());
            assert_eq!(names(&followed.look().unwrap().came), ["net1"]);
            let looked = followed.look().unwrap();
            assert!(looked.came.is_empty() && looked.now.interfaces.len() == 1);
            let late = followed.draw_joint("net1");
            assert_eq!(late.tap, "vtap1");
            followed.add(late.clone(), Some(7)).unwrap();
            assert_eq!(names(&followed.look().unwrap().now.interfaces), ["eth0", "net1"]);

            for name in ["eth0", "net1"] {
                delete(&mut socket, name);
            }
            let looked = followed.look().unwrap();
            assert!(looked.now.interfaces.is_empty());
            let went: Vec<_> =
                looked.went.iter().map(|known| (&known.joint, known.device)).collect();
            assert_eq!(went, [(&joint, None), (&late, Some(7))]);
            assert!(followed.look().unwrap().went.is_empty());
            followed.remove(&late);

            // What the guest has begun with is known when it comes again.
            make(&mut socket, "eth0");
            assert_eq!(names(&followed.look().unwrap().came), ["eth0"]);
            assert_eq!(followed.absent("eth0").unwrap().joint, joint);
            assert!(followed.absent("net1").is_none());
            followed.add(joint, None).unwrap();
            assert_eq!((followed.count(), followed.absent("eth0").is_none()), (1, true));
            assert_eq!(names(&followed.look().unwrap().now.interfaces), ["eth0"]);
        });
    }
}
