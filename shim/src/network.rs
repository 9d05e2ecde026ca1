//! The pod's network: what CNI made in the pod's network namespace, given to the VM.
//!
//! Each interface of the namespace gets a tap beside it, and traffic control joins the two: what
//! comes in at one goes out at the other, so that the guest stands where the namespace stood. The
//! interface keeps its addresses; nothing reaches the namespace's own stack any more. The guest
//! is told names, addresses, routes and neighbours by the agent. An interface of a virtual function
//! gets no tap but goes to the guest with its function, see [`functions`]. What CNI chose for a function
//! that has no interface there, it has written down: see [`chosen`].
//!
//! Three steps, so that what is to be undone is on disk before it is done: [`look`] changes
//! nothing, [`attach`] makes taps and joins them, [`detach`] takes both back, after a crash too.
//! Each runs on a thread that enters the namespace and ends in it. What changes there later is seen
//! by [`Followed`], and told by a [`difference()`].

pub mod chosen;
pub(crate) mod described;
mod difference;
mod follow;
pub mod functions;
mod steer;
mod tap;
mod traffic;
pub mod vhost;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use self::functions::Moved;
pub use self::{
    difference::difference,
    follow::{Followed, Known, Looked, of_joints},
    steer::Loopback,
};
use crate::{
    agent::AgentError,
    config::VhostNet,
    devices::{DeviceError, address::Address, pci::Sysfs},
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use vial_agent_protocol::{
    MAX_ADDRESSES, MAX_INTERFACES, MAX_NEIGHBOURS, MAX_ROUTES,
    agent::{self, ConfigureNetworkRequest},
};
use vial_netlink::{
    Socket, Watch,
    network::{self, ARPHRD_ETHER, IFF_LOOPBACK, IFF_UP, Link},
};
use vial_vmm_api::NETWORK_PAIRS;

/// Why the pod's network cannot be given to the VM.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace {path}: {error}; CNI has to make it first")]
    Enter {
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// The namespace is the host's.
    #[error(
        "the network namespace {0} is the host's own, which a microVM cannot share; run pods \
         with hostNetwork with another runtime"
    )]
    Host(PathBuf),
    /// There is more in it than a guest can have.
    #[error("the pod's network has {count} {what}, more than the {limit} that a VM can have")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there can be.
        limit: usize,
    },
    /// An interface's address or MTU is none that the VM can have.
    #[error(
        "the interface {0} of the pod's network has no MAC address of its own, or no MTU of 68 to 65535"
    )]
    Interface(String),
    /// Somebody uses what joins the interface with the tap.
    #[error(
        "the interface {0} of the pod's network has an ingress queueing discipline already, \
         which the VM needs for itself; configure CNI without a plugin that adds one there"
    )]
    Ingress(String),
    /// What is to go to the guest cannot.
    #[error(
        "{interfaces} of the pod's network cannot be given to the VM with its PCI function: {error}; \
         without its driver in `network_functions` of Vial's configuration, it is joined with a tap"
    )]
    Function {
        /// Their names.
        interfaces: String,
        /// What went wrong.
        error: DeviceError,
    },
    /// What CNI has chosen cannot be told.
    #[error(transparent)]
    Choice(#[from] chosen::ChoiceError),
    /// The guest's interface of a function cannot be what CNI has chosen.
    #[error(
        "cannot make {interface} of the PCI function {address} what CNI has chosen for it: {error}; with \
         `cni_caches = []` in Vial's configuration, such interfaces are left to the container"
    )]
    Chosen {
        /// Its name.
        interface: String,
        /// Its function.
        address: Address,
        /// What went wrong.
        error: AgentError,
    },
    /// The driver does not make the interface.
    #[error(
        "{interface} is not back in the pod's network: the driver of the PCI function {address} has \
         made no interface; the kernel's log may say why"
    )]
    NotBack {
        /// Its name.
        interface: String,
        /// Its function.
        address: Address,
    },
    /// No tap can be made.
    #[error("cannot make a tap in the pod's network: {0}; `modprobe tun` may help")]
    Tap(io::Error),
    /// The kernel refused a step.
    #[error("cannot {action} in the pod's network: {error}{remedy}")]
    Kernel {
        /// What was tried.
        action: String,
        /// What went wrong.
        error: io::Error,
        /// What may help, after a semicolon, or nothing.
        remedy: &'static str,
    },
}

