use nix::sched::{CloneFlags, unshare};
use vial_agent_protocol::agent;
use vial_netlink::NLM_F_CREATE;

use super::*;

/// rtnetlink(7), linux/if_link.h.
const RTM_NEWLINK: u16 = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;

/// Does `work` in a network namespace with an interface `eth0` that is up and has 10.0.0.2/24,
/// fd00::2/64 and what a pod's interface has of routes. The number of `eth0` is handed over.
fn with_eth0(work: impl FnOnce(&mut Socket, i32) + Send) {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root");
        let mut socket = Socket::open().unwrap();
        let pair = Message::new(RTM_NEWLINK, NLM_F_CREATE, &network::link_header(0, 0, 0))
            .with_text(IFLA_IFNAME, "eth0")
            .with_nested(IFLA_LINKINFO, |info| info.with_text(IFLA_INFO_KIND, "veth"));
        socket.change(pair).unwrap();
        let links = network::links(&mut socket).unwrap();
        for link in links.iter().filter(|link| link.index != 1) {
            socket.change(network::up(link.index)).unwrap();
        }
        let index = find(&links, "eth0").unwrap();
        change(&request(|one| {
            one.interfaces = vec![interface(&["10.0.0.2/24", "fd00::2/64"], &[])];
            one.added_routes = vec![
                route("10.0.0.0/24", ""),
                route("0.0.0.0/0", "10.0.0.1"),
                route("fd00::/64", ""),
                route("::/0", "fd00::1"),
            ];
        }))
        .unwrap();
        work(&mut socket, index);
    };
    std::thread::scope(|scope| scope.spawn(inside).join()).unwrap();
}

fn request(fill: impl FnOnce(&mut ChangeNetworkRequest)) -> ChangeNetworkRequest {
    let mut request = ChangeNetworkRequest::default();
    fill(&mut request);
    request
}

fn interface(added: &[&str], removed: &[&str]) -> InterfaceChange {
    let texts = |all: &[&str]| all.iter().map(|&text| text.to_owned()).collect();
    InterfaceChange {
        name: "eth0".into(),
        added_addresses: texts(added),
        removed_addresses: texts(removed),
        ..Default::default()
    }
}

fn route(destination: &str, gateway: &str) -> agent::Route {
    let six = destination.contains(':');
    agent::Route {
        device: "eth0".into(),
        destination: destination.into(),
        gateway: gateway.into(),
        scope: if gateway.is_empty() && !six { 253 } else { 0 },
        protocol: 3,
        metric: if six { 1024 } else { 0 },
        ..Default::default()
    }
}

/// The routes that there are, as `destination gateway metric`, in the order of their texts.
fn routes(socket: &mut Socket) -> Vec<String> {
    let all = network::routes(socket).unwrap();
    let text = |route: &Route| {
        let gateway = route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default();
        format!("{} {gateway} {}", route.destination, route.metric)
    };
    let mut all: Vec<String> = all.iter().map(text).collect();
    all.sort();
    all
}

fn addresses(socket: &mut Socket) -> Vec<String> {
    let all = network::addresses(socket).unwrap();
    let mut all: Vec<String> = all.iter().map(|(_, cidr)| cidr.to_string()).collect();
    all.sort();
    all
}

#[test]
fn routes_take_each_others_place_and_go() {
    with_eth0(|socket, _| {
        let before = routes(socket);
        assert_eq!(
            before,
            ["0.0.0.0/0 10.0.0.1 0", "10.0.0.0/24  0", "::/0 fd00::1 1024", "fd00::/64  1024"]
        );
        let replaced = request(|one| {
            one.added_routes = vec![
                route("10.5.0.0/16", "10.0.0.9"),
                route("0.0.0.0/0", "10.0.0.3"),
                route("::/0", "fd00::3"),
                // Only who made it differs, which the kernel does not count.
                agent::Route { protocol: 4, ..route("fd00::/64", "") },
            ];
            one.removed_routes = vec![
                route("0.0.0.0/0", "10.0.0.1"),
                route("::/0", "fd00::1"),
                route("fd00::/64", ""),
            ];
        });
        change(&replaced).unwrap();
        assert_eq!(
            routes(socket),
            [
                "0.0.0.0/0 10.0.0.3 0",
                "10.0.0.0/24  0",
                "10.5.0.0/16 10.0.0.9 0",
                "::/0 fd00::3 1024",
                "fd00::/64  1024"
            ]
        );
        let of_six = |route: &&Route| route.destination.to_string() == "fd00::/64";
        assert_eq!(network::routes(socket).unwrap().iter().find(of_six).unwrap().protocol, 4);
        // What is there already and what is gone already are no failures.
        let again = request(|one| {
            one.added_routes = vec![route("10.5.0.0/16", "10.0.0.9")];
            one.removed_routes = vec![route("0.0.0.0/0", "10.0.0.1"), route("10.6.0.0/16", "")];
        });
        change(&again).unwrap();
        assert_eq!(routes(socket).len(), 5);
    });
}

