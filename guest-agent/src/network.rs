//! Gives the guest the network that the host's namespace has: names, addresses, routes and
//! neighbours, for the interfaces that the VMM has made of it.
//!
//! A request is read into checked types first ([`Plan::read`], pure); only then is anything
//! changed. What changes later comes as a difference, see [`mod@change`].

mod change;
pub(crate) mod channels;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use vial_agent_protocol::agent::{self, ConfigureNetworkRequest};
use vial_agent_protocol::{
    FUNCTION_DEVICES, MAX_ADDRESSES, MAX_INTERFACES, MAX_NEIGHBOURS, MAX_ROUTES,
};
use vial_netlink::network::{self, Cidr, CidrError, Link, Neighbour, Route};
use vial_netlink::{Message, Socket};

use crate::users;

pub(crate) use self::change::{await_change, change};

/// The longest name of an interface (IFNAMSIZ with its NUL).
const MAX_NAME_BYTES: usize = 15;
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
/// The first interface of every network namespace is `lo`.
const LOOPBACK_INDEX: i32 = 1;
/// How long a driver may take to make its function's interface: some do so behind their probing.
const FUNCTION_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked for meanwhile.
const FUNCTION_PAUSE: Duration = Duration::from_millis(10);
const FUNCTIONS: &str = "/sys/bus/pci/devices";

/// Why the network is not as the request wants it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("the network has {count} {what}, more than the {limit} that a guest can have")]
    TooMany { what: &'static str, count: usize, limit: usize },
    #[error("'{0}' cannot be the name of an interface, or is so twice")]
    Name(String),
    #[error("{0:02x?} cannot be a MAC address, or is that of two interfaces")]
    Mac(Vec<u8>),
    #[error("the MTU of {name} is {mtu}, not 68 to 65535")]
    Mtu { name: String, mtu: u32 },
    #[error(transparent)]
    Cidr(#[from] CidrError),
    #[error("'{0}' is no address of the kind that it should be")]
    Address(String),
    #[error("{0} is not 0 to 255")]
    Number(u32),
    #[error("the network has no interface '{0}'")]
    Device(String),
    #[error("{0} is no device number of a function on the guest's PCI bus, or is so twice")]
    Function(u32),
    #[error("the guest has no interface with the address of {0}")]
    Absent(String),
    #[error(
        "the guest's kernel has no driver for {name}, the PCI function {address}: leave the driver \
         that it has on the host out of `network_functions` in Vial's configuration, or give the \
         guest a kernel with one"
    )]
    NoDriver { name: String, address: String },
    #[error("the guest's driver has made no interface of the PCI function {address} for {name}")]
    NoInterface { name: String, address: String },
    #[error("cannot {action} in the guest: {source}")]
    Kernel { action: String, source: io::Error },
    #[error("{first}; {more} more changes of the pod's network failed")]
    Several { first: Box<Self>, more: usize },
}

impl NetworkError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        !matches!(
            self,
            Self::Absent(_)
                | Self::Several { .. }
                | Self::NoDriver { .. }
                | Self::NoInterface { .. }
                | Self::Kernel { .. }
        )
    }
}

/// Brings up `lo` of the namespace that the caller is in.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    Socket::open()?.change(network::up(LOOPBACK_INDEX))
}

#[derive(Debug)]
struct Interface {
    name: String,
    mac: [u8; 6],
    mtu: u32,
    addresses: Vec<Cidr>,
    /// The address of the PCI function that it is an interface of.
    function: Option<String>,
}

impl Interface {
    fn is(&self, link: &Link) -> bool {
        match &self.function {
            Some(function) => link.function.as_ref() == Some(function),
            None => link.mac == self.mac,
        }
    }
}

/// A checked request. Routes and neighbours have an index into `interfaces` in place of one of
/// the kernel's.
#[derive(Debug)]
struct Plan {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), NetworkError> {
    if count > limit {
        return Err(NetworkError::TooMany { what, count, limit });
    }
    Ok(())
}

/// What is shown of a text that came from outside.
fn shown(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_debug).collect()
}

fn address(text: &str, like: Option<&IpAddr>) -> Result<IpAddr, NetworkError> {
    let parsed: Option<IpAddr> = text.parse().ok();
    parsed
        .filter(|address| like.is_none_or(|like| like.is_ipv4() == address.is_ipv4()))
        .ok_or_else(|| NetworkError::Address(shown(text)))
}

fn optional(text: &str, like: &IpAddr) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() { Ok(None) } else { address(text, Some(like)).map(Some) }
}

fn mac(bytes: &[u8]) -> Result<[u8; 6], NetworkError> {
    bytes.try_into().map_err(|_| NetworkError::Mac(bytes.iter().take(32).copied().collect()))
}

fn small(number: u32) -> Result<u8, NetworkError> {
    number.try_into().map_err(|_| NetworkError::Number(number))
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte))
}

