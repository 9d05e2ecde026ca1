//! What CNI has chosen for functions that no interface of the pod's namespace tells of.
//!
//! A function that is bound to vfio-pci has no interface that an SR-IOV CNI could move and name: it
//! sets up what the physical function decides, asks for addresses, and says in its result what the
//! interface is to be. Whoever runs CNI's plugins by their library keeps that result, with the
//! plugin's configuration, for as long as the pod has it (libcni, `cacheAdd`): containerd below
//! `/var/lib/cni`, Multus, who calls the plugins of further networks, below `/var/lib/cni/multus`.
//! The configuration, or the result, names the function.
//!
//! [`search`] reads the files, [`read`] understands one. Pure but for the files; nothing is changed.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD as STANDARD};
use serde::Deserialize;
use serde_json::Value;
use vial_agent_protocol::{MAX_ADDRESSES, MAX_INTERFACES, MAX_ROUTES, agent};

use super::described::{SCOPE_LINK, is_cidr, on_link, parse_mac};
use crate::devices::address::Address;

/// Where the library keeps results, below the directory that it is given.
const RESULTS: &str = "results";
/// What it calls files of this form.
const KIND: &str = "cniCacheV1";
/// The largest that is read, in bytes. A result with all the routes that a guest can have is smaller.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// How many files of a directory are looked at by their names.
const MAX_FILES: usize = 65_536;
/// How rtnetlink(7) numbers routes of which nobody says who has set them, as CNI's plugins set theirs.
const PROTOCOL_BOOT: u32 = 3;
/// The main table of routes; those of others need rules that a guest is not given.
const TABLE_MAIN: u32 = 254;
/// The longest name of an interface, in bytes (IFNAMSIZ with its NUL).
const MAX_NAME_BYTES: usize = 15;

/// What CNI has chosen for a function of the pod.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The function.
    pub address: Address,
    /// What its interface is to be called.
    pub interface: String,
    /// Its hardware's address; without one, it keeps what the function has.
    pub mac: Option<[u8; 6]>,
    /// In bytes; without one, it keeps what its driver gives it.
    pub mtu: Option<u16>,
    /// With their prefixes' lengths.
    pub addresses: Vec<String>,
    /// Those on the link first.
    pub routes: Vec<agent::Route>,
}

/// Two results contradict each other.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// Of one function.
    #[error(
        "CNI's results say different things of the PCI function {address}, in {first} and {second}; remove \
         the one that is not this pod's, or take its directory out of `cni_caches` in Vial's configuration"
    )]
    Twice {
        /// The function.
        address: Address,
        /// The file that was read first.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Of two functions.
    #[error(
        "CNI calls the interfaces of two PCI functions {interface}: {first} and {second}; give the pod's \
         networks different interfaces, or take the directory out of `cni_caches` in Vial's configuration"
    )]
    Name {
        /// The name.
        interface: String,
        /// A function.
        first: Address,
        /// The other.
        second: Address,
    },
}

/// What a file does not tell. Nothing is made of it, then.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is larger than any result.
    #[error("it has more than {MAX_FILE_BYTES} bytes")]
    Size,
    /// It is not what the library writes.
    #[error("it is not of CNI's form: {0}")]
    Form(#[from] serde_json::Error),
    /// Its configuration is not what the library writes.
    #[error("its configuration is not written in base64: {0}")]
    Base64(#[from] base64::DecodeError),
    /// A value is none.
    #[error("its {what} is {value:?}")]
    Value {
        /// What it is.
        what: &'static str,
        /// The begin of it.
        value: String,
    },
    /// There is more than a guest can have.
    #[error("it has {count} {what}, more than the {limit} that a VM can have")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there can be.
        limit: usize,
    },
    /// It names several functions, and does not say which is the interface's.
    #[error("it names several PCI functions for one interface: {0:?}")]
    Several(Vec<String>),
}

/// A file, as the library writes it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: String,
    container_id: String,
    if_name: String,
    /// Its bytes in base64.
    config: Option<String>,
    #[serde(default)]
    capability_args: Value,
    result: Option<Outcome>,
}

