//! Measurements of how pods start, what they cost, and how their devices perform.

mod cri;
pub(crate) mod measure;
pub(crate) mod network;
pub(crate) mod plot;
mod pods;
pub(crate) mod report;
pub(crate) mod subject;
mod templates;
