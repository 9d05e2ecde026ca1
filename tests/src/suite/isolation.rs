//! What a VMM can reach: a running one looked at from outside, and a hostile program in its place.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use vial_tests::node::Configuration;

use super::bed::{Bed, Runtime};
use super::faults::process;
use super::network::Network;

pub(crate) const ADVERSARY: &str = "/usr/local/bin/vial-adversary";

/// What the file server keeps (capabilities(7)): CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER,
/// CAP_FSETID, CAP_SETGID, CAP_SETUID, CAP_SETFCAP.
const FILE_SERVER_CAPABILITIES: u64 = 0x8000_00db;

/// The `status` of a thread (proc_pid_status(5)) by name.
fn status(thread: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(thread.join("status"))?;
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let words: Vec<&str> = value.split_whitespace().collect();
        Some((name.to_owned(), words.join(" ")))
    };
    Ok(text.lines().filter_map(field).collect())
}

fn number(status: &BTreeMap<String, String>, name: &str) -> Result<u64> {
    let text = status.get(name).with_context(|| format!("no {name}"))?;
    u64::from_str_radix(text, 16).with_context(|| format!("{name}: {text}"))
}

pub(crate) fn vmm_is_jailed_with_each_of_its_threads(bed: &Bed) -> Result<()> {
    let container = bed.detached(Runtime::Vial, &["sleep", "1000"])?;
    container.reaches("RUNNING")?;
    let vmm = PathBuf::from(format!("/proc/{}", process("vial-vmm", "--api-fd")?));
    threads_have_what_they_need(&vmm)?;
    namespaces_are_its_own(&vmm)?;
    root_is_the_shared_tree(&vmm)?;
    descriptors_are_those_handed_over(&vmm)?;
    let limits = fs::read_to_string(vmm.join("limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size"));
    ensure!(core.is_some_and(|line| line.split_whitespace().nth(4) == Some("0")), "{core:?}");
    let cgroup = fs::read_to_string(vmm.join("cgroup"))?;
    let expected = format!("0::/default/{}", container.name);
    ensure!(cgroup.trim() == expected, "its cgroup is {cgroup:?} and not {expected:?}");
    let cgroup = Path::new("/sys/fs/cgroup/default").join(&container.name);
    for limit in ["memory.max", "pids.max"] {
        let value = fs::read_to_string(cgroup.join(limit))?;
        ensure!(value.trim().parse::<u64>().is_ok(), "{limit} is {value:?}");
    }
    Ok(())
}

fn threads_have_what_they_need(vmm: &Path) -> Result<()> {
    let mut names = Vec::new();
    let mut users = Vec::new();
    for thread in fs::read_dir(vmm.join("task"))? {
        let thread = thread?.path();
        let name = fs::read_to_string(thread.join("comm"))?.trim().to_owned();
        let status = status(&thread)?;
        let of = |field: &str| status.get(field).cloned().unwrap_or_default();
        // KVM's own helper thread is the kernel's.
        if name.starts_with("kvm-") {
            continue;
        }
        let allowed = if name == "file-server" { FILE_SERVER_CAPABILITIES } else { 0 };
        for set in ["CapEff", "CapPrm"] {
            let has = number(&status, set)?;
            ensure!(has == allowed, "{name} has {set} {has:x} and not {allowed:x}");
        }
        ensure!(number(&status, "CapInh")? == 0, "{name} could pass capabilities on");
        let bounding = number(&status, "CapBnd")?;
        ensure!(bounding == FILE_SERVER_CAPABILITIES, "{name}: CapBnd {bounding:x}");
        ensure!(of("NoNewPrivs") == "1" && of("Seccomp") == "2", "{name}: {status:?}");
        // The one that holds requests for rings, the base, and the thread's own.
        ensure!(of("Seccomp_filters") == "3", "{name}: {} filters", of("Seccomp_filters"));
        ensure!(of("Groups").is_empty(), "{name} is in groups {}", of("Groups"));
        ensure!(of("NSpid").split(' ').count() == 2, "{name} is {} in its namespaces", of("NSpid"));
        if name != "file-server" {
            users.push((of("Uid"), of("Gid")));
        }
        names.push(name);
    }
    names.sort();
    ensure!(names == ["file-server", "io", "vcpu0", "vial-vmm"], "its threads are {names:?}");
    users.dedup();
    ensure!(users.len() == 1, "its threads are of different users: {users:?}");
    let user: u32 = users[0].0.split(' ').next().unwrap_or_default().parse()?;
    ensure!(user >= 65_536 && users[0].0 == users[0].1, "it is user {user}");
    Ok(())
}

fn namespaces_are_its_own(vmm: &Path) -> Result<()> {
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let its = fs::read_link(vmm.join("ns").join(kind))?;
        let ours = fs::read_link(Path::new("/proc/self/ns").join(kind))?;
        ensure!(its != ours, "its {kind} namespace is the host's");
    }
    Ok(())
}

fn root_is_the_shared_tree(vmm: &Path) -> Result<()> {
    let mounts = fs::read_to_string(vmm.join("mountinfo"))?;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (place, flags) = (fields[4], fields[5].split(',').collect::<Vec<_>>());
        for flag in ["nosuid", "nodev", "noexec"] {
            ensure!(flags.contains(&flag), "{place} is mounted without {flag}: {line}");
        }
        ensure!(place != "/" || flags.contains(&"ro"), "its root can be written: {line}");
    }
    let names = |path: PathBuf| -> Result<Vec<_>> {
        let mut names = fs::read_dir(&path)
            .with_context(|| path.display().to_string())?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let inside = names(vmm.join("root"))?;
    ensure!(inside.len() == 1, "its root holds {inside:?} and not one container");
    Ok(())
}

