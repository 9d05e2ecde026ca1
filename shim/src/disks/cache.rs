//! How the host caches the block devices that a pod has: as the operator says, or the pod.

use std::collections::HashMap;

use serde::Deserialize;

use super::DiskError;
use crate::spec::start_of;

/// The annotation of a pod that wants it otherwise than the operator.
pub const ANNOTATION: &str = "io.vial/disk-cache";

/// How a block device is cached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Not by the host (`O_DIRECT`): the guest has a cache of its own.
    #[default]
    Direct,
    /// In the host's page cache as well.
    Writeback,
}

/// What a pod's annotations say, if anything.
///
/// # Errors
/// [`DiskError::Annotation`].
pub fn wanted(annotations: &HashMap<String, String>) -> Result<Option<Cache>, DiskError> {
    match annotations.get(ANNOTATION).map(String::as_str) {
        None => Ok(None),
        Some("direct") => Ok(Some(Cache::Direct)),
        Some("writeback") => Ok(Some(Cache::Writeback)),
        Some(other) => Err(DiskError::Annotation(start_of(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotation_is_one_of_two_words() {
        let says = |value: &str| wanted(&HashMap::from([(ANNOTATION.into(), value.into())]));
        assert_eq!(wanted(&HashMap::new()).unwrap(), None);
        assert_eq!(says("direct").unwrap(), Some(Cache::Direct));
        assert_eq!(says("writeback").unwrap(), Some(Cache::Writeback));
        for other in ["none", "Direct", "", "unsafe"] {
            let error = says(other).unwrap_err();
            assert!(error.is_of_the_pod() && error.to_string().contains(ANNOTATION), "{error}");
        }
    }
}
