//! Virtual functions that an SR-IOV CNI hands over: it has moved the interface that the host's driver made of one into
//! the pod's network namespace, and looks for it there when it takes the network down.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Runtime, run};
use super::devices::{FUNCTIONS, detached, driver, echo, interface, physical, reaches_driver};
use super::devices::{HOST, PORT, virtual_function};
use super::network::{NAMESPACE, Namespace, ip};
use super::{faults, ways};
use crate::cri::pod::{Pod, eventually, idle};
use vial_tests::node;

/// What CNI would set.
const NAME: &str = "net1";
const MAC: &str = "02:99:00:00:00:07";
const ADDRESS: &str = "10.99.0.7/24";
const MTU: u32 = 1400;
/// The handlers whose pods have the networks of a directory that cases write to, and that directory.
const HANDLERS: [&str; 3] = ["runc-networks", "vial-networks", "vial-sandbox-networks"];
const NETWORKS: &str = "/etc/cni/networks.d";

/// A namespace with the interface of the first virtual function, as sriov-cni leaves it, until dropped.
struct Moved {
    function: String,
    /// Its name on the host.
    name: String,
    card: String,
    namespace: Namespace,
}

impl Moved {
    fn new() -> Result<Self> {
        let function = virtual_function(0)?;
        let (card, name) = (interface(&physical()?)?, interface(&function)?);
        let moved = Self { function, name, card, namespace: Namespace::new()? };
        moved.hand_over()?;
        Ok(moved)
    }

    /// The physical function decides the address, the namespace gets the interface.
    fn hand_over(&self) -> Result<()> {
        let Self { name, card, .. } = self;
        ip(&format!("link set {name} down"))?;
        // The card refuses the function's own change once its physical function has decided.
        ip(&format!("link set {name} address {MAC} alias {name} mtu {MTU}"))?;
        ip(&format!("link set {card} vf 0 mac {MAC}"))?;
        ip(&format!("link set {name} netns {NAMESPACE} name {NAME}"))?;
        self.set_up()
    }

    fn set_up(&self) -> Result<()> {
        for line in [
            format!("address add {ADDRESS} dev {NAME}"),
            format!("link set {NAME} up"),
            format!("route add 10.77.0.0/16 via {HOST} metric 7"),
            format!("neighbour add 10.99.0.9 lladdr 02:99:00:00:00:09 dev {NAME} nud permanent"),
        ] {
            ip(&format!("-n {NAMESPACE} {line}"))?;
        }
        Ok(())
    }

    /// The interface is where CNI's removal looks for it, with what CNI's removal needs, and with the host's driver.
    fn is_back(&self) -> Result<()> {
        reaches_driver(&self.function, Some("igbvf"))?;
        let word =
            fs::read_to_string(Path::new(FUNCTIONS).join(&self.function).join("driver_override"))?;
        ensure!(word.trim() == "(null)", "its driver is still overridden by {word}");
        let link = ip(&format!("-n {NAMESPACE} -o link show dev {NAME}"))?;
        let words = [format!("mtu {MTU}"), MAC.into(), format!("alias {}", self.name)];
        ensure!(words.iter().all(|word| link.contains(word)), "{words:?} are not in {link:?}");
        Ok(())
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let Self { name, card, .. } = self;
        // What stays is found by the next look at the host.
        let _ = ip(&format!("-n {NAMESPACE} link set {NAME} down"));
        let _ = ip(&format!("-n {NAMESPACE} link set {NAME} netns 1 name {name}"));
        let _ = ip(&format!("link set {card} vf 0 mac 00:00:00:00:00:00"));
        // Such as it was: with an MTU of its driver's, and no other name.
        let _ = ip(&format!("link set {name} alias {name} mtu 1500"));
    }
}

/// What a container tells of its interface, and of the data that it exchanges with the host through it.
pub(super) fn script(name: &str) -> String {
    format!(
        "echo driver $(basename $(readlink /sys/class/net/{name}/device/driver)); \
         cat /sys/class/net/{name}/address /sys/class/net/{name}/mtu; \
         ip -o address show dev {name} | grep -v fe80 | awk '{{print $4}}'; \
         ip route | sort; ip neigh | grep PERMANENT; \
         until [ $(cat /sys/class/net/{name}/carrier) = 1 ]; do sleep 0.1; done; \
         data() {{ yes 'packets of a function' | head -c 3000000; }}; \
         data | sha256sum; data | nc {HOST} {PORT} | sha256sum"
    )
}

