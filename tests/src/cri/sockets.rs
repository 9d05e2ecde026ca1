//! Unix sockets of the host in volumes, and those that containers of a pod have between them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::pod::{Container, Pod, eventually, idle, same_in_a_pod};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime};
use crate::suite::calls::Server;
use crate::suite::faults::{kill, process};

/// Where the caller is inside.
const SUITE: &str = "/vial-suite";

pub(crate) fn sockets_are_the_same_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[
        ("reached", reached),
        ("made anew", made_anew),
        ("a socket as a volume", file_mounted),
        ("between containers", between_containers),
    ])
}

/// A container of some user that has this program.
fn caller() -> Result<ContainerConfig> {
    let suite = std::env::current_exe()?;
    Ok(idle().volume(&suite, SUITE, true).security(|security| {
        security.run_as_user = Some(Int64Value { value: 1234 });
        security.run_as_group = Some(Int64Value { value: 2345 });
        security.supplemental_groups = vec![3456];
    }))
}

/// What comes back of `word` from the socket at `path` inside, as soon as there is a server.
fn called(container: &Container, path: &str, word: &str) -> Result<String> {
    eventually(|| container.exec(&format!("echo {word} | {SUITE} --call {path} 2>&1")))
}

/// What a call says that is refused, as soon as it is.
fn refused(container: &Container, path: &str, why: &str) -> Result<String> {
    eventually(|| {
        let told = container.exec(&format!("{SUITE} --call {path} 2>&1 </dev/null; true"))?;
        ensure!(told.contains(why), "no {why:?} in {told:?}");
        Ok(why.to_owned() + "\n")
    })
}

/// Both ways, halves of connections, many bytes, many at once; and who the server sees.
fn reached(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("served")?;
    fs::create_dir(volume.join("deep"))?;
    let server = Server::start(&volume.join("deep/s"), 0o777)?;
    let _of_root = Server::start(&volume.join("root"), 0o700)?;
    let container =
        pod.start(caller()?.volume(&volume, "/rw", false).volume(&volume, "/ro", true))?;
    let mut told = container.exec("stat -c '%F %a %u:%g' /rw/deep/s /ro/root")?;
    told += &called(&container, "/rw/deep/s", "first")?;
    told += &called(&container, "/ro/deep/s", "read-only")?;
    let peers = server.peers();
    ensure!(peers.len() == 2, "{} have called", peers.len());
    for peer in peers {
        ensure!((peer.uid, peer.gid) == (1234, 2345), "the server sees {peer:?}");
        ensure!(peer.cgroup.contains(&container.id), "it is in {:?}", peer.cgroup);
    }
    told += &refused(&container, "/rw/root", "Permission denied")?;
    told += &container.exec(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=10 2>/dev/null; \
         {SUITE} --call /rw/deep/s </tmp/data >/tmp/back; \
         head -c 10485760 /tmp/back | cmp - /tmp/data && tail -c 15 /tmp/back; \
         for n in $(seq 40); do echo $n | {SUITE} --call /rw/deep/s & done >/tmp/all; wait; \
         grep -c bytes /tmp/all"
    ))?;
    eventually(|| {
        let open = server.peers().iter().filter(|peer| !peer.has_ended).count();
        ensure!(open == 0, "{open} connections stay open");
        Ok(())
    })?;
    Ok(told)
}

/// A server that goes, comes again, and comes elsewhere.
fn made_anew(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("renewed")?;
    let socket = volume.join("s");
    let container = pod.start(caller()?.volume(&volume, "/sockets", false))?;
    let server = Server::start(&socket, 0o777)?;
    let mut told = called(&container, "/sockets/s", "late")?;
    // Its file stays for a while.
    drop(server);
    told += &refused(&container, "/sockets/s", "Connection refused")?;
    for word in ["second", "third"] {
        fs::remove_file(&socket)?;
        let _server = Server::start(&socket, 0o777)?;
        told += &called(&container, "/sockets/s", word)?;
    }
    fs::remove_file(&socket)?;
    told += &refused(&container, "/sockets/s", "No such file")?;
    fs::create_dir_all(volume.join("new/deeper"))?;
    let _server = Server::start(&volume.join("new/deeper/s"), 0o777)?;
    told += &called(&container, "/sockets/new/deeper/s", "elsewhere")?;
    Ok(told)
}

fn file_mounted(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("single")?;
    let socket = volume.join("s");
    let _server = Server::start(&socket, 0o777)?;
    let container = pod.start(caller()?.volume(&socket, "/run/one.sock", false))?;
    let told = container.exec("stat -c '%F %a %u:%g' /run/one.sock")?;
    Ok(told + &called(&container, "/run/one.sock", "single")?)
}

/// A container that serves itself and another one, by a volume that the host has on disk.
fn between_containers(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("own")?;
    let mut server = caller()?.volume(&volume, "/serving", false);
    server.command = [SUITE, "--answer", "/serving/s"].map(String::from).into();
    let server = pod.start(server)?;
    server.logs("listening")?;
    let mut told = called(&server, "/serving/s", "own")?;
    // A socket of the host beside it changes nothing.
    let _host = Server::start(&volume.join("host"), 0o777)?;
    told += &called(&server, "/serving/host", "host")?;
    let other = pod.start(caller()?.volume(&volume, "/served", true))?;
    told += &called(&other, "/served/s", "sidecar")?;
    told += &called(&other, "/served/host", "host")?;
    // Another server that comes when both are there.
    told += &server.exec(
        "cd /serving; (/vial-suite --answer /serving/late >/dev/null 2>&1 </dev/null &); echo late",
    )?;
    told += &called(&other, "/served/late", "late")?;
    told += &server.exec(&format!("echo again | {SUITE} --call /serving/s"))?;
    Ok(told)
}

/// The connections end, and what was there for them goes.
pub(crate) fn sockets_of_a_pod_whose_shim_is_killed_are_let_go(bed: &Bed) -> Result<()> {
    let pod = Pod::new(Runtime::Vial)?;
    let volume = pod.make_directory("held")?;
    let server = Server::start(&volume.join("s"), 0o777)?;
    let mut holder = caller()?.volume(&volume, "/sockets", false);
    holder.command =
        ["sh", "-c", &format!("sleep 3600 | {SUITE} --call /sockets/s")].map(String::from).into();
    let holder = pod.start(holder)?;
    let connected = |ended: bool| {
        eventually(|| {
            let peers = server.peers();
            ensure!(peers.len() == 1 && peers[0].has_ended == ended, "the server has {peers:?}");
            Ok(())
        })
    };
    connected(false)?;
    process("vial-connector", "")?;
    kill(process("containerd-shim", "vial")?)?;
    connected(true).context("the connection goes on without its shim")?;
    holder.reaches(ContainerState::Exited)?;
    ensure!(process("vial-connector", "").is_err(), "the connector outlives its shim");
    pod.end()?;
    bed.nothing_left()?;
    ensure!(!Path::new("/run/vial/k8s.io").exists(), "the pod's directory is there");
    Ok(())
}
