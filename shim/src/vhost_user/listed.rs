//! A device as the configuration lists it.

use std::path::PathBuf;

use serde::Deserialize;
use vial_agent_protocol::{agent, is_plain_path};
use vial_vmm_api::VHOST_USER_QUEUES;

use crate::network::described::{SCOPE_LINK, is_cidr, on_link, parse_mac};

/// The longest name, in bytes: that of an interface.
pub const MAX_NAME_BYTES: usize = 15;
const MTU: std::ops::RangeInclusive<u16> = 68..=65535;
const DEFAULT_MTU: u16 = 1500;
/// The most addresses and the most routes of a network.
const MAX_ADDRESSES: usize = 16;
/// How rtnetlink(7) numbers what an administrator has set.
const PROTOCOL_STATIC: u32 = 4;

/// An entry of the file, as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    name: String,
    kind: String,
    socket: PathBuf,
    queues: Option<u8>,
    path: Option<PathBuf>,
    read_only: Option<bool>,
    mac: Option<String>,
    mtu: Option<u16>,
    addresses: Option<Vec<String>>,
    routes: Option<Vec<Route>>,
}

/// A route of a network.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// As in `10.1.0.0/16`.
    pub destination: String,
    /// Without it, the destination is on the link.
    pub gateway: Option<String>,
}

/// A device that pods can ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// What pods call it, and a network's interface is called.
    pub name: String,
    /// The backend's.
    pub socket: PathBuf,
    /// See [`VHOST_USER_QUEUES`].
    pub queues: u8,
    /// What it is.
    pub kind: Kind,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A network.
    Net {
        /// The guest's address.
        mac: [u8; 6],
        /// In bytes, without the Ethernet header.
        mtu: u16,
        /// As in `10.0.0.2/24`.
        addresses: Vec<String>,
        /// Checked.
        routes: Vec<Route>,
    },
    /// A disk.
    Block {
        /// Its node in containers.
        path: PathBuf,
        /// Whether its backend has to refuse writes.
        read_only: bool,
    },
    /// A file system.
    Fs {
        /// Where containers have it.
        path: PathBuf,
        /// Whether it is mounted so.
        read_only: bool,
    },
}

impl Listed {
    /// Checks an entry.
    ///
    /// # Errors
    /// What is wrong with which device, and what is right.
    pub fn new(entry: Entry) -> Result<Self, String> {
        let Entry { name, socket, queues, .. } = &entry;
        let shown: String = name.escape_debug().take(64).collect();
        let wrong = |text: String| format!("of '{shown}', {text}");
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if !(1..=MAX_NAME_BYTES).contains(&name.len()) || !name.bytes().all(is_name) {
            let bytes = MAX_NAME_BYTES;
            return Err(wrong(format!("a name of 1 to {bytes} letters, digits, - and _")));
        }
        if !socket.is_absolute() {
            return Err(wrong("the absolute path of a socket".into()));
        }
        let queues = queues.unwrap_or(1);
        if !VHOST_USER_QUEUES.contains(&queues) {
            let (least, most) = (VHOST_USER_QUEUES.start(), VHOST_USER_QUEUES.end());
            return Err(wrong(format!("{least} to {most} queues")));
        }
        let (name, socket) = (name.clone(), socket.clone());
        let kind = Kind::new(entry).map_err(wrong)?;
        Ok(Self { name, socket, queues, kind })
    }

    /// The name that the guest mounts it by. Never the share's own.
    pub fn tag(&self) -> String {
        format!("user-{}", self.name)
    }

    /// What containers are given of it, with its number on the guest's PCI bus.
    pub fn served(&self, number: u8) -> Option<agent::ServedDevice> {
        let (path, read_only, disk, tag) = match &self.kind {
            Kind::Net { .. } => return None,
            Kind::Block { path, read_only } => (path, *read_only, number.into(), String::new()),
            Kind::Fs { path, read_only } => (path, *read_only, 0, self.tag()),
        };
        let path = path.to_string_lossy().into_owned();
        Some(agent::ServedDevice { path, read_only, disk, tag, ..Default::default() })
    }

    /// Adds it to the guest's network, if it is a part of that.
    pub fn add_to(&self, network: &mut agent::ConfigureNetworkRequest) {
        let Kind::Net { mac, mtu, addresses, routes } = &self.kind else { return };
        network.interfaces.push(agent::Interface {
            name: self.name.clone(),
            mac: mac.to_vec(),
            mtu: (*mtu).into(),
            addresses: addresses.clone(),
            ..Default::default()
        });
        network.routes.extend(on_link(&self.name, addresses));
        network.routes.extend(routes.iter().map(|route| agent::Route {
            device: self.name.clone(),
            destination: route.destination.clone(),
            gateway: route.gateway.clone().unwrap_or_default(),
            scope: if route.gateway.is_some() { 0 } else { SCOPE_LINK },
            protocol: PROTOCOL_STATIC,
            ..Default::default()
        }));
    }
}

