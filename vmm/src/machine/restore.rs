//! Builds a machine from what another one left.
//!
//! The order matters: registers and interrupt controllers before the devices, which may interrupt
//! at once, and the new generation before the guest runs.

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use vial_vmm_api::{BootReport, DeviceConfig, GROWTH_STEP_MIB, RestoreConfig};

use super::disks::Disks;
use super::interfaces::Interfaces;
use super::late::Late;
use super::save::image_offset;
use super::{
    Descriptors, GuestConnected, Machine, MachineError,
    assembly::Assembly,
    growth::{Bounds, Growing},
    passed::Passed,
    passed_functions, vcpus,
};
use crate::arch::vcpu_state::differing_leaf;
use crate::arch::{cpuid, generation, layout};
use crate::clock::monotonic_ns;
use crate::kvm::{self, Vm};
use crate::memory::{Image, ImageError, map_saved_ram};
use crate::pci::PciBus;
use crate::ports::Ports;
use crate::snapshot::Snapshot;
use crate::vcpu::Platform;

fn check(config: &RestoreConfig, snapshot: &Snapshot) -> Result<(), MachineError> {
    // There are no more than `max_vcpus`, a byte.
    let least = u8::try_from(snapshot.vcpus.len()).unwrap_or(u8::MAX);
    if !(least..=snapshot.max_vcpus).contains(&config.vcpus) {
        return Err(MachineError::Config(format!(
            "the saved machine can go on with {least} to {} vCPUs, and {} are wanted; make one \
             that can have so many",
            snapshot.max_vcpus, config.vcpus
        )));
    }
    let grows = config.devices.contains(&DeviceConfig::Memory);
    if config.max_memory_mib.is_some() && (!grows || config.hot_plug) {
        return Err(MachineError::Config(
            "a machine that can grow later needs a memory device, and no functions of the host can \
             come to it; leave `max_memory_mib` or `hot_plug` out"
                .into(),
        ));
    }
    match config.memory_mib.checked_sub(snapshot.memory_mib) {
        Some(0) => {}
        Some(more) if grows && more.is_multiple_of(GROWTH_STEP_MIB) => {}
        _ => {
            return Err(MachineError::Config(format!(
                "the saved machine has {} MiB of memory, and {} are wanted; with a memory device \
                 there can be more, by a multiple of {GROWTH_STEP_MIB}",
                snapshot.memory_mib, config.memory_mib
            )));
        }
    }
    if config.devices.len() < snapshot.devices.len() {
        return Err(MachineError::Config(format!(
            "the saved machine has {} devices, and {} are given; give all of them",
            snapshot.devices.len(),
            config.devices.len()
        )));
    }
    if config.devices.iter().any(|device| passed_functions(device).is_some()) {
        return Err(MachineError::Config(
            "a restored machine cannot begin with functions of the host, which the saved one had \
             not; boot it, or add them once it runs"
                .into(),
        ));
    }
    if config.devices.iter().any(|device| matches!(device, DeviceConfig::VhostUser { .. })) {
        return Err(MachineError::Config(
            "a restored machine has memory of its own, which no vhost-user backend can see; boot it"
                .into(),
        ));
    }
    Ok(())
}

/// A guest that has looked at its processor once counts on what it saw.
fn check_processor(
    own: &[Vec<kvm_cpuid_entry2>],
    saved: &[Vec<kvm_cpuid_entry2>],
) -> Result<(), MachineError> {
    match own.iter().zip(saved).find_map(|(own, saved)| differing_leaf(own, saved)) {
        None => Ok(()),
        Some((leaf, subleaf)) => Err(MachineError::Processor { leaf, subleaf }),
    }
}

