//! Makes a template: boots a guest that belongs to no pod, and saves it.
//!
//! The files have no names until they are whole, so whoever is killed meanwhile leaves nothing:
//! the VMM ends with its socket. The VMM is not jailed, for in this guest there is nothing but
//! the operator's own kernel and agent; its system call filters hold.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags},
    io::Errno,
};
use sha2::{Digest, Sha256};
use tokio::{io::AsyncReadExt, sync::mpsc};
use vial_agent_protocol::{AGENT_PORT, READY_PORT};
use vial_vmm_api::{
    API_VERSION, Action, Descriptor, DeviceConfig, FailureKind, Placement, TemplateConfig, VmConfig,
};

use super::{
    MANIFEST, MANIFEST_VERSION, MEMORY, Manifest, STATE, Seal, Stamp, UNFINISHED, ahead, max_vcpus,
    prefix,
};
use crate::{
    agent::{Agent, AgentError},
    config::Config,
    jail::descriptors,
    sandbox::base_devices,
    timeline::Timeline,
    vmm_client::{self, VmmClient, VmmError, VmmEvent},
    vmm_process::{VmmProcess, VmmProcessError},
};

/// A directory for the shared directory that the guest of a template has and does not mount.
const EMPTY: &str = ".empty";
/// What is locked while a template is made.
const LOCK: &str = ".lock";
/// How long the guest is left alone before it is saved: what its kernel does by itself after the
/// boot is done then, once for all pods. Two seconds after it has found the balloon device, it tells
/// of the pages that it has free, which are zeros in the template then.
const SETTLE: Duration = Duration::from_millis(2500);
/// How long its connection may take to close, and how often that is looked at.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no new template.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The file system.
    #[error("cannot {action} {path}: {error}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// The VMM's process.
    #[error(transparent)]
    Process(#[from] VmmProcessError),
    /// The VMM.
    #[error("cannot {action}: {error}")]
    Vmm {
        /// What was asked of it.
        action: &'static str,
        /// Its answer.
        error: VmmError,
    },
    /// The agent.
    #[error("the guest of a template: {0}")]
    Agent(AgentError),
    /// The VM ended.
    #[error("the VM has ended: {0}")]
    Ended(String),
    /// The guest does not come up.
    #[error("the guest was not ready within {0} s; raise `boot_timeout_seconds`")]
    Timeout(u64),
    /// The configuration.
    #[error("a template has no console; set `debug_console = false`")]
    Console,
    /// The lock.
    #[error("another process makes a template; try again when it has ended")]
    Busy,
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CreateError {
    move |error| CreateError::File { action, path: path.into(), error }
}

fn vmm(action: &'static str) -> impl FnOnce(VmmError) -> CreateError {
    move |error| CreateError::Vmm { action, error }
}

/// Makes the template for VMs of that configuration, in place of one that there is, and returns
/// its name.
///
/// # Errors
/// [`CreateError`]. Nothing is left then.
pub async fn create(config: &Config) -> Result<String, CreateError> {
    let _lock = begin(config, FlockOperation::LockExclusive)?;
    make(config).await
}

/// As [`create`], but not when there is one that fits, or when somebody else makes one.
pub(super) async fn create_missing(config: &Config) -> Result<Option<String>, CreateError> {
    let _lock = match begin(config, FlockOperation::NonBlockingLockExclusive) {
        // What the other makes will do.
        Err(CreateError::Busy) => return Ok(None),
        lock => lock?,
    };
    match super::find(config) {
        Ok(_) => Ok(None),
        Err(_) => make(config).await.map(Some),
    }
}

fn begin(config: &Config, lock: FlockOperation) -> Result<File, CreateError> {
    match config.debug_console {
        true => Err(CreateError::Console),
        false => prepare(&config.template_directory, lock),
    }
}

/// Makes it, while nobody else makes one.
async fn make(config: &Config) -> Result<String, CreateError> {
    let root = &config.template_directory;
    let manifest = manifest(config)?;
    let (memory, state) = (unnamed(root)?, unnamed(root)?);
    save_guest(config, &memory, &state).await?;
    let name = name(&manifest);
    put_in_place(root, &name, &manifest, &memory, &state)?;
    ahead::forget_failure(root);
    remove_outdated(root)?;
    Ok(name)
}

/// Removes templates that no pod can start from any more, whatever its configuration: what they
/// were made from is not there as it was.
fn remove_outdated(root: &Path) -> Result<(), CreateError> {
    for name in super::names(root) {
        let path = root.join(&name);
        if super::read_manifest(&path).is_ok_and(|manifest| manifest.is_outdated()) {
            super::remove(root, &name).map_err(file("remove", &path))?;
        }
    }
    Ok(())
}

/// Makes the directory, locks it, and removes what somebody who was interrupted left in the moment
/// of naming it.
fn prepare(root: &Path, operation: FlockOperation) -> Result<File, CreateError> {
    let make = |path: &Path| {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(path).map_err(file("make", path))
    };
    make(root)?;
    make(&root.join(EMPTY))?;
    let path = root.join(LOCK);
    let lock = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(file("open", &path))?;
    rustix::fs::flock(&lock, operation).map_err(|error| match error {
        Errno::WOULDBLOCK => CreateError::Busy,
        error => file("lock", &path)(error.into()),
    })?;
    for entry in fs::read_dir(root).map_err(file("list", root))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(file("remove", &path))?;
        }
    }
    Ok(lock)
}

