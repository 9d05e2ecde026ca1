//! The client of the agent in the guest.
//!
//! Calls by `vial-agent-protocol`, each with a time limit except the one that waits for a
//! process. What the guest answers is bounded by ttrpc's 4 MiB and by whoever uses it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use tokio::net::UnixStream;
use ttrpc::context::{Context, with_duration};
use vial_agent_protocol::{PROTOCOL_VERSION, SEED_BYTES, agent, agent_ttrpc::AgentClient};

use crate::timeline::{Timeline, now_ns};

/// How long the agent may take for what it does by itself.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long it may take to let go of PCI functions, which are taken from it then.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It refused, or something failed in the guest.
    #[error("{}", .0.message())]
    Status(ttrpc::Status),
    /// The connection to it failed.
    #[error("cannot {action} in the guest: {error}")]
    Call {
        /// What was asked.
        action: &'static str,
        /// What went wrong.
        error: ttrpc::Error,
    },
    /// The host has no random numbers for the guest.
    #[error("cannot draw random numbers for the guest: {0}")]
    Seed(std::io::Error),
    /// It is of another version.
    #[error(
        "the guest's agent speaks version {0} of the protocol, this shim {PROTOCOL_VERSION}: \
         install the guest image and the shim of one release"
    )]
    Version(u32),
}

fn failed(action: &'static str) -> impl FnOnce(ttrpc::Error) -> AgentError {
    move |error| match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Status(status),
        error => AgentError::Call { action, error },
    }
}

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

