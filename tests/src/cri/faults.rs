//! Things that die under a pod: what is told of it, and that removing the pod leaves nothing.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::client::Cri;
use super::pod::{Pod, eventually, handler, idle, same, sh};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime, log_path, run};
use crate::suite::faults::{kill, process};

/// Both containers of the pod end with an error, the pod is not ready, and all of it can be removed.
fn ends_and_goes(bed: &Bed, runtime: Runtime, dies: impl Fn() -> Result<()>) -> Result<String> {
    let pod = Pod::new(runtime)?;
    let started = pod.start(idle())?;
    let created = pod.create(idle())?;
    dies()?;
    let ended = started.reaches(ContainerState::Exited)?;
    ensure!(ended.exit_code != 0 && !ended.reason.is_empty(), "it is told as {ended:?}");
    eventually(|| {
        let status = pod.status()?;
        ensure!(status.state() == SandboxState::NotReady, "the pod is {:?}", status.state());
        Ok(())
    })?;
    ensure!(pod.cri.start(&created.id).is_err(), "a container started in a dead pod");
    pod.end()?;
    bed.nothing_left()?;
    Ok(format!("{} {}", ended.exit_code, ended.reason))
}

pub(crate) fn pod_whose_vmm_is_killed_ends_and_goes(bed: &Bed) -> Result<()> {
    let told = ends_and_goes(bed, Runtime::Vial, || kill(process("vial-vmm", "")?))?;
    ensure!(told == "137 Error", "it is told as {told:?}");
    Ok(())
}

/// Not compared: what runc's shim leaves when it is killed stays.
pub(crate) fn pod_whose_shim_is_killed_ends_and_goes(bed: &Bed) -> Result<()> {
    ends_and_goes(bed, Runtime::Vial, || kill(process("containerd-shim", "vial")?))?;
    Ok(())
}

pub(crate) fn pod_killed_while_it_starts_leaves_nothing(bed: &Bed) -> Result<()> {
    for victim in [Victim::Vmm, Victim::Shim] {
        for delay_ms in [0, 300, 1000, 2000] {
            let starts = || Pod::new(Runtime::Vial).and_then(|pod| pod.start(idle()).map(drop));
            killed_meanwhile(victim, Duration::from_millis(delay_ms), starts)?;
            bed.nothing_left().with_context(|| format!("{victim:?} killed after {delay_ms} ms"))?;
        }
    }
    Ok(())
}

/// Where containerd keeps the bundles of its tasks.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";

/// Starts a container, and kills the shim so long after there is a bundle. Returns how long after that the request was
/// answered.
fn started_and_shim_killed(pod: &Pod, after: Option<Duration>) -> Result<Duration> {
    let created = pod.create(idle())?;
    let (bundle, id) = (Path::new(BUNDLES).join(&created.id), created.id.as_str());
    std::thread::scope(|scope| {
        let starts = scope.spawn(|| Cri::new().start(id));
        while !bundle.exists() && !starts.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        if let Some(after) = after {
            std::thread::sleep(after);
            kill(process("containerd-shim", "vial")?)?;
        }
        let started = starts.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        if after.is_none() {
            started?;
        }
        Ok(begun.elapsed())
    })
}

/// Between the creation and the start of its task, containerd gives a container up and leaves its bundle.
pub(crate) fn pod_whose_shim_is_killed_while_a_container_starts_leaves_nothing(
    bed: &Bed,
) -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let long = started_and_shim_killed(&pod, None)?;
    pod.end()?;
    for tenth in 2..=10 {
        let after = long * tenth / 10;
        let pod = Pod::new(Runtime::Vial)?;
        started_and_shim_killed(&pod, Some(after))?;
        // Until containerd has noticed that the container has ended, it refuses to remove it.
        super::pod::clear()?;
        drop(pod);
        bed.nothing_left().with_context(|| format!("the shim was killed after {after:?}"))?;
    }
    Ok(())
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Vmm,
    /// The shim that serves, or the one that starts it, or one that cleans up.
    Shim,
    /// It is started again.
    Containerd,
}

/// Kills `victim` some time after it can be seen, while `life` goes on, and removes every pod.
pub(crate) fn killed_meanwhile(
    victim: Victim,
    delay: Duration,
    life: impl FnOnce() -> Result<()> + Send,
) -> Result<()> {
    let restarted = std::thread::scope(|scope| {
        let lives = scope.spawn(life);
        let (program, word) = match victim {
            Victim::Vmm => ("vial-vmm", ""),
            Victim::Shim | Victim::Containerd => ("containerd-shim", "vial"),
        };
        let seen = eventually(|| process(program, word));
        std::thread::sleep(delay);
        let restarted = match victim {
            Victim::Containerd => restart_containerd(|| Ok(())),
            // It may be gone with what it started.
            _ => {
                let _ = seen.and_then(kill);
                Ok(())
            }
        };
        // How far it came is open; that it ends is not.
        let _ = lives.join();
        restarted
    });
    super::pod::clear()?;
    restarted
}