fn kernel(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let action = action.into();
    move |error| NetworkError::Kernel { action, error, remedy: "" }
}

/// What is to be undone in a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The namespace's path.
    pub namespace: PathBuf,
    /// The namespace's inode: another one at that path is none of ours.
    pub inode: u64,
    /// What is joined in it.
    pub joints: Vec<Joint>,
    /// What is in the guest in place of being in it.
    #[serde(default)]
    pub functions: Vec<Moved>,
}

/// An interface and its tap, by their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joint {
    /// The interface that CNI made.
    pub interface: String,
    /// The tap beside it.
    pub tap: String,
}

/// A namespace's network, looked at.
#[derive(Debug)]
pub struct Network {
    /// What [`attach`] will do.
    pub attachment: Attachment,
    /// What the guest is to have.
    pub request: ConfigureNetworkRequest,
}

/// The host's end of one of the guest's interfaces.
#[derive(Debug)]
pub struct Tap {
    /// Its queues, made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`: of several, the first is attached.
    pub queues: Vec<OwnedFd>,
    /// What carries the packets of each; the VMM does without any.
    pub vhosts: Vec<File>,
    /// The guest's address.
    pub mac: [u8; 6],
    /// The largest that the guest's driver allows, in bytes: the agent sets what the interface has, and
    /// that may be raised.
    pub mtu: u16,
}

