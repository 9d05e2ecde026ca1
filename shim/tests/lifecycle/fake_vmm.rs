//! A VMM that has no VM: it speaks the VMM's protocol on one side and is the agent on the other,
//! with processes of the host in place of containers.

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::watch};
use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};
use vial_agent_protocol::{
    AGENT_PORT, PROTOCOL_VERSION, READY_PORT, STREAM_PORT,
    agent::{self, Empty},
    agent_ttrpc::{Agent, create_agent},
    stream_id,
};
use vial_vmm_api::{
    Action, BootReport, Descriptor, Event, ExitReason, Failure, FailureKind, MAX_DESCRIPTORS,
    MAX_MESSAGE_BYTES, Message, Reply, Request, VmState, decode, encode,
};

/// Serves the socket with that number until it breaks, as `vial-vmm --api-fd` does.
pub(crate) fn serve(number: i32) -> ! {
    // SAFETY: whoever started this process left the descriptor open for it and named it; nothing
    // else here knows of it.
    #[allow(unsafe_code)]
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let vmm = Arc::new(Vmm { runtime, ..Default::default() });
    let reason = vmm.run(&socket);
    send(&socket, &Message::Event(Event::Exited(reason)), &[]);
    std::process::exit(reason.status().into());
}

struct Vmm {
    runtime: tokio::runtime::Runtime,
    guest: Arc<Guest>,
    held: Mutex<Vec<OwnedFd>>,
}

impl Default for Vmm {
    fn default() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { runtime, guest: Arc::default(), held: Mutex::default() }
    }
}

impl Vmm {
    fn run(&self, socket: &OwnedFd) -> ExitReason {
        loop {
            let Some((request, descriptors)) = receive(socket) else {
                return ExitReason::Stopped;
            };
            let id = request.id;
            let reply = |result| send(socket, &Message::Reply { id, result }, &[]);
            match request.action {
                Action::Boot(config) => {
                    if config.command_line.contains("refuse") {
                        let message = "the kernel is no ELF file".into();
                        reply(Err(Failure { kind: FailureKind::Invalid, message }));
                        continue;
                    }
                    if config.command_line.contains("die") {
                        eprintln!("error: /dev/kvm is not usable here");
                        std::process::exit(1);
                    }
                    self.held.lock().unwrap().extend(descriptors);
                    let marks = vec![("started".into(), 1)];
                    reply(Ok(Reply::Booted(BootReport {
                        marks,
                        functions: None,
                        backends: Vec::new(),
                    })));
                    if config.command_line.contains("hang") {
                        continue;
                    }
                    let root = config.devices.iter().find_map(|device| match device {
                        vial_vmm_api::DeviceConfig::Fs { root, .. } => Some(root.0),
                        _ => None,
                    });
                    let held = self.held.lock().unwrap();
                    let root = held[usize::from(root.unwrap())].as_raw_fd();
                    *self.guest.root.lock().unwrap() = format!("/proc/self/fd/{root}");
                    drop(held);
                    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
                    self.held.lock().unwrap().push(ours.into());
                    let event = Event::GuestConnected { port: READY_PORT, socket: Descriptor(0) };
                    send(socket, &Message::Event(event), &[theirs.as_fd()]);
                }
                Action::VsockConnect { port, .. } => {
                    let stream = descriptors.into_iter().next().unwrap();
                    self.connect(port, stream.into());
                    reply(Ok(Reply::Done));
                }
                Action::BootTemplate(_) | Action::Save { .. } | Action::Restore(_) => {
                    let message = "nothing that was saved fits this VMM".into();
                    reply(Err(Failure { kind: FailureKind::Invalid, message }));
                }
                Action::AddFunctions { .. }
                | Action::RemoveFunctions { .. }
                | Action::AddDisk { .. }
                | Action::RemoveDisk { .. }
                | Action::AddInterface { .. }
                | Action::RemoveInterface { .. } => {
                    let message = "it has no device of the host".into();
                    reply(Err(Failure { kind: FailureKind::Invalid, message }));
                }
                Action::Resize { .. } | Action::Size => {
                    let message = "it keeps its size".into();
                    reply(Err(Failure { kind: FailureKind::Invalid, message }));
                }
                Action::ReconnectBackend { .. } => {
                    let message = "it has no device of another process".into();
                    reply(Err(Failure { kind: FailureKind::Invalid, message }));
                }
                Action::Status => reply(Ok(Reply::Status(VmState::Running))),
                Action::Stop => {
                    reply(Ok(Reply::Done));
                    return ExitReason::Stopped;
                }
            }
        }
    }

