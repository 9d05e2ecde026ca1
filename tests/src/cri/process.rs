//! What a process of a pod is and may do, beside what it is with runc.

use std::fs;

use anyhow::{Result, ensure};

use super::pod::{Pod, idle, same, same_in_a_pod, sh, share_processes};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime};

/// A line of `/proc/self/status` for each of these.
fn status_lines(names: &str) -> String {
    format!("grep -E '^({names}):' /proc/self/status")
}

fn profile(kind: Profile, path: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile { profile_type: kind.into(), localhost_ref: path.into() })
}

pub(crate) fn what_processes_are_and_may_do_is_the_same_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[
        ("identity", identity_and_environment),
        ("rights", rights),
        ("file systems", file_systems),
    ])
}

fn identity_and_environment(pod: &Pod) -> Result<String> {
    let mut plain = sh("id; pwd; env | sort; cat /proc/self/oom_score_adj; stat -c '%u %g %a' .");
    plain.envs = vec![
        KeyValue { key: "GREETING".into(), value: "two words = $HOME".into() },
        KeyValue { key: "EMPTY".into(), value: String::new() },
    ];
    plain.working_dir = "/made/for/it".into();
    plain.linux.get_or_insert_default().resources =
        Some(LinuxContainerResources { oom_score_adj: 900, ..Default::default() });
    let mut told = pod.prints(plain)?;

    let mut args = sh("");
    args.command = vec!["printf".into()];
    args.args = vec!["%s|".into(), "a".into(), String::new(), "b c".into()];
    told += &pod.prints(args)?;

    let volume = pod.make_directory("volume")?;
    let user = sh("id; touch /volume/mine; stat -c '%u %g %a' /volume/mine; touch /root/x")
        .volume(&volume, "/volume", false)
        .security(|security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.run_as_group = Some(Int64Value { value: 3000 });
            // As fsGroup arrives here.
            security.supplemental_groups = vec![2000, 4000];
        });
    let finished = pod.run(user)?;
    told += &format!("{} {}", finished.exit_code, finished.stdout);
    ensure!(finished.exit_code != 0, "a user wrote to root's directory");
    told += &pod.prints(sh("id").security(|security| {
        security.run_as_username = "nobody".into();
    }))?;
    Ok(told.replace(&pod.config.hostname, "HOSTNAME"))
}

fn rights(pod: &Pod) -> Result<String> {
    let rights = status_lines("Cap...|NoNewPrivs|Seccomp|Seccomp_filters");
    let mut told = pod.prints(sh(&rights))?;
    told += &pod.prints(sh(&rights).security(|security| {
        security.no_new_privs = true;
        security.seccomp = profile(Profile::RuntimeDefault, "");
        security.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into(), "SYS_TIME".into()],
            drop_capabilities: vec!["CHOWN".into(), "MKNOD".into()],
        });
    }))?;
    told += &pod.prints(sh(&rights).security(|security| {
        security.run_as_user = Some(Int64Value { value: 1000 });
        security.capabilities = Some(Capability {
            add_capabilities: Vec::new(),
            drop_capabilities: vec!["ALL".into()],
        });
        security.seccomp = profile(Profile::Unconfined, "");
    }))?;

    let path = pod.path("no-directories.json");
    fs::write(
        &path,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#,
    )?;
    let local = sh("mkdir /tmp/a; touch /tmp/b && ls /tmp").security(|security| {
        security.seccomp = profile(Profile::Localhost, &path.display().to_string());
    });
    let finished = pod.run(local)?;
    told += &format!("{} {:?} {:?}\n", finished.exit_code, finished.stdout, finished.stderr);
    // unshare is what the default profile refuses to those without the capability.
    let default = sh("unshare -U true; echo $?").security(|security| {
        security.seccomp = profile(Profile::RuntimeDefault, "");
    });
    let finished = pod.run(default)?;
    told += &format!("{} {:?} {:?}\n", finished.exit_code, finished.stdout, finished.stderr);
    Ok(told)
}

