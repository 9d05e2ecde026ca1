//! The shim's whole task service against a VMM that has no VM (see `fake_vmm`).
//!
//! Needs root and `unshare`, since roots are really mounted, and `/dev/kvm`, since it is opened.
//! Everything happens in a mount namespace of its own.

mod events;
mod fake_vmm;
mod fixture;

use std::time::Duration;

use containerd_shim_protos::api::Status;
use fixture::{Fixture, abandon};

const NAMESPACE_MADE: &str = "VIAL_TEST_NAMESPACE_MADE";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, number] = &arguments[..]
        && flag == "--api-fd"
    {
        fake_vmm::serve(number.parse().unwrap());
    }
    if std::env::var_os(NAMESPACE_MADE).is_none() {
        let status = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .args(&arguments)
            .env(NAMESPACE_MADE, "1")
            .status()
            .expect("run unshare (util-linux)");
        assert!(status.success(), "failed; this test has to run as root");
        return;
    }
    let mut passed = 0;
    macro_rules! cases {
        ($($case:ident),* $(,)?) => {$(
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let case = tokio::time::timeout(Duration::from_secs(60), $case());
                case.await.expect(concat!(stringify!($case), " takes too long"));
            });
            runtime.shutdown_background();
            println!("test {} ... ok", stringify!($case));
            passed += 1;
        )*};
    }
    cases![
        container_runs_and_leaves_nothing,
        events_come_in_order_and_once,
        output_arrives_whole_before_its_end,
        input_reaches_its_end,
        exit_by_signal_is_told,
        exec_has_a_life_of_its_own,
        failed_exec_can_be_deleted,
        created_container_can_be_deleted,
        failed_creation_leaves_nothing,
        refused_boot_is_explained_and_leaves_nothing,
        ended_vmm_is_explained_and_leaves_nothing,
        boot_that_hangs_is_given_up,
        processes_end_with_their_vm,
        bind_mounts_are_seen_and_read_only_is,
        members_share_the_vm_of_their_pod,
        sandbox_started_ahead_is_used_and_stopped,
        failure_of_a_start_ahead_is_told_at_creation,
        paused_container_runs_on_when_resumed,
        limits_and_statistics_are_the_agents,
        want_of_memory_is_told_before_the_end,
        sandbox_of_the_api_outlives_its_containers,
        sandbox_of_the_api_that_fails_says_why,
        requests_that_nobody_waits_for_are_done,
        creation_that_nobody_waits_for_is_taken_back,
        containers_end_while_another_is_made,
    ];
    println!("\ntest result: ok. {passed} passed; 0 failed; 0 ignored");
}

async fn container_runs_and_leaves_nothing() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sh", "-c", "cat file; exit 42"], "");
    fixture.create(&bundle).await.unwrap();
    assert_eq!(fixture.state("demo", "").await.status(), Status::CREATED);
    fixture.start("demo", "").await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 42);
    assert_eq!(fixture.state("demo", "").await.status(), Status::STOPPED);
    assert_eq!(bundle.output().await, "content of demo\n");
    assert_eq!(fixture.delete("demo", "").await.unwrap(), 42);
    assert!(fixture.start("demo", "").await.unwrap_err().contains("not found"));
    fixture.shut_down_and_check().await;
}

async fn events_come_in_order_and_once() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["true"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    fixture.wait("demo", "").await;
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
    let topics = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    assert_eq!(fixture.topics(), topics);
}

async fn output_arrives_whole_before_its_end() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sh", "-c", "seq 1 1000000; echo end >&2"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    let expected: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    assert!(bundle.output().await == expected, "the output was changed");
    assert_eq!(bundle.errors().await, "end\n");
    fixture.wait("demo", "").await;
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
}

async fn input_reaches_its_end() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["cat"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    bundle.input("what was typed").await;
    fixture.close_stdin("demo", "").await;
    assert_eq!(fixture.wait("demo", "").await, 0);
    assert_eq!(bundle.output().await, "what was typed");
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
}

async fn exit_by_signal_is_told() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    assert!(fixture.delete("demo", "").await.unwrap_err().contains("running"));
    fixture.kill("demo", "", 15).await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 128 + 15);
    assert!(fixture.kill("demo", "", 15).await.unwrap_err().contains("already ended"));
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
}

async fn exec_has_a_life_of_its_own() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    let streams = fixture.exec("demo", "more", &["sh", "-c", "echo from exec; exit 7"]).await;
    fixture.start("demo", "more").await.unwrap();
    assert_eq!(fixture.wait("demo", "more").await, 7);
    assert_eq!(streams.output().await, "from exec\n");
    assert_eq!(fixture.delete("demo", "more").await.unwrap(), 7);
    assert_eq!(fixture.state("demo", "").await.status(), Status::RUNNING);
    fixture.kill("demo", "", 9).await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 137);
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
    assert!(fixture.topics().contains(&"/tasks/exec-started".to_string()));
}