pub(super) fn data_is_whole(stdout: &str) -> Result<()> {
    let sums: Vec<&str> = stdout.lines().filter(|line| line.ends_with("  -")).collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "the data has changed: {stdout}");
    Ok(())
}

pub(crate) fn function_that_cni_moved_is_the_containers_and_comes_back(bed: &Bed) -> Result<()> {
    let moved = Moved::new()?;
    let option = moved.namespace.option();
    for round in 0..2 {
        let server = echo()?;
        let outcome = bed
            .run(Runtime::Vial, &["--with-ns", &option], &["sh", "-c", &script(NAME)])?
            .expect(0)?;
        ensure!(server.is_finished(), "the host was not reached in round {round}: {outcome:?}");
        let stdout = &outcome.stdout;
        let first = format!("driver igbvf\n{MAC}\n{MTU}\n{ADDRESS}\n");
        ensure!(stdout.starts_with(&first), "{first:?} was due, and not {stdout:?}");
        for words in [
            format!("10.77.0.0/16 via {HOST} dev {NAME}"),
            format!("10.99.0.0/24 dev {NAME} scope link"),
            "10.99.0.9 dev net1 lladdr 02:99:00:00:00:09".into(),
        ] {
            ensure!(stdout.contains(&words), "{words:?} is not in {stdout:?}");
        }
        data_is_whole(stdout).with_context(|| format!("round {round}"))?;
        moved.is_back().with_context(|| format!("round {round}"))?;
        // As CNI would for the next pod: addresses go with an interface.
        moved.set_up()?;
    }
    Ok(())
}

pub(crate) fn function_that_cni_moved_is_back_when_vmm_or_shim_is_killed(bed: &Bed) -> Result<()> {
    for (process, word) in [("vial-vmm", ""), ("containerd-shim", "vial")] {
        let moved = Moved::new()?;
        let container = detached(bed, &["--with-ns", &moved.namespace.option()])?;
        reaches_driver(&moved.function, Some("vfio-pci"))?;
        ways::is_by_the_hosts_way(&moved.function)?;
        faults::kill(faults::process(process, word)?)?;
        if process == "vial-vmm" {
            container.reaches("STOPPED")?;
        }
        drop(container);
        bed.clear();
        moved.is_back().with_context(|| process)?;
        drop(moved);
        bed.nothing_left().with_context(|| process)?;
    }
    Ok(())
}

/// The namespace may be gone when a crash is cleaned up after: the interface is then the host's.
pub(crate) fn function_that_cni_moved_is_the_hosts_when_the_namespace_is_gone(
    bed: &Bed,
) -> Result<()> {
    let moved = Moved::new()?;
    let container = detached(bed, &["--with-ns", &moved.namespace.option()])?;
    reaches_driver(&moved.function, Some("vfio-pci"))?;
    ip(&format!("netns delete {NAMESPACE}"))?;
    faults::kill(faults::process("containerd-shim", "vial")?)?;
    drop(container);
    bed.clear();
    reaches_driver(&moved.function, Some("igbvf"))?;
    interface(&moved.function)?;
    Ok(())
}

pub(crate) fn function_that_cni_moved_and_is_not_to_be_passed_gets_a_tap(bed: &Bed) -> Result<()> {
    let moved = Moved::new()?;
    let configuration = node::Configuration::keep();
    configuration.write(&node::with(configuration.text(), "network_functions", "[]"))?;
    let server = echo()?;
    let option = moved.namespace.option();
    let outcome =
        bed.run(Runtime::Vial, &["--with-ns", &option], &["sh", "-c", &script(NAME)])?.expect(0)?;
    ensure!(server.is_finished(), "the host was not reached: {outcome:?}");
    let first = format!("driver virtio_net\n{MAC}\n{MTU}\n{ADDRESS}\n");
    ensure!(outcome.stdout.starts_with(&first), "{first:?} was due, and not {outcome:?}");
    data_is_whole(&outcome.stdout)?;
    moved.is_back()
}

pub(crate) fn function_that_cni_moved_and_cannot_be_passed_is_refused(bed: &Bed) -> Result<()> {
    let moved = Moved::new()?;
    // Addresses of IPv6 come by themselves, when a router is heard.
    let look = || ip(&format!("-n {NAMESPACE} -4 address show dev {NAME}"));
    let before = look()?;
    run(Command::new("modprobe").args(["-r", "vfio-pci"]))?.expect(0)?;
    let option = moved.namespace.option();
    let outcome = bed.run(Runtime::Vial, &["--with-ns", &option], &["true"]);
    run(Command::new("modprobe").arg("vfio-pci"))?.expect(0)?;
    let outcome = outcome?;
    let told = [NAME, "modprobe vfio-pci", "network_functions"];
    let told = told.iter().all(|words| outcome.stderr.contains(words));
    ensure!(outcome.status != 0 && told, "it was not refused as it should be: {outcome:?}");
    bed.clear();
    ensure!(driver(&moved.function).as_deref() == Some("igbvf"), "its driver was changed");
    let after = look()?;
    ensure!(before == after, "{after:?} is in the namespace, and not {before:?}");
    Ok(())
}

