//! Changes of the pod's network after its start, told to the guest.
//!
//! What somebody changes in the pod's network namespace would be a container's at once with a
//! runtime of the host's. Here the shim is told of it by the kernel, looks at the namespace again,
//! and asks the agent to do what differs from what the guest was told last. An interface that comes
//! gets a tap and the VM a device for it; with an interface that goes, a device goes that came so.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    net::unix::pipe::Receiver,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use vial_agent_protocol::{
    MAX_INTERFACES,
    agent::{ConfigureNetworkRequest, Interface},
};
use vial_vmm_api::{Action, Reply};

use super::{Given, functions::Functions, lock, vmm};
use crate::{
    agent::{Agent, AgentError},
    config::VhostNet,
    error::ServiceError,
    network::{self, Attachment, Carried, Followed, Joint, Known, Looked, NetworkError, Tap},
    numa::placed::Placed,
    state_dir::StateDir,
    vmm_client::{VmmClient, VmmError},
};

/// Changes come in bursts: how long there have to be none before the namespace is looked at, and how
/// long after the first it is in any case.
const SETTLED: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_millis(300);
/// How many times as long as a look took there is none: what changes without end costs a bounded part
/// of the time.
const PAUSE_TIMES: u32 = 8;
/// After how long the guest is told again what it did not answer to, and how often.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(5);
const MOST_TRIES: u32 = 5;
/// How long the VMM may take to add a device, or to take one.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// What is changed when the network changes.
pub(super) struct Follower {
    pub(super) agent: Agent,
    pub(super) vmm: Arc<VmmClient>,
    /// What is joined in the namespace, for whoever takes it back.
    pub(super) attachment: Arc<Mutex<Attachment>>,
    /// With what is written down of the sandbox.
    pub(super) functions: Arc<tokio::sync::Mutex<Functions>>,
    pub(super) dir: StateDir,
    /// Whether the kernel is to carry the packets of interfaces that come.
    pub(super) vhost_net: VhostNet,
    /// How large the VM is when they come.
    pub(super) placed: Arc<Placed>,
}

/// Tells the guest of changes until it is dropped, beginning with those since it was `given` what it
/// has. A pod whose network cannot be watched runs all the same.
pub(super) async fn run(follower: Follower, given: ConfigureNetworkRequest) {
    let attachment = lock(&follower.attachment).clone();
    let mut told = network::of_joints(&given, &attachment.joints);
    drop(given);
    let opened = spawn_blocking(move || network::follow(&attachment)).await;
    let followed = match opened.map_err(io::Error::from) {
        Ok(Ok(followed)) => followed,
        Ok(Err(error)) => return tracing::warn!("the pod's network is not followed: {error}"),
        Err(error) => return tracing::error!("the pod's network is not followed: {error}"),
    };
    if let Err(error) = follower.follow(followed, &mut told).await {
        tracing::error!("the pod's network is followed no more: {error}");
    }
}

impl Follower {
    async fn follow(
        &self,
        mut followed: Followed,
        told: &mut ConfigureNetworkRequest,
    ) -> io::Result<()> {
        let mut failures = 0;
        loop {
            let began = Instant::now();
            // Somebody else may hold what the kernel locks for its answer.
            let done = spawn_blocking(move || (followed.look(), followed)).await;
            let (looked, same) = done.map_err(io::Error::from)?;
            followed = same;
            let took = began.elapsed();
            match looked {
                Ok(looked) => match self.apply(&mut followed, told, looked).await {
                    Ok(true) => continue,
                    Ok(false) => failures = 0,
                    Err(error) => {
                        tracing::warn!("the guest's network: {error}");
                        failures += 1;
                        if failures < MOST_TRIES {
                            sleep(TRY_AGAIN_AFTER).await;
                            continue;
                        }
                    }
                },
                // What has become too much; the guest keeps what it has.
                Err(error) => {
                    tracing::warn!("the guest is not told of its network's change: {error}");
                }
            }
            sleep(took * PAUSE_TIMES).await;
            settled(&followed).await?;
        }
    }

    /// Brings the guest from what it was told to what is now. Returns whether there is more to be
    /// told, of interfaces that it has got. After an error nobody knows what the guest has done; what
    /// it has done already it takes for done when it is told again.
    async fn apply(
        &self,
        followed: &mut Followed,
        told: &mut ConfigureNetworkRequest,
        looked: Looked,
    ) -> Result<bool, AgentError> {
        let answered = self.tell(told, looked.now).await;
        for known in looked.went {
            tracing::info!("{} has gone from the pod's network", known.joint.interface);
            if let Known { joint, device: Some(device), .. } = known {
                followed.remove(&joint);
                self.take(&joint, device).await;
            }
        }
        let mut more = false;
        for interface in looked.came {
            match self.admit(followed, &interface).await {
                Ok(()) => {
                    tracing::info!("{} has come to the pod's network", interface.name);
                    more = true;
                }
                Err(error) => tracing::warn!("the guest does not get {}: {error}", interface.name),
            }
        }
        answered.map(|()| more)
    }

