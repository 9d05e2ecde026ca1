//! Looks at the agent program before it goes into the image: a program that cannot start as /init is refused here,
//! with a reason, and not by a kernel panic in every pod. Fields are those of ELF-64 (System V gABI, chapter 4 and 5).

use anyhow::{Result, bail};

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_INTERP: u32 = 3;

/// An error, with a remedy, unless the bytes are a static x86-64 program.
pub(crate) fn check(program: &[u8]) -> Result<()> {
    if program.len() < HEADER_BYTES || !program.starts_with(b"\x7fELF") {
        bail!("it is no ELF program; name the vial-agent that cargo built");
    }
    if program[4] != CLASS_64
        || program[5] != LITTLE_ENDIAN
        || u16_at(program, 18)? != MACHINE_X86_64
    {
        bail!("it is no x86-64 program; build it for x86_64-unknown-linux-gnu");
    }
    if ![TYPE_EXEC, TYPE_DYN].contains(&u16_at(program, 16)?) {
        bail!("it is an object file or a core, no program; name the vial-agent that cargo built");
    }
    let table = u64_at(program, 32)?;
    let entry_bytes = usize::from(u16_at(program, 54)?);
    let count = usize::from(u16_at(program, 56)?);
    if count == 0 || entry_bytes < PROGRAM_HEADER_BYTES {
        bail!("its program headers are damaged; build it again");
    }
    for index in 0..count {
        let offset =
            usize::try_from(table).ok().and_then(|table| table.checked_add(index * entry_bytes));
        if u32_at(program, offset.unwrap_or(usize::MAX))? == SEGMENT_INTERP {
            bail!(
                "it is linked dynamically, and the image has no libraries; build it with \
                 RUSTFLAGS='-C target-feature=+crt-static', as 'make build' does"
            );
        }
    }
    Ok(())
}

fn bytes_at<const N: usize>(program: &[u8], offset: usize) -> Result<[u8; N]> {
    let found = offset.checked_add(N).and_then(|end| program.get(offset..end));
    match found.and_then(|bytes| bytes.try_into().ok()) {
        Some(bytes) => Ok(bytes),
        None => bail!("it is cut short; build it again"),
    }
}

fn u16_at(program: &[u8], offset: usize) -> Result<u16> {
    bytes_at(program, offset).map(u16::from_le_bytes)
}

fn u32_at(program: &[u8], offset: usize) -> Result<u32> {
    bytes_at(program, offset).map(u32::from_le_bytes)
}

fn u64_at(program: &[u8], offset: usize) -> Result<u64> {
    bytes_at(program, offset).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest thing that passes: a header and one loadable segment.
    pub(crate) fn static_program() -> Vec<u8> {
        let mut program = vec![0; HEADER_BYTES + PROGRAM_HEADER_BYTES];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[16..18].copy_from_slice(&TYPE_EXEC.to_le_bytes());
        program[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        program[32..40].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
        program[54..56].copy_from_slice(&(PROGRAM_HEADER_BYTES as u16).to_le_bytes());
        program[56..58].copy_from_slice(&1u16.to_le_bytes());
        program[HEADER_BYTES] = 1;
        program
    }

    fn refusal(program: &[u8]) -> String {
        check(program).unwrap_err().to_string()
    }

    #[test]
    fn check_static_program_passes() {
        check(&static_program()).unwrap();
    }

    #[test]
    fn check_dynamic_program_is_refused() {
        let mut program = static_program();
        program[HEADER_BYTES] = SEGMENT_INTERP as u8;
        assert!(refusal(&program).contains("crt-static"));
    }

    #[test]
    fn check_other_files_are_refused() {
        assert!(refusal(b"#!/bin/sh\n").contains("no ELF"));
        let mut arm = static_program();
        arm[18] = 183;
        assert!(refusal(&arm).contains("x86-64"));
        let mut object = static_program();
        object[16] = 1;
        assert!(refusal(&object).contains("object file"));
    }

    #[test]
    fn check_program_cut_anywhere_is_refused_without_panic() {
        let program = static_program();
        for length in 0..HEADER_BYTES + 4 {
            assert!(check(&program[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn check_program_headers_far_away_are_refused() {
        let mut program = static_program();
        program[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refusal(&program).contains("cut short"));
    }
}
