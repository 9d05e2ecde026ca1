//! Commands in running containers, and what containers log.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::client::refused;
use super::grpc::Refused;
use super::log;
use super::pod::{Container, Pod, eventually, idle, same_in_a_pod, sh};
use crate::suite::bed::{Bed, Runtime};

/// What an exec answered, in words.
fn answer(container: &Container<'_>, words: &[&str]) -> Result<String> {
    let answer = container.pod.cri.exec_sync(&container.id, words, 60)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(format!("{} {:?} {:?}\n", answer.exit_code, text(&answer.stdout), text(&answer.stderr)))
}

pub(crate) fn execs_and_logs_are_those_of_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[("exec", exec_sync), ("logs", log_files)])
}

fn exec_sync(pod: &Pod) -> Result<String> {
    let mut config = idle();
    config.working_dir = "/tmp".into();
    let container = pod.start(config)?;
    let mut told = String::new();
    for words in [
        &["echo", "a", "b c"][..],
        &["sh", "-c", "echo out; echo err >&2; exit 9"],
        &["sh", "-c", "kill -9 $$"],
        &["pwd"],
        &["sh", "-c", "cat; echo end of input"],
        &["sh", "-c", "yes 0123456789 | head -c 1000000 | sha256sum"],
    ] {
        told += &answer(&container, words)?;
    }
    let large = pod.cri.exec_sync(
        &container.id,
        &["sh", "-c", "yes 0123456789abcde | head -c 2000000"],
        60,
    )?;
    told += &format!("{} bytes\n", large.stdout.len());
    ensure!(
        large.stdout.chunks(16).all(|line| b"0123456789abcde\n".starts_with(line)),
        "the output is not in order"
    );
    ensure!(
        pod.cri.exec_sync(&container.id, &["/no/such/program"], 10).is_err(),
        "an absent program ran"
    );

    // What takes too long is ended, and the container lives.
    let asked = Instant::now();
    let over = refused(pod.cri.exec_sync(&container.id, &["sleep", "600"], 1))?;
    ensure!(over.code == Refused::DEADLINE_EXCEEDED, "after its time: {over}");
    ensure!(asked.elapsed() < Duration::from_secs(60), "it took {:?}", asked.elapsed());
    eventually(|| {
        let left = container.exec("ps -o args | grep -c '^sleep 600' || true")?;
        ensure!(left == "0\n", "the command still runs");
        Ok(())
    })?;
    Ok(told)
}

pub(crate) fn execs_in_a_row_and_at_once_all_work(_: &Bed) -> Result<()> {
    // Twenty of runc's would show nothing that is not known.
    let pod = Pod::new(Runtime::Vial)?;
    let container = pod.start(idle())?;
    for number in 0..25 {
        let text = container.exec(&format!("echo {number}"))?;
        ensure!(text == format!("{number}\n"), "exec {number} in a row printed {text:?}");
    }
    std::thread::scope(|scope| {
        let execs: Vec<_> = (0..10)
            .map(|number| {
                let container = &container;
                scope.spawn(move || container.exec(&format!("sleep 0.3; echo {number}")))
            })
            .collect();
        for (number, exec) in execs.into_iter().enumerate() {
            let text = exec.join().ok().context("a thread panicked")??;
            ensure!(text == format!("{number}\n"), "exec {number} at once printed {text:?}");
        }
        Ok(())
    })
}

fn log_files(pod: &Pod) -> Result<String> {
    let mut told = String::new();
    // A line without an end, an empty one, and one that no buffer holds.
    let line = "printf 'no end'; echo ' yet'; echo; echo error >&2; \
                head -c 1000000 /dev/zero | tr '\\0' x; echo; printf last";
    let container = pod.start(sh(line))?;
    container.finish()?;
    let entries = container.log()?;
    let stdout = log::stream(&entries, "stdout");
    ensure!(entries.iter().any(|entry| entry.partial), "nothing was in parts");
    ensure!(entries.is_sorted_by_key(|entry| &entry.time), "the times run back");
    let lines: Vec<&str> = stdout.lines().collect();
    let xs = lines.iter().find(|line| line.len() == 1_000_000).context("no long line")?;
    ensure!(xs.bytes().all(|byte| byte == b'x'), "the long line is not what was printed");
    told += &lines
        .iter()
        .filter(|line| line.len() < 100)
        .map(|line| format!("{line}|"))
        .collect::<String>();
    told += &log::stream(&entries, "stderr");

    // A log that was moved away is opened anew on request.
    let talker = pod.start(sh("trap 'exit 0' TERM; while :; do echo tick; sleep 0.1; done"))?;
    talker.logs("tick")?;
    let moved = talker.log_path().with_extension("old");
    fs::rename(talker.log_path(), &moved)?;
    pod.cri.reopen_log(&talker.id)?;
    talker.logs("tick")?;
    ensure!(fs::read_to_string(&moved)?.contains("tick"), "the old log is empty");
    Ok(told)
}
