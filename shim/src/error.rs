//! Every failure of a request, and what containerd is told of it.

use ttrpc::Code;

use crate::{
    agent::AgentError,
    bundles::BundleError,
    core_scheduling::CoreSchedulingError,
    devices::{DeviceError, passed::WrongNumbers},
    disks::DiskError,
    jail::RecordError,
    life::NoSuchStep,
    metrics::MetricsError,
    network::NetworkError,
    numa::NumaError,
    plan::PlanError,
    pod_files::PodFileError,
    sandbox::GrowthError,
    share::ShareError,
    spec::SpecError,
    state_dir::StateDirError,
    stdio::StdioError,
    vhost_user::VhostUserError,
    vmm_client::VmmError,
    vmm_process::VmmProcessError,
};

/// Why a request to the shim failed.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No container or exec of that id.
    #[error("{what} '{id}': not found")]
    NotFound {
        /// Container or exec.
        what: &'static str,
        /// Which.
        id: String,
    },
    /// The process has ended.
    #[error("the process has already ended: not found")]
    AlreadyEnded,
    /// There is one of that id.
    #[error("{what} '{id}': already exists")]
    Exists {
        /// Container or exec.
        what: &'static str,
        /// Which.
        id: String,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The state does not allow it.
    #[error(transparent)]
    State(#[from] NoSuchStep),
    /// The request does not fit what there is.
    #[error("{0}")]
    Precondition(String),
    /// What is asked for is not there yet.
    #[error("{0} is not supported by Vial yet")]
    Unimplemented(&'static str),
    /// The VM is not as large as its containers need it.
    #[error(transparent)]
    Growth(#[from] GrowthError),
    /// The VM is gone.
    #[error("the VM has ended: {0}")]
    VmEnded(String),
    /// A device or a file that a VM needs cannot be opened.
    #[error("cannot open {path}: {error}; {remedy}")]
    Open {
        /// The file.
        path: String,
        /// What went wrong.
        error: std::io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The guest took too long.
    #[error(
        "the guest was not ready within {0} s; set `boot_timeout_seconds` higher if the machine \
         is slow, or `debug_console = true` to see what it does{1}"
    )]
    BootTimeout(u64, String),
    /// What was started could not all be taken back.
    #[error("not everything could be cleaned up: {0}")]
    Leftover(String),
    /// See [`AgentError`].
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// See [`VmmError`].
    #[error("cannot {action}: {error}")]
    Vmm {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: VmmError,
    },
    /// See [`VmmProcessError`].
    #[error(transparent)]
    VmmProcess(#[from] VmmProcessError),
    /// See [`RecordError`].
    #[error(transparent)]
    Jail(#[from] RecordError),
    /// See [`BundleError`].
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// See [`StateDirError`].
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// See [`NetworkError`].
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// See [`DeviceError`].
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// See [`DiskError`].
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// See [`VhostUserError`].
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// See [`WrongNumbers`].
    #[error(transparent)]
    WrongNumbers(#[from] WrongNumbers),
    /// See [`CoreSchedulingError`].
    #[error(transparent)]
    CoreScheduling(#[from] CoreSchedulingError),
    /// See [`NumaError`].
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// See [`ShareError`].
    #[error(transparent)]
    Share(#[from] ShareError),
    /// See [`SpecError`].
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// See [`StdioError`].
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// See [`PlanError`].
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// See [`PodFileError`].
    #[error(transparent)]
    PodFile(#[from] PodFileError),
    /// See [`MetricsError`].
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

impl ServiceError {
    /// The code that containerd branches on.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::AlreadyEnded => Code::NOT_FOUND,
            Self::Exists { .. } | Self::StateDir(StateDirError::Exists(_)) => Code::ALREADY_EXISTS,
            Self::Invalid(_)
            | Self::Spec(
                SpecError::TooLarge { .. }
                | SpecError::Parse { .. }
                | SpecError::Role(_)
                | SpecError::OfTheHost(_)
                | SpecError::Annotation(_),
            )
            | Self::Plan(PlanError::Spec(_) | PlanError::Options(_) | PlanError::Decode(_))
            | Self::StateDir(StateDirError::Name(_))
            | Self::Network(NetworkError::Host(_))
            | Self::Stdio(StdioError::Scheme { .. })
            | Self::Share(
                ShareError::Spec(_)
                | ShareError::NoRoot
                | ShareError::Device { .. }
                | ShareError::Source { .. },
            ) => Code::INVALID_ARGUMENT,
            Self::Device(error) if error.is_of_the_pod() => Code::INVALID_ARGUMENT,
            Self::Disk(error) | Self::Spec(SpecError::Disk(error)) if error.is_of_the_pod() => {
                Code::INVALID_ARGUMENT
            }
            Self::Numa(error) | Self::Spec(SpecError::Numa(error)) if error.is_of_the_pod() => {
                Code::INVALID_ARGUMENT
            }
            Self::VhostUser(error) | Self::Spec(SpecError::VhostUser(error))
                if error.is_of_the_pod() =>
            {
                Code::INVALID_ARGUMENT
            }
            Self::Growth(error) if !error.is_of_the_pod() => Code::INTERNAL,
            Self::State(_)
            | Self::Growth(_)
            | Self::Precondition(_)
            | Self::Device(_)
            | Self::Disk(_)
            | Self::VhostUser(_)
            | Self::Numa(_) => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::VmEnded(_) | Self::BootTimeout(..) => Code::UNAVAILABLE,
            Self::Agent(AgentError::Status(status)) => {
                // A code of the guest's own making must not be taken for success.
                status
                    .code
                    .enum_value()
                    .ok()
                    .filter(|code| *code != Code::OK)
                    .unwrap_or(Code::UNKNOWN)
            }
            Self::Agent(AgentError::Call { .. }) => Code::UNAVAILABLE,
            _ => Code::INTERNAL,
        }
    }
}

impl From<ServiceError> for ttrpc::Error {
    fn from(error: ServiceError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_of_the_agent_is_kept_but_never_ok() {
        for (code, told) in [
            (Code::NOT_FOUND, Code::NOT_FOUND),
            (Code::FAILED_PRECONDITION, Code::FAILED_PRECONDITION),
            (Code::OK, Code::UNKNOWN),
        ] {
            let status = ttrpc::get_status(code, "text");
            assert_eq!(ServiceError::Agent(AgentError::Status(status)).code(), told);
        }
    }

    #[test]
    fn what_containerd_branches_on_is_told_apart() {
        let unknown = ServiceError::NotFound { what: "container", id: "a".into() };
        assert_eq!(unknown.code(), Code::NOT_FOUND);
        assert_eq!(ServiceError::AlreadyEnded.code(), Code::NOT_FOUND);
        assert_eq!(ServiceError::Unimplemented("pause").code(), Code::UNIMPLEMENTED);
        let exists = StateDirError::Exists("/run/vial/a/b".into());
        assert_eq!(ServiceError::from(exists).code(), Code::ALREADY_EXISTS);
    }
}