#[test]
fn what_containers_have_set_stays() {
    with_eth0(|socket, index| {
        // A second address of the same network, another default route, one with a metric.
        let own = "10.0.0.77/24".parse().unwrap();
        socket.change(network::add_address(index, own)).unwrap();
        for wire in [
            route("0.0.0.0/0", "10.0.0.66"),
            agent::Route { metric: 9, ..route("10.7.0.0/16", "10.0.0.1") },
        ] {
            let own = read_route(&wire, index).unwrap();
            socket.change(network::add_route(&own)).unwrap();
        }
        let moved = request(|one| {
            one.interfaces = vec![interface(&["10.0.0.4/24"], &["10.0.0.2/24"])];
            one.added_routes = vec![route("0.0.0.0/0", "10.0.0.3")];
            one.removed_routes =
                vec![route("0.0.0.0/0", "10.0.0.1"), route("10.7.0.0/16", "10.0.0.1")];
        });
        change(&moved).unwrap();
        assert_eq!(addresses(socket), ["10.0.0.4/24", "10.0.0.77/24", "fd00::2/64"]);
        let there = routes(socket);
        for one in ["0.0.0.0/0 10.0.0.3 0", "0.0.0.0/0 10.0.0.66 0", "10.7.0.0/16 10.0.0.1 9"] {
            assert!(there.iter().any(|route| route == one), "no {one} in {there:?}");
        }
        assert!(!there.contains(&"0.0.0.0/0 10.0.0.1 0".to_owned()), "{there:?}");
        let promote = fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/promote_secondaries");
        assert_eq!(promote.unwrap(), "0\n");
    });
}

#[test]
fn links_and_neighbours_change_and_an_interface_goes_and_comes() {
    with_eth0(|socket, index| {
        let mac = vec![2, 0, 0, 0, 0, 9];
        let neighbour = |address: &str| agent::Neighbour {
            device: "eth0".into(),
            address: address.into(),
            mac: vec![2, 0, 0, 0, 0, 8],
            ..Default::default()
        };
        let changed = request(|one| {
            let own = InterfaceChange { mtu: 1400, mac: mac.clone(), ..interface(&[], &[]) };
            one.interfaces = vec![own];
            one.added_neighbours = vec![neighbour("10.0.0.8"), neighbour("fd00::8")];
        });
        change(&changed).unwrap();
        let link = |socket: &mut Socket| {
            let links = network::links(socket).unwrap();
            links.into_iter().find(|link| link.index == index).unwrap()
        };
        assert_eq!((link(socket).mtu, link(socket).mac), (1400, mac.clone()));
        assert_eq!(network::neighbours(socket).unwrap().len(), 2);
        let gone = request(|one| {
            let own = interface(&[], &["10.0.0.2/24", "fd00::2/64"]);
            one.interfaces = vec![InterfaceChange { goes: true, ..own }];
            one.removed_neighbours = vec![neighbour("10.0.0.8"), neighbour("10.0.0.7")];
        });
        change(&gone).unwrap();
        assert_eq!(link(socket).flags & network::IFF_UP, 0);
        assert!(addresses(socket).is_empty() && routes(socket).is_empty());
        assert!(network::neighbours(socket).unwrap().iter().all(|n| n.address.is_ipv6()));
        // One that has come is found by its address, whatever it is called.
        socket.change(network::rename(index, "eth7")).unwrap();
        let comes = request(|one| {
            let own = interface(&["10.0.0.2/24"], &[]);
            one.interfaces = vec![InterfaceChange { comes: true, mac: mac.clone(), ..own }];
            one.added_routes = vec![route("10.0.0.0/24", "")];
        });
        change(&comes).unwrap();
        assert_eq!(link(socket).name, "eth0");
        assert_eq!(routes(socket), ["10.0.0.0/24  0"]);
    });
}

#[test]
fn what_cannot_be_done_does_not_keep_the_rest() {
    with_eth0(|socket, _| {
        let elsewhere = || agent::Route { device: "eth5".into(), ..route("10.9.0.0/16", "") };
        let error = change(&request(|one| {
            one.added_routes =
                vec![route("10.8.0.0/16", "10.99.0.1"), elsewhere(), route("10.5.0.0/16", "")];
            one.removed_routes = vec![elsewhere()];
        }))
        .unwrap_err();
        assert!(matches!(error, NetworkError::Several { more: 1, .. }), "{error}");
        assert!(!error.is_of_the_request());
        assert!(error.to_string().contains("10.8.0.0/16"), "{error}");
        assert!(routes(socket).contains(&"10.5.0.0/16  0".to_owned()));
    });
}

