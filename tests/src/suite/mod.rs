//! The cases by what they are about, and the loop that runs them.

pub(crate) mod bed;
pub(crate) mod calls;
mod chosen;
mod compare;
mod control;
mod cores;
mod devices;
mod export;
pub(crate) mod faults;
mod function_nodes;
mod growth;
mod hot_plug;
mod input;
pub(crate) mod isolation;
mod lifecycle;
mod machine;
mod moved;
pub(crate) mod network;
pub(crate) mod placement;
pub(crate) mod record;
mod reporting;
pub(crate) mod sizes;
pub(crate) mod soak;
mod streams;
mod templates;
mod vhost_user;
pub(crate) mod watch;
mod ways;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use bed::Bed;
use record::Record;
use vial_tests::node::Configuration;

use crate::cri::{self, changes, queues, vhost_net};

/// A case: a name, and what has to hold.
pub(crate) struct Case {
    /// `thing_condition_outcome`.
    pub(crate) name: &'static str,
    /// Returns an error that says what did not hold.
    pub(crate) body: fn(&Bed) -> Result<()>,
    /// How its VMs come to run.
    pub(crate) life: Life,
}

/// How the VMs of a case come to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// They boot, unless the case itself makes a template.
    Cold,
    /// Each goes on from the template, as nearly all do on a node: one that does not is a failure of the case.
    Template,
}

/// Names functions as cases.
macro_rules! cases {
    ($life:ident: $($module:ident::$function:ident),* $(,)?) => {
        vec![$(Case { name: stringify!($function), body: $module::$function, life: Life::$life }),*]
    };
}

/// All cases, in the order in which they run: those of a life stand together, since a template is made for them once.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = cases![
        Cold:
        lifecycle::echo_prints_and_ends_with_0,
        lifecycle::exit_statuses_are_exact,
        lifecycle::kill_ends_with_128_and_the_signal,
        lifecycle::task_is_listed_with_its_processes,
        lifecycle::exec_runs_beside_and_has_its_own_status,
        lifecycle::exec_of_what_is_absent_fails_and_the_container_lives,
        lifecycle::ten_in_a_row_all_work,
        lifecycle::five_at_once_all_work,
        machine::disk_keeps_what_the_guest_wrote,
        machine::disk_that_is_read_only_stays_as_it_is,
        machine::end_of_the_guest_is_told,
        machine::returns_of_the_guests_kernel_are_all_patched,
        machine::padding_of_the_guests_kernel_takes_no_memory,
        isolation::vmm_is_jailed_with_each_of_its_threads,
        cores::pod_has_its_cores_to_itself,
        isolation::hostile_program_in_place_of_the_vmm_gets_nowhere,
        isolation::vmm_without_user_namespaces_is_jailed_and_warned_of,
        isolation::vmm_without_a_jail_runs_and_is_warned_of,
        templates::template_serves_containers_as_a_boot_does,
        templates::template_is_told_apart_by_each_of_its_pods,
        templates::template_pod_at_rest_has_little_memory_of_its_own,
        templates::template_keeps_its_memory_whatever_its_pods_write,
        templates::template_that_is_damaged_is_named_and_the_pod_boots,
        templates::template_whose_making_is_killed_leaves_nothing,
        templates::template_is_made_when_a_pod_finds_none,
        templates::template_that_cannot_be_made_is_not_tried_again_at_once,
        templates::template_is_not_for_a_pod_that_does_not_want_one,
        templates::template_is_listed_checked_and_removed,
        sizes::cri_pod_of_every_size_starts_from_one_template,
        sizes::cri_pod_beyond_the_template_boots_cold,
        sizes::cri_memory_that_came_later_is_the_pods_to_use,
        sizes::cri_ten_pods_of_different_sizes_start_at_once,
        growth::cri_vm_follows_limits_that_are_raised_and_lowered,
        growth::cri_vm_follows_containers_that_come_and_go,
        growth::cri_vm_grows_no_further_than_the_operator_allows,
        growth::cri_vm_of_its_own_kernel_keeps_its_size_and_says_so,
        reporting::memory_that_a_guest_frees_is_the_hosts_again,
        reporting::memory_that_a_guest_of_a_template_frees_is_the_hosts_again,
        changes::cri_interfaces_that_came_are_let_go_when_something_is_killed,
        vhost_net::cri_vhost_net_carries_the_packets_of_a_vm_that_boots,
        queues::cri_network_of_several_cpus_has_its_queues_in_a_vm_that_boots,
        vhost_user::vhost_disk_holds_every_byte_though_its_backend_is_killed,
        vhost_user::vhost_disk_of_a_vm_in_huge_pages_holds_every_byte,
        vhost_user::vhost_device_that_cannot_be_had_is_refused,
        vhost_user::vhost_file_system_is_the_hosts_directory,
        vhost_user::vhost_networks_of_two_pods_are_joined_by_a_switch_that_restarts,
        vhost_user::vhost_network_of_several_cpus_has_its_packets_in_several_queues,
        devices::function_behind_no_iommu_is_refused_and_left_alone,
        input::wrong_configuration_is_named,
        input::wrong_command_lines_are_refused,
        input::check_says_that_this_host_is_fit,
        input::check_reads_the_configuration_of_containerd,
    ];
    cases.extend(cases![
        Template:
        export::metrics_and_traces_tell_of_a_pod,
        compare::kernel_inside_is_not_the_hosts,
        streams::stdin_reaches_its_end,
        streams::hundred_megabytes_arrive_whole_and_in_order,
        streams::stderr_is_kept_apart,
        streams::terminal_is_a_terminal_of_its_size,
        streams::exec_with_a_terminal_works,
        compare::what_a_process_may_do_is_the_same_as_with_runc,
        compare::what_a_process_sees_is_the_same_as_with_runc,
        compare::limits_and_read_only_root_are_the_same_as_with_runc,
        compare::bind_mounts_show_the_hosts_files,
        control::statistics_are_not_zero,
        control::paused_container_stands_still,
        control::want_of_memory_is_told,
        control::devices_are_the_guests,
        faults::program_that_is_absent_fails_like_with_runc,
        faults::killed_vmm_ends_its_container,
        faults::killed_shim_is_cleaned_up_after,
        network::network_of_the_namespace_is_the_containers,
        network::network_is_released_after_a_killed_shim,
    ]);
    cases.extend(cri::cases());
    cases
}

