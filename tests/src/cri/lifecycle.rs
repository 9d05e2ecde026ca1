//! What happens to pods and their containers from start to end.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::client::{Cri, refused};
use super::grpc::Refused;
use super::pod::{Finished, Pod, eventually, handler, idle, same, sh, words};
use super::wire::*;
use crate::suite::bed::{Bed, run};
use crate::suite::faults::{kill, process};

pub(crate) fn pod_and_container_go_through_their_states(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::with(runtime, |config| {
            config.labels.insert("app".into(), "suite".into());
            config.annotations.insert("note".into(), "kept".into());
        })?;
        let status = pod.status()?;
        ensure!(status.state() == SandboxState::Ready, "the pod is {status:?}");
        ensure!(status.runtime_handler == handler(runtime), "the pod is {status:?}");
        ensure!(status.labels == pod.config.labels, "the pod is {status:?}");
        ensure!(status.annotations == pod.config.annotations, "the pod is {status:?}");
        ensure!(pod.cri.pods()?.contains(&pod.id), "the pod is not listed");

        let container = pod.create(idle())?;
        let created = container.status()?;
        ensure!(created.state() == ContainerState::Created, "after its creation {created:?}");
        pod.cri.start(&container.id)?;
        let running = container.status()?;
        ensure!(running.state() == ContainerState::Running, "after its start {running:?}");
        ensure!(running.started_at >= running.created_at, "times of {running:?}");
        container.logs("up")?;
        container.stop(60)?;
        let ended = container.status()?;
        ensure!(ended.state() == ContainerState::Exited, "after its end {ended:?}");
        ensure!(ended.finished_at >= ended.started_at, "times of {ended:?}");

        // The pod is there without containers, and takes more.
        ensure!(pod.status()?.state() == SandboxState::Ready, "the pod ended with its container");
        let next = pod.start(idle())?;
        pod.cri.stop_pod(&pod.id)?;
        ensure!(pod.status()?.state() == SandboxState::NotReady, "a stopped pod is ready");
        let killed = next.status()?;
        ensure!(killed.state() == ContainerState::Exited, "in a stopped pod {killed:?}");
        // Stopping twice is no error, starting in what is stopped is.
        pod.cri.stop_pod(&pod.id)?;
        ensure!(pod.start(idle()).is_err(), "a container was started in a stopped pod");

        let id = pod.id.clone();
        pod.end()?;
        let gone = refused(Cri::new().pod_status(&id))?;
        ensure!(gone.code == Refused::NOT_FOUND, "a removed pod: {gone}");
        Ok(format!("{} {} {}", ended.exit_code, ended.reason, killed.reason))
    })
}

/// The handler that has `sandboxer = "shim"` in containerd's configuration.
pub(crate) const SANDBOXER: &str = "vial-sandbox";

pub(crate) fn pod_of_the_sandbox_api_goes_through_its_states(bed: &Bed) -> Result<()> {
    let pod = Pod::of_handler(SANDBOXER, |config| {
        let servers = vec!["192.0.2.7".into()];
        config.dns_config = Some(DnsConfig { servers, ..Default::default() });
    })?;
    let status = pod.status()?;
    ensure!(status.state() == SandboxState::Ready, "the pod is {status:?}");
    ensure!(status.runtime_handler == SANDBOXER, "the pod is {status:?}");
    let address = status.network.map(|network| network.ip).unwrap_or_default();
    let listed = run(Command::new("ctr").args(["-n", "k8s.io", "container", "ls", "-q"]))?;
    ensure!(!listed.expect(0)?.stdout.contains(&pod.id), "a container stands for the pod");

    let first = pod.start(idle())?;
    first.logs("up")?;
    let seen = first.exec("hostname; cat /etc/hostname")?;
    let name = &pod.config.hostname;
    ensure!(seen == format!("{name}\n{name}\n"), "the host name is not the pod's: {seen}");
    let seen = first.exec("grep -c localhost /etc/hosts; cat /etc/resolv.conf")?;
    ensure!(seen.contains("nameserver 192.0.2.7\n"), "names are asked for by {seen}");
    let seen = first.exec("ip -o address show eth0")?;
    ensure!(!address.is_empty() && seen.contains(&address), "no {address} in {seen}");
    first.exec("echo of the first >/dev/shm/file")?;
    let info = pod.cri.pod_info(&pod.id)?;
    let vmm = process("vial-vmm", "")?;
    ensure!(info["pid"] == vmm && info["end"].is_null(), "the pod is told of as {info}");
    ensure!(info["sandbox"]["vmm"]["pid"] == vmm, "the pod is told of as {info}");

    let second = pod.run(sh("cat /dev/shm/file; exit 3"))?;
    let (status, printed) = (second.exit_code, second.stdout.as_str());
    ensure!(status == 3 && printed == "of the first\n", "the second is {second:?}");
    first.stop(30)?;
    ensure!(pod.status()?.state() == SandboxState::Ready, "the pod ended with its container");
    pod.cri.stop_pod(&pod.id)?;
    ensure!(pod.status()?.state() == SandboxState::NotReady, "a stopped pod is ready");
    pod.end()?;
    bed.nothing_left()?;

    // What dies by itself is told as with a sandbox container.
    let pod = Pod::of_handler(SANDBOXER, |_| ())?;
    let container = pod.start(idle())?;
    kill(process("vial-vmm", "")?)?;
    let ended = container.reaches(ContainerState::Exited)?;
    ensure!(ended.exit_code == 137, "it is told as {ended:?}");
    eventually(|| {
        let state = pod.status()?.state();
        ensure!(state == SandboxState::NotReady, "the pod is {state:?}");
        Ok(())
    })?;
    let info = pod.cri.pod_info(&pod.id)?;
    ensure!(info["end"].as_str().is_some_and(|end| end.contains("signal")), "its end is {info}");
    pod.end()
}

