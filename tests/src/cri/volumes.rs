//! Volumes as a kubelet makes them: directories and files of the host, bound into containers.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::client::Cri;
use super::log::stream;
use super::pod::{Pod, eventually, idle, same_in_a_pod, sh};
use super::wire::*;
use crate::suite::bed::{Bed, run};

pub(crate) fn volumes_are_the_same_as_with_runc(_: &Bed) -> Result<()> {
    same_in_a_pod(&[
        ("directories", directories),
        ("mounts below a volume", mounts_below),
        ("memory", memory),
        ("configuration", swapped_configuration),
        ("inotify", inotify_of_a_configuration),
        ("large trees", large_trees_and_locks),
        ("propagation", propagation),
    ])
}

fn directories(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("volume")?;
    fs::create_dir_all(volume.join("below/deep"))?;
    fs::write(volume.join("below/deep/file"), "deep\n")?;
    fs::write(volume.join("one"), "one file\n")?;
    let container = pod.start(
        idle()
            .volume(&volume, "/rw", false)
            .volume(&volume, "/ro", true)
            .volume(&volume.join("below/deep"), "/sub/path", false)
            .volume(&volume.join("one"), "/etc/one.conf", true),
    )?;
    let mut told = container.exec(
        "cat /sub/path/file /etc/one.conf; touch /ro/x; echo $?; echo y >/etc/one.conf; echo $?; \
         echo inside >/rw/new; cat /ro/new; ln /rw/new /rw/hard; ln -s new /rw/soft; cat /ro/soft; \
         stat -c '%h %F' /ro/hard; mv /rw/new /rw/moved; ls /ro; \
         mkfifo /rw/pipe; (echo through >/rw/pipe &); cat /rw/pipe",
    )?;
    // Owners and modes go both ways, numbers that no host user has among them.
    told += &container.exec(
        "touch /rw/owned; chown 123456:654321 /rw/owned; chmod 2751 /rw/owned; \
         stat -c '%u:%g %a' /rw/owned; chown -h 77:78 /rw/soft; stat -c '%u:%g' /rw/soft; \
         truncate -s 5000000 /rw/sparse; stat -c %s /rw/sparse; touch -d '2001-02-03 04:05:06' /rw/owned; \
         stat -c %Y /rw/owned; dd if=/dev/urandom of=/rw/data bs=64k count=20 2>/dev/null; \
         sha256sum </rw/data >/rw/sum; sync",
    )?
    .replace('\t', " ");
    let owned = fs::metadata(volume.join("owned"))?;
    told += &format!("{}:{} {:o}\n", owned.uid(), owned.gid(), owned.mode());
    let sum = run(Command::new("sha256sum").arg(volume.join("data")))?.expect(0)?.stdout;
    let inside = fs::read_to_string(volume.join("sum"))?;
    ensure!(
        sum.split(' ').next() == inside.split(' ').next(),
        "the host reads {sum:?} where {inside:?} was written"
    );
    // What the host changes is seen when the guest asks again, a second after it has looked (`KEPT_FOR` of
    // vmm/src/devices/fs). Until then it may take a file for as long as it was.
    fs::write(volume.join("moved"), "from the host\n")?;
    std::thread::sleep(Duration::from_millis(1100));
    told += &container.exec("cat /ro/moved")?;
    Ok(told)
}

/// Mounts on the host until dropped.
struct HostMount<'path>(&'path Path);

impl<'path> HostMount<'path> {
    fn tmpfs(path: &'path Path, options: &str) -> Result<Self> {
        fs::create_dir_all(path)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path))?
            .expect(0)?;
        Ok(Self(path))
    }
}

impl Drop for HostMount<'_> {
    fn drop(&mut self) {
        // A pod that has looked into it may know its files for longer.
        let _ = run(Command::new("umount").arg("--lazy").arg(self.0));
    }
}

