//! Changes of the pod's network while the guest runs.
//!
//! A request names what the shim gave and what it is to be now. What containers have set themselves
//! is in no request, and stays: routes are added beside those to the same place, and one is removed
//! only if it is there with all that it was given with.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use vial_agent_protocol::agent::{ChangeNetworkRequest, InterfaceChange};
use vial_agent_protocol::{MAX_ADDRESSES, MAX_INTERFACES, MAX_NEIGHBOURS, MAX_ROUTES};
use vial_netlink::network::{self, Cidr, CidrError, Link, Neighbour, Route};
use vial_netlink::{Message, Socket};

use super::{
    FUNCTIONS, MTU, NetworkError, add_route, apply, at_most, await_interfaces, bring_to_pod,
    exists, is_name, mac, read_function, read_neighbour, read_route, shown,
};

/// What the kernel answers when there is nothing to be removed.
const GONE: [Errno; 5] =
    [Errno::NOENT, Errno::NODEV, Errno::NXIO, Errno::SRCH, Errno::ADDRNOTAVAIL];

#[derive(Debug)]
struct Interface {
    /// Into the names.
    place: i32,
    mac: Option<[u8; 6]>,
    mtu: Option<u32>,
    comes: bool,
    /// The address of the PCI function that it is of, if it comes and is one's.
    function: Option<String>,
    goes: bool,
    added: Vec<Cidr>,
    removed: Vec<Cidr>,
}

/// A checked request. Everything has an index into `names` in place of one of the kernel's.
#[derive(Debug, Default)]
struct Change {
    names: Vec<String>,
    interfaces: Vec<Interface>,
    added_routes: Vec<Route>,
    removed_routes: Vec<Route>,
    added_neighbours: Vec<Neighbour>,
    removed_neighbours: Vec<Neighbour>,
}

impl Change {
    fn read(request: &ChangeNetworkRequest) -> Result<Self, NetworkError> {
        at_most("interfaces", request.interfaces.len(), MAX_INTERFACES)?;
        let mut change = Self::default();
        for wire in &request.interfaces {
            let interface = change.read_interface(wire)?;
            change.interfaces.push(interface);
        }
        for (wire, added) in [(&request.added_routes, true), (&request.removed_routes, false)] {
            at_most("routes", wire.len(), MAX_ROUTES)?;
            let routes = wire.iter().map(|one| read_route(one, change.place(&one.device)?));
            let routes = routes.collect::<Result<_, _>>()?;
            *(if added { &mut change.added_routes } else { &mut change.removed_routes }) = routes;
        }
        let neighbours = [(&request.added_neighbours, true), (&request.removed_neighbours, false)];
        for (wire, added) in neighbours {
            at_most("neighbours", wire.len(), MAX_NEIGHBOURS)?;
            let read = wire.iter().map(|one| read_neighbour(one, change.place(&one.device)?));
            let read = read.collect::<Result<_, _>>()?;
            *(if added { &mut change.added_neighbours } else { &mut change.removed_neighbours }) =
                read;
        }
        Ok(change)
    }

    fn read_interface(&mut self, wire: &InterfaceChange) -> Result<Interface, NetworkError> {
        let cidrs = |texts: &[String]| -> Result<Vec<Cidr>, NetworkError> {
            at_most("addresses on an interface", texts.len(), MAX_ADDRESSES)?;
            Ok(texts.iter().map(|text| text.parse()).collect::<Result<_, CidrError>>()?)
        };
        let place = self.place(&wire.name)?;
        if self.interfaces.iter().any(|other| other.place == place) {
            return Err(NetworkError::Name(shown(&wire.name)));
        }
        if wire.mtu != 0 && !MTU.contains(&wire.mtu) {
            return Err(NetworkError::Mtu { name: wire.name.clone(), mtu: wire.mtu });
        }
        let mac = if wire.mac.is_empty() { None } else { Some(mac(&wire.mac)?) };
        let function = read_function(wire.function)?;
        let is_same = |other: &Interface| function.is_some() && other.function == function;
        if function.is_some() && !wire.comes || self.interfaces.iter().any(is_same) {
            return Err(NetworkError::Function(wire.function));
        }
        Ok(Interface {
            place,
            mac: mac.filter(|mac| *mac != [0; 6]),
            mtu: Some(wire.mtu).filter(|mtu| *mtu != 0),
            comes: wire.comes,
            function,
            goes: wire.goes,
            added: cidrs(&wire.added_addresses)?,
            removed: cidrs(&wire.removed_addresses)?,
        })
    }

    fn place(&mut self, name: &str) -> Result<i32, NetworkError> {
        let place = self.names.iter().position(|known| known == name);
        if let Some(place) = place {
            return Ok(place as i32);
        }
        // All that have a place are interfaces of the pod.
        at_most("interfaces", self.names.len() + 1, 2 * MAX_INTERFACES)?;
        if !is_name(name) || name == "lo" {
            return Err(NetworkError::Name(shown(name)));
        }
        self.names.push(name.to_owned());
        Ok(self.names.len() as i32 - 1)
    }
}

