//! One VM: started as a chain of steps, stopped by taking them back.
//!
//! state directory → network → devices → shared tree → VMM process → boot → guest ready → agent greeted →
//! pod and network configured. Each step pushes its undo; a failure takes all back, and stopping does the
//! same.

mod boot;
mod disks;
mod follow;
mod functions;
mod growth;
mod start;

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    sync::{mpsc, watch},
};
use vial_agent_protocol::{
    SOCKET_PORT,
    agent::{ConfigureNetworkRequest, ConfigurePodRequest, ServedDevice},
};
use vial_vmm_api::Action;

pub(crate) use self::boot::base_devices;
pub use self::growth::{Growth, GrowthError, Means, Reach, Shortage};
use self::{
    boot::{Files, Given, Handed, boot, console_tail, open_console},
    follow::Follower,
    functions::{Functions, pass_devices},
    start::Started,
};
use crate::{
    agent::Agent,
    config::Config,
    copies::Copies,
    core_scheduling,
    devices::{
        handles::{self, Opener},
        wanted::Wanted,
    },
    disks::{Disks, cache::Cache},
    error::ServiceError,
    forward,
    jail::{
        self, Confinement,
        cgroup::{Cgroup, Limits},
    },
    network::{self, Attachment, Carried, Tap},
    numa::{self, claim::Claim, placed::Placed},
    pod_files::PodFiles,
    share::{self, Share},
    size::Size,
    sockets::Sockets,
    state_dir::{ProcessIdentity, STATE_VERSION, State, StateDir},
    template::ahead,
    timeline::Timeline,
    undo::UndoStack,
    vhost_user::{self, connect::Connected, listed::Listed, reconnect::Reconnector},
    vmm_client::{self, VmmClient, VmmEvent},
    vmm_process::VmmProcess,
};

/// How long a VMM may take to end when it is asked to, and when it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long a VM may live on after its agent has gone: a panic that is being written.
const AGENT_GONE_PATIENCE: Duration = Duration::from_secs(3);

/// Who the sandbox is, and what it is made from.
#[derive(Debug)]
pub struct Plan {
    /// The operator's configuration, with the size of this VM.
    pub config: Config,
    /// The size that it has there for all, of which kernel and agent live.
    pub own: Size,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// The socket that the shim serves.
    pub socket: std::path::PathBuf,
    /// The network namespace whose interfaces the guest gets; without it the guest has none.
    pub network_namespace: Option<std::path::PathBuf>,
    /// What the pod's containers share in the guest.
    pub pod: ConfigurePodRequest,
    /// The pod's own files, when containerd asked for it by the Sandbox API. By that it also stops
    /// it.
    pub files: Option<PodFiles>,
    /// The cgroup that containerd has for it, as the OCI spec says it.
    pub cgroups_path: Option<String>,
    /// The functions of the host that it asks for.
    pub devices: Wanted,
    /// Whether it may start from a template.
    pub template: bool,
    /// The devices of other processes that it asks for.
    pub served: Vec<Listed>,
    /// What its annotations ask for of the host's nodes.
    pub numa: numa::Wanted,
    /// What its container asks for of them, when that is known with it.
    pub claim: Claim,
    /// Where the phases are marked.
    pub timeline: Arc<Timeline>,
}

/// A VM whose agent answers.
#[derive(Debug)]
pub struct Sandbox {
    /// Where its state is kept.
    pub dir: StateDir,
    /// What its guest sees.
    pub share: Share,
    /// The VMM's socket.
    pub vmm: Arc<VmmClient>,
    /// The agent.
    pub agent: Agent,
    /// The volumes that its containers have copies of.
    pub copies: Copies,
    /// Sockets of the host in its containers' volumes.
    pub sockets: Sockets,
    /// The number of the next stream in the guest.
    pub next_stream: AtomicU64,
    /// Where on the host it is.
    pub placed: Arc<Placed>,
    /// How large it is.
    pub growth: Arc<Growth>,
    /// What its containers are given of devices of other processes.
    pub served: Vec<ServedDevice>,
    functions: Arc<tokio::sync::Mutex<Functions>>,
    disks: tokio::sync::Mutex<Disks>,
    disk_cache: Cache,
    io_uring: bool,
    process: Arc<VmmProcess>,
    ended: watch::Receiver<Option<String>>,
    undo: Mutex<Option<UndoStack>>,
}