/// A volume that is read-only has that to itself: what is mounted below it keeps what it had. The
/// host can take that away again, and the directory that it was mounted on.
fn mounts_below(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("above")?;
    let below = volume.join("below");
    let mount = HostMount::tmpfs(&below, "size=1m,mode=777")?;
    let container = pod.start(idle().volume(&volume, "/ro", true).volume(&volume, "/rw", false))?;
    let told = container.exec(
        "echo one >/ro/refused; echo $?; echo two >/ro/below/file; echo $?; cat /rw/below/file; \
         echo three >/rw/above; echo $?; cat /ro/above; ls /ro /ro/below",
    )?;
    drop(mount);
    fs::remove_dir(&below)?;
    Ok(told + &container.exec("ls /ro /rw")?)
}

/// containerd asks shims of the type of runc's what they have, and lets pods of those alone ask for volumes that are
/// read-only with all that is mounted below.
pub(crate) fn volumes_are_read_only_with_what_is_below(bed: &Bed) -> Result<()> {
    let offered = Cri::new().handlers()?;
    for (handler, recursive) in [("runc", true), ("vial-features", true), ("vial", false)] {
        let features = offered.get(handler).with_context(|| format!("no handler {handler}"))?;
        ensure!(features.recursive_read_only_mounts == recursive, "{handler}: {features:?}");
    }
    // Where it is not offered a kubelet does not ask, and containerd 2.1 ends if one does.
    for handler in ["runc", "vial-features"] {
        let pod = Pod::of_handler(handler, |_| ())?;
        let volume = pod.make_directory("above")?;
        let below = volume.join("below");
        let mount = HostMount::tmpfs(&below, "size=1m,mode=777")?;
        let mut config = idle().volume(&volume, "/rro", true);
        config.mounts[0].recursive_read_only = true;
        let container = pod.start(config)?;
        let told =
            container.exec("echo one >/rro/file; echo $?; echo two >/rro/below/file; echo $?")?;
        ensure!(told == "1\n1\n", "{handler}: {told:?}");
        ensure!(!below.join("file").exists(), "{handler} writes to the host");
        // The pod's directory goes with the pod, unless something is mounted there.
        drop((container, mount));
        pod.end()?;
    }
    bed.nothing_left()
}

fn memory(pod: &Pod) -> Result<String> {
    let volume = pod.path("memory");
    let _mount = HostMount::tmpfs(&volume, "size=2m,mode=777")?;
    let container = pod.start(idle().volume(&volume, "/memory", false))?;
    let told = container.exec(
        "dd if=/dev/zero of=/memory/fits bs=1M count=1 2>&1 | tail -n 1 | grep -c copied; \
         dd if=/dev/zero of=/memory/large bs=1M count=4 2>&1 | grep -c 'No space left'; \
         df -k /memory | tail -n 1 | awk '{print $2}'; rm /memory/large; \
         echo shared >/memory/note; ls /memory",
    )?;
    let other = pod.start(idle().volume(&volume, "/data", false))?;
    let told = told + &other.exec("cat /data/note")?;
    Ok(told)
}

/// Writes `text` the way a kubelet updates ConfigMaps: a new directory, and one rename.
fn publish(volume: &Path, version: u32, text: &str) -> Result<()> {
    let directory = format!("..version_{version}");
    fs::create_dir(volume.join(&directory))?;
    fs::write(volume.join(&directory).join("key"), text)?;
    let new = volume.join("..data_tmp");
    symlink(&directory, &new)?;
    fs::rename(&new, volume.join("..data"))?;
    if version > 1 {
        fs::remove_dir_all(volume.join(format!("..version_{}", version - 1)))?;
    } else {
        symlink("..data/key", volume.join("key"))?;
    }
    Ok(())
}

fn swapped_configuration(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("configuration")?;
    publish(&volume, 1, "first")?;
    let reader = pod.start(
        sh("trap 'exit 0' TERM; while :; do cat /config/key; echo; sleep 0.2; done")
            .volume(&volume, "/config", true),
    )?;
    reader.logs("first")?;
    publish(&volume, 2, "second")?;
    reader.logs("second")?;
    publish(&volume, 3, "third")?;
    reader.logs("third")?;
    let told = stream(&reader.log()?, "stdout");
    // Never back.
    let mut seen: Vec<&str> = told.lines().collect();
    seen.dedup();
    Ok(seen.join(" "))
}