/// None but sockets, pipes and events of its own, devices, the guest's files, and what it reads.
fn descriptors_are_those_handed_over(vmm: &Path) -> Result<()> {
    for entry in fs::read_dir(vmm.join("fd"))? {
        let entry = entry?.path();
        // It may be closed meanwhile.
        let Ok(target) = fs::read_link(&entry) else { continue };
        let target = target.display().to_string();
        let anonymous = ["socket:", "pipe:", "anon_inode:"];
        if anonymous.iter().any(|kind| target.starts_with(kind)) {
            continue;
        }
        // What is not of its mount namespace is a detached mount's: its path is from there.
        let flags = fs::read_to_string(
            vmm.join("fdinfo").join(entry.file_name().context("a descriptor's number")?),
        )?;
        let device = matches!(target.as_str(), "/" | "/kvm" | "/net/tun" | "/tun");
        let known = device || target.contains("vmlinux") || target.contains("image");
        let inside = target.starts_with("/case-") || target.contains("/rootfs");
        ensure!(known || inside, "it holds {target}: {flags}");
    }
    Ok(())
}

/// Starts a container with the configuration changed so, and with options of `ctr run`.
fn run_with(bed: &Bed, change: &str, options: &[&str]) -> Result<super::bed::Outcome> {
    let configuration = Configuration::keep();
    let key = change.split(' ').next().unwrap_or_default();
    let others = configuration.text().lines().filter(|line| line.split(' ').next() != Some(key));
    let lines: Vec<&str> = others.chain([change]).collect();
    configuration.write(&(lines.join("\n") + "\n"))?;
    bed.run(Runtime::Vial, options, &["true"])
}

pub(crate) fn hostile_program_in_place_of_the_vmm_gets_nowhere(bed: &Bed) -> Result<()> {
    ensure!(Path::new(ADVERSARY).exists(), "there is no {ADVERSARY}; `make payload` adds it");
    let files =
        ["/payload/guest/vmlinux", "/dev/kvm", "/dev/null", "/dev/net/tun", "/dev/vhost-net"];
    let look = || -> Result<Vec<_>> {
        use std::os::unix::fs::MetadataExt;
        let metadata = files.iter().map(|path| Ok(fs::metadata(path)?));
        let metadata: Vec<fs::Metadata> = metadata.collect::<Result<_>>()?;
        Ok(metadata.iter().map(|m| (m.mode(), m.uid(), m.gid(), m.len())).collect())
    };
    let before = look()?;
    let log = bed.log_length();
    // With a tap of two queues and what carries its packets.
    let network = Network::new()?;
    let namespace = network.option();
    let options = ["--with-ns", &namespace, "--cpus", "2"];
    let outcome = run_with(bed, &format!("vmm = \"{ADVERSARY}\""), &options)?;
    let holes: Vec<String> = bed.lines_since(log, "hole:");
    ensure!(holes.is_empty(), "the jail has holes: {}", holes.join("; "));
    ensure!(
        outcome.status != 0 && outcome.stderr.contains(": 0 succeeded"),
        "the adversary did not come to its end: {outcome:?}"
    );
    let tried = outcome.stderr.split("tried ").nth(1).and_then(|rest| rest.split(' ').next());
    let tried: u32 = tried.context("how much was tried")?.parse()?;
    ensure!(tried > 2000, "only {tried} things were tried");
    ensure!(look()? == before, "what it was handed has changed");
    bed.clear();
    // The next to have this network finds it whole.
    let ping = ["ping", "-c", "1", "-W", "10", "10.97.0.1"];
    bed.run(Runtime::Vial, &options, &ping)?.expect(0)?;
    drop(network);
    bed.nothing_left()
}

pub(crate) fn vmm_without_a_jail_runs_and_is_warned_of(bed: &Bed) -> Result<()> {
    let configuration = Configuration::keep();
    configuration.write(&format!("jail = false\n{}", configuration.text()))?;
    let log = bed.log_length();
    let outcome = bed.run(Runtime::Vial, &[], &["uname", "-r"])?;
    ensure!(outcome.status == 0, "without a jail a container does not run: {outcome:?}");
    let warned = bed.lines_since(log, "not jailed");
    if warned.is_empty() {
        bail!("a VMM without a jail is started without a warning");
    }
    Ok(())
}

/// The host's limit of user namespaces, until dropped.
struct UserNamespaces(String);

const USER_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

impl Drop for UserNamespaces {
    fn drop(&mut self) {
        let _ = fs::write(USER_NAMESPACES, &self.0);
    }
}

pub(crate) fn vmm_without_user_namespaces_is_jailed_and_warned_of(bed: &Bed) -> Result<()> {
    let _restore = UserNamespaces(fs::read_to_string(USER_NAMESPACES)?);
    fs::write(USER_NAMESPACES, "0")?;
    let log = bed.log_length();
    let container = bed.detached(Runtime::Vial, &["sleep", "1000"])?;
    container.reaches("RUNNING")?;
    let warned = bed.lines_since(log, "no user namespace");
    ensure!(!warned.is_empty(), "nothing is said of the missing user namespace");
    let vmm = PathBuf::from(format!("/proc/{}", process("vial-vmm", "--api-fd")?));
    let user = fs::read_link(vmm.join("ns/user"))?;
    ensure!(user == fs::read_link("/proc/self/ns/user")?, "it has a user namespace");
    threads_have_what_they_need(&vmm)?;
    root_is_the_shared_tree(&vmm)
}
