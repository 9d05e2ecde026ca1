//! Pods whose users are not those of the host (`hostUsers: false`), beside runc.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::client::{Cri, refused};
use super::lifecycle::SANDBOXER;
use super::pod::{Container, HOST_USERS as HOST, Pod, handler, idle, mapping, sh, users};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime};
use crate::suite::faults::{kill, process};

/// How many users a pod has.
const COUNT: u32 = 65536;
/// The handler that offers the kubelet pods with users of their own.
const OFFERING: &str = "vial-features";

/// A pod with such users and groups.
fn with_ranges(handler: &str, ranges: &[IdMapping]) -> Result<Pod> {
    Pod::of_handler(handler, |config| {
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        let mode = NamespaceMode::Pod.into();
        let (uids, gids) = (ranges.to_vec(), ranges.to_vec());
        let users = UserNamespace { mode, uids, gids };
        security.namespace_options.get_or_insert_default().userns_options = Some(users);
    })
}

fn pod(handler: &str, host: u32) -> Result<Pod> {
    Pod::of_handler(handler, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "81".into());
        linux.sysctls.insert("kernel.shmmni".into(), "77".into());
        let security = linux.security_context.get_or_insert_default();
        security.namespace_options.get_or_insert_default().userns_options = users(host);
    })
}

fn mine(config: ContainerConfig) -> ContainerConfig {
    config.of_users(HOST)
}

/// Runs the looks with runc and by each of Vial's ways in, and compares.
fn same_by_all(look: impl Fn(&str) -> Result<String>) -> Result<()> {
    let expected = look("runc").context("with runc")?;
    for handler in [handler(Runtime::Vial), OFFERING, SANDBOXER] {
        let found = look(handler).with_context(|| format!("with {handler}"))?;
        let both = expected.lines().zip(found.lines());
        let wrong: Vec<String> = both
            .filter(|(runc, vial)| runc != vial)
            .map(|(runc, vial)| format!("runc shows {runc:?}, {handler} {vial:?}"))
            .collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        ensure!(expected == found, "runc shows {expected:?}, {handler} {found:?}");
    }
    Ok(())
}

pub(crate) fn users_of_a_pod_are_mapped_as_with_runc(_: &Bed) -> Result<()> {
    same_by_all(|handler| {
        let pod = pod(handler, HOST)?;
        let volume = pod.make_directory("volume")?;
        fs::write(volume.join("roots"), "from the host\n")?;
        fs::write(volume.join("theirs"), "")?;
        chown(volume.join("theirs"), Some(1000), Some(2000))?;
        let container = pod.start(mine(idle().volume(&volume, "/data", false)))?;
        let mut told = who(&container)?;
        told += &in_its_network(&container)?;
        told += &in_a_volume(&pod, &container, &volume)?;
        told += &other_users(&pod, &volume)?;
        pod.end()?;
        Ok(told)
    })
}

/// Who root is, and what belongs to it.
fn who(container: &Container<'_>) -> Result<String> {
    container.exec(
        "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id; hostname | sed 's/[0-9]*$//'; \
         stat -c '%u:%g %a %n' / /bin /etc/hosts /etc/resolv.conf /proc/1/ /dev/null /dev/pts; stat -c '%u %a %n' /dev/mqueue; \
         touch /made; mkdir -p /a/b; stat -c '%u:%g %n' /made /a/b; \
         chown 1000:1000 /a; chmod 755 /a; touch /a/file; stat -c '%u:%g %n' /a /a/file; \
         mkdir -m 555 /shut; touch /shut/file; stat -c '%u:%g %n' /shut/file; \
         chown 70000 /made 2>/dev/null; echo $?; mknod /n c 1 3 2>/dev/null; echo $?; \
         mkfifo /pipe; ln -s made /link; echo again >/dev/stdout; echo x >/dev/shm/x; \
         stat -c '%u:%g' /dev/shm/x; grep Cap /proc/self/status",
    )
}

/// What its capabilities mean in the namespaces of its pod, and the pod's kernel parameters.
fn in_its_network(container: &Container<'_>) -> Result<String> {
    container.exec(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni; \
         ls /sys/class/net | sort; ping -c 1 -W 5 127.0.0.1 >/dev/null; echo ping $?; \
         mkdir -p /www; echo served >/www/index.html; httpd -p 80 -h /www; \
         wget -q -O - http://127.0.0.1/; ip addr add 192.0.2.1/24 dev lo 2>/dev/null; echo $?; \
         echo 1 2>/dev/null >/proc/sys/net/ipv4/ip_forward; echo $?",
    )
}

