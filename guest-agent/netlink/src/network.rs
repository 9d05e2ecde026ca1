//! What is said about interfaces, addresses, routes and neighbours (rtnetlink(7)): each as a
//! type, with the message that makes one and the reading of the message that tells of one.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::{Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, Socket, attributes};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_IFALIAS: u16 = 20;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_LINK_NETNSID: u16 = 37;
/// From Linux 5.14 on.
const IFLA_PARENT_DEV_NAME: u16 = 56;
const IFLA_PARENT_DEV_BUS_NAME: u16 = 57;
/// The bus of PCI functions.
const BUS_PCI: &str = "pci";
/// The interface is up.
pub const IFF_UP: u32 = 1;
/// The interface is a loopback.
pub const IFF_LOOPBACK: u32 = 8;
/// The hardware type of Ethernet (linux/if_arp.h).
pub const ARPHRD_ETHER: u16 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// The address is there at once, without asking others whether it is theirs.
const IFA_F_NODAD: u32 = 0x02;
/// The address brings no route along: routes are set as they are on the host.
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const SCOPE_HOST: u8 = 254;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const NTF_PROXY: u8 = 8;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// An address with the length of its network's prefix, as in `10.0.0.1/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address, whole.
    pub address: IpAddr,
    /// 0 to 32 or 128.
    pub prefix: u8,
}

/// What is no address with a prefix.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is no address with a prefix's length, such as 10.0.0.1/24")]
pub struct CidrError(String);

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let (address, prefix) = (address.parse::<IpAddr>().ok()?, prefix.parse().ok()?);
            (prefix <= 8 * bytes(&address).len() as u8).then_some(Self { address, prefix })
        });
        parsed.ok_or_else(|| CidrError(text.chars().take(64).collect()))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

fn family(address: &IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(payload: &[u8]) -> Option<IpAddr> {
    match payload.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(payload).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(payload).ok()?).into()),
        _ => None,
    }
}

fn number(payload: &[u8]) -> Option<u32> {
    payload.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: i32,
    /// Its name.
    pub name: String,
    /// Its hardware's kind, see [`ARPHRD_ETHER`].
    pub hardware: u16,
    /// `IFF_...`
    pub flags: u32,
    /// Its address; empty when it has none.
    pub mac: Vec<u8>,
    /// Its largest packet without the link's header, in bytes.
    pub mtu: u32,
    /// What else somebody calls it; empty when nobody does.
    pub alias: String,
    /// The PCI function that it is an interface of, as `0000:3b:10.0`.
    pub function: Option<String>,
    /// The number of the interface of the same namespace that it stands on: a VLAN's, a macvlan's.
    pub stands_on: Option<i32>,
    /// The number of the bond or bridge that it is a part of.
    pub part_of: Option<i32>,
}

/// The fixed part of a message about an interface (`struct ifinfomsg`).
pub fn link_header(index: i32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&change.to_ne_bytes());
    header
}

/// A change of an interface, to be filled with attributes.
pub fn change_link(index: i32) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_header(index, 0, 0))
}

/// Gives an interface another name. It has to be down.
pub fn rename(index: i32, name: &str) -> Message {
    change_link(index).with_text(IFLA_IFNAME, name)
}

/// Sets an interface's MTU, in bytes.
pub fn set_mtu(index: i32, mtu: u32) -> Message {
    change_link(index).with(IFLA_MTU, &mtu.to_ne_bytes())
}

/// Sets an interface's address.
pub fn set_mac(index: i32, mac: &[u8]) -> Message {
    change_link(index).with(IFLA_ADDRESS, mac)
}

/// Sets what else an interface is called; an empty text takes that away.
pub fn set_alias(index: i32, alias: &str) -> Message {
    change_link(index).with(IFLA_IFALIAS, alias.as_bytes())
}

/// Moves an interface to another network namespace, under that name. It is down then.
pub fn move_to(index: i32, namespace: i32, name: &str) -> Message {
    change_link(index).with(IFLA_NET_NS_FD, &namespace.to_ne_bytes()).with_text(IFLA_IFNAME, name)
}

/// Brings an interface up.
pub fn up(index: i32) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_header(index, IFF_UP, IFF_UP))
}

/// Takes an interface down.
pub fn down(index: i32) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_header(index, 0, IFF_UP))
}

