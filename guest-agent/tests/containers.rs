//! The agent with real containers, over Unix sockets instead of vsock. Needs root, cgroup v2,
//! unshare(1) and a shell in /usr.

#[path = "containers/control.rs"]
mod control;
#[path = "containers/harness.rs"]
mod harness;
#[path = "containers/pod.rs"]
mod pod;
#[path = "containers/sockets.rs"]
mod sockets;
#[path = "containers/users.rs"]
mod users;

use std::time::Duration;

use harness::{Agent, context, fresh_id, process, process_request, spec};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;
use vial_agent_protocol::agent::{HelloRequest, ResizeTerminalRequest, Stdio};

/// The code and message of a refused request.
fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("no refusal: {other:?}"),
    }
}

#[tokio::test]
async fn hello_says_versions_and_the_boot() {
    let agent = Agent::start().await;
    let mut request = HelloRequest::new();
    request.version = vial_agent_protocol::PROTOCOL_VERSION;
    let answer = agent.client.hello(context(), &request).await.unwrap();
    assert_eq!(answer.version, vial_agent_protocol::PROTOCOL_VERSION);
    assert_eq!(answer.agent_version, env!("CARGO_PKG_VERSION"));
    assert!(!answer.kernel_release.is_empty());
    assert_eq!(answer.marks.last().unwrap().name, "listening");
    assert!(answer.marks.last().unwrap().at_ns <= answer.now_ns);
}

#[tokio::test]
async fn exit_codes_and_output_are_exact_and_nothing_is_left() {
    let agent = Agent::start().await;
    for code in [0, 1, 42, 255] {
        let id = fresh_id("exit");
        let script = format!("echo out; echo err >&2; exit {code}");
        let mut streams = agent.run(&id, &spec(&["sh", "-c", &script])).await;
        assert_eq!(agent.wait(&id, "").await, code);
        assert_eq!(streams.output().await, "out\n");
        let mut err = String::new();
        streams.stderr.take().unwrap().read_to_string(&mut err).await.unwrap();
        assert_eq!(err, "err\n");
        // Asked again, it answers again.
        assert_eq!(agent.wait(&id, "").await, code);
        assert_eq!(agent.delete(&id).await.unwrap(), code);
        agent.assert_no_trace(&id);
        let (code, text) = refusal(agent.delete(&id).await);
        assert_eq!((code, text), (Code::NOT_FOUND, format!("no container {id}")));
    }
}

#[tokio::test]
async fn a_signal_ends_as_128_and_its_number() {
    let agent = Agent::start().await;
    for (signal, status) in [(9, 137), (15, 143), (34, 162)] {
        let id = fresh_id("signal");
        // The shell would be PID 1, which no unhandled signal ends but SIGKILL from outside.
        let script =
            "trap 'exit 143' TERM; trap 'exit 162' 34; echo up; while :; do sleep 0.1; done";
        let mut streams = agent.run(&id, &spec(&["bash", "-c", script])).await;
        streams.read_until("up").await;
        agent.kill(&id, "", signal, false).await.unwrap();
        assert_eq!(agent.wait(&id, "").await, status);
        let (code, text) = refusal(agent.kill(&id, "", 9, false).await);
        assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "process already finished"));
        agent.delete(&id).await.unwrap();
    }
}

#[tokio::test]
async fn stdin_reaches_its_end() {
    let agent = Agent::start().await;
    let id = fresh_id("stdin");
    let mut streams = agent.run(&id, &spec(&["cat"])).await;
    let input: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    let mut stdin = streams.stdin.take().unwrap();
    let sent = input.clone();
    let writing = tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown().await.unwrap();
        stdin
    });
    let mut output = Vec::new();
    streams.stdout.read_to_end(&mut output).await.unwrap();
    assert!(output == input, "{} of {} bytes came back", output.len(), input.len());
    writing.await.unwrap();
    assert_eq!(agent.wait(&id, "").await, 0);
    agent.delete(&id).await.unwrap();
}

#[tokio::test]
async fn a_hundred_megabytes_arrive_whole_and_in_order() {
    const BYTES: usize = 100_000_000;
    let agent = Agent::start().await;
    let id = fresh_id("bulk");
    let script = format!("seq 1 100000000 | head -c {BYTES}");
    let mut streams = agent.run(&id, &spec(&["sh", "-c", &script])).await;
    let mut expected = (1u64..).flat_map(|number| format!("{number}\n").into_bytes());
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let length = streams.stdout.read(&mut buffer).await.unwrap();
        if length == 0 {
            break;
        }
        for byte in &buffer[..length] {
            assert_eq!(Some(*byte), expected.next(), "at byte {total}");
            total += 1;
        }
    }
    assert_eq!(total, BYTES);
    assert_eq!(agent.wait(&id, "").await, 0);
    agent.delete(&id).await.unwrap();
}

