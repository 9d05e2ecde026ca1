//! The virtual machine as KVM has it: memory slots, interrupt lines and doorbells. All calls that
//! need `unsafe` on the way to KVM are in this file.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, KvmIrqRouting, kvm_clock_data, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_irqchip,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, DeviceFd, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::{FIRST_MSI_GSI, IMAGE_START, KVM_IDENTITY_MAP_START, KVM_TSS_START};
use crate::devices::vfio::function::Windows;
use crate::devices::vfio::requests::DeviceMemory;
use crate::memory::{GuestRam, Image};
use crate::pci::bus::lock;
use crate::pci::line::{MsiError, MsiMessage, MsiRouter};
use crate::virtio::pci::{Doorbells, TransportError};
use serde::{Deserialize, Serialize};

/// The slot of the guest's image. Those before it are of guest memory, those behind it of windows.
const IMAGE_SLOT: u32 = 63;
const FIRST_WINDOW_SLOT: u32 = 64;
/// The first slot of memory that comes while the machine runs: behind all windows. KVM has 32764.
const FIRST_MORE_SLOT: u32 = 4096;
const MORE_SLOTS: u32 = 16384;
/// PIC, second PIC, I/O APIC: their numbers from 0.
const INTERRUPT_CONTROLLERS: u32 = 3;
/// KVM's own limit of lines (KVM_MAX_IRQ_ROUTES).
const MAX_GSI: u32 = 4096;

/// Why KVM could not give a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The descriptor is not KVM's, or KVM is of another age.
    #[error(
        "the descriptor given as /dev/kvm answers with API version {0}, not {KVM_API_VERSION}; \
         give an open /dev/kvm"
    )]
    Version(i32),
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}; run a newer kernel")]
    Missing(&'static str),
    /// KVM refused.
    #[error("KVM could not {action}: {source}")]
    Refused {
        /// What was asked for.
        action: &'static str,
        /// Its answer.
        source: kvm_ioctls::Error,
    },
}

fn refused(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Refused { action, source }
}

