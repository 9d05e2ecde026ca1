//! Whether this machine can run what Vial starts, and what to do if not.

mod containerd;

use std::{
    fs::File,
    io::Read,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use vial_agent_protocol::users::Users;
use vial_vmm_api::{IMAGE_MAGIC, IMAGE_MAGIC_AT, is_image_size};

use crate::{
    config::{Config, VhostNet},
    devices::ways,
    idmap::{Extent, Mapped, Namespaces},
    jail::user_ids::Range,
    network::vhost,
    numa::{
        huge_pages, list,
        topology::{Node, Topology},
    },
    template::{self, NoTemplate, ahead},
};

/// How long a program that is asked may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most output of a program that is looked at, in bytes.
const MAX_OUTPUT_BYTES: u64 = 64 << 10;

/// Where containerd and the kubelet keep what containers have.
const VOLUMES: &str = "/var/lib";

/// How one thing was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it has to be.
    Ok,
    /// Not there.
    Missing,
    /// There, but not usable.
    Broken,
}

/// What was found about one thing.
#[derive(Debug)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// How it was found.
    pub verdict: Verdict,
    /// Details, and what to do.
    pub text: String,
    /// Whether nothing works without it.
    pub required: bool,
}

impl Finding {
    /// Whether pods cannot run because of it.
    pub fn stands_in_the_way(&self) -> bool {
        self.required && self.verdict != Verdict::Ok
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Missing => "missing",
            Verdict::Broken => "broken",
        };
        let optional =
            if self.required || self.verdict == Verdict::Ok { "" } else { " (optional)" };
        write!(f, "{verdict:<8} {:<14} {}{optional}", self.subject, self.text)
    }
}

fn finding(subject: &'static str, verdict: Verdict, text: impl Into<String>) -> Finding {
    Finding { subject, verdict, text: text.into(), required: true }
}

/// Looks at everything. `containerd` is the file that containerd's configuration begins with.
pub fn run(containerd: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut vhost_net = VhostNet::default();
    let mut iommufd = true;
    match Config::load() {
        Ok(config) => {
            findings.push(finding("configuration", Verdict::Ok, "read"));
            findings.push(kernel(&config.kernel));
            findings.push(image(&config.image));
            let vmm = file("VMM", &config.vmm, "set `vmm` or install it there");
            let usable = vmm.verdict == Verdict::Ok;
            findings.push(vmm);
            findings.push(kvm(usable.then_some(config.vmm.as_path())));
            findings.push(jail(&config));
            findings.push(templates(&config));
            findings.push(rings(&config));
            vhost_net = config.vhost_net;
            iommufd = config.iommufd;
        }
        Err(error) => {
            findings.push(finding("configuration", Verdict::Broken, error.to_string()));
            findings.push(kvm(None));
        }
    }
    findings.extend(containerd::look(containerd));
    findings.push(cgroups());
    findings.push(numa());
    findings.push(huge_pages());
    findings.push(optional("tun", "/dev/net/tun", "`modprobe tun`; pods need it for networks"));
    findings.push(carrier(vhost_net, Path::new(vhost::PATH)));
    findings.push(functions(iommufd, ways::Host::look(Path::new("/"))));
    findings.push(owners(Path::new(VOLUMES)));
    findings
}

/// By which way pods are given functions of this host.
fn functions(allowed: bool, host: ways::Host) -> Finding {
    let (way, text) = host.way(allowed);
    let verdict = if way.is_some() { Verdict::Ok } else { Verdict::Missing };
    Finding { required: false, ..finding("PCI functions", verdict, text) }
}

/// What carries the packets between the taps of pods and their guests.
fn carrier(wanted: VhostNet, path: &Path) -> Finding {
    let subject = "vhost-net";
    let found = match wanted {
        VhostNet::Off => finding(
            subject,
            Verdict::Missing,
            "off (`vhost_net = \"off\"`): VMMs carry the packets of pods",
        ),
        VhostNet::Auto => match std::fs::File::options().read(true).write(true).open(path) {
            Ok(_) => {
                let text = format!("{}: the kernel carries the packets of pods", path.display());
                finding(subject, Verdict::Ok, text)
            }
            Err(error) => {
                let text = format!(
                    "{}: {error}: VMMs carry the packets of pods, and take more time; \
                     `modprobe vhost_net`",
                    path.display()
                );
                finding(subject, Verdict::Missing, text)
            }
        },
    };
    Finding { required: false, ..found }
}

