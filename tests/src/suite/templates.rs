//! Pods that start from a template: that they behave as others do, and share nothing that they
//! should not.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use vial_tests::node::{self, Configuration};

use super::bed::{Bed, Detached, Runtime, run};
use super::faults::process;
use super::lifecycle;
use crate::cri::pod::eventually;

/// Where the templates of a case are: on a file system that can have huge pages, as a node's are.
const DIRECTORY: &str = "/run/vial-suite-templates";
/// What the shim says of a VM that went on from a template, and of one that did not.
pub(super) const RESTORED: &str = "goes on from the template";
pub(super) const COLD: &str = "the VM boots cold";
/// How long a making may take, and how long until there is a VMM.
const PATIENCE: Duration = Duration::from_secs(90);

/// A node with a template directory of its own, until dropped.
pub(super) struct Node {
    _configuration: Configuration,
}

/// Until what it returns is dropped, nobody but a case makes a template: the pods of all others are what they are meant to
/// be, and no process comes and goes that is not theirs.
pub(crate) fn only_by_hand() -> Result<Configuration> {
    let configuration = Configuration::keep();
    configuration.write(&node::with(configuration.text(), "templates", BY_HAND))?;
    Ok(configuration)
}

/// Who makes templates.
const BY_HAND: &str = "\"manual\"";
const BY_PODS: &str = "\"auto\"";

impl Node {
    /// One without a template.
    fn empty() -> Result<Self> {
        Self::configured(BY_HAND)
    }

    /// One without a template, on which `templates` has that value.
    fn configured(templates: &str) -> Result<Self> {
        let configuration = Configuration::keep();
        let text = node::with(configuration.text(), "templates", templates);
        configuration.write(&node::with(&text, "template_directory", &format!("{DIRECTORY:?}")))?;
        Ok(Self { _configuration: configuration })
    }

    /// One with a template, and that template's directory.
    pub(super) fn with_template() -> Result<(Self, PathBuf)> {
        let node = Self::empty()?;
        let name = vial(&["template", "create"])?;
        let path = Path::new(DIRECTORY).join(name.trim());
        ensure!(path.join("memory").is_file(), "{name:?} is no template");
        Ok((node, path))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(DIRECTORY); // Nothing is there when the making failed.
    }
}

fn vial(args: &[&str]) -> Result<String> {
    Ok(run(Command::new("vial").args(args))?.expect(0)?.stdout)
}

/// What boots in the cases of starts and ends. All that containers and pods do then is seen from a template, anyway.
pub(crate) fn template_serves_containers_as_a_boot_does(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let log = bed.log_length();
    lifecycle::exec_runs_beside_and_has_its_own_status(bed)?;
    lifecycle::five_at_once_all_work(bed)?;
    super::from_template(bed, log)
}

fn seconds_since_1970() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// What two pods from one template may not have in common, a line each.
const IDENTITY: &str = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
    head -c 16 /dev/urandom | hexdump -v -e '1/1 \"%02x\"'; echo; \
    head -c 16 /dev/random | hexdump -v -e '1/1 \"%02x\"'; echo; mktemp -u XXXXXXXXXXXXXXXX";

pub(crate) fn template_is_told_apart_by_each_of_its_pods(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    // Its clock stands still meanwhile.
    std::thread::sleep(Duration::from_secs(3));
    let log = bed.log_length();
    let pods: Vec<Detached> =
        (0..3).map(|_| bed.detached(Runtime::Vial, &["sleep", "1000"])).collect::<Result<_>>()?;
    ensure!(bed.lines_since(log, RESTORED).len() == pods.len(), "a VM came from elsewhere");
    let mut seen = std::collections::HashSet::new();
    for pod in &pods {
        let said = pod.exec(&[], &["sh", "-c", IDENTITY])?.expect(0)?.stdout;
        let lines: Vec<&str> = said.lines().collect();
        ensure!(lines.len() == 5 && lines.iter().all(|line| line.len() >= 16), "{said:?}");
        for line in lines {
            ensure!(seen.insert(line.to_owned()), "two pods have {line}");
        }
    }
    for pod in &pods {
        let before = seconds_since_1970()?;
        let said = pod.exec(&[], &["date", "+%s"])?.expect(0)?.stdout;
        let (guest, after) = (said.trim().parse::<f64>()?, seconds_since_1970()?);
        // The guest tells whole seconds, rounded down.
        ensure!(
            (before - 2.0..=after + 1.0).contains(&guest),
            "the clock shows {guest} between {before} and {after}"
        );
    }
    Ok(())
}

