//! Measurements of how pods start, what they cost, and how their devices perform.

pub(crate) mod measure;
pub(crate) mod plot;
pub(crate) mod report;
pub(crate) mod subject;
mod templates;
