//! The way into the jail, as far as a program can come that has libraries to load. Needs root and
//! a cgroup hierarchy of version 2, wherever it is mounted. The suite's isolation cases go on from
//! here, with programs that run.

use std::{
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::fs::{CWD, Mode, OFlags, openat, statfs};
use vial_shim::{
    jail::{self, Confinement, JailError, Step},
    vmm_client::socket_pair,
};

/// `CGROUP2_SUPER_MAGIC` (linux/magic.h).
const CGROUP2: u64 = 0x6367_7270;

fn cgroup() -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|path| statfs(*path).is_ok_and(|at| at.f_type as u64 == CGROUP2))
        .map(|path| openat(CWD, path, flags, Mode::empty()).unwrap())
        .expect("a cgroup hierarchy of version 2")
}

async fn enter(program: &Path) -> (JailError, String) {
    let (_ours, theirs) = socket_pair().unwrap();
    let (said, output) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let root = tempfile::tempdir().unwrap();
    let cgroup = cgroup();
    let confinement = Confinement { root: root.path(), user_id: 70_000, cgroup: cgroup.as_fd() };
    let error = jail::spawn(program, theirs, output, &confinement).await.unwrap_err();
    let mut text = String::new();
    std::fs::File::from(said).read_to_string(&mut text).unwrap();
    (error, text)
}

#[tokio::test]
async fn program_with_libraries_gets_in_and_finds_none() {
    let (error, said) = enter(&std::env::current_exe().unwrap()).await;
    // All steps before have been done.
    assert!(matches!(error, JailError::Step { step: Step::Exec, .. }), "{error}");
    assert!(error.to_string().contains("static program"), "{error}");
    assert_eq!(said, "");
    let me = std::process::id();
    let children = std::fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
    assert_eq!(children.trim(), "", "the child is left");
}

#[tokio::test]
async fn absent_program_is_named() {
    let (error, _) = enter(Path::new("/nowhere/vial-vmm")).await;
    assert!(error.to_string().contains("/nowhere/vial-vmm"), "{error}");
}
