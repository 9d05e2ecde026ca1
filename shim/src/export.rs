//! What the `vial` command knows of the sandboxes, in forms that other programs read.

pub mod metrics;
pub mod trace;

use crate::timeline::Mark;

/// The mark that a start begins with.
const EXEC: &str = "shim exec";
/// The mark of a guest that has gone on from a template.
const ADOPTED: &str = "guest adopted";

/// Whether a start with those marks went on from a template.
fn is_from_template(timeline: &[Mark]) -> bool {
    timeline.iter().any(|mark| mark.name == ADOPTED)
}
