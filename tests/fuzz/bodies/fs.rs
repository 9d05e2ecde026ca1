//! The file server, driven by a hostile driver. What is beside its directory stays as it is.

use std::{fs, os::unix::fs::symlink};

use vial_vmm::{devices::fs::Fs, fuzzing::drive};

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    let outside = tempfile::tempdir().expect("a directory");
    let root = outside.path().join("root");
    fs::create_dir(&root).expect("a root");
    fs::write(outside.path().join("secret"), "beside the root").expect("a file");
    fs::write(root.join("f"), "inside").expect("a file");
    fs::create_dir(root.join("d")).expect("a directory");
    symlink("../secret", root.join("l")).expect("a link");
    let opened = fs::File::open(&root).expect("the root");
    drive(&mut Fs::new("vial", opened.into(), None).expect("a server"), script);
    let secret = fs::read(outside.path().join("secret")).expect("the file beside the root");
    assert_eq!(secret, b"beside the root", "a file beside the root was written to");
    let mut names: Vec<_> = fs::read_dir(outside.path())
        .expect("the directory")
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["root", "secret"], "something else is beside the root");
}
