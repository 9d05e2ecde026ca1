use proptest::prelude::*;
use serde_json::json;

use super::*;

const ID: &str = "4f1c";
const FUNCTION: &str = "0000:3b:10.0";
const OTHER: &str = "0000:3b:10.2";

fn functions() -> Vec<Address> {
    [FUNCTION, OTHER].map(|text| text.parse().unwrap()).into()
}

fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A file as Multus leaves it of sriov-cni's result for a function that is bound to vfio-pci.
fn file(config: &Value, result: Value) -> Value {
    json!({
        "kind": "cniCacheV1",
        "containerId": ID,
        "config": to_base64(config.to_string().as_bytes()),
        "ifName": "net1",
        "networkName": "fast",
        "netns": "/run/netns/a",
        "cniArgs": [["K8S_POD_NAME", "p"]],
        "result": result,
    })
}

fn config() -> Value {
    json!({"type": "sriov", "cniVersion": "1.0.0", "name": "fast", "vlan": 7, "deviceID": FUNCTION})
}

fn result() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "net1", "mac": "02:99:00:00:00:07", "sandbox": "/run/netns/a", "mtu": 1400}],
        "ips": [
            {"interface": 0, "address": "10.7.0.9/24", "gateway": "10.7.0.1"},
            {"interface": 0, "address": "fd07::9/64"},
        ],
        "routes": [{"dst": "10.8.0.0/16"}, {"dst": "10.9.0.0/16", "gw": "10.7.0.2", "priority": 7}],
        "dns": {},
    })
}

fn told(file: &Value) -> Result<Vec<Chosen>, ReadError> {
    read(file.to_string().as_bytes(), ID, &functions())
}

fn changed(change: impl FnOnce(&mut Value)) -> Result<Vec<Chosen>, ReadError> {
    let mut result = result();
    change(&mut result);
    told(&file(&config(), result))
}

#[test]
fn result_of_a_function_without_an_interface_is_understood() {
    let chosen = told(&file(&config(), result())).unwrap().remove(0);
    assert_eq!(
        (chosen.address.to_string().as_str(), chosen.interface.as_str()),
        (FUNCTION, "net1")
    );
    assert_eq!((chosen.mac, chosen.mtu), (Some([2, 0x99, 0, 0, 0, 7]), Some(1400)));
    assert_eq!(chosen.addresses, ["10.7.0.9/24", "fd07::9/64"]);
    let text = |route: &agent::Route| {
        let agent::Route { destination, gateway, source, scope, metric, .. } = route;
        format!("{destination} via {gateway:?} from {source:?} scope {scope} metric {metric}")
    };
    let routes: Vec<String> = chosen.routes.iter().map(text).collect();
    assert_eq!(
        routes,
        [
            "10.7.0.0/24 via \"\" from \"10.7.0.9\" scope 253 metric 0",
            "fd07::/64 via \"\" from \"fd07::9\" scope 253 metric 0",
            "10.8.0.0/16 via \"10.7.0.1\" from \"\" scope 0 metric 0",
            "10.9.0.0/16 via \"10.7.0.2\" from \"\" scope 0 metric 7",
        ]
    );
    assert!(chosen.routes.iter().all(|route| route.device == "net1"));
}

#[test]
fn function_is_named_by_any_of_the_ways_that_there_are() {
    let runtime = json!({"runtimeConfig": {"deviceID": FUNCTION}});
    let listed =
        json!({"plugins": [{"type": "bridge"}, {"type": "sriov", "deviceID": "0000:3B:10.0"}]});
    for config in [json!({"pciBusID": FUNCTION}), runtime, listed] {
        assert_eq!(told(&file(&config, result())).unwrap().len(), 1, "{config}");
    }
    let mut given = file(&json!({}), result());
    given["capabilityArgs"] = json!({"deviceID": FUNCTION, "portMappings": []});
    assert_eq!(told(&given).unwrap().len(), 1);
    // The result knows better than the configuration which interface it is.
    let chosen = changed(|result| {
        result["interfaces"] = json!([
            {"name": "veth0"}, {"name": "eth0", "sandbox": "/run/netns/a"},
            {"name": "net7", "sandbox": "/run/netns/a", "pciID": OTHER},
        ]);
        result["ips"][0]["interface"] = json!(2);
    });
    let chosen = chosen.unwrap().remove(0);
    assert_eq!((chosen.address.to_string().as_str(), chosen.interface.as_str()), (OTHER, "net7"));
    assert_eq!((chosen.mac, chosen.mtu, chosen.addresses.len()), (None, None, 1));
}

#[test]
fn addresses_need_no_interface_to_be_of() {
    // As host-device tells of a function that has a driver of user space.
    let chosen = changed(|result| result["interfaces"] = Value::Null).unwrap().remove(0);
    assert_eq!((chosen.interface.as_str(), chosen.mac, chosen.addresses.len()), ("net1", None, 2));
    // As sriov-cni does without IPAM, and without a MAC address.
    let only = json!({"interfaces": [{"name": "net1", "mac": "", "sandbox": "/run/netns/a"}]});
    let chosen = told(&file(&config(), only)).unwrap().remove(0);
    assert_eq!((chosen.mac, chosen.mtu, chosen.addresses.len()), (None, None, 0));
    assert!(chosen.routes.is_empty());
}