/// Waits until the drivers of functions have made the interfaces that come.
///
/// # Errors
/// [`NetworkError`]; nothing is changed.
pub(crate) async fn await_change(request: &ChangeNetworkRequest) -> Result<(), NetworkError> {
    let Change { names, interfaces, .. } = Change::read(request)?;
    let of_function =
        |one: Interface| Some((names.get(one.place as usize)?.clone(), one.function?));
    await_interfaces(Path::new(FUNCTIONS), interfaces.into_iter().filter_map(of_function)).await
}

/// Changes the guest's network as far as that goes.
///
/// # Errors
/// [`NetworkError`]: the request is wrong and nothing is changed, or some of it cannot be done.
pub(crate) fn change(request: &ChangeNetworkRequest) -> Result<(), NetworkError> {
    let change = Change::read(request)?;
    let failed = |action: &str| {
        let action = action.to_owned();
        move |source| NetworkError::Kernel { action, source }
    };
    let comes = |link: &Link| {
        change.interfaces.iter().any(|interface| interface.comes && is_new(link, interface))
    };
    bring_to_pod(comes)?;
    let mut socket = Socket::open().map_err(failed("open a netlink socket"))?;
    let links = network::links(&mut socket).map_err(failed("list the interfaces"))?;
    let mut changing = Changing { socket, indices: Vec::new(), failures: Vec::new() };
    changing.indices = change.names.iter().map(|name| find(&links, name)).collect();
    changing.run(&change)
}

fn find(links: &[Link], name: &str) -> Option<i32> {
    links.iter().find(|link| link.name == name).map(|link| link.index)
}

/// Whether it is the one that has come. What containers make of an interface can have its address, but
/// is up as a rule.
fn is_new(link: &Link, interface: &Interface) -> bool {
    match &interface.function {
        Some(function) => link.function.as_ref() == Some(function),
        None => {
            interface.mac.is_some_and(|mac| link.mac == mac) && link.flags & network::IFF_UP == 0
        }
    }
}

/// A function's interface that has the name of another by chance, since drivers count theirs in the order
/// in which functions were found. One that is not up nobody uses yet: the two change names.
fn in_the_way<'a>(links: &'a [Link], name: &str) -> Option<&'a Link> {
    links.iter().find(|link| {
        link.name == name && link.function.is_some() && link.flags & network::IFF_UP == 0
    })
}

/// What remains to be told when all is tried.
struct Changing {
    socket: Socket,
    /// The kernel's, of each name.
    indices: Vec<Option<i32>>,
    failures: Vec<NetworkError>,
}

impl Changing {
    fn run(mut self, change: &Change) -> Result<(), NetworkError> {
        let there = match network::routes(&mut self.socket) {
            _ if change.removed_routes.is_empty() => Vec::new(),
            Ok(routes) => routes,
            Err(source) => {
                let action = "list the routes".into();
                self.failures.push(NetworkError::Kernel { action, source });
                Vec::new()
            }
        };
        for interface in &change.interfaces {
            self.change_link(change, interface);
        }
        // What takes the place of another first, so that there is none of the two at no time.
        let later = self.add_routes(change);
        for route in &change.removed_routes {
            let Some(index) = self.index(route.index) else { continue };
            let route = Route { index, ..*route };
            if there.contains(&route) {
                self.remove(network::remove_route(&route), || {
                    format!("remove the route to {}", route.destination)
                });
            }
        }
        for route in later {
            let added = add_route(&mut self.socket, &route);
            self.note(added);
        }
        self.change_neighbours(change);
        for interface in &change.interfaces {
            self.remove_addresses(change, interface);
        }
        match self.failures.len() {
            0 => Ok(()),
            1 => Err(self.failures.remove(0)),
            several => {
                let first = Box::new(self.failures.remove(0));
                Err(NetworkError::Several { first, more: several - 1 })
            }
        }
    }

    fn note(&mut self, result: Result<(), NetworkError>) {
        self.failures.extend(result.err());
    }

    fn index(&self, place: i32) -> Option<i32> {
        self.indices.get(usize::try_from(place).ok()?).copied().flatten()
    }

    fn remove(&mut self, message: Message, action: impl FnOnce() -> String) {
        match self.socket.change(message) {
            Ok(()) => {}
            Err(error)
                if GONE.iter().any(|gone| error.raw_os_error() == Some(gone.raw_os_error())) => {}
            Err(source) => {
                self.failures.push(NetworkError::Kernel { action: action(), source });
            }
        }
    }

