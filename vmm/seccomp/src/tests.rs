use proptest::prelude::*;
use seccompiler::{
    SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const I386: u32 = 0x4000_0003;

/// Runs a program, and returns its answer.
fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [0; 64];
    data[..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&architecture.to_le_bytes());
    for (argument, place) in arguments.iter().zip(data[16..].chunks_exact_mut(8)) {
        place.copy_from_slice(&argument.to_le_bytes());
    }
    let (mut at, mut word) = (0, 0u32);
    loop {
        let sock_filter { code, jt, jf, k } = &program[at];
        at += 1;
        let mut jump = |yes: bool| at += usize::from(if yes { *jt } else { *jf });
        match code {
            0x20 => {
                let bytes = &data[*k as usize..*k as usize + 4];
                word = u32::from_le_bytes(bytes.try_into().unwrap());
            }
            0x54 => word &= k,
            0x15 => jump(word == *k),
            0x25 => jump(word > *k),
            0x35 => jump(word >= *k),
            0x05 => at += *k as usize,
            0x06 => return *k,
            other => panic!("no instruction of either: {other:#x}"),
        }
    }
}

/// The same rules as seccompiler understands them. It compares whole arguments or their lower halves.
fn reference(rules: &Rules) -> BpfProgram {
    let condition = |condition: &Condition| {
        let &Condition { argument, mask, value, .. } = condition;
        let how = SeccompCmpOp::MaskedEq(mask.into());
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value.into()).unwrap()
    };
    let rule =
        |rule: &Vec<Condition>| SeccompRule::new(rule.iter().map(condition).collect()).unwrap();
    let rules = rules.iter().map(|(call, rules)| (*call, rules.iter().map(rule).collect()));
    let (trap, allow) = (SeccompAction::Trap, SeccompAction::Allow);
    SeccompFilter::new(rules.collect(), trap, allow, TargetArch::x86_64)
        .unwrap()
        .try_into()
        .unwrap()
}

fn made(rules: &Rules) -> BpfProgram {
    program(rules, SeccompAction::Trap, SeccompAction::Allow).unwrap()
}

/// Few values, so that some match, and few calls, so that seccompiler's program is none that the kernel would refuse.
fn any_condition() -> impl Strategy<Value = Condition> {
    let masks = prop_oneof![3 => Just(u32::MAX), 1 => 0u32..16, 1 => Just(0xff00)];
    (0u8..3, masks, 0u32..8)
        .prop_map(|(argument, mask, value)| Condition::masked(argument, mask, value & mask))
}

fn any_rules() -> impl Strategy<Value = Rules> {
    let rule = proptest::collection::vec(any_condition(), 1..4);
    let rules = prop_oneof![
        2 => Just(Vec::new()),
        1 => proptest::collection::vec(rule, 1..6),
        // As ioctl(2) has them.
        1 => proptest::collection::vec(
            (0u32..200).prop_map(|value| vec![Condition::is(1, value)]), 1..20,
        ),
    ];
    proptest::collection::btree_map(0i64..460, rules, 1..30)
}

proptest! {
    #[test]
    fn answers_are_those_of_seccompiler(
        rules in any_rules(),
        arguments in proptest::array::uniform6(prop_oneof![0u64..16, 0u64..200, any::<u64>()]),
    ) {
        let (own, reference) = (made(&rules), reference(&rules));
        for number in (0..470).chain([u32::MAX, 1 << 30, 1 << 31]) {
            let answer = run(&own, X86_64, number, arguments);
            prop_assert_eq!(answer, run(&reference, X86_64, number, arguments), "{}", number);
            let foreign = run(&own, I386, number, arguments);
            prop_assert_eq!(foreign, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }

    #[test]
    fn whole_arguments_can_be_compared(argument in any::<u64>(), value in any::<u64>()) {
        let whole = vec![
            Condition::is(2, value as u32),
            Condition::upper_is(2, (value >> 32) as u32),
        ];
        let program = made(&Rules::from([(7, vec![whole])]));
        prop_assert_eq!(run(&program, X86_64, 7, [0, 0, value, 0, 0, 0]), ALLOW);
        let half = value ^ (argument | 1) << 32;
        for other in [argument, half, half ^ 1] {
            let answer = run(&program, X86_64, 7, [value, value, other, value, value, value]);
            prop_assert_eq!(answer == ALLOW, other == value);
        }
    }
}

#[test]
fn program_is_about_as_long_as_its_rules() {
    let values = (0..50).map(|value| vec![Condition::is(1, value)]).collect();
    let mut rules: Rules = (0..80).map(|call| (call * 3, Vec::new())).collect();
    rules.insert(16, values);
    let (own, reference) = (made(&rules).len(), reference(&rules).len());
    assert!(own < 80 + 50 + 15, "{own} instructions");
    assert!(own * 3 < reference, "{own} instructions, and seccompiler's has {reference}");
}

#[test]
fn many_calls_and_values_are_all_found() {
    let rules: Rules = (0..300).map(|call| (call, Vec::new())).collect();
    let most = made(&rules);
    assert!((0..300).all(|call| run(&most, X86_64, call, [0; 6]) == ALLOW));
    assert_ne!(run(&most, X86_64, 300, [0; 6]), ALLOW);
    let values = (0..300).map(|value| vec![Condition::is(1, value)]).collect();
    let program = made(&Rules::from([(16, values)]));
    assert!((0..300).all(|value| run(&program, X86_64, 16, [0, value, 0, 0, 0, 0]) == ALLOW));
    assert_ne!(run(&program, X86_64, 16, [0, 300, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn call_that_is_absent_is_so_whatever_the_rules_say() {
    let rules = Rules::from([(7, Vec::new()), (8, Vec::new())]);
    let (trap, allow) = (SeccompAction::Trap, SeccompAction::Allow);
    let program = program_without(&rules, &[8, 435], trap, allow).unwrap();
    let answers = [7, 8, 9, 435].map(|call| run(&program, X86_64, call, [0; 6]));
    let none = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    assert_eq!(answers, [ALLOW, none, libc::SECCOMP_RET_TRAP, none]);
    assert_eq!(run(&program, I386, 435, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
}

#[test]
fn what_cannot_be_asked_is_refused_by_name() {
    let refused = |rules: &Rules| {
        let error = program(rules, SeccompAction::Trap, SeccompAction::Allow).unwrap_err();
        (error, error.to_string())
    };
    let error = refused(&Rules::from([(16, vec![vec![Condition::is(0, 1); 150]])]));
    assert!(matches!(error, (RuleError::Rule(16), text) if text.contains("16")));
    let error = refused(&Rules::from([(16, vec![vec![Condition::is(6, 0)]])]));
    assert!(matches!(error, (RuleError::Argument(6), text) if text.contains('6')));
}

#[test]
fn no_rules_let_nothing_through() {
    let program = made(&Rules::new());
    for number in 0..500 {
        assert_eq!(run(&program, X86_64, number, [0; 6]), libc::SECCOMP_RET_TRAP);
    }
}
