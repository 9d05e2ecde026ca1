//! Whether the host has the huge pages that a VM's memory is to consist of, looked at before there
//! is a VM. They are counted for the host, for each node, and for each cgroup above the VMM's
//! (Linux Documentation/admin-guide/mm/hugetlbpage.rst and cgroup-v2.rst, "HugeTLB").

use std::path::{Path, PathBuf};

use vial_vmm_api::HugePages;

use super::{NumaError, decide::Placement, topology};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// How the kernel and Kubernetes call the pages.
fn names(pages: HugePages) -> (&'static str, &'static str, &'static str) {
    match pages {
        HugePages::Mib2 => ("hugepages-2048kB", "hugetlb.2MB", "2Mi"),
        HugePages::Gib1 => ("hugepages-1048576kB", "hugetlb.1GB", "1Gi"),
    }
}

/// Whether there are enough for a VM of that size, placed so, in a cgroup below `cgroup`.
///
/// # Errors
/// [`NumaError::TooFewPages`] and [`NumaError::PageLimit`].
pub fn check(
    pages: HugePages,
    memory_mib: u32,
    placement: &Placement,
    cgroup: Option<&Path>,
) -> Result<(), NumaError> {
    check_pools(Path::new(POOLS), Path::new(topology::NODES), pages, memory_mib, placement)?;
    match cgroup {
        Some(cgroup) => check_limits(cgroup, pages, memory_mib),
        None => Ok(()),
    }
}

fn check_pools(
    pools: &Path,
    nodes: &Path,
    pages: HugePages,
    memory_mib: u32,
    placement: &Placement,
) -> Result<(), NumaError> {
    let (pool, _, _) = names(pages);
    let page_mib = pages.mib();
    let few = |wanted, free, node: String, path: PathBuf| NumaError::TooFewPages {
        wanted,
        page_mib,
        node,
        free,
        path,
    };
    let wanted = u64::from(memory_mib / page_mib);
    let path = pools.join(pool);
    // What others have mapped and not touched yet counts as free, and is theirs.
    let free =
        count(&path.join("free_hugepages")).saturating_sub(count(&path.join("resv_hugepages")));
    if free < wanted {
        return Err(few(wanted, free, String::new(), path));
    }
    if placement.mems.is_empty() {
        return Ok(());
    }
    for share in &placement.nodes {
        let path = nodes.join(format!("node{}/hugepages", share.node)).join(pool);
        let (wanted, free) =
            (u64::from(share.memory_mib / page_mib), count(&path.join("free_hugepages")));
        if free < wanted {
            return Err(few(wanted, free, format!(" on NUMA node {}", share.node), path));
        }
    }
    Ok(())
}

/// The number in a file. A kernel without pages of that size has no file, and none of them.
fn count(path: &Path) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}

/// The limits of `cgroup` and those above it, as far as there are any.
fn check_limits(cgroup: &Path, pages: HugePages, memory_mib: u32) -> Result<(), NumaError> {
    let (_, file, name) = names(pages);
    for above in cgroup.ancestors() {
        let path = above.join(format!("{file}.max"));
        let limit = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        // "max" is none.
        let Some(limit) = limit.map(|limit: u64| limit >> 20) else { continue };
        let used = count(&above.join(format!("{file}.current"))).div_ceil(1 << 20);
        let allowed_mib = limit.saturating_sub(used);
        let wanted_mib = u64::from(memory_mib);
        if allowed_mib < wanted_mib {
            let page_mib = pages.mib();
            return Err(NumaError::PageLimit { wanted_mib, page_mib, path, allowed_mib, name });
        }
    }
    Ok(())
}

/// The pages of both sizes that the host has reserved and that are free, as text; none without.
pub fn shown() -> Option<String> {
    let of = |pages| {
        let (pool, _, name) = names(pages);
        let path = Path::new(POOLS).join(pool);
        let all = count(&path.join("nr_hugepages"));
        let free = count(&path.join("free_hugepages"));
        (all > 0).then(|| format!("{free} of {all} pages of {name} are free"))
    };
    let found: Vec<String> =
        [HugePages::Mib2, HugePages::Gib1].into_iter().filter_map(of).collect();
    (!found.is_empty()).then(|| found.join(", "))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::numa::{decide::Share, list::Set};

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn pages_are_counted_without_those_that_are_spoken_for() {
        let root = tempfile::tempdir().unwrap();
        let (pools, nodes) = (root.path().join("pools"), root.path().join("nodes"));
        let pool = "hugepages-2048kB";
        write(pools.join(pool).join("free_hugepages"), "100\n");
        write(pools.join(pool).join("resv_hugepages"), "20\n");
        write(nodes.join("node1/hugepages").join(pool).join("free_hugepages"), "70\n");
        let anywhere = Placement::default();
        let there = Placement {
            mems: Set::from([1]),
            nodes: vec![Share { node: 1, memory_mib: 160, vcpus: 1 }],
            ..Default::default()
        };
        let check = |mib, placement: &Placement| {
            check_pools(&pools, &nodes, HugePages::Mib2, mib, placement)
        };
        check(160, &anywhere).unwrap();
        let error = check(162, &anywhere).unwrap_err().to_string();
        assert!(error.contains("needs 81 free") && error.contains("there are 80"), "{error}");
        let error = check(160, &there).unwrap_err().to_string();
        assert!(error.contains("on NUMA node 1") && error.contains("there are 70"), "{error}");
        let none = check_pools(&pools, &nodes, HugePages::Gib1, 1024, &anywhere);
        assert!(none.unwrap_err().to_string().contains("there are 0"));
    }

    #[test]
    fn limit_of_any_cgroup_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod");
        write(pod.join("hugetlb.2MB.max"), "max\n");
        check_limits(&pod, HugePages::Mib2, 65536).unwrap();
        write(root.path().join("kubepods/hugetlb.2MB.max"), &format!("{}\n", 512 << 20));
        write(root.path().join("kubepods/hugetlb.2MB.current"), &format!("{}\n", 100 << 20));
        check_limits(&pod, HugePages::Mib2, 412).unwrap();
        let error = check_limits(&pod, HugePages::Mib2, 414).unwrap_err().to_string();
        assert!(error.contains("412 MiB more") && error.contains("hugepages-2Mi"), "{error}");
    }
}
