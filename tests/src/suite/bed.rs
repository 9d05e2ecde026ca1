//! Where the cases run: containerd and `ctr` on this host, and what the host looked like before.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The image that `tests/images` makes.
pub(crate) const IMAGE: &str = "localhost/vial/busybox:latest";

/// How long one command may take. The emulated host is slow; a hang is not slowness.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long the host may take to look again as it did.
const SETTLE: Duration = Duration::from_secs(20);

/// A runtime that containerd knows by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Runtime {
    /// `io.containerd.vial.v2`
    Vial,
    /// `io.containerd.runc.v2`
    Runc,
}

impl Runtime {
    /// Both, runc first: what it does is what is expected.
    pub(crate) const BOTH: [Self; 2] = [Self::Runc, Self::Vial];

    /// containerd's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Vial => "io.containerd.vial.v2",
            Self::Runc => "io.containerd.runc.v2",
        }
    }
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Its exit status; 128 and the signal when a signal ended it.
    pub(crate) status: i32,
    /// What it printed.
    pub(crate) stdout: String,
    /// What it complained of.
    pub(crate) stderr: String,
}

impl Outcome {
    /// Itself, when it ended with `status`.
    pub(crate) fn expect(self, status: i32) -> Result<Self> {
        ensure!(
            self.status == status,
            "exit status {} where {status} was due; it printed {:?} and complained {:?}",
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }
}

/// How many things are named of what was left behind.
const MOST_TOLD: usize = 16;

/// The host, and how it looked before the first case.
pub(crate) struct Bed {
    image: String,
    before: Traces,
    next: AtomicU32,
}

/// What containers can leave on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Traces {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    links: BTreeSet<String>,
    run: BTreeSet<String>,
    cgroups: BTreeSet<String>,
}

impl Bed {
    /// Looks at the host. The image has to be there, and both runtimes have to have run once, so
    /// that what they make once for the host is not taken for a trace.
    pub(crate) fn new(image: &str, archives: &[PathBuf]) -> Result<Self> {
        for archive in archives {
            run(Command::new("ctr").args(["image", "import", "--local"]).arg(archive))?
                .expect(0)?;
        }
        let listed = run(Command::new("ctr").args(["image", "ls", "-q"]))?;
        if !listed.expect(0)?.stdout.lines().any(|line| line == image) {
            bail!("the image {image} is not there; import what tests/images makes");
        }
        let mut bed =
            Self { image: image.into(), before: Traces::take()?, next: AtomicU32::new(1) };
        for runtime in Runtime::BOTH {
            let log = bed.log_length();
            let mut first = bed.run(runtime, &[], &["true"])?;
            if first.status != 0 && bed.vm_was_lost(log) {
                println!("again   the first container: the emulated host lost its VM");
                bed.clear();
                first = bed.run(runtime, &[], &["true"])?;
            }
            first
                .expect(0)
                .with_context(|| format!("the first container with {}", runtime.name()))?;
        }
        bed.look_anew()?;
        Ok(bed)
    }

    /// Takes the host as it is now for what it was before the first case.
    pub(crate) fn look_anew(&mut self) -> Result<()> {
        std::thread::sleep(Duration::from_secs(1));
        self.before = Traces::take()?;
        Ok(())
    }