/// Runs `work` in a namespace, on a thread of its own, which never comes back from there.
fn inside<T: Send>(
    path: &Path,
    namespace: &File,
    work: impl FnOnce(&mut Socket) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let enter = || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| NetworkError::Enter { path: path.into(), error: error.into() })?;
        work(&mut Socket::open().map_err(kernel("open a netlink socket"))?)
    };
    std::thread::scope(|scope| match scope.spawn(enter).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn open(path: &Path) -> Result<(File, u64), NetworkError> {
    let enter = |error| NetworkError::Enter { path: path.into(), error };
    let namespace = File::open(path).map_err(enter)?;
    let found = namespace.metadata().map_err(enter)?;
    let own = std::fs::metadata("/proc/self/ns/net").map_err(enter)?;
    if (found.dev(), found.ino()) == (own.dev(), own.ino()) {
        return Err(NetworkError::Host(path.into()));
    }
    Ok((namespace, found.ino()))
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), NetworkError> {
    if count > limit {
        return Err(NetworkError::TooMany { what, count, limit });
    }
    Ok(())
}

/// Reads what is in the namespace at `path`, and changes nothing. Virtual functions of the
/// `drivers` are to go to the guest.
///
/// # Errors
/// [`NetworkError`].
pub fn look(path: &Path, drivers: &[String]) -> Result<Network, NetworkError> {
    let (namespace, inode) = open(path)?;
    let (joints, functions, request) =
        inside(path, &namespace, |socket| look_around(socket, drivers))?;
    let attachment = Attachment { namespace: path.into(), inode, joints, functions };
    Ok(Network { attachment, request })
}

/// Whether a guest gets an interface like it: what CNI made is Ethernet and up, unlike the
/// tunnels that a kernel puts into every namespace.
fn is_for_guests(link: &Link) -> bool {
    link.hardware == ARPHRD_ETHER && link.flags & IFF_UP != 0 && link.flags & IFF_LOOPBACK == 0
}

/// What there is in a namespace.
struct Listed {
    links: Vec<Link>,
    addresses: Vec<(i32, network::Cidr)>,
    routes: Vec<network::Route>,
    neighbours: Vec<network::Neighbour>,
}

impl Listed {
    fn read(socket: &mut Socket) -> Result<Self, NetworkError> {
        Ok(Self {
            links: network::links(socket).map_err(kernel("list the interfaces"))?,
            addresses: network::addresses(socket).map_err(kernel("list the addresses"))?,
            routes: network::routes(socket).map_err(kernel("list the routes"))?,
            neighbours: network::neighbours(socket).map_err(kernel("list the neighbours"))?,
        })
    }

    /// What the guest is to have of these interfaces.
    fn describe(&self, links: &[&Link]) -> Result<ConfigureNetworkRequest, NetworkError> {
        at_most("interfaces", links.len(), MAX_INTERFACES)?;
        let mut request = ConfigureNetworkRequest::default();
        for link in links {
            let name = &link.name;
            if link.mac.len() != 6 || !(68..=65535).contains(&link.mtu) {
                return Err(NetworkError::Interface(name.clone()));
            }
            let own = self.addresses.iter().filter(|(index, _)| *index == link.index);
            let addresses: Vec<String> = own.map(|(_, cidr)| cidr.to_string()).collect();
            at_most("addresses on an interface", addresses.len(), MAX_ADDRESSES)?;
            let own = self.routes.iter().filter(|route| route.index == link.index);
            request.routes.extend(own.map(|route| wire_route(name, route)));
            let own = self.neighbours.iter().filter(|neighbour| neighbour.index == link.index);
            request.neighbours.extend(own.map(|neighbour| agent::Neighbour {
                device: name.clone(),
                address: neighbour.address.to_string(),
                mac: neighbour.mac.to_vec(),
                ..Default::default()
            }));
            request.interfaces.push(agent::Interface {
                name: name.clone(),
                mac: link.mac.clone(),
                mtu: link.mtu,
                addresses,
                ..Default::default()
            });
        }
        // Those that are on the link first, of all interfaces: the others need them.
        request.routes.sort_by_key(|route| !route.gateway.is_empty());
        at_most("routes", request.routes.len(), MAX_ROUTES)?;
        at_most("neighbours", request.neighbours.len(), MAX_NEIGHBOURS)?;
        Ok(request)
    }
}

fn look_around(
    socket: &mut Socket,
    drivers: &[String],
) -> Result<(Vec<Joint>, Vec<Moved>, ConfigureNetworkRequest), NetworkError> {
    let listed = Listed::read(socket)?;
    let all = &listed.links;
    let links: Vec<&Link> = all.iter().filter(|link| is_for_guests(link)).collect();
    let request = listed.describe(&links)?;
    let taken = traffic::with_ingress(socket).map_err(kernel("list the queueing disciplines"))?;
    let mut free =
        (0..).map(|n| format!("vtap{n}")).filter(|name| all.iter().all(|l| l.name != *name));
    let (mut joints, mut functions) = (Vec::new(), Vec::new());
    let sysfs = Sysfs::default();
    for link in links {
        let interface = link.name.clone();
        match functions::of(&sysfs, drivers, link, all) {
            Some(function) => functions.push(function),
            None if taken.contains(&link.index) => return Err(NetworkError::Ingress(interface)),
            // There are more numbers than interfaces.
            None => joints.extend(free.next().map(|tap| Joint { interface, tap })),
        }
    }
    Ok((joints, functions, request))
}

fn wire_route(device: &str, route: &network::Route) -> agent::Route {
    let text = |address: Option<std::net::IpAddr>| {
        address.map(|address| address.to_string()).unwrap_or_default()
    };
    agent::Route {
        device: device.into(),
        destination: route.destination.to_string(),
        gateway: text(route.gateway),
        source: text(route.source),
        scope: route.scope.into(),
        protocol: route.protocol.into(),
        metric: route.metric,
        onlink: route.onlink,
        ..Default::default()
    }
}

/// How the packets of a VM's interfaces are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// Whether the kernel is to do it.
    pub vhost: VhostNet,
    /// In how many pairs of queues, each of which another vCPU can serve.
    pub pairs: u8,
}

impl Carried {
    /// For a VM that has so many vCPUs.
    pub fn of(vhost: VhostNet, vcpus: u8) -> Self {
        Self { vhost, pairs: vcpus.clamp(*NETWORK_PAIRS.start(), *NETWORK_PAIRS.end()) }
    }
}