impl Sandbox {
    /// Starts the VM and waits for its agent.
    ///
    /// # Errors
    /// [`ServiceError`]. Nothing is left then.
    pub async fn start(plan: &Plan) -> Result<Self, ServiceError> {
        let mut undo = UndoStack::default();
        match Self::steps(plan, &mut undo).await {
            Ok(sandbox) => {
                *lock(&sandbox.undo) = Some(undo);
                Ok(sandbox)
            }
            Err(error) => {
                undo.run().await;
                Err(error)
            }
        }
    }

    async fn steps(plan: &Plan, undo: &mut UndoStack) -> Result<Self, ServiceError> {
        let Plan { config, timeline, .. } = plan;
        let files = Files::open(config)?;
        let dir = StateDir::new(&config.state_directory, &plan.namespace, &plan.id)?;
        dir.create()?;
        let removed = dir.clone();
        undo.push("create the state directory", || async move {
            removed.remove().map_err(|error| error.to_string())
        });
        let mut state = first_state(plan);
        let cgroup = enter_jail(plan, &dir, &mut state, undo)?;
        if let Some(files) = &plan.files {
            files.write(&dir.pod_files())?;
        }
        timeline.mark("state directory");

        let (taps, mut network, attachment) = match &plan.network_namespace {
            Some(namespace) => attach_network(plan, namespace, &dir, &mut state, undo)?,
            None => Default::default(),
        };
        timeline.mark("network joined");

        let mut opener = Opener::new(config.iommufd);
        let passed = pass_devices(plan, &dir, &mut state, &mut opener, undo)?;
        let (placed, placement) = start::place(plan, &dir, &state)?;
        let placed = Arc::new(placed);
        let (pages, mib) = (placement.huge_pages, config.memory_mib);
        let backends = Connected::new(&plan.served, mib, pages).await?;
        plan.served.iter().for_each(|device| device.add_to(&mut network));

        let mounted = dir.path().to_path_buf();
        undo.push("mount the shared tree", || async move {
            share::unmount_below(&mounted).map_err(|error| error.to_string())
        });
        let mut share = dir.share();
        share.prepare()?;

        let (ours, theirs) = vmm_client::socket_pair().map_err(vmm("start the VMM"))?;
        let confinement = match (&state.jail, &cgroup) {
            (Some(jail), Some(cgroup)) => {
                let (root, cgroup) = (share.share.as_path(), cgroup.as_fd());
                Some(Confinement { root, user_id: jail.user_id, cgroup })
            }
            _ => None,
        };
        let process = Arc::new(VmmProcess::spawn(&config.vmm, theirs, confinement).await?);
        let killed = process.clone();
        undo.push("start the VMM", || async move {
            killed.kill(KILL_PATIENCE).await.map_err(|error| error.to_string())
        });
        if config.core_scheduling && !core_scheduling::set_apart(process.pid())? {
            tracing::info!("no core of this host has two threads: there is none to be kept off");
        }
        if passed.is_some() {
            process.allow_locked_memory(config.memory_mib, 1).map_err(ServiceError::from)?;
        }
        state.vmm = ProcessIdentity::of(process.pid());
        dir.write_state(&state)?;
        timeline.mark("VMM spawned");
        let (client, mut events) = VmmClient::new(ours).map_err(vmm("reach the VMM"))?;
        let client = Arc::new(client);
        let (stopped, waited) = (client.clone(), process.clone());
        undo.push("boot the VM", || async move {
            // A VMM that does not answer is killed by the undo of the step before.
            let stop = async {
                let _ = stopped.request(Action::Stop, &[]).await;
                waited.wait().await;
            };
            let _ = tokio::time::timeout(STOP_PATIENCE, stop).await;
            Ok(())
        });

        let console = if config.debug_console { Some(open_console(&dir)?) } else { None };
        let hot_plug = config.hot_plug_devices && handles::are_any();
        let handed = Handed {
            files: &files,
            console: console.as_ref(),
            share: &share,
            taps,
            passed,
            backends,
            hot_plug,
            placement,
        };
        let reconnector = Reconnector::new(client.clone(), &plan.served);
        let boot = async {
            let (started, made) = boot(plan, handed, &process, &client).await?;
            placed.started(state.vmm)?;
            let events = (&mut events, &reconnector);
            let (ready, agent) = start::meet_agent(plan, started, &client, events).await?;
            if plan.pod != ConfigurePodRequest::default() {
                agent.configure_pod(&plan.pod).await?;
                timeline.mark("pod configured");
            }
            if !network.interfaces.is_empty() {
                functions::place(&mut network, &state, made.functions.as_ref())?;
                agent.configure_network(&network).await?;
                timeline.mark("network configured");
            }
            if let Started::Booted { template_missing: true } = started {
                ahead::begin(config);
            }
            Ok((ready, agent, made))
        };
        let (ready, agent, made) = tokio::select! {
            result = tokio::time::timeout(config.boot_timeout, boot) => match result {
                Ok(booted) => booted,
                Err(_) => {
                    let tail = console_tail(console.as_ref());
                    Err(ServiceError::BootTimeout(config.boot_timeout.as_secs(), tail))
                }
            },
            status = process.wait() => {
                let why = process.explain(status) + &console_tail(console.as_ref());
                Err(ServiceError::VmEnded(why))
            }
        }?;

        if let Some(namespace) = &plan.network_namespace {
            let forwarding = tokio::spawn(forward::run(namespace.clone(), client.clone()));
            undo.push("forward the pod's ports", || async move {
                forwarding.abort();
                // What it holds is in a namespace that somebody is about to remove.
                let _ = forwarding.await;
                Ok(())
            });
        }
        share.has_own_copy = state.jail.is_some();
        let pod_cgroup = state.jail.as_ref().map(|jail| jail.cgroup.clone());
        let sockets = Sockets::new(agent.clone(), dir.clone(), pod_cgroup);
        let ended = sockets.clone();
        undo.push("watch for sockets", || async move {
            ended.end();
            Ok(())
        });
        let cgroup = state.jail.as_ref().map(|jail| Cgroup::new(&jail.cgroup));
        let means = Means {
            vmm: client.clone(),
            agent: agent.clone(),
            cgroup: cgroup.map(|cgroup| (cgroup, config.memory_overhead_mib)),
            placed: placed.clone(),
            dir: dir.clone(),
        };
        let start = Size { vcpus: config.vcpus, memory_mib: config.memory_mib };
        let growth = Growth::new(plan.own, start, made.reach, means);
        let (added, caches) = (made.functions.as_ref(), &config.cni_caches);
        let functions = Functions::begin(state, added, (hot_plug, opener), caches)?;
        functions.configure_first(&agent).await?;
        let functions = Arc::new(tokio::sync::Mutex::new(functions));
        if let Some(attachment) = attachment {
            let (agent, vmm) = (agent.clone(), client.clone());
            let (functions, dir) = (functions.clone(), dir.clone());
            let vhost_net = config.vhost_net;
            let placed = placed.clone();
            let follower = Follower { agent, vmm, attachment, functions, dir, vhost_net, placed };
            let following = tokio::spawn(follow::run(follower, network));
            undo.push("follow the pod's network", || async move {
                following.abort();
                let _ = following.await;
                Ok(())
            });
        }
        let served = vhost_user::served(&plan.served, &made.backends)?;
        let (end, ended) = watch::channel(None);
        let events = (events, reconnector, sockets.clone());
        tokio::spawn(watch_end(process.clone(), ready, events, end));
        Ok(Self {
            dir,
            share,
            vmm: client,
            copies: Copies::new(agent.clone()),
            sockets,
            agent,
            next_stream: AtomicU64::new(1),
            placed,
            growth,
            served,
            functions,
            disks: Disks::default().into(),
            disk_cache: config.disk_cache,
            io_uring: config.io_uring,
            process,
            ended,
            undo: Mutex::new(None),
        })
    }

