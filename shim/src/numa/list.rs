//! Sets of CPUs or nodes as the kernel writes them: `0-3,8` (cpuset(7), "List format").

use std::collections::BTreeSet;

/// CPUs or nodes by their numbers.
pub type Set = BTreeSet<u32>;

/// The numbers that there can be: the most CPUs of any kernel for this architecture (NR_CPUS).
pub const NUMBERS: std::ops::Range<u32> = 0..8192;
/// The longest list that is read, in bytes: every other number.
const MAX_BYTES: usize = 32 << 10;

/// Reads a list; `None` when it is none. An empty one has nothing.
pub fn parse(text: &str) -> Option<Set> {
    let text = text.trim();
    if text.len() > MAX_BYTES {
        return None;
    }
    let number = |word: &str| {
        let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        word.parse().ok().filter(|number| digits && NUMBERS.contains(number))
    };
    let mut set = Set::new();
    for word in text.split(',').filter(|_| !text.is_empty()) {
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

/// Writes a list.
pub fn show(set: &Set) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &number in set {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let words = runs.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    });
    words.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn list_beyond_a_bound_is_none() {
        assert_eq!(parse("").unwrap(), Set::new());
        assert_eq!(parse("0-2,8191\n").unwrap(), Set::from([0, 1, 2, 8191]));
        let long = "1,".repeat(MAX_BYTES);
        for text in ["8192", "0-8192", "3-1", "-1", "1-", ",", "1,,2", "+1", "1 2", "a", &long] {
            assert_eq!(parse(text), None, "{text:.20}");
        }
    }

    proptest! {
        #[test]
        fn set_survives_its_list(set in proptest::collection::btree_set(NUMBERS, 0..64)) {
            prop_assert_eq!(parse(&show(&set)), Some(set));
        }

        #[test]
        fn any_text_is_a_list_or_none(text in "[0-9,-]{0,40}") {
            if let Some(set) = parse(&text) {
                prop_assert!(set.iter().all(|number| NUMBERS.contains(number)));
            }
        }
    }
}
