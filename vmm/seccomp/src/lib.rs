//! Makes one short program for seccomp(2) of rules for system calls, for the jail of the VMM and for its threads.
//!
//! For each instruction of a program that is installed the kernel does some thousand of its own: it checks it, translates it
//! twice, and compiles it in several passes. A VM installs half a dozen programs before its guest runs. seccompiler makes
//! several instructions of each call, and of each value that an argument may have; here it is one of either. Its programs are
//! what the tests compare with.

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
    /// There are more calls than a jump reaches.
    Calls(usize),
    /// There are more rules for a call than a jump reaches.
    Rules(i64),
    /// No call has that many arguments.
    Argument(u8),
}

impl std::fmt::Display for RuleError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Calls(calls) => write!(f, "{calls} system calls are more than a jump reaches"),
            Self::Rules(call) => write!(f, "system call {call} has too many rules"),
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

/// The most instructions that find a call, so that a jump leads from the first of them to what follows the last.
const MOST_OF_HEAD: usize = u8::MAX as usize;

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
    let kill = answer(SeccompAction::KillProcess);
    let (otherwise, matched) = (answer(otherwise), answer(matched));
    let mut blocks = Vec::new();
    let mut starts = BTreeMap::new();
    for (call, rules) in rules.iter().filter(|(_, rules)| !rules.is_empty()) {
        starts.insert(*call, blocks.len());
        blocks.extend(block(*call, rules, &otherwise, &matched)?);
    }
    let mut program = vec![
        instruction(LOAD_WORD, (0, 0), ARCHITECTURE),
        instruction(JUMP_IF_EQUAL, (1, 0), X86_64),
        kill,
        instruction(LOAD_WORD, (0, 0), NUMBER),
    ];
    // First all calls, then the two answers, then what looks at arguments.
    let head = rules.len() + starts.len();
    if head > MOST_OF_HEAD {
        return Err(RuleError::Calls(rules.len()));
    }
    let mut at = 0;
    for call in rules.keys() {
        let number = *call as u32; // The kernel's numbers have 32 bits.
        match starts.get(call) {
            // To the second answer.
            None => program.push(instruction(JUMP_IF_EQUAL, ((head - at) as u8, 0), number)),
            Some(start) => {
                program.push(instruction(JUMP_IF_EQUAL, (0, 1), number));
                at += 1;
                program.push(instruction(JUMP, (0, 0), (head - at + 1 + start) as u32));
            }
        }
        at += 1;
    }
    program.extend([otherwise, matched]);
    program.extend(blocks);
    Ok(program)
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
        for (index, value) in values.iter().enumerate() {
            // Over the other values, and over the jump behind them.
            let over = u8::try_from(values.len() - index).map_err(|_| RuleError::Rules(call))?;
            block.push(instruction(JUMP_IF_EQUAL, (over, 0), *value));
        }
        block.extend([instruction(JUMP, (0, 0), 1), matched.clone()]);
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
                step.jf = u8::try_from(length - index - 1).map_err(|_| RuleError::Rules(call))?;
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