/// The networks of pods of [`HANDLERS`], until dropped: a bridge, and another.
pub(super) struct Networks;

impl Networks {
    /// The function by CNI's plugin host-device.
    fn of(function: &str) -> Result<Self> {
        Self::with(&format!(
            r#"{{"type": "host-device", "pciBusID": "{function}",
            "ipam": {{"type": "host-local", "subnet": "10.99.0.0/24", "rangeStart": "10.99.0.50",
            "routes": [{{"dst": "10.77.0.0/16", "gw": "{HOST}"}}]}}}}"#
        ))
    }

    /// What a plugin makes that is configured so.
    pub(super) fn with(plugin: &str) -> Result<Self> {
        let bridge = r#"{"type": "bridge", "bridge": "cni0", "isGateway": true,
            "ipam": {"type": "host-local", "subnet": "10.88.0.0/16", "routes": [{"dst": "0.0.0.0/0"}]}}"#;
        let networks = Self;
        fs::create_dir_all(NETWORKS)?;
        for (name, plugin) in [("10-bridge", bridge), ("20-function", plugin)] {
            let text = format!(
                r#"{{"cniVersion": "1.0.0", "name": "suite-{name}", "plugins": [{plugin}]}}"#
            );
            // containerd reads them when it sees them: whole, then.
            let beside = format!("{NETWORKS}/{name}.new");
            fs::write(&beside, text)?;
            fs::rename(beside, format!("{NETWORKS}/{name}.conflist"))?;
        }
        Ok(networks)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for name in ["10-bridge", "20-function"] {
            let _ = fs::remove_file(format!("{NETWORKS}/{name}.conflist"));
            // What host-local remembers of a network.
            let _ = fs::remove_dir_all(format!("/var/lib/cni/networks/suite-{name}"));
        }
    }
}

/// A pod whose second interface a real plugin of CNI moves in and out. With both runtimes, of which one has no VM.
pub(crate) fn cri_function_of_a_cni_plugin_is_the_pods_and_the_plugin_finds_it_again(
    _: &Bed,
) -> Result<()> {
    let function = virtual_function(1)?;
    let name = interface(&function)?;
    let _networks = Networks::of(&function)?;
    for handler in HANDLERS {
        // containerd may not have seen the networks yet.
        let pod = eventually(|| {
            let pod = Pod::of_handler(handler, |_| ())?;
            let status = pod.status()?;
            let network = status.network.context("the pod has no network")?;
            ensure!(driver_of_host(&name).is_err(), "{name} was not moved: {network:?}");
            Ok(pod)
        })?;
        let server = echo()?;
        let container = pod.start(idle())?;
        let told = container.exec(&script("eth1"))?;
        ensure!(server.is_finished(), "{handler} did not reach the host: {told:?}");
        ensure!(told.starts_with("driver igbvf\n"), "{handler} has another driver: {told:?}");
        ensure!(
            told.contains("\n10.99.0.")
                && told.contains(&format!("10.77.0.0/16 via {HOST} dev eth1")),
            "{handler}: {told:?}"
        );
        data_is_whole(&told).with_context(|| handler)?;
        let bridge = container.exec("basename $(readlink /sys/class/net/eth0/device/driver)");
        ensure!(handler == "runc-networks" || bridge?.trim() == "virtio_net", "{handler}");
        let expected = if handler == "runc-networks" { "igbvf" } else { "vfio-pci" };
        reaches_driver(&function, Some(expected))?;
        drop(container);
        // The plugin's removal fails where it does not find what it has moved, and the pod's with it.
        pod.end().with_context(|| handler)?;
        reaches_driver(&function, Some("igbvf"))?;
        let found = interface(&function)?;
        ensure!(found == name, "{handler} left the interface as {found}, and not {name}");
    }
    Ok(())
}

/// The driver of an interface of the host's own namespace.
fn driver_of_host(name: &str) -> Result<String> {
    let target = fs::read_link(format!("/sys/class/net/{name}/device/driver"))?;
    Ok(target.file_name().unwrap_or_default().to_string_lossy().into_owned())
}
