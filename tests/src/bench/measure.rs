//! The measurements, on the host where they are taken. Subjects take turns, so that all of them meet the same host.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vial_tests::loop_device::LoopDevice;
use vial_tests::node::setting;
use vial_tests::vmm::{Files, Vmm};
use vial_vmm_api::{API_VERSION, DeviceConfig, Placement, VmConfig};

use super::network::{self, Network};
use super::pods::Pods;
use super::report::{Measured, Series};
use super::subject::{Idle, Subject, since};
use super::templates::Template;

/// The subject that boots a machine for each pod.
const COLD: &str = "vial-cold";
/// The subject whose machines go on from a template.
const TEMPLATE: &str = "vial-template";
const VIAL: &str = "io.containerd.vial.v2";
/// The port that the agent connects to when it can serve (`vial_agent_protocol::READY_PORT`).
const READY_PORT: u32 = 1024;
/// What the shim tells each kernel (`Config::command_line` of it).
const WORDS: &str = "panic=-1 random.trust_cpu=on dummy.numdummies=0 percpu_alloc=page tsc=nowatchdog \
    rcupdate.rcu_expedited=1 quiet 8250.nr_uarts=0";
const PATIENCE: Duration = Duration::from_secs(120);
/// How long an idle container is left alone before it is looked at, and how long it is looked at.
const SETTLE: Duration = Duration::from_secs(2);
const WATCH: Duration = Duration::from_secs(5);
/// How many idle containers are looked at together, to tell what each more costs.
const TOGETHER: usize = 10;
/// Where the directories that are mounted into containers are made.
const VOLUMES: &str = "/dev/shm";
/// Where this program is in a container.
const PROGRAM: &str = "/bench/vial-bench";

/// Pods that are started at once, and how often at most: fifty of each subject are a quarter of an hour of counted
/// instructions, and differ little from time to time.
const PODS: [(&str, usize, u32); 3] =
    [("cri_pod_1", 1, u32::MAX), ("cri_pod_10", 10, u32::MAX), ("cri_pod_50", 50, 1)];

/// What to measure.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) mode: String,
    pub(crate) rounds: u32,
    pub(crate) image: String,
    pub(crate) peers: Vec<Subject>,
    /// Only the measurements whose id contains one of these; all without any.
    pub(crate) only: Vec<String>,
    /// Not those whose id is one of these.
    pub(crate) not: Vec<String>,
}

struct Bench<'a> {
    plan: &'a Plan,
    measured: Measured,
    begun: Instant,
}

/// Takes all measurements of a plan.
///
/// # Errors
/// The first that does not come to its end: a report with holes is none.
pub(crate) fn measure(plan: &Plan) -> Result<Measured> {
    let subject = |name: &str, runtime: &str, configuration| Subject {
        name: name.into(),
        runtime: runtime.into(),
        configuration,
    };
    let template = Template::make().context("make a template")?;
    let mut subjects = vec![
        subject("runc", "io.containerd.runc.v2", None),
        subject(COLD, VIAL, Some(template.unused())),
        subject(TEMPLATE, VIAL, Some(template.used())),
    ];
    subjects.extend(plan.peers.iter().cloned());
    let measured = Measured { mode: plan.mode.clone(), host: host(), ..Measured::default() };
    let mut bench = Bench { plan, measured, begun: Instant::now() };
    bench.machines(&subjects[2])?;
    bench.containers(&subjects)?;
    bench.pods(&subjects)?;
    bench.idle(&subjects)?;
    bench.idle_together(&subjects)?;
    bench.files(&subjects)?;
    bench.disks(&subjects)?;
    bench.networks(&subjects)?;
    bench.start_of_one(&subjects[2])?;
    Ok(bench.measured)
}

