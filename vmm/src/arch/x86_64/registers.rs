//! The state in which the kernel's 64-bit entry expects a vCPU (Linux
//! Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): long mode, the first gibibyte mapped
//! to itself, flat segments, interrupts off, `rsi` at the zero page.

use kvm_bindings::{
    Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    BOOT_STACK_POINTER, GDT_START, IDT_START, PD_START, PDPT_START, PML4_START, ZERO_PAGE_START,
};
use crate::memory::GuestRam;

/// Why a vCPU could not be given its first state.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// KVM refused.
    #[error("set a vCPU's {what}: {source}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM took only some of the model-specific registers.
    #[error("set a vCPU's model-specific registers: KVM refused number {0}")]
    MsrRefused(usize),
    /// The boot structures do not fit guest memory.
    #[error("write a vCPU's boot tables to guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> RegisterError {
    move |source| RegisterError::Kvm { what, source }
}

// CR0 (Intel SDM volume 3, 2.5).
const CR0_PROTECTED_MODE: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
// CR4.
const CR4_PAE: u64 = 1 << 5;
// EFER (Intel SDM volume 3, 2.2.1).
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
// Page table entries (Intel SDM volume 3, 4.5).
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_SIZE_2_MIB: u64 = 1 << 7;

// Segment descriptors: flat, and the selectors that Linux calls __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// Writes the GDT and the page tables that [`set_boot_state`] points to.
///
/// # Errors
/// Guest memory is smaller than they need.
pub fn write_boot_tables(ram: &GuestRam) -> Result<(), RegisterError> {
    for (index, entry) in (0..).zip(GDT) {
        ram.write_obj(entry, GuestAddress(GDT_START + index * 8))?;
    }
    ram.write_obj(0u64, GuestAddress(IDT_START))?;
    ram.write_obj(PDPT_START | PAGE_PRESENT_WRITABLE, GuestAddress(PML4_START))?;
    ram.write_obj(PD_START | PAGE_PRESENT_WRITABLE, GuestAddress(PDPT_START))?;
    for index in 0..512u64 {
        let entry = (index << 21) | PAGE_SIZE_2_MIB | PAGE_PRESENT_WRITABLE;
        ram.write_obj(entry, GuestAddress(PD_START + index * 8))?;
    }
    Ok(())
}

fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(selector / 8)];
    let bit = |index: u32| u8::from(descriptor >> index & 1 == 1);
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Puts the first vCPU at the kernel's 64-bit entry point. The others wait for it to start them.
///
/// # Errors
/// KVM refuses a register.
pub fn set_boot_state(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegisterError> {
    let mut sregs = vcpu.get_sregs().map_err(refused("system registers"))?;
    set_system_registers(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(refused("system registers"))?;
    let regs = kvm_regs {
        rflags: 0x2, // Bit 1 is always 1.
        rip: entry.0,
        rsp: BOOT_STACK_POINTER,
        rbp: BOOT_STACK_POINTER,
        rsi: ZERO_PAGE_START,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(refused("general registers"))?;
    // The values after FNINIT, and the reset value of MXCSR.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(refused("floating point registers"))
}

fn set_system_registers(sregs: &mut kvm_sregs) {
    let data = segment(DATA_SELECTOR);
    sregs.cs = segment(CODE_SELECTOR);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = segment(TASK_SELECTOR);
    sregs.gdt =
        kvm_dtable { base: GDT_START, limit: (size_of_val(&GDT) - 1) as u16, ..Default::default() };
    sregs.idt = kvm_dtable { base: IDT_START, limit: 7, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.cr3 = PML4_START;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
}

// Model-specific registers (Intel SDM volume 4).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets what firmware would: all memory is write-back cached, and string instructions are fast.
///
/// # Errors
/// KVM refuses one of them.
pub fn set_model_specific_registers(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MSR_MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| RegisterError::MsrRefused(0))?;
    match vcpu.set_msrs(&msrs).map_err(refused("model-specific registers"))? {
        count if count == entries.len() => Ok(()),
        count => Err(RegisterError::MsrRefused(count)),
    }
}

// Offsets and delivery modes in the local APIC (Intel SDM volume 3, 11.5.1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_NMI: u32 = 4 << 8;
const APIC_MODE_EXTINT: u32 = 7 << 8;

/// Wires the local APIC's two pins as a PC's firmware does.
///
/// # Errors
/// KVM refuses the state.
pub fn set_local_apic(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let mut lapic = vcpu.get_lapic().map_err(refused("local APIC"))?;
    set_delivery_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
    set_delivery_mode(&mut lapic, APIC_LVT_LINT1, APIC_MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(refused("local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    let mut bytes = [0u8; 4];
    for (byte, register) in bytes.iter_mut().zip(&lapic.regs[offset..]) {
        *byte = register.to_ne_bytes()[0];
    }
    let value = (u32::from_le_bytes(bytes) & !(7 << 8)) | mode;
    for (register, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = i8::from_ne_bytes([byte]) as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map_ram;

    #[test]
    fn boot_tables_map_the_first_gibibyte_to_itself() {
        let ram = map_ram(32 << 20).unwrap();
        write_boot_tables(&ram).unwrap();
        let last: u64 = ram.read_obj(GuestAddress(PD_START + 511 * 8)).unwrap();
        assert_eq!(last & !0xfff, 511 << 21);
        let code: u64 = ram.read_obj(GuestAddress(GDT_START + 16)).unwrap();
        assert_eq!(code, GDT[2]);
    }

    #[test]
    fn code_segment_is_64_bit_and_data_segment_is_writable() {
        let code = segment(CODE_SELECTOR);
        assert_eq!((code.l, code.db, code.present, code.s, code.type_), (1, 0, 1, 1, 0xb));
        let data = segment(DATA_SELECTOR);
        assert_eq!((data.l, data.present, data.s, data.type_), (0, 1, 1, 3));
    }

    #[test]
    fn delivery_mode_replaces_only_its_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT0 + 2] = 1;
        set_delivery_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
        assert_eq!(lapic.regs[APIC_LVT_LINT0 + 1], 7);
        assert_eq!(lapic.regs[APIC_LVT_LINT0 + 2], 1);
    }
}