impl Machine {
    /// Builds the machine that was saved.
    ///
    /// # Errors
    /// The state is none of this machine's, or the host does not allow it. Nothing is left behind
    /// but what ends with the process.
    pub fn restore(
        config: RestoreConfig,
        mut descriptors: Descriptors,
        guest_connected: GuestConnected,
    ) -> Result<Self, MachineError> {
        super::check_common(config.version, config.vcpus, config.memory_mib, &config.devices)?;
        let mut marks = Vec::new();
        let mut mark = |name: &str| marks.push((name.to_owned(), monotonic_ns()));
        let mut state = File::from(descriptors.take(config.state, "the saved state")?);
        let snapshot = Snapshot::read(&mut state)?;
        check(&config, &snapshot)?;
        mark("state read");

        let kvm = kvm::adopt(descriptors.take(config.kvm, "/dev/kvm")?)?;
        let vm = Vm::new(&kvm)?;
        let memory = File::from(descriptors.take(config.memory, "the saved memory")?);
        let room = super::room(snapshot.memory_mib, config.memory_mib);
        let most_mib = Growing::most_mib(config.memory_mib, config.max_memory_mib);
        let most = super::room(snapshot.memory_mib, most_mib).present;
        let image = memory.try_clone().map_err(ImageError::Map)?;
        let saved = (memory, snapshot.empty.as_slice());
        let ram = map_saved_ram(u64::from(snapshot.memory_mib) << 20, saved, room, most)?;
        vm.set_memory(&ram, room.start + room.present)?;
        if let Some(bytes) = snapshot.image_bytes {
            vm.set_image(&Image::saved(image, image_offset(snapshot.memory_mib), bytes)?)?;
        }
        mark("vm created");

        let supported = kvm::supported_cpuid(&kvm)?;
        let made = vcpus::create(&supported, &vm, 0..config.vcpus, snapshot.max_vcpus, 0)?;
        check_processor(&made.cpuid, &snapshot.cpuid)?;
        vcpus::restore(&made.vcpus, &snapshot.vcpus)?;
        vm.apply(&snapshot.vm)?;
        mark("vcpus restored");

        let workers = super::start_workers(&config.devices, None)?;
        // As the guest was told when it booted: the processor is the same.
        let high_window = layout::high_window(cpuid::physical_address_bits(&supported));
        let pci = PciBus::with_high_window(high_window.clone());
        let platform = Arc::new(Platform { ports: Ports::new(None), pci });
        let passed = Passed::new(&vm, &ram, &platform, high_window);
        let late = Late::new(&vm, &ram, &platform, &workers);
        let (disks, interfaces) = (Disks(late.clone()), Interfaces(late));
        let memory = (room, passed.discards());
        let mut assembly = Assembly::new(&vm, &ram, &platform, workers, passed, memory);
        let mut guest_connected = Some(guest_connected);
        vm.hold_lines();
        let saved = snapshot.devices.iter().map(Some).chain(std::iter::repeat(None));
        for ((number, device), saved) in config.devices.into_iter().enumerate().zip(saved) {
            assembly.add(number, device, saved, &mut descriptors, &mut guest_connected)?;
        }
        assembly.settle()?;
        vm.attach_held()?;
        let Assembly { vsock, passed, demand, .. } = assembly;
        let grows = demand.filter(|_| config.max_memory_mib.is_some());
        let growing = grows.map(|demand| Growing {
            bounds: Bounds {
                memory_mib: (snapshot.memory_mib, most_mib),
                max_vcpus: snapshot.max_vcpus,
            },
            room,
            demand,
            supported,
            vcpus: config.vcpus,
        });
        renew_generation(&vm, &ram)?;
        mark("devices restored");
        let report = BootReport { marks, functions: None, backends: Vec::new() };
        let (vcpus, hot_plug) = (made.vcpus, config.hot_plug);
        let (saving, backends) = (None, Vec::new());
        Ok(Self {
            platform,
            vcpus,
            vsock,
            vm,
            passed,
            disks,
            interfaces,
            backends,
            hot_plug,
            report,
            saving,
            growing,
        })
    }
}

/// Gives the guest another generation, and tells it as soon as it runs.
fn renew_generation(vm: &Vm, ram: &crate::memory::GuestRam) -> Result<(), MachineError> {
    generation::renew(ram)?;
    // Not by an event, which KVM would take off its list again, and wait until nobody looks at it.
    Ok(vm.raise_pin(layout::GENERATION_GSI)?)
}
