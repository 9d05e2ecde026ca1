use super::*;

#[test]
fn hosts_own_namespace_is_refused() {
    let error = look(Path::new("/proc/self/ns/net"), &[]).unwrap_err();
    assert!(matches!(error, NetworkError::Host(_)), "{error}");
}

#[test]
fn namespace_that_is_absent_is_named() {
    let error = look(Path::new("/nowhere/net"), &[]).unwrap_err();
    assert!(error.to_string().contains("/nowhere/net"), "{error}");
}

#[test]
fn namespace_that_is_gone_needs_no_detaching() {
    let joint = Joint { interface: "eth0".into(), tap: "vtap0".into() };
    let (namespace, functions) = ("/nowhere/net".into(), Vec::new());
    let gone = Attachment { namespace, inode: 1, joints: vec![joint], functions };
    detach(&gone).unwrap();
}

#[test]
fn only_ethernet_that_is_up_is_for_guests() {
    let link = Link {
        index: 2,
        name: "eth0".into(),
        hardware: ARPHRD_ETHER,
        flags: IFF_UP,
        mac: vec![2, 0, 0, 0, 0, 1],
        mtu: 1500,
        alias: String::new(),
        function: None,
        stands_on: None,
        part_of: None,
    };
    assert!(is_for_guests(&link));
    assert!(!is_for_guests(&Link { flags: 0, ..link.clone() }));
    assert!(!is_for_guests(&Link { flags: IFF_UP | IFF_LOOPBACK, ..link.clone() }));
    assert!(!is_for_guests(&Link { hardware: 768, ..link }));
}