/// The cases of passed functions and of NUMA nodes, which need a host with some.
pub(crate) fn cases_of_devices() -> Vec<Case> {
    let mut cases = cases![
        Cold:
        devices::virtual_function_of_a_device_plugin_works,
        devices::virtual_function_that_a_pod_names_works_and_is_given_back,
        devices::nvme_disk_holds_what_the_guest_wrote,
        devices::partition_of_the_hosts_nvme_disk_is_a_block_volume,
        devices::function_is_given_back_when_vmm_or_shim_is_killed,
        devices::function_that_cannot_be_given_is_refused_and_left_alone,
        devices::function_that_cannot_be_reset_is_refused_and_left_alone,
        devices::group_with_a_function_of_another_driver_is_refused,
        ways::function_goes_by_the_way_that_the_host_has_or_the_operator_says,
        moved::function_that_cni_moved_is_the_containers_and_comes_back,
        moved::function_that_cni_moved_is_back_when_vmm_or_shim_is_killed,
        moved::function_that_cni_moved_is_the_hosts_when_the_namespace_is_gone,
        moved::function_that_cni_moved_and_is_not_to_be_passed_gets_a_tap,
        moved::function_that_cni_moved_and_cannot_be_passed_is_refused,
        moved::cri_function_of_a_cni_plugin_is_the_pods_and_the_plugin_finds_it_again,
        hot_plug::cri_function_of_a_container_comes_and_goes_with_it,
        hot_plug::cri_pods_have_a_function_each,
        ways::cri_functions_of_two_containers_come_and_go_by_themselves,
        hot_plug::cri_function_comes_into_a_vm_from_a_template,
        hot_plug::cri_function_is_free_when_vmm_or_shim_is_killed_after_it_came,
        hot_plug::cri_pod_that_gets_no_functions_later_refuses_them_and_lives,
        function_nodes::cri_container_has_the_nodes_of_its_function_and_others_have_not,
        function_nodes::cri_containers_have_the_nodes_of_their_pods_functions,
        function_nodes::nodes_of_a_function_are_the_users_who_may_have_it,
        chosen::cri_function_bound_to_vfio_is_what_cni_chose,
        chosen::cri_results_of_cni_that_say_nothing_or_two_things_are_told_of,
        placement::memory_comes_from_the_node_that_the_spec_names,
        placement::pod_that_asks_for_no_place_has_none,
        placement::strict_pod_that_is_apart_is_refused,
        placement::cri_function_of_a_container_that_is_apart_is_refused_before_it_is_touched,
        placement::huge_pages_are_the_vms_from_its_start_and_given_back,
    ];
    cases.extend(cri::cases_of_nodes());
    cases
}

