//! PCI functions of the host that a container brings into its pod's VM, as a device plugin has it: they are known with
//! the container, and not with the pod.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vial_tests::node::Configuration;

use super::bed::{Bed, Runtime, run};
use super::devices::{
    Bound, CLASS_NVME, FIRST, checks_out, disk, driver, echo, reaches_driver, script,
    virtual_function, with_class,
};
use super::templates::Node;
use super::{faults, ways};
use crate::cri::pod::{Container, Pod, eventually, idle, sh};
use crate::cri::wire::{
    Capability, ContainerConfig, ContainerState, Device, KeyValue, LinuxContainerSecurityContext,
};

/// The variable by which the device plugin of a resource tells what a container got.
const VARIABLE: &str = "PCIDEVICE_SUITE_EXAMPLE_FUNCTION";
/// How the log tells of a VM that went on from a template.
const RESTORED: &str = "goes on from the template";
/// Functions of the card that a guest sees, a line each.
const SEEN: &str = "for at in /sys/bus/pci/devices/*; do \
    [ $(cat $at/device) = 0x10ca ] && basename $at; done; true";

/// A container that a kubelet asks for after a device plugin has given it the function.
pub(super) fn with(bound: &Bound, mut container: ContainerConfig) -> Result<ContainerConfig> {
    let device = |path: String| Device {
        container_path: path.clone(),
        host_path: path,
        permissions: "mrw".into(),
    };
    container.devices = ways::beside().into_iter().chain([bound.node()?]).map(device).collect();
    let info = format!("{{\"{0}\":{{\"generic\":{{\"deviceID\":\"{0}\"}}}}}}", bound.function);
    container.envs = vec![
        KeyValue { key: VARIABLE.into(), value: bound.function.clone() },
        KeyValue { key: format!("{VARIABLE}_INFO"), value: info },
    ];
    Ok(container.security(|security: &mut LinuxContainerSecurityContext| {
        let add_capabilities = vec!["NET_ADMIN".into()];
        security.capabilities = Some(Capability { add_capabilities, ..Default::default() });
    }))
}

/// What `vial devices` says of a function.
fn listed(function: &str) -> Result<String> {
    let table = run(Command::new("vial").arg("devices"))?.expect(0)?.stdout;
    let line = table.lines().find(|line| line.starts_with(function));
    Ok(line.with_context(|| format!("{function} is not among {table}"))?.to_owned())
}

/// Nobody has the function: its group can be opened, which only one can, no VMM has it open, and nobody is listed.
pub(super) fn is_free(bound: &Bound) -> Result<()> {
    eventually(|| {
        ways::nobody_has(&bound.function)?;
        File::options().read(true).write(true).open(bound.node()?).context("it is in use")?;
        let line = listed(&bound.function)?;
        ensure!(line.ends_with("free"), "{line}");
        Ok(())
    })?;
    ensure!(driver(&bound.function).as_deref() == Some("vfio-pci"), "it was unbound");
    Ok(())
}

/// The environment names the function as the guest has it, in the container and in what is run in it later.
fn is_named(container: &Container) -> Result<String> {
    let seen = container.exec(SEEN)?;
    let told =
        container.exec(&format!("echo ${VARIABLE} ${VARIABLE}_INFO; cat /proc/1/environ"))?;
    let address = seen.trim();
    let info = format!("{{\"{address}\":{{\"generic\":{{\"deviceID\":\"{address}\"}}}}}}");
    ensure!(address.starts_with("0000:00:"), "the guest sees {seen:?}");
    ensure!(told.starts_with(&format!("{address} {info}\n")), "{told:?} of {address}");
    ensure!(told.contains(&format!("{VARIABLE}={address}\0")), "{told:?} of {address}");
    Ok(address.to_owned())
}

/// A container exchanges data with the host through a function that came with it, as often as one comes.
fn comes_and_goes(pod: &Pod, bound: &Bound, rounds: usize) -> Result<()> {
    for round in 0..rounds {
        let server = echo()?;
        let container =
            pod.start(with(bound, sh(&format!("{}; echo up; sleep 1000", script())))?)?;
        container.logs("up").with_context(|| format!("round {round}"))?;
        ensure!(server.is_finished(), "the host was not reached in round {round}");
        is_named(&container)?;
        ways::is_by_the_hosts_way(&bound.function)?;
        let line = listed(&bound.function)?;
        ensure!(line.ends_with(&format!("used by k8s.io/{}", pod.id)), "{line}");
        container.stop(0)?;
        let finished = container.finish()?;
        checks_out(&finished.stdout).with_context(|| format!("round {round}"))?;
        container.remove()?;
        is_free(bound)?;
        ensure!(pod.prints(sh(SEEN))?.is_empty(), "the guest still has it in round {round}");
    }
    Ok(())
}

pub(crate) fn cri_function_of_a_container_comes_and_goes_with_it(bed: &Bed) -> Result<()> {
    let bound = Bound::new(virtual_function(0)?)?;
    let pod = Pod::new(Runtime::Vial)?;
    comes_and_goes(&pod, &bound, 2)?;
    pod.end()?;
    bed.nothing_left()
}

