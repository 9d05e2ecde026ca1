//! Create, start, wait, kill, exec, delete.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use super::bed::{Bed, Runtime, run, wait};

pub(crate) fn echo_prints_and_ends_with_0(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let outcome = bed.run(runtime, &[], &["echo", "hello", "from inside"])?.expect(0)?;
        ensure!(outcome.stdout == "hello from inside\n", "{runtime:?}: {outcome:?}");
        ensure!(outcome.stderr.is_empty(), "{runtime:?} complains: {:?}", outcome.stderr);
    }
    Ok(())
}

pub(crate) fn exit_statuses_are_exact(bed: &Bed) -> Result<()> {
    for status in [1, 42, 127, 255] {
        bed.sh(Runtime::Vial, &format!("exit {status}"))?.expect(status)?;
    }
    bed.sh(Runtime::Runc, "exit 42")?.expect(42)?;
    // A child that a signal ended, as its shell reports it.
    for runtime in Runtime::BOTH {
        bed.sh(runtime, "sh -c 'kill -TERM $$'; exit $?")?.expect(143)?;
    }
    Ok(())
}

pub(crate) fn kill_ends_with_128_and_the_signal(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        for (signal, status) in [("SIGKILL", 137), ("SIGTERM", 143)] {
            let name = bed.name();
            // As its own child, so that the shell is not the one that ignores signals.
            let line = "trap 'exit 143' TERM; echo up; while :; do sleep 0.1; done";
            let mut child = bed
                .command(runtime, &["--rm"], &name, &["sh", "-c", line])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            let mut up = [0; 3];
            if let Some(output) = &mut child.stdout {
                std::io::Read::read_exact(output, &mut up)?;
            }
            let mut kill = Command::new("ctr");
            run(kill.args(["task", "kill", "-s", signal, &name]))?.expect(0)?;
            let ended = wait(&mut child)?;
            ensure!(ended == status, "{runtime:?}: {signal} ended it with {ended}, not {status}");
        }
    }
    Ok(())
}

pub(crate) fn task_is_listed_with_its_processes(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let container = bed.detached(runtime, &["sleep", "1000"])?;
        container.reaches("RUNNING")?;
        let processes = container.task(&["ps", &container.name])?.expect(0)?.stdout;
        let numbers: Vec<u32> = processes
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .collect();
        ensure!(!numbers.is_empty() && !numbers.contains(&0), "{runtime:?}: {processes:?}");
        container.task(&["kill", "-s", "SIGKILL", &container.name])?.expect(0)?;
        container.reaches("STOPPED")?;
        let again = container.task(&["kill", "-s", "SIGKILL", &container.name])?;
        ensure!(
            again.status != 0 && again.stderr.contains("not found"),
            "{runtime:?}: a second kill of an ended task: {again:?}"
        );
    }
    Ok(())
}

pub(crate) fn exec_runs_beside_and_has_its_own_status(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let container = bed.detached(runtime, &["sleep", "1000"])?;
        let outcome = container.exec(&[], &["sh", "-c", "echo beside; exit 7"])?.expect(7)?;
        ensure!(outcome.stdout == "beside\n", "{runtime:?}: {outcome:?}");
        // It shares the container's process ids.
        let outcome = container.exec(&[], &["cat", "/proc/1/comm"])?.expect(0)?;
        ensure!(outcome.stdout == "sleep\n", "{runtime:?}: {outcome:?}");
        let outcome = container.exec(&["--cwd", "/tmp"], &["pwd"])?.expect(0)?;
        ensure!(outcome.stdout == "/tmp\n", "{runtime:?}: {outcome:?}");
    }
    Ok(())
}

pub(crate) fn exec_of_what_is_absent_fails_and_the_container_lives(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let container = bed.detached(runtime, &["sleep", "1000"])?;
        let outcome = container.exec(&[], &["/no/such/program"])?;
        ensure!(
            outcome.status != 0 && outcome.stderr.contains("/no/such/program"),
            "{runtime:?}: {outcome:?}"
        );
        container.exec(&[], &["true"])?.expect(0)?;
    }
    Ok(())
}

pub(crate) fn ten_in_a_row_all_work(bed: &Bed) -> Result<()> {
    for round in 0..10 {
        let text = format!("round {round}");
        let outcome = bed.run(Runtime::Vial, &[], &["echo", &text])?.expect(0)?;
        ensure!(outcome.stdout.trim() == text, "round {round}: {outcome:?}");
    }
    Ok(())
}

pub(crate) fn five_at_once_all_work(bed: &Bed) -> Result<()> {
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..5)
            .map(|number| {
                scope.spawn(move || {
                    let line = format!("echo number {number}; exit {}", 10 + number);
                    let outcome = bed.sh(Runtime::Vial, &line)?.expect(10 + number)?;
                    ensure!(outcome.stdout == format!("number {number}\n"), "{outcome:?}");
                    Ok(())
                })
            })
            .collect();
        started.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    ensure!(results.len() == 5, "a thread of the case panicked");
    results.into_iter().collect()
}
