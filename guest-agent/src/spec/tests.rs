use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// As `ctr run` writes it, shortened where it says nothing new.
fn ctr_spec() -> Value {
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["sh", "-c", "exit 42"],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_KILL"],
                "effective": ["CAP_CHOWN", "CAP_KILL"],
                "permitted": ["CAP_CHOWN", "CAP_KILL"]
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
            "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "system_u:system_r:container_t:s0"
        },
        "root": {"path": "rootfs"},
        "hostname": "demo",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}
        ],
        "hooks": {"createRuntime": [{"path": "/usr/bin/host-program"}]},
        "annotations": {"io.example": "kept"},
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "cpu": {"quota": 50000, "cpus": "64-65", "mems": "1"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]
            },
            "cgroupsPath": "/default/demo",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": "/var/run/netns/demo"}
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}]},
            "intelRdt": {"closID": "x"}
        }
    })
}

fn guest() -> Guest {
    Guest {
        root: "/run/vial/share/root".into(),
        sources: BTreeMap::new(),
        host_guards: Vec::new(),
        cgroup: "/vial-containers/demo".into(),
        terminal: false,
        hugetlb: false,
        pid_namespace: None,
        user_namespace: None,
        devices: Vec::new(),
        disks: Vec::new(),
    }
}

fn rewritten(spec: &Value, guest: &Guest) -> Result<(Value, Vec<&'static str>), SpecError> {
    let spec = parse(spec.to_string().as_bytes())?;
    let (spec, dropped) = rewrite(spec, guest)?;
    Ok((serde_json::to_value(spec).unwrap(), dropped))
}

#[test]
fn ctr_spec_changes_where_the_guest_differs_and_nowhere_else() {
    let mut want = ctr_spec();
    want["root"]["path"] = json!("/run/vial/share/root");
    want["linux"]["cgroupsPath"] = json!("/vial-containers/demo");
    want["linux"]["namespaces"].as_array_mut().unwrap().pop();
    want["linux"].as_object_mut().unwrap().remove("intelRdt");
    want["linux"]["resources"].as_object_mut().unwrap().remove("hugepageLimits");
    want["linux"]["resources"]["cpu"] = json!({"quota": 50000});
    want["process"].as_object_mut().unwrap().remove("apparmorProfile");
    want["process"].as_object_mut().unwrap().remove("selinuxLabel");
    want["process"]["terminal"] = json!(false);
    want.as_object_mut().unwrap().remove("hooks");

    let (mut got, dropped) = rewritten(&ctr_spec(), &guest()).unwrap();
    // Sets in the type: their order says nothing.
    for kind in ["bounding", "effective", "permitted"] {
        let set = got["process"]["capabilities"][kind].as_array_mut().unwrap();
        set.sort_by_key(Value::to_string);
    }
    assert_eq!(got, want);
    assert_eq!(dropped, ["hooks"]);
}

#[test]
fn shared_mount_gets_its_source_in_the_guest() {
    let mut spec = ctr_spec();
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro"]}
    ));
    let mut guest = guest();
    assert_eq!(rewritten(&spec, &guest), Err(SpecError::HostMount("/data".into())));
    guest.sources.insert(7, "/run/vial/share/data".into());
    let (got, _) = rewritten(&spec, &guest).unwrap();
    assert_eq!(got["mounts"][7]["source"], json!("/run/vial/share/data"));
    assert_eq!(got["mounts"][7]["options"], json!(["rbind", "ro"]));
    guest.host_guards.push(7);
    let (got, _) = rewritten(&spec, &guest).unwrap();
    assert_eq!(got["mounts"][7]["options"], json!(["rbind"]));
    guest.sources.insert(8, "/run/vial/share/other".into());
    assert_eq!(rewritten(&spec, &guest), Err(SpecError::MountIndex { index: 8, count: 8 }));
}

#[test]
fn bind_by_option_alone_is_a_bind() {
    let mut spec = ctr_spec();
    spec["mounts"][6] = json!({"destination": "/x", "type": "none", "options": ["bind"]});
    assert_eq!(rewritten(&spec, &guest()), Err(SpecError::HostMount("/x".into())));
}

#[test]
fn pod_namespaces_become_the_guests_own() {
    let mut spec = ctr_spec();
    spec["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "mount"},
        {"type": "ipc", "path": "/proc/7/ns/ipc"},
        {"type": "uts", "path": "/proc/7/ns/uts"},
        {"type": "network", "path": "/proc/7/ns/net"}
    ]);
    let (got, _) = rewritten(&spec, &guest()).unwrap();
    assert_eq!(got["linux"]["namespaces"], json!([{"type": "pid"}, {"type": "mount"}]));
    assert_eq!(got.get("hostname"), None);
}

#[test]
fn namespaces_of_others_are_refused() {
    // "mnt" is how the type calls it.
    let kinds = [("pid", "pid"), ("mount", "mnt"), ("cgroup", "cgroup"), ("time", "time")];
    for (kind, shown) in kinds {
        let mut spec = ctr_spec();
        spec["linux"]["namespaces"] = json!([{"type": kind, "path": "/proc/7/ns/x"}]);
        let error = rewritten(&spec, &guest()).unwrap_err();
        assert_eq!(error, SpecError::Namespace(shown.to_owned()));
    }
}

#[test]
fn pid_namespace_that_is_joined_becomes_the_guests() {
    let mut spec = ctr_spec();
    spec["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/7/ns/pid"}]);
    let guest = Guest { pid_namespace: Some("/proc/99/ns/pid".into()), ..guest() };
    let (got, _) = rewritten(&spec, &guest).unwrap();
    let want = json!([{"type": "pid", "path": "/proc/99/ns/pid"}]);
    assert_eq!(got["linux"]["namespaces"], want);
    // One of its own stays its own.
    spec["linux"]["namespaces"] = json!([{"type": "pid"}]);
    let (got, _) = rewritten(&spec, &guest).unwrap();
    assert_eq!(got["linux"]["namespaces"], json!([{"type": "pid"}]));
}

