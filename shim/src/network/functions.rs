//! Interfaces of the pod's network that are virtual functions of a card: an SR-IOV CNI has moved
//! them into the namespace, with name, address and routes.
//!
//! Such an interface gets no tap: its function goes to the guest, by [`crate::devices`], and what
//! the interface had is given to the one that the guest's own driver makes. When the function is
//! back with the host's driver, that makes the interface anew in the host's first namespace, and
//! [`put_back`] moves it to where CNI looks for it when it takes the pod's network down.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use vial_netlink::{
    Socket,
    network::{self, Link},
};

use super::{NetworkError, inside, kernel};
use crate::devices::{VFIO_DRIVER, address::Address, pci::Sysfs};

/// How long a driver may take to make a function's interface: some do so behind the binding.
const INTERFACE_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked for meanwhile.
const INTERFACE_PAUSE: Duration = Duration::from_millis(20);

/// An interface that is in the guest, and not in the namespace, while the VM lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Its function.
    pub address: Address,
    /// Its name.
    pub interface: String,
    /// What else it is called; some CNI plugins keep its name on the host there.
    pub alias: String,
    /// Its hardware's address.
    pub mac: Vec<u8>,
    /// In bytes.
    pub mtu: u32,
}

/// What an interface is to be again, if it goes to the guest with its function: that is a virtual
/// one, of one of the `drivers`, and nothing else in the namespace is made of the interface.
pub(super) fn of(sysfs: &Sysfs, drivers: &[String], link: &Link, all: &[Link]) -> Option<Moved> {
    let address: Address = link.function.as_deref()?.parse().ok()?;
    // A physical function stays where it is: others depend on it.
    sysfs.physical(address)?;
    let name = &link.name;
    let driver = sysfs.driver(address)?;
    if !drivers.contains(&driver) {
        tracing::info!(
            "{name} of the pod's network, the PCI function {address} of the driver {driver}, gets a tap"
        );
        return None;
    }
    let is_above = |other: &Link| other.stands_on == Some(link.index) && other.index != link.index;
    if link.part_of.is_some() || all.iter().any(is_above) {
        tracing::warn!(
            "{name} of the pod's network gets a tap, though it is the PCI function {address}: \
             another interface there is made of it"
        );
        return None;
    }
    Some(Moved {
        address,
        interface: name.clone(),
        alias: link.alias.clone(),
        mac: link.mac.clone(),
        mtu: link.mtu,
    })
}

/// Moves the interfaces of functions that are back with their drivers into the namespace again.
/// What is there already, or has no driver, stays where it is.
///
/// # Errors
/// [`NetworkError`]; all are tried.
pub(super) fn put_back(path: &Path, namespace: &File, moved: &[Moved]) -> Result<(), NetworkError> {
    let there = inside(path, namespace, |socket| {
        network::links(socket).map_err(kernel("list the interfaces"))
    })?;
    let sysfs = Sysfs::default();
    let is_back = |address: Address| {
        let driver = sysfs.driver(address);
        driver.is_some_and(|driver| driver != VFIO_DRIVER)
    };
    let mut result = Ok(());
    // Drivers make their interfaces in the host's first namespace, which the shim is in.
    let mut socket = Socket::open().map_err(kernel("open a netlink socket"))?;
    for one in moved.iter().filter(|one| !there.iter().any(|link| is_of(link, one.address))) {
        if is_back(one.address) {
            result = result.and(put_one(&mut socket, (path, namespace), one));
        }
    }
    result
}

fn is_of(link: &Link, address: Address) -> bool {
    link.function.as_deref().and_then(|text| text.parse().ok()) == Some(address)
}

fn find(socket: &mut Socket, address: Address) -> Result<Option<Link>, NetworkError> {
    let links = network::links(socket).map_err(kernel("list the interfaces"))?;
    Ok(links.into_iter().find(|link| is_of(link, address)))
}

