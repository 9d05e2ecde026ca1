//! What containers of a pod share.

use serde_json::{Value, json};
use ttrpc::Code;
use vial_agent_protocol::agent::{
    ConfigurePodRequest, CreateContainerRequest, PidNamespace, SharedMemory,
};

use super::harness::{Agent, Streams, context, fresh_id, spec};
use super::refusal;

/// A container whose spec joins a PID namespace of the host.
fn joining(arguments: &[&str]) -> Value {
    let mut spec = spec(arguments);
    spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": "/proc/7/ns/pid"});
    spec
}

async fn run(
    agent: &Agent,
    id: &str,
    spec: &Value,
    adapt: impl FnOnce(&mut CreateContainerRequest),
) -> Streams {
    let streams = agent.streams(false).await;
    let mut request = CreateContainerRequest::new();
    request.container_id = id.to_owned();
    request.spec = spec.to_string().into_bytes();
    request.root = "root".to_owned();
    request.stdio = Some(streams.ids.clone()).into();
    adapt(&mut request);
    agent.client.create_container(context(), &request).await.expect("create the container");
    agent.start_container(id).await.expect("start the container");
    streams
}

fn pids_of(pod: bool, container: &str) -> impl FnOnce(&mut CreateContainerRequest) {
    let container_id = container.to_owned();
    move |request| {
        let namespace = PidNamespace { pod, container_id, ..Default::default() };
        request.pid_namespace = Some(namespace).into();
    }
}

/// The words of every process that a container sees.
const LIST: &str = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done";

#[tokio::test]
async fn pod_that_shares_process_ids_has_an_init_that_collects_orphans() {
    let agent = Agent::start().await;
    let (first, second) = (fresh_id("shared"), fresh_id("shared"));
    // An orphan that ends before the second container looks.
    let script = "(sh -c 'exec sleep 0.1' &); sleep 0.5; echo up; exec sleep 601";
    let mut streams = run(&agent, &first, &joining(&["sh", "-c", script]), pids_of(true, "")).await;
    streams.read_until("up").await;
    let mut streams = run(&agent, &second, &joining(&["sh", "-c", LIST]), pids_of(true, "")).await;
    let seen = streams.output().await;
    assert!(seen.contains("pid-namespace-init") && seen.contains("sleep 601"), "{seen}");
    assert!(!seen.contains("sleep 0.1"), "{seen}");
    assert_eq!(agent.wait(&second, "").await, 0);
    // No init of its namespace: a signal without a handler ends it.
    agent.kill(&first, "", 15, false).await.unwrap();
    assert_eq!(agent.wait(&first, "").await, 143);
    for id in [&first, &second] {
        agent.delete(id).await.unwrap();
        agent.assert_no_trace(id);
    }
}

#[tokio::test]
async fn container_joins_the_process_ids_of_another() {
    let agent = Agent::start().await;
    let (target, looker) = (fresh_id("target"), fresh_id("looker"));
    let script = "echo up; exec sleep 602";
    let mut streams = agent.run(&target, &spec(&["sh", "-c", script])).await;
    streams.read_until("up").await;
    let look = joining(&["sh", "-c", LIST]);
    let mut streams = run(&agent, &looker, &look, pids_of(false, &target)).await;
    let seen = streams.output().await;
    assert!(seen.contains("sleep 602") && !seen.contains("pid-namespace-init"), "{seen}");
    assert_eq!(agent.wait(&looker, "").await, 0);
    agent.delete(&looker).await.unwrap();
    agent.kill(&target, "", 9, false).await.unwrap();
    agent.wait(&target, "").await;
    agent.delete(&target).await.unwrap();

    let streams = agent.streams(false).await;
    let refused = agent.create(&fresh_id("alone"), &look, &streams.ids).await;
    let (code, text) = refusal(refused);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
}

#[tokio::test]
async fn shared_memory_is_one_for_all_and_of_its_size() {
    let agent = Agent::start().await;
    let with_memory = |request: &mut CreateContainerRequest| {
        request.shared_memory =
            vec![SharedMemory { index: 3, bytes: 1 << 20, ..Default::default() }];
    };
    let of = |script: &str| {
        let mut spec = spec(&["sh", "-c", script]);
        spec["mounts"][3] = json!({"destination": "/dev/shm", "type": "bind",
            "source": "/run/pod/shm", "options": ["rbind"]});
        spec
    };
    let (first, second) = (fresh_id("memory"), fresh_id("memory"));
    let mut streams = run(&agent, &first, &of("echo note >/dev/shm/a; echo up"), with_memory).await;
    streams.read_until("up").await;
    let look = "cat /dev/shm/a; head -c 2000000 /dev/zero >/dev/shm/b || stat -c %s /dev/shm/b";
    let mut streams = run(&agent, &second, &of(look), with_memory).await;
    let seen = streams.output().await;
    // Less the page that the note takes.
    assert_eq!(seen, format!("note\n{}\n", (1 << 20) - 4096));
    for id in [&first, &second] {
        agent.wait(id, "").await;
        agent.delete(id).await.unwrap();
    }
}

#[tokio::test]
async fn loopback_of_a_network_namespace_of_its_own_is_up() {
    let agent = Agent::start().await;
    let id = fresh_id("loopback");
    let mut streams = agent.run(&id, &spec(&["cat", "/sys/class/net/lo/flags"])).await;
    // IFF_UP | IFF_LOOPBACK
    assert_eq!(streams.output().await, "0x9\n");
    agent.wait(&id, "").await;
    agent.delete(&id).await.unwrap();
}

#[tokio::test]
async fn kernel_parameters_that_are_none_are_refused_and_named() {
    let agent = Agent::start().await;
    for name in ["no.such.parameter", "../../etc/passwd", "kernel"] {
        let mut request = ConfigurePodRequest::new();
        request.sysctls.insert(name.into(), "1".into());
        let (code, text) = refusal(agent.client.configure_pod(context(), &request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains(name), "{text}");
    }
}