impl Plan {
    fn read(request: &ConfigureNetworkRequest) -> Result<Self, NetworkError> {
        at_most("interfaces", request.interfaces.len(), MAX_INTERFACES)?;
        at_most("routes", request.routes.len(), MAX_ROUTES)?;
        at_most("neighbours", request.neighbours.len(), MAX_NEIGHBOURS)?;
        let (mut names, mut macs) = (HashSet::new(), HashSet::new());
        let mut functions = HashSet::new();
        let mut interfaces = Vec::new();
        for wire in &request.interfaces {
            at_most("addresses on an interface", wire.addresses.len(), MAX_ADDRESSES)?;
            if !is_name(&wire.name) || wire.name == "lo" || !names.insert(&wire.name) {
                return Err(NetworkError::Name(shown(&wire.name)));
            }
            let mac = mac(&wire.mac)?;
            if mac == [0; 6] || !macs.insert(mac) {
                return Err(NetworkError::Mac(mac.to_vec()));
            }
            if !MTU.contains(&wire.mtu) {
                return Err(NetworkError::Mtu { name: wire.name.clone(), mtu: wire.mtu });
            }
            let addresses: Result<_, CidrError> =
                wire.addresses.iter().map(|text| text.parse()).collect();
            let number = wire.function;
            let function = read_function(number)?;
            if function.is_some() && !functions.insert(number) {
                return Err(NetworkError::Function(number));
            }
            interfaces.push(Interface {
                name: wire.name.clone(),
                mac,
                mtu: wire.mtu,
                addresses: addresses?,
                function,
            });
        }
        let place = |name: &str| {
            let place = interfaces.iter().position(|interface| interface.name == name);
            place.map(|place| place as i32).ok_or_else(|| NetworkError::Device(shown(name)))
        };
        let routes = request.routes.iter().map(|wire| read_route(wire, place(&wire.device)?));
        let routes = routes.collect::<Result<_, _>>()?;
        let neighbours =
            request.neighbours.iter().map(|wire| read_neighbour(wire, place(&wire.device)?));
        let neighbours = neighbours.collect::<Result<_, _>>()?;
        Ok(Self { interfaces, routes, neighbours })
    }
}

/// The address of a function by its device number, of which 0 is none.
fn read_function(number: u32) -> Result<Option<String>, NetworkError> {
    if number != 0 && !FUNCTION_DEVICES.contains(&number) {
        return Err(NetworkError::Function(number));
    }
    Ok((number != 0).then(|| format!("0000:00:{number:02x}.0")))
}

fn read_route(wire: &agent::Route, index: i32) -> Result<Route, NetworkError> {
    let destination: Cidr = wire.destination.parse()?;
    Ok(Route {
        index,
        destination,
        gateway: optional(&wire.gateway, &destination.address)?,
        source: optional(&wire.source, &destination.address)?,
        scope: small(wire.scope)?,
        protocol: small(wire.protocol)?,
        metric: wire.metric,
        onlink: wire.onlink,
    })
}

fn read_neighbour(wire: &agent::Neighbour, index: i32) -> Result<Neighbour, NetworkError> {
    Ok(Neighbour { index, address: address(&wire.address, None)?, mac: mac(&wire.mac)? })
}

fn apply(
    socket: &mut Socket,
    message: Message,
    action: impl FnOnce() -> String,
) -> Result<(), NetworkError> {
    let changed = socket.change(message);
    changed.map_err(|source| NetworkError::Kernel { action: action(), source })
}

/// Waits until the drivers of functions have made the interfaces that the request names.
///
/// # Errors
/// [`NetworkError`].
pub(crate) async fn await_functions(request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
    await_at(Path::new(FUNCTIONS), request).await
}

async fn await_at(bus: &Path, request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
    let plan = Plan::read(request)?;
    let of_function = |one: Interface| Some((one.name, one.function?));
    await_interfaces(bus, plan.interfaces.into_iter().filter_map(of_function)).await
}

/// Waits until there is an interface of each function. They come as names to be and addresses.
async fn await_interfaces(
    bus: &Path,
    interfaces: impl Iterator<Item = (String, String)>,
) -> Result<(), NetworkError> {
    let mut awaited: Vec<(String, String)> = interfaces.collect();
    let start = Instant::now();
    while !awaited.is_empty() {
        let mut links = list(Socket::open())?;
        if users::of_pod().is_some() {
            links.extend(list(users::in_first_network(Socket::open))?);
        }
        let is_there =
            |address: &String| links.iter().any(|l| l.function.as_ref() == Some(address));
        awaited.retain(|(_, address)| !is_there(address));
        let Some((name, address)) = awaited.first().cloned() else { continue };
        // The kernel's own drivers have looked at it before the agent was started.
        if !bus.join(&address).join("driver").exists() {
            return Err(NetworkError::NoDriver { name, address });
        }
        if start.elapsed() > FUNCTION_PATIENCE {
            return Err(NetworkError::NoInterface { name, address });
        }
        tokio::time::sleep(FUNCTION_PAUSE).await;
    }
    Ok(())
}