#[test]
fn shares_become_a_weight_unless_there_is_one() {
    let mut spec = ctr_spec();
    spec["linux"]["resources"]["cpu"] = json!({"shares": 512, "quota": 1000});
    let (got, _) = rewritten(&spec, &guest()).unwrap();
    let resources = &got["linux"]["resources"];
    assert_eq!(resources["unified"], json!({"cpu.weight": "59"}));
    assert_eq!(resources["cpu"], json!({"quota": 1000}));
    spec["linux"]["resources"]["unified"] = json!({"cpu.weight": "7", "memory.high": "1"});
    let (got, _) = rewritten(&spec, &guest()).unwrap();
    let unified = &got["linux"]["resources"]["unified"];
    assert_eq!(*unified, json!({"cpu.weight": "7", "memory.high": "1"}));
}

#[test]
fn hugepage_limits_stay_where_they_can_be_kept() {
    let guest = Guest { hugetlb: true, ..guest() };
    let (got, _) = rewritten(&ctr_spec(), &guest).unwrap();
    assert_eq!(got["linux"]["resources"]["hugepageLimits"][0]["pageSize"], json!("2MB"));
}

#[test]
fn missing_sections_are_named() {
    for section in ["root", "process", "linux"] {
        let mut spec = ctr_spec();
        spec.as_object_mut().unwrap().remove(section);
        assert_eq!(rewritten(&spec, &guest()), Err(SpecError::Section(section)));
    }
    let mut spec = ctr_spec();
    spec["process"]["args"] = json!([]);
    assert_eq!(rewritten(&spec, &guest()), Err(SpecError::NoArguments));
}

#[test]
fn exec_process_loses_what_the_guest_has_not() {
    let mut process = ctr_spec()["process"].clone();
    process["noNewPrivileges"] = json!(false);
    let process = exec_process(process.to_string().as_bytes(), true).unwrap();
    assert_eq!(process.terminal(), Some(true));
    assert_eq!(process.no_new_privileges(), None);
    assert_eq!(process.apparmor_profile(), &None);
    assert!(matches!(exec_process(b"{", true), Err(SpecError::Process(_))));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
        let _ = exec_process(&bytes, false);
    }

    #[test]
    fn no_namespace_path_ever_survives(
        kinds in prop::collection::vec(
            (prop::sample::select(vec!["pid", "ipc", "uts", "mount", "network", "cgroup"]),
             prop::option::of("/[a-z]{1,8}")), 0..8),
    ) {
        let mut spec = ctr_spec();
        spec["linux"]["namespaces"] = kinds
            .iter()
            .map(|(kind, path)| json!({"type": kind, "path": path}))
            .collect();
        if let Ok((got, _)) = rewritten(&spec, &guest()) {
            for namespace in got["linux"]["namespaces"].as_array().unwrap() {
                prop_assert!(namespace.get("path").is_none());
            }
        }
    }
}

#[test]
fn propagation_is_named_as_the_library_knows_it() {
    for (asked, known) in [("rslave", "slave"), ("rshared", "shared"), ("private", "private")] {
        let mut spec = ctr_spec();
        spec["linux"]["rootfsPropagation"] = asked.into();
        let (spec, _) = rewritten(&spec, &guest()).unwrap();
        assert_eq!(spec["linux"]["rootfsPropagation"], known, "{asked}");
    }
    let (spec, _) = rewritten(&ctr_spec(), &guest()).unwrap();
    assert!(spec["linux"].get("rootfsPropagation").is_none(), "{spec}");
}

fn in_user_namespace(host: u32) -> Value {
    let mut spec = ctr_spec();
    let mappings = json!([{"containerID": 0, "hostID": host, "size": 50}]);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings.clone();
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/data", "type": "bind", "source": "/srv/data",
         "options": ["rbind", "ridmap"], "uidMappings": mappings.clone(), "gidMappings": mappings}
    ));
    spec
}

#[test]
fn user_namespace_is_the_pods_and_mounts_are_mapped_already() {
    let mut guest = guest();
    guest.sources.insert(7, "/run/vial/share/data".into());
    assert_eq!(rewritten(&in_user_namespace(1000), &guest), Err(SpecError::NoUserNamespace));
    let users = Users::new(&[(0, 1000, 50)], &[(0, 1000, 50)]).unwrap();
    guest.user_namespace = Some(("/proc/1/fd/9".into(), users));
    let (got, _) = rewritten(&in_user_namespace(1000), &guest).unwrap();
    let namespaces = got["linux"]["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&json!({"type": "user", "path": "/proc/1/fd/9"})));
    for mapping in ["uidMappings", "gidMappings"] {
        assert_eq!(got["linux"].get(mapping), None);
        assert_eq!(got["mounts"][7].get(mapping), None);
    }
    assert_eq!(got["mounts"][7]["options"], json!(["rbind"]));
    assert_eq!(rewritten(&in_user_namespace(1001), &guest), Err(SpecError::OtherUsers));
    let mut two = in_user_namespace(1000);
    let more = json!({"containerID": 50, "hostID": 5000, "size": 50});
    two["linux"]["uidMappings"].as_array_mut().unwrap().push(more);
    assert!(matches!(rewritten(&two, &guest), Err(SpecError::Users(_))));
    guest.sources.clear();
    assert_eq!(rewritten(&ctr_spec(), &guest), Err(SpecError::NotInUserNamespace));
}