    fn connect(&self, port: u32, stream: std::os::unix::net::UnixStream) {
        let guest = self.guest.clone();
        let _context = self.runtime.enter();
        stream.set_nonblocking(true).unwrap();
        let mut stream = UnixStream::from_std(stream).unwrap();
        match port {
            AGENT_PORT => {
                self.runtime.spawn(async move {
                    let one = futures::stream::once(async { Ok(stream) });
                    let listener = Listener::new(futures::StreamExt::chain(
                        one,
                        futures::stream::pending::<std::io::Result<UnixStream>>(),
                    ));
                    let mut server =
                        Server::new().add_listener(listener).register_service(create_agent(guest));
                    server.start().await.unwrap();
                    std::future::pending::<()>().await;
                });
            }
            STREAM_PORT => {
                self.runtime.spawn(async move {
                    let mut header = [0; 8];
                    stream.read_exact(&mut header).await.unwrap();
                    let stream = stream.into_std().unwrap();
                    stream.set_nonblocking(false).unwrap();
                    guest.streams.lock().unwrap().insert(stream_id(header), stream.into());
                });
            }
            _ => {}
        }
    }
}

#[derive(Default)]
struct Guest {
    root: Mutex<String>,
    streams: Mutex<HashMap<u64, OwnedFd>>,
    processes: Mutex<HashMap<(String, String), Arc<Process>>>,
}

struct Process {
    arguments: Vec<String>,
    directory: String,
    stdio: agent::Stdio,
    pid: Mutex<u32>,
    ended: watch::Sender<Option<u32>>,
}