/// A file without a name, which goes when nobody has it open.
fn unnamed(root: &Path) -> Result<File, CreateError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(root, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .map_err(|error| file("make a file in", root)(error.into()))
}

fn manifest(config: &Config) -> Result<Manifest, CreateError> {
    Ok(Manifest {
        version: MANIFEST_VERSION,
        release: env!("CARGO_PKG_VERSION").into(),
        kernel: stamp(&config.kernel)?,
        image: stamp(&config.image)?,
        vmm: stamp(&config.vmm)?,
        vcpus: config.vcpus,
        max_vcpus: max_vcpus(config),
        memory_mib: config.memory_mib,
        command_line: super::command_line(config, config.vcpus),
        processor: processor(),
        created_unix_seconds: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        memory: Seal::default(),
    })
}

fn stamp(path: &Path) -> Result<Stamp, CreateError> {
    let mut opened = File::open(path).map_err(file("open", path))?;
    let metadata = opened.metadata().map_err(file("look at", path))?;
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; 64 << 10]);
    loop {
        match opened.read(&mut buffer).map_err(file("read", path))? {
            0 => break,
            count => digest.update(&buffer[..count]),
        }
    }
    let (device, inode, bytes, changed_ns) = super::identity(&metadata);
    let digest = hex(&digest.finalize());
    Ok(Stamp { path: path.into(), device, inode, bytes, changed_ns, digest })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of the first processor, and what it can do. The VMM compares all that a guest sees.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let line = first.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name).trim().into()
}

/// Size, and a digest of all that decides how the guest boots.
fn name(manifest: &Manifest) -> String {
    let mut digest = Sha256::new();
    for part in [
        &manifest.release,
        &manifest.kernel.digest,
        &manifest.image.digest,
        &manifest.vmm.digest,
        &manifest.command_line,
        &manifest.processor,
    ] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    digest.update([manifest.max_vcpus]);
    let digest = hex(&digest.finalize());
    prefix(manifest.vcpus, manifest.memory_mib) + &digest[..16]
}

/// Boots a guest and saves it.
async fn save_guest(config: &Config, memory: &File, state: &File) -> Result<(), CreateError> {
    let (ours, theirs) = vmm_client::socket_pair().map_err(vmm("start the VMM"))?;
    let process = VmmProcess::spawn(&config.vmm, theirs, None).await?;
    let saved = async {
        let (client, mut events) = VmmClient::new(ours).map_err(vmm("reach the VMM"))?;
        boot(config, &process, &client).await?;
        wait_until_ready(&mut events).await?;
        rehearse(config, &client).await?;
        tokio::time::sleep(SETTLE).await;
        save(&client, memory, state).await
    };
    let result = tokio::select! {
        result = tokio::time::timeout(config.boot_timeout, saved) => {
            result.unwrap_or(Err(CreateError::Timeout(config.boot_timeout.as_secs())))
        }
        status = process.wait() => Err(CreateError::Ended(process.explain(status))),
    };
    process.kill(KILL_PATIENCE).await?;
    result
}

