//! The shim between containerd and one microVM, and the `vial` command.
//!
//! One shim process serves one sandbox, which is one VM: it opens everything that the VM uses,
//! starts `vial-vmm`, hands it the descriptors, and then answers containerd's task API by asking
//! the agent in the guest. What crosses to the VMM is defined by `vial-vmm-api`, what crosses to
//! the agent by `vial-agent-protocol`; nothing else of those two is used here.
//!
//! - [`runtime`] is what containerd runs; [`task`] answers it by what [`pod`] does to each
//!   [`container`] and [`process`], [`sandbox_service`] for the pod itself, both to its end though nobody
//!   may wait for it ([`request`]), and [`events`] tells it what happened.
//! - [`plan`] is what a sandbox is made from, as containerd tells it; [`pod_files`] what it may
//!   leave to the shim.
//! - [`size`] says how large a VM is, and [`pids`] whose process ids a container has.
//! - [`metrics`] puts statistics into containerd's form.
//! - [`sandbox`] starts and stops the VM as a chain of steps that each have an undo ([`undo`]).
//! - [`template`] keeps booted guests that pods can go on from.
//! - [`vmm_process`], [`vmm_client`] and [`agent`] are the borders to the VMM and the guest.
//! - [`jail`] is what the VMM is started in, whatever program it is.
//! - [`share`] and [`spec`] put a container's files where the guest can see them; [`stdio`]
//!   copies its streams; [`sockets`] leads to sockets of the host. [`network`] joins the pod's network namespace with the VM.
//! - [`devices`] gives a pod functions of the host, and takes them back; [`numa`] says on which CPUs
//!   and nodes of the host its VM is.
//! - [`life`] holds the states as pure functions; [`state_dir`], [`timeline`] and [`cleanup`]
//!   what is kept on disk, and how it goes away after a crash.
//! - [`config`] is the operator's file, which nobody else may change ([`trust`]); [`check`], [`ps`] and [`export`] are behind the `vial` command.

pub mod agent;
pub mod bundles;
pub mod check;
pub mod cleanup;
pub mod config;
pub mod container;
pub mod copies;
pub mod core_scheduling;
pub mod devices;
pub mod disks;
pub mod error;
pub mod events;
pub mod export;
mod forward;
pub mod idmap;
pub mod jail;
pub mod life;
pub mod metrics;
pub mod network;
pub mod numa;
pub mod pids;
pub mod plan;
pub mod pod;
pub mod pod_files;
pub mod process;
pub mod ps;
pub mod request;
pub mod runtime;
pub mod sandbox;
pub mod sandbox_service;
pub mod share;
pub mod size;
pub mod sockets;
pub mod spec;
pub mod state_dir;
pub mod stdio;
pub mod task;
pub mod template;
pub mod timeline;
pub mod trust;
pub mod undo;
pub mod vhost_user;
pub mod vmm_client;
pub mod vmm_process;