/// Takes a descriptor of `/dev/kvm`.
///
/// # Errors
/// It is something else, or KVM lacks what a VM needs.
pub fn adopt(descriptor: OwnedFd) -> Result<Kvm, KvmError> {
    // SAFETY: the descriptor is owned, so nobody else closes it. Should it not be KVM's, the
    // version below tells before anything else is asked of it.
    let kvm = unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) };
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        version => return Err(KvmError::Version(version)),
    }
    let needed = [
        (Cap::Irqchip, "an interrupt controller (KVM_CAP_IRQCHIP)"),
        (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
        (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
        (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
        (Cap::ReadonlyMem, "memory that guests only read (KVM_CAP_READONLY_MEM)"),
        (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
        (Cap::ExtCpuid, "CPUID (KVM_CAP_EXT_CPUID)"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(KvmError::Missing(what)),
        None => Ok(kvm),
    }
}

/// What KVM tells of an internal error (KVM_EXIT_INTERNAL_ERROR) that a vCPU just left the guest by.
pub fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: every variant of this union is plain integers, so whatever KVM wrote last can be
    // read as this one.
    let error = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = (error.ndata as usize).min(error.data.len());
    format!("internal error {} with {:x?}", error.suberror, &error.data[..count])
}

/// What CPUID can answer on this host.
///
/// # Errors
/// KVM refuses.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("tell what CPUID it supports"))
}

/// The numbers of the model-specific registers that make up a vCPU's state on this host.
///
/// # Errors
/// KVM refuses.
pub fn state_registers(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(refused("list the model-specific registers"))?;
    Ok(list.as_slice().to_vec())
}

/// Sets floating point and vector registers.
///
/// # Errors
/// KVM refuses.
pub fn set_extended_state(vcpu: &VcpuFd, state: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads 4096 bytes, the size of the structure, unless the process has asked for
    // features of the processor that are off by default (arch_prctl(2),
    // ARCH_REQ_XCOMP_GUEST_PERM), which nothing here does.
    unsafe { vcpu.set_xsave(state) }
}

/// What a machine holds besides its vCPUs, as far as KVM keeps it.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    /// The two PICs and the I/O APIC.
    interrupt_controllers: Vec<kvm_irqchip>,
    /// The paravirtual clock, in nanoseconds.
    clock_ns: u64,
}

/// A virtual machine.
pub struct Vm {
    fd: VmFd,
    lines: Mutex<Lines>,
    /// What the memory slots point to: it stays mapped for as long as KVM may use it.
    ram: OnceLock<GuestRam>,
    /// The same, of passed functions, by the number of the slot. One is taken out when its slot is
    /// gone, and its number given to another.
    windows: Mutex<Vec<Option<Window>>>,
    /// What tells KVM of passed functions (KVM_DEV_VFIO), once there were any. A
    /// machine can have but one.
    vfio: Mutex<Option<DeviceFd>>,
    /// How many slots there are of memory that came while the machine ran.
    more_slots: Mutex<u32>,
}

/// A part of a function's memory, and whether a slot shows it.
struct Window {
    memory: DeviceMemory,
    placed: bool,
}

#[derive(Default)]
struct Lines {
    allocated: u32,
    /// Of those, the ones that were given back.
    free: Vec<u32>,
    routes: BTreeMap<u32, MsiMessage>,
    attached: std::collections::BTreeSet<u32>,
    /// While many are attached one after the other: those of which KVM is to be told, and by which events.
    held: Option<Vec<(u32, Arc<EventFd>)>>,
}

impl Vm {
    /// A machine with interrupt controllers, but no memory and no vCPUs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn new(kvm: &Kvm) -> Result<Arc<Self>, KvmError> {
        let fd = kvm.create_vm().map_err(refused("create a virtual machine"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP_START)
            .map_err(refused("place its identity map"))?;
        fd.set_tss_address(KVM_TSS_START as usize).map_err(refused("place its task segment"))?;
        fd.create_irq_chip().map_err(refused("create interrupt controllers"))?;
        Ok(Arc::new(Self {
            fd,
            lines: Mutex::default(),
            ram: OnceLock::new(),
            windows: Mutex::default(),
            vfio: Mutex::default(),
            more_slots: Mutex::default(),
        }))
    }

    /// Gives the machine its memory, once: a slot for each region, up to the address `end`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_memory(&self, ram: &GuestRam, end: u64) -> Result<(), KvmError> {
        let ram = self.ram.get_or_init(|| ram.clone());
        for (slot, region) in (0..).zip(ram.iter()) {
            let start = region.start_addr().0;
            let bytes = region.len().min(end.saturating_sub(start));
            self.set_slot(slot, region, 0, bytes)?;
        }
        Ok(())
    }

    /// Gives it more of the memory that it was set: the addresses of `range`, which are of one
    /// region and in no slot.
    ///
    /// # Errors
    /// They are not of one region, there were too many before, or KVM refuses.
    pub fn add_memory(&self, range: Range<u64>) -> Result<(), KvmError> {
        let refuse =
            |errno| refused("take more of the guest's memory")(kvm_ioctls::Error::new(errno));
        let region = self
            .ram
            .get()
            .and_then(|ram| ram.find_region(GuestAddress(range.start)))
            .filter(|region| range.start < range.end && range.end - 1 <= region.last_addr().0)
            .ok_or_else(|| refuse(libc::EFAULT))?;
        let mut more = lock(&self.more_slots);
        if *more >= MORE_SLOTS {
            return Err(refuse(libc::ENOSPC));
        }
        let offset = range.start - region.start_addr().0;
        self.set_slot(FIRST_MORE_SLOT + *more, region, offset, range.end - range.start)?;
        *more += 1;
        Ok(())
    }

    /// A slot for so many bytes from an offset of a region on, all of which are of it.
    fn set_slot(
        &self,
        slot: u32,
        region: &GuestRegionMmap,
        offset: u64,
        bytes: u64,
    ) -> Result<(), KvmError> {
        if bytes == 0 {
            return Ok(());
        }
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0 + offset,
            memory_size: bytes,
            userspace_addr: region.as_ptr() as u64 + offset,
        };
        // SAFETY: the range is within a mapping of guest memory, which `self` keeps mapped until
        // the machine's descriptor is closed (fields are dropped in order).
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(refused("take the guest's memory"))
    }

    /// Shows the guest its image. What it writes there comes to the VMM as to a device's registers, at an address where none
    /// are.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_image(&self, image: &Image) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot: IMAGE_SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: IMAGE_START,
            memory_size: image.bytes(),
            userspace_addr: image.address(),
        };
        // SAFETY: an image stays mapped for as long as the process lives, and nothing in it writes there.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(refused("take the guest's image"))
    }

    /// Takes a part of a function's memory, which no slot shows yet, and returns its number.
    pub fn add_window(&self, memory: DeviceMemory) -> u32 {
        let mut windows = lock(&self.windows);
        let window = Window { memory, placed: false };
        // A function has a handful of them.
        match windows.iter().position(Option::is_none) {
            Some(free) => {
                windows[free] = Some(window);
                free as u32
            }
            None => {
                windows.push(Some(window));
                (windows.len() - 1) as u32
            }
        }
    }

    /// Tells KVM of functions, by their groups or by themselves, so that it knows whether their DMA
    /// is coherent.
    ///
    /// # Errors
    /// KVM refuses, or the descriptors are of another kind.
    pub fn join_files(&self, files: &[impl AsRawFd]) -> Result<(), KvmError> {
        let mut device = lock(&self.vfio);
        if device.is_none() {
            let mut create =
                kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
            let made = self.fd.create_device(&mut create);
            *device = Some(made.map_err(refused("make its VFIO device"))?);
        }
        let tell = |file| tell_of_file(device.as_ref(), file, KVM_DEV_VFIO_FILE_ADD);
        files.iter().try_for_each(tell).map_err(refused("take a file of VFIO's"))
    }

    /// Lets KVM forget functions, whose descriptors it keeps open otherwise. All are tried.
    ///
    /// # Errors
    /// KVM does not know one of them.
    pub fn leave_files(&self, files: &[impl AsRawFd]) -> Result<(), KvmError> {
        let device = lock(&self.vfio);
        let tell = |file| tell_of_file(device.as_ref(), file, KVM_DEV_VFIO_FILE_DEL);
        let left = files.iter().map(tell).fold(Ok(()), Result::and);
        left.map_err(refused("let go of a file of VFIO's"))
    }

    /// Makes a vCPU.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(index.into()).map_err(refused("create a vCPU"))
    }

    /// What the machine holds besides its vCPUs. None of those may be in the guest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn state(&self) -> Result<VmState, KvmError> {
        let controller = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map(|()| chip)
        };
        let interrupt_controllers = (0..INTERRUPT_CONTROLLERS)
            .map(controller)
            .collect::<Result<_, _>>()
            .map_err(refused("read an interrupt controller"))?;
        let clock = self.fd.get_clock().map_err(refused("read the guest's clock"))?;
        Ok(VmState { interrupt_controllers, clock_ns: clock.clock })
    }

    /// Gives the machine, whose vCPUs were never run, what another one held.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn apply(&self, state: &VmState) -> Result<(), KvmError> {
        for chip in state.interrupt_controllers.iter().take(INTERRUPT_CONTROLLERS as usize) {
            self.fd.set_irqchip(chip).map_err(refused("set an interrupt controller"))?;
        }
        // Without flags: the clock goes on from there, whatever time has passed meanwhile.
        let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).map_err(refused("set the guest's clock"))
    }

    /// Lets each write to `event` raise the edge-triggered pin `gsi` of the I/O APIC.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn attach_pin(&self, gsi: u32, event: &EventFd) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).map_err(refused("attach an interrupt pin"))
    }

    /// Raises the edge-triggered pin `gsi` of the I/O APIC once.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn raise_pin(&self, gsi: u32) -> Result<(), KvmError> {
        let set = |level| self.fd.set_irq_line(gsi, level);
        set(true).and_then(|()| set(false)).map_err(refused("raise an interrupt pin"))
    }

    /// Attaches lines only when [`Vm::attach_held`] is called: all at once, since for each table of messages KVM waits until
    /// nobody looks at the one before.
    pub fn hold_lines(&self) {
        lock(&self.lines).held = Some(Vec::new());
    }

    /// Attaches the lines that were held back. What their events have told meanwhile is sent.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn attach_held(&self) -> Result<(), KvmError> {
        let mut lines = lock(&self.lines);
        let held = lines.held.take().unwrap_or_default();
        if !held.is_empty() {
            self.set_routes(&lines).map_err(refused("route interrupts"))?;
        }
        for (gsi, event) in held {
            self.fd.register_irqfd(&event, gsi).map_err(refused("attach an interrupt line"))?;
        }
        Ok(())
    }

    /// Tells KVM the messages of all lines. It takes the whole table each time.
    fn set_routes(&self, lines: &Lines) -> Result<(), kvm_ioctls::Error> {
        let pins = (0..FIRST_MSI_GSI).map(|pin| kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
            },
            ..Default::default()
        });
        let messages = lines.routes.iter().map(|(gsi, message)| kvm_irq_routing_entry {
            gsi: *gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
                },
            },
            ..Default::default()
        });
        let entries: Vec<_> = pins.chain(messages).collect();
        // It only fails for more entries than an array can have.
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.fd.set_gsi_routing(&routing)
    }
}

