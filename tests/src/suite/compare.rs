//! What a process finds inside, beside what it finds with runc.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Runtime, run};

pub(crate) fn kernel_inside_is_not_the_hosts(bed: &Bed) -> Result<()> {
    let host = run(Command::new("uname").arg("-r"))?.expect(0)?.stdout;
    let runc = bed.run(Runtime::Runc, &[], &["uname", "-r"])?.expect(0)?.stdout;
    let vial = bed.run(Runtime::Vial, &[], &["uname", "-r"])?.expect(0)?.stdout;
    ensure!(runc == host, "runc shows another kernel: {runc:?}");
    ensure!(vial != host && !vial.trim().is_empty(), "the kernel inside is {vial:?}");
    Ok(())
}

/// Runs a line with both, and compares what it prints line by line.
fn same(bed: &Bed, options: &[&str], line: &str) -> Result<()> {
    let [runc, vial] = Runtime::BOTH.map(|runtime| {
        bed.run(runtime, options, &["sh", "-c", line])
            .and_then(|outcome| outcome.expect(0))
            .with_context(|| format!("{runtime:?}"))
    });
    let (runc, vial) = (runc?.stdout, vial?.stdout);
    for (runc, vial) in runc.lines().zip(vial.lines()) {
        ensure!(runc == vial, "runc shows {runc:?}, Vial {vial:?}");
    }
    ensure!(runc == vial, "runc shows {runc:?}, Vial {vial:?}");
    Ok(())
}

pub(crate) fn what_a_process_may_do_is_the_same_as_with_runc(bed: &Bed) -> Result<()> {
    same(
        bed,
        &[],
        "grep -E '^(Cap|NoNewPrivs|Uid|Gid|Groups)' /proc/self/status; \
         ulimit -n; id; \
         cat /proc/keys 2>&1 | head -c 100; \
         echo x > /proc/sysrq-trigger; echo $?; \
         mount -t tmpfs t /tmp; echo $?; \
         cat /sys/firmware/* 2>/dev/null | wc -c",
    )?;
    // The one thing that is not: a device node on the shared file system would be one of the host's. On a tmpfs, which is
    // the guest's own, it can be made.
    let line =
        "mknod /null c 1 3; echo $?; mknod /dev/made c 1 3; echo $?; echo x >/dev/made; echo $?";
    let made = bed.sh(Runtime::Vial, line)?.stdout;
    ensure!(made == "1\n0\n0\n", "device nodes: {made:?}");
    // With containerd's own profile.
    same(bed, &["--seccomp"], "grep -E '^Seccomp:' /proc/self/status; unshare -U true; echo $?")
}

pub(crate) fn what_a_process_sees_is_the_same_as_with_runc(bed: &Bed) -> Result<()> {
    // The guest's kernel is built without /proc/kcore, and so there is no /dev/core either.
    same(
        bed,
        &["--env", "COLOUR=blue", "--cwd", "/tmp"],
        "env | grep -v HOSTNAME | sort; pwd; \
         ls -l /dev | grep -v kcore | awk '{print $1, $NF}' | sort; \
         for f in /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run; do \
           grep \" $f \" /proc/mounts | awk '{print $2, $3}'; done; \
         cat /proc/1/comm; ls /; cat /etc/passwd; \
         ip -o link | wc -l; set -- /proc/[0-9]*; echo $#",
    )
}

pub(crate) fn limits_and_read_only_root_are_the_same_as_with_runc(bed: &Bed) -> Result<()> {
    same(
        bed,
        &["--read-only", "--memory-limit", "67108864", "--user", "1000:1000"],
        "touch /x; echo $?; id -u; id -g; grep ' / ' /proc/mounts | tail -n 1 | grep -o '\\bro\\b'",
    )?;
    let limit = bed
        .run(
            Runtime::Vial,
            &["--memory-limit", "67108864", "--privileged"],
            &["sh", "-c", "mount -t cgroup2 c /tmp && find /tmp -name memory.max | xargs cat"],
        )?
        .expect(0)?;
    ensure!(limit.stdout.lines().any(|line| line == "67108864"), "{limit:?}");
    Ok(())
}

pub(crate) fn bind_mounts_show_the_hosts_files(bed: &Bed) -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("note"), "from the host\n")?;
    let path = directory.path().display();
    for runtime in Runtime::BOTH {
        let mount = format!("type=bind,src={path},dst=/data,options=rbind:rw");
        let line = "cat /data/note && echo from inside > /data/answer";
        let outcome = bed.run(runtime, &["--mount", &mount], &["sh", "-c", line])?.expect(0)?;
        ensure!(outcome.stdout == "from the host\n", "{runtime:?}: {outcome:?}");
        let answer = std::fs::read_to_string(directory.path().join("answer"))?;
        ensure!(answer == "from inside\n", "{runtime:?}: {answer:?}");
        std::fs::remove_file(directory.path().join("answer"))?;

        let mount = format!("type=bind,src={path},dst=/data,options=rbind:ro");
        let line = "touch /data/no; test ! -e /data/no";
        bed.run(runtime, &["--mount", &mount], &["sh", "-c", line])?.expect(0)?;

        let mount = format!("type=bind,src={path}/note,dst=/note,options=bind:ro");
        let outcome = bed.run(runtime, &["--mount", &mount], &["cat", "/note"])?.expect(0)?;
        ensure!(outcome.stdout == "from the host\n", "{runtime:?}: {outcome:?}");

        let mount = "type=bind,src=/no/such/source,dst=/data,options=rbind:rw";
        let outcome = bed.run(runtime, &["--mount", mount], &["true"])?;
        ensure!(
            outcome.status != 0 && outcome.stderr.contains("/no/such/source"),
            "{runtime:?}: {outcome:?}"
        );
        bed.clear();
    }
    Ok(())
}