/// The most that shim and VMM of a pod whose process sleeps may have for themselves, in KiB. With what the kernel takes for
/// them besides, less than 1 MiB, a pod after the first costs no more than 8 MiB.
const MOST_OWN_KIB: u64 = 7 << 10;

/// What a process has of a kind of memory, in KiB (Documentation/filesystems/proc.rst, smaps_rollup).
fn memory_kib(program: &str, word: &str, kind: &str) -> Result<u64> {
    let path = format!("/proc/{}/smaps_rollup", process(program, word)?);
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).with_context(|| format!("no {kind} in {path}"))
}

/// What the processes of a pod have that no other has, in KiB. A template's own pages, which lie in memory, are none of that,
/// even while there is but one pod to map them.
fn own_memory_kib() -> Result<u64> {
    let of = |program, word| memory_kib(program, word, "Anonymous");
    Ok(of("vial-vmm", "")? + of("containerd-shim", "vial")?)
}

/// The least of the guest's kernel that a VMM has in huge pages, in KiB: its code has 10 MiB.
const LEAST_HUGE_KIB: u64 = 6 << 10;

/// Nothing of the template's that a pod has not written is the pod's own, and it writes little to be there.
pub(crate) fn template_pod_at_rest_has_little_memory_of_its_own(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let log = bed.log_length();
    let _pod = bed.detached(Runtime::Vial, &["sleep", "1000"])?;
    ensure!(!bed.lines_since(log, RESTORED).is_empty(), "the VM did not come from the template");
    eventually(|| {
        let kib = own_memory_kib()?;
        ensure!(kib <= MOST_OWN_KIB, "shim and VMM have {kib} KiB of their own");
        Ok(())
    })?;
    let huge = memory_kib("vial-vmm", "", "ShmemPmdMapped")?;
    ensure!(huge >= LEAST_HUGE_KIB, "of the template only {huge} KiB are mapped in huge pages");
    Ok(())
}

fn checksum(path: &Path) -> Result<String> {
    let said = run(Command::new("sha256sum").arg(path))?.expect(0)?.stdout;
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

pub(crate) fn template_keeps_its_memory_whatever_its_pods_write(bed: &Bed) -> Result<()> {
    let (_node, template) = Node::with_template()?;
    let before = checksum(&template.join("memory"))?;
    let (one, other) = (
        bed.detached(Runtime::Vial, &["sleep", "1000"])?,
        bed.detached(Runtime::Vial, &["sleep", "1000"])?,
    );
    let fill =
        "yes vial-suite-secret | head -c 16000000 >/dev/shm/secret && wc -c </dev/shm/secret";
    let written = one.exec(&[], &["sh", "-c", fill])?.expect(0)?.stdout;
    ensure!(written.trim() == "16000000", "{written:?}");
    other.exec(&[], &["test", "!", "-e", "/dev/shm/secret"])?.expect(0)?;
    let mut text = Vec::new();
    File::open(template.join("memory"))?.read_to_end(&mut text)?;
    let secret = b"vial-suite-secret\nvial-suite-secret\n";
    ensure!(!text.windows(secret.len()).any(|part| part == secret), "a pod writes to the template");
    ensure!(checksum(&template.join("memory"))? == before, "the template has changed");
    Ok(())
}

pub(crate) fn template_that_is_damaged_is_named_and_the_pod_boots(bed: &Bed) -> Result<()> {
    let (_node, template) = Node::with_template()?;
    let (state, memory) = (template.join("state"), template.join("memory"));
    let good = fs::read(&state)?;
    let length = fs::metadata(&memory)?.len();
    let shorten = |length| Ok(File::options().write(true).open(&memory)?.set_len(length)?);
    let spoil: [(&str, &dyn Fn() -> Result<()>); 5] = [
        ("checksum", &|| {
            let file = File::options().write(true).open(&state)?;
            Ok(file.write_all_at(&[!good[good.len() / 2]], good.len() as u64 / 2)?)
        }),
        ("bytes behind its header", &|| Ok(fs::write(&state, &good[..good.len() / 2])?)),
        ("version", &|| Ok(File::options().write(true).open(&state)?.write_all_at(&[99], 8)?)),
        ("it was changed", &|| {
            let (file, at) = (File::options().read(true).write(true).open(&memory)?, length / 2);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at)?;
            Ok(file.write_all_at(&[!byte[0]], at)?)
        }),
        ("it was changed", &|| shorten(1 << 20)),
    ];
    for (words, spoil) in spoil {
        fs::write(&state, &good)?;
        spoil()?;
        let log = bed.log_length();
        let outcome = bed.run(Runtime::Vial, &[], &["echo", "here"])?.expect(0)?;
        ensure!(outcome.stdout == "here\n", "{outcome:?}");
        let told = bed.lines_since(log, COLD);
        ensure!(told.iter().any(|line| line.contains(words)), "{words}: {told:?}");
    }
    // As a kernel that was installed anew looks.
    fs::write(&state, &good)?;
    let manifest = fs::read_to_string(template.join("template.json"))?;
    fs::write(template.join("template.json"), manifest.replacen("\"inode\": ", "\"inode\": 1", 1))?;
    let log = bed.log_length();
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    let told = bed.lines_since(log, COLD);
    ensure!(told.iter().any(|line| line.contains("made with another kernel")), "{told:?}");
    let listed = vial(&["template", "list"])?;
    ensure!(listed.contains("no: made with another kernel"), "{listed}");
    Ok(())
}