/// A result of CNI 0.3.0 and newer.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Outcome {
    interfaces: Option<Vec<Interface>>,
    ips: Option<Vec<Ip>>,
    routes: Option<Vec<Route>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Interface {
    name: String,
    mac: String,
    /// From CNI 1.1.0 on, as is the next.
    mtu: Option<u32>,
    #[serde(rename = "pciID")]
    pci_id: String,
    /// Empty for one of the host's.
    sandbox: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Ip {
    address: String,
    gateway: Option<String>,
    interface: Option<usize>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Route {
    dst: String,
    gw: Option<String>,
    /// From CNI 1.1.0 on, as are the next.
    priority: Option<u32>,
    table: Option<u32>,
    scope: Option<u32>,
}

/// What CNI has chosen for those of the functions that it tells of, for the sandbox with this id. A
/// file that cannot be understood is told of in the log, and left.
///
/// # Errors
/// [`ChoiceError`].
pub fn search(
    caches: &[PathBuf],
    id: &str,
    functions: &[Address],
) -> Result<Vec<Chosen>, ChoiceError> {
    let mut found: Vec<(PathBuf, Chosen)> = Vec::new();
    for file in caches.iter().flat_map(|cache| files_of(&cache.join(RESULTS), id)) {
        let chosen = match read_file(&file).and_then(|text| read(&text, id, functions)) {
            Ok(chosen) => chosen,
            Err(error) => {
                tracing::warn!("nothing is made of CNI's result {}: {error}", file.display());
                continue;
            }
        };
        for one in chosen {
            let same = found.iter().find(|(_, other)| other.address == one.address);
            match same {
                Some((_, other)) if *other == one => {}
                Some((first, _)) => {
                    let (address, first) = (one.address, first.clone());
                    return Err(ChoiceError::Twice { address, first, second: file });
                }
                None => found.push((file.clone(), one)),
            }
        }
    }
    let mut names = HashMap::new();
    for (_, Chosen { address, interface, .. }) in &found {
        if let Some(first) = names.insert(interface.clone(), *address) {
            let (interface, second) = (interface.clone(), *address);
            return Err(ChoiceError::Name { interface, first, second });
        }
    }
    Ok(found.into_iter().map(|(_, chosen)| chosen).collect())
}

/// The files of a sandbox, which the library calls `<network>-<sandbox>-<interface>`, in order.
fn files_of(results: &Path, id: &str) -> Vec<PathBuf> {
    let listed = match fs::read_dir(results) {
        Ok(listed) => listed,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!("CNI's results in {} cannot be listed: {error}", results.display());
            return Vec::new();
        }
    };
    let part = format!("-{id}-");
    let is_of = |name: &str| name.contains(&part);
    let mut files: Vec<PathBuf> = listed
        .take(MAX_FILES)
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_of))
        .map(|entry| entry.path())
        .collect();
    files.sort();
    // Each is an interface of the pod.
    if files.len() > MAX_INTERFACES {
        tracing::warn!(
            "of {} results of CNI's in {}, the first {MAX_INTERFACES} are read",
            files.len(),
            results.display()
        );
        files.truncate(MAX_INTERFACES);
    }
    files
}

fn read_file(path: &Path) -> Result<Vec<u8>, ReadError> {
    // What is no file is not waited for.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(ReadError::Size);
    }
    Ok(bytes)
}

/// What a file says of the functions, if it is of the sandbox with this id.
///
/// # Errors
/// [`ReadError`].
pub fn read(bytes: &[u8], id: &str, functions: &[Address]) -> Result<Vec<Chosen>, ReadError> {
    let cached: Cached = serde_json::from_slice(bytes)?;
    if cached.kind != KIND || cached.container_id != id {
        return Ok(Vec::new());
    }
    let Some(outcome) = &cached.result else { return Ok(Vec::new()) };
    let interfaces = outcome.interfaces.as_deref().unwrap_or_default();
    let of_pod = |address: &Address| functions.contains(address);
    // The result itself says best which of several interfaces is the function's.
    let mut named: Vec<(Address, Option<usize>)> = Vec::new();
    for (at, interface) in interfaces.iter().enumerate() {
        let address = address(&interface.pci_id).filter(of_pod);
        named.extend(address.filter(|_| !interface.sandbox.is_empty()).map(|one| (one, Some(at))));
    }
    if named.is_empty() {
        let is_own = |one: &Interface| one.name == cached.if_name && !one.sandbox.is_empty();
        // A plugin that makes no interface may list none, and give it addresses all the same.
        let own = interfaces.iter().position(is_own);
        let addresses = configured(&cached)?;
        let addresses = addresses.iter().filter_map(|text| address(text)).filter(of_pod);
        named.extend(addresses.map(|address| (address, own)));
        named.sort();
        named.dedup();
    }
    // Nothing says which of them the routes are of.
    if named.len() > 1 {
        return Err(ReadError::Several(named.iter().map(|(one, _)| one.to_string()).collect()));
    }
    named.into_iter().map(|(address, at)| choose(address, &cached, outcome, at)).collect()
}

fn address(text: &str) -> Option<Address> {
    text.to_ascii_lowercase().parse().ok()
}