fn list(socket: io::Result<Socket>) -> Result<Vec<Link>, NetworkError> {
    let listed = socket.and_then(|mut socket| network::links(&mut socket));
    let action = || "list the interfaces".into();
    listed.map_err(|source| NetworkError::Kernel { action: action(), source })
}

/// Moves interfaces to the network namespace of a pod that has one of its own: the kernel makes all in its
/// first. Their names are others then.
fn bring_to_pod(is_wanted: impl Fn(&Link) -> bool) -> Result<(), NetworkError> {
    let Some(pod) = users::of_pod() else { return Ok(()) };
    let failed = |source| {
        let action = "give the pod an interface".into();
        NetworkError::Kernel { action, source }
    };
    let mut socket = users::in_first_network(Socket::open).map_err(failed)?;
    let links = network::links(&mut socket).map_err(failed)?;
    for link in links.iter().filter(|link| is_wanted(link)) {
        let name = format!("new-{}", link.index);
        let message = network::move_to(link.index, pod.network().as_raw_fd(), &name);
        socket.change(message).map_err(failed)?;
    }
    Ok(())
}

/// Sets the guest's network up. Interfaces of functions are there, see [`await_functions`].
///
/// # Errors
/// [`NetworkError`].
pub(crate) fn configure(request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
    let plan = Plan::read(request)?;
    let kernel = |action: &str| {
        let action = action.to_owned();
        move |source| NetworkError::Kernel { action, source }
    };
    bring_to_pod(|link| plan.interfaces.iter().any(|interface| interface.is(link)))?;
    let mut socket = Socket::open().map_err(kernel("open a netlink socket"))?;
    let links = network::links(&mut socket).map_err(kernel("list the interfaces"))?;
    let found: Result<Vec<&Link>, NetworkError> = plan
        .interfaces
        .iter()
        .map(|interface| {
            let mut same = links.iter().filter(|link| interface.is(link));
            same.next().ok_or_else(|| NetworkError::Absent(interface.name.clone()))
        })
        .collect();
    let found = found?;
    rename(&mut socket, &plan.interfaces, &found)?;
    for (interface, link) in plan.interfaces.iter().zip(&found) {
        let name = &interface.name;
        if link.mac != interface.mac {
            apply(&mut socket, network::set_mac(link.index, &interface.mac), || {
                format!("give {name} its MAC address")
            })?;
        }
        apply(&mut socket, network::set_mtu(link.index, interface.mtu), || {
            format!("set the MTU of {name} to {}", interface.mtu)
        })?;
        for &cidr in &interface.addresses {
            let message = network::add_address(link.index, cidr);
            apply(&mut socket, message, || format!("give {name} the address {cidr}"))?;
        }
        apply(&mut socket, network::up(link.index), || format!("bring {name} up"))?;
    }
    // Checked by Plan::read: every place is that of an interface.
    let index = |place: i32| found[place as usize].index;
    for route in plan.routes {
        let route = Route { index: index(route.index), ..route };
        add_route(&mut socket, &route)?;
    }
    for neighbour in plan.neighbours {
        let neighbour = Neighbour { index: index(neighbour.index), ..neighbour };
        apply(&mut socket, network::add_neighbour(&neighbour), || {
            format!("set the neighbour {}", neighbour.address)
        })?;
    }
    Ok(())
}

/// Adds a route beside others to the same place. One that the kernel takes for the same is replaced.
fn add_route(socket: &mut Socket, route: &Route) -> Result<(), NetworkError> {
    let failed = |source| {
        let action = format!("add the route to {}", route.destination);
        NetworkError::Kernel { action, source }
    };
    match socket.change(network::add_route(route)) {
        Err(error) if exists(&error) => match socket.change(network::replace_route(route)) {
            // It is there, behind another.
            Err(error) if exists(&error) => Ok(()),
            replaced => replaced.map_err(failed),
        },
        added => added.map_err(failed),
    }
}

fn exists(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

/// In two rounds, for one's name may be what another is still called.
fn rename(
    socket: &mut Socket,
    interfaces: &[Interface],
    found: &[&Link],
) -> Result<(), NetworkError> {
    let wrong: Vec<(&Interface, &&Link)> = interfaces
        .iter()
        .zip(found)
        .filter(|(interface, link)| interface.name != link.name)
        .collect();
    for (interface, link) in &wrong {
        let name = format!("vial-{}", link.index);
        apply(socket, network::rename(link.index, &name), || {
            format!("name an interface for {}", interface.name)
        })?;
    }
    for (interface, link) in &wrong {
        let name = &interface.name;
        apply(socket, network::rename(link.index, name), || format!("name an interface {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