/// Makes a tap for each interface of a network that goes to the guest without a function, and joins
/// the two. Their packets are to be `carried` so.
///
/// # Errors
/// [`NetworkError`]. What was done stays, for [`detach`].
pub fn attach(network: &Network, carried: Carried) -> Result<Vec<Tap>, NetworkError> {
    let Attachment { namespace: path, joints, .. } = &network.attachment;
    let (namespace, _) = open(path)?;
    inside(path, &namespace, |socket| {
        let interfaces = &network.request.interfaces;
        let of = |joint: &Joint| interfaces.iter().find(|one| one.name == joint.interface);
        let made = joints.iter().filter_map(|joint| Some((joint, of(joint)?)));
        made.map(|(joint, interface)| join(socket, joint, interface, carried)).collect()
    })
}

fn join(
    socket: &mut Socket,
    joint: &Joint,
    interface: &agent::Interface,
    carried: Carried,
) -> Result<Tap, NetworkError> {
    let wrong = || NetworkError::Interface(interface.name.clone());
    let mac = interface.mac.as_slice().try_into().map_err(|_| wrong())?;
    let queues = tap::make(&joint.tap, carried.pairs).map_err(NetworkError::Tap)?;
    let links = network::links(socket).map_err(kernel("list the interfaces"))?;
    let (outside, tap) = (index(&links, &joint.interface)?, index(&links, &joint.tap)?);
    let set = kernel(format!("set up {}", joint.tap));
    socket
        .change(traffic::without_own_address(tap))
        // A kernel without IPv6 has no such setting and needs none.
        .or_else(|error| match error.kind() {
            io::ErrorKind::Unsupported => Ok(()),
            _ => Err(error),
        })
        .and_then(|()| socket.change(network::set_mtu(tap, interface.mtu)))
        .map_err(kernel(format!("set up {}", joint.tap)))?;
    if queues.len() > 1
        && let Err(error) = socket.change(traffic::without_discipline(tap))
    {
        tracing::debug!("{} has the default queueing discipline: {error}", joint.tap);
    }
    socket.change(network::up(tap)).map_err(set)?;
    redirect(socket, joint, (outside, tap))?;
    let vhosts = vhost::open(carried.vhost, queues.len());
    Ok(Tap { queues, vhosts, mac, mtu: u16::MAX })
}

/// Lets what comes in at an interface or its tap go out at the other.
fn redirect(
    socket: &mut Socket,
    joint: &Joint,
    (outside, tap): (i32, i32),
) -> Result<(), NetworkError> {
    for (from, to) in [(outside, tap), (tap, outside)] {
        let refused = |error| NetworkError::Kernel {
            action: format!("redirect between {} and {}", joint.interface, joint.tap),
            error,
            remedy: "; `modprobe -a sch_ingress cls_matchall act_mirred` may help",
        };
        socket.change(traffic::add_ingress(from)).map_err(refused)?;
        socket.change(traffic::redirect(from, to)).map_err(refused)?;
    }
    Ok(())
}

fn index(links: &[Link], name: &str) -> Result<i32, NetworkError> {
    let link = links.iter().find(|link| link.name == name);
    let absent = || kernel(format!("find {name}"))(io::ErrorKind::NotFound.into());
    link.map(|link| link.index).ok_or_else(absent)
}

/// Makes a tap for an interface that has come after [`attach`], and joins the two, as there.
///
/// # Errors
/// [`NetworkError`]. What was done stays, for [`detach`].
pub fn attach_late(
    attachment: &Attachment,
    joint: &Joint,
    interface: &agent::Interface,
    carried: Carried,
) -> Result<Tap, NetworkError> {
    inside_again(attachment, |socket| {
        free_of_ingress(socket, joint)?;
        join(socket, joint, interface, carried)
    })
}

/// Joins a tap with an interface that has come in place of the one that it was made for.
///
/// # Errors
/// [`NetworkError`].
pub fn attach_again(attachment: &Attachment, joint: &Joint) -> Result<(), NetworkError> {
    inside_again(attachment, |socket| {
        let outside = free_of_ingress(socket, joint)?;
        let links = network::links(socket).map_err(kernel("list the interfaces"))?;
        let tap = index(&links, &joint.tap)?;
        // It still leads to the one that has gone.
        gone_is_fine(socket.change(traffic::delete_ingress(tap)))
            .map_err(kernel(format!("release {}", joint.tap)))?;
        redirect(socket, joint, (outside, tap))
    })
}

