//! The messages of traffic control (tc(8), linux/pkt_sched.h, linux/pkt_cls.h) that join an
//! interface and a tap, and those about taps that nobody else needs.

use std::io;

use vial_netlink::{
    Message, NLM_F_CREATE, NLM_F_EXCL, Socket, attributes,
    network::{change_link, link_header},
};

const RTM_DELLINK: u16 = 17;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;

/// Where those of an interface as a whole hang (`TC_H_ROOT`).
const ROOT: u32 = 0xffff_ffff;
/// Where ingress queueing disciplines hang (`TC_H_INGRESS`), and the handle that they have.
const PARENT: u32 = 0xffff_fff1;
const HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
/// The packet is ours now.
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
/// Priority 1, every protocol (`ETH_P_ALL` in network order).
const FILTER: u32 = (1 << 16) | (3u16.to_be() as u32);

const IFLA_AF_SPEC: u16 = 26;
const AF_INET6: u16 = 10;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;

/// ENOENT, ENODEV and EINVAL: what a deletion answers when there is nothing.
pub(super) const GONE: [i32; 3] = [2, 19, 22];

/// `struct tcmsg`.
fn header(index: i32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut header = [0; 20];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&handle.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    header[16..].copy_from_slice(&info.to_ne_bytes());
    header
}

/// Lets what comes in at an interface be filtered. Refused when something else does that.
pub(super) fn add_ingress(index: i32) -> Message {
    Message::new(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &header(index, HANDLE, PARENT, 0))
        .with_text(TCA_KIND, "ingress")
}

/// Has what goes out at an interface wait in no queueing discipline. A tap whose queue is full drops
/// packets in any case, and one that can have several has 256 of the kernel's default one.
pub(super) fn without_discipline(index: i32) -> Message {
    Message::new(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &header(index, 0, ROOT, 0))
        .with_text(TCA_KIND, "noqueue")
}

/// Takes that back, with its filters.
pub(super) fn delete_ingress(index: i32) -> Message {
    Message::new(RTM_DELQDISC, 0, &header(index, HANDLE, PARENT, 0)).with_text(TCA_KIND, "ingress")
}

/// Sends out at `to` whatever comes in at `from`.
pub(super) fn redirect(from: i32, to: i32) -> Message {
    // `struct tc_mirred`: index, capabilities, action, two counts, what to do, where to.
    let words = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to.cast_unsigned()];
    let parameters: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Message::new(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &header(from, 0, HANDLE, FILTER))
        .with_text(TCA_KIND, "matchall")
        .with_nested(TCA_OPTIONS, |options| {
            options.with_nested(TCA_MATCHALL_ACT, |actions| {
                // The first action of a list.
                actions.with_nested(1, |action| {
                    action
                        .with_text(TCA_ACT_KIND, "mirred")
                        .with_nested(TCA_ACT_OPTIONS, |m| m.with(TCA_MIRRED_PARMS, &parameters))
                })
            })
        })
}

/// The interfaces whose incoming packets are filtered already.
pub(super) fn with_ingress(socket: &mut Socket) -> io::Result<Vec<i32>> {
    let request = Message::new(RTM_GETQDISC, 0, &header(0, 0, 0, 0));
    let listed = socket.list(&request, RTM_NEWQDISC)?;
    Ok(listed.iter().filter_map(|body| ingress_of(body)).collect())
}

fn ingress_of(body: &[u8]) -> Option<i32> {
    let fixed = body.get(..20)?;
    let (_, kind) = attributes(&body[20..]).find(|(kind, _)| *kind == TCA_KIND)?;
    [b"ingress\0".as_slice(), b"clsact\0"]
        .contains(&kind)
        .then_some(i32::from_ne_bytes(fixed[4..8].try_into().ok()?))
}

/// Keeps the kernel from giving an interface a link-local address, and from speaking there.
pub(super) fn without_own_address(index: i32) -> Message {
    change_link(index).with_nested(IFLA_AF_SPEC, |families| {
        families
            .with_nested(AF_INET6, |six| six.with(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]))
    })
}

/// Deletes an interface.
pub(super) fn delete_link(index: i32) -> Message {
    Message::new(RTM_DELLINK, 0, &link_header(index, 0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ingress_is_told_from_other_disciplines() {
        assert_eq!(ingress_of(add_ingress(7).body()), Some(7));
        let other = Message::new(RTM_NEWQDISC, 0, &header(7, 0, 0, 0)).with_text(TCA_KIND, "tbf");
        assert_eq!(ingress_of(other.body()), None);
        assert_eq!(ingress_of(&[0; 10]), None);
    }

    #[test]
    fn redirect_names_both_interfaces() {
        let message = redirect(3, 0x0102_0304);
        assert_eq!(message.body()[4..8], 3i32.to_ne_bytes());
        assert!(message.body().ends_with(&0x0102_0304i32.to_ne_bytes()));
    }
}
