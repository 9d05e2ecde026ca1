//! Pods as a kubelet runs them: through CRI, with Vial and with runc.
//!
//! Needs containerd's CRI plugin with the runtime handlers `runc`, `vial` and `vial-sandbox`,
//! a CNI configuration, and the images of `tests/images`, as `tests/host/containerd` has it.

pub(crate) mod changes;
mod client;
mod configs;
pub(crate) mod disks;
mod exec;
pub(crate) mod faults;
mod grpc;
mod interactive;
mod lifecycle;
mod log;
mod network;
pub(crate) mod pairs;
mod placement;
pub(crate) mod pod;
mod process;
pub(crate) mod queues;
mod resources;
mod sockets;
mod streaming;
mod users;
pub(crate) mod vhost_net;
mod volumes;
pub(crate) mod wire;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::suite::bed::{IMAGE, run};
use crate::suite::{Case, Life};
use client::Cri;
use pod::{Pod, eventually, sh};

/// What the names of these cases begin with.
pub(crate) const PREFIX: &str = "cri_";

/// Names functions as cases of CRI.
macro_rules! cases {
    ($life:ident: $($module:ident::$function:ident),* $(,)?) => {
        vec![$(Case {
            name: concat!("cri_", stringify!($function)),
            body: $module::$function,
            life: Life::$life,
        }),*]
    };
}

/// All cases, in the order in which they run.
pub(crate) fn cases() -> Vec<Case> {
    cases![
        Template:
        lifecycle::pod_and_container_go_through_their_states,
        lifecycle::pod_of_the_sandbox_api_goes_through_its_states,
        lifecycle::ends_of_containers_are_told_as_with_runc,
        lifecycle::containers_of_a_pod_run_after_and_beside_each_other,
        exec::execs_and_logs_are_those_of_runc,
        exec::execs_in_a_row_and_at_once_all_work,
        interactive::streams_work_as_with_runc,
        process::what_processes_are_and_may_do_is_the_same_as_with_runc,
        process::what_a_pod_shares_is_the_same_as_with_runc,
        process::processes_of_a_pod_can_be_shared,
        process::privileged_containers_have_all_of_the_guest_and_nothing_of_the_host,
        resources::limits_and_statistics_are_there_as_with_runc,
        resources::statistics_of_pods_are_there_as_with_runc,
        network::pods_reach_each_other_and_the_host,
        network::names_and_rules_are_those_of_the_pod,
        changes::changes_of_a_network_are_seen_as_with_runc,
        changes::interfaces_of_a_network_come_and_go,
        changes::bursts_of_changes_of_a_network_arrive,
        changes::pod_whose_network_is_taken_away_runs_on_and_goes,
        vhost_net::vhost_net_carries_the_packets_of_a_pod,
        vhost_net::pod_without_vhost_net_has_its_network_all_the_same,
        vhost_net::hostile_driver_breaks_its_network_device_and_nothing_else,
        queues::network_of_several_cpus_has_a_pair_of_queues_for_each,
        queues::network_of_several_cpus_has_its_queues_without_vhost_net,
        queues::network_has_the_pairs_of_the_cpus_that_were_there_when_it_came,
        queues::network_has_one_pair_where_the_host_has_no_taps_of_several,
        queues::network_of_several_cpus_leaves_nothing_when_vmm_or_shim_is_killed,
        volumes::volumes_are_the_same_as_with_runc,
        volumes::volumes_are_read_only_with_what_is_below,
        users::users_of_a_pod_are_mapped_as_with_runc,
        users::users_of_pods_are_offered_and_checked,
        users::users_of_two_pods_are_others,
        users::pod_with_users_that_is_killed_leaves_nothing,
        sockets::sockets_are_the_same_as_with_runc,
        sockets::sockets_of_a_pod_whose_shim_is_killed_are_let_go,
        disks::block_volumes_are_the_same_as_with_runc,
        disks::block_volumes_come_and_go_and_are_free_when_the_vmm_is_killed,
        disks::block_volume_is_written_by_several_cpus_and_holds_what_was_flushed_when_the_vmm_is_killed,
        disks::block_volume_goes_while_it_is_written,
        disks::block_volumes_are_cached_as_the_pod_says_and_go_without_io_uring,
        faults::pod_whose_vmm_is_killed_ends_and_goes,
        faults::pod_whose_shim_is_killed_ends_and_goes,
        faults::pod_killed_while_it_starts_leaves_nothing,
        faults::pod_whose_shim_is_killed_while_a_container_starts_leaves_nothing,
        faults::pod_whose_requests_are_given_up_can_be_removed,
        faults::pod_outlives_a_killed_containerd,
    ]
}

/// The cases that need a host with two NUMA nodes.
pub(crate) fn cases_of_nodes() -> Vec<Case> {
    cases![
        Cold:
        placement::vm_of_a_pod_goes_where_its_containers_are,
        placement::container_of_a_strict_pod_that_is_apart_is_refused,
    ]
}

/// Brings the images to where CRI looks for them, and runs a pod with each handler, so that what
/// is made once for the host, as the network's bridge, is not taken for a trace.
pub(crate) fn begin(archives: &[PathBuf]) -> Result<()> {
    for archive in archives {
        run(Command::new("ctr").args(["-n", "k8s.io", "image", "import", "--local"]).arg(archive))?
            .expect(0)?;
    }
    let cri = Cri::new();
    let version = cri.version().context("ask for the version of CRI")?;
    eventually(|| {
        let images = cri.images()?;
        ensure!(images.iter().any(|image| image == IMAGE), "CRI has no {IMAGE}, only {images:?}");
        Ok(())
    })?;
    for handler in ["runc", "vial", lifecycle::SANDBOXER] {
        let pod = Pod::of_handler(handler, |_| ())?;
        ensure!(pod.prints(sh("echo first"))? == "first\n", "a container printed something else");
        pod.end()?;
    }
    println!("pods run with {} {}", version.runtime_name, version.runtime_version);
    Ok(())
}