async fn failed_exec_can_be_deleted() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    let _streams = fixture.exec("demo", "bad", &["/nowhere/program"]).await;
    assert!(fixture.start("demo", "bad").await.unwrap_err().contains("No such file"));
    assert_eq!(fixture.state("demo", "bad").await.status(), Status::STOPPED);
    fixture.delete("demo", "bad").await.unwrap();
    fixture.kill("demo", "", 9).await.unwrap();
    fixture.wait("demo", "").await;
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
}

async fn created_container_can_be_deleted() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    assert_eq!(fixture.delete("demo", "").await.unwrap(), 137);
    fixture.shut_down_and_check().await;
}

async fn failed_creation_leaves_nothing() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["/refused"], "");
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("no such program: /refused"), "{error}");
    fixture.check_nothing_left();
    fixture.shut_down_and_check().await;
    assert!(fixture.topics().is_empty());
}

async fn refused_boot_is_explained_and_leaves_nothing() {
    let fixture = Fixture::new("kernel_arguments = \"refuse\"").await;
    let bundle = fixture.bundle("demo", &["true"], "");
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("the kernel is no ELF file"), "{error}");
    fixture.check_nothing_left();
}

async fn ended_vmm_is_explained_and_leaves_nothing() {
    let fixture = Fixture::new("kernel_arguments = \"die\"").await;
    let bundle = fixture.bundle("demo", &["true"], "");
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("/dev/kvm is not usable here"), "{error}");
    fixture.check_nothing_left();
}

async fn boot_that_hangs_is_given_up() {
    let fixture = Fixture::new("kernel_arguments = \"hang\"\nboot_timeout_seconds = 1").await;
    let bundle = fixture.bundle("demo", &["true"], "");
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("not ready within 1 s"), "{error}");
    fixture.check_nothing_left();
}

async fn processes_end_with_their_vm() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "5"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    fixture.kill_vmm("demo").await;
    assert_eq!(fixture.wait("demo", "").await, 137);
    assert_eq!(fixture.delete("demo", "").await.unwrap(), 137);
    fixture.shut_down_and_check().await;
    let topics = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    assert_eq!(fixture.topics(), topics);
}

async fn bind_mounts_are_seen_and_read_only_is() {
    let fixture = Fixture::new("").await;
    let data = fixture.directory("data");
    std::fs::write(data.join("file"), "bound").unwrap();
    // What is mounted below a volume is read-only when the volume is so with all that is in it.
    let above = fixture.directory("above");
    let below = above.join("below");
    std::fs::create_dir(&below).unwrap();
    rustix::mount::mount_bind(&data, &below).unwrap();
    let mounts = format!(
        r#""mounts": [{{"destination": "/proc", "type": "proc", "source": "proc"}},
            {{"destination": "/rw", "type": "bind", "source": {data:?}, "options": ["rbind"]}},
            {{"destination": "/ro", "type": "bind", "source": {data:?}, "options": ["rbind", "ro"]}},
            {{"destination": "/f", "type": "bind", "source": {:?}, "options": ["bind"]}},
            {{"destination": "/b", "type": "bind", "source": {above:?}, "options": ["rbind", "ro"]}},
            {{"destination": "/d", "type": "bind", "source": {above:?}, "options": ["rbind", "rro"]}}],"#,
        data.join("file")
    );
    let script = "cat ../mounts/2/file ../mounts/3; touch ../mounts/1/new; \
                  touch ../mounts/2/refused 2>&1 | grep -o 'Read-only file system'; \
                  touch ../mounts/4/below/one; \
                  touch ../mounts/4/two 2>&1 | grep -o 'Read-only file system'; \
                  touch ../mounts/5/below/three 2>&1 | grep -o 'Read-only file system'; \
                  touch ../../top 2>&1 | grep -o 'Read-only file system'; true";
    let bundle = fixture.bundle("demo", &["sh", "-c", script], &mounts);
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    let expected = format!("boundbound{}", "Read-only file system\n".repeat(4));
    assert_eq!(bundle.output().await, expected);
    fixture.wait("demo", "").await;
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
    rustix::mount::unmount(&below, rustix::mount::UnmountFlags::DETACH).unwrap();
    for name in ["file", "new", "one"] {
        assert!(data.join(name).exists(), "{name} is gone");
    }

    let absent = r#""mounts": [{"destination": "/a", "type": "bind", "source": "/nowhere/a"}],"#;
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["true"], absent);
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("/nowhere/a"), "{error}");
    fixture.check_nothing_left();
}