/// The functions that a configuration names: of one plugin, or of several in a list.
fn configured(cached: &Cached) -> Result<Vec<String>, ReadError> {
    let mut found = Vec::new();
    let mut add = |value: Option<&Value>| {
        found.extend(value.and_then(Value::as_str).map(str::to_owned));
    };
    add(cached.capability_args.get("deviceID"));
    if let Some(config) = &cached.config {
        let config: Value = serde_json::from_slice(&STANDARD.decode(config)?)?;
        let plugins = config.get("plugins").and_then(Value::as_array);
        for one in std::iter::once(&config).chain(plugins.into_iter().flatten()) {
            // sriov-cni's key, host-device's, and what a runtime hands to a plugin that asks for it.
            add(one.get("deviceID"));
            add(one.get("pciBusID"));
            add(one.get("runtimeConfig").and_then(|given| given.get("deviceID")));
        }
    }
    Ok(found)
}

fn choose(
    address: Address,
    cached: &Cached,
    outcome: &Outcome,
    at: Option<usize>,
) -> Result<Chosen, ReadError> {
    let interfaces = outcome.interfaces.as_deref().unwrap_or_default();
    let own = at.and_then(|at| interfaces.get(at));
    let name = own.map_or(cached.if_name.as_str(), |own| own.name.as_str());
    if !is_name(name) {
        return Err(wrong("interface's name", name));
    }
    let mac = own.map(|own| own.mac.as_str()).filter(|mac| !mac.is_empty());
    let mac = mac.map(|mac| parse_mac(mac).ok_or_else(|| wrong("MAC address", mac))).transpose()?;
    let mtu = own.and_then(|own| own.mtu).filter(|mtu| *mtu != 0);
    let mtu = mtu
        .map(|mtu| {
            let bytes = u16::try_from(mtu).ok().filter(|bytes| *bytes >= 68);
            bytes.ok_or_else(|| wrong("MTU", &mtu.to_string()))
        })
        .transpose()?;
    let ips = outcome.ips.as_deref().unwrap_or_default();
    // Without an index, an address is that of the only interface.
    let is_own = |ip: &&Ip| at.is_none() || ip.interface.is_none() || ip.interface == at;
    let ips: Vec<&Ip> = ips.iter().filter(is_own).collect();
    at_most("addresses", ips.len(), MAX_ADDRESSES)?;
    let mut addresses = Vec::new();
    for ip in &ips {
        if !is_cidr(&ip.address) {
            return Err(wrong("address", &ip.address));
        }
        addresses.push(ip.address.clone());
    }
    let mut routes = on_link(name, &addresses);
    for route in outcome.routes.as_deref().unwrap_or_default() {
        routes.extend(wire(name, route, &ips)?);
    }
    at_most("routes", routes.len(), MAX_ROUTES)?;
    // As for what is in the namespace: others need them.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(Chosen { address, interface: name.to_owned(), mac, mtu, addresses, routes })
}

/// A route as CNI's plugins set it: by the address's gateway if it names none.
fn wire(device: &str, route: &Route, ips: &[&Ip]) -> Result<Option<agent::Route>, ReadError> {
    if !is_cidr(&route.dst) {
        return Err(wrong("route's destination", &route.dst));
    }
    if route.table.is_some_and(|table| table != 0 && table != TABLE_MAIN) {
        tracing::warn!("the guest does not get CNI's route to {} in another table", route.dst);
        return Ok(None);
    }
    let is_v6 = route.dst.contains(':');
    let gateways = ips.iter().filter_map(|ip| given(&ip.gateway));
    let mut own = gateways.filter(|gateway| gateway.contains(':') == is_v6);
    let gateway = given(&route.gw).or_else(|| own.next()).unwrap_or_default();
    if !gateway.is_empty() && gateway.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong("route's gateway", gateway));
    }
    let scope = if gateway.is_empty() && !is_v6 { SCOPE_LINK } else { 0 };
    Ok(Some(agent::Route {
        device: device.to_owned(),
        destination: route.dst.clone(),
        gateway: gateway.to_owned(),
        scope: route.scope.unwrap_or(scope),
        protocol: PROTOCOL_BOOT,
        metric: route.priority.unwrap_or_default(),
        ..Default::default()
    }))
}

fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn is_name(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && !["lo", ".", ".."].contains(&name)
        && name.bytes().all(is_part)
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), ReadError> {
    if count > limit {
        return Err(ReadError::TooMany { what, count, limit });
    }
    Ok(())
}

fn wrong(what: &'static str, value: &str) -> ReadError {
    ReadError::Value { what, value: value.chars().take(64).collect() }
}

#[cfg(test)]
#[path = "chosen_tests.rs"]
mod tests;