/// The number of the interface, if nobody filters what comes in there.
fn free_of_ingress(socket: &mut Socket, joint: &Joint) -> Result<i32, NetworkError> {
    let links = network::links(socket).map_err(kernel("list the interfaces"))?;
    let taken = traffic::with_ingress(socket).map_err(kernel("list the queueing disciplines"))?;
    let index = index(&links, &joint.interface)?;
    match taken.contains(&index) {
        true => Err(NetworkError::Ingress(joint.interface.clone())),
        false => Ok(index),
    }
}

/// Runs `work` in the namespace that was joined, if it has its name yet.
fn inside_again<T: Send>(
    attachment: &Attachment,
    work: impl FnOnce(&mut Socket) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let path = &attachment.namespace;
    let (namespace, inode) = open(path)?;
    if inode != attachment.inode {
        let error = io::ErrorKind::NotFound.into();
        return Err(NetworkError::Enter { path: path.clone(), error });
    }
    inside(path, &namespace, work)
}

/// Takes the loopback of the namespace at `path`, to which nothing but forwarded ports connects.
///
/// # Errors
/// [`NetworkError`].
pub fn take_loopback(path: &Path) -> Result<Loopback, NetworkError> {
    let (namespace, _) = open(path)?;
    inside(path, &namespace, |_| {
        Loopback::take(namespace.as_fd()).map_err(kernel("take the connections to 127.0.0.1"))
    })
}

/// Watches the namespace for changes of what a guest was given of it by [`attach`].
///
/// # Errors
/// [`NetworkError`].
pub fn follow(attachment: &Attachment) -> Result<Followed, NetworkError> {
    let path = &attachment.namespace;
    let (namespace, _) = open(path)?;
    let (watch, socket) = inside(path, &namespace, |_| {
        let watch = Watch::open().map_err(kernel("watch for changes"))?;
        // One that outlives this thread, and stays in the namespace.
        let socket = Socket::open().map_err(kernel("open a netlink socket"))?;
        Ok((watch, socket))
    })?;
    Followed::new(watch, socket, &attachment.joints)
}

/// Takes back what [`attach`] did, as far as it got, and puts the interfaces of functions back that
/// were given back to their drivers. A namespace that is gone took it along.
///
/// # Errors
/// [`NetworkError`].
pub fn detach(attachment: &Attachment) -> Result<(), NetworkError> {
    let path = &attachment.namespace;
    let (namespace, inode) = match open(path) {
        Ok(opened) => opened,
        Err(NetworkError::Enter { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    if inode != attachment.inode {
        return Ok(());
    }
    let put_back = functions::put_back(path, &namespace, &attachment.functions);
    let detached = inside(path, &namespace, |socket| {
        let links = network::links(socket).map_err(kernel("list the interfaces"))?;
        let taken =
            traffic::with_ingress(socket).map_err(kernel("list the queueing disciplines"))?;
        let find = |name: &str| links.iter().find(|link| link.name == name).map(|link| link.index);
        for Joint { interface, tap } in &attachment.joints {
            if let Some(index) = find(interface).filter(|index| taken.contains(index)) {
                gone_is_fine(socket.change(traffic::delete_ingress(index)))
                    .map_err(kernel(format!("release {interface}")))?;
            }
            if let Some(index) = find(tap) {
                gone_is_fine(socket.change(traffic::delete_link(index)))
                    .map_err(kernel(format!("delete {tap}")))?;
            }
        }
        Ok(())
    });
    detached.and(put_back)
}

/// CNI may delete the same things at the same time.
fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result.map_err(|error| (error.raw_os_error(), error)) {
        Ok(()) => Ok(()),
        Err((Some(code), _)) if traffic::GONE.contains(&code) => Ok(()),
        Err((_, error)) => Err(error),
    }
}

#[cfg(test)]
mod tests;