fn read_link(body: &[u8]) -> Option<Link> {
    let fixed = body.get(..16)?;
    let mut link = Link {
        index: i32::from_ne_bytes(fixed[4..8].try_into().ok()?),
        name: String::new(),
        hardware: u16::from_ne_bytes([fixed[2], fixed[3]]),
        flags: number(&fixed[8..])?,
        mac: Vec::new(),
        mtu: 0,
        alias: String::new(),
        function: None,
        stands_on: None,
        part_of: None,
    };
    let (mut bus, mut is_elsewhere) = (String::new(), false);
    for (kind, payload) in attributes(&body[16..]) {
        match kind {
            IFLA_ADDRESS => link.mac = payload.to_vec(),
            IFLA_IFNAME => link.name = text(payload)?,
            IFLA_MTU => link.mtu = number(payload)?,
            IFLA_LINK => link.stands_on = Some(number(payload)?.cast_signed()),
            IFLA_LINK_NETNSID => is_elsewhere = true,
            IFLA_MASTER => link.part_of = Some(number(payload)?.cast_signed()),
            // Whatever bytes somebody has set.
            IFLA_IFALIAS => link.alias = text(payload).unwrap_or_default(),
            IFLA_PARENT_DEV_NAME => link.function = Some(text(payload)?),
            IFLA_PARENT_DEV_BUS_NAME => bus = text(payload)?,
            _ => {}
        }
    }
    link.function = link.function.filter(|_| bus == BUS_PCI);
    // The number is then that of another namespace.
    link.stands_on = link.stands_on.filter(|_| !is_elsewhere);
    Some(link)
}

fn text(payload: &[u8]) -> Option<String> {
    String::from_utf8(payload.strip_suffix(&[0]).unwrap_or(payload).to_vec()).ok()
}

/// All interfaces.
///
/// # Errors
/// The kernel refuses.
pub fn links(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let request = Message::new(RTM_GETLINK, 0, &[0; 16]);
    Ok(socket.list(&request, RTM_NEWLINK)?.iter().filter_map(|body| read_link(body)).collect())
}

/// Gives an interface an address: at once, and without a route to its network.
pub fn add_address(index: i32, cidr: Cidr) -> Message {
    address_message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, cidr)
        .with(IFA_FLAGS, &(IFA_F_NODAD | IFA_F_NOPREFIXROUTE).to_ne_bytes())
}

/// Takes an address from an interface.
pub fn remove_address(index: i32, cidr: Cidr) -> Message {
    address_message(RTM_DELADDR, 0, index, cidr)
}

fn address_message(kind: u16, flags: u16, index: i32, cidr: Cidr) -> Message {
    let mut fixed = [family(&cidr.address), cidr.prefix, 0, 0, 0, 0, 0, 0];
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let payload = bytes(&cidr.address);
    Message::new(kind, flags, &fixed).with(IFA_LOCAL, &payload).with(IFA_ADDRESS, &payload)
}

fn read_address(body: &[u8]) -> Option<(i32, Cidr)> {
    let fixed = body.get(..8)?;
    let index = i32::from_ne_bytes(fixed[4..].try_into().ok()?);
    let find = |wanted| {
        attributes(&body[8..]).find(|(kind, _)| *kind == wanted).and_then(|(_, p)| address(p))
    };
    // With a peer, IFA_ADDRESS is the peer's.
    let address = find(IFA_LOCAL).or_else(|| find(IFA_ADDRESS))?;
    let own = fixed[3] < SCOPE_HOST && !is_link_local(&address);
    own.then_some((index, Cidr { address, prefix: fixed[1] }))
}

/// Whether every interface gives itself such an address, or a route to such a network.
fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_multicast())
}

/// All addresses with their interfaces' numbers, except those that a kernel makes by itself.
///
/// # Errors
/// The kernel refuses.
pub fn addresses(socket: &mut Socket) -> io::Result<Vec<(i32, Cidr)>> {
    let request = Message::new(RTM_GETADDR, 0, &[0; 8]);
    let bodies = socket.list(&request, RTM_NEWADDR)?;
    Ok(bodies.iter().filter_map(|body| read_address(body)).collect())
}

/// A unicast route of the main table, through one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The interface's number.
    pub index: i32,
    /// Where to; with a prefix of 0 everywhere.
    pub destination: Cidr,
    /// Through whom.
    pub gateway: Option<IpAddr>,
    /// The preferred address to send from.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_...`
    pub scope: u8,
    /// Who made it, `RTPROT_...`
    pub protocol: u8,
    /// Among routes to the same place the lowest wins.
    pub metric: u32,
    /// The gateway is taken to be on the link whatever the addresses say.
    pub onlink: bool,
}

/// Adds a route, beside others to the same place with the same metric.
pub fn add_route(route: &Route) -> Message {
    route_message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, route)
}

/// Adds a route in place of one to the same place with the same metric.
pub fn replace_route(route: &Route) -> Message {
    route_message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route)
}

/// Removes a route. One with a metric of 0 may stand for those with any other: see that it is there.
pub fn remove_route(route: &Route) -> Message {
    route_message(RTM_DELROUTE, 0, route)
}