#[test]
fn more_than_the_bounds_and_what_is_wrong_is_refused() {
    let refused = |fill: fn(&mut ChangeNetworkRequest)| {
        let error = Change::read(&request(fill)).unwrap_err();
        assert!(error.is_of_the_request(), "{error}");
        error
    };
    let too_many = |fill| {
        let error = refused(fill);
        assert!(matches!(error, NetworkError::TooMany { .. }), "{error}");
    };
    too_many(|one| one.interfaces = vec![interface(&[], &[]); MAX_INTERFACES + 1]);
    too_many(|one| one.interfaces = vec![interface(&["10.0.0.1/8"; MAX_ADDRESSES + 1], &[])]);
    too_many(|one| one.interfaces = vec![interface(&[], &["10.0.0.1/8"; MAX_ADDRESSES + 1])]);
    too_many(|one| one.added_routes = vec![route("::/0", ""); MAX_ROUTES + 1]);
    too_many(|one| one.removed_routes = vec![route("::/0", ""); MAX_ROUTES + 1]);
    let neighbours = || vec![agent::Neighbour::default(); MAX_NEIGHBOURS + 1];
    let error = Change::read(&request(|one| one.added_neighbours = neighbours())).unwrap_err();
    assert!(matches!(error, NetworkError::TooMany { .. }), "{error}");
    let error = Change::read(&request(|one| one.removed_neighbours = neighbours())).unwrap_err();
    assert!(matches!(error, NetworkError::TooMany { .. }), "{error}");
    too_many(|one| {
        let elsewhere = |n| agent::Route { device: format!("eth{n}"), ..route("::/0", "") };
        one.added_routes = (0..=2 * MAX_INTERFACES).map(elsewhere).collect();
    });
    refused(|one| one.interfaces = vec![interface(&[], &[]); 2]);
    refused(|one| one.interfaces = vec![InterfaceChange { mtu: 67, ..interface(&[], &[]) }]);
    refused(|one| {
        one.interfaces = vec![InterfaceChange { mac: vec![2; 5], ..interface(&[], &[]) }]
    });
    refused(|one| one.interfaces = vec![interface(&["10.0.0.1"], &[])]);
    for name in ["", "lo", "..", "a/b", "sixteen-bytes-xx"] {
        let named = InterfaceChange { name: name.into(), ..interface(&[], &[]) };
        let error = Change::read(&request(|one| one.interfaces = vec![named])).unwrap_err();
        assert!(matches!(error, NetworkError::Name(_)), "{error}");
    }
}

fn of_function(function: u32, comes: bool) -> InterfaceChange {
    InterfaceChange { function, comes, ..interface(&[], &[]) }
}

#[test]
fn interface_of_a_function_is_one_that_comes_and_each_function_has_one() {
    let read = |interfaces: Vec<InterfaceChange>| {
        Change::read(&request(|one| one.interfaces = interfaces)).map(|change| change.interfaces)
    };
    let other = |function| InterfaceChange { name: "net1".into(), ..of_function(function, true) };
    let interfaces = read(vec![of_function(5, true), other(31)]).unwrap();
    let functions: Vec<_> = interfaces.into_iter().map(|one| one.function).collect();
    assert_eq!(functions, ["0000:00:05.0", "0000:00:1f.0"].map(|text| Some(text.to_owned())));
    assert_eq!(read(vec![of_function(0, true)]).unwrap()[0].function, None);
    for wrong in [
        vec![of_function(32, true)],
        vec![of_function(u32::MAX, true)],
        vec![of_function(5, false)],
        vec![of_function(5, true), other(5)],
    ] {
        let error = read(wrong.clone()).unwrap_err();
        assert!(matches!(error, NetworkError::Function(_)), "{wrong:?}: {error}");
        assert!(error.is_of_the_request());
    }
}

#[tokio::test]
async fn function_without_a_driver_is_told_and_nothing_else_is_waited_for() {
    await_change(&request(|one| one.interfaces = vec![interface(&[], &[])])).await.unwrap();
    let one = of_function(31, true);
    let error = await_change(&request(|all| all.interfaces = vec![one])).await.unwrap_err();
    assert!(matches!(&error, NetworkError::NoDriver { name, .. } if name == "eth0"), "{error}");
}

#[test]
fn interface_of_a_function_is_found_by_it_and_another_is_in_its_way_until_it_is_up() {
    let link = |name: &str, function: Option<&str>, flags| Link {
        index: 7,
        name: name.into(),
        hardware: network::ARPHRD_ETHER,
        flags,
        mac: vec![2, 0, 0, 0, 0, 1],
        mtu: 1500,
        alias: String::new(),
        function: function.map(str::to_owned),
        stands_on: None,
        part_of: None,
    };
    let mut change = Change::default();
    let found = change.read_interface(&of_function(5, true)).unwrap();
    let (own, other) = (Some("0000:00:05.0"), Some("0000:00:06.0"));
    assert!(is_new(&link("eth3", own, network::IFF_UP), &found));
    assert!(!is_new(&link("eth3", other, 0), &found) && !is_new(&link("eth3", None, 0), &found));
    let links =
        [link("eth0", other, 0), link("eth1", other, network::IFF_UP), link("eth2", None, 0)];
    assert_eq!(in_the_way(&links, "eth0").map(|link| link.name.as_str()), Some("eth0"));
    for name in ["eth1", "eth2", "eth3"] {
        assert_eq!(in_the_way(&links, name).map(|link| &link.name), None);
    }
}
