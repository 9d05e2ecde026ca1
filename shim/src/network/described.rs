//! What is written of interfaces in configurations and results of others, read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vial_agent_protocol::agent;
use vial_netlink::network::Cidr;

/// How rtnetlink(7) numbers what comes with an address.
const PROTOCOL_KERNEL: u32 = 2;
/// And destinations that are reached without a gateway.
pub(crate) const SCOPE_LINK: u32 = 253;

/// A hardware's address of one interface, as in `02:00:00:00:00:01`.
pub(crate) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut words = text.split(':');
    for place in &mut mac {
        let word = words.next().filter(|word| word.len() == 2)?;
        *place = u8::from_str_radix(word, 16).ok()?;
    }
    let is_one = words.next().is_none() && mac != [0; 6] && mac[0] & 1 == 0;
    is_one.then_some(mac)
}

/// Whether it is an address with the length of its prefix.
pub(crate) fn is_cidr(text: &str) -> bool {
    text.contains('/') && text.parse::<Cidr>().is_ok()
}

/// The network that an address is in, as in `10.0.0.0/24`.
fn network_of(address: &str) -> Option<String> {
    let Cidr { address, prefix } = address.parse().ok()?;
    Some(match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            format!("{}/{prefix}", Ipv4Addr::from_bits(address.to_bits() & mask))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            format!("{}/{prefix}", Ipv6Addr::from_bits(address.to_bits() & mask))
        }
    })
}

/// The routes to the networks that addresses are in. The guest's addresses bring none by themselves.
pub(crate) fn on_link(device: &str, addresses: &[String]) -> Vec<agent::Route> {
    let networks = addresses.iter().filter_map(|address| Some((network_of(address)?, address)));
    let route = |(destination, address): (String, &String)| agent::Route {
        device: device.to_owned(),
        destination,
        source: address.split('/').next().unwrap_or_default().into(),
        scope: SCOPE_LINK,
        protocol: PROTOCOL_KERNEL,
        ..Default::default()
    };
    networks.map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_of_an_address_has_its_prefix() {
        for (address, network) in [
            ("10.77.3.9/24", Some("10.77.3.0/24")),
            ("10.77.3.9/32", Some("10.77.3.9/32")),
            ("10.77.3.9/0", Some("0.0.0.0/0")),
            ("fd00:1:2::9/48", Some("fd00:1:2::/48")),
            ("fd00::9/0", Some("::/0")),
            ("x", None),
        ] {
            assert_eq!(network_of(address).as_deref(), network, "{address}");
        }
    }

    #[test]
    fn hardware_addresses_are_those_of_one_interface() {
        assert_eq!(parse_mac("02:00:00:00:0A:0b"), Some([2, 0, 0, 0, 10, 11]));
        for text in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "03:00:00:00:00:01", "0:0:0:0:0:1"]
        {
            assert_eq!(parse_mac(text), None, "{text}");
        }
        assert_eq!(parse_mac("00:00:00:00:00:00"), None);
    }
}
