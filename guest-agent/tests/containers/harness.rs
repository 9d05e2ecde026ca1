//! Runs the real agent in mount and pid namespaces of its own, as PID 1's child would be run in a
//! guest, and speaks its protocol to it.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::context::{Context, with_timeout};
use vial_agent_protocol::agent::{
    ContainerRequest, CreateContainerRequest, ExecProcessRequest, KillProcessRequest,
    ProcessRequest, Stdio,
};
use vial_agent_protocol::agent_ttrpc::AgentClient;
use vial_agent_protocol::stream_header;

/// Longer than any request of a test takes.
const REQUEST_TIME: Duration = Duration::from_secs(120);
static NEXT_STREAM: AtomicU64 = AtomicU64::new(1);
static NEXT_NAME: AtomicU64 = AtomicU64::new(1);

/// What the agent runs in: this machine's programs, read-only, as every container's root, and
/// cgroup v2 where the agent expects it.
const SET_UP: &str = r#"
set -e
mount --make-rprivate /
mount --bind -o ro /usr "$2/root/usr"
if [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ]; then
    mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup
fi
exec "$0" --serve "$1" "$2"
"#;

pub(crate) struct Agent {
    process: Child,
    directory: TempDir,
    pub(crate) client: AgentClient,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // unshare ends its child, the first process of its pid namespace, and so all others.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn context() -> Context {
    with_timeout(REQUEST_TIME.as_nanos() as i64)
}

/// An id that no other test of this machine uses: the cgroups are shared.
pub(crate) fn fresh_id(name: &str) -> String {
    format!("{name}-{}-{}", std::process::id(), NEXT_NAME.fetch_add(1, Ordering::Relaxed))
}

/// A container's spec as `ctr run` writes it.
pub(crate) fn spec(arguments: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SYS_CHROOT"
    ]);
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
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
        "linux": {
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 8, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm"},
                {"allow": true, "type": "c", "major": 5, "minor": 0, "access": "rwm"},
                {"allow": true, "type": "c", "major": 5, "minor": 2, "access": "rwm"},
                {"allow": true, "type": "c", "major": 136, "access": "rwm"}
            ]},
            "cgroupsPath": "/default/demo",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]
        }
    })
}

/// The process of an exec, like the container's first one but for its arguments.
pub(crate) fn process(arguments: &[&str]) -> Value {
    spec(arguments)["process"].clone()
}

/// The streams of one process, on our side.
pub(crate) struct Streams {
    pub(crate) ids: Stdio,
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: UnixStream,
    pub(crate) stderr: Option<UnixStream>,
}

impl Streams {
    /// Everything until the end of stdout.
    pub(crate) async fn output(&mut self) -> String {
        let mut text = Vec::new();
        self.stdout.read_to_end(&mut text).await.expect("read stdout");
        String::from_utf8_lossy(&text).into_owned()
    }

