//! Changes of the pod's network after its start, told to the guest.
//!
//! What somebody changes in the pod's network namespace would be a container's at once with a
//! runtime of the host's. Here the shim is told of it by the kernel, looks at the namespace again,
//! and asks the agent to do what differs from what the guest was told last.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use tokio::{net::unix::pipe::Receiver, task::spawn_blocking, time::sleep};
use vial_agent_protocol::agent::ConfigureNetworkRequest;

use crate::{
    agent::{Agent, AgentError},
    network::{self, Attachment, Followed},
};

/// Changes come in bursts: how long there have to be none before the namespace is looked at, and how
/// long after the first it is in any case.
const SETTLED: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_millis(300);
/// How many times as long as a look took there is none: what changes without end costs a bounded part
/// of the time.
const PAUSE_TIMES: u32 = 8;

/// Tells the guest of changes until it is dropped, beginning with those since it was `given` what it
/// has. A pod whose network cannot be watched runs all the same.
pub(crate) async fn run(attachment: Attachment, given: ConfigureNetworkRequest, agent: Agent) {
    if attachment.joints.is_empty() {
        return;
    }
    let mut told = network::of_joints(&given, &attachment.joints);
    drop(given);
    let opened = spawn_blocking(move || network::follow(&attachment)).await;
    let followed = match opened.map_err(io::Error::from) {
        Ok(Ok(followed)) => followed,
        Ok(Err(error)) => return tracing::warn!("the pod's network is not followed: {error}"),
        Err(error) => return tracing::error!("the pod's network is not followed: {error}"),
    };
    if let Err(error) = follow(followed, &mut told, &agent).await {
        tracing::warn!("the pod's network is followed no more: {error}");
    }
}

async fn follow(
    mut followed: Followed,
    told: &mut ConfigureNetworkRequest,
    agent: &Agent,
) -> io::Result<()> {
    loop {
        let began = Instant::now();
        // Somebody else may hold what the kernel locks for its answer.
        let looked = spawn_blocking(move || (followed.look(), followed)).await;
        let (now, same) = looked.map_err(io::Error::from)?;
        followed = same;
        match now {
            Ok(now) => tell(agent, told, now).await?,
            // What has become too much, or changes meanwhile; the guest keeps what it has.
            Err(error) => tracing::warn!("the guest is not told of its network's change: {error}"),
        }
        sleep(began.elapsed() * PAUSE_TIMES).await;
        settled(&followed).await?;
    }
}

/// Brings the guest from what it was told to what is now.
async fn tell(
    agent: &Agent,
    told: &mut ConfigureNetworkRequest,
    now: ConfigureNetworkRequest,
) -> io::Result<()> {
    let Some(change) = network::difference(told, &now) else { return Ok(()) };
    tracing::info!(
        "the pod's network has changed: {} interfaces, {} routes and {} neighbours",
        change.interfaces.len(),
        change.added_routes.len() + change.removed_routes.len(),
        change.added_neighbours.len() + change.removed_neighbours.len()
    );
    match agent.change_network(&change).await {
        Ok(()) => {}
        // What the guest could not do it is not asked for again: a container may be in the way.
        Err(AgentError::Status(status)) => {
            tracing::warn!("the guest's network: {}", status.message())
        }
        Err(error) => return Err(io::Error::other(error)),
    }
    *told = now;
    Ok(())
}

/// Waits until something has changed, and then until nothing more does.
async fn settled(followed: &Followed) -> io::Result<()> {
    loop {
        // Like a pipe it can be waited for until there is something to read.
        let watched = followed.as_fd().try_clone_to_owned()?;
        Receiver::from_owned_fd_unchecked(watched)?.readable().await?;
        if drain(followed)? {
            break;
        }
    }
    let first = Instant::now();
    loop {
        sleep(SETTLED).await;
        if !drain(followed)? || first.elapsed() > PATIENCE {
            return Ok(());
        }
    }
}

fn drain(followed: &Followed) -> io::Result<bool> {
    followed.drain().map_err(io::Error::other)
}