fn put_one(
    socket: &mut Socket,
    (path, namespace): (&Path, &File),
    moved: &Moved,
) -> Result<(), NetworkError> {
    let Moved { address, interface: name, .. } = moved;
    let start = Instant::now();
    let link = loop {
        match find(socket, *address)? {
            Some(link) => break link,
            None if start.elapsed() > INTERFACE_PATIENCE => {
                return Err(NetworkError::NotBack { interface: name.clone(), address: *address });
            }
            None => std::thread::sleep(INTERFACE_PAUSE),
        }
    };
    // Move and name are one request: nobody finds it in between, nor under a name of the host's.
    let message = network::move_to(link.index, namespace.as_fd().as_raw_fd(), name);
    socket.change(message).map_err(kernel(format!("move {name} back")))?;
    inside(path, namespace, |socket| {
        let gone = || kernel(format!("find {name}"))(io::ErrorKind::NotFound.into());
        let link = find(socket, *address)?.ok_or_else(gone)?;
        if link.alias != moved.alias {
            let message = network::set_alias(link.index, &moved.alias);
            socket.change(message).map_err(kernel(format!("name {name} as it was")))?;
        }
        // The physical function has a say in both.
        let changes = [
            ("address", link.mac != moved.mac, network::set_mac(link.index, &moved.mac)),
            ("MTU", link.mtu != moved.mtu, network::set_mtu(link.index, moved.mtu)),
        ];
        for (what, _, message) in changes.into_iter().filter(|(_, differs, _)| *differs) {
            if let Err(error) = socket.change(message) {
                tracing::warn!("{name} has another {what} than before the pod: {error}");
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use vial_netlink::network::{ARPHRD_ETHER, IFF_UP};

    use super::*;

    const FUNCTION: &str = "0000:3b:10.0";

    fn link(index: i32, function: Option<&str>) -> Link {
        Link {
            index,
            name: format!("net{index}"),
            hardware: ARPHRD_ETHER,
            flags: IFF_UP,
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 9000,
            alias: "ens1f0v0".into(),
            function: function.map(str::to_owned),
            stands_on: None,
            part_of: None,
        }
    }

    /// A tree like sysfs with one function of igbvf, virtual or not.
    fn tree(is_virtual: bool) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let at = tree.path().join("bus/pci/devices").join(FUNCTION);
        fs::create_dir_all(&at).unwrap();
        symlink("../../drivers/igbvf", at.join("driver")).unwrap();
        if is_virtual {
            symlink("../0000:3b:00.0", at.join("physfn")).unwrap();
        }
        tree
    }

    #[test]
    fn virtual_function_that_nothing_stands_on_goes_to_the_guest() {
        let tree = tree(true);
        let sysfs = Sysfs::at(tree.path());
        let drivers = ["igbvf".to_owned()];
        let own = link(7, Some(FUNCTION));
        let other = |stands_on| Link { stands_on, ..link(8, None) };
        let moved = of(&sysfs, &drivers, &own, &[own.clone(), other(Some(3))]).unwrap();
        assert_eq!((moved.address.to_string().as_str(), moved.mtu), (FUNCTION, 9000));
        assert_eq!((moved.interface.as_str(), moved.alias.as_str()), ("net7", "ens1f0v0"));
        // A VLAN on it, a bond of it, another driver, none of a function's.
        assert_eq!(of(&sysfs, &drivers, &own, &[own.clone(), other(Some(7))]), None);
        let part = Link { part_of: Some(9), ..own.clone() };
        assert_eq!(of(&sysfs, &drivers, &part, std::slice::from_ref(&part)), None);
        assert_eq!(of(&sysfs, &["iavf".to_owned()], &own, &[]), None);
        assert_eq!(of(&sysfs, &[], &own, &[]), None);
        assert_eq!(of(&sysfs, &drivers, &link(7, None), &[]), None);
        assert_eq!(of(&sysfs, &drivers, &link(7, Some("0000:3b:10.2")), &[]), None);
    }

    #[test]
    fn physical_function_stays_with_the_host() {
        let tree = tree(false);
        let own = link(7, Some(FUNCTION));
        assert_eq!(of(&Sysfs::at(tree.path()), &["igbvf".to_owned()], &own, &[]), None);
    }
}
