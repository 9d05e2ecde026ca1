//! Pods and containers for the length of a case.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::client::Cri;
use super::configs;
use super::log;
use super::wire::*;
use crate::suite::bed::{IMAGE, Runtime};

/// How long something may take that is due at once.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The handler that is asked for where Vial is meant, if not `vial`.
static VIAL_HANDLER: OnceLock<String> = OnceLock::new();

/// Makes pods of Vial with another handler from here on. The first call counts.
pub(crate) fn use_handler(name: String) {
    VIAL_HANDLER.get_or_init(|| name);
}

/// Where the users of pods begin on the host that have some of their own.
pub(crate) const HOST_USERS: u32 = 200_000;

/// Whether all pods have users of their own, with runc and with Vial.
static OWN_USERS: OnceLock<()> = OnceLock::new();

/// Gives pods users of their own from here on.
pub(crate) fn give_own_users() {
    OWN_USERS.get_or_init(|| ());
}

/// One range of users that begins there.
pub(crate) fn mapping(host: u32) -> Vec<IdMapping> {
    vec![IdMapping { host_id: host, container_id: 0, length: 65536 }]
}

/// Users of a pod that begin there.
pub(crate) fn users(host: u32) -> Option<UserNamespace> {
    let mode = NamespaceMode::Pod.into();
    Some(UserNamespace { mode, uids: mapping(host), gids: mapping(host) })
}

/// containerd's name of the runtime in its CRI configuration.
pub(crate) fn handler(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Vial => VIAL_HANDLER.get().map_or("vial", String::as_str),
        Runtime::Runc => "runc",
    }
}

/// A number that no other pod or container of this run has.
fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A pod until it is dropped.
pub(crate) struct Pod {
    pub(crate) cri: Cri,
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
    /// Its logs, and room for a case's files. World-readable, as volumes of other users are.
    directory: TempDir,
}

impl Pod {
    /// One of which nothing special is asked.
    pub(crate) fn new(runtime: Runtime) -> Result<Self> {
        Self::with(runtime, |_| ())
    }

    /// One with a configuration that `adapt` has changed.
    pub(crate) fn with(
        runtime: Runtime,
        adapt: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Self> {
        Self::of_handler(handler(runtime), adapt)
    }

    /// One that a certain handler runs.
    pub(crate) fn of_handler(
        handler: &str,
        adapt: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Self> {
        Self::of(&Cri::new(), handler, adapt)
    }

    /// One that a certain client asks for.
    pub(crate) fn of(
        cri: &Cri,
        handler: &str,
        adapt: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("vial-cri").tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let logs = directory.path().join("logs");
        fs::create_dir(&logs)?;
        let number = unique();
        let (name, uid) = (format!("pod-{number}"), format!("uid-{number}"));
        let mut config = configs::pod(&name, &uid, "suite", &logs);
        if OWN_USERS.get().is_some() {
            let security =
                config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options.get_or_insert_default().userns_options = users(HOST_USERS);
        }
        adapt(&mut config);
        let id =
            cri.run_pod(&config, handler).with_context(|| format!("start a pod with {handler}"))?;
        Ok(Self { cri: cri.clone(), id, config, directory })
    }

    /// A path below the pod's directory, which goes with it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a directory there that everybody may write to.
    pub(crate) fn make_directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        Ok(path)
    }

    pub(crate) fn status(&self) -> Result<PodSandboxStatus> {
        self.cri.pod_status(&self.id)
    }

    /// Creates a container and does not start it.
    pub(crate) fn create(&self, config: ContainerConfig) -> Result<Container<'_>> {
        let config = named(config);
        let id = self.create_by(&self.cri, config.clone())?;
        Ok(Container { pod: self, id, log: self.path("logs").join(&config.log_path) })
    }

    /// Creates a container by a certain client, and returns its id.
    pub(crate) fn create_by(&self, cri: &Cri, config: ContainerConfig) -> Result<String> {
        let mut config = named(config);
        if OWN_USERS.get().is_some() {
            config = config.of_users(HOST_USERS);
        }
        cri.create(&self.id, &config, &self.config)
            .with_context(|| format!("create a container for {:?}", config.command))
    }

