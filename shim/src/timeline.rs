//! The phases of a start, each as a moment on the host's `CLOCK_MONOTONIC`.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// The most marks that are kept. Those of a guest count too, so there has to be an end.
pub const MAX_MARKS: usize = 256;

/// The longest name of a mark, in bytes; what is longer is cut.
pub const MAX_NAME_BYTES: usize = 128;

/// One moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What had happened.
    pub name: String,
    /// `CLOCK_MONOTONIC` of the host, in nanoseconds.
    pub at_ns: u64,
}

/// The host's `CLOCK_MONOTONIC`, in nanoseconds.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // The monotonic clock starts at boot and is never negative.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// How far the host's `CLOCK_REALTIME` is ahead of its `CLOCK_MONOTONIC` now, in nanoseconds.
pub fn since_epoch_ns() -> u64 {
    let epoch = std::time::SystemTime::UNIX_EPOCH;
    let now = std::time::SystemTime::now().duration_since(epoch).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX).saturating_sub(now_ns())
}

/// The marks of one sandbox, in no order until they are read.
#[derive(Debug, Default)]
pub struct Timeline {
    marks: Mutex<Vec<Mark>>,
}

impl Timeline {
    /// Marks this moment.
    pub fn mark(&self, name: &str) {
        self.mark_at(name, now_ns());
    }

    /// Marks a moment that has passed. Beyond [`MAX_MARKS`] nothing is kept.
    pub fn mark_at(&self, name: &str, at_ns: u64) {
        let mut marks = self.marks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if marks.len() < MAX_MARKS {
            let name = name.chars().filter(|c| !c.is_control()).collect::<String>();
            let end = name.floor_char_boundary_of(MAX_NAME_BYTES);
            marks.push(Mark { name: name[..end].to_string(), at_ns });
        }
    }

    /// Marks moments of the guest's clock, which showed `guest_now_ns` between `asked_ns` and
    /// `answered_ns` of the host's. The middle of those two is taken as the same moment; the
    /// error is at most half of what lies between them. Moments before the epoch of the host's
    /// clock, which only a lying guest has, are left out.
    pub fn mark_guest(
        &self,
        marks: impl Iterator<Item = (String, u64)>,
        guest_now_ns: u64,
        asked_ns: u64,
        answered_ns: u64,
    ) {
        let host_now_ns = asked_ns + answered_ns.saturating_sub(asked_ns) / 2;
        for (name, at_ns) in marks {
            let since_ns = guest_now_ns.checked_sub(at_ns);
            if let Some(at_ns) = since_ns.and_then(|since| host_now_ns.checked_sub(since)) {
                self.mark_at(&format!("guest: {name}"), at_ns);
            }
        }
    }

    /// All marks, the oldest first.
    pub fn sorted(&self) -> Vec<Mark> {
        let mut marks = self.marks.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        marks.sort_by_key(|mark| mark.at_ns);
        marks
    }
}

trait FloorCharBoundary {
    fn floor_char_boundary_of(&self, most: usize) -> usize;
}

impl FloorCharBoundary for String {
    /// The last character boundary at or before `most`.
    fn floor_char_boundary_of(&self, most: usize) -> usize {
        (0..=most.min(self.len())).rev().find(|&at| self.is_char_boundary(at)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_marks_land_on_the_hosts_clock() {
        let timeline = Timeline::default();
        let marks = [("init".to_string(), 100), ("served".to_string(), 400)];
        timeline.mark_guest(marks.into_iter(), 500, 10_000, 10_200);
        let marks = timeline.sorted();
        assert_eq!(marks[0], Mark { name: "guest: init".into(), at_ns: 9_700 });
        assert_eq!(marks[1], Mark { name: "guest: served".into(), at_ns: 10_000 });
    }

    #[test]
    fn guest_marks_that_cannot_be_are_left_out() {
        let timeline = Timeline::default();
        let marks = [("future".to_string(), 900), ("before".to_string(), 0)];
        timeline.mark_guest(marks.into_iter(), 500, 100, 100);
        assert_eq!(timeline.sorted(), []);
    }

    #[test]
    fn marks_beyond_the_bounds_are_cut() {
        let timeline = Timeline::default();
        for n in 0..MAX_MARKS as u64 + 5 {
            timeline.mark_at(&"ä".repeat(MAX_NAME_BYTES), n);
        }
        let marks = timeline.sorted();
        assert_eq!(marks.len(), MAX_MARKS);
        assert!(marks[0].name.len() <= MAX_NAME_BYTES);
    }
}