fn file_systems(pod: &Pod) -> Result<String> {
    let line = "touch /file /tmp/file /dev/shm/file; echo $?; \
                cat /proc/interrupts /proc/version | wc -c; ls -A /sys/firmware | wc -l; \
                echo 1 >/proc/sys/vm/overcommit_memory; echo $?";
    let restricted = sh(line).security(|security| {
        security.readonly_rootfs = true;
        security.masked_paths =
            ["/proc/interrupts", "/proc/version", "/sys/firmware"].map(String::from).to_vec();
        security.readonly_paths = vec!["/proc/sys".into()];
    });
    let finished = pod.run(restricted)?;
    let mut told = format!("{}\n{}", finished.stdout, finished.stderr);
    told += &pod.prints(sh(
        "awk '$2 != \"/\" && $2 !~ \"^/(etc|dev/shm)\" {print $2, $3, substr($4, 1, 2)}' /proc/mounts | sort",
    ))?;
    Ok(told)
}

pub(crate) fn what_a_pod_shares_is_the_same_as_with_runc(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::with(runtime, |config| {
            config.hostname = "shared-name".into();
            config.dns_config = Some(DnsConfig {
                servers: vec!["10.88.0.1".into()],
                searches: vec!["suite.svc.cluster.local".into(), "svc.cluster.local".into()],
                options: vec!["ndots:5".into()],
            });
            let linux = config.linux.get_or_insert_default();
            linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "81".into());
            linux.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
            linux.sysctls.insert("net.core.somaxconn".into(), "77".into());
        })?;
        let first = pod.start(idle())?;
        let second = pod.start(idle())?;
        let mut told = first.exec(
            "hostname; cat /etc/hostname /etc/resolv.conf; echo of the first >/dev/shm/file; \
             cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced \
             /proc/sys/net/core/somaxconn; df -k /dev/shm | tail -n 1 | awk '{print $2, $6}'",
        )?;
        told += &second
            .exec("hostname; cat /dev/shm/file; df -k /dev/shm | tail -n 1 | awk '{print $2}'")?;
        let namespaces = "for kind in ipc net uts pid mnt; do readlink /proc/self/ns/$kind; done";
        let (of_first, of_second) = (first.exec(namespaces)?, second.exec(namespaces)?);
        for (first, second) in of_first.lines().zip(of_second.lines()) {
            let kind = first.split(':').next().unwrap_or_default();
            told += &format!("{kind} {}\n", if first == second { "shared" } else { "its own" });
        }
        Ok(told)
    })
}

pub(crate) fn processes_of_a_pod_can_be_shared(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::with(runtime, |config| {
            let security =
                config.linux.get_or_insert_default().security_context.get_or_insert_default();
            share_processes(&mut security.namespace_options);
        })?;
        let shared = |line: &str| {
            sh(line).security(|security| share_processes(&mut security.namespace_options))
        };
        let first = pod
            .start(shared("trap 'echo told; exit 5' USR1; echo up; while :; do sleep 0.1; done"))?;
        first.logs("up")?;
        let second =
            pod.start(shared("trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"))?;
        // Neither is the first of the namespace, and one can signal the other.
        let mut told = second.exec("test $$ != 1 && echo not the first")?;
        second.exec("kill -USR1 $(ps -o pid,args | awk '/USR1/ && !/awk/ {print $1; exit}')")?;
        let finished = first.finish()?;
        told += &format!("{finished:?}");
        // What loses its parent ends, and nobody has to have waited for it.
        told +=
            &second.exec("sh -c 'sleep 0.2 & exit 0'; sleep 1; ps -o stat | grep -c Z || true")?;
        Ok(told)
    })
}

pub(crate) fn privileged_containers_have_all_of_the_guest_and_nothing_of_the_host(
    _: &Bed,
) -> Result<()> {
    let line = status_lines("CapEff|CapBnd|Seccomp")
        + "; mkdir /tmp/m && mount -t tmpfs m /tmp/m && echo mounted; \
           echo 1 >/proc/sys/net/ipv4/ip_forward && echo written";
    same(|runtime| {
        let privileged = |config: &mut PodSandboxConfig| {
            let linux = config.linux.get_or_insert_default();
            linux.security_context.get_or_insert_default().privileged = true;
        };
        let pod = Pod::with(runtime, privileged)?;
        let container = |line: &str| sh(line).security(|security| security.privileged = true);
        let told = pod.prints(container(&line))?;
        if runtime == Runtime::Vial {
            // The host's disk and its KVM; the guest has neither.
            let devices = pod.prints(container("ls /dev; ls /sys/block"))?;
            ensure!(
                !devices.lines().any(|name| name.starts_with("vda") || name == "kvm"),
                "the host's devices are inside: {devices:?}"
            );
        }
        Ok(told)
    })
}
