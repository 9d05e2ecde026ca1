//! The steps of a child on its way into the jail, and what it means when one of them fails.

/// What the child was about to do. The number is what goes over the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    /// Leaving the shim's session.
    Session = 1,
    /// Entering a cgroup namespace of its own.
    CgroupNamespace,
    /// Receiving mounts of the host, and passing none on.
    ReceiveMounts,
    /// Making the shared tree a mount that can become the root.
    BindRoot,
    /// Going there.
    EnterRoot,
    /// Making it the root.
    ChangeRoot,
    /// Giving up the host's root.
    DetachHost,
    /// Naming the host otherwise.
    Hostname,
    /// Setting resource limits.
    Limits,
    /// Keeping no descriptor but its own.
    Descriptors,
    /// Giving up capabilities for good.
    BoundingSet,
    /// Becoming the pod's user.
    Identity,
    /// Keeping the file server's capabilities only.
    Capabilities,
    /// Resetting signals.
    Signals,
    /// Giving up new privileges.
    NoNewPrivileges,
    /// Filtering system calls.
    SystemCalls,
    /// Becoming the VMM.
    Exec,
}

impl Step {
    const ALL: [Self; 17] = [
        Self::Session,
        Self::CgroupNamespace,
        Self::ReceiveMounts,
        Self::BindRoot,
        Self::EnterRoot,
        Self::ChangeRoot,
        Self::DetachHost,
        Self::Hostname,
        Self::Limits,
        Self::Descriptors,
        Self::BoundingSet,
        Self::Identity,
        Self::Capabilities,
        Self::Signals,
        Self::NoNewPrivileges,
        Self::SystemCalls,
        Self::Exec,
    ];

    /// What was tried, and what helps.
    fn words(self) -> (&'static str, &'static str) {
        let kernel = "Linux 5.12 or newer is needed";
        let root = "the shim has to run as root with all capabilities";
        match self {
            Self::Session => ("leave the shim's session", root),
            Self::CgroupNamespace => ("enter a cgroup namespace", kernel),
            Self::ReceiveMounts => ("keep its mounts apart from the host's", root),
            Self::BindRoot => ("mount the shared tree as its root", root),
            Self::EnterRoot => ("enter the shared tree", root),
            Self::ChangeRoot => {
                ("make the shared tree its root", "the host's root has to be a mount, no initramfs")
            }
            Self::DetachHost => ("detach the host's root", root),
            Self::Hostname => ("set its host name", root),
            Self::Limits => ("limit its resources", "raise the shim's hard limit of open files"),
            Self::Descriptors => ("close the shim's descriptors", kernel),
            Self::BoundingSet => ("give up capabilities", root),
            Self::Identity => ("become the pod's user", "see `jail_uid_base` in the configuration"),
            Self::Capabilities => ("keep the file server's capabilities only", root),
            Self::Signals => ("reset signals", kernel),
            Self::NoNewPrivileges => ("give up new privileges", kernel),
            Self::SystemCalls => {
                ("filter its system calls", "the kernel needs CONFIG_SECCOMP_FILTER")
            }
            Self::Exec => (
                "run the VMM",
                "it has to be a static program, which the jail has no libraries for, and \
                 executable for everybody",
            ),
        }
    }

    /// The step of a report, and the system's error in it.
    pub(super) fn of_report(report: [u8; REPORT_BYTES]) -> Option<(Self, std::io::Error)> {
        let [a, b, c, d, e, f, g, h] = report;
        let number = u32::from_ne_bytes([a, b, c, d]);
        let errno = i32::from_ne_bytes([e, f, g, h]);
        let step = Self::ALL.into_iter().find(|step| *step as u32 == number)?;
        Some((step, std::io::Error::from_raw_os_error(errno)))
    }

    /// What a child writes when the step failed.
    pub(super) fn report(self, errno: i32) -> [u8; REPORT_BYTES] {
        let ([a, b, c, d], [e, f, g, h]) = ((self as u32).to_ne_bytes(), errno.to_ne_bytes());
        [a, b, c, d, e, f, g, h]
    }
}

/// The size of a report: the step's number and the error's.
pub(super) const REPORT_BYTES: usize = 8;

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.words().0)
    }
}

impl Step {
    /// What helps when it fails.
    pub fn remedy(self) -> &'static str {
        self.words().1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_survives_its_report() {
        for step in Step::ALL {
            let (told, error) = Step::of_report(step.report(libc::EPERM)).unwrap();
            assert_eq!((told, error.raw_os_error()), (step, Some(libc::EPERM)));
            assert!(!step.to_string().is_empty() && !step.remedy().is_empty());
        }
        assert!(Step::of_report([0; REPORT_BYTES]).is_none());
        assert!(Step::of_report([0xff; REPORT_BYTES]).is_none());
    }
}