pub(crate) fn template_whose_making_is_killed_leaves_nothing(_: &Bed) -> Result<()> {
    let _node = Node::empty()?;
    let vmms = || -> Result<usize> {
        let said = run(Command::new("pgrep").args(["-c", "-x", "vial-vmm"]))?.stdout;
        Ok(said.trim().parse()?)
    };
    for wait in [Duration::ZERO, Duration::from_millis(700)] {
        let before = vmms()?;
        let mut making = Command::new("vial")
            .args(["template", "create"])
            .stdout(Stdio::null())
            .spawn()
            .context("start vial")?;
        let start = Instant::now();
        while vmms()? == before {
            ensure!(start.elapsed() < PATIENCE, "the making starts no VMM");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(wait);
        making.kill()?;
        making.wait()?;
        let left: Vec<String> = fs::read_dir(DIRECTORY)?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != ".empty" && name != ".lock")
            .collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        let start = Instant::now();
        while vmms()? != before {
            ensure!(start.elapsed() < PATIENCE, "its VMM lives on");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

pub(crate) fn template_is_listed_checked_and_removed(bed: &Bed) -> Result<()> {
    let (_node, template) = Node::with_template()?;
    let name = template.file_name().and_then(|name| name.to_str()).context("its name")?;
    let listed = vial(&["template", "list", "--json"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    ensure!(listed[0]["name"] == name && listed[0]["used"] == true, "{listed}");
    ensure!(vial(&["check"])?.contains(&format!("{name} fits")), "vial check does not tell of it");
    let absent = run(Command::new("vial").args(["template", "remove", "../x"]))?;
    ensure!(absent.status == 1 && absent.stderr.contains("no template"), "{absent:?}");
    vial(&["template", "remove", name])?;
    ensure!(!template.exists(), "it is still there");
    let log = bed.log_length();
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    ensure!(!bed.lines_since(log, COLD).is_empty(), "the start does not say why it is cold");
    Ok(())
}

/// The names in the directory of templates that are whole.
fn whole() -> Vec<String> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

pub(crate) fn template_is_made_when_a_pod_finds_none(bed: &Bed) -> Result<()> {
    let _node = Node::configured(BY_PODS)?;
    // Three at once want one; the first of them to get there makes it, after its pod has ended.
    let log = bed.log_length();
    std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..3).map(|_| scope.spawn(|| bed.run(Runtime::Vial, &[], &["true"]))).collect();
        runs.into_iter().try_for_each(|run| {
            run.join().map_err(|_| anyhow::anyhow!("a run panicked"))??.expect(0).map(drop)
        })
    })?;
    ensure!(bed.lines_since(log, COLD).len() == 3, "the first pods did not boot by themselves");
    wait_for("one template", || Ok(whole().len() == 1 && makings()? == 0))?;
    let made = whole();
    let log = bed.log_length();
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    ensure!(!bed.lines_since(log, RESTORED).is_empty(), "the next pod does not start from it");
    // One that is damaged is told of, taken away, and made again; an outdated one goes with it.
    let state = Path::new(DIRECTORY).join(&made[0]).join("state");
    let middle = fs::metadata(&state)?.len() / 2;
    File::options().write(true).open(&state)?.write_all_at(&[0xa5; 64], middle)?;
    let outdated = Path::new(DIRECTORY).join("1x128-0000000000000000");
    let manifest = fs::read_to_string(Path::new(DIRECTORY).join(&made[0]).join("template.json"))?;
    fs::create_dir(&outdated)?;
    fs::write(outdated.join("template.json"), manifest.replacen("\"inode\": ", "\"inode\": 1", 1))?;
    let log = bed.log_length();
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    ensure!(!bed.lines_since(log, COLD).is_empty(), "the damaged template was used");
    wait_for("a new template and nothing else", || {
        Ok(state.exists() && whole() == made && makings()? == 0)
    })?;
    let log = bed.log_length();
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    ensure!(!bed.lines_since(log, RESTORED).is_empty(), "the new template is not used");
    Ok(())
}

/// Waits until something holds that the making of a template leads to.
fn wait_for(what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < PATIENCE, "{what}: not there within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// How many processes make templates.
fn makings() -> Result<usize> {
    let said = run(Command::new("pgrep").args(["-c", "-f", "^[^ ]*vial template create"]))?.stdout;
    Ok(said.trim().parse()?)
}

pub(crate) fn template_that_cannot_be_made_is_not_tried_again_at_once(bed: &Bed) -> Result<()> {
    let _node = Node::configured(BY_PODS)?;
    // A template has to be a directory there, and a file is in the way of it.
    fs::create_dir_all(DIRECTORY)?;
    fs::write(Path::new(DIRECTORY).join(".empty"), "")?;
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    let told = Path::new(DIRECTORY).join(".failed");
    wait_for("the reason", || Ok(told.exists() && makings()? == 0))?;
    let reason = fs::read_to_string(&told)?;
    ensure!(reason.contains(".empty"), "{reason}");
    ensure!(vial(&["check"])?.contains(&reason), "vial check does not tell of it");
    let log = bed.log_length();
    bed.run(Runtime::Vial, &[], &["true"])?.expect(0)?;
    ensure!(
        bed.lines_since(log, "no template is made now").iter().any(|line| line.contains(".empty")),
        "the next pod does not say why there is none"
    );
    ensure!(whole().is_empty(), "there is a template: {:?}", whole());
    // By hand it is tried at once, and nobody is kept from it after that.
    fs::remove_file(Path::new(DIRECTORY).join(".empty"))?;
    vial(&["template", "create"])?;
    ensure!(!told.exists(), "the reason has outlived the failure");
    Ok(())
}

pub(crate) fn template_is_not_for_a_pod_that_does_not_want_one(bed: &Bed) -> Result<()> {
    let (_node, _) = Node::with_template()?;
    let annotation = |value| format!("io.vial/template={value}");
    let log = bed.log_length();
    let none = annotation("none");
    bed.run(Runtime::Vial, &["--annotation", &none], &["true"])?.expect(0)?;
    let cold = bed.lines_since(log, COLD);
    ensure!(cold.iter().any(|line| line.contains("annotation")), "it started from one: {cold:?}");
    let wrong = annotation("maybe");
    let refused = bed.run(Runtime::Vial, &["--annotation", &wrong], &["true"])?;
    ensure!(refused.status != 0 && refused.stderr.contains("'maybe'"), "{refused:?}");
    Ok(())
}
