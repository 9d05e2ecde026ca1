//! Functions that are bound to vfio-pci, with what an SR-IOV CNI has chosen for them: no interface in the pod's network
//! namespace tells of it, but the result that is kept of the plugin does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, run};
use super::devices::{Bound, HOST, echo, interface, listed, physical, virtual_function};
use super::hot_plug::{is_free, with};
use super::moved::{Networks, data_is_whole, script};
use super::{network::ip, ways};
use crate::cri::pod::{Container, Pod, eventually, idle, sh};

/// What the plugin chooses beside addresses, and what containerd calls a pod's second interface.
const MAC: &str = "02:99:00:00:00:17";
const MTU: u32 = 1400;
const NAME: &str = "eth1";
/// Where plugins are, the one of this case, and where containerd's results are kept.
const PLUGINS: &str = "/usr/lib/cni";
const PLUGIN: &str = "suite-sriov";
const RESULTS: &str = "/var/lib/cni/results";
/// The handlers whose pods have a second network.
const HANDLERS: [&str; 2] = ["vial-networks", "vial-sandbox-networks"];

/// A plugin that does what sriov-cni does with a function that is bound to vfio-pci, until dropped: the physical
/// function decides on its MAC address, and the result says which addresses the interface is to have that it has not made.
struct Plugin {
    path: PathBuf,
    card: String,
    _networks: Networks,
}

impl Plugin {
    fn of(function: &str) -> Result<Self> {
        let card = interface(&physical()?)?;
        let networks = Networks::with(&format!(
            r#"{{"type": "{PLUGIN}", "deviceID": "{function}",
            "ipam": {{"type": "host-local", "subnet": "10.99.0.0/24", "rangeStart": "10.99.0.50",
            "routes": [{{"dst": "10.77.0.0/16", "gw": "{HOST}"}}]}}}}"#
        ))?;
        let plugin = Self { path: Path::new(PLUGINS).join(PLUGIN), card, _networks: networks };
        let card = &plugin.card;
        let interfaces = format!(
            r#"\"interfaces\": [{{\"name\": \"$CNI_IFNAME\", \"mac\": \"{MAC}\", \"mtu\": {MTU}, \"sandbox\": \"$CNI_NETNS\"}}]"#
        );
        let text = format!(
            r#"#!/bin/sh
set -e
conf=$(cat)
ipam() {{ printf %s "$conf" | {PLUGINS}/host-local; }}
case $CNI_COMMAND in
VERSION) echo '{{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}}' ;;
ADD)
	ip link set {card} vf 0 mac {MAC}
	ipam | tr -d '\n' | sed "s|\"ips\": *\[ *{{|{interfaces}, &\"interface\": 0, |" ;;
DEL)
	ipam
	ip link set {card} vf 0 mac 00:00:00:00:00:00 ;;
esac
"#
        );
        fs::write(&plugin.path, text)?;
        fs::set_permissions(&plugin.path, fs::Permissions::from_mode(0o755))?;
        Ok(plugin)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        let _ = ip(&format!("link set {} vf 0 mac 00:00:00:00:00:00", self.card));
    }
}

/// A pod with the plugin's network, once containerd has seen that.
fn pod(handler: &str, annotation: Option<&str>) -> Result<Pod> {
    eventually(|| {
        let pod = Pod::of_handler(handler, |config| {
            let named = annotation.map(|text| ("io.vial/pci-devices".into(), text.into()));
            config.annotations.extend(named);
        })?;
        results(&pod).context("the plugin was not asked")?;
        Ok(pod)
    })
}

/// The file that is kept of the plugin's result.
fn results(pod: &Pod) -> Result<PathBuf> {
    let end = format!("-{}-{NAME}", pod.id);
    let listed = fs::read_dir(RESULTS).with_context(|| RESULTS)?.flatten();
    let found =
        listed.map(|entry| entry.path()).find(|path| path.to_string_lossy().ends_with(&end));
    found.with_context(|| format!("{RESULTS} has no file of {}", pod.id))
}

