//! Things killed at random, for as long as one likes, and what is left counted.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cri::faults::{Victim, killed_meanwhile, life};

/// The longest time into a pod's life at which something is killed: past its end.
const LONGEST: Duration = Duration::from_millis(7000);

/// Numbers that look random, and are the same for the same seed (xorshift, 64 bits).
struct Dice(u64);

impl Dice {
    /// One of `0..below`.
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Starts pods, kills a process of theirs or containerd at a random moment, removes them, and tells
/// what is left. Returns whether nothing was, every time.
pub(crate) fn soak(image: &str, archives: &[PathBuf], long: Duration, seed: u64) -> bool {
    let (mut bed, _configuration) = match super::begin(image, archives, true, false) {
        Ok(begun) => begun,
        Err(error) => {
            println!("FAILED to begin: {error:#}");
            return false;
        }
    };
    println!("seed {seed}");
    let (start, mut dice) = (Instant::now(), Dice(seed.max(1)));
    let (mut rounds, mut failed) = (0u32, 0u32);
    while start.elapsed() < long {
        let victim = match dice.roll(5) {
            0 | 1 => Victim::Vmm,
            2 | 3 => Victim::Shim,
            _ => Victim::Containerd,
        };
        // As many at the very beginning as in all the time after it.
        let longest = if dice.roll(2) == 0 { LONGEST } else { LONGEST / 20 };
        let delay = Duration::from_micros(dice.roll(longest.as_micros() as u64));
        let (begun, log) = (Instant::now(), bed.log_length());
        let result = killed_meanwhile(victim, delay, life).and_then(|()| bed.nothing_left());
        rounds += 1;
        let (took, delay) = (begun.elapsed().as_secs_f64(), delay.as_secs_f64() * 1000.0);
        if let Err(error) = result {
            println!("FAILED  {victim:?} killed after {delay:.1} ms ({took:.1} s): {error:#}");
            failed += 1;
            bed.tell_the_log(log);
            bed.clear();
            if let Err(error) = bed.look_anew() {
                println!("FAILED to look at the host: {error:#}");
                break;
            }
        } else {
            println!("ok      {victim:?} killed after {delay:.1} ms ({took:.1} s)");
        }
    }
    println!("{} passed, {failed} failed", rounds - failed);
    failed == 0 && rounds > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_of_one_seed_roll_the_same_and_all_of_the_range() {
        let rolls = |seed| {
            let mut dice = Dice(seed);
            (0..200).map(|_| dice.roll(5)).collect::<Vec<_>>()
        };
        assert_eq!(rolls(7), rolls(7));
        assert_ne!(rolls(7), rolls(8));
        assert!((0..5).all(|number| rolls(7).contains(&number)));
    }
}
