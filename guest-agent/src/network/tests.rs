use super::*;
use vial_agent_protocol::agent;

fn request() -> ConfigureNetworkRequest {
    ConfigureNetworkRequest {
        interfaces: vec![agent::Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec!["10.0.0.2/24".into(), "fd00::2/64".into()],
            ..Default::default()
        }],
        routes: vec![agent::Route {
            device: "eth0".into(),
            destination: "0.0.0.0/0".into(),
            gateway: "10.0.0.1".into(),
            protocol: 3,
            ..Default::default()
        }],
        neighbours: vec![agent::Neighbour {
            device: "eth0".into(),
            address: "10.0.0.1".into(),
            mac: vec![2, 0, 0, 0, 0, 2],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn refused(change: impl FnOnce(&mut ConfigureNetworkRequest)) -> NetworkError {
    let mut request = request();
    change(&mut request);
    let error = Plan::read(&request).unwrap_err();
    assert!(error.is_of_the_request());
    error
}

#[test]
fn good_request_is_read_whole() {
    let plan = Plan::read(&request()).unwrap();
    assert_eq!(plan.interfaces[0].addresses.len(), 2);
    assert_eq!(plan.routes[0].gateway, Some([10, 0, 0, 1].into()));
    assert_eq!(plan.neighbours[0].index, 0);
}

#[test]
fn more_than_the_bounds_is_refused() {
    let too_many = |error| assert!(matches!(error, NetworkError::TooMany { .. }), "{error}");
    too_many(refused(|r| r.interfaces = vec![r.interfaces[0].clone(); MAX_INTERFACES + 1]));
    too_many(refused(|r| r.routes = vec![r.routes[0].clone(); MAX_ROUTES + 1]));
    too_many(refused(|r| r.neighbours = vec![r.neighbours[0].clone(); MAX_NEIGHBOURS + 1]));
    let address = "10.0.0.2/24".to_owned();
    too_many(refused(|r| r.interfaces[0].addresses = vec![address; MAX_ADDRESSES + 1]));
}

#[test]
fn what_is_wrong_is_refused() {
    for name in ["", "lo", ".", "..", "a/b", "a b", "a%d", "sixteen-bytes-xx"] {
        assert!(matches!(refused(|r| r.interfaces[0].name = name.into()), NetworkError::Name(_)));
    }
    refused(|r| r.interfaces.push(r.interfaces[0].clone()));
    refused(|r| r.interfaces[0].mac = vec![1; 7]);
    refused(|r| r.interfaces[0].mac = vec![0; 6]);
    refused(|r| r.interfaces[0].mtu = 67);
    refused(|r| r.interfaces[0].mtu = 65536);
    refused(|r| r.interfaces[0].addresses[0] = "10.0.0.2".into());
    refused(|r| r.routes[0].device = "eth1".into());
    refused(|r| r.routes[0].gateway = "fd00::1".into());
    refused(|r| r.routes[0].destination = String::new());
    refused(|r| r.routes[0].scope = 256);
    refused(|r| r.neighbours[0].mac = Vec::new());
    refused(|r| r.neighbours[0].address = "x".into());
    for number in [32, u32::MAX] {
        let error = refused(|r| r.interfaces[0].function = number);
        assert!(matches!(error, NetworkError::Function(of) if of == number), "{error}");
    }
    let error = refused(|r| {
        r.interfaces[0].function = 5;
        let other =
            agent::Interface { name: "net1".into(), mac: vec![2; 6], ..r.interfaces[0].clone() };
        r.interfaces.push(other);
    });
    assert!(matches!(error, NetworkError::Function(5)), "{error}");
}

#[test]
fn interface_that_the_guest_lacks_is_told() {
    let error = configure(&request()).unwrap_err();
    assert!(matches!(error, NetworkError::Absent(name) if name == "eth0"));
}

#[tokio::test]
async fn function_that_has_no_driver_is_told_and_others_are_not_waited_for() {
    let bus = tempfile::tempdir().unwrap();
    await_at(bus.path(), &request()).await.unwrap();
    let mut request = request();
    request.interfaces[0].function = 31;
    let error = await_at(bus.path(), &request).await.unwrap_err();
    assert!(matches!(&error, NetworkError::NoDriver { address, .. } if address == "0000:00:1f.0"));
    assert!(error.to_string().contains("network_functions"), "{error}");
    request.interfaces[0].function = 32;
    assert!(await_at(bus.path(), &request).await.unwrap_err().is_of_the_request());
}