async fn boot(
    config: &Config,
    process: &VmmProcess,
    client: &VmmClient,
) -> Result<(), CreateError> {
    let open = |path: &Path| descriptors::open_file(path).map_err(file("open", path));
    let kvm = Path::new("/dev/kvm");
    let kvm = descriptors::open_device(kvm).map_err(file("open", kvm))?;
    let (kernel, image) = (open(&config.kernel)?, open(&config.image)?);
    let empty = config.template_directory.join(EMPTY);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&empty, flags, Mode::empty())
        .map_err(|error| file("open", &empty)(error.into()))?;
    let own = PathBuf::from(format!("/proc/{}/fd", process.pid()));
    let own = descriptors::process_descriptors(process.pid()).map_err(file("open", &own))?;
    let given = [kvm.as_fd(), kernel.as_fd(), image.as_fd(), root.as_fd(), own.as_fd()];
    let mut devices = base_devices(Descriptor(3), Descriptor(4), true);
    devices.push(DeviceConfig::Memory);
    let machine = VmConfig {
        version: API_VERSION,
        kvm: Descriptor(0),
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        kernel: Descriptor(1),
        image: Some(Descriptor(2)),
        command_line: super::command_line(config, config.vcpus),
        console: None,
        devices,
        hot_plug: false,
        placement: Placement::default(),
        shared_memory: None,
    };
    let template = TemplateConfig { machine, max_vcpus: max_vcpus(config) };
    let booted = client.request(Action::BootTemplate(Box::new(template)), &given).await;
    booted.map(drop).map_err(vmm("boot the guest of a template"))
}

/// Greets the agent once, as each pod's shim does. What of its code it needs for that, and what memory of its own, it has
/// then, and no guest that goes on from here has to bring it in.
async fn rehearse(config: &Config, client: &VmmClient) -> Result<(), CreateError> {
    let stream = client.connect(AGENT_PORT).await.map_err(vmm("reach the agent"))?;
    let forgotten = Timeline::default();
    Agent::greet(stream, config.boot_timeout, &forgotten)
        .await
        .map(drop)
        .map_err(CreateError::Agent)
}

/// Waits until the agent has said that it can serve.
async fn wait_until_ready(events: &mut mpsc::Receiver<VmmEvent>) -> Result<(), CreateError> {
    let socket = loop {
        match events.recv().await {
            Some(VmmEvent::GuestConnected { port: READY_PORT, socket }) => break socket,
            Some(_) => {}
            // Why it ended is better known to whoever waits for the process.
            None => std::future::pending().await,
        }
    };
    let failed = |error| CreateError::Vmm {
        action: "wait for the agent",
        error: VmmError::Socket { action: "read", error },
    };
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.set_nonblocking(true).map_err(failed)?;
    let mut stream = tokio::net::UnixStream::from_std(stream).map_err(failed)?;
    // The guest closes it at once.
    while stream.read(&mut [0; 64]).await.map_err(failed)? > 0 {}
    Ok(())
}