fn status(code: ttrpc::Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

fn arguments(process: &serde_json::Value) -> Vec<String> {
    let arguments = process["args"].as_array().unwrap();
    arguments.iter().map(|word| word.as_str().unwrap().to_string()).collect()
}

impl Guest {
    fn process(&self, container: &str, exec: &str) -> ttrpc::Result<Arc<Process>> {
        let processes = self.processes.lock().unwrap();
        let found = processes.get(&(container.to_string(), exec.to_string())).cloned();
        found.ok_or_else(|| status(ttrpc::Code::NOT_FOUND, "no such process"))
    }

    fn add(&self, container: &str, exec: &str, process: Process) -> Arc<Process> {
        let process = Arc::new(process);
        let key = (container.to_string(), exec.to_string());
        self.processes.lock().unwrap().insert(key, process.clone());
        process
    }

    fn signal(&self, container: &str, signal: rustix::process::Signal) -> ttrpc::Result<Empty> {
        let pid = self.process(container, "")?.pid.lock().unwrap().cast_signed();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal)
            .map_err(|error| status(ttrpc::Code::NOT_FOUND, &error.to_string()))?;
        Ok(Empty::new())
    }

    async fn stream(&self, id: u64) -> Stdio {
        loop {
            if id == 0 {
                return Stdio::null();
            }
            if let Some(stream) = self.streams.lock().unwrap().remove(&id) {
                return Stdio::from(stream);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn run(&self, process: Arc<Process>) -> ttrpc::Result<agent::StartResponse> {
        let mut command = tokio::process::Command::new(&process.arguments[0]);
        command
            .args(&process.arguments[1..])
            .current_dir(&process.directory)
            .stdin(self.stream(process.stdio.stdin).await)
            .stdout(self.stream(process.stdio.stdout).await)
            .stderr(self.stream(process.stdio.stderr).await);
        let mut child = command
            .spawn()
            .map_err(|error| status(ttrpc::Code::INVALID_ARGUMENT, &error.to_string()))?;
        drop(command);
        let pid = child.id().unwrap();
        *process.pid.lock().unwrap() = pid;
        tokio::spawn(async move {
            use std::os::unix::process::ExitStatusExt;
            let ended = child.wait().await.unwrap();
            let code = ended.code().or(ended.signal().map(|signal| 128 + signal)).unwrap();
            process.ended.send_replace(Some(code.cast_unsigned()));
        });
        Ok(agent::StartResponse { pid, ..Default::default() })
    }
}

#[async_trait]
impl Agent for Guest {
    async fn hello(
        &self,
        _: &TtrpcContext,
        _: agent::HelloRequest,
    ) -> ttrpc::Result<agent::HelloResponse> {
        Ok(agent::HelloResponse { version: PROTOCOL_VERSION, ..Default::default() })
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: agent::ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        assert!(!request.interfaces.is_empty());
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<agent::CreateContainerResponse> {
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        let arguments = arguments(&spec["process"]);
        if arguments[0] == "/refused" {
            return Err(status(ttrpc::Code::INVALID_ARGUMENT, "no such program: /refused"));
        }
        if arguments.iter().any(|word| word == "slow") {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let root = self.root.lock().unwrap().clone();
        let process = Process {
            arguments,
            directory: format!("{root}/{}", request.root),
            stdio: request.stdio.unwrap_or_default(),
            pid: Mutex::new(0),
            ended: watch::Sender::new(None),
        };
        self.add(&request.container_id, "", process);
        Ok(Default::default())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::StartResponse> {
        self.run(self.process(&request.container_id, "")?).await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: agent::ExecProcessRequest,
    ) -> ttrpc::Result<agent::StartResponse> {
        let init = self.process(&request.container_id, "")?;
        let process: serde_json::Value = serde_json::from_slice(&request.process).unwrap();
        let process = Process {
            arguments: arguments(&process),
            directory: init.directory.clone(),
            stdio: request.stdio.unwrap_or_default(),
            pid: Mutex::new(0),
            ended: watch::Sender::new(None),
        };
        self.run(self.add(&request.container_id, &request.exec_id, process)).await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::WaitProcessResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let exit_status =
            process.ended.subscribe().wait_for(Option::is_some).await.unwrap().unwrap();
        let hungry = process.arguments.iter().any(|word| word.contains("hungry"));
        Ok(agent::WaitProcessResponse {
            exit_status,
            oom_kills: u64::from(hungry),
            ..Default::default()
        })
    }

    async fn kill_process(
        &self,
        _: &TtrpcContext,
        request: agent::KillProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let pid = process.pid.lock().unwrap().cast_signed();
        if pid == 0 {
            process.ended.send_replace(Some(128 + request.signal));
            return Ok(Empty::new());
        }
        let signal = rustix::process::Signal::from_named_raw(request.signal.cast_signed());
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid).unwrap(),
            signal.unwrap(),
        )
        .map_err(|error| status(ttrpc::Code::NOT_FOUND, &error.to_string()))?;
        Ok(Empty::new())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ListPidsResponse> {
        let pid = *self.process(&request.container_id, "")?.pid.lock().unwrap();
        Ok(agent::ListPidsResponse { pids: vec![pid], ..Default::default() })
    }

    async fn read_stats(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::StatsResponse> {
        self.process(&request.container_id, "")?;
        Ok(agent::StatsResponse { memory_usage: 4096, pids: 1, ..Default::default() })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        if request.resources == b"{}" {
            return Ok(Empty::new());
        }
        Err(status(ttrpc::Code::INVALID_ARGUMENT, "no such limit"))
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.signal(&request.container_id, rustix::process::Signal::STOP)
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.signal(&request.container_id, rustix::process::Signal::CONT)
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::WaitProcessResponse> {
        let key = (request.container_id, request.exec_id);
        self.processes.lock().unwrap().remove(&key);
        Ok(Default::default())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::WaitProcessResponse> {
        self.processes
            .lock()
            .unwrap()
            .retain(|(container, _), _| *container != request.container_id);
        Ok(Default::default())
    }
}

fn send(socket: &OwnedFd, message: &Message, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let bytes = encode(message).unwrap();
    // The shim may have gone already.
    let _ =
        rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
}

fn receive(socket: &OwnedFd) -> Option<(Request, Vec<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .ok()?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    (received.bytes > 0).then(|| (decode(&buffer[..received.bytes]).unwrap(), descriptors))
}