/// How a container ended, in a word for each thing that is told of it.
fn end_of(finished: &Finished) -> String {
    let Finished { exit_code, reason, stdout, stderr } = finished;
    format!("{exit_code} {reason} {stdout:?} {stderr:?}\n")
}

pub(crate) fn ends_of_containers_are_told_as_with_runc(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let mut told = String::new();
        for line in ["echo done", "echo no >&2; exit 7", "kill -9 $$", "exit 300", "kill -TERM $$"]
        {
            told += &end_of(&pod.run(sh(line))?);
        }

        // What cannot be started says so, and is there as a container that ended.
        let absent = pod.create(words(&["/no/such/program"]))?;
        let error = refused(pod.cri.start(&absent.id))?;
        ensure!(error.message.contains("/no/such/program"), "of an absent program: {error}");
        let status = absent.status()?;
        told += &format!("{:?} {} {}\n", status.state(), status.exit_code, status.reason);
        absent.remove()?;

        // Asked to end, it has time to. What does not listen is killed when that is over.
        let polite = pod.start(sh("trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"))?;
        polite.logs("up")?;
        polite.stop(60)?;
        told += &end_of(&polite.finish()?);
        let deaf = pod.start(sh("trap '' TERM; echo up; while :; do sleep 0.1; done"))?;
        deaf.logs("up")?;
        let asked = Instant::now();
        deaf.stop(2)?;
        ensure!(asked.elapsed() >= Duration::from_secs(2), "killed after {:?}", asked.elapsed());
        told += &end_of(&deaf.finish()?);
        let now = pod.start(idle())?;
        now.logs("up")?;
        now.stop(0)?;
        told += &end_of(&now.finish()?);
        Ok(told)
    })
}

pub(crate) fn containers_of_a_pod_run_after_and_beside_each_other(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let work = pod.make_directory("work")?;
        // Two that prepare something, one after the other.
        for line in ["echo first >/work/list", "echo second >>/work/list"] {
            pod.prints(sh(line).volume(&work, "/work", false))?;
        }
        let server = pod.start(idle().named("server", 0).volume(&work, "/work", false))?;
        let helper = pod.start(idle().named("helper", 0).volume(&work, "/work", false))?;
        let mut told = server.exec("cat /work/list; echo third >>/work/list; hostname")?;
        told += &helper.exec("tail -n 1 /work/list; hostname")?;
        let names: Vec<String> = [&server, &helper]
            .iter()
            .map(|container| Ok(container.status()?.metadata.context("no metadata")?.name))
            .collect::<Result<_>>()?;
        ensure!(names == ["server", "helper"], "they are called {names:?}");

        // One ends and is started anew, as a kubelet does it, while the other runs on.
        server.exec("echo 'of the first' >/work/note")?;
        server.logs("up")?;
        server.stop(60)?;
        let again = pod.start(idle().named("server", 1).volume(&work, "/work", false))?;
        told += &again.exec("cat /work/note")?;
        ensure!(again.status()?.metadata.context("no metadata")?.attempt == 1, "not the second");
        ensure!(server.status()?.state() == ContainerState::Exited, "the first one runs again");
        server.remove()?;
        told += &again.exec("wc -l </work/list")?;
        Ok(told.replace(&pod.config.hostname, "HOSTNAME"))
    })
}