/// A pod from its start to its removal, with some of what is asked of one.
pub(crate) fn life() -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let lived = pod.start(idle()).and_then(|container| {
        container.exec("echo runs")?;
        container.stop(1)
    });
    if lived.is_err() {
        // A containerd that is started again opens the pod's logs: they go after that.
        eventually(|| Cri::new().version())?;
    }
    pod.end()
}

/// What a client gives up is done or not, and what there is of it can be removed.
pub(crate) fn pod_whose_requests_are_given_up_can_be_removed(bed: &Bed) -> Result<()> {
    let hasty = |milliseconds| Cri::given_up_after(Duration::from_millis(milliseconds));
    let mut given_up = 0;
    for milliseconds in [100, 600, 1000, 1500] {
        let after = || format!("the start of a pod was given up after {milliseconds} ms");
        let started = Pod::of(&hasty(milliseconds), handler(Runtime::Vial), |_| ());
        given_up += u32::from(started.is_err());
        drop(started);
        super::pod::clear().with_context(after)?;
        bed.nothing_left().with_context(after)?;
    }
    let pod = Pod::new(Runtime::Vial)?;
    let mounts =
        || Ok::<_, anyhow::Error>(fs::read_to_string("/proc/self/mountinfo")?.lines().count());
    let before = mounts()?;
    for milliseconds in [4, 8, 12, 16, 20, 30, 40, 60] {
        // Creating takes longer than starting.
        let created = pod.create_by(&hasty(3 * milliseconds), idle());
        let id = created.or_else(|_| {
            given_up += 1;
            pod.create_by(&pod.cri, idle())
        })?;
        given_up += u32::from(hasty(milliseconds).start(&id).is_err());
        for id in pod.cri.containers(&pod.id)? {
            // containerd refuses while it has not given up itself.
            let removed = eventually(|| pod.cri.stop(&id, 0).and_then(|()| pod.cri.remove(&id)));
            removed.with_context(|| format!("requests were given up after {milliseconds} ms"))?;
        }
    }
    ensure!(given_up > 2, "only {given_up} requests were not answered in time: is it this fast?");
    // The pod is as it was, and has nothing of those containers.
    eventually(|| {
        let now = mounts()?;
        ensure!(now == before, "the host had {before} mounts before, and {now} now");
        Ok(())
    })?;
    ensure!(pod.prints(sh("echo runs"))? == "runs\n", "it prints something else");
    pod.end()
}

/// containerd's process number and command line.
fn containerd() -> Result<(i32, Vec<String>)> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.trim() != "containerd" {
            continue;
        }
        let line = fs::read_to_string(entry.path().join("cmdline"))?;
        let words: Vec<String> = line.split_terminator('\0').map(String::from).collect();
        if let (false, Some(pid)) = (words.is_empty(), entry.file_name().to_str()) {
            return Ok((pid.parse()?, words));
        }
    }
    anyhow::bail!("containerd does not run")
}

/// Kills containerd, and starts it anew after `meanwhile`.
fn restart_containerd(meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let (pid, words) = containerd()?;
    kill(pid)?;
    eventually(|| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        ensure!(line.is_empty(), "containerd still runs");
        Ok(())
    })?;
    let happened = meanwhile();
    let log = File::options().create(true).append(true).open(log_path())?;
    let status = Command::new("setsid")
        .arg("--fork")
        .args(&words)
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()?;
    ensure!(status.success(), "containerd could not be started again: {status}");
    eventually(|| Cri::new().version())?;
    eventually(|| run(Command::new("ctr").arg("version"))?.expect(0))?;
    happened
}

/// Waits until a file has grown since it had `length` bytes.
fn grows(path: &Path, length: u64) -> Result<()> {
    eventually(|| {
        let now = fs::metadata(path)?.len();
        ensure!(now > length, "{} stays at {now} bytes", path.display());
        Ok(())
    })
}

pub(crate) fn pod_outlives_a_killed_containerd(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let work = pod.make_directory("work")?;
        let talker = pod.start(sh("trap 'exit 0' TERM; while :; do echo tick; sleep 0.1; done"))?;
        let ends = pod.start(
            sh("echo up; while ! [ -e /work/end ]; do sleep 0.1; done; exit 5")
                .volume(&work, "/work", false),
        )?;
        ends.logs("up")?;
        talker.logs("tick")?;
        restart_containerd(|| {
            fs::write(work.join("end"), "")?;
            std::thread::sleep(Duration::from_secs(1));
            Ok(())
        })?;
        ensure!(pod.status()?.state() == SandboxState::Ready, "the pod ended with containerd");
        ensure!(talker.status()?.state() == ContainerState::Running, "it ended with containerd");
        let ended = ends.reaches(ContainerState::Exited)?;
        let mut told = format!("{} {}\n", ended.exit_code, ended.reason);
        told += &talker.exec("echo runs")?;
        grows(talker.log_path(), fs::metadata(talker.log_path())?.len())?;
        told += &pod.prints(sh("echo new"))?;
        let asked = Instant::now();
        talker.stop(30)?;
        ensure!(asked.elapsed() < Duration::from_secs(30), "it did not end when asked to");
        told += &format!("{}\n", talker.finish()?.exit_code);
        pod.end()?;
        Ok(told)
    })
}