/// The interface has what was chosen, exchanges data with the host by that, and answers it.
fn is_as_chosen(container: &Container) -> Result<()> {
    let server = echo()?;
    let told = container.exec(&script(NAME))?;
    ensure!(server.is_finished(), "the host was not reached: {told:?}");
    let first = format!("driver igbvf\n{MAC}\n{MTU}\n10.99.0.");
    ensure!(told.starts_with(&first), "{first:?} was due, and not {told:?}");
    let cidr = told.lines().nth(3).unwrap_or_default();
    let address = cidr.strip_suffix("/24").with_context(|| format!("{cidr:?} is its address"))?;
    for route in [
        format!("10.77.0.0/16 via {HOST} dev {NAME}"),
        format!("10.99.0.0/24 dev {NAME} scope link  src {address}"),
    ] {
        ensure!(told.contains(&route), "{route:?} is not in {told:?}");
    }
    data_is_whole(&told)?;
    run(Command::new("ping").args(["-c", "1", "-W", "10", address]))?.expect(0)?;
    let first = container.exec("basename $(readlink /sys/class/net/eth0/device/driver)")?;
    ensure!(first.trim() == "virtio_net", "{first:?} drives the pod's first interface");
    Ok(())
}

pub(crate) fn cri_function_bound_to_vfio_is_what_cni_chose(bed: &Bed) -> Result<()> {
    let bound = Bound::new(virtual_function(0)?)?;
    let plugin = Plugin::of(&bound.function)?;
    for handler in HANDLERS {
        // Brought by a container, as a device plugin has it; by the next one again.
        let pod = pod(handler, None)?;
        for round in 0..2 {
            let container = pod.start(with(&bound, idle())?)?;
            is_as_chosen(&container).with_context(|| format!("{handler}, round {round}"))?;
            ways::is_by_the_hosts_way(&bound.function)?;
            container.stop(0)?;
            container.remove()?;
            let left = pod.prints(sh("ip -o link; ip route"))?;
            ensure!(!left.contains(NAME), "{handler}: {left:?} is left of it");
        }
        pod.end()?;
        is_free(&bound).with_context(|| handler)?;
    }
    // Known with the pod, and there before any container.
    let configuration = listed(&[&bound.function])?;
    let pod = pod(HANDLERS[0], Some(&bound.function))?;
    let container = pod.start(idle())?;
    is_as_chosen(&container).context("by annotation")?;
    drop(container);
    pod.end()?;
    drop((configuration, plugin));
    is_free(&bound)?;
    bed.nothing_left()
}

pub(crate) fn cri_results_of_cni_that_say_nothing_or_two_things_are_told_of(
    bed: &Bed,
) -> Result<()> {
    let bound = Bound::new(virtual_function(0)?)?;
    let plugin = Plugin::of(&bound.function)?;
    let pod = pod(HANDLERS[0], None)?;
    let good = results(&pod)?;
    let text = fs::read_to_string(&good)?;
    // Half of a file is none, and the pod has its function without what CNI chose.
    fs::write(&good, &text[..text.len() / 2])?;
    let log = bed.log_length();
    let container = pod.start(with(&bound, idle())?)?;
    let told = container.exec("ip -o address; ip route")?;
    ensure!(!told.contains("10.99.0."), "{told:?} of half a result");
    let driver = container.exec("ls -d /sys/class/net/*/device/driver | xargs -n 1 readlink")?;
    ensure!(driver.contains("igbvf"), "{driver:?}");
    let warned = bed.lines_since(log, "nothing is made of CNI's result");
    ensure!(!warned.is_empty(), "the log does not tell of it");
    container.stop(0)?;
    container.remove()?;
    // Two that say different things are refused, and nothing is touched.
    fs::write(&good, &text)?;
    let other = PathBuf::from(good.display().to_string().replace(NAME, "eth7"));
    fs::write(&other, text.replace("\"eth1\"", "\"eth7\""))?;
    let refused = pod.start(with(&bound, idle())?).map(drop);
    fs::remove_file(&other)?;
    let error = format!("{:#}", refused.err().context("the container was made")?);
    let told = [bound.function.as_str(), "cni_caches", "eth7"];
    ensure!(told.iter().all(|words| error.contains(words)), "{told:?} are not in {error:?}");
    is_free(&bound)?;
    // The pod goes on, and the next container has it.
    let container = pod.start(with(&bound, idle())?)?;
    is_as_chosen(&container)?;
    drop(container);
    pod.end()?;
    drop(plugin);
    is_free(&bound)?;
    bed.nothing_left()
}