    /// All of an interface but what goes of it.
    fn change_link(&mut self, change: &Change, interface: &Interface) {
        let Some(name) = change.names.get(interface.place as usize) else { return };
        let mut before = None;
        // The name that a function's is to have may be one that the kernel has given to another.
        if interface.comes
            && (interface.function.is_some() || self.index(interface.place).is_none())
        {
            match self.name_new(name, interface) {
                Ok(link) => {
                    self.indices[interface.place as usize] = Some(link.index);
                    before = Some(link.mac);
                }
                Err(error) => return self.failures.push(error),
            }
        }
        let Some(index) = self.index(interface.place) else { return };
        let socket = &mut self.socket;
        let mut results = Vec::new();
        // A physical function that has set it refuses it from the guest.
        let differs = |mac: &[u8; 6]| before.as_deref() != Some(mac.as_slice());
        if let Some(mac) = interface.mac.filter(differs) {
            let message = network::set_mac(index, &mac);
            results.push(apply(socket, message, || format!("give {name} its MAC address")));
        }
        if let Some(mtu) = interface.mtu {
            let message = network::set_mtu(index, mtu);
            results.push(apply(socket, message, || format!("set the MTU of {name} to {mtu}")));
        }
        if interface.comes {
            results.push(apply(socket, network::up(index), || format!("bring {name} up")));
        }
        for &cidr in &interface.added {
            let message = network::add_address(index, cidr);
            results.push(apply(socket, message, || format!("give {name} the address {cidr}")));
        }
        results.into_iter().for_each(|result| self.note(result));
    }

    /// Finds an interface that has come to the guest by its function or its address, and gives it its
    /// name.
    fn name_new(&mut self, name: &str, interface: &Interface) -> Result<Link, NetworkError> {
        let failed = |source| {
            let action = "list the interfaces".into();
            NetworkError::Kernel { action, source }
        };
        let links = network::links(&mut self.socket).map_err(failed)?;
        let link = links.iter().find(|link| is_new(link, interface));
        let link = link.ok_or_else(|| NetworkError::Absent(name.to_owned()))?;
        if link.name == name {
            return Ok(link.clone());
        }
        let other = in_the_way(&links, name).filter(|_| interface.function.is_some());
        let mut rename = |index: i32, to: &str| {
            let message = network::rename(index, to);
            apply(&mut self.socket, message, || format!("name an interface {name}"))
        };
        if let Some(other) = other {
            rename(other.index, &format!("vial-{}", other.index))?;
        }
        rename(link.index, name)?;
        if let Some(other) = other {
            rename(other.index, &link.name)?;
        }
        Ok(link.clone())
    }

    /// Returns those to be tried again when others are removed, which the kernel takes for the same.
    fn add_routes(&mut self, change: &Change) -> Vec<Route> {
        let mut later = Vec::new();
        for route in &change.added_routes {
            let Some(index) = self.index(route.index) else {
                let name = change.names.get(route.index as usize).cloned().unwrap_or_default();
                self.failures.push(NetworkError::Absent(name));
                continue;
            };
            let route = Route { index, ..*route };
            match self.socket.change(network::add_route(&route)) {
                Ok(()) => {}
                Err(error) if exists(&error) => later.push(route),
                Err(source) => {
                    let action = format!("add the route to {}", route.destination);
                    self.failures.push(NetworkError::Kernel { action, source });
                }
            }
        }
        later
    }

    fn change_neighbours(&mut self, change: &Change) {
        for neighbour in &change.removed_neighbours {
            let Some(index) = self.index(neighbour.index) else { continue };
            let message = network::remove_neighbour(&Neighbour { index, ..*neighbour });
            self.remove(message, || format!("forget the neighbour {}", neighbour.address));
        }
        for neighbour in &change.added_neighbours {
            let Some(index) = self.index(neighbour.index) else { continue };
            let message = network::add_neighbour(&Neighbour { index, ..*neighbour });
            let added = apply(&mut self.socket, message, || {
                format!("set the neighbour {}", neighbour.address)
            });
            self.note(added);
        }
    }

    /// What goes of an interface, and the interface if it goes whole.
    fn remove_addresses(&mut self, change: &Change, interface: &Interface) {
        let Some(index) = self.index(interface.place) else { return };
        let Some(name) = change.names.get(interface.place as usize) else { return };
        if !interface.removed.is_empty() {
            let _kept = Promoted::on(name);
            for &cidr in &interface.removed {
                self.remove(network::remove_address(index, cidr), || {
                    format!("take the address {cidr} from {name}")
                });
            }
        }
        if interface.goes {
            self.remove(network::down(index), || format!("take {name} down"));
        }
    }
}

/// Keeps the other IPv4 addresses of a network when the first of them is removed, which the kernel
/// would remove with it (ip-sysctl, `promote_secondaries`). What is to go is named.
struct Promoted {
    path: String,
    before: String,
}

impl Promoted {
    fn on(interface: &str) -> Option<Self> {
        let path = format!("/proc/sys/net/ipv4/conf/{interface}/promote_secondaries");
        let set = || -> io::Result<String> {
            let before = fs::read_to_string(&path)?;
            fs::write(&path, "1")?;
            Ok(before)
        };
        let before =
            set().inspect_err(|error| tracing::warn!("cannot set {path}: {error}")).ok()?;
        Some(Self { path, before })
    }
}

impl Drop for Promoted {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, self.before.trim()) {
            tracing::warn!("cannot set {} back: {error}", self.path);
        }
    }
}

#[cfg(test)]
mod tests;
