//! Statistics, new limits and pausing, as far as they need no controllers: where tests run those
//! may be another hierarchy's. The suite has the rest.

use std::time::Duration;

use serde_json::{Value, json};
use ttrpc::Code;
use vial_agent_protocol::agent::{ContainerRequest, StatsResponse, UpdateContainerRequest};

use super::harness::{Agent, context, fresh_id, process, spec};
use super::refusal;

fn of(id: &str) -> ContainerRequest {
    let mut request = ContainerRequest::new();
    request.container_id = id.to_owned();
    request
}

async fn stats(agent: &Agent, id: &str) -> StatsResponse {
    agent.client.read_stats(context(), &of(id)).await.unwrap()
}

async fn update(agent: &Agent, id: &str, resources: Value) -> ttrpc::Result<()> {
    let mut request = UpdateContainerRequest::new();
    request.container_id = id.to_owned();
    request.resources = resources.to_string().into_bytes();
    agent.client.update_container(context(), &request).await.map(drop)
}

const BUSY: &str = "echo up; while :; do :; done";

#[tokio::test]
async fn running_container_has_statistics_and_an_absent_one_has_none() {
    let agent = Agent::start().await;
    let id = fresh_id("stats");
    let mut streams = agent.run(&id, &spec(&["sh", "-c", BUSY])).await;
    streams.read_until("up").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let first = stats(&agent, &id).await;
    assert!(first.cpu["usage_usec"] > 0, "{first:?}");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(stats(&agent, &id).await.cpu["usage_usec"] > first.cpu["usage_usec"]);
    agent.kill(&id, "", 9, true).await.unwrap();
    agent.wait(&id, "").await;
    agent.delete(&id).await.unwrap();
    let gone = agent.client.read_stats(context(), &of(&id)).await;
    assert_eq!(refusal(gone).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn limits_that_are_none_are_refused_and_named() {
    let agent = Agent::start().await;
    let id = fresh_id("update");
    let mut streams = agent.run(&id, &spec(&["sh", "-c", "echo up; exec sleep 600"])).await;
    streams.read_until("up").await;
    update(&agent, &id, json!({"memory": {"swap": 0}})).await.unwrap();
    for (wrong, said) in [
        (json!({"cpu": 1}), "linux.resources"),
        (json!({"memory": {"swap": 1}}), "memory.swap is 1"),
        (json!({"unified": {"nothing.max": "much"}}), "nothing.max"),
    ] {
        let (code, text) = refusal(update(&agent, &id, wrong).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(said), "{text}");
    }
    agent.kill(&id, "", 9, true).await.unwrap();
    agent.wait(&id, "").await;
    agent.delete(&id).await.unwrap();
}

#[tokio::test]
async fn paused_container_stands_still_until_it_is_resumed_or_killed() {
    let agent = Agent::start().await;
    let id = fresh_id("pause");
    let mut streams = agent.run(&id, &spec(&["sh", "-c", BUSY])).await;
    streams.read_until("up").await;
    let (code, text) = refusal(agent.client.resume_container(context(), &of(&id)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    for _ in 0..2 {
        agent.client.pause_container(context(), &of(&id)).await.unwrap();
        let used = stats(&agent, &id).await.cpu["usage_usec"];
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(stats(&agent, &id).await.cpu["usage_usec"], used);
        let again = agent.client.pause_container(context(), &of(&id)).await;
        assert!(refusal(again).1.contains("it is paused"));
        let streams = agent.streams(false).await;
        let exec = agent.exec(&id, "more", &process(&["true"]), &streams.ids).await;
        assert!(refusal(exec).1.contains("it is paused"));
        agent.client.resume_container(context(), &of(&id)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(stats(&agent, &id).await.cpu["usage_usec"] > used);
    }
    agent.client.pause_container(context(), &of(&id)).await.unwrap();
    agent.kill(&id, "", 9, false).await.unwrap();
    assert_eq!(agent.wait(&id, "").await, 137);
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}