impl MsiRouter for Vm {
    fn allocate(&self) -> Result<u32, MsiError> {
        let mut lines = lock(&self.lines);
        if let Some(gsi) = lines.free.pop() {
            return Ok(gsi);
        }
        let gsi = FIRST_MSI_GSI + lines.allocated;
        if gsi >= MAX_GSI {
            let reason = format!("KVM has no more than {MAX_GSI} lines");
            return Err(MsiError { action: "allocate", gsi, reason });
        }
        lines.allocated += 1;
        Ok(gsi)
    }

    fn attach(&self, gsi: u32, event: &Arc<EventFd>, message: MsiMessage) -> Result<(), MsiError> {
        let failed = |action| {
            move |error: kvm_ioctls::Error| MsiError { action, gsi, reason: error.to_string() }
        };
        let mut lines = lock(&self.lines);
        if lines.held.is_some() {
            lines.routes.insert(gsi, message);
            if lines.attached.insert(gsi) {
                lines.held.get_or_insert_default().push((gsi, event.clone()));
            }
            return Ok(());
        }
        // Drivers mask and unmask without changing the message: then the table stays as it is.
        if lines.routes.insert(gsi, message) != Some(message) {
            self.set_routes(&lines).map_err(failed("route"))?;
        }
        if lines.attached.insert(gsi) {
            self.fd.register_irqfd(event, gsi).map_err(failed("attach"))?;
        }
        Ok(())
    }

