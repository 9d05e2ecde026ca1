//! A copy of the emulator without the fault by which it loses VMs.
//!
//! QEMU's VMRUN (`helper_vmrun` in `target/i386/tcg/system/svm_helper.c`, seen in 10.0 to 11.1) delivers an interrupt that
//! KVM injects, and leaves its vector behind as a pending exception. When its loop is asked to stop before the nested guest
//! exits, it delivers the vector again, whatever the guest's interrupt flag says. `docs/development.md` tells how that was
//! found. One store does it, which nothing needs: the copy has a no-operation in its place.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What VMRUN does for an external interrupt, compiled for x86-64: its fields of the CPU's state are filled, the log is asked
/// for, `do_interrupt_x86_hardirq` is called. `None` is any byte: displacements depend on the version.
#[rustfmt::skip]
const INJECTION: [Option<u8>; 46] = {
    const fn is(byte: u8) -> Option<u8> {
        Some(byte)
    }
    const ANY: Option<u8> = None;
    [
        // mov %esi, exception_index(%rbx), below the CPU's registers
        is(0x89), is(0xb3), ANY, ANY, is(0xff), is(0xff),
        // movl $0, exception_is_int(%rbx)
        is(0xc7), is(0x83), ANY, ANY, is(0), is(0), is(0), is(0), is(0), is(0),
        // movq $-1, exception_next_eip(%rbx)
        is(0x48), is(0xc7), is(0x83), ANY, ANY, is(0), is(0), is(0xff), is(0xff), is(0xff), is(0xff),
        // testb $CPU_LOG_TB_IN_ASM, qemu_loglevel(%rip); jne
        is(0xf6), is(0x05), ANY, ANY, ANY, ANY, is(2), is(0x0f), is(0x85), ANY, ANY, ANY, ANY,
        // mov $1, %edx, the start of do_interrupt_x86_hardirq's arguments
        is(0xba), is(1), is(0), is(0), is(0), is(0x48),
    ]
};
/// Bytes of the store that goes, the first of them.
const STORE_BYTES: usize = 6;
/// nopw 0(%rax,%rax,1): Intel, Software Developer's Manual, volume 2, NOP, table 4-12.
const NO_OPERATION: [u8; STORE_BYTES] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The emulator to start: a corrected copy in `directory`, or the one found as `name` where that has no such store at exactly
/// one place, because it is compiled in another way, or without the fault.
///
/// # Errors
/// There is no such program in PATH, or the copy cannot be written.
pub(super) fn emulator(name: &str, directory: &Path) -> Result<PathBuf> {
    let found = in_path(name).with_context(|| {
        format!("there is no {name} in PATH; 'make deps' installs it on Debian and Ubuntu")
    })?;
    let mut program =
        fs::read(&found).with_context(|| format!("cannot read {}", found.display()))?;
    let Some(at) = injection(&program) else {
        return Ok(found);
    };
    program[at..at + STORE_BYTES].copy_from_slice(&NO_OPERATION);
    copied(&found, &program, directory).with_context(|| {
        format!("cannot copy the emulator to {}; is there room?", directory.display())
    })
}

/// Where the one injection of an interrupt begins.
fn injection(program: &[u8]) -> Option<usize> {
    let alike = |window: &[u8]| {
        INJECTION.iter().zip(window).all(|(expected, byte)| expected.is_none_or(|it| it == *byte))
    };
    let mut all = program.windows(INJECTION.len()).enumerate().filter(|(_, window)| alike(window));
    let (at, _) = all.next()?;
    all.next().is_none().then_some(at)
}

/// The program's copy, beside links to what it looks for from where it is: ../lib and ../share.
fn copied(found: &Path, program: &[u8], directory: &Path) -> std::io::Result<PathBuf> {
    let name = found.file_name().ok_or(std::io::ErrorKind::InvalidInput)?;
    let prefix = directory.join("emulator");
    fs::create_dir_all(prefix.join("bin"))?;
    let real = found.canonicalize()?;
    if let Some(installed) = real.parent().and_then(Path::parent) {
        for part in ["lib", "share"] {
            symlink(installed.join(part), prefix.join(part))?;
        }
    }
    let copy = prefix.join("bin").join(name);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&copy)?;
    file.write_all(program)?;
    Ok(copy)
}

/// The first executable file of that name in PATH.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| {
        fs::metadata(candidate)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(displacement: u16) -> Vec<u8> {
        let mut bytes: Vec<u8> = INJECTION.iter().map(|byte| byte.unwrap_or(0x5a)).collect();
        bytes[2..4].copy_from_slice(&displacement.to_le_bytes());
        bytes
    }

    #[test]
    fn the_one_store_is_found_wherever_it_is() {
        for before in [0, 1, 5, 4096] {
            for after in [0, 1, 4096] {
                let mut program = vec![0x89; before];
                program.extend(store(0xd710));
                program.extend(vec![0x89; after]);
                assert_eq!(injection(&program), Some(before), "{before} {after}");
            }
        }
    }

    #[test]
    fn what_differs_in_a_byte_or_ends_before_is_another() {
        let whole = store(0xd710);
        for length in 0..whole.len() {
            assert_eq!(injection(&whole[..length]), None, "{length} bytes");
        }
        for (at, expected) in INJECTION.iter().enumerate() {
            let mut program = whole.clone();
            program[at] ^= 0x10;
            assert_eq!(injection(&program).is_none(), expected.is_some(), "byte {at}");
        }
    }

    #[test]
    fn two_stores_are_left_alone() {
        let mut program = store(1);
        program.extend(store(2));
        assert_eq!(injection(&program), None);
    }

    #[test]
    fn the_installed_emulator_is_corrected_in_a_copy_that_runs() {
        let directory = tempfile::tempdir().expect("a directory");
        let name = "qemu-system-x86_64";
        let program = emulator(name, directory.path()).expect("QEMU, which 'make deps' installs");
        let installed = fs::read(in_path(name).expect("installed")).expect("readable");
        let started = fs::read(&program).expect("readable");
        assert_eq!(started.len(), installed.len());
        let changed: Vec<usize> =
            (0..started.len()).filter(|at| started[*at] != installed[*at]).collect();
        match injection(&installed) {
            Some(at) => assert!(
                !changed.is_empty() && changed.iter().all(|it| (at..at + STORE_BYTES).contains(it))
            ),
            None => assert!(changed.is_empty()),
        }
        let version = std::process::Command::new(program).arg("--version").output().expect("runs");
        assert!(String::from_utf8_lossy(&version.stdout).contains("QEMU emulator"));
    }
}