/// Whether files can belong to the users of pods that have some of their own.
fn owners(path: &Path) -> Finding {
    let optional =
        |verdict, text: String| Finding { required: false, ..finding("hostUsers", verdict, text) };
    let mapped = Users::of_texts("0:65536:65536", "0:65536:65536")
        .map_err(std::io::Error::other)
        .and_then(|users| Namespaces::default().with(users))
        .and_then(|namespace| Mapped::new(path, &namespace, Extent::default()));
    let path = path.display();
    match mapped {
        Ok(_) => optional(
            Verdict::Ok,
            format!("files in {path} can belong to the users of pods with `hostUsers: false`"),
        ),
        Err(error) => optional(
            Verdict::Missing,
            format!(
                "{path}: {error}: pods with `hostUsers: false` cannot have what is there; it takes Linux 5.19, \
                 and a file system with idmapped mounts"
            ),
        ),
    }
}

/// Whether pods start from a template.
fn templates(config: &Config) -> Finding {
    let optional =
        |verdict, text: String| Finding { required: false, ..finding("template", verdict, text) };
    let found = match template::find(config) {
        Ok((name, manifest)) => {
            let most = manifest.max_vcpus;
            optional(Verdict::Ok, format!("{name} fits pods of up to {most} CPUs"))
        }
        Err(reason @ (NoTemplate::Off | NoTemplate::Console)) => {
            optional(Verdict::Missing, format!("each pod boots its own kernel: {reason}"))
        }
        Err(reason @ (NoTemplate::None { .. } | NoTemplate::Vcpus { .. })) => {
            optional(Verdict::Missing, format!("pods start slower: {reason}"))
        }
        Err(reason) => optional(Verdict::Broken, format!("pods start slower: {reason}")),
    };
    match ahead::last_failure(&config.template_directory) {
        Some(failure) if found.verdict != Verdict::Ok => {
            Finding { text: format!("{}; the last try failed: {failure}", found.text), ..found }
        }
        _ => found,
    }
}

/// Whether requests to block devices are given to the kernel together.
fn rings(config: &Config) -> Finding {
    let optional =
        |verdict, text: String| Finding { required: false, ..finding("io_uring", verdict, text) };
    let without = "requests to block devices are done one after the other";
    if !config.io_uring {
        return optional(Verdict::Missing, format!("off (`io_uring = false`): {without}"));
    }
    if !config.jail {
        return optional(Verdict::Missing, format!("{without}, since VMMs have no jail"));
    }
    // Any file will do.
    let made = std::fs::File::open("/dev/null")
        .map_err(|error| error.to_string())
        .and_then(|file| vial_ring::make(file.as_fd(), false).map_err(|error| error.to_string()));
    match made {
        Ok(_) => {
            optional(Verdict::Ok, "requests to block devices go to the kernel together".into())
        }
        Err(error) => optional(Verdict::Broken, format!("{without}: {error}")),
    }
}

/// Whether VMMs are jailed, and by all that can be had.
fn jail(config: &Config) -> Finding {
    if !config.jail {
        let text =
            "off (`jail = false`): VMMs have the rights of root, which is for debugging only";
        return Finding { required: false, ..finding("jail", Verdict::Broken, text) };
    }
    let namespaces = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
    let allowed = namespaces.ok().and_then(|text| text.trim().parse::<u64>().ok());
    if allowed.is_none_or(|most| most == 0) {
        let text = "without user namespaces; allow them: `sysctl user.max_user_namespaces=15000`";
        return Finding { required: false, ..finding("jail", Verdict::Missing, text) };
    }
    let Range { base, count } = config.jail_uids;
    finding("jail", Verdict::Ok, format!("user ids {base} to {}", base + (count - 1)))
}

fn kernel(path: &Path) -> Finding {
    inside(file("kernel", path, "set `kernel` or install it there"), path, |file| {
        let mut begin = [0; 20];
        let read = file.read_exact_at(&mut begin, 0);
        // ELF's e_ident: magic, ELFCLASS64, ELFDATA2LSB; e_machine: EM_X86_64.
        let is_kernel = begin.starts_with(b"\x7fELF\x02\x01") && begin[18..] == [62, 0];
        Ok((read.is_ok() && is_kernel)
            .then_some(())
            .ok_or("no uncompressed kernel (vmlinux, ELF, x86-64); kernel-config/build makes one"))
    })
}

fn image(path: &Path) -> Finding {
    inside(file("guest image", path, "set `image` or install it there"), path, |file| {
        let bytes = file.metadata()?.len();
        let mut magic = [0; IMAGE_MAGIC.len()];
        let read = file.read_exact_at(&mut magic, IMAGE_MAGIC_AT);
        Ok((read.is_ok() && magic == IMAGE_MAGIC && is_image_size(bytes))
            .then_some(())
            .ok_or("no guest image of this version; vial-mkimage makes one"))
    })
}

