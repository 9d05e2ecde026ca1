//! Whose process ids a container has that joins a PID namespace.
//!
//! CRI has a container join by `/proc/<pid>/ns/pid`, either of the pod's sandbox
//! (`shareProcessNamespace`, which goes for all containers of a pod) or of the container that a
//! debugging one looks at (`kubectl debug --target`). Each container's number is that of the VM, so
//! the path tells nothing; which containers there are does.

use crate::error::ServiceError;

/// The namespace that is joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Joined {
    /// That of all containers of the pod.
    Pod,
    /// That of one container.
    Container(String),
}

/// What a container joins. `shared`: whether an earlier one has joined the pod's; `others`: the
/// containers that the guest has.
///
/// # Errors
/// [`ServiceError::Precondition`] when it could be any of several containers.
pub fn joined(shared: bool, others: &[String]) -> Result<Joined, ServiceError> {
    match others {
        // Nothing is there yet that it could look at, so it is a container of the pod.
        _ if shared => Ok(Joined::Pod),
        [] => Ok(Joined::Pod),
        [one] => Ok(Joined::Container(one.clone())),
        _ => Err(ServiceError::Precondition(
            "which container's processes are meant cannot be told in a pod with several that do \
             not share them; leave the target container out, or set shareProcessNamespace"
                .into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_container_that_joins_shares_and_so_do_all_after_it() {
        let ids = |names: &[&str]| names.iter().map(|name| (*name).to_string()).collect::<Vec<_>>();
        assert_eq!(joined(false, &[]).unwrap(), Joined::Pod);
        assert_eq!(joined(true, &ids(&["a", "b"])).unwrap(), Joined::Pod);
        assert_eq!(joined(false, &ids(&["a"])).unwrap(), Joined::Container("a".into()));
        let error = joined(false, &ids(&["a", "b"])).unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::FAILED_PRECONDITION);
    }
}