    async fn tell(
        &self,
        told: &mut ConfigureNetworkRequest,
        now: ConfigureNetworkRequest,
    ) -> Result<(), AgentError> {
        let Some(change) = network::difference(told, &now) else { return Ok(()) };
        tracing::info!(
            "the pod's network has changed: {} interfaces, {} routes and {} neighbours",
            change.interfaces.len(),
            change.added_routes.len() + change.removed_routes.len(),
            change.added_neighbours.len() + change.removed_neighbours.len()
        );
        match self.agent.change_network(&change).await {
            Ok(()) => {}
            // What the guest could not do it is not asked for again: a container may be in the way.
            Err(AgentError::Status(status)) => {
                tracing::warn!("the guest's network: {}", status.message());
            }
            Err(error) => return Err(error),
        }
        *told = now;
        Ok(())
    }

    /// Gives the guest an interface that has come.
    async fn admit(
        &self,
        followed: &mut Followed,
        interface: &Interface,
    ) -> Result<(), ServiceError> {
        if let Some(known) = followed.absent(&interface.name) {
            // The guest has kept the one that it was given at its start, and so has the tap.
            let (joint, device) = (known.joint.clone(), known.device);
            let (attachment, same) = (lock(&self.attachment).clone(), joint.clone());
            blocking(move || network::attach_again(&attachment, &same)).await?;
            return Ok(followed.add(joint, device)?);
        }
        let count = followed.count() + 1;
        if count > MAX_INTERFACES {
            let limit = MAX_INTERFACES;
            return Err(NetworkError::TooMany { what: "interfaces", count, limit }.into());
        }
        let joint = followed.draw_joint(&interface.name);
        self.write_down(|joints| joints.push(joint.clone())).await?;
        match self.give(&joint, interface).await {
            Ok(device) => Ok(followed.add(joint, Some(device))?),
            Err(error) => {
                let attachment = lock(&self.attachment).clone();
                let (joints, functions) = (vec![joint.clone()], Vec::new());
                let own = Attachment { joints, functions, ..attachment };
                blocking(move || network::detach(&own)).await?;
                self.write_down(|joints| joints.retain(|other| *other != joint)).await?;
                Err(error)
            }
        }
    }

    /// Makes a tap for an interface and a device of the VM for that. Returns the device's number.
    async fn give(&self, joint: &Joint, interface: &Interface) -> Result<u8, ServiceError> {
        let attachment = lock(&self.attachment).clone();
        let (own, described) = (joint.clone(), interface.clone());
        let carried = Carried::of(self.vhost_net, self.placed.size().vcpus);
        let attach = move || network::attach_late(&attachment, &own, &described, carried);
        let Tap { queues, vhosts, mac, mtu } = blocking(attach).await?;
        let mut handed = Given::default();
        let taps = queues.iter().map(|queue| handed.add(queue)).collect();
        let vhosts = vhosts.iter().map(|vhost| handed.add(vhost)).collect();
        let action = Action::AddInterface { taps, mac, mtu, vhosts };
        let asked = timeout(DEVICE_PATIENCE, self.vmm.request(action, &handed.0)).await;
        let failed = vmm("give a network interface to the VM");
        let device = match asked.unwrap_or(Err(VmmError::Late(DEVICE_PATIENCE))) {
            Ok(Reply::InterfaceAdded { device }) => device,
            Ok(_) => return Err(failed(VmmError::Answer)),
            Err(error) => return Err(failed(error)),
        };
        if let Err(error) = self.agent.add_functions(vec![device.into()]).await {
            self.take_device(device).await;
            return Err(error.into());
        }
        Ok(device)
    }

    /// Takes a device and its tap from the VM, whose interface has gone.
    async fn take(&self, joint: &Joint, device: u8) {
        self.take_device(device).await;
        if let Err(error) = self.write_down(|joints| joints.retain(|other| other != joint)).await {
            tracing::warn!("{error}");
        }
    }

    async fn take_device(&self, device: u8) {
        if let Err(error) = self.agent.remove_functions(vec![device.into()]).await {
            tracing::warn!("the guest does not let go of its device {device}: {error}");
        }
        let asked = self.vmm.request(Action::RemoveInterface { device }, &[]);
        match timeout(DEVICE_PATIENCE, asked).await.unwrap_or(Err(VmmError::Late(DEVICE_PATIENCE)))
        {
            Ok(Reply::Done) | Err(VmmError::Closed) => {}
            Ok(_) => tracing::error!("the VM keeps its device {device}: {}", VmmError::Answer),
            Err(error) => tracing::error!("the VM keeps its device {device}: {error}"),
        }
    }

    /// Changes what is to be taken back, on disk as well.
    async fn write_down(&self, change: impl FnOnce(&mut Vec<Joint>)) -> Result<(), ServiceError> {
        let mut functions = self.functions.lock().await;
        let changed = {
            let mut attachment = lock(&self.attachment);
            change(&mut attachment.joints);
            attachment.clone()
        };
        functions.state.network = Some(changed);
        Ok(self.dir.write_state(&functions.state)?)
    }
}

/// Does what enters the namespace on a thread that may wait.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, ServiceError> {
    match spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
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
