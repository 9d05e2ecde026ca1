//! The system calls that each kind of thread can make. Anything else ends the process, and the VM
//! with it.
//!
//! The tables are lists of what is allowed, with the arguments that decide what a call can do.
//! They come from what the threads do, read and seen, for glibc linked statically. A thread puts
//! its filter on before it serves anything; no guest runs before all have.

mod tables;

use std::collections::btree_map::Entry;

use seccompiler::{BpfProgram, SeccompAction};
use vial_seccomp::{CallRules, Condition, RuleError, Rules};

/// The kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs the guest on a vCPU.
    Vcpu,
    /// The same, in a machine with functions of the host.
    VcpuWithFunctions,
    /// Serves the devices that never block.
    Io,
    /// Serves files and disks.
    FileServer,
    /// Speaks with vhost-user backends.
    VhostUser,
    /// Serves the shim's socket, once the VM runs.
    Control,
    /// The same, where functions of the host can come and go.
    ControlWithFunctions,
    /// As [`ThreadKind::Control`], of a VM that can grow: it starts vCPUs, whose threads have what
    /// is common to both kinds.
    ControlThatGrows,
    /// As [`ThreadKind::Control`], of a VM that is to be saved.
    Saver,
}

/// Why a filter could not be put on.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The tables make no program.
    #[error("make the system call filter of a {0:?} thread: {1}")]
    Compile(ThreadKind, RuleError),
    /// The kernel refused it.
    #[error(
        "filter the system calls of a {0:?} thread: {1}; the kernel needs CONFIG_SECCOMP_FILTER"
    )]
    Apply(ThreadKind, seccompiler::Error),
}

/// What has to hold for an argument, of which the lower 32 bits count.
#[derive(Debug, Clone, Copy)]
enum Check {
    /// Nothing.
    Any,
    /// The argument of that index is one of these.
    OneOf(u8, &'static [u64]),
    /// The argument of that index has none of these bits.
    Without(u8, u64),
    /// It has all of them.
    With(u8, u64),
    /// All of these arguments are these.
    Is(&'static [(u8, u64)]),
}

impl Check {
    fn rules(self) -> CallRules {
        match self {
            Self::Any => Vec::new(),
            Self::OneOf(argument, values) => {
                values.iter().map(|value| vec![Condition::is(argument, *value as u32)]).collect()
            }
            Self::Without(argument, bits) => {
                vec![vec![Condition::masked(argument, bits as u32, 0)]]
            }
            Self::Is(all) => {
                let is = |(argument, value): &(u8, u64)| Condition::is(*argument, *value as u32);
                vec![all.iter().map(is).collect()]
            }
            Self::With(argument, bits) => {
                vec![vec![Condition::masked(argument, bits as u32, bits as u32)]]
            }
        }
    }
}

fn compile(kind: ThreadKind) -> Result<BpfProgram, RuleError> {
    let mut rules = Rules::new();
    for (call, check) in tables::of(kind) {
        let more = check.rules();
        match rules.entry(*call) {
            Entry::Vacant(entry) => drop(entry.insert(more)),
            // Without a rule, every use of the call is allowed.
            Entry::Occupied(entry) if entry.get().is_empty() => {}
            Entry::Occupied(mut entry) if more.is_empty() => entry.get_mut().clear(),
            Entry::Occupied(mut entry) => entry.get_mut().extend(more),
        }
    }
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    vial_seccomp::program_without(&rules, absent(kind), kill, allow)
}

/// What a kind of threads is told that the kernel has not. The flags of clone3(2) are in memory, where no filter looks; glibc
/// then uses clone(2), which has them as an argument.
fn absent(kind: ThreadKind) -> &'static [i64] {
    match kind {
        ThreadKind::ControlThatGrows => &[libc::SYS_clone3],
        _ => &[],
    }
}

/// Makes the allocator one that confined threads can use: before the process's second thread.
///
/// glibc gives each thread a heap of its own, and reads /proc/sys/vm/overcommit_memory when such a
/// heap first shrinks (malloc/arena.c, `shrink_heap`), which only the file server could survive.
/// The first heap neither asks nor opens. One heap for all is less memory, too.
#[allow(unsafe_code)]
pub fn keep_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers are involved; mallopt(3) locks the allocator's state by itself.
    let kept = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    #[cfg(target_env = "gnu")]
    debug_assert_eq!(kept, 1, "mallopt refuses one arena");
}

/// Leaves the calling thread the system calls of its kind, for good.
///
/// # Errors
/// [`SeccompError`].
pub fn confine(kind: ThreadKind) -> Result<(), SeccompError> {
    let program = compile(kind).map_err(|error| SeccompError::Compile(kind, error))?;
    seccompiler::apply_filter(&program).map_err(|error| SeccompError::Apply(kind, error))
}

#[cfg(test)]
mod tests;