fn host() -> BTreeMap<String, String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let line = |text: &str, word: &str| {
        let line = text.lines().find(|line| line.starts_with(word)).unwrap_or_default();
        line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    BTreeMap::from([
        ("kernel".to_owned(), read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("cpu".to_owned(), line(&read("/proc/cpuinfo"), "model name")),
        ("cpus".to_owned(), cpus.to_string()),
        ("memory".to_owned(), line(&read("/proc/meminfo"), "MemTotal")),
    ])
}

impl Bench<'_> {
    fn wanted(&self, ids: &[&str]) -> bool {
        let Plan { only, not, .. } = self.plan;
        let named = |id: &&str| only.is_empty() || only.iter().any(|part| id.contains(part));
        ids.iter().any(|id| named(id) && !not.iter().any(|left_out| left_out == id))
    }

    fn add(&mut self, id: &str, subject: &str, unit: &str, sample: f64) {
        let all = &mut self.measured.series;
        match all.iter_mut().find(|series| series.id == id && series.subject == subject) {
            Some(series) => series.samples.push(sample),
            None => all.push(Series {
                id: id.into(),
                subject: subject.into(),
                unit: unit.into(),
                samples: vec![sample],
            }),
        }
    }

    fn progress(&self, what: &str, subject: &str, round: u32) {
        self.progress_of(what, subject, round, self.plan.rounds);
    }

    fn progress_of(&self, what: &str, subject: &str, round: u32, rounds: u32) {
        eprintln!(
            "[{:4.0}s] {what} of {subject}, {} of {rounds}",
            self.begun.elapsed().as_secs_f64(),
            round + 1,
        );
    }

    /// From the VMM's exec until its guest's agent can serve. One that goes on from a template is a pod's, by its shim's
    /// time line, in which a network could take part; the container has none.
    fn machines(&mut self, template: &Subject) -> Result<()> {
        if !self.wanted(&["vmm_ready"]) {
            return Ok(());
        }
        for round in 0..self.plan.rounds {
            self.progress("machines", COLD, round);
            let ms = machine_until_ready()?;
            self.add("vmm_ready", COLD, "ms", ms);
            self.progress("machines", TEMPLATE, round);
            let _idle: Idle = template.idle(&self.plan.image, 0)?;
            let marks = timeline()?;
            let at = |name: &str| {
                let mark = marks.iter().find(|(mark, _)| mark == name);
                mark.map(|(_, at)| *at).with_context(|| format!("{name:?} is not in the time line"))
            };
            let ms = at("agent greeted")? - at("VMM spawned")?;
            self.add("vmm_ready", TEMPLATE, "ms", ms);
        }
        Ok(())
    }

    /// `ctr run`, to the first line that the container prints and to its end. The first container of a runtime is not
    /// counted: it finds nothing in the host's page cache.
    fn containers(&mut self, subjects: &[Subject]) -> Result<()> {
        if !self.wanted(&["ctr_first_instruction", "ctr_run"]) {
            return Ok(());
        }
        for subject in subjects {
            subject.run(&self.plan.image, &[], "echo")?;
        }
        for round in 0..self.plan.rounds {
            for subject in subjects {
                self.progress("containers", &subject.name, round);
                let ran = subject.run(&self.plan.image, &[], "echo")?;
                let first = *ran.lines.first().context("the container printed nothing")?;
                self.add("ctr_first_instruction", &subject.name, "ms", first);
                self.add("ctr_run", &subject.name, "ms", ran.end);
            }
        }
        Ok(())
    }

    /// Pods through CRI, some at once: from the first request until the last container runs. The first pod of a handler is
    /// not counted, nor is that of a subject without one.
    fn pods(&mut self, subjects: &[Subject]) -> Result<()> {
        let all = PODS.map(|(id, ..)| id);
        if !self.wanted(&all) {
            return Ok(());
        }
        let socket = std::env::var_os("CONTAINERD_ADDRESS")
            .map_or("/run/containerd/containerd.sock".into(), PathBuf::from);
        let start = |subject: &Subject, count| {
            subject.configure()?;
            Pods::start(&socket, subject.handler(), &self.plan.image, count).context(
                "pods need containerd's CRI plugin, a handler of each runtime and a network; \
                 `--not cri_pod_1,cri_pod_10,cri_pod_50` leaves them out",
            )
        };
        for subject in subjects {
            drop(start(subject, 1)?);
        }
        let mut samples = Vec::new();
        for (id, count, most) in PODS.into_iter().filter(|(id, ..)| self.wanted(&[id])) {
            let rounds = self.plan.rounds.min(most);
            for round in 0..rounds {
                for subject in subjects {
                    self.progress_of(
                        &format!("{count} pods at once"),
                        &subject.name,
                        round,
                        rounds,
                    );
                    samples.push((id, subject.name.clone(), start(subject, count)?.started));
                }
            }
        }
        for (id, subject, ms) in samples {
            self.add(id, &subject, "ms", ms);
        }
        Ok(())
    }

    /// What a container costs that does nothing, and how long it takes to be rid of it.
    fn idle(&mut self, subjects: &[Subject]) -> Result<()> {
        if !self.wanted(&["idle_memory", "idle_cpu", "pod_remove"]) {
            return Ok(());
        }
        for round in 0..self.plan.rounds {
            for subject in subjects {
                self.progress("idle containers", &subject.name, round);
                let idle = subject.idle(&self.plan.image, 0)?;
                std::thread::sleep(SETTLE);
                let before = idle.cost()?;
                std::thread::sleep(WATCH);
                let after = idle.cost()?;
                let per_minute = 60.0 / WATCH.as_secs_f64();
                self.add("idle_memory", &subject.name, "MiB", after.memory_kib / 1024.0);
                self.add(
                    "idle_cpu",
                    &subject.name,
                    "ms/min",
                    (after.cpu_ms - before.cpu_ms) * per_minute,
                );
                self.add("pod_remove", &subject.name, "ms", idle.remove()?);
            }
        }
        Ok(())
    }

    /// What a container costs that does nothing, one of ten: they share what they have in common. Once for each
    /// subject, since it is a mean already.
    fn idle_together(&mut self, subjects: &[Subject]) -> Result<()> {
        if !self.wanted(&["idle_memory_10"]) {
            return Ok(());
        }
        for subject in subjects {
            self.progress("ten idle containers", &subject.name, 0);
            let all = (0..TOGETHER)
                .map(|number| subject.idle(&self.plan.image, number))
                .collect::<Result<Vec<_>>>()?;
            std::thread::sleep(SETTLE + WATCH);
            let mut kib = 0.0;
            for idle in &all {
                kib += idle.cost()?.memory_kib;
            }
            self.add("idle_memory_10", &subject.name, "MiB", kib / TOGETHER as f64 / 1024.0);
        }
        Ok(())
    }

    /// A directory of the host, mounted into the container: data in and out, and many small files. It is in memory: what a
    /// disk takes says nothing of a runtime.
    fn files(&mut self, subjects: &[Subject]) -> Result<()> {
        let steps = [
            ("fs_write_16m", "dd if=/dev/zero of=/volume/data bs=128k count=128 conv=fsync"),
            ("fs_read_16m", "dd if=/volume/data of=/dev/null bs=128k"),
            ("fs_make_200_files", "for n in $(seq 200); do : >/volume/file$n; done"),
            ("fs_list_200_files", "ls -l /volume"),
            ("fs_remove_200_files", "rm /volume/file*"),
        ];
        self.steps("files", subjects, &steps, || {
            let volume = tempfile::tempdir_in(VOLUMES)
                .with_context(|| format!("make a directory in {VOLUMES}"))?;
            let source = volume.path().display();
            let mount = format!("type=bind,src={source},dst=/volume,options=rbind:rw");
            Ok((volume, vec!["--mount".into(), mount]))
        })
    }

    /// A block device of the host in the container: data out and in, single blocks that are to be on the disk, and
    /// blocks that 8 threads write past the kernel's cache, each its own. Its file
    /// is in memory, as that of files.
    fn disks(&mut self, subjects: &[Subject]) -> Result<()> {
        let steps = [
            ("blk_write_16m", "dd if=/dev/zero of=$(echo /dev/loop*) bs=128k count=128 conv=fsync"),
            ("blk_read_16m", "dd if=$(echo /dev/loop*) of=/dev/null bs=128k count=128"),
            (
                "blk_sync_100_blocks",
                "for n in $(seq 100); do \
                 dd if=/dev/zero of=$(echo /dev/loop*) bs=4k count=1 seek=$n conv=fsync || exit 1; done",
            ),
            ("blk_write_512_blocks_by_8", "/bench/vial-bench load $(echo /dev/loop*)"),
        ];
        self.steps("disks", subjects, &steps, || {
            let file = tempfile::NamedTempFile::new_in(VOLUMES)
                .with_context(|| format!("make a file in {VOLUMES}"))?;
            file.as_file().set_len(DISK_BYTES)?;
            let disk = LoopDevice::new(file.path())?;
            let programs = tempfile::tempdir_in(VOLUMES)
                .with_context(|| format!("make a directory in {VOLUMES}"))?;
            fs::copy(std::env::current_exe()?, programs.path().join("vial-bench"))?;
            let source = programs.path().display();
            let mount = format!("type=bind,src={source},dst=/bench,options=rbind:ro");
            let options = vec!["--device".into(), disk.path.clone(), "--mount".into(), mount];
            Ok(((disk, file, programs), options))
        })
    }

    /// The network of a container, as CNI's bridge makes it: data to the host and from there, and single bytes that go
    /// there and back. This very program does that in there, so that no shell and no tool of it take part.
    fn networks(&mut self, subjects: &[Subject]) -> Result<()> {
        let line = format!("{PROGRAM} exchange {}", network::peer());
        self.rows("networks", subjects, &network::ROWS, &line, || {
            let volume = tempfile::tempdir_in(VOLUMES)
                .with_context(|| format!("make a directory in {VOLUMES}"))?;
            fs::copy(std::env::current_exe()?, volume.path().join("vial-bench"))?;
            let source = volume.path().display();
            let mount = format!("type=bind,src={source},dst=/bench,options=rbind:ro");
            let network = Network::new()?;
            let options = ["--mount".into(), mount, "--with-ns".into(), network.option()];
            Ok(((volume, network), options.into()))
        })
    }

    /// What single steps of a container take, each a row, with what `given` makes for it and the options by which it has
    /// that.
    fn steps<T>(
        &mut self,
        what: &str,
        subjects: &[Subject],
        steps: &[(&str, &str)],
        given: impl Fn() -> Result<(T, Vec<String>)>,
    ) -> Result<()> {
        let ids: Vec<&str> = steps.iter().map(|(id, _)| *id).collect();
        let line = |(_, line): &(&str, &str)| format!("echo; {line} >/dev/null 2>&1 || exit 1\n");
        let script = steps.iter().map(line).collect::<String>() + "echo";
        self.rows(what, subjects, &ids, &script, given)
    }

    /// The same of a script that prints a line before each step and one after the last.
    fn rows<T>(
        &mut self,
        what: &str,
        subjects: &[Subject],
        ids: &[&str],
        script: &str,
        given: impl Fn() -> Result<(T, Vec<String>)>,
    ) -> Result<()> {
        // Thousands of requests take long to count: they are only when they are asked for by name.
        let too_many = self.plan.mode == "icount" && self.plan.only.is_empty();
        if too_many || !self.wanted(ids) {
            return Ok(());
        }
        for round in 0..self.plan.rounds {
            for subject in subjects {
                self.progress(what, &subject.name, round);
                let (_given, options) = given()?;
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                let ran = subject.run(&self.plan.image, &options, script)?;
                ensure!(ran.lines.len() == ids.len() + 1, "a step is missing: {ran:?}");
                for (id, pair) in ids.iter().zip(ran.lines.windows(2)) {
                    self.add(id, &subject.name, "ms", pair[1] - pair[0]);
                }
            }
        }
        Ok(())
    }

    /// The phases of one start, as `vial ps` has them.
    fn start_of_one(&mut self, subject: &Subject) -> Result<()> {
        if !self.wanted(&["timeline"]) {
            return Ok(());
        }
        let _idle: Idle = subject.idle(&self.plan.image, 0)?;
        self.measured.timeline = timeline()?;
        Ok(())
    }
}