/// Files keep the owners on the disk that they have inside.
fn in_a_volume(pod: &Pod, container: &Container<'_>, volume: &Path) -> Result<String> {
    let mut told = container.exec(
        "exec 2>&1; cd /data; stat -c '%u:%g %n' roots theirs; touch new; mkdir dir; chown 7:8 dir; \
         echo more >>theirs; chown 9 roots; stat -c '%u:%g %n' new dir roots; \
         chown 70000 new 2>/dev/null; echo $?; \
         touch once; mv once dir/twice; ln dir/twice thrice; ln -s thrice soft; mkfifo pipe; \
         stat -c '%u:%g %h %n' dir/twice thrice soft pipe; rm thrice; mv dir/twice new; ls",
    )?;
    for name in ["new", "dir", "roots", "theirs"] {
        let about = fs::metadata(volume.join(name)).with_context(|| format!("{name}: {told}"))?;
        told += &format!("{name} {}:{}\n", about.uid(), about.gid());
    }
    chown(volume.join("new"), Some(70_000), Some(70_000))?;
    let other = sh("stat -c '%u:%g %n' /ro/dir /ro/roots /ro/new; touch /ro/x; echo $?");
    told += &pod.prints(mine(other.volume(volume, "/ro", true)))?;
    Ok(told)
}

/// A user without rights, and its groups.
fn other_users(pod: &Pod, volume: &Path) -> Result<String> {
    let group = volume.join("group");
    fs::create_dir(&group)?;
    chown(&group, Some(0), Some(4000))?;
    fs::set_permissions(&group, std::os::unix::fs::PermissionsExt::from_mode(0o2775))?;
    let config = sh("id; echo to >/dev/stdout; touch /data/group/file 2>&1; echo $?; \
         stat -c '%u:%g %a' /data/group/file /data/group; touch /etc/x 2>/dev/null; echo $?; \
         cat /data/theirs; pwd");
    let mut config = config.volume(volume, "/data", false).security(|security| {
        security.run_as_user = Some(Int64Value { value: 1000 });
        security.run_as_group = Some(Int64Value { value: 3000 });
        security.supplemental_groups = vec![4000];
    });
    config.working_dir = "/made/here".into();
    let told = pod.prints(mine(config))?;
    let file = fs::metadata(group.join("file")).with_context(|| format!("it told {told:?}"))?;
    Ok(format!("{told}{}:{}\n", file.uid(), file.gid()))
}

/// Handlers of runc's type offer it; whoever asks the others all the same gets it.
pub(crate) fn users_of_pods_are_offered_and_checked(_: &Bed) -> Result<()> {
    let offered = Cri::new().handlers()?;
    for (handler, users) in [("runc", true), (OFFERING, true), ("vial", false)] {
        let features = offered.get(handler).with_context(|| format!("no handler {handler}"))?;
        ensure!(features.user_namespaces == users, "{handler}: {features:?}");
    }
    let wrong = [
        ("not mapped", vec![IdMapping { host_id: HOST, container_id: 1, length: COUNT }]),
        ("none", Vec::new()),
        ("two", [mapping(HOST), mapping(HOST + COUNT)].concat()),
        ("empty", vec![IdMapping { host_id: HOST, container_id: 0, length: 0 }]),
        ("beyond", vec![IdMapping { host_id: u32::MAX - 5, container_id: 0, length: 50 }]),
    ];
    for handler in [handler(Runtime::Vial), OFFERING, SANDBOXER] {
        with_ranges(handler, &mapping(HOST))?.end()?;
        for (name, ranges) in &wrong {
            let refused = refused(with_ranges(handler, ranges).map(|pod| pod.id.clone()));
            refused.with_context(|| format!("{handler}, {name}"))?;
        }
    }
    Ok(())
}

/// Two pods that call themselves the same are strangers to each other, and to the host's users.
pub(crate) fn users_of_two_pods_are_others(bed: &Bed) -> Result<()> {
    let handler = handler(Runtime::Vial);
    let first = pod(handler, HOST)?;
    let second = pod(handler, HOST + COUNT)?;
    let shared = first.make_directory("shared")?;
    // Not mapped: what the files' owners are on the host, shows.
    let plain = |host: u32, line: &str| {
        let mut config = sh(line).of_users(host);
        config.mounts = idle().volume(&shared, "/data", false).mounts;
        config
    };
    first.prints(plain(HOST, "umask 077; echo secret >/data/file"))?;
    let owner = fs::metadata(shared.join("file"))?.uid();
    ensure!(owner == HOST, "the file's owner is {owner} on the host");
    let told =
        second.prints(plain(HOST + COUNT, "stat -c %u /data/file; cat /data/file 2>&1 || :"))?;
    ensure!(told.starts_with("65534\n") && told.contains("denied"), "{told}");
    let told = first.prints(plain(HOST, "stat -c %u /data/file; cat /data/file"))?;
    ensure!(told == "0\nsecret\n", "{told}");
    first.end()?;
    second.end()?;
    bed.nothing_left()
}

pub(crate) fn pod_with_users_that_is_killed_leaves_nothing(bed: &Bed) -> Result<()> {
    for (program, of) in [("vial-vmm", ""), ("containerd-shim", "vial")] {
        let pod = pod(handler(Runtime::Vial), HOST)?;
        let volume = pod.make_directory("volume")?;
        let container = pod.start(mine(idle().volume(&volume, "/data", false)))?;
        kill(process(program, of)?)?;
        container.reaches(ContainerState::Exited)?;
        pod.end()?;
        bed.nothing_left().with_context(|| format!("{program} killed"))?;
    }
    Ok(())
}