    /// stdout until `wanted` has come.
    pub(crate) async fn read_until(&mut self, wanted: &str) -> String {
        let mut text = String::new();
        let mut buffer = [0; 1024];
        while !text.contains(wanted) {
            let read = tokio::time::timeout(REQUEST_TIME, self.stdout.read(&mut buffer)).await;
            let length = read.expect("output in time").expect("read stdout");
            assert!(length > 0, "stdout ended before {wanted:?} came: {text:?}");
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        text
    }

    pub(crate) async fn say(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin.write_all(text.as_bytes()).await.expect("write stdin");
    }
}

impl Agent {
    pub(crate) async fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests start containers: run as root");
        let directory = tempfile::tempdir().expect("make a directory");
        let share = directory.path().join("share");
        prepare_root(&share.join("root"));
        let process = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["/bin/sh", "-c", SET_UP, env!("CARGO_BIN_EXE_vial-agent")])
            .args([directory.path(), &share])
            .stdin(ProcessStdio::null())
            .spawn()
            .expect("start unshare (package util-linux)");
        let client = connect(&directory.path().join("agent.sock")).await;
        Agent { process, directory, client }
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join(below)
    }

    pub(crate) async fn open_stream(&self, id: u64) -> UnixStream {
        let mut stream =
            UnixStream::connect(self.path("stream.sock")).await.expect("connect a stream");
        stream.write_all(&stream_header(id)).await.expect("write a stream's header");
        stream
    }

    pub(crate) async fn streams(&self, terminal: bool) -> Streams {
        let id = || NEXT_STREAM.fetch_add(1, Ordering::Relaxed);
        let mut ids = Stdio::new();
        (ids.terminal, ids.stdin, ids.stdout) = (terminal, id(), id());
        let stderr = if terminal {
            None
        } else {
            ids.stderr = id();
            Some(self.open_stream(ids.stderr).await)
        };
        Streams {
            stdin: Some(self.open_stream(ids.stdin).await),
            stdout: self.open_stream(ids.stdout).await,
            stderr,
            ids,
        }
    }

    pub(crate) async fn create(&self, id: &str, spec: &Value, stdio: &Stdio) -> ttrpc::Result<u32> {
        let mut request = CreateContainerRequest::new();
        request.container_id = id.to_owned();
        request.spec = spec.to_string().into_bytes();
        request.root = "root".to_owned();
        request.stdio = Some(stdio.clone()).into();
        Ok(self.client.create_container(context(), &request).await?.pid)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<u32> {
        let mut request = ContainerRequest::new();
        request.container_id = id.to_owned();
        Ok(self.client.start_container(context(), &request).await?.pid)
    }

    /// Creates and starts a container without a terminal.
    pub(crate) async fn run(&self, id: &str, spec: &Value) -> Streams {
        let streams = self.streams(false).await;
        self.create(id, spec, &streams.ids).await.expect("create the container");
        self.start_container(id).await.expect("start the container");
        streams
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
        stdio: &Stdio,
    ) -> ttrpc::Result<u32> {
        let mut request = ExecProcessRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.process = process.to_string().into_bytes();
        request.stdio = Some(stdio.clone()).into();
        Ok(self.client.exec_process(context(), &request).await?.pid)
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = process_request(id, exec);
        self.client.wait_process(context(), &request).await.expect("wait").exit_status
    }

    pub(crate) async fn kill(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let mut request = KillProcessRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.signal = signal;
        request.all = all;
        self.client.kill_process(context(), &request).await.map(drop)
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let mut request = ContainerRequest::new();
        request.container_id = id.to_owned();
        self.client.list_pids(context(), &request).await.expect("list pids").pids
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<u32> {
        let mut request = ContainerRequest::new();
        request.container_id = id.to_owned();
        Ok(self.client.delete_container(context(), &request).await?.exit_status)
    }

    /// That nothing of a container is left: no directory, no cgroup, no socket.
    pub(crate) fn assert_no_trace(&self, id: &str) {
        for below in ["containers", "runtime"] {
            let path = self.path(below).join(id);
            assert!(!path.exists(), "{} is left", path.display());
        }
        let consoles = std::fs::read_dir(self.path("consoles")).expect("read consoles").count();
        assert_eq!(consoles, 0, "terminal sockets are left");
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let path = Path::new(root).join("vial-containers").join(id);
            assert!(!path.exists(), "cgroup {} is left", path.display());
        }
    }
}

pub(crate) fn process_request(id: &str, exec: &str) -> ProcessRequest {
    let mut request = ProcessRequest::new();
    request.container_id = id.to_owned();
    request.exec_id = exec.to_owned();
    request
}

fn prepare_root(root: &Path) {
    for name in ["usr", "dev", "proc", "sys", "run", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(name)).expect("make the root's directories");
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(Path::new("usr").join(name), root.join(name)).expect("make the root's links");
    }
}

async fn connect(path: &Path) -> AgentClient {
    let began = Instant::now();
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => {
                let socket = ttrpc::r#async::transport::Socket::new(stream);
                return AgentClient::new(ttrpc::r#async::Client::new(socket));
            }
            Err(error) if began.elapsed() > Duration::from_secs(30) => {
                panic!("the agent does not listen on {}: {error}", path.display());
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