    fn release(&self, gsi: u32) {
        let mut lines = lock(&self.lines);
        // The next table that KVM is told is without it.
        lines.routes.remove(&gsi);
        lines.free.push(gsi);
    }

    fn detach(&self, gsi: u32, event: &EventFd) -> Result<(), MsiError> {
        let mut lines = lock(&self.lines);
        let held = lines.held.as_mut().map_or(0, |held| {
            let before = held.len();
            held.retain(|(line, _)| *line != gsi);
            before - held.len()
        });
        if lines.attached.remove(&gsi) && held == 0 {
            self.fd.unregister_irqfd(event, gsi).map_err(|error| MsiError {
                action: "detach",
                gsi,
                reason: error.to_string(),
            })?;
        }
        Ok(())
    }
}

impl Vm {
    fn show(&self, window: u32, shown: &mut Window, at: Option<u64>) -> io::Result<()> {
        let slot = |at: u64, memory_size: u64| kvm_userspace_memory_region {
            slot: FIRST_WINDOW_SLOT + window,
            flags: 0,
            guest_phys_addr: at,
            memory_size,
            userspace_addr: shown.memory.address(),
        };
        let set = |slot| {
            // SAFETY: the range is a mapping of a function's memory, which is the guest's to use
            // and stays mapped until its slot is gone: `release` takes it out of `windows` after
            // that only, and otherwise fields are dropped in order, the machine's descriptor first.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(io::Error::from)
        };
        // A slot cannot be changed, only removed.
        if shown.placed {
            set(slot(0, 0))?;
            shown.placed = false;
        }
        if let Some(at) = at {
            set(slot(at, shown.memory.bytes()))?;
            shown.placed = true;
        }
        Ok(())
    }
}

impl Windows for Vm {
    fn place(&self, window: u32, at: Option<u64>) -> io::Result<()> {
        let mut windows = lock(&self.windows);
        match windows.get_mut(window as usize) {
            Some(Some(shown)) => self.show(window, shown, at),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn release(&self, window: u32) {
        let mut windows = lock(&self.windows);
        let Some(taken) = windows.get_mut(window as usize) else { return };
        let hidden = taken.as_mut().map_or(Ok(()), |shown| self.show(window, shown, None));
        match hidden {
            Ok(()) => *taken = None,
            // It stays mapped, since the guest may reach it.
            Err(error) => tracing::error!(%error, "memory of a function stays with the guest"),
        }
    }
}

/// Adds or removes a file of KVM's. A kernel that knows only groups has the same numbers for them.
fn tell_of_file(
    device: Option<&DeviceFd>,
    file: &impl AsRawFd,
    what: u32,
) -> Result<(), kvm_ioctls::Error> {
    let Some(device) = device else { return Ok(()) };
    let descriptor = file.as_raw_fd();
    let attribute = kvm_device_attr {
        group: KVM_DEV_VFIO_FILE,
        attr: what.into(),
        addr: (&raw const descriptor) as u64,
        flags: 0,
    };
    device.set_device_attr(&attribute)
}

impl Doorbells for Vm {
    fn watch(&self, address: u64, event: &EventFd) -> Result<(), TransportError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|error| TransportError::Doorbell { address, reason: error.to_string() })
    }

    fn unwatch(&self, address: u64, event: &EventFd) -> Result<(), TransportError> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|error| TransportError::Doorbell { address, reason: error.to_string() })
    }
}
