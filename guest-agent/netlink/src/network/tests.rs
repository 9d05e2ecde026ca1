use super::*;
use proptest::prelude::*;

fn same_family() -> impl Strategy<Value = [IpAddr; 3]> {
    prop_oneof![
        any::<[Ipv4Addr; 3]>().prop_map(|all| all.map(IpAddr::from)),
        any::<[Ipv6Addr; 3]>().prop_map(|all| all.map(IpAddr::from)),
    ]
}

proptest! {
    #[test]
    fn route_is_read_as_it_was_written(
        addresses in same_family(),
        (index, prefix, scope, protocol) in (1..i32::MAX, 1..=32u8, any::<u8>(), any::<u8>()),
        (metric, onlink, gateway, source) in any::<(u32, bool, bool, bool)>(),
    ) {
        let [destination, through, from] = addresses;
        prop_assume!(!is_link_local(&destination));
        let route = Route {
            index,
            destination: Cidr { address: destination, prefix },
            gateway: gateway.then_some(through),
            source: source.then_some(from),
            scope,
            protocol,
            metric,
            onlink,
        };
        for message in [add_route(&route), replace_route(&route), remove_route(&route)] {
            prop_assert_eq!(read_route(message.body()), Some(route));
        }
    }

    #[test]
    fn address_and_neighbour_are_read_as_they_were_written(
        [address, ..] in same_family(), index in any::<i32>(), prefix in 0..=32u8, mac in any::<[u8; 6]>(),
    ) {
        prop_assume!(!is_link_local(&address));
        let cidr = Cidr { address, prefix };
        for message in [add_address(index, cidr), remove_address(index, cidr)] {
            prop_assert_eq!(read_address(message.body()), Some((index, cidr)));
        }
        let neighbour = Neighbour { index, address, mac };
        prop_assert_eq!(read_neighbour(add_neighbour(&neighbour).body()), Some(neighbour));
        prop_assert_eq!(cidr.to_string().parse(), Ok(cidr));
    }

    #[test]
    fn any_body_is_read_to_an_end(body in proptest::collection::vec(any::<u8>(), 0..128)) {
        let _ = (read_link(&body), read_address(&body), read_route(&body), read_neighbour(&body));
    }
}

#[test]
fn link_is_read_as_it_was_named() {
    let link = read_link(rename(7, "eth0").body()).unwrap();
    assert_eq!((link.index, link.name.as_str()), (7, "eth0"));
    assert_eq!(read_link(set_mtu(7, 1400).body()).unwrap().mtu, 1400);
    assert_eq!(read_link(up(7).body()).unwrap().flags, IFF_UP);
    assert_eq!(read_link(down(7).body()).unwrap().flags, 0);
}

#[test]
fn link_tells_its_function_and_what_stands_on_what() {
    let of = |bus: &str| {
        change_link(7)
            .with_text(IFLA_PARENT_DEV_NAME, "0000:3b:10.0")
            .with_text(IFLA_PARENT_DEV_BUS_NAME, bus)
    };
    assert_eq!(read_link(of("pci").body()).unwrap().function.as_deref(), Some("0000:3b:10.0"));
    assert_eq!(read_link(of("virtio").body()).unwrap().function, None);
    let above = change_link(8).with(IFLA_LINK, &7i32.to_ne_bytes());
    assert_eq!(read_link(above.body()).unwrap().stands_on, Some(7));
    let elsewhere = above.with(IFLA_LINK_NETNSID, &0i32.to_ne_bytes());
    assert_eq!(read_link(elsewhere.body()).unwrap().stands_on, None);
    let part = change_link(7).with(IFLA_MASTER, &9i32.to_ne_bytes());
    assert_eq!(read_link(part.body()).unwrap().part_of, Some(9));
    assert_eq!(read_link(set_alias(7, "ens1f0v0").body()).unwrap().alias, "ens1f0v0");
    assert_eq!(read_link(set_mac(7, &[2; 6]).body()).unwrap().mac, [2; 6]);
    assert_eq!(read_link(move_to(7, 3, "net1").body()).unwrap().name, "net1");
}

#[test]
fn what_is_no_cidr_is_refused() {
    for text in ["", "10.0.0.1", "10.0.0.1/33", "::1/129", "a/8", "10.0.0.1/-1", "10.0.0.1/x"] {
        assert!(text.parse::<Cidr>().is_err(), "{text}");
    }
}

#[test]
fn what_every_kernel_makes_by_itself_is_left_out() {
    let cidr = "fe80::1/64".parse().unwrap();
    assert_eq!(read_address(add_address(1, cidr).body()), None);
}
