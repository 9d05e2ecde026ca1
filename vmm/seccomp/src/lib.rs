//! Makes one short program for seccomp(2) of rules for system calls, for the jail of the VMM and for its threads.
//!
//! For each instruction of a program that is installed the kernel does some thousand of its own: it checks it, translates it
//! twice, and compiles it in several passes. A VM installs half a dozen programs before its guest runs. seccompiler makes
//! several instructions of each call, and of each value that an argument may have; here it is one of either. Its programs
//! are what the tests compare with.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, sock_filter};

/// What an argument has to be for a rule to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// Which of the call's six, from 0.
    argument: u8,
    /// Whether that is about its upper 32 bits, and not the lower ones.
    upper: bool,
    mask: u32,
    value: u32,
}

impl Condition {
    /// The lower 32 bits are that. Whether that is all of the argument, only the call knows.
    pub const fn is(argument: u8, value: u32) -> Self {
        Self::masked(argument, u32::MAX, value)
    }

    /// The lower 32 bits are `value` in the bits of `mask`.
    pub const fn masked(argument: u8, mask: u32, value: u32) -> Self {
        Self { argument, upper: false, mask, value }
    }

    /// The upper 32 bits are that.
    pub const fn upper_is(argument: u8, value: u32) -> Self {
        Self { argument, upper: true, mask: u32::MAX, value }
    }

    /// Whether it is about all bits of the same word as `other`.
    fn is_of_the_word_of(&self, other: &Self) -> bool {
        (self.argument, self.upper, self.mask) == (other.argument, other.upper, u32::MAX)
    }
}

/// What is let through of a call: that for which all conditions of one of these rules hold.
pub type CallRules = Vec<Vec<Condition>>;

/// What is let through, by the calls' numbers. A call without rules is, whatever its arguments.
pub type Rules = BTreeMap<i64, CallRules>;

/// The rules make no program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleError {
    /// A rule for a call has more conditions than a jump reaches over.
    Rule(i64),
    /// No call has that many arguments.
    Argument(u8),
}

impl std::fmt::Display for RuleError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rule(call) => write!(f, "a rule for system call {call} has too many conditions"),
            Self::Argument(argument) => write!(f, "no system call has an argument {argument}"),
        }
    }
}

impl std::error::Error for RuleError {}

// Linux include/uapi/linux/bpf_common.h.
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
// Where a program finds what is asked (Linux include/uapi/linux/seccomp.h, `struct seccomp_data`).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// Linux include/uapi/linux/audit.h, AUDIT_ARCH_X86_64.
const X86_64: u32 = 0xc000_003e;

/// How many values are looked for before the answer for them: as far as a jump reaches. More answers, nearer to what leads to
/// them, make the kernel's compiler slower.
const REACH: usize = 256;

/// The program that answers with `matched` for what the rules let through, with `otherwise` for everything else, and kills
/// what calls by another architecture's numbers.
///
/// # Errors
/// [`RuleError`].
pub fn program(
    rules: &Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, RuleError> {
    program_without(rules, &[], otherwise, matched)
}

/// As [`program`], of a kernel that has no calls of the numbers of `absent`: it answers those with `ENOSYS`, whatever the rules
/// say of them.
///
/// # Errors
/// [`RuleError`].
pub fn program_without(
    rules: &Rules,
    absent: &[i64],
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, RuleError> {
    let kill = answer(SeccompAction::KillProcess);
    let none = answer(SeccompAction::Errno(libc::ENOSYS.cast_unsigned()));
    let (otherwise, matched) = (answer(otherwise), answer(matched));
    // The kernel's numbers have 32 bits.
    let is = |call: i64, yes, no| instruction(JUMP_IF_EQUAL, (yes, no), call as u32);
    let mut program = vec![
        instruction(LOAD_WORD, (0, 0), ARCHITECTURE),
        instruction(JUMP_IF_EQUAL, (1, 0), X86_64),
        kill,
        instruction(LOAD_WORD, (0, 0), NUMBER),
    ];
    for call in absent {
        program.extend([is(*call, 0, 1), none.clone()]);
    }
    let (always, asked): (Vec<_>, Vec<_>) = rules.iter().partition(|(_, rules)| rules.is_empty());
    let numbers: Vec<u32> = always.iter().map(|(call, _)| **call as u32).collect();
    look_for(&numbers, &matched, &mut program);
    // What looks at arguments comes behind the answer for all other calls.
    let mut blocks = Vec::new();
    for (left, (call, rules)) in (1..=asked.len()).rev().zip(&asked) {
        let over = 2 * (left - 1) + 1 + blocks.len();
        program.extend([is(**call, 0, 1), instruction(JUMP, (0, 0), over as u32)]);
        blocks.extend(block(**call, rules, &otherwise, &matched)?);
    }
    program.push(otherwise);
    program.extend(blocks);
    Ok(program)
}

/// Answers when the word that was loaded is one of some values.
fn look_for(values: &[u32], matched: &sock_filter, program: &mut BpfProgram) {
    for reached in values.chunks(REACH) {
        for (left, value) in (0..reached.len()).rev().zip(reached) {
            // Over the others, or over the answer behind the last.
            let no = u8::from(left == 0);
            program.push(instruction(JUMP_IF_EQUAL, (left as u8, no), *value));
        }
        program.push(matched.clone());
    }
}

/// What looks at the arguments of a call, and comes to an answer.
fn block(
    call: i64,
    rules: &CallRules,
    otherwise: &sock_filter,
    matched: &sock_filter,
) -> Result<BpfProgram, RuleError> {
    let mut block = Vec::new();
    // The values of one word are looked for at once.
    let word = rules.iter().find_map(|rule| match rule[..] {
        [condition] if condition.is_of_the_word_of(&condition) => Some(condition),
        _ => None,
    });
    let is_value = |rule: &&Vec<Condition>| {
        word.is_some_and(|word| rule.len() == 1 && rule[0].is_of_the_word_of(&word))
    };
    if let Some(word) = word {
        let values: Vec<u32> = rules.iter().filter(is_value).map(|rule| rule[0].value).collect();
        block.push(load(&word)?);
        look_for(&values, matched, &mut block);
    }
    for rule in rules.iter().filter(|rule| !is_value(rule)) {
        let mut steps = Vec::new();
        for condition in rule {
            steps.push(load(condition)?);
            if condition.mask != u32::MAX {
                steps.push(instruction(AND, (0, 0), condition.mask));
            }
            steps.push(instruction(JUMP_IF_EQUAL, (0, 0), condition.value));
        }
        steps.push(matched.clone());
        let length = steps.len();
        for (index, step) in steps.iter_mut().enumerate() {
            if step.code == JUMP_IF_EQUAL {
                // To the next rule.
                step.jf = u8::try_from(length - index - 1).map_err(|_| RuleError::Rule(call))?;
            }
        }
        block.extend(steps);
    }
    block.push(otherwise.clone());
    Ok(block)
}

fn load(condition: &Condition) -> Result<sock_filter, RuleError> {
    if condition.argument > 5 {
        return Err(RuleError::Argument(condition.argument));
    }
    let at = ARGUMENTS + 8 * u32::from(condition.argument) + 4 * u32::from(condition.upper);
    Ok(instruction(LOAD_WORD, (0, 0), at))
}

fn answer(action: SeccompAction) -> sock_filter {
    instruction(RETURN, (0, 0), action.into())
}

fn instruction(code: u16, (jt, jf): (u8, u8), k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests;