/// The phases of the start of the sandbox that runs, in milliseconds from the first on.
fn timeline() -> Result<Vec<(String, f64)>> {
    let output = Command::new("vial").args(["ps", "--json"]).output().context("run vial ps")?;
    ensure!(output.status.success(), "vial ps ended with {}", output.status);
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let marks = listed[0]["timeline"].as_array().context("no sandbox runs")?;
    let moment = |mark: &serde_json::Value| mark["at_ns"].as_f64().unwrap_or(0.0) / 1e6;
    let zero = marks.first().map_or(0.0, moment);
    let named = |mark: &serde_json::Value| {
        (mark["name"].as_str().unwrap_or("?").to_owned(), moment(mark) - zero)
    };
    Ok(marks.iter().map(named).collect())
}

/// The size of a disk that is measured.
const DISK_BYTES: u64 = 32 << 20;

/// Boots a machine as the shim does, without a network. Returns the milliseconds until its agent is ready.
fn machine_until_ready() -> Result<f64> {
    let share = tempfile::tempdir()?;
    let open = |path: String| File::open(&path).with_context(|| format!("open {path}"));
    let kernel = open(setting("kernel", "/usr/lib/vial/vmlinux")?)?;
    let image = open(setting("image", "/usr/lib/vial/image.erofs")?)?;
    let kvm =
        OpenOptions::new().read(true).write(true).open("/dev/kvm").context("open /dev/kvm")?;
    let program = PathBuf::from(setting("vmm", "/usr/lib/vial/vial-vmm")?);

    let start = Instant::now();
    let mut vmm = Vmm::start(&program, PATIENCE)?;
    let mut files = Files::default();
    let descriptors = directory(Path::new(&format!("/proc/{}/fd", vmm.pid())))?;
    let config = VmConfig {
        version: API_VERSION,
        kvm: files.add(kvm),
        vcpus: 1,
        memory_mib: 128,
        kernel: files.add(kernel),
        image: Some(files.add(image)),
        command_line: format!("{WORDS} {}", setting("kernel_arguments", "")?),
        console: None,
        devices: vec![
            DeviceConfig::Rng,
            DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![READY_PORT] },
            DeviceConfig::Fs {
                tag: "vial".into(),
                root: files.add(directory(share.path())?),
                proc_fd: Some(files.add(descriptors)),
            },
            DeviceConfig::Balloon,
        ],
        hot_plug: false,
        placement: Placement::default(),
        shared_memory: None,
    };
    vmm.boot(config, &files)?;
    vmm.guest_connected(READY_PORT)?;
    Ok(since(start))
}

fn directory(path: &Path) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).with_context(|| format!("open {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_is_told_what_the_shim_tells_it() {
        let config = vial_shim::config::Config::parse("", Path::new("none")).unwrap();
        assert_eq!(config.command_line(), WORDS);
    }
}
