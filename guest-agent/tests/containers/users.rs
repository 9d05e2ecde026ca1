//! Containers of a pod whose users are others outside.

use std::os::unix::fs::{MetadataExt, chown};

use serde_json::{Value, json};
use ttrpc::Code;
use vial_agent_protocol::agent::{ConfigurePodRequest, IdRange, UserNamespace};

use super::harness::{Agent, context, fresh_id, process, spec};
use super::refusal;

const HOST: u32 = 100_000;
const SIZE: u32 = 65536;

fn users(host: u32, size: u32) -> UserNamespace {
    let range = IdRange { host, size, ..Default::default() };
    UserNamespace { uids: vec![range.clone()], gids: vec![range], ..Default::default() }
}

/// An agent whose pod has users from [`HOST`] on, who own the containers' root.
async fn agent() -> Agent {
    let agent = Agent::start().await;
    let root = agent.path("share/root");
    for entry in std::fs::read_dir(&root).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("usr") && !path.is_symlink() {
            chown(path, Some(HOST), Some(HOST)).unwrap();
        }
    }
    chown(&root, Some(HOST), Some(HOST)).unwrap();
    let mut request = ConfigurePodRequest::new();
    request.hostname = "mapped".into();
    request.sysctls.insert("kernel.shmmni".into(), "77".into());
    request.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "90".into());
    request.user_namespace = Some(users(HOST, SIZE)).into();
    agent.client.configure_pod(context(), &request).await.expect("configure the pod");
    agent
}

/// In the pod's namespaces, which the host calls by paths.
fn mapped(arguments: &[&str]) -> Value {
    let mut spec = spec(arguments);
    let mappings = json!([{"containerID": 0, "hostID": HOST, "size": SIZE}]);
    spec["root"]["readonly"] = json!(false);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings;
    spec["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
        {"type": "ipc", "path": "/proc/7/ns/ipc"},
        {"type": "uts", "path": "/proc/7/ns/uts"},
        {"type": "network", "path": "/proc/7/ns/net"},
        {"type": "user", "path": "/proc/7/ns/user"}
    ]);
    spec["linux"]["devices"] = json!([
        {"path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 7}
    ]);
    spec
}

#[tokio::test]
async fn container_has_the_pods_users_and_owns_what_is_the_pods() {
    let agent = agent().await;
    let id = fresh_id("mapped");
    let script = "cat /proc/self/uid_map /proc/self/gid_map; id -u; hostname
        cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start
        stat -c '%u %a %n' /tmp /dev/own /proc/self/ /dev/pts /dev/mqueue; touch /tmp/made
        echo again >/dev/stdout; ls /sys/class/net; exec sleep 600";
    let mut streams = agent.run(&id, &mapped(&["sh", "-c", script])).await;
    let seen = streams.read_until("lo\n").await;
    let words: Vec<&str> = seen.split_whitespace().collect();
    let (host, size) = (HOST.to_string(), SIZE.to_string());
    let map = ["0", host.as_str(), size.as_str()];
    assert_eq!(words[..10], [&map[..], &map, &["0", "mapped", "77", "90"]].concat(), "{seen}");
    for line in ["0 755 /tmp", "7 600 /dev/own", "0 555 /proc/self/", "0 755 /dev/pts", "again"] {
        assert!(seen.lines().any(|found| found == line), "{line}: {seen}");
    }
    let made = std::fs::metadata(agent.path("share/root/tmp/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (HOST, HOST));

    let mut root = process(&[
        "sh",
        "-c",
        "cat /proc/self/uid_map; id -u; touch /tmp/added && stat -c %u /tmp/added /tmp/made
        grep -E 'Cap(Prm|Eff|Bnd|Amb)|NoNew|Seccomp:' /proc/self/status
        echo 9 >/proc/sys/kernel/panic || echo refused",
    ]);
    root["noNewPrivileges"] = json!(false);
    let mut streams = agent.streams(false).await;
    agent.exec(&id, "root", &root, &streams.ids).await.unwrap();
    let out = streams.output().await;
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(words[..6], [&map[..], &["0", "0", "0"]].concat(), "{out}");
    // CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID, SYS_CHROOT (linux/capability.h).
    for kind in ["CapPrm:\t", "CapEff:\t", "CapBnd:\t"] {
        assert!(out.contains(&format!("{kind}00000000000400eb\n")), "{out}");
    }
    assert!(out.contains("NoNewPrivs:\t0") && out.contains("refused"), "{out}");
    let added = std::fs::metadata(agent.path("share/root/tmp/added")).unwrap();
    assert_eq!((added.uid(), added.gid()), (HOST, HOST));

    let mut nobody = process(&["id"]);
    nobody["user"] = json!({"uid": SIZE, "gid": 0});
    let streams = agent.streams(false).await;
    let (_, text) = refusal(agent.exec(&id, "nobody", &nobody, &streams.ids).await);
    assert!(text.contains("user namespace"), "{text}");

    let mut other = process(&["sh", "-c", "id -u; id -G; echo here >/dev/stderr; touch /tmp/no"]);
    other["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [2000]});
    other["capabilities"] = json!({});
    let streams = agent.streams(false).await;
    agent.exec(&id, "other", &other, &streams.ids).await.unwrap();
    let mut streams = streams;
    let out = streams.output().await;
    assert_eq!(out, "1000\n1001 2000\n");
    assert_eq!(agent.wait(&id, "other").await, 1);

    agent.kill(&id, "", 9, true).await.unwrap();
    agent.wait(&id, "").await;
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn other_users_than_the_pods_are_refused() {
    let agent = agent().await;
    let streams = agent.streams(false).await;
    let mut plain = mapped(&["true"]);
    plain["linux"]["namespaces"].as_array_mut().unwrap().pop();
    let (code, text) = refusal(agent.create(&fresh_id("plain"), &plain, &streams.ids).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("has to be in the user namespace"), "{text}");
    let mut other = mapped(&["true"]);
    other["linux"]["uidMappings"][0]["hostID"] = json!(HOST + 1);
    let (_, text) = refusal(agent.create(&fresh_id("other"), &other, &streams.ids).await);
    assert!(text.contains("other ids"), "{text}");

    let mut request = ConfigurePodRequest::new();
    request.user_namespace = Some(users(HOST, SIZE)).into();
    let (code, text) = refusal(agent.client.configure_pod(context(), &request).await);
    assert!(code == Code::INVALID_ARGUMENT && text.contains("already"), "{text}");
}

#[tokio::test]
async fn users_that_cannot_be_are_refused_and_change_nothing() {
    let agent = Agent::start().await;
    for (host, size) in [(HOST, 0), (u32::MAX, 1), (2, u32::MAX)] {
        let mut request = ConfigurePodRequest::new();
        request.user_namespace = Some(users(host, size)).into();
        let (code, text) = refusal(agent.client.configure_pod(context(), &request).await);
        assert!(code == Code::INVALID_ARGUMENT && text.contains("users"), "{text}");
    }
    let streams = agent.streams(false).await;
    let id = fresh_id("none");
    let (_, text) = refusal(agent.create(&id, &mapped(&["true"]), &streams.ids).await);
    assert!(text.contains("its pod has none"), "{text}");
    agent.assert_no_trace(&id);
}
