//! The fuzz targets of `tests/fuzz` without a fuzzer: each meets the inputs that one has found, and changed ones.
//!
//! `make fuzz-smoke` looks for new ones, with the address sanitizer; this sees that what was found stays mended, wherever
//! the tests run.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest that one target meets changed inputs.
const PATIENCE: Duration = Duration::from_secs(3);
/// How many of them at most, of at most so many bytes.
const CHANGED: u32 = 3000;
const MOST_BYTES: usize = 4096;

fn fuzz(directory: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(directory)
}

/// The inputs that a fuzzer has found for a target, by their names.
fn found(target: &str) -> BTreeMap<String, Vec<u8>> {
    let directory = fuzz("corpus").join(target);
    let entries = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{directory:?}: {error}"));
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("a plain name");
        (name, fs::read(entry.path()).expect("an input"))
    };
    entries.map(read).collect()
}

/// An input with some bytes of it turned, doubled, dropped or taken from another.
fn changed(dice: &mut fastrand::Rng, inputs: &[&Vec<u8>]) -> Vec<u8> {
    let mut input = inputs[dice.usize(..inputs.len())].clone();
    for _ in 0..dice.usize(1..6) {
        let at = dice.usize(..=input.len());
        let bytes = dice.usize(..=(input.len() - at).min(16));
        match dice.u8(..5) {
            0 => input[at..at + bytes].iter_mut().for_each(|byte| *byte ^= 1 << dice.u8(..8)),
            1 => input[at..at + bytes].fill([0, 1, 0x7f, 0x80, 0xff][dice.usize(..5)]),
            2 => drop(input.drain(at..at + bytes)),
            3 => drop(input.splice(at..at, input[at..at + bytes].to_vec())),
            _ => {
                let other = inputs[dice.usize(..inputs.len())];
                let from = dice.usize(..=other.len());
                drop(input.splice(at.., other[from..].iter().copied()));
            }
        }
    }
    input.truncate(MOST_BYTES);
    input
}

/// Runs a target with an input, and keeps the input when it breaks the target.
fn meet(target: &str, input: &[u8], body: fn(&[u8])) {
    let Err(reason) = catch_unwind(AssertUnwindSafe(|| body(input))) else { return };
    let kept = std::env::temp_dir().join(format!("vial-fuzz-{target}"));
    match fs::write(&kept, input) {
        Ok(()) => eprintln!("the input that broke {target} is {}", kept.display()),
        Err(error) => eprintln!("the input that broke {target} cannot be kept: {error}"),
    }
    std::panic::resume_unwind(reason);
}

fn replay(target: &str, body: fn(&[u8])) {
    let inputs = found(target);
    assert!(!inputs.is_empty(), "nothing was found for {target}");
    inputs.values().for_each(|input| meet(target, input, body));
}

fn replay_and_change(target: &str, body: fn(&[u8])) {
    replay(target, body);
    let inputs = found(target);
    let inputs: Vec<_> = inputs.values().collect();
    let (start, mut dice) = (Instant::now(), fastrand::Rng::with_seed(inputs.len() as u64));
    for _ in 0..CHANGED {
        if start.elapsed() > PATIENCE {
            break;
        }
        meet(target, &changed(&mut dice, &inputs), body);
    }
}

/// Includes targets, and names those that are there.
macro_rules! targets {
    ($($target:ident: $how:ident,)*) => {
        #[path = "../fuzz/bodies"]
        mod bodies {
            $(pub(crate) mod $target;)*
        }

        mod replayed {
            $(
                #[test]
                fn $target() {
                    super::$how(stringify!($target), super::bodies::$target::run);
                }
            )*
        }

        const TARGETS: &[&str] = &[$(stringify!($target)),*];
    };
}

targets! {
    agent_reply: replay_and_change,
    balloon: replay_and_change,
    block: replay_and_change,
    bus: replay_and_change,
    // What breaks out of the file server's root would do so as root here: no new inputs.
    fs: replay,
    mem: replay_and_change,
    net: replay_and_change,
    oci_spec: replay_and_change,
    rng: replay_and_change,
    snapshot: replay_and_change,
    vmm_api: replay_and_change,
    vsock: replay_and_change,
}

#[test]
fn every_target_is_replayed() {
    let mut targets: Vec<_> = fs::read_dir(fuzz("targets"))
        .expect("the targets")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .collect();
    targets.sort();
    assert_eq!(targets, TARGETS);
    // The program that has all of them.
    let all = fs::read_to_string(fuzz("all.rs")).expect("the program");
    assert!(all.contains(&format!("bodies![{}];", targets.join(", "))), "{targets:?}");
}