    /// A name that no container had.
    pub(crate) fn name(&self) -> String {
        format!("case-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The command line of `ctr run --rm`.
    pub(crate) fn command(
        &self,
        runtime: Runtime,
        options: &[&str],
        name: &str,
        args: &[&str],
    ) -> Command {
        let mut command = Command::new("ctr");
        command.args(["run", "--runtime", runtime.name()]).args(options);
        command.arg(&self.image).arg(name).args(args);
        command
    }

    /// Runs `args` in a container and removes it.
    pub(crate) fn run(&self, runtime: Runtime, options: &[&str], args: &[&str]) -> Result<Outcome> {
        let options: Vec<&str> = [&["--rm"], options].concat();
        run(&mut self.command(runtime, &options, &self.name(), args))
    }

    /// Runs a shell line in a container and removes it.
    pub(crate) fn sh(&self, runtime: Runtime, line: &str) -> Result<Outcome> {
        self.run(runtime, &[], &["sh", "-c", line])
    }

    /// Starts a container in the background. Its streams go nowhere: nobody is there to remove
    /// them when its shim is killed.
    pub(crate) fn detached(&self, runtime: Runtime, args: &[&str]) -> Result<Detached> {
        self.detached_with(runtime, &[], args)
    }

    /// The same with options of `ctr run`.
    pub(crate) fn detached_with(
        &self,
        runtime: Runtime,
        options: &[&str],
        args: &[&str],
    ) -> Result<Detached> {
        let name = self.name();
        let options = [&["-d", "--null-io"], options].concat();
        run(&mut self.command(runtime, &options, &name, args))?
            .expect(0)
            .context("start a container in the background")?;
        Ok(Detached { name })
    }

    /// Fails when the host does not look as before, after some time to settle.
    pub(crate) fn nothing_left(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = self.before.added(&Traces::take()?);
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > SETTLE {
                let told = left.iter().take(MOST_TOLD).map(String::as_str).collect::<Vec<_>>();
                let more = left.len() - told.len();
                bail!("left behind: {}, and {more} more", told.join(", "));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Removes all containers, so that the next case starts clean.
    pub(crate) fn clear(&self) {
        // A containerd without CRI has no pods.
        let _ = crate::cri::pod::clear();
        let listed = run(Command::new("ctr").args(["container", "ls", "-q"]));
        for name in listed.map(|outcome| outcome.stdout).unwrap_or_default().lines() {
            Detached { name: name.into() }.remove();
        }
    }

    /// How long containerd's log is now.
    pub(crate) fn log_length(&self) -> usize {
        fs::read(log_path()).map(|text| text.len()).unwrap_or_default()
    }

    /// Whether a VM was lost, since the log was `from` bytes long, in a way that emulated virtualisation loses one now
    /// and then: KVM cannot run a vCPU any further, or the guest's kernel panicked or met a triple fault.
    pub(crate) fn vm_was_lost(&self, from: usize) -> bool {
        let lost = [
            "a vCPU is stuck",
            "the VM has ended: the guest's kernel panicked",
            "the VM has ended: a vCPU met a triple fault",
        ];
        let text = log_since(from);
        lost.iter().any(|words| text.contains(words))
    }

    /// The lines with `word` that were added to containerd's log since it was `from` bytes long.
    pub(crate) fn lines_since(&self, from: usize, word: &str) -> Vec<String> {
        log_since(from).lines().filter(|line| line.contains(word)).map(str::to_owned).collect()
    }

    /// Prints what containerd's log complains of since it was `from` bytes long.
    pub(crate) fn tell_the_log(&self, from: usize) {
        let text = log_since(from);
        let complains = |line: &&str| {
            ["level=error", "level=warn", "the VM has ended"].iter().any(|word| line.contains(word))
        };
        for line in text.lines().filter(complains).take(40) {
            println!("    | {line}");
        }
        for line in killed_by_a_filter().iter().rev().take(3) {
            println!("    | {line}");
        }
    }
}

/// What the kernel's log says of processes that a system call filter killed (audit type 1326).
fn killed_by_a_filter() -> Vec<String> {
    let log = run(&mut Command::new("dmesg")).map(|outcome| outcome.stdout).unwrap_or_default();
    log.lines().filter(|line| line.contains("type=1326")).map(str::to_owned).collect()
}

/// Where containerd's log is, as whoever started containerd says.
pub(crate) fn log_path() -> String {
    std::env::var("CONTAINERD_LOG").unwrap_or("/run/containerd.log".into())
}

/// What was added to containerd's log since it was `from` bytes long.
fn log_since(from: usize) -> String {
    let text = fs::read(log_path()).unwrap_or_default();
    String::from_utf8_lossy(text.get(from..).unwrap_or_default()).into_owned()
}

/// A container that runs in the background until it is dropped.
pub(crate) struct Detached {
    /// Its name.
    pub(crate) name: String,
}

impl Detached {
    /// `ctr task …`
    pub(crate) fn task(&self, args: &[&str]) -> Result<Outcome> {
        run(Command::new("ctr").arg("task").args(args))
    }

    /// Runs `args` in it, with more options of `ctr task exec`.
    pub(crate) fn exec(&self, options: &[&str], args: &[&str]) -> Result<Outcome> {
        let id = format!("exec-{}", std::process::id() + rand());
        let mut command = Command::new("ctr");
        command.args(["task", "exec", "--exec-id", &id]).args(options).arg(&self.name).args(args);
        run(&mut command)
    }

    /// The state as `ctr task ls` shows it.
    pub(crate) fn state(&self) -> Result<Option<String>> {
        let listed = self.task(&["ls"])?.expect(0)?.stdout;
        Ok(listed.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words.first() == Some(&self.name.as_str())).then(|| words[2].to_owned())
        }))
    }

    /// Waits until the state is `wanted`.
    pub(crate) fn reaches(&self, wanted: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            let state = self.state()?;
            if state.as_deref() == Some(wanted) {
                return Ok(());
            }
            if start.elapsed() > SETTLE {
                bail!("the task is {state:?} and not {wanted} after {SETTLE:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn remove(&self) {
        // Best effort: what stays is found by the next look at the host.
        let _ = self.task(&["kill", "-s", "SIGKILL", &self.name]);
        let _ = self.reaches("STOPPED");
        let _ = self.task(&["delete", "--force", &self.name]);
        let _ = run(Command::new("ctr").args(["container", "rm", &self.name]));
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A number that is another one each time.
fn rand() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs a command with nothing on its standard input, and within [`PATIENCE`].
pub(crate) fn run(command: &mut Command) -> Result<Outcome> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let stdout = collect(child.stdout.take().context("its standard output")?);
    let stderr = collect(child.stderr.take().context("its standard error")?);
    let status = wait(&mut child).with_context(|| name.clone())?;
    let text = |reader: std::thread::JoinHandle<Vec<u8>>| {
        let bytes = reader.join().unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ok(Outcome { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Waits for a child within [`PATIENCE`], and ends it when that is over.
pub(crate) fn wait(child: &mut Child) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            bail!("still runs after {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

impl Traces {
    fn take() -> Result<Self> {
        let links = run(Command::new("ip").args(["-o", "link"]))?.expect(0)?.stdout;
        Ok(Self {
            processes: processes()?,
            mounts: fs::read_to_string("/proc/self/mountinfo")?
                .lines()
                .filter_map(|line| line.split(' ').nth(4).map(str::to_owned))
                .collect(),
            links: links
                .lines()
                .filter_map(|line| line.split(": ").nth(1).map(str::to_owned))
                .collect(),
            run: ["/run/vial", "/run/containerd", "/run/netns", "/var/lib/cni", "/tmp"]
                .iter()
                .flat_map(|root| tree(root, 5))
                .collect(),
            cgroups: tree("/sys/fs/cgroup", 4)
                .into_iter()
                .filter(|path| fs::metadata(path).is_ok_and(|at| at.is_dir()))
                .collect(),
        })
    }

    /// What `after` has and `self` has not.
    fn added(&self, after: &Self) -> Vec<String> {
        let new = |kind: &str, before: &BTreeSet<String>, after: &BTreeSet<String>| {
            after.difference(before).map(|item| format!("{kind} {item}")).collect::<Vec<_>>()
        };
        [
            new("process", &self.processes, &after.processes),
            new("mount", &self.mounts, &after.mounts),
            new("link", &self.links, &after.links),
            new("file", &self.run, &after.run),
            new("cgroup", &self.cgroups, &after.cgroups),
        ]
        .concat()
    }
}

/// Processes of the runtimes, by number and name.
fn processes() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        // A process may end while it is looked at.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let pid = entry.file_name();
        // The kernel keeps 15 bytes of a name.
        if ["vial-vmm", "containerd-shim", "vcpu", "runc"].iter().any(|p| name.starts_with(p)) {
            found.insert(format!("{} {}", pid.to_string_lossy(), name.trim()));
        }
    }
    Ok(found)
}

/// All paths below `root`, `depth` levels down.
fn tree(root: &str, depth: usize) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path().display().to_string();
        // An image's layers and the host's own mounts are not a container's.
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            paths.extend(tree(&path, depth - 1));
        }
        paths.push(path);
    }
    paths
}