    /// The VMM's process number. It is what containerd is told as the process of every container:
    /// numbers of the guest mean nothing on the host, and signals, namespaces and cgroups that
    /// somebody looks up by it should be those of the VM.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Why the VM has ended, if it has.
    pub fn end(&self) -> Option<String> {
        self.ended.borrow().clone()
    }

    /// Waits until the VM has ended, and says why.
    pub async fn wait_end(&self) -> String {
        let mut ended = self.ended.clone();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| "its shim stopped watching it".into())
    }

    /// Ends the VM and takes back all that was done for it. Once; later calls do nothing.
    ///
    /// # Errors
    /// [`ServiceError::Leftover`] names what could not be taken back.
    pub async fn stop(&self) -> Result<(), ServiceError> {
        let undo = lock(&self.undo).take();
        let failures = match undo {
            Some(undo) => undo.run().await,
            None => Vec::new(),
        };
        if failures.is_empty() {
            return Ok(());
        }
        Err(ServiceError::Leftover(failures.join("; ")))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn vmm(action: &'static str) -> impl FnOnce(vmm_client::VmmError) -> ServiceError {
    move |error| ServiceError::Vmm { action, error }
}

fn first_state(plan: &Plan) -> State {
    let pid = std::process::id();
    State {
        version: STATE_VERSION,
        namespace: plan.namespace.clone(),
        id: plan.id.clone(),
        // A process can always see itself; without /proc nothing here works at all.
        shim: ProcessIdentity::of(pid).unwrap_or(ProcessIdentity { pid, start_ticks: 0 }),
        vmm: None,
        network: None,
        devices: Vec::new(),
        jail: None,
        socket: plan.socket.clone(),
        vcpus: plan.config.vcpus,
        memory_mib: plan.config.memory_mib,
        created_unix_seconds: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
    }
}

/// Takes what the VMM's jail holds on the host, unless it has none, and returns its cgroup. What
/// is about to be made is written down first.
fn enter_jail(
    plan: &Plan,
    dir: &StateDir,
    state: &mut State,
    undo: &mut UndoStack,
) -> Result<Option<OwnedFd>, ServiceError> {
    let config = &plan.config;
    if !config.jail {
        tracing::warn!("the VMM is not jailed (`jail = false`): its guest is not to be trusted");
        dir.write_state(state)?;
        return Ok(None);
    }
    let record = jail::reserve(config, &plan.namespace, &plan.id, plan.cgroups_path.as_deref())?;
    let (directory, released) = (config.state_directory.clone(), record.clone());
    let (namespace, id) = (plan.namespace.clone(), plan.id.clone());
    undo.push("make the VMM's cgroup", || async move {
        jail::release(&directory, &namespace, &id, &released).map_err(|error| error.to_string())
    });
    state.jail = Some(record.clone());
    dir.write_state(state)?;
    let limits = Limits {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        overhead_mib: config.memory_overhead_mib,
    };
    let cgroup = Cgroup::new(&record.cgroup).make(limits).map_err(jail::RecordError::from)?;
    Ok(Some(cgroup))
}

/// The VM's ends of the pod's network, what the guest is told of it, and what is joined.
type Joined = (Vec<Tap>, ConfigureNetworkRequest, Option<Arc<Mutex<Attachment>>>);

/// Joins the pod's network namespace with taps for the VM. What is about to be done there is
/// written down first.
fn attach_network(
    plan: &Plan,
    namespace: &Path,
    dir: &StateDir,
    state: &mut State,
    undo: &mut UndoStack,
) -> Result<Joined, ServiceError> {
    let found = network::look(namespace, &plan.config.network_functions)?;
    state.network = Some(found.attachment.clone());
    dir.write_state(state)?;
    let attachment = Arc::new(Mutex::new(found.attachment.clone()));
    let attached = attachment.clone();
    // Before the step: it may come half of its way.
    undo.push("join the pod's network", || async move {
        // A driver may take its time to make an interface anew.
        let detached = tokio::task::spawn_blocking(move || {
            let attachment = lock(&attached).clone();
            network::detach(&attachment).map_err(|error| error.to_string())
        });
        detached.await.unwrap_or_else(|error| Err(error.to_string()))
    });
    let carried = Carried::of(plan.config.vhost_net, plan.config.vcpus);
    let taps = network::attach(&found, carried)?;
    Ok((taps, found.request, Some(attachment)))
}

/// Tells once why the VM has ended. An agent that has gone takes its VM with it.
async fn watch_end(
    process: Arc<VmmProcess>,
    mut ready: UnixStream,
    (mut events, reconnector, sockets): (mpsc::Receiver<VmmEvent>, Reconnector, Sockets),
    end: watch::Sender<Option<String>>,
) {
    // The guest writes nothing there that matters; its end does.
    let agent_gone = async {
        let mut nothing = [0; 256];
        while matches!(ready.read(&mut nothing).await, Ok(1..)) {}
        tokio::time::sleep(AGENT_GONE_PATIENCE).await;
    };
    let unasked = async {
        while let Some(event) = events.recv().await {
            match event {
                VmmEvent::GuestConnected { port: SOCKET_PORT, socket } => sockets.take(socket),
                VmmEvent::GuestConnected { port, .. } => {
                    tracing::warn!("the guest connected to port {port} again; refused");
                }
                VmmEvent::BackendGone(backend) => reconnector.gone(backend),
                VmmEvent::Exited(reason) => tracing::info!("{reason}"),
            }
        }
        std::future::pending::<String>().await
    };
    let why = tokio::select! {
        status = process.wait() => process.explain(status),
        () = agent_gone => {
            if let Err(error) = process.kill(KILL_PATIENCE).await {
                tracing::error!("{error}");
            }
            "the agent in the guest has gone".into()
        }
        never = unasked => never,
    };
    tracing::info!("the VM has ended: {why}");
    end.send_replace(Some(why));
}