/// The cases of vCPUs with a CPU each, which need a host with two nodes of two CPUs.
pub(crate) fn cases_of_cpus() -> Vec<Case> {
    cases![
        Cold:
        placement::vcpus_have_a_cpu_each,
        placement::cri_vcpus_that_come_later_have_a_cpu_each,
        placement::vms_with_the_same_cpus_are_not_pinned_to_them,
        placement::guest_of_two_nodes_sees_them,
    ]
}

/// How many cases may be run again in one run of the suite. A host that fails more often is none to
/// test on.
const MOST_AGAIN: u32 = 1;

/// Runs cases one after the other. Returns whether all of them held.
///
/// What a case leaves behind on the host is a failure of that case. A case that failed while the
/// host lost a VM (see [`Bed::vm_was_lost`]) is run again, once, and that is told: nested
/// virtualisation under emulation loses a VM now and then. No other failure is, on the same host.
pub(crate) fn run(
    cases: &[Case],
    image: &str,
    archives: &[PathBuf],
    of_devices: bool,
    mut record: Record,
) -> bool {
    let of_pods = cases.iter().any(|case| case.name.starts_with(cri::PREFIX));
    let (bed, _configuration) = match begin(image, archives, of_pods, of_devices) {
        Ok(begun) => begun,
        Err(error) => {
            println!("FAILED to begin: {error:#}");
            println!("0 passed, {} failed", cases.len());
            return false;
        }
    };
    let (mut failed, mut again) = (0, 0);
    let mut node = None;
    for case in cases {
        if record.has(case.name) {
            println!("ok      {} (held before)", case.name);
            continue;
        }
        match case.life {
            Life::Cold => node = None,
            Life::Template if node.is_none() => match templates::Node::with_template() {
                Ok((made, _)) => node = Some(made),
                // The case says that its VMs boot.
                Err(error) => println!("there is no template: {error:#}"),
            },
            Life::Template => {}
        }
        let mut held = attempt(case, &bed);
        if held == Held::NotOnThisHost && again < MOST_AGAIN {
            again += 1;
            println!("again   {}: the emulated host lost its VM, see above", case.name);
            held = attempt(case, &bed);
        }
        match held {
            Held::Yes => record.add(case.name),
            Held::No | Held::NotOnThisHost => failed += 1,
        }
    }
    if again > 0 {
        println!("{again} of the cases ran twice, since the emulated host lost a VM");
    }
    println!("{} passed, {failed} failed", cases.len() - failed);
    failed == 0
}

/// What the cases stand on. The node's configuration is as before when that of the result is dropped.
fn begin(
    image: &str,
    archives: &[PathBuf],
    of_pods: bool,
    of_devices: bool,
) -> Result<(Bed, Configuration)> {
    let configuration = templates::only_by_hand()?;
    let mut bed = Bed::new(image, archives)?;
    if of_pods {
        cri::begin(archives)?;
        bed.look_anew()?;
    }
    if of_devices {
        devices::begin()?;
        bed.look_anew()?;
    }
    Ok((bed, configuration))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Yes,
    No,
    /// It did not, and the host lost a VM meanwhile.
    NotOnThisHost,
}

/// Fails when a VM that started since the log was `from` bytes long did not come from the template.
fn from_template(bed: &Bed, from: usize) -> Result<()> {
    let cold = bed.lines_since(from, templates::COLD);
    ensure!(cold.is_empty(), "not every VM came from the template: {cold:?}");
    ensure!(!bed.lines_since(from, templates::RESTORED).is_empty(), "no VM came from the template");
    Ok(())
}

fn attempt(case: &Case, bed: &Bed) -> Held {
    let (start, log) = (Instant::now(), bed.log_length());
    let result = (case.body)(bed)
        .and_then(|()| bed.nothing_left())
        .and_then(|()| if case.life == Life::Template { from_template(bed, log) } else { Ok(()) });
    let seconds = start.elapsed().as_secs_f64();
    match result {
        Ok(()) => {
            println!("ok      {} ({seconds:.1} s)", case.name);
            Held::Yes
        }
        Err(error) => {
            println!("FAILED  {} ({seconds:.1} s): {error:#}", case.name);
            bed.tell_the_log(log);
            bed.clear();
            if bed.vm_was_lost(log) { Held::NotOnThisHost } else { Held::No }
        }
    }
}