    /// Creates and starts a container.
    pub(crate) fn start(&self, config: ContainerConfig) -> Result<Container<'_>> {
        let container = self.create(config)?;
        self.cri.start(&container.id).context("start a container")?;
        Ok(container)
    }

    /// Runs a container to its end and removes it.
    pub(crate) fn run(&self, config: ContainerConfig) -> Result<Finished> {
        let container = self.start(config)?;
        let finished = container.finish()?;
        container.remove()?;
        Ok(finished)
    }

    /// What a shell line prints in a container of its own, when it ends with 0.
    pub(crate) fn prints(&self, config: ContainerConfig) -> Result<String> {
        let finished = self.run(config)?;
        ensure!(finished.exit_code == 0, "{finished:?}");
        Ok(finished.stdout)
    }

    /// Stops and removes it, which is to succeed.
    pub(crate) fn end(self) -> Result<()> {
        self.cri.stop_pod(&self.id).context("stop the pod")?;
        self.cri.remove_pod(&self.id).context("remove the pod")
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // What stays is found by the next look at the host.
        let _ = self.cri.stop_pod(&self.id);
        let _ = self.cri.remove_pod(&self.id);
    }
}

/// Shares the processes of the pod among its containers, which a kubelet asks for on both.
pub(crate) fn share_processes(namespaces: &mut Option<NamespaceOption>) {
    namespaces.get_or_insert_default().pid = NamespaceMode::Pod.into();
}

/// Removes all pods, as a kubelet does: what fails is asked for again. Of a shim that dies in the
/// middle of something containerd itself finds out only at its second try.
///
/// # Errors
/// Some stay.
pub(crate) fn clear() -> Result<()> {
    let cri = Cri::new();
    eventually(|| {
        for id in cri.pods()? {
            let _ = cri.stop_pod(&id);
            let _ = cri.remove_pod(&id);
        }
        let left = cri.pods()?;
        ensure!(left.is_empty(), "{} pods cannot be removed", left.len());
        Ok(())
    })
}

/// With a name of its own, and a log, unless it has them.
fn named(mut config: ContainerConfig) -> ContainerConfig {
    if config.metadata.is_none() {
        let name = format!("container-{}", unique());
        config.log_path = format!("{name}.log");
        config.metadata = Some(ContainerMetadata { name, attempt: 0 });
    }
    config
}

/// A container that runs these words.
pub(crate) fn words(words: &[&str]) -> ContainerConfig {
    configs::container(IMAGE, words)
}

/// A container that runs a shell line.
pub(crate) fn sh(line: &str) -> ContainerConfig {
    words(&["sh", "-c", line])
}

/// A container that is there until it is stopped. It ends at once when asked to, once it has said
/// `up`.
pub(crate) fn idle() -> ContainerConfig {
    sh("trap 'exit 0' TERM; echo up; while :; do sleep 3600 & wait $!; done")
}

/// What cases change of a container.
impl ContainerConfig {
    pub(crate) fn named(mut self, name: &str, attempt: u32) -> Self {
        self.metadata = Some(ContainerMetadata { name: name.into(), attempt });
        self.log_path = format!("{name}_{attempt}.log");
        self
    }

    pub(crate) fn security(
        mut self,
        change: impl FnOnce(&mut LinuxContainerSecurityContext),
    ) -> Self {
        let linux = self.linux.get_or_insert_default();
        change(linux.security_context.get_or_insert_default());
        self
    }

    /// In a pod with users of its own, to whom the files of its volumes belong.
    pub(crate) fn of_users(mut self, host: u32) -> Self {
        for mount in &mut self.mounts {
            (mount.uid_mappings, mount.gid_mappings) = (mapping(host), mapping(host));
        }
        self.security(|security| {
            security.namespace_options.get_or_insert_default().userns_options = users(host);
        })
    }

    pub(crate) fn resources(mut self, resources: LinuxContainerResources) -> Self {
        self.linux.get_or_insert_default().resources = Some(resources);
        self
    }

    /// With a directory or file of the host.
    pub(crate) fn volume(mut self, host: &Path, inside: &str, readonly: bool) -> Self {
        self.mounts.push(Mount {
            container_path: inside.into(),
            host_path: host.display().to_string(),
            readonly,
            propagation: Propagation::Private.into(),
            ..Default::default()
        });
        self
    }
}