/// Random numbers for a guest.
fn seed() -> rustix::io::Result<Vec<u8>> {
    let mut seed = vec![0; *SEED_BYTES.end()];
    let mut filled = 0;
    while filled < seed.len() {
        match getrandom(&mut seed[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(seed)
}

fn limited() -> Context {
    with_duration(CALL_TIMEOUT)
}

impl Agent {
    /// One that was not greeted.
    #[cfg(test)]
    pub(crate) fn unmet(stream: UnixStream) -> Self {
        Self { client: AgentClient::new(ttrpc::asynchronous::Client::new(stream.into())) }
    }

    /// Greets the agent at the other end of `stream`.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn greet(
        stream: UnixStream,
        patience: Duration,
        timeline: &Timeline,
    ) -> Result<Self, AgentError> {
        let client = ttrpc::asynchronous::Client::new(stream.into());
        let client = AgentClient::new(client);
        let request = agent::HelloRequest { version: PROTOCOL_VERSION, ..Default::default() };
        let asked_ns = now_ns();
        let hello =
            client.hello(with_duration(patience), &request).await.map_err(failed("greet"))?;
        if hello.version != PROTOCOL_VERSION {
            return Err(AgentError::Version(hello.version));
        }
        let marks = hello.marks.into_iter().map(|mark| (mark.name, mark.at_ns));
        timeline.mark_guest(marks, hello.now_ns, asked_ns, now_ns());
        tracing::info!(
            "the agent {:?} answers on kernel {:?}",
            hello.agent_version.chars().take(64).collect::<String>(),
            hello.kernel_release.chars().take(64).collect::<String>()
        );
        Ok(Self { client })
    }

    /// Makes a guest that went on from a template this pod's own. It then connects to the ready
    /// port. `request` says what its VM has that the template has not; the rest of it is filled in.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn adopt(&self, request: agent::AdoptRequest) -> Result<(), AgentError> {
        let seed = seed().map_err(|error| AgentError::Seed(error.into()))?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = agent::AdoptRequest {
            realtime_ns: u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX),
            seed,
            ..request
        };
        let adopted = self.client.adopt(limited(), &request).await;
        adopted.map(drop).map_err(failed("begin the pod"))
    }

    /// Makes the guest as large as its VM has become: so many processors, and so much more memory
    /// than its template has, in MiB. What it has over that goes later, or stays.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn grow(&self, vcpus: u8, more_memory_mib: u32) -> Result<(), AgentError> {
        let request =
            agent::ResizeRequest { vcpus: vcpus.into(), more_memory_mib, ..Default::default() };
        let grown = self.client.resize(limited(), &request).await;
        grown.map(drop).map_err(failed("make the guest as large as its VM"))
    }

    /// Gives the guest the pod's network.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn configure_network(
        &self,
        request: &agent::ConfigureNetworkRequest,
    ) -> Result<(), AgentError> {
        let configured = self.client.configure_network(limited(), request).await;
        configured.map(drop).map_err(failed("set up the network"))
    }

    /// Changes what the guest was given of the pod's network.
    ///
    /// # Errors
    /// [`AgentError`]; what could be changed is.
    pub async fn change_network(
        &self,
        change: &agent::ChangeNetworkRequest,
    ) -> Result<(), AgentError> {
        let changed = self.client.change_network(limited(), change).await;
        changed.map(drop).map_err(failed("change the network"))
    }

    /// Gives the guest what the pod's containers share.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn configure_pod(
        &self,
        request: &agent::ConfigurePodRequest,
    ) -> Result<(), AgentError> {
        let configured = self.client.configure_pod(limited(), request).await;
        configured.map(drop).map_err(failed("set up the pod"))
    }

    /// Makes the guest find PCI functions, by their device numbers on its bus 0. Returns the driver
    /// of each, empty for none.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn add_functions(&self, devices: Vec<u32>) -> Result<Vec<String>, AgentError> {
        let request = agent::FunctionsRequest { devices, ..Default::default() };
        let added = self.client.add_functions(limited(), &request).await;
        added.map(|added| added.drivers).map_err(failed("find PCI functions"))
    }

    /// Makes the guest let go of PCI functions.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn remove_functions(&self, devices: Vec<u32>) -> Result<(), AgentError> {
        let request = agent::FunctionsRequest { devices, ..Default::default() };
        let removed = self.client.remove_functions(with_duration(LET_GO_TIMEOUT), &request).await;
        removed.map(drop).map_err(failed("let go of PCI functions"))
    }

    /// Brings a container's copy of a volume up to date with the volume's directory `data`.
    ///
    /// # Errors
    /// [`AgentError`]; the copy is as it was.
    pub async fn renew_copy(
        &self,
        container: &str,
        index: u32,
        data: &str,
    ) -> Result<(), AgentError> {
        let request = agent::RenewCopyRequest {
            container_id: container.into(),
            index,
            data: data.into(),
            ..Default::default()
        };
        let renewed = self.client.renew_copy(limited(), &request).await;
        renewed.map(drop).map_err(failed("renew the copy of a volume"))
    }

    /// Puts a socket over one of the host's in a volume of a container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn add_socket(
        &self,
        container: &str,
        socket: agent::HostSocket,
    ) -> Result<(), AgentError> {
        let request = agent::AddSocketRequest {
            container_id: container.into(),
            socket: protobuf::MessageField::some(socket),
            ..Default::default()
        };
        let added = self.client.add_socket(limited(), &request).await;
        added.map(drop).map_err(failed("add a socket of the host"))
    }

    /// Takes it away. Its connections live on.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn remove_socket(&self, number: u64) -> Result<(), AgentError> {
        let request = agent::RemoveSocketRequest { number, ..Default::default() };
        let removed = self.client.remove_socket(limited(), &request).await;
        removed.map(drop).map_err(failed("remove a socket of the host"))
    }

    /// Makes a socket that a process of the guest has bound reachable by all volumes that show it.
    /// Returns whether any process has.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn join_socket(&self, places: Vec<agent::SocketPlace>) -> Result<bool, AgentError> {
        let request = agent::JoinSocketRequest { places, ..Default::default() };
        match self.client.join_socket(limited(), &request).await {
            Ok(_) => Ok(true),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {
                Ok(false)
            }
            Err(error) => Err(failed("join a socket of the pod's")(error)),
        }
    }

    /// Makes a container and its init process.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn create(&self, request: &agent::CreateContainerRequest) -> Result<(), AgentError> {
        let created = self.client.create_container(limited(), request).await;
        created.map(drop).map_err(failed("create the container"))
    }

    /// Lets a container's init process run.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn start(&self, container: &str) -> Result<agent::StartResponse, AgentError> {
        let request = container_request(container);
        self.client
            .start_container(limited(), &request)
            .await
            .map_err(failed("start the container"))
    }

    /// Adds a process to a container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn exec(&self, request: &agent::ExecProcessRequest) -> Result<(), AgentError> {
        let started = self.client.exec_process(limited(), request).await;
        started.map(drop).map_err(failed("start the process"))
    }

    /// Waits for a process, however long it runs, and returns its exit status, 0 to 255, and how
    /// many processes of its container had ended for want of memory.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn wait(&self, container: &str, exec: &str) -> Result<(u32, u64), AgentError> {
        let request = process_request(container, exec);
        let ended = self.client.wait_process(Context::default(), &request).await;
        ended
            .map(|ended| (ended.exit_status.min(255), ended.oom_kills))
            .map_err(failed("wait for the process"))
    }

    /// Waits, however long it takes, until more than `known` processes of a container have ended
    /// for want of memory, and returns how many.
    ///
    /// # Errors
    /// [`AgentError`]; the container's deletion is one.
    pub async fn wait_oom(&self, container: &str, known: u64) -> Result<u64, AgentError> {
        let request = agent::WaitOomRequest {
            container_id: container.into(),
            oom_kills: known,
            ..Default::default()
        };
        let waited = self.client.wait_oom(Context::default(), &request).await;
        waited.map(|waited| waited.oom_kills).map_err(failed("wait for a want of memory"))
    }

    /// What a container uses.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn stats(&self, container: &str) -> Result<agent::StatsResponse, AgentError> {
        let read = self.client.read_stats(limited(), &container_request(container)).await;
        read.map_err(failed("read the statistics"))
    }

    /// Changes a container's limits to those of an OCI `linux.resources` in JSON.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = agent::UpdateContainerRequest {
            container_id: container.into(),
            resources,
            ..Default::default()
        };
        let updated = self.client.update_container(limited(), &request).await;
        updated.map(drop).map_err(failed("change the limits"))
    }

    /// Stops a container's processes where they are.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let paused = self.client.pause_container(limited(), &container_request(container)).await;
        paused.map(drop).map_err(failed("pause the container"))
    }

    /// Lets a container's processes run on.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let resumed = self.client.resume_container(limited(), &container_request(container)).await;
        resumed.map(drop).map_err(failed("resume the container"))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn kill(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = agent::KillProcessRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client.kill_process(limited(), &request).await.map(drop).map_err(failed("kill"))
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        (columns, rows): (u32, u32),
    ) -> Result<(), AgentError> {
        let request = agent::ResizeTerminalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            columns,
            rows,
            ..Default::default()
        };
        let resized = self.client.resize_terminal(limited(), &request).await;
        resized.map(drop).map_err(failed("resize the terminal"))
    }

    /// The processes of a container, as the guest numbers them.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn pids(&self, container: &str) -> Result<Vec<u32>, AgentError> {
        let listed = self.client.list_pids(limited(), &container_request(container)).await;
        listed.map(|listed| listed.pids).map_err(failed("list the processes"))
    }

    /// Forgets an ended exec process.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = process_request(container, exec);
        let deleted = self.client.delete_process(limited(), &request).await;
        deleted.map(drop).map_err(failed("delete the process"))
    }

    /// Removes an ended container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn delete_container(&self, container: &str) -> Result<(), AgentError> {
        let deleted = self.client.delete_container(limited(), &container_request(container)).await;
        deleted.map(drop).map_err(failed("delete the container"))
    }
}

fn container_request(container: &str) -> agent::ContainerRequest {
    agent::ContainerRequest { container_id: container.into(), ..Default::default() }
}

fn process_request(container: &str, exec: &str) -> agent::ProcessRequest {
    agent::ProcessRequest {
        container_id: container.into(),
        exec_id: exec.into(),
        ..Default::default()
    }
}
