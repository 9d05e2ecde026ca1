//! Which devices a container may open and make: a spec's rules as a program for its cgroup.
//!
//! cgroup v2 has no file for that; a BPF program of type BPF_PROG_TYPE_CGROUP_DEVICE is asked at
//! every access. As with runc everything is denied first, then the spec's rules apply in their
//! order, the last one that matches deciding, and the devices that every container has are
//! allowed in the end.
//!
//! [`Program::new`] is pure; only [`Program::attach`] calls the kernel.

use std::fs::File;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys;

/// Rules that a spec may have.
pub(crate) const MAX_RULES: usize = 1024;

/// `BPF_DEVCG_ACC_*` and `BPF_DEVCG_DEV_*` of linux/bpf.h.
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;
const BLOCK: u8 = 1;
const CHARACTER: u8 = 2;

/// What every container may do besides its rules: make any node, and use null, zero, full,
/// random, urandom, tty, ptmx and the terminals of its own devpts.
const ALWAYS: [Rule; 10] = [
    Rule::allow(CHARACTER, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHARACTER, Some(1), Some(3), ALL),
    Rule::allow(CHARACTER, Some(1), Some(5), ALL),
    Rule::allow(CHARACTER, Some(1), Some(7), ALL),
    Rule::allow(CHARACTER, Some(1), Some(8), ALL),
    Rule::allow(CHARACTER, Some(1), Some(9), ALL),
    Rule::allow(CHARACTER, Some(5), Some(0), ALL),
    Rule::allow(CHARACTER, Some(5), Some(2), ALL),
    Rule::allow(CHARACTER, Some(136), None, ALL),
];

/// Why device rules are not enforced.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error("the spec has {0} device rules; at most {MAX_RULES} are taken")]
    TooMany(usize),
    #[error("cannot load the device rules (the kernel needs CONFIG_CGROUP_BPF): {0}")]
    Load(io::Error),
    #[error("cannot attach the device rules to the container's cgroup: {0}")]
    Attach(io::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// None: block and character devices.
    kind: Option<u8>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u8,
}

impl Rule {
    const fn allow(kind: u8, major: Option<i32>, minor: Option<i32>, access: u8) -> Self {
        Rule { allow: true, kind: Some(kind), major, minor, access }
    }

    /// None for a rule that no device can match.
    fn from_spec(rule: &LinuxDeviceCgroup) -> Option<Self> {
        let kind = match rule.typ().unwrap_or_default() {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
            LinuxDeviceType::P => return None,
        };
        let access = match rule.access().as_deref().unwrap_or_default() {
            // Nothing said: the careful reading of both kinds of rules.
            "" if rule.allow() => return None,
            "" => ALL,
            letters => letters.bytes().fold(0, |access, letter| match letter {
                b'r' => access | READ,
                b'w' => access | WRITE,
                b'm' => access | MKNOD,
                _ => access,
            }),
        };
        Some(Rule {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access,
        })
    }
}

/// A device number: none or a negative one is any; one beyond every device's is no number.
fn number(number: Option<i64>) -> Option<Option<i32>> {
    match number {
        Some(number @ 0..) => i32::try_from(number).ok().map(Some),
        _ => Some(None),
    }
}

/// One instruction: `struct bpf_insn` of linux/bpf.h.
type Instruction = [u8; 8];

/// Operation codes of the BPF instruction set (RFC 9669).
mod op {
    pub(super) const LOAD_WORD: u8 = 0x61;
    pub(super) const MOVE: u8 = 0xb7;
    pub(super) const MOVE_REGISTER: u8 = 0xbf;
    pub(super) const AND: u8 = 0x57;
    pub(super) const SHIFT_RIGHT: u8 = 0x77;
    pub(super) const JUMP: u8 = 0x05;
    pub(super) const JUMP_IF_SET: u8 = 0x45;
    pub(super) const JUMP_IF_NOT: u8 = 0x55;
    pub(super) const EXIT: u8 = 0x95;
}

/// Registers: the answer, the context, and what is read from it.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Instruction {
    let [o0, o1] = offset.to_ne_bytes();
    let [v0, v1, v2, v3] = value.to_ne_bytes();
    // The two registers are four bits each, the first one in the lower half on little endian.
    let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
    [code, registers, o0, o1, v0, v1, v2, v3]
}

/// Device rules, ready for the kernel.
#[derive(Debug)]
pub(crate) struct Program(Vec<Instruction>);

impl Program {
    /// The program of a spec's rules.
    ///
    /// # Errors
    /// They are too many.
    pub(crate) fn new(rules: &[LinuxDeviceCgroup]) -> Result<Self, DeviceError> {
        if rules.len() > MAX_RULES {
            return Err(DeviceError::TooMany(rules.len()));
        }
        let mut all: Vec<Rule> = rules.iter().filter_map(Rule::from_spec).collect();
        all.extend(ALWAYS);
        Ok(Program(compile(&all)))
    }

    /// Enforces it from now on for every process in the cgroup at `path`.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn attach(&self, path: &Path) -> Result<(), DeviceError> {
        let program = sys::load_device_program(&self.0).map_err(DeviceError::Load)?;
        let cgroup = File::open(path).map_err(DeviceError::Attach)?;
        sys::attach_device_program(&cgroup, &program).map_err(DeviceError::Attach)
    }
}