/// A container of a pod. It goes with the pod.
pub(crate) struct Container<'pod> {
    pub(crate) pod: &'pod Pod,
    pub(crate) id: String,
    log: PathBuf,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) exit_code: i32,
    pub(crate) reason: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Container<'_> {
    pub(crate) fn status(&self) -> Result<ContainerStatus> {
        self.pod.cri.status(&self.id)
    }

    /// Waits for a state.
    pub(crate) fn reaches(&self, state: ContainerState) -> Result<ContainerStatus> {
        eventually(|| {
            let status = self.status()?;
            ensure!(status.state() == state, "{:?} and not {state:?}", status.state());
            Ok(status)
        })
    }

    /// Waits for its end, and reads its log.
    pub(crate) fn finish(&self) -> Result<Finished> {
        let status = self.reaches(ContainerState::Exited)?;
        let entries = self.log()?;
        Ok(Finished {
            exit_code: status.exit_code,
            reason: status.reason,
            stdout: log::stream(&entries, "stdout"),
            stderr: log::stream(&entries, "stderr"),
        })
    }

    pub(crate) fn log_path(&self) -> &Path {
        &self.log
    }

    pub(crate) fn log(&self) -> Result<Vec<log::Entry>> {
        let text = fs::read_to_string(&self.log)
            .with_context(|| format!("read {}", self.log.display()))?;
        log::parse(&text)
    }

    /// Waits until a line of its log contains `words`.
    pub(crate) fn logs(&self, words: &str) -> Result<()> {
        eventually(|| {
            let entries = self.log()?;
            ensure!(
                entries.iter().any(|entry| entry.text.contains(words)),
                "no {words:?} in its log {entries:?}"
            );
            Ok(())
        })
    }

    /// What a shell line prints inside, when it ends with 0.
    pub(crate) fn exec(&self, line: &str) -> Result<String> {
        let answer = self.pod.cri.exec_sync(&self.id, &["sh", "-c", line], 0)?;
        ensure!(
            answer.exit_code == 0,
            "{line:?} ended with {}: {}",
            answer.exit_code,
            String::from_utf8_lossy(&answer.stderr)
        );
        Ok(String::from_utf8(answer.stdout)?)
    }

    pub(crate) fn stop(&self, seconds: i64) -> Result<()> {
        self.pod.cri.stop(&self.id, seconds)
    }

    pub(crate) fn remove(self) -> Result<()> {
        self.pod.cri.remove(&self.id)
    }
}

/// Tries until it holds, for [`SOON`].
pub(crate) fn eventually<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > SOON => {
                return Err(error.context(format!("after {SOON:?}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Runs the same with both runtimes, and compares line by line what it tells.
pub(crate) fn same(look: impl Fn(Runtime) -> Result<String>) -> Result<()> {
    let [runc, vial] = Runtime::BOTH
        .map(|runtime| look(runtime).with_context(|| format!("with {}", handler(runtime))));
    compare(&runc?, &vial?)
}

fn compare(runc: &str, vial: &str) -> Result<()> {
    for (runc, vial) in runc.lines().zip(vial.lines()) {
        ensure!(runc == vial, "runc shows {runc:?}, Vial {vial:?}");
    }
    ensure!(runc == vial, "runc shows {runc:?}, Vial {vial:?}");
    Ok(())
}

/// Something to find out about a pod, and what to call it.
type Look = (&'static str, fn(&Pod) -> Result<String>);

/// Takes several looks at one pod of each runtime, and compares each. One that fails does not keep
/// the others from being taken.
pub(crate) fn same_in_a_pod(looks: &[Look]) -> Result<()> {
    let [runc, vial] = Runtime::BOTH.map(|runtime| -> Result<Vec<Result<String>>> {
        let pod = Pod::new(runtime)?;
        let told = looks.iter().map(|(_, look)| look(&pod));
        let told = told.map(|told| told.with_context(|| format!("with {}", handler(runtime))));
        let told = told.collect();
        pod.end()?;
        Ok(told)
    });
    let both = runc?.into_iter().zip(vial?);
    let wrong: Vec<String> = looks
        .iter()
        .zip(both)
        .filter_map(|((name, _), (runc, vial))| {
            let compared = runc.and_then(|runc| compare(&runc, &vial?));
            compared.err().map(|error| format!("{name}: {error:#}"))
        })
        .collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}