async fn save(client: &VmmClient, memory: &File, state: &File) -> Result<(), CreateError> {
    let start = tokio::time::Instant::now();
    loop {
        let action = Action::Save { memory: Descriptor(0), state: Descriptor(1) };
        match client.request(action, &[memory.as_fd(), state.as_fd()]).await {
            Ok(_) => return Ok(()),
            Err(VmmError::Refused(failure))
                if failure.kind == FailureKind::State && start.elapsed() < CLOSE_PATIENCE =>
            {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(error) => return Err(vmm("save the guest of a template")(error)),
        }
    }
}

/// Gives the files their names, all at once.
fn put_in_place(
    root: &Path,
    name: &str,
    manifest: &Manifest,
    memory: &File,
    state: &File,
) -> Result<(), CreateError> {
    let new = root.join(format!("{UNFINISHED}{name}"));
    let written = || -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(&new)?;
        for (opened, name) in [(memory, MEMORY), (state, STATE)] {
            opened.sync_all()?;
            let unnamed = format!("/proc/self/fd/{}", opened.as_raw_fd());
            rustix::fs::linkat(CWD, unnamed, CWD, new.join(name), AtFlags::SYMLINK_FOLLOW)?;
        }
        // A name is a change, too.
        let sealed = Manifest { memory: Seal::of(&memory.metadata()?), ..manifest.clone() };
        let text = serde_json::to_vec_pretty(&sealed)?;
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(new.join(MANIFEST))?;
        io::Write::write_all(&mut file, &text)?;
        file.sync_all()?;
        let path = root.join(name);
        match path.exists() {
            // Starts see the old one until they see the new one.
            true => rustix::fs::renameat_with(CWD, &new, CWD, &path, RenameFlags::EXCHANGE)?,
            false => fs::rename(&new, &path)?,
        }
        File::open(root)?.sync_all()
    };
    let result = written().map_err(file("write the template", &new));
    let leftover = fs::remove_dir_all(&new);
    match leftover {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            result.and(Err(file("remove", &new)(error)))
        }
        _ => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let stamp = |name: &str| Stamp {
            path: name.into(),
            device: 1,
            inode: 2,
            bytes: 3,
            changed_ns: 4,
            digest: name.into(),
        };
        Manifest {
            version: MANIFEST_VERSION,
            release: "1".into(),
            kernel: stamp("kernel"),
            image: stamp("image"),
            vmm: stamp("vmm"),
            vcpus: 2,
            max_vcpus: 8,
            memory_mib: 256,
            command_line: "quiet".into(),
            processor: "one".into(),
            created_unix_seconds: 5,
            memory: Seal::default(),
        }
    }

    #[test]
    fn name_changes_with_whatever_the_guest_boots_from() {
        let base = name(&manifest());
        assert!(base.starts_with("2x256-"), "{base}");
        let changes: [fn(&mut Manifest); 9] = [
            |m| m.release.push('x'),
            |m| m.kernel.digest.push('x'),
            |m| m.image.digest.push('x'),
            |m| m.vmm.digest.push('x'),
            |m| m.command_line.push('x'),
            |m| m.processor.push('x'),
            |m| m.vcpus = 3,
            |m| m.max_vcpus = 9,
            |m| m.memory_mib = 257,
        ];
        for change in changes {
            let mut other = manifest();
            change(&mut other);
            assert_ne!(name(&other), base);
        }
        let mut later = manifest();
        later.created_unix_seconds += 1;
        assert_eq!(name(&later), base);
    }

    #[test]
    fn template_is_put_in_place_whole_and_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let _lock = prepare(root.path(), FlockOperation::LockExclusive).unwrap();
        for content in ["one", "two"] {
            let (mut memory, state) =
                (unnamed(root.path()).unwrap(), unnamed(root.path()).unwrap());
            io::Write::write_all(&mut memory, content.as_bytes()).unwrap();
            put_in_place(root.path(), "2x256-a", &manifest(), &memory, &state).unwrap();
            let text = fs::read_to_string(root.path().join("2x256-a/memory")).unwrap();
            assert_eq!(text, content);
            let path = root.path().join("2x256-a");
            assert!(super::super::read_manifest(&path).unwrap().is_whole(&path), "{content}");
        }
        assert_eq!(super::super::names(root.path()), ["2x256-a"]);
        let mut left: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [EMPTY, LOCK, "2x256-a"]);
    }

    #[test]
    fn what_an_interrupted_one_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join(format!("{UNFINISHED}1x128-a"));
        fs::create_dir(&left).unwrap();
        fs::write(left.join(MEMORY), "half").unwrap();
        drop(prepare(root.path(), FlockOperation::LockExclusive).unwrap());
        assert!(!left.exists());
    }

    #[test]
    fn lock_of_another_is_waited_for_or_not() {
        let root = tempfile::tempdir().unwrap();
        let at_once = || prepare(root.path(), FlockOperation::NonBlockingLockExclusive);
        let lock = at_once().expect("nobody has it");
        assert!(matches!(at_once(), Err(CreateError::Busy)));
        drop(lock);
        at_once().unwrap();
    }
}