/// Looks into a file that is there.
fn inside(
    found: Finding,
    path: &Path,
    look: impl FnOnce(&File) -> std::io::Result<Result<(), &'static str>>,
) -> Finding {
    if found.verdict != Verdict::Ok {
        return found;
    }
    let text = match File::open(path).and_then(|file| look(&file)) {
        Ok(Ok(())) => return found,
        Ok(Err(wrong)) => format!("{}: {wrong}", path.display()),
        Err(error) => format!("{}: {error}", path.display()),
    };
    Finding { verdict: Verdict::Broken, text, ..found }
}

fn file(subject: &'static str, path: &Path, remedy: &str) -> Finding {
    match File::open(path) {
        Ok(_) => finding(subject, Verdict::Ok, path.display().to_string()),
        Err(error) => {
            let verdict = match error.kind() {
                std::io::ErrorKind::NotFound => Verdict::Missing,
                _ => Verdict::Broken,
            };
            finding(subject, verdict, format!("{}: {error}; {remedy}", path.display()))
        }
    }
}

fn optional(subject: &'static str, path: &str, remedy: &str) -> Finding {
    Finding { required: false, ..file(subject, Path::new(path), remedy) }
}

/// Whether `/dev/kvm` opens says little: the VMM tries it with a small guest.
fn kvm(vmm: Option<&Path>) -> Finding {
    let device = Path::new("/dev/kvm");
    if !device.exists() {
        let text = "/dev/kvm: enable virtualisation in the firmware, or nested virtualisation on \
                    the host of this VM, then `modprobe kvm_intel` or `modprobe kvm_amd`";
        return finding("KVM", Verdict::Missing, text);
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open(device) {
        let text = format!("/dev/kvm: {error}; run this as root");
        return finding("KVM", Verdict::Broken, text);
    }
    let Some(vmm) = vmm else {
        return finding(
            "KVM",
            Verdict::Broken,
            "/dev/kvm opens, but without a VMM it is not tried",
        );
    };
    match ask(Command::new(vmm).arg("probe")) {
        Ok(answer) => {
            let verdict = if answer.success { Verdict::Ok } else { Verdict::Broken };
            finding("KVM", verdict, answer.first_line())
        }
        Err(error) => finding("KVM", Verdict::Broken, format!("cannot try it: {error}")),
    }
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return finding("cgroup v2", Verdict::Ok, "/sys/fs/cgroup");
    }
    let text = "/sys/fs/cgroup: boot with systemd.unified_cgroup_hierarchy=1";
    finding("cgroup v2", Verdict::Missing, text)
}

/// The nodes of this host.
fn numa() -> Finding {
    let optional = |verdict, text| Finding { required: false, ..finding("NUMA", verdict, text) };
    match Topology::of_host() {
        Ok(host) if host.nodes.len() < 2 => optional(Verdict::Ok, "one node".to_owned()),
        Ok(host) => {
            let node = |(number, node): (&u32, &Node)| match list::show(&node.cpus) {
                none if none.is_empty() => format!("node {number} without CPUs"),
                cpus => format!("node {number} with CPUs {cpus}"),
            };
            let nodes: Vec<String> = host.nodes.iter().map(node).collect();
            optional(Verdict::Ok, nodes.join(", "))
        }
        Err(error) => optional(Verdict::Broken, error.to_string()),
    }
}

/// The huge pages that pods can ask for.
fn huge_pages() -> Finding {
    let (verdict, text) = match huge_pages::shown() {
        Some(text) => (Verdict::Ok, text),
        None => (
            Verdict::Missing,
            "none are reserved; pods that ask for them need some: `sysctl vm.nr_hugepages=512`"
                .to_owned(),
        ),
    };
    Finding { required: false, ..finding("huge pages", verdict, text) }
}

struct Answer {
    success: bool,
    text: String,
}

impl Answer {
    fn first_line(&self) -> &str {
        self.text.lines().next().unwrap_or_default().trim()
    }
}

/// Runs a program with a time limit and takes what it prints, standard output first.
fn ask(command: &mut Command) -> std::io::Result<Answer> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // One that has more to say than a pipe holds must not wait for who waits for it.
    let streams = [child.stdout.take().map(listen), child.stderr.take().map(listen)];
    let since = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if since.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut output = Vec::new();
    for stream in streams.into_iter().flatten() {
        output.extend(stream.join().unwrap_or_else(|_| Ok(Vec::new()))?);
    }
    Ok(Answer { success: status.success(), text: String::from_utf8_lossy(&output).into_owned() })
}

type Listener = std::thread::JoinHandle<std::io::Result<Vec<u8>>>;

/// Reads to the end, and keeps the beginning.
fn listen(mut stream: impl Read + Send + 'static) -> Listener {
    std::thread::spawn(move || {
        let mut output = Vec::new();
        stream.by_ref().take(MAX_OUTPUT_BYTES).read_to_end(&mut output)?;
        std::io::copy(&mut stream, &mut std::io::sink())?;
        Ok(output)
    })
}

