//! The installer of nodes, on a directory that stands for a node's file system.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const DROP_IN: &str = "etc/containerd/conf.d/vial.toml";
const MAIN: &str = "etc/containerd/config.toml";
const SHIM: &str = "usr/local/bin/containerd-shim-vial-v2";

/// A node, and something to install on it.
struct Node {
    directory: TempDir,
}

impl Node {
    fn new() -> Self {
        let node = Self { directory: tempfile::tempdir().unwrap() };
        node.release("one");
        node
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("node").join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Something else to install.
    fn release(&self, version: &str) {
        let from = self.directory.path().join("from");
        for file in [
            "bin/containerd-shim-vial-v2",
            "bin/vial",
            "bin/vial-vmm",
            "guest/vmlinux",
            "guest/image.erofs",
        ] {
            let path = from.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{file} {version}")).unwrap();
        }
        fs::write(from.join("containerd.toml"), format!("# {version}\n")).unwrap();
    }

    fn run(&self, action: &str) -> Output {
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtimeclass/installer/install");
        fs::create_dir_all(self.path("")).unwrap();
        Command::new(script)
            .arg("--root")
            .arg(self.path(""))
            .arg("--from")
            .arg(self.directory.path().join("from"))
            .args(["--no-restart", action])
            .output()
            .unwrap()
    }

    fn does(&self, action: &str) -> String {
        let output = self.run(action);
        assert!(output.status.success(), "{action}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a path of the node leads to, links followed as the node would.
    fn content(&self, path: &str) -> String {
        let mut path = PathBuf::from(path);
        for _ in 0..8 {
            let mut walked = PathBuf::new();
            let mut link = None;
            for part in path.components() {
                if link.is_some() {
                    walked.push(part);
                    continue;
                }
                walked.push(part);
                if let Ok(target) = fs::read_link(self.path(walked.to_str().unwrap())) {
                    link = Some(());
                    walked = target.strip_prefix("/").unwrap().into();
                }
            }
            path = walked;
        }
        self.read(path.to_str().unwrap())
    }

    /// All that is on it.
    fn files(&self) -> Vec<String> {
        let output = Command::new("find")
            .arg(".")
            .args(["!", "-type", "d"])
            .current_dir(self.path(""))
            .output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.lines().map(String::from).collect()
    }
}

#[test]
fn install_on_a_fresh_node_then_uninstall_leaves_nothing() {
    let node = Node::new();
    node.does("install");
    assert_eq!(node.content(SHIM), "bin/containerd-shim-vial-v2 one");
    assert_eq!(node.content("usr/lib/vial/vmlinux"), "guest/vmlinux one");
    assert_eq!(node.read(DROP_IN), "# one\n");
    assert!(node.read(MAIN).contains("conf.d"));
    let before = node.files();
    assert!(!node.does("install").contains("restart"), "a second time there is nothing to do");
    assert_eq!(node.files(), before);
    node.does("uninstall");
    assert_eq!(node.files(), Vec::<String>::new());
}

#[test]
fn newer_version_replaces_links_and_keeps_what_runs() {
    let node = Node::new();
    node.does("install");
    let old = fs::read_link(node.path("usr/lib/vial")).unwrap();
    node.release("two");
    node.does("install");
    assert_eq!(node.content(SHIM), "bin/containerd-shim-vial-v2 two");
    assert_eq!(node.read(DROP_IN), "# two\n");
    let kept = node.read(old.strip_prefix("/").unwrap().join("vial-vmm").to_str().unwrap());
    assert_eq!(kept, "bin/vial-vmm one", "what pods were started from is gone");
}

#[test]
fn edited_files_stay_as_they_are() {
    let node = Node::new();
    node.does("install");
    node.write(DROP_IN, "# edited\n");
    node.release("two");
    assert!(node.does("install").contains("edited"));
    assert_eq!(node.read(DROP_IN), "# edited\n");
    node.write(MAIN, "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n[debug]\n");
    node.does("uninstall");
    assert_eq!(node.files().len(), 2, "{:?}", node.files());
}

#[test]
fn configuration_without_imports_is_told_and_not_touched() {
    let node = Node::new();
    node.write(MAIN, "version = 3\n");
    let output = node.run("install");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("imports ="), "{output:?}");
    assert_eq!(node.read(MAIN), "version = 3\n");
}

#[test]
fn files_of_others_are_never_replaced_or_removed() {
    let node = Node::new();
    node.write("usr/local/bin/vial", "somebody's program");
    assert!(!node.run("install").status.success());
    assert_eq!(node.read("usr/local/bin/vial"), "somebody's program");
    node.does("uninstall");
    assert_eq!(node.read("usr/local/bin/vial"), "somebody's program");
    fs::remove_file(node.path("usr/local/bin/vial")).unwrap();
    symlink("/somewhere/else", node.path("usr/local/bin/vial")).unwrap();
    node.does("uninstall");
    assert!(node.path("usr/local/bin/vial").is_symlink());
}

#[test]
fn running_pods_keep_vial_installed() {
    let node = Node::new();
    node.does("install");
    node.write("run/vial/pod/state.json", "{}");
    let output = node.run("uninstall");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("run/vial/pod"), "{output:?}");
    assert_eq!(node.content(SHIM), "bin/containerd-shim-vial-v2 one");
}

#[test]
fn incomplete_release_and_wrong_words_are_refused() {
    let node = Node::new();
    fs::remove_file(node.directory.path().join("from/guest/vmlinux")).unwrap();
    assert!(String::from_utf8_lossy(&node.run("install").stderr).contains("guest/vmlinux"));
    assert_eq!(node.files(), Vec::<String>::new());
    assert!(!node.run("upgrade").status.success());
}