/// What a program that watches its configuration learns of a renewal: all that it does on a host.
fn inotify_of_a_configuration(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("watched")?;
    publish(&volume, 1, "first")?;
    let suite = std::env::current_exe()?;
    let mut watcher = idle().volume(&volume, "/config", true).volume(&suite, "/vial-suite", true);
    watcher.command = ["/vial-suite", "--watch", "/config,/config/key"].map(String::from).into();
    let watcher = pod.start(watcher)?;
    let reader = pod.start(idle().volume(&volume, "/etc/config", true))?;
    watcher.logs("watching")?;
    let mut told = watcher.exec("ls -a /config; stat -c '%a %u:%g %F %s' /config/*")?;
    publish(&volume, 2, "second")?;
    watcher.logs("DELETE ..version_1")?;
    told += &watcher.exec("cat /config/key; ls -a /config; touch /config/x; echo $?")?;
    // The next one adds a file and takes one away.
    let directory = volume.join("..version_3");
    fs::create_dir(&directory)?;
    fs::write(directory.join("other"), "third")?;
    symlink("..version_3", volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    symlink("..data/other", volume.join("other"))?;
    fs::remove_file(volume.join("key"))?;
    fs::remove_dir_all(volume.join("..version_2"))?;
    watcher.logs("DELETE ..version_2")?;
    told += &watcher.exec("cat /config/other; ls -a /config")?;
    eventually(|| {
        let read = reader.exec("cat /etc/config/other")?;
        ensure!(read == "third", "the other container reads {read:?}");
        Ok(())
    })?;
    Ok(told + &stream(&watcher.log()?, "stdout"))
}

/// How many files a large tree has.
const FILES: usize = 10_000;

fn large_trees_and_locks(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("tree")?;
    for number in 0..FILES {
        let directory = volume.join(format!("{}", number / 200));
        if number % 200 == 0 {
            fs::create_dir(&directory)?;
        }
        fs::write(directory.join(number.to_string()), [])?;
    }
    let mut config = idle().volume(&volume, "/tree", false);
    for (host, inside) in [("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64")] {
        config = config.volume(host.as_ref(), inside, true);
    }
    let container = pod.start(config)?;
    let mut told =
        container.exec("find /tree -type f | wc -l; ls /tree/7 | sort -n | tail -n 1")?;
    // A lock of one process keeps another of the same pod out, and goes with its holder.
    told += &container.exec(
        "cd /tree; /usr/bin/flock lock sleep 1000 & holder=$!; sleep 1; \
         /usr/bin/flock -n lock echo taken || echo kept; kill $holder; \
         kill $(ps -o pid,args | awk '/sleep 1000$/ {print $1}') 2>/dev/null; sleep 0.5; \
         /usr/bin/flock -n lock echo taken",
    )?;
    Ok(told)
}

fn propagation(pod: &Pod) -> Result<String> {
    let volume = pod.make_directory("propagated")?;
    let _mount = HostMount::tmpfs(&volume, "size=1m,mode=777")?;
    run(Command::new("mount").args(["--make-shared"]).arg(&volume))?.expect(0)?;
    fs::create_dir_all(volume.join("late"))?;
    let mut config = idle();
    for (inside, propagation) in
        [("/private", Propagation::Private), ("/slave", Propagation::HostToContainer)]
    {
        config = config.volume(&volume, inside, false);
        if let Some(mount) = config.mounts.last_mut() {
            mount.propagation = propagation.into();
        }
    }
    let container = pod.start(config)?;
    let late = volume.join("late");
    let _below = HostMount::tmpfs(&late, "size=1m,mode=777")?;
    fs::write(late.join("file"), "late\n")?;
    let told = eventually(|| container.exec("cat /slave/late/file"))?;
    let private = container.exec("ls /private/late | wc -l")?;
    Ok(told + &private)
}