#[cfg(test)]
mod tests {
    use vial_vmm_api::IMAGE_UNIT_BYTES;

    use super::*;

    #[test]
    fn place_whose_files_cannot_belong_to_others_is_told() {
        let found = owners(Path::new("/proc"));
        assert_eq!(found.verdict, Verdict::Missing);
        assert!(found.text.contains("hostUsers") && !found.stands_in_the_way(), "{found}");
        let found = owners(Path::new("/nowhere"));
        assert!(found.verdict == Verdict::Missing && found.text.contains("/nowhere"), "{found}");
    }

    #[test]
    fn absent_file_stands_in_the_way_unless_optional() {
        let absent = file("kernel", Path::new("/nowhere/vmlinux"), "install it");
        assert_eq!(absent.verdict, Verdict::Missing);
        assert!(absent.stands_in_the_way());
        assert!(!optional("tun", "/nowhere/tun", "load it").stands_in_the_way());
    }

    #[test]
    fn who_carries_packets_is_told_and_does_not_stand_in_the_way() {
        let (there, absent) = (Path::new("/dev/null"), Path::new("/nowhere/vhost-net"));
        for (wanted, path, verdict, words) in [
            (VhostNet::Auto, there, Verdict::Ok, "the kernel carries"),
            (VhostNet::Auto, absent, Verdict::Missing, "modprobe vhost_net"),
            (VhostNet::Off, there, Verdict::Missing, "vhost_net = \"off\""),
        ] {
            let found = carrier(wanted, path);
            assert!(found.verdict == verdict && found.text.contains(words), "{found}");
            assert!(!found.stands_in_the_way());
        }
    }

    #[test]
    fn way_of_functions_is_told_and_does_not_stand_in_the_way() {
        let host =
            ways::Host { has_iommu: true, has_iommufd: true, has_devices: true, has_groups: true };
        for (allowed, host, verdict, words) in [
            (true, host, Verdict::Ok, "by iommufd"),
            (false, host, Verdict::Ok, "by IOMMU groups: `iommufd = false`"),
            (true, ways::Host { has_iommu: false, ..host }, Verdict::Missing, "VT-d"),
        ] {
            let found = functions(allowed, host);
            assert!(found.verdict == verdict && found.text.contains(words), "{found}");
            assert!(!found.stands_in_the_way());
        }
    }

    #[test]
    fn jail_that_is_off_is_shown_and_does_not_stand_in_the_way() {
        let with = |text: &str| jail(&Config::parse(text, Path::new("test.toml")).unwrap());
        let off = with("jail = false");
        assert_eq!(off.verdict, Verdict::Broken);
        assert!(!off.stands_in_the_way() && off.text.contains("jail = false"), "{off}");
        let on = with("jail_uid_base = 70000\njail_uid_count = 10");
        assert!(on.verdict != Verdict::Ok || on.text.contains("70000 to 70009"), "{on}");
    }

    #[test]
    fn program_that_answers_is_heard() {
        let answer = ask(Command::new("sh").args(["-c", "echo two >&2; echo one; exit 3"]));
        let answer = answer.unwrap();
        assert_eq!((answer.success, answer.text.as_str()), (false, "one\ntwo\n"));
        assert_eq!(answer.first_line(), "one");
        let long = ask(Command::new("sh").args(["-c", "yes | head -c 500000"])).unwrap();
        assert!(long.success && long.text.len() as u64 == MAX_OUTPUT_BYTES, "{}", long.text.len());
    }

    #[test]
    fn files_that_are_something_else_are_broken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let with = |at: usize, bytes: &[u8], length: u64| {
            let mut all = vec![0; at];
            all.extend(bytes);
            std::fs::write(&path, all).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        };
        let magic_at = IMAGE_MAGIC_AT as usize;
        with(magic_at, &IMAGE_MAGIC, IMAGE_UNIT_BYTES);
        assert_eq!((image(&path).verdict, kernel(&path).verdict), (Verdict::Ok, Verdict::Broken));
        for (at, length) in
            [(magic_at - 1, IMAGE_UNIT_BYTES), (magic_at, IMAGE_UNIT_BYTES + 1), (magic_at, 1025)]
        {
            with(at, &IMAGE_MAGIC, length);
            let found = image(&path);
            assert!(found.verdict == Verdict::Broken && found.stands_in_the_way(), "{found}");
        }
        with(0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0", 64);
        assert_eq!(kernel(&path).verdict, Verdict::Ok);
        with(0, b"\x7fELF", 5);
        let short = kernel(&path);
        assert!(short.verdict == Verdict::Broken && short.text.contains("vmlinux"), "{short}");
    }
}
