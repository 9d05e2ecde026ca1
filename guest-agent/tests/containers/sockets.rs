//! Sockets in place of the host's, as a container's mount namespace shows them.

use std::os::unix::net::UnixListener;

use serde_json::json;
use ttrpc::Code;
use vial_agent_protocol::agent::{
    AddSocketRequest, CreateContainerRequest, HostSocket, RemoveSocketRequest, SharedMount,
};

use super::harness::{Agent, Streams, context, fresh_id, spec};
use super::refusal;

fn socket(index: u32, path: &str, number: u64) -> HostSocket {
    HostSocket { index, path: path.into(), number, mode: 0o751, ..Default::default() }
}

async fn add(agent: &Agent, id: &str, socket: HostSocket) -> ttrpc::Result<()> {
    let mut request = AddSocketRequest::new();
    request.container_id = id.to_owned();
    request.socket = Some(socket).into();
    agent.client.add_socket(context(), &request).await.map(drop)
}

async fn remove(agent: &Agent, number: u64) {
    let mut request = RemoveSocketRequest::new();
    request.number = number;
    agent.client.remove_socket(context(), &request).await.expect("remove a socket");
}

/// How many mounts the container has at the socket's place.
async fn mounts(streams: &mut Streams) -> String {
    streams.say("look\n").await;
    streams.read_until("\n").await
}

#[tokio::test]
async fn sockets_come_and_go_in_a_container_and_its_volume_outlives_it() {
    let agent = Agent::start().await;
    let id = fresh_id("sockets");
    let volume = agent.path("share/volume");
    std::fs::create_dir_all(volume.join("deep")).unwrap();
    let host = volume.join("deep/s");
    let _listener = UnixListener::bind(&host).unwrap();

    let script = "while read word; do grep -c ' /run/v/deep/s ' /proc/self/mountinfo; done; \
                  stat -c '%F %a' /run/v/deep/s";
    let mut spec = spec(&["sh", "-c", script]);
    let mounted = spec["mounts"].as_array_mut().unwrap();
    let index = u32::try_from(mounted.len()).unwrap();
    mounted.push(json!({"destination": "/run/v", "type": "bind", "source": "/nowhere",
        "options": ["rbind", "rprivate", "ro"]}));
    let mut streams = agent.streams(false).await;
    let mut request = CreateContainerRequest::new();
    request.container_id = id.clone();
    request.spec = spec.to_string().into_bytes();
    request.root = "root".to_owned();
    request.stdio = Some(streams.ids.clone()).into();
    let path = "volume".into();
    request.mounts = vec![SharedMount { index, path, sockets: true, ..Default::default() }];
    request.sockets = vec![socket(index, "deep/s", 1)];
    agent.client.create_container(context(), &request).await.expect("create the container");
    agent.start_container(&id).await.expect("start the container");

    // There before the container.
    assert_eq!(mounts(&mut streams).await, "1\n");
    remove(&agent, 1).await;
    assert_eq!(mounts(&mut streams).await, "0\n");
    // There later, and in place of another.
    for number in [2, 3] {
        add(&agent, &id, socket(index, "deep/s", number)).await.unwrap();
        assert_eq!(mounts(&mut streams).await, "1\n");
    }
    // The server makes it anew: what was mounted went with the old one.
    std::fs::remove_file(&host).unwrap();
    let _listener = UnixListener::bind(&host).unwrap();
    assert_eq!(mounts(&mut streams).await, "0\n");
    add(&agent, &id, socket(index, "deep/s", 4)).await.unwrap();
    assert_eq!(mounts(&mut streams).await, "1\n");

    let (code, _) = refusal(add(&agent, &id, socket(index, "none", 5)).await);
    assert_eq!(code, Code::INTERNAL);
    for wrong in [socket(0, "deep/s", 5), socket(index, "", 5), socket(index, "../s", 5)] {
        assert_eq!(refusal(add(&agent, &id, wrong).await).0, Code::INVALID_ARGUMENT);
    }

    drop(streams.stdin.take());
    assert_eq!(streams.output().await, "socket 751\n");
    assert_eq!(agent.wait(&id, "").await, 0);
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
    assert!(!agent.path("sockets/volumes").join(&id).exists());
    assert!(host.exists(), "the volume's files went with the container");
}