fn route_message(kind: u16, flags: u16, route: &Route) -> Message {
    let mut fixed = [0; 12];
    fixed[0] = family(&route.destination.address);
    fixed[1] = route.destination.prefix;
    fixed[4] = RT_TABLE_MAIN;
    fixed[5] = route.protocol;
    fixed[6] = route.scope;
    fixed[7] = RTN_UNICAST;
    let onlink = if route.onlink { RTNH_F_ONLINK } else { 0 };
    fixed[8..].copy_from_slice(&onlink.to_ne_bytes());
    let mut message = Message::new(kind, flags, &fixed).with(RTA_OIF, &route.index.to_ne_bytes());
    if route.destination.prefix > 0 {
        message = message.with(RTA_DST, &bytes(&route.destination.address));
    }
    if route.metric > 0 {
        message = message.with(RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    for (kind, address) in [(RTA_GATEWAY, &route.gateway), (RTA_PREFSRC, &route.source)] {
        if let Some(address) = address {
            message = message.with(kind, &bytes(address));
        }
    }
    message
}

fn read_route(body: &[u8]) -> Option<Route> {
    let fixed = body.get(..12)?;
    let any: IpAddr = match fixed[0] {
        AF_INET => Ipv4Addr::UNSPECIFIED.into(),
        AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    if fixed[4] != RT_TABLE_MAIN || fixed[7] != RTN_UNICAST {
        return None;
    }
    let mut route = Route {
        index: 0,
        destination: Cidr { address: any, prefix: fixed[1] },
        gateway: None,
        source: None,
        scope: fixed[6],
        protocol: fixed[5],
        metric: 0,
        onlink: number(&fixed[8..])? & RTNH_F_ONLINK != 0,
    };
    for (kind, payload) in attributes(&body[12..]) {
        match kind {
            RTA_DST => route.destination.address = address(payload)?,
            RTA_OIF => route.index = number(payload)?.cast_signed(),
            RTA_GATEWAY => route.gateway = Some(address(payload)?),
            RTA_PRIORITY => route.metric = number(payload)?,
            RTA_PREFSRC => route.source = Some(address(payload)?),
            _ => {}
        }
    }
    (route.index != 0 && !is_link_local(&route.destination.address)).then_some(route)
}

/// The unicast routes of the main table that go through one interface each, except those that a
/// kernel makes by itself; those without a gateway first, for the others need them.
///
/// # Errors
/// The kernel refuses.
pub fn routes(socket: &mut Socket) -> io::Result<Vec<Route>> {
    let mut routes = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut fixed = [0; 12];
        fixed[0] = family;
        let request = Message::new(RTM_GETROUTE, 0, &fixed);
        match socket.list(&request, RTM_NEWROUTE) {
            Ok(bodies) => routes.extend(bodies.iter().filter_map(|body| read_route(body))),
            // A kernel without that family has no routes of it.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(error) => return Err(error),
        }
    }
    routes.sort_by_key(|route| route.gateway.is_some());
    Ok(routes)
}

/// An address whose hardware's address somebody set for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub index: i32,
    /// The address.
    pub address: IpAddr,
    /// The hardware's address.
    pub mac: [u8; 6],
}

/// Sets a neighbour for good.
pub fn add_neighbour(neighbour: &Neighbour) -> Message {
    neighbour_message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, neighbour)
        .with(NDA_LLADDR, &neighbour.mac)
}

/// Forgets a neighbour.
pub fn remove_neighbour(neighbour: &Neighbour) -> Message {
    neighbour_message(RTM_DELNEIGH, 0, neighbour)
}

fn neighbour_message(kind: u16, flags: u16, neighbour: &Neighbour) -> Message {
    let mut fixed = [0; 12];
    fixed[0] = family(&neighbour.address);
    fixed[4..8].copy_from_slice(&neighbour.index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    Message::new(kind, flags, &fixed).with(NDA_DST, &bytes(&neighbour.address))
}

fn read_neighbour(body: &[u8]) -> Option<Neighbour> {
    let fixed = body.get(..12)?;
    let state = u16::from_ne_bytes([fixed[8], fixed[9]]);
    if state & NUD_PERMANENT == 0 || fixed[10] & NTF_PROXY != 0 {
        return None;
    }
    let find = |wanted| attributes(&body[12..]).find(|(kind, _)| *kind == wanted).map(|(_, p)| p);
    Some(Neighbour {
        index: number(&fixed[4..])?.cast_signed(),
        address: address(find(NDA_DST)?)?,
        mac: find(NDA_LLADDR)?.try_into().ok()?,
    })
}

/// All neighbours that were set for good.
///
/// # Errors
/// The kernel refuses.
pub fn neighbours(socket: &mut Socket) -> io::Result<Vec<Neighbour>> {
    let request = Message::new(RTM_GETNEIGH, 0, &[0; 12]);
    let bodies = socket.list(&request, RTM_NEWNEIGH)?;
    Ok(bodies.iter().filter_map(|body| read_neighbour(body)).collect())
}

/// Whether a message of that kind tells that something has changed which is listed here. One of the
/// main table's routes that is not listed may have come in place of one that is.
pub(crate) fn is_shown(kind: u16, body: &[u8]) -> bool {
    match kind {
        // A neighbour that was set for good and is so no more is told of like any other.
        RTM_NEWLINK | RTM_DELLINK | RTM_NEWNEIGH | RTM_DELNEIGH => true,
        RTM_NEWADDR | RTM_DELADDR => read_address(body).is_some(),
        RTM_NEWROUTE | RTM_DELROUTE => body.get(4) == Some(&RT_TABLE_MAIN),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