/// From the last rule to the first: a denied access that is wanted ends with no; an allowed one
/// is wanted no more, and when nothing is wanted any more it ends with yes.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access << 16 | kind, major, minor.
    let mut program = vec![
        instruction(op::LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(op::MOVE_REGISTER, WANTED, KIND, 0, 0),
        instruction(op::SHIFT_RIGHT, WANTED, 0, 0, 16),
        instruction(op::AND, KIND, 0, 0, 0xffff),
        instruction(op::LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(op::LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let verdict = if rule.allow {
            [
                instruction(op::AND, WANTED, 0, 0, i32::from(ALL & !rule.access)),
                instruction(op::JUMP_IF_NOT, WANTED, 0, 2, 0),
                instruction(op::MOVE, ANSWER, 0, 0, 1),
                instruction(op::EXIT, 0, 0, 0, 0),
            ]
            .to_vec()
        } else {
            [
                instruction(op::JUMP_IF_SET, WANTED, 0, 1, i32::from(rule.access)),
                instruction(op::JUMP, 0, 0, 2, 0),
                instruction(op::MOVE, ANSWER, 0, 0, 0),
                instruction(op::EXIT, 0, 0, 0, 0),
            ]
            .to_vec()
        };
        let conditions: Vec<(u8, i32)> = [
            rule.kind.map(|kind| (KIND, i32::from(kind))),
            rule.major.map(|major| (MAJOR, major)),
            rule.minor.map(|minor| (MINOR, minor)),
        ]
        .into_iter()
        .flatten()
        .collect();
        for (at, (register, value)) in conditions.iter().enumerate() {
            // Over the conditions that follow and the verdict: seven instructions at most.
            let over = (conditions.len() - at - 1 + verdict.len()) as i16;
            program.push(instruction(op::JUMP_IF_NOT, *register, 0, over, *value));
        }
        program.extend(verdict);
    }
    program.push(instruction(op::MOVE, ANSWER, 0, 0, 0));
    program.push(instruction(op::EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    struct Access {
        kind: u8,
        major: u32,
        minor: u32,
        wanted: u8,
    }

    /// Runs a program as the kernel would, jumps backwards or outside being errors.
    fn run(program: &[Instruction], access: Access) -> bool {
        let context =
            [u32::from(access.wanted) << 16 | u32::from(access.kind), access.major, access.minor];
        let mut registers = [0u64; 6];
        let mut at = 0;
        loop {
            let [code, pair, o0, o1, value @ ..] = program[at];
            let offset = i16::from_ne_bytes([o0, o1]);
            let value = i64::from(i32::from_ne_bytes(value)) as u64;
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            let jump = match code {
                op::LOAD_WORD => {
                    registers[to] = u64::from(context[offset as usize / 4]);
                    false
                }
                op::MOVE => {
                    registers[to] = value;
                    false
                }
                op::MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                op::AND => {
                    registers[to] &= value;
                    false
                }
                op::SHIFT_RIGHT => {
                    registers[to] >>= value;
                    false
                }
                op::JUMP => true,
                op::JUMP_IF_SET => registers[to] & value != 0,
                op::JUMP_IF_NOT => registers[to] != value,
                op::EXIT => return registers[0] == 1,
                other => panic!("operation {other:#x}"),
            };
            if jump {
                assert!(offset > 0);
                at += offset as usize;
            }
        }
    }

    /// The meaning of rules, one access bit at a time: the last that matches decides.
    fn decide(rules: &[Rule], access: Access) -> bool {
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access.wanted & bit != 0).all(|bit| {
            let matching = rules.iter().rev().find(|rule| {
                rule.kind.is_none_or(|kind| kind == access.kind)
                    && rule.major.is_none_or(|major| major as u32 == access.major)
                    && rule.minor.is_none_or(|minor| minor as u32 == access.minor)
                    && rule.access & bit != 0
            });
            matching.is_some_and(|rule| rule.allow)
        })
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0..4i32);
        (any::<bool>(), prop::option::of(1..=2u8), number(), number(), 0..=ALL).prop_map(
            |(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access },
        )
    }

    proptest! {
        #[test]
        fn program_decides_as_the_rules_say(
            rules in prop::collection::vec(rule(), 0..12),
            (kind, major, minor, wanted) in (1..=2u8, 0..4u32, 0..4u32, 1..=ALL),
        ) {
            let access = Access { kind, major, minor, wanted };
            prop_assert_eq!(run(&compile(&rules), access), decide(&rules, access));
        }
    }

    fn program(rules: serde_json::Value) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        Program::new(&rules).unwrap().0
    }

    #[test]
    fn spec_rules_come_before_what_every_container_has() {
        let loop_device = Access { kind: BLOCK, major: 7, minor: 0, wanted: READ };
        let null = Access { kind: CHARACTER, major: 1, minor: 3, wanted: READ | WRITE };
        let none = program(json!([]));
        assert!(run(&none, null) && !run(&none, loop_device));
        assert!(run(&none, Access { wanted: MKNOD, ..loop_device }));
        let deny = program(json!([{"allow": false, "access": "rwm"}]));
        assert!(run(&deny, null) && !run(&deny, loop_device));
        let privileged = program(json!([{"allow": true, "access": "rwm"}]));
        assert!(run(&privileged, loop_device));
        let one = program(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "minor": -1, "access": "r"}
        ]));
        assert!(run(&one, loop_device));
        assert!(!run(&one, Access { wanted: READ | WRITE, ..loop_device }));
    }

    #[test]
    fn rules_beyond_their_bound_are_refused() {
        let rule = LinuxDeviceCgroup::default();
        assert!(Program::new(&vec![rule.clone(); MAX_RULES]).is_ok());
        let error = Program::new(&vec![rule; MAX_RULES + 1]).unwrap_err();
        assert!(matches!(error, DeviceError::TooMany(_)));
    }

    #[test]
    fn numbers_beyond_every_device_match_none() {
        let far = program(json!([{"allow": true, "major": 4_294_967_296u64, "access": "rwm"}]));
        let block = Access { kind: BLOCK, major: 0, minor: 0, wanted: READ };
        assert!(!run(&far, block));
    }
}