impl Kind {
    fn new(entry: Entry) -> Result<Self, String> {
        let Entry { kind, path, read_only, mac, mtu, addresses, routes, .. } = entry;
        let of_net = mac.is_some() || mtu.is_some() || addresses.is_some() || routes.is_some();
        match kind.as_str() {
            "net" if path.is_some() || read_only.is_some() => {
                Err("neither `path` nor `read_only`: it is a network".into())
            }
            "net" => {
                let mac = mac
                    .as_deref()
                    .and_then(parse_mac)
                    .ok_or("a `mac` such as \"02:00:00:00:00:01\", which no other interface has")?;
                let mtu = mtu.unwrap_or(DEFAULT_MTU);
                if !MTU.contains(&mtu) {
                    return Err(format!("an `mtu` of {} to {}", MTU.start(), MTU.end()));
                }
                let (addresses, routes) =
                    (addresses.unwrap_or_default(), routes.unwrap_or_default());
                check_addresses(&addresses, &routes)?;
                Ok(Self::Net { mac, mtu, addresses, routes })
            }
            "blk" | "fs" if of_net => Err("none of `mac`, `mtu`, `addresses`, `routes`".into()),
            "blk" | "fs" => {
                let path = path
                    .filter(|path| path.to_str().is_some_and(is_plain_path))
                    .ok_or("the absolute `path` that it has in containers")?;
                let read_only = read_only.unwrap_or(false);
                Ok(match kind.as_str() {
                    "blk" => Self::Block { path, read_only },
                    _ => Self::Fs { path, read_only },
                })
            }
            _ => Err("a `kind` of \"net\", \"blk\" or \"fs\"".into()),
        }
    }
}

fn check_addresses(addresses: &[String], routes: &[Route]) -> Result<(), String> {
    if addresses.len() > MAX_ADDRESSES || routes.len() > MAX_ADDRESSES {
        return Err(format!("at most {MAX_ADDRESSES} addresses, and as many routes"));
    }
    if let Some(other) = addresses.iter().find(|text| !is_cidr(text)) {
        return Err(format!("an address such as \"10.0.0.2/24\", not {other:?}"));
    }
    let is_address = |text: &String| text.parse::<std::net::IpAddr>().is_ok();
    let is_route =
        |route: &&Route| is_cidr(&route.destination) && route.gateway.iter().all(is_address);
    match routes.iter().find(|route| !is_route(route)) {
        Some(other) => Err(format!(
            "a route such as {{ destination = \"10.1.0.0/16\", gateway = \"10.0.0.1\" }}, not \
             {other:?}"
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Listed, String> {
        let entry = toml::from_str(text).map_err(|error| error.to_string())?;
        Listed::new(entry)
    }

    const NET: &str = "name = \"fast0\"\nkind = \"net\"\nsocket = \"/run/n\"\n\
                       mac = \"02:00:00:00:00:0a\"\n";
    const DISK: &str = "name = \"disk1\"\nkind = \"blk\"\nsocket = \"/run/d\"\n";

    #[test]
    fn network_is_read_and_becomes_an_interface() {
        let text = format!(
            "{NET}addresses = [\"10.0.0.2/24\"]\n\
             routes = [{{ destination = \"10.1.0.0/16\", gateway = \"10.0.0.1\" }}]"
        );
        let mut network = agent::ConfigureNetworkRequest::default();
        let listed = read(&text).unwrap();
        listed.add_to(&mut network);
        assert!(listed.served(4).is_none());
        assert_eq!(network.interfaces[0].name, "fast0");
        assert_eq!(network.interfaces[0].mac, [2, 0, 0, 0, 0, 10]);
        assert_eq!(network.interfaces[0].mtu, 1500);
        let route = |at: usize| {
            let route: &agent::Route = &network.routes[at];
            (route.destination.as_str(), route.gateway.as_str(), route.source.as_str(), route.scope)
        };
        assert_eq!(route(0), ("10.0.0.0/24", "", "10.0.0.2", SCOPE_LINK));
        assert_eq!(route(1), ("10.1.0.0/16", "10.0.0.1", "", 0));
    }

    #[test]
    fn disk_and_file_system_are_served_to_containers() {
        let disk = read(&format!("{DISK}path = \"/dev/fast\"\nqueues = 2")).unwrap();
        let served = disk.served(5).unwrap();
        assert_eq!((served.disk, served.path.as_str(), disk.queues), (5, "/dev/fast", 2));
        let text = "name = \"f\"\nkind = \"fs\"\nsocket = \"/run/f\"\npath = \"/data\"\n\
                    read_only = true";
        let served = read(text).unwrap().served(6).unwrap();
        assert_eq!((served.disk, served.tag.as_str(), served.read_only), (0, "user-f", true));
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_right() {
        for (text, word) in [
            (DISK.replace("disk1", "a/b"), "letters"),
            (DISK.replace("disk1", "sixteen-letters-"), "15"),
            (DISK.replace("/run/d", "d"), "absolute path of a socket"),
            (DISK.replace("blk", "disk"), "\"fs\""),
            (DISK.into(), "`path`"),
            (format!("{DISK}path = \"dev/fast\""), "`path`"),
            (format!("{DISK}path = \"/\""), "`path`"),
            (format!("{DISK}path = \"/dev/../x\""), "`path`"),
            (format!("{DISK}path = \"/a\"\nqueues = 0"), "1 to 8"),
            (format!("{DISK}path = \"/a\"\nqueues = 9"), "1 to 8"),
            (format!("{DISK}path = \"/a\"\nmtu = 100"), "`mtu`"),
            (format!("{DISK}path = \"/a\"\nsize = 1"), "size"),
            (NET.replace("02:", "03:"), "`mac`"),
            (NET.replace(":0a", ""), "`mac`"),
            (NET.replace(":0a", ":0a:01"), "`mac`"),
            (format!("{NET}queues = 9"), "1 to 8"),
            (format!("{NET}path = \"/a\""), "`path`"),
            (format!("{NET}mtu = 67"), "`mtu`"),
            (format!("{NET}addresses = [\"10.0.0.2\"]"), "10.0.0.2/24"),
            (format!("{NET}routes = [{{ destination = \"x\" }}]"), "10.1.0.0/16"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