#[tokio::test]
async fn wait_answers_though_a_grandchild_keeps_stdout_open() {
    let agent = Agent::start().await;
    let id = fresh_id("open");
    let mut streams = agent.run(&id, &spec(&["sleep", "1000"])).await;
    let mut exec = agent.streams(false).await;
    let script = process(&["sh", "-c", "sleep 1000 & echo done"]);
    agent.exec(&id, "x", &script, &exec.ids).await.unwrap();
    assert_eq!(agent.wait(&id, "x").await, 0);
    assert_eq!(exec.read_until("done").await, "done\n");
    agent.kill(&id, "", 9, true).await.unwrap();
    assert_eq!(agent.wait(&id, "").await, 137);
    assert_eq!(streams.output().await, "");
    assert_eq!(exec.output().await, "");
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_ends() {
    let agent = Agent::start().await;
    let id = fresh_id("tty");
    let mut streams = agent.streams(true).await;
    agent.create(&id, &spec(&["bash", "--norc"]), &streams.ids).await.unwrap();
    agent.start_container(&id).await.unwrap();
    let mut resize = ResizeTerminalRequest::new();
    (resize.container_id, resize.columns, resize.rows) = (id.clone(), 133, 42);
    agent.client.resize_terminal(context(), &resize).await.unwrap();
    streams.say("stty size; tty; echo a$((1+1))b\n").await;
    let text = streams.read_until("a2b").await;
    assert!(text.contains("42 133"), "{text:?}");
    assert!(text.contains("/dev/pts/0"), "{text:?}");
    assert!(text.contains("echo a$((1+1))b"), "no echo: {text:?}");
    resize.rows = 0;
    let (code, _) = refusal(agent.client.resize_terminal(context(), &resize).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);

    let mut exec = agent.streams(true).await;
    agent.exec(&id, "x", &process(&["sh", "-c", "tty; exit 5"]), &exec.ids).await.unwrap();
    assert!(exec.output().await.contains("/dev/pts/1"));
    assert_eq!(agent.wait(&id, "x").await, 5);

    streams.say("exit 7\n").await;
    assert_eq!(agent.wait(&id, "").await, 7);
    streams.output().await;
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn added_processes_have_ends_of_their_own() {
    let agent = Agent::start().await;
    let id = fresh_id("exec");
    let _streams = agent.run(&id, &spec(&["sleep", "1000"])).await;
    let mut streams = agent.streams(false).await;
    let script = process(&["sh", "-c", "read x; echo got $x; exit 3"]);
    agent.exec(&id, "x", &script, &streams.ids).await.unwrap();
    let (code, _) = refusal(agent.exec(&id, "x", &script, &Stdio::new()).await);
    assert_eq!(code, Code::ALREADY_EXISTS);
    assert_eq!(agent.pids(&id).await.len(), 2);
    let request = process_request(&id, "x");
    let (code, text) = refusal(agent.client.delete_process(context(), &request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    streams.say("this\n").await;
    assert_eq!(streams.output().await, "got this\n");
    assert_eq!(agent.wait(&id, "x").await, 3);
    let deleted = agent.client.delete_process(context(), &request).await.unwrap();
    assert_eq!(deleted.exit_status, 3);
    let (code, _) = refusal(agent.client.delete_process(context(), &request).await);
    assert_eq!(code, Code::NOT_FOUND);

    let missing = process(&["no-such-program"]);
    let (code, text) = refusal(agent.exec(&id, "y", &missing, &Stdio::new()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(text, "exec: \"no-such-program\": executable file not found in $PATH");
    // A failed one has left its name free.
    agent.exec(&id, "y", &process(&["true"]), &Stdio::new()).await.unwrap();
    assert_eq!(agent.wait(&id, "y").await, 0);

    agent.exec(&id, "z", &process(&["sleep", "1000"]), &Stdio::new()).await.unwrap();
    agent.kill(&id, "z", 15, false).await.unwrap();
    assert_eq!(agent.wait(&id, "z").await, 143);
    agent.kill(&id, "", 9, false).await.unwrap();
    assert_eq!(agent.wait(&id, "").await, 137);
    let (code, _) = refusal(agent.exec(&id, "w", &process(&["true"]), &Stdio::new()).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn what_cannot_be_created_leaves_nothing() {
    let agent = Agent::start().await;
    let id = fresh_id("bad");
    let stdio = Stdio::new();
    let missing = spec(&["no-such-program"]);
    let (code, text) = refusal(agent.create(&id, &missing, &stdio).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(text, "exec: \"no-such-program\": executable file not found in $PATH");
    agent.assert_no_trace(&id);

    let mut bad_mount = spec(&["true"]);
    bad_mount["mounts"][0]["type"] = json!("no-such-file-system");
    let (code, text) = refusal(agent.create(&id, &bad_mount, &stdio).await);
    assert_eq!(code, Code::INTERNAL);
    assert!(text.len() > 20, "{text}");
    agent.assert_no_trace(&id);

    let (code, _) = refusal(agent.create("../x", &spec(&["true"]), &stdio).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);

    let mut nobody = Stdio::new();
    nobody.stdout = u64::MAX;
    let began = std::time::Instant::now();
    let (code, _) = refusal(agent.create(&id, &spec(&["true"]), &nobody).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(began.elapsed() >= Duration::from_secs(9));
    agent.assert_no_trace(&id);

    // The name is free after all that.
    agent.run(&id, &spec(&["true"])).await;
    let (code, _) = refusal(agent.create(&id, &spec(&["true"]), &stdio).await);
    assert_eq!(code, Code::ALREADY_EXISTS);
    assert_eq!(agent.wait(&id, "").await, 0);
    agent.delete(&id).await.unwrap();
}

#[tokio::test]
async fn a_program_of_a_wrong_format_fails_the_start() {
    let agent = Agent::start().await;
    std::fs::write(agent.path("share/root/etc/noise"), [0x7f, 1, 2, 3]).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(agent.path("share/root/etc/noise"), mode).unwrap();
    let id = fresh_id("format");
    agent.create(&id, &spec(&["/etc/noise"]), &Stdio::new()).await.unwrap();
    let (code, text) = refusal(agent.start_container(&id).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(text, "exec: \"/etc/noise\": exec format error");
    let (code, _) = refusal(agent.start_container(&id).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn a_container_that_never_ran_can_be_deleted() {
    let agent = Agent::start().await;
    let id = fresh_id("never");
    agent.create(&id, &spec(&["true"]), &Stdio::new()).await.unwrap();
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn without_a_pid_namespace_the_rest_ends_with_the_first_process() {
    let agent = Agent::start().await;
    let id = fresh_id("pids");
    let mut spec = spec(&["sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 6"]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().remove(0);
    let mut streams = agent.run(&id, &spec).await;
    assert_eq!(agent.wait(&id, "").await, 6);
    assert_eq!(streams.output().await, "");
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}

#[tokio::test]
async fn seccomp_binds_the_first_and_added_processes() {
    let agent = Agent::start().await;
    for privileges in [true, false] {
        let id = fresh_id("seccomp");
        let mut spec = spec(&["sh", "-c", "mkdir /tmp/x 2>&1; sleep 1000"]);
        spec["process"]["noNewPrivileges"] = json!(privileges);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO",
                          "errnoRet": 71}]
        });
        let mut streams = agent.run(&id, &spec).await;
        // Errno 71: no other failure says that.
        streams.read_until("Protocol error").await;
        let mut exec = agent.streams(false).await;
        let mut process =
            process(&["sh", "-c", "mkdir /tmp/y 2>&1; grep CapEff /proc/self/status"]);
        process["noNewPrivileges"] = json!(privileges);
        agent.exec(&id, "x", &process, &exec.ids).await.unwrap();
        let text = exec.output().await;
        assert!(text.contains("Protocol error"), "{text}");
        // What the filter was loaded with is gone: CHOWN DAC_OVERRIDE FOWNER KILL SETGID SETUID
        // SYS_CHROOT.
        assert!(text.contains("CapEff:\t00000000000400eb"), "{text}");
        agent.kill(&id, "", 9, false).await.unwrap();
        agent.wait(&id, "").await;
        agent.delete(&id).await.unwrap();
    }
}

#[tokio::test]
async fn no_signal_is_ignored() {
    let agent = Agent::start().await;
    let id = fresh_id("ignored");
    let mut streams = agent.run(&id, &spec(&["sh", "-c", "grep SigIgn /proc/self/status"])).await;
    assert_eq!(streams.output().await, "SigIgn:\t0000000000000000\n");
    agent.wait(&id, "").await;
    agent.delete(&id).await.unwrap();
}

#[tokio::test]
async fn many_at_once_do_not_meet() {
    let agent = Agent::start().await;
    let runs = (0..8).map(|number| {
        let agent = &agent;
        async move {
            let id = fresh_id("many");
            let script = format!("echo {number}; exit {number}");
            let mut streams = agent.run(&id, &spec(&["sh", "-c", &script])).await;
            assert_eq!(streams.output().await, format!("{number}\n"));
            assert_eq!(agent.wait(&id, "").await, number);
            agent.delete(&id).await.unwrap();
            agent.assert_no_trace(&id);
        }
    });
    futures::future::join_all(runs).await;
}

#[tokio::test]
async fn devices_beyond_the_rules_cannot_be_opened() {
    let agent = Agent::start().await;
    let id = fresh_id("devices");
    // A node of the first loop device can be made, which is no harm, but not opened.
    let script = "mknod /dev/x b 7 0; cat /dev/x 2>&1; echo fine > /dev/null && cat /dev/null \
                  && head -c 3 /dev/zero | wc -c";
    let mut spec = spec(&["sh", "-c", script]);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_MKNOD"));
    }
    let mut streams = agent.run(&id, &spec).await;
    assert_eq!(streams.output().await, "cat: /dev/x: Operation not permitted\n3\n");
    agent.wait(&id, "").await;
    agent.delete(&id).await.unwrap();
    agent.assert_no_trace(&id);
}
