//! What differs between two descriptions of a pod's network, as the agent is to be told.

use std::collections::HashSet;
use std::hash::Hash;

use vial_agent_protocol::agent::{
    ChangeNetworkRequest, ConfigureNetworkRequest, Interface, InterfaceChange, Neighbour, Route,
};

/// What makes `before` into `now`; nothing if they are the same. Descriptions name each interface
/// once.
pub fn difference(
    before: &ConfigureNetworkRequest,
    now: &ConfigureNetworkRequest,
) -> Option<ChangeNetworkRequest> {
    let named = |all: &'_ [Interface], name: &str| all.iter().find(|one| one.name == name).cloned();
    let mut change = ChangeNetworkRequest::default();
    for old in before.interfaces.iter().filter(|old| named(&now.interfaces, &old.name).is_none()) {
        change.interfaces.push(InterfaceChange {
            name: old.name.clone(),
            goes: true,
            removed_addresses: old.addresses.clone(),
            ..Default::default()
        });
    }
    for new in &now.interfaces {
        let old = named(&before.interfaces, &new.name);
        change.interfaces.extend(interface_difference(old.as_ref(), new));
    }
    (change.added_routes, change.removed_routes) =
        both_ways(&before.routes, &now.routes, route_key);
    (change.added_neighbours, change.removed_neighbours) =
        both_ways(&before.neighbours, &now.neighbours, neighbour_key);
    // One whose hardware's address changes is set anew, and never away.
    let place = |neighbour: &Neighbour| (neighbour.device.clone(), neighbour.address.clone());
    let set: HashSet<_> = change.added_neighbours.iter().map(place).collect();
    change.removed_neighbours.retain(|neighbour| !set.contains(&place(neighbour)));
    (change != ChangeNetworkRequest::default()).then_some(change)
}

fn interface_difference(old: Option<&Interface>, new: &Interface) -> Option<InterfaceChange> {
    let absent = Interface::default();
    let before = old.unwrap_or(&absent);
    let (added_addresses, removed_addresses) =
        both_ways(&before.addresses, &new.addresses, String::clone);
    let change = InterfaceChange {
        name: new.name.clone(),
        mac: if before.mac == new.mac { Vec::new() } else { new.mac.clone() },
        mtu: if before.mtu == new.mtu { 0 } else { new.mtu },
        comes: old.is_none(),
        added_addresses,
        removed_addresses,
        ..Default::default()
    };
    let nothing = InterfaceChange { name: new.name.clone(), ..Default::default() };
    (change != nothing).then_some(change)
}

/// What is in `now` and not in `before`, and the other way round, in their orders.
fn both_ways<T: Clone, K: Eq + Hash>(
    before: &[T],
    now: &[T],
    key: impl Fn(&T) -> K,
) -> (Vec<T>, Vec<T>) {
    let beyond = |of: &[T], other: &[T]| {
        let known: HashSet<K> = other.iter().map(&key).collect();
        of.iter().filter(|one| !known.contains(&key(one))).cloned().collect()
    };
    (beyond(now, before), beyond(before, now))
}

type RouteKey = (String, String, String, String, [u32; 3], bool);

/// All of a route.
fn route_key(route: &Route) -> RouteKey {
    let Route { device, destination, gateway, source, scope, protocol, metric, onlink, .. } =
        route.clone();
    (device, destination, gateway, source, [scope, protocol, metric], onlink)
}