async fn members_share_the_vm_of_their_pod() {
    let fixture = Fixture::new("").await;
    let annotations = |kind: &str| {
        format!(
            r#""annotations": {{"io.kubernetes.cri.container-type": "{kind}",
                "io.kubernetes.cri.sandbox-id": "demo"}},"#
        )
    };
    let pause = fixture.bundle("demo", &["/pause"], &annotations("sandbox"));
    fixture.create(&pause).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    for id in ["one", "two"] {
        let member = fixture.bundle(id, &["cat", "file"], &annotations("container"));
        fixture.create(&member).await.unwrap();
        fixture.start(id, "").await.unwrap();
        assert_eq!(member.output().await, format!("content of {id}\n"));
        assert_eq!(fixture.wait(id, "").await, 0);
        fixture.delete(id, "").await.unwrap();
    }
    assert_eq!(fixture.state("demo", "").await.status(), Status::RUNNING);
    fixture.kill("demo", "", 15).await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 128 + 15);
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
}

async fn sandbox_started_ahead_is_used_and_stopped() {
    let fixture = Fixture::new("").await;
    fixture.start_ahead().await;
    let bundle = fixture.bundle("demo", &["true"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 0);
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;

    let fixture = Fixture::new("").await;
    fixture.start_ahead().await;
    let bundle = fixture.bundle("demo", &["true"], r#""mounts": 1,"#);
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("no OCI runtime spec"), "{error}");
    fixture.check_nothing_left();
}

async fn failure_of_a_start_ahead_is_told_at_creation() {
    let fixture = Fixture::new("kernel_arguments = \"refuse\"").await;
    fixture.start_ahead().await;
    fixture.check_nothing_left();
    let bundle = fixture.bundle("demo", &["true"], "");
    let error = fixture.create(&bundle).await.unwrap_err();
    assert!(error.contains("the kernel is no ELF file"), "{error}");
    fixture.shut_down_and_check().await;
}

async fn paused_container_runs_on_when_resumed() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    assert!(fixture.pause("demo").await.unwrap_err().contains("cannot be paused"));
    fixture.start("demo", "").await.unwrap();
    fixture.pause("demo").await.unwrap();
    assert_eq!(fixture.state("demo", "").await.status(), Status::PAUSED);
    assert!(fixture.pause("demo").await.is_err());
    fixture.resume("demo").await.unwrap();
    assert_eq!(fixture.state("demo", "").await.status(), Status::RUNNING);
    fixture.pause("demo").await.unwrap();
    fixture.kill("demo", "", 9).await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 137);
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
    let topics = ["create", "start", "paused", "resumed", "paused", "exit", "delete"];
    assert_eq!(fixture.topics(), topics.map(|topic| format!("/tasks/{topic}")));
}

async fn limits_and_statistics_are_the_agents() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    let metrics = fixture.stats("demo").await;
    assert_eq!((metrics.memory.usage, metrics.pids.current), (4096, 1));
    let kind = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
    fixture.update("demo", kind, "{}").await.unwrap();
    let error = fixture.update("demo", kind, "[]").await.unwrap_err();
    assert!(error.contains("no such limit"), "{error}");
    assert!(fixture.update("demo", "other", "{}").await.unwrap_err().contains("LinuxResources"));
    fixture.kill("demo", "", 9).await.unwrap();
    fixture.wait("demo", "").await;
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
}

async fn want_of_memory_is_told_before_the_end() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sh", "-c", "exit 137", "hungry"], "");
    fixture.create(&bundle).await.unwrap();
    fixture.start("demo", "").await.unwrap();
    assert_eq!(fixture.wait("demo", "").await, 137);
    fixture.delete("demo", "").await.unwrap();
    fixture.shut_down_and_check().await;
    let topics = ["create", "start", "oom", "exit", "delete"];
    assert_eq!(fixture.topics(), topics.map(|topic| format!("/tasks/{topic}")));
}

async fn sandbox_of_the_api_outlives_its_containers() {
    let fixture = Fixture::without_sandbox("").await;
    assert!(fixture.start_sandbox().await.unwrap_err().contains("no sandbox was created"));
    assert!(fixture.create_sandbox("other").await.unwrap_err().contains("not found"));
    fixture.create_sandbox("demo").await.unwrap();
    assert!(fixture.create_sandbox("demo").await.unwrap_err().contains("already exists"));
    assert!(fixture.start_sandbox().await.unwrap() > 0);
    assert_eq!(fixture.sandbox_state().await, "SANDBOX_READY");
    assert!(fixture.sandbox_memory().await > 0);
    let more = MEMBER;
    let refused = fixture.bundle("refused", &["/refused"], more);
    fixture.create(&refused).await.unwrap_err();
    let member = fixture.bundle("one", &["cat", "file"], more);
    fixture.create(&member).await.unwrap();
    fixture.start("one", "").await.unwrap();
    assert_eq!(fixture.wait("one", "").await, 0);
    fixture.delete("one", "").await.unwrap();
    fixture.shut_down().await;
    let running = fixture.bundle("two", &["sleep", "600"], more);
    fixture.create(&running).await.unwrap();
    fixture.start("two", "").await.unwrap();
    assert_eq!(fixture.sandbox_state().await, "SANDBOX_READY");
    fixture.stop_sandbox().await;
    assert_eq!(fixture.wait_sandbox().await, 0);
    assert_eq!(fixture.wait("two", "").await, 137);
    assert_eq!(fixture.sandbox_state().await, "SANDBOX_NOTREADY");
    assert_eq!(fixture.delete("two", "").await.unwrap(), 137);
    fixture.shut_sandbox_down().await;
}