#[test]
fn what_is_not_of_the_pod_is_left() {
    let good = file(&config(), result());
    for (key, value) in [
        ("containerId", json!("4f1d")),
        ("kind", json!("cniCacheV2")),
        ("config", json!(to_base64(b"{\"deviceID\": \"0000:3b:10.4\"}"))),
        ("config", Value::Null),
        ("result", Value::Null),
    ] {
        let mut file = good.clone();
        file[key] = value;
        assert_eq!(told(&file).unwrap(), [], "{key}");
    }
    let chosen = changed(|result| result["routes"][1]["table"] = json!(100)).unwrap();
    assert!(chosen[0].routes.iter().all(|route| route.destination != "10.9.0.0/16"));
}

#[test]
fn what_is_wrong_is_said() {
    for (change, what) in [
        (("/interfaces/0/mac", json!("02:99")), "MAC address"),
        (("/interfaces/0/mtu", json!(67)), "MTU"),
        (("/interfaces/0/mtu", json!(65536)), "MTU"),
        (("/ips/0/address", json!("10.7.0.9")), "address"),
        (("/ips/0/gateway", json!("a gateway")), "gateway"),
        (("/routes/0/dst", json!("everywhere")), "destination"),
        (("/ips", json!(vec![json!({"address": "10.7.0.9/24"}); MAX_ADDRESSES + 1])), "addresses"),
        (("/routes", json!(vec![json!({"dst": "10.8.0.0/16"}); MAX_ROUTES + 1])), "routes"),
        (("/routes", json!("none")), "form"),
    ] {
        let (at, value) = change;
        let error = changed(|result| *result.pointer_mut(at).unwrap() = value).unwrap_err();
        assert!(error.to_string().contains(what), "{at}: {error}");
    }
    for name in ["", "lo", "a b", "a/b", "sixteen-bytes-xx"] {
        let mut file = file(&config(), json!({}));
        file["ifName"] = json!(name);
        assert!(told(&file).unwrap_err().to_string().contains("name"), "{name:?}");
    }
    let both = json!({"plugins": [{"deviceID": FUNCTION}, {"deviceID": OTHER}]});
    let error = told(&file(&both, result())).unwrap_err();
    assert!(error.to_string().contains(OTHER), "{error}");
    let mut file = file(&config(), result());
    file["config"] = json!("!");
    assert!(matches!(told(&file), Err(ReadError::Base64(_))));
}

/// A cache with these files, and a second that is absent.
fn cache(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let cache = tempfile::tempdir().unwrap();
    fs::create_dir(cache.path().join(RESULTS)).unwrap();
    for (name, bytes) in files {
        fs::write(cache.path().join(RESULTS).join(name), bytes).unwrap();
    }
    let caches = vec![cache.path().to_path_buf(), cache.path().join("multus")];
    (cache, caches)
}

#[test]
fn files_of_the_sandbox_are_found_among_others() {
    let good = file(&config(), result()).to_string();
    let large = vec![b' '; MAX_FILE_BYTES as usize + 1];
    let (cache, caches) = cache(&[
        ("fast-4f1c-net1", good.as_bytes()),
        // The same by another name, what cannot be read, and what is none of this pod's.
        ("again-4f1c-net1", good.as_bytes()),
        ("cut-4f1c-net2", &good.as_bytes()[..40]),
        ("large-4f1c-net2", &large),
        ("fast-4f1d-net1", b"of another"),
    ]);
    fs::create_dir(cache.path().join(RESULTS).join("no-4f1c-file")).unwrap();
    let chosen = search(&caches, ID, &functions()).unwrap();
    assert_eq!(chosen.len(), 1, "{chosen:?}");
    assert_eq!(search(&caches, "4f1d", &functions()).unwrap(), []);
    assert_eq!(search(&[], ID, &functions()).unwrap(), []);
}

#[test]
fn results_that_contradict_each_other_are_refused() {
    let first = file(&config(), result());
    let mut other = first.clone();
    other["ifName"] = json!("net2");
    other["result"]["interfaces"][0]["name"] = json!("net2");
    let text = other.to_string();
    let files = [("a-4f1c-net1", first.to_string()), ("a-4f1c-net2", text)];
    let (_cache, caches) =
        cache(&[(files[0].0, files[0].1.as_bytes()), (files[1].0, files[1].1.as_bytes())]);
    let error = search(&caches, ID, &functions()).unwrap_err().to_string();
    assert!(error.contains(FUNCTION) && error.contains("cni_caches"), "{error}");
    // One name for two functions.
    let second = file(&json!({"deviceID": OTHER}), result()).to_string();
    let (_cache, caches) =
        cache(&[("a-4f1c-net1", first.to_string().as_bytes()), ("b-4f1c-net1", second.as_bytes())]);
    let error = search(&caches, ID, &functions()).unwrap_err().to_string();
    assert!(error.contains("net1") && error.contains(OTHER), "{error}");
}

proptest! {
    #[test]
    fn no_file_breaks_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..256), at in 0..900_usize) {
        let _ = read(&bytes, ID, &functions());
        let mut text = file(&config(), result()).to_string().into_bytes();
        let at = at % text.len();
        let end = text.len().min(at + bytes.len());
        text[at..end].copy_from_slice(&bytes[..end - at]);
        let _ = read(&text, ID, &functions());
    }
}