fn neighbour_key(neighbour: &Neighbour) -> (String, String, Vec<u8>) {
    let Neighbour { device, address, mac, .. } = neighbour.clone();
    (device, address, mac)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A guest to which a change is done in the agent's order.
    fn apply(guest: &mut ConfigureNetworkRequest, change: &ChangeNetworkRequest) {
        for one in &change.interfaces {
            if one.comes {
                assert!(guest.interfaces.iter().all(|other| other.name != one.name));
                let name = one.name.clone();
                guest.interfaces.push(Interface { name, ..Default::default() });
            }
            let own = guest.interfaces.iter_mut().find(|other| other.name == one.name).unwrap();
            if !one.mac.is_empty() {
                own.mac = one.mac.clone();
            }
            if one.mtu != 0 {
                own.mtu = one.mtu;
            }
            own.addresses.extend(one.added_addresses.iter().cloned());
        }
        guest.routes.extend(change.added_routes.iter().cloned());
        for route in &change.removed_routes {
            let at = guest.routes.iter().position(|one| one == route).expect("removes what is");
            guest.routes.remove(at);
        }
        for neighbour in &change.removed_neighbours {
            let at = guest.neighbours.iter().position(|one| one == neighbour);
            guest.neighbours.remove(at.expect("removes what is"));
        }
        for neighbour in &change.added_neighbours {
            let same = |one: &Neighbour| {
                (&one.device, &one.address) == (&neighbour.device, &neighbour.address)
            };
            guest.neighbours.retain(|one| !same(one));
            guest.neighbours.push(neighbour.clone());
        }
        for one in &change.interfaces {
            let own = guest.interfaces.iter_mut().find(|other| other.name == one.name).unwrap();
            for address in &one.removed_addresses {
                let at = own.addresses.iter().position(|other| other == address);
                own.addresses.remove(at.expect("removes what is"));
            }
            if one.goes {
                assert!(own.addresses.is_empty());
                let name = own.name.clone();
                guest.interfaces.retain(|other| other.name != name);
                assert!(guest.routes.iter().all(|route| route.device != name));
            }
        }
    }

    /// In an order that two of the same have.
    fn sorted(mut request: ConfigureNetworkRequest) -> ConfigureNetworkRequest {
        request.interfaces.iter_mut().for_each(|one| one.addresses.sort());
        request.interfaces.sort_by_key(|one| one.name.clone());
        request.routes.sort_by_key(route_key);
        request.neighbours.sort_by_key(neighbour_key);
        request
    }

    prop_compose! {
        fn interface(name: String)(
            mac in 0u8..3,
            mtu in 1400u32..1403,
            addresses in prop::collection::btree_set(0u8..6, 0..5),
        ) -> Interface {
            Interface {
                name: name.clone(),
                mac: vec![2, 0, 0, 0, 0, mac],
                mtu,
                addresses: addresses.iter().map(|n| format!("10.0.0.{n}/24")).collect(),
                ..Default::default()
            }
        }
    }

    prop_compose! {
        fn description()(
            there in prop::collection::btree_set(0u8..3, 0..=3),
            all in [interface("eth0".into()), interface("eth1".into()), interface("eth2".into())],
            routes in prop::collection::btree_set((0u8..3, 0u8..4, 0u8..3, 0u32..2, any::<bool>()), 0..12),
            neighbours in prop::collection::btree_map((0u8..3, 0u8..4), 0u8..3, 0..8),
        ) -> ConfigureNetworkRequest {
            let device = |n: u8| there.contains(&n).then(|| format!("eth{n}"));
            ConfigureNetworkRequest {
                interfaces: there.iter().map(|n| all[usize::from(*n)].clone()).collect(),
                routes: routes.iter().filter_map(|&(n, to, through, metric, onlink)| Some(Route {
                    device: device(n)?,
                    destination: format!("10.{to}.0.0/16"),
                    gateway: format!("10.0.0.{through}"),
                    metric,
                    onlink,
                    ..Default::default()
                })).collect(),
                neighbours: neighbours.iter().filter_map(|(&(n, address), &mac)| Some(Neighbour {
                    device: device(n)?,
                    address: format!("10.0.0.{address}"),
                    mac: vec![2, 0, 0, 0, 1, mac],
                    ..Default::default()
                })).collect(),
                ..Default::default()
            }
        }
    }

    proptest! {
        #[test]
        fn applied_to_what_was_it_gives_what_is(before in description(), now in description()) {
            let mut guest = before.clone();
            match difference(&before, &now) {
                Some(change) => apply(&mut guest, &change),
                None => prop_assert_eq!(&sorted(before), &sorted(now.clone())),
            }
            prop_assert_eq!(sorted(guest), sorted(now));
        }

        #[test]
        fn what_is_the_same_is_not_told(before in description()) {
            prop_assert_eq!(difference(&before, &sorted(before.clone())), None);
        }
    }

    #[test]
    fn only_what_differs_is_told() {
        let address = |n: u8| format!("10.0.0.{n}/24");
        let eth0 = Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec![address(1), address(2)],
            ..Default::default()
        };
        let before =
            ConfigureNetworkRequest { interfaces: vec![eth0.clone()], ..Default::default() };
        let mut now = before.clone();
        now.interfaces[0].mtu = 1400;
        now.interfaces[0].addresses = vec![address(3), address(2)];
        let change = difference(&before, &now).unwrap();
        let told = InterfaceChange {
            name: "eth0".into(),
            mtu: 1400,
            added_addresses: vec![address(3)],
            removed_addresses: vec![address(1)],
            ..Default::default()
        };
        let whole = ChangeNetworkRequest { interfaces: vec![told], ..Default::default() };
        assert_eq!(change, whole);
    }
}