async fn sandbox_of_the_api_that_fails_says_why() {
    let fixture = Fixture::without_sandbox("kernel_arguments = \"refuse\"").await;
    fixture.create_sandbox("demo").await.unwrap();
    let error = fixture.start_sandbox().await.unwrap_err();
    assert!(error.contains("the kernel is no ELF file"), "{error}");
    assert_eq!(fixture.sandbox_state().await, "SANDBOX_NOTREADY");
    fixture.shut_sandbox_down().await;

    let fixture = Fixture::without_sandbox("").await;
    fixture.create_sandbox("demo").await.unwrap();
    let pid = fixture.start_sandbox().await.unwrap();
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(fixture.wait_sandbox().await, 137);
    fixture.shut_sandbox_down().await;
}

const MEMBER: &str = r#""annotations": {"io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-id": "demo"},"#;

async fn requests_that_nobody_waits_for_are_done() {
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    fixture.create(&bundle).await.unwrap();
    abandon(fixture.start("demo", "")).await;
    while fixture.state("demo", "").await.status() != Status::RUNNING {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    abandon(fixture.pause("demo")).await;
    while fixture.state("demo", "").await.status() != Status::PAUSED {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    abandon(fixture.kill("demo", "", 9)).await;
    assert_eq!(fixture.wait("demo", "").await, 137);
    abandon(fixture.delete("demo", "")).await;
    while fixture.wait_or_absent("demo").await.is_some() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    fixture.shut_down_and_check().await;
    let topics = ["create", "start", "paused", "exit", "delete"];
    assert_eq!(fixture.topics(), topics.map(|topic| format!("/tasks/{topic}")));
}

async fn creation_that_nobody_waits_for_is_taken_back() {
    // The first of a shim: it ends with it.
    let fixture = Fixture::new("").await;
    let bundle = fixture.bundle("demo", &["sleep", "600"], "");
    abandon(fixture.create(&bundle)).await;
    fixture.end().await;
    fixture.check_nothing_left();
    assert_eq!(fixture.topics(), ["create", "exit", "delete"].map(|t| format!("/tasks/{t}")));

    // One of a sandbox, which stays.
    let fixture = Fixture::without_sandbox("").await;
    fixture.create_sandbox("demo").await.unwrap();
    fixture.start_sandbox().await.unwrap();
    let member = fixture.bundle("one", &["sleep", "600", "slow"], MEMBER);
    abandon(fixture.create(&member)).await;
    while !fixture.topics().contains(&"/tasks/delete".to_string()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(fixture.sandbox_state().await, "SANDBOX_READY");
    let again = fixture.bundle("two", &["true"], MEMBER);
    fixture.create(&again).await.unwrap();
    fixture.start("two", "").await.unwrap();
    assert_eq!(fixture.wait("two", "").await, 0);
    fixture.delete("two", "").await.unwrap();
    fixture.stop_sandbox().await;
    fixture.shut_sandbox_down().await;
}

async fn containers_end_while_another_is_made() {
    let fixture = Fixture::without_sandbox("").await;
    fixture.create_sandbox("demo").await.unwrap();
    fixture.start_sandbox().await.unwrap();
    let one = fixture.bundle("one", &["sleep", "600"], MEMBER);
    fixture.create(&one).await.unwrap();
    fixture.start("one", "").await.unwrap();
    let two = fixture.bundle("two", &["sh", "-c", "true", "slow"], MEMBER);
    let ended = async {
        // The other creation is under way first.
        tokio::time::sleep(Duration::from_millis(100)).await;
        fixture.kill("one", "", 9).await.unwrap();
        assert_eq!(fixture.wait("one", "").await, 137);
    };
    let created = fixture.create(&two);
    tokio::pin!(created);
    tokio::select! {
        biased;
        _ = &mut created => panic!("the end of a container waited for the creation of another"),
        () = ended => {}
    }
    created.await.unwrap();
    fixture.delete("one", "").await.unwrap();
    fixture.start("two", "").await.unwrap();
    assert_eq!(fixture.wait("two", "").await, 0);
    fixture.delete("two", "").await.unwrap();
    fixture.stop_sandbox().await;
    fixture.shut_sandbox_down().await;
}