pub(crate) fn cri_pods_have_a_function_each(_: &Bed) -> Result<()> {
    let bound = [Bound::new(virtual_function(0)?)?, Bound::new(virtual_function(1)?)?];
    let pods = [Pod::new(Runtime::Vial)?, Pod::new(Runtime::Vial)?];
    let containers =
        [pods[0].start(with(&bound[0], idle())?)?, pods[1].start(with(&bound[1], idle())?)?];
    for container in &containers {
        let address = is_named(container)?;
        let driver = container.exec(&format!("readlink /sys/bus/pci/devices/{address}/driver"))?;
        ensure!(driver.trim().ends_with("/igbvf"), "{driver:?} drives it");
    }
    // What one pod has, another does not get, and its own goes on.
    let Err(error) = pods[0].start(with(&bound[1], idle())?) else {
        anyhow::bail!("two pods have one function");
    };
    ensure!(format!("{error:#}").contains("in use by another"), "{error:#}");
    is_named(&containers[0])?;
    for pod in pods {
        pod.end()?;
    }
    bound.iter().try_for_each(is_free)
}

/// The memory of such a VM is mapped privately from a file: what the function writes there has to be what the guest
/// reads, in pages that the guest had not touched before as in others.
pub(crate) fn cri_function_comes_into_a_vm_from_a_template(bed: &Bed) -> Result<()> {
    let nvme = with_class(CLASS_NVME)?;
    reaches_driver(&nvme, Some("nvme"))?;
    let data: Vec<u8> = (0..12_u32 << 20).map(|at| ((at / 5) ^ (at >> 11)) as u8).collect();
    File::options().write(true).open(disk(&nvme)?)?.write_all_at(&data, 0)?;
    run(&mut Command::new("sync"))?.expect(0)?;
    let sum = run(Command::new("sh")
        .args(["-c", &format!("head -c {} {} | sha256sum", data.len(), disk(&nvme)?.display())]))?;
    let sum = sum.expect(0)?.stdout;

    let (node, _) = Node::with_template()?;
    let bound = Bound::new(nvme)?;
    let log = bed.log_length();
    let pod = Pod::with(Runtime::Vial, |config| {
        let security =
            config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.privileged = true;
    })?;
    ensure!(!bed.lines_since(log, RESTORED).is_empty(), "the VM came from elsewhere");
    // The second time into other pages, since some of the first are in use: and the guest has told that it has the others
    // free, which functions of the host would still write to if they had been taken from it.
    let script = format!(
        "until {FIRST} [ -f \"/sys/block/$disk/dev\" ]; do sleep 0.1; done; \
        mknod /dev/disk b $(tr : ' ' < /sys/block/$disk/dev); \
        look() {{ head -c 12582912 /dev/disk | sha256sum; }}; look; \
        echo 3 > /proc/sys/vm/drop_caches; sleep 6; \
        dd if=/dev/zero of=/dev/shm/full bs=1M count=24 2>/dev/null; look"
    );
    let privileged = |security: &mut LinuxContainerSecurityContext| security.privileged = true;
    let told = pod.run(with(&bound, sh(&script))?.security(privileged))?;
    ensure!(told.stdout == sum.repeat(2), "{sum:?} was due, and not {told:?}");
    pod.end()?;
    is_free(&bound)?;
    // Others go on from the same memory.
    let pod = Pod::new(Runtime::Vial)?;
    ensure!(pod.prints(sh("echo whole"))? == "whole\n", "the template has changed");
    ensure!(bed.lines_since(log, RESTORED).len() == 2, "the VM came from elsewhere");
    pod.end()?;
    drop(node);
    Ok(())
}

pub(crate) fn cri_function_is_free_when_vmm_or_shim_is_killed_after_it_came(
    bed: &Bed,
) -> Result<()> {
    let bound = Bound::new(virtual_function(0)?)?;
    for (program, word) in [("vial-vmm", ""), ("containerd-shim", "vial")] {
        let pod = Pod::new(Runtime::Vial)?;
        let container = pod.start(with(&bound, idle())?)?;
        is_named(&container)?;
        ways::is_by_the_hosts_way(&bound.function)?;
        faults::kill(faults::process(program, word)?)?;
        container.reaches(ContainerState::Exited)?;
        pod.end()?;
        is_free(&bound).with_context(|| program)?;
        bed.nothing_left().with_context(|| program)?;
    }
    Ok(())
}

pub(crate) fn cri_pod_that_gets_no_functions_later_refuses_them_and_lives(bed: &Bed) -> Result<()> {
    let refused = |pod: &Pod, bound: &Bound| {
        let Err(error) = pod.start(with(bound, idle())?) else {
            anyhow::bail!("the container has it");
        };
        ensure!(format!("{error:#}").contains("hot_plug_devices"), "{error:#}");
        ensure!(pod.prints(sh("echo on"))? == "on\n", "the pod does not go on");
        is_free(bound)
    };
    // One that began when there was nothing to give.
    let pod = Pod::new(Runtime::Vial)?;
    let bound = Bound::new(virtual_function(0)?)?;
    refused(&pod, &bound)?;
    pod.end()?;
    let configuration = Configuration::keep();
    configuration.write(&format!("{}\nhot_plug_devices = false\n", configuration.text()))?;
    let pod = Pod::new(Runtime::Vial)?;
    refused(&pod, &bound)?;
    pod.end()?;
    bed.nothing_left()
}
