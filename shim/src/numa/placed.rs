//! Carries out where a VM goes, and changes it when its containers change.
//!
//! The VMM's cgroup is what binds: it starts there, so that its first page and its first thread
//! are in the right place, and it cannot leave. When that changes, memory that is elsewhere is
//! moved. Each thread's own CPUs come on top, set from here by the names that the VMM gives its
//! threads; one that lies only misplaces itself, within its cgroup.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock},
};

use rustix::{process::Pid, thread::CpuSet};
use vial_vmm_api as api;

use super::{
    Mode, NumaError, Wanted,
    claim::{Claim, Resources},
    decide::{self, Mismatch, Placement},
    huge_pages,
    list::{Set, show},
    migrate,
    topology::{Topology, failed},
};
use crate::{
    devices::address::Address,
    jail::cgroup::Cgroup,
    size::Size,
    state_dir::{ProcessIdentity, StateDir},
};

/// What the names of vCPUs' threads begin with, before their numbers.
const VCPU_THREAD: &str = "vcpu";

/// A VM, and where it is.
#[derive(Debug)]
pub struct Placed {
    subject: Subject,
    vmm: OnceLock<ProcessIdentity>,
    now: Mutex<Now>,
}

/// What is placed.
#[derive(Debug)]
pub struct Subject {
    /// The pod's annotations.
    pub wanted: Wanted,
    /// How large its VM is at its start.
    pub size: Size,
    /// Its PCI functions whose nodes are known.
    pub functions: Vec<(Address, u32)>,
    /// The VMM's cgroup; none without a jail.
    pub cgroup: Option<Cgroup>,
    /// Where the placement is written down.
    pub dir: StateDir,
    /// Where those of other VMs are.
    pub state_directory: PathBuf,
}

/// What a container asks for.
#[derive(Debug, Clone, Default)]
struct Asked {
    claim: Claim,
    /// The PCI functions that it brings, and their nodes.
    functions: Vec<(Address, u32)>,
}

#[derive(Debug)]
struct Now {
    size: Size,
    asked: BTreeMap<String, Asked>,
    placement: Placement,
    /// What was warned of.
    mismatches: Vec<Mismatch>,
}

impl Placed {
    /// Prepares the place of a VM that is about to start, for a container whose id and claim are
    /// known already, and says what the VMM is to know of it.
    ///
    /// # Errors
    /// [`NumaError`]; the VM must not start then.
    pub fn new(
        subject: Subject,
        first: Option<(String, Claim)>,
    ) -> Result<(Self, api::Placement), NumaError> {
        let pages = subject.wanted.huge_pages;
        let now = Now {
            size: subject.size,
            asked: BTreeMap::new(),
            placement: Placement::default(),
            mismatches: Vec::new(),
        };
        let placed = Self { subject, vmm: OnceLock::new(), now: now.into() };
        let mut now = placed.lock();
        let asked = |(id, claim)| (id, Asked { claim, functions: Vec::new() });
        placed.change(&mut now, first.into_iter().map(asked).collect())?;
        let subject = &placed.subject;
        let told = match now.placement == Placement::default() {
            true => api::Placement { huge_pages: pages, ..Default::default() },
            false => {
                let (wanted, functions) = (subject.wanted, &subject.functions);
                now.placement.for_vmm(&Topology::of_host()?, wanted, functions)
            }
        };
        if let Some(pages) = pages {
            let cgroup = subject.cgroup.as_ref().map(Cgroup::path);
            huge_pages::check(pages, subject.size.memory_mib, &now.placement, cgroup)?;
        }
        drop(now);
        Ok((placed, told))
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// How large the VM is now.
    pub fn size(&self) -> Size {
        self.lock().size
    }

    /// Pins the threads of the VMM, whose vCPUs run.
    ///
    /// # Errors
    /// [`NumaError::Pin`], of a strict pod.
    pub fn started(&self, vmm: Option<ProcessIdentity>) -> Result<(), NumaError> {
        let now = self.lock();
        if let Some(vmm) = vmm {
            let _ = self.vmm.set(vmm); // It is told once.
        }
        self.forgive(self.pin(&Placement::default(), &now.placement))
    }

    /// The VM is to have another size. What vCPUs it has more have their CPUs when this returns.
    ///
    /// # Errors
    /// [`NumaError`]; the VM is where it was then, of its new size all the same.
    pub fn resized(&self, size: Size) -> Result<(), NumaError> {
        let mut now = self.lock();
        now.size = size;
        let (before, asked) = (now.placement.clone(), now.asked.clone());
        self.change(&mut now, asked)?;
        match now.placement == before {
            // Threads that are new have the CPUs of the one that started them.
            true => self.forgive(self.pin(&before, &before)),
            false => Ok(()),
        }
    }

    /// Makes room for a container, which brings functions whose nodes are known. One that asks for nothing
    /// changes nothing.
    ///
    /// # Errors
    /// [`NumaError`]; everything is as before then.
    pub fn claim(
        &self,
        id: &str,
        claim: Claim,
        functions: Vec<(Address, u32)>,
    ) -> Result<(), NumaError> {
        let mut now = self.lock();
        let mut asked = now.asked.clone();
        asked.insert(id.into(), Asked { claim, functions });
        self.change(&mut now, asked)
    }

    /// A container asks again for what it asked for before an update.
    ///
    /// # Errors
    /// [`NumaError`]; everything is as before then.
    pub fn put_back(&self, id: &str, claim: Claim) -> Result<(), NumaError> {
        let mut now = self.lock();
        let mut asked = now.asked.clone();
        asked.entry(id.into()).or_default().claim = claim;
        self.change(&mut now, asked)
    }

    /// Changes what a container asks for, as far as `resources` say something of it, and returns
    /// what it had asked for.
    ///
    /// # Errors
    /// [`NumaError`]; everything is as before then.
    pub fn update(&self, id: &str, resources: &Resources) -> Result<Claim, NumaError> {
        let mut now = self.lock();
        let mut asked = now.asked.clone();
        let one = asked.entry(id.into()).or_default();
        let before = std::mem::take(&mut one.claim);
        let mut claim = Claim::new(resources)?;
        for (new, old) in [(&mut claim.cpus, &before.cpus), (&mut claim.mems, &before.mems)] {
            if new.is_empty() {
                new.clone_from(old);
            }
        }
        // Of one that has told nothing, nothing is to be learnt.
        claim.count = before.count.map(|before| claim.count.unwrap_or(before));
        one.claim = claim;
        self.change(&mut now, asked)?;
        Ok(before)
    }

    /// Forgets a container.
    pub fn release(&self, id: &str) {
        let mut now = self.lock();
        let mut asked = now.asked.clone();
        asked.remove(id);
        if let Err(error) = self.change(&mut now, asked) {
            tracing::warn!("the VM stays where the container {id} wanted it: {error}");
            now.asked.remove(id);
        }
    }

    /// Goes to where containers want it, or stays.
    fn change(&self, now: &mut Now, asked: BTreeMap<String, Asked>) -> Result<(), NumaError> {
        let (mut placement, mismatches) = self.decide(now.size, &asked)?;
        for mismatch in mismatches.iter().filter(|mismatch| !now.mismatches.contains(mismatch)) {
            tracing::warn!(
                "{mismatch}; a pod with `{}: strict` is refused then",
                super::ANNOTATION
            );
        }
        now.mismatches = mismatches;
        if placement == now.placement {
            now.asked = asked;
            return Ok(());
        }
        let dir = &self.subject.dir;
        dir.write_placement(&placement)?;
        // Of two VMs that take the same CPUs at once, one sees the other now.
        let pins: Set = placement.pins.iter().copied().collect();
        let moved = (|| {
            if !pins.is_disjoint(&self.taken()) {
                (placement, _) = self.decide(now.size, &asked)?;
                dir.write_placement(&placement)?;
            }
            self.forgive(self.confine(&placement))?;
            self.forgive(self.pin(&now.placement, &placement))?;
            self.forgive(self.fetch(&placement))
        })();
        if let Err(error) = moved {
            let back = [
                self.confine(&now.placement),
                self.pin(&placement, &now.placement),
                dir.write_placement(&now.placement).map_err(NumaError::from),
            ];
            for failure in back.into_iter().filter_map(Result::err) {
                tracing::error!("the VM does not go back to where it was: {failure}");
            }
            return Err(error);
        }
        tracing::info!(
            "the VM is on CPUs {} and NUMA nodes {}",
            placement.cpus_shown(),
            placement.nodes_shown()
        );
        now.asked = asked;
        now.placement = placement;
        Ok(())
    }

    fn decide(
        &self,
        size: Size,
        asked: &BTreeMap<String, Asked>,
    ) -> Result<(Placement, Vec<Mismatch>), NumaError> {
        let Subject { wanted, functions, cgroup, .. } = &self.subject;
        // Several containers can bring one.
        let late: BTreeSet<(Address, u32)> =
            asked.values().flat_map(|one| &one.functions).copied().collect();
        let late: Vec<(Address, u32)> = late.into_iter().collect();
        let no_functions = functions.is_empty() && late.is_empty();
        if no_functions && asked.values().all(|one| one.claim.is_empty()) {
            return Ok(Default::default());
        }
        let host = Topology::of_host()?;
        let online = host.cpus();
        let allowed = match cgroup.as_ref().map(Cgroup::cpus_of_parent).transpose()?.flatten() {
            Some(allowed) => allowed.intersection(&online).copied().collect(),
            None => online,
        };
        let pod = decide::Pod {
            wanted: *wanted,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            claims: asked.values().map(|one| &one.claim).collect(),
            functions,
            late: &late,
            allowed: &allowed,
            taken: &self.taken(),
        };
        decide::decide(&host, &pod)
    }

    /// The CPUs that vCPUs of other VMs on this host are pinned to.
    fn taken(&self) -> Set {
        let Subject { dir, state_directory, .. } = &self.subject;
        let others = StateDir::all(state_directory).into_iter().filter(|other| other != dir);
        // One that cannot be read is about to go, or damaged, which its own shim tells.
        let placements = others.filter_map(|other| other.read_placement().ok().flatten());
        placements.flat_map(|placement| placement.pins).collect()
    }

    /// Lets a failure pass that does not break the pod's word.
    fn forgive(&self, result: Result<(), NumaError>) -> Result<(), NumaError> {
        match result {
            Err(error) if self.subject.wanted.mode != Mode::Strict => {
                tracing::warn!("the VM runs elsewhere than it should: {error}");
                Ok(())
            }
            result => result,
        }
    }

    fn confine(&self, placement: &Placement) -> Result<(), NumaError> {
        match &self.subject.cgroup {
            Some(cgroup) => {
                cgroup.confine(&show(&placement.cpus), &show(&placement.mems))?;
            }
            None if !placement.mems.is_empty() => tracing::warn!(
                "the VM's memory comes from anywhere: without a jail (`jail = false`) it has no \
                 cgroup of its own"
            ),
            None => {}
        }
        Ok(())
    }

    /// Moves the memory of a VM that runs to where new memory comes from, when that is one place.
    /// Pages that stay are told in a number only: those that functions of the host may write to
    /// cannot be moved.
    fn fetch(&self, placement: &Placement) -> Result<(), NumaError> {
        let Some(vmm) = self.vmm.get().filter(|vmm| vmm.is_alive()) else { return Ok(()) };
        let there: Set = match &placement.nodes[..] {
            _ if !placement.mems.is_empty() => placement.mems.clone(),
            [share] => Set::from([share.node]),
            _ => return Ok(()),
        };
        let elsewhere = Topology::of_host()?.with_memory().difference(&there).copied().collect();
        let left = migrate::pages(vmm.pid, &elsewhere, &there)
            .map_err(|error| NumaError::Migrate { nodes: show(&there), error })?;
        tracing::debug!("{left} pages stay on other nodes than {}", show(&there));
        Ok(())
    }

    /// Gives each thread its CPUs, when there is a VMM and they differ from what its cgroup says.
    fn pin(&self, before: &Placement, placement: &Placement) -> Result<(), NumaError> {
        // The number of one that has ended may be another's.
        let Some(vmm) = self.vmm.get().filter(|vmm| vmm.is_alive()) else { return Ok(()) };
        let by_cgroup = self.subject.cgroup.is_some() || placement.cpus == before.cpus;
        if placement.pins.is_empty() && before.pins.is_empty() && by_cgroup {
            return Ok(());
        }
        let everywhere = match placement.cpus.is_empty() {
            true => Topology::of_host()?.cpus(),
            false => placement.cpus.clone(),
        };
        let tasks = PathBuf::from(format!("/proc/{}/task", vmm.pid));
        for thread in threads(&tasks).map_err(failed("list", &tasks))? {
            pin_thread(&thread, &thread.cpus(placement, &everywhere))?;
        }
        Ok(())
    }
}

/// A thread, and what it is called.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    number: i32,
    name: String,
}

impl Thread {
    fn cpus(&self, placement: &Placement, everywhere: &Set) -> Set {
        let vcpu = self.name.strip_prefix(VCPU_THREAD).and_then(|n| n.parse::<usize>().ok());
        match vcpu.and_then(|number| placement.pins.get(number)) {
            Some(cpu) => Set::from([*cpu]),
            None if placement.pins.is_empty() => everywhere.clone(),
            None => placement.others.clone(),
        }
    }
}

fn threads(tasks: &Path) -> io::Result<Vec<Thread>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(tasks)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A thread may end while it is looked at.
        let name = fs::read_to_string(entry.path().join("comm"));
        if let (Some(number), Ok(name)) = (number, name) {
            found.push(Thread { number, name: name.trim_end().into() });
        }
    }
    Ok(found)
}

fn pin_thread(thread: &Thread, cpus: &Set) -> Result<(), NumaError> {
    let failed = |error: io::Error| NumaError::Pin {
        thread: thread.name.chars().flat_map(char::escape_debug).collect(),
        cpus: show(cpus),
        error,
    };
    let mut set = CpuSet::new();
    for cpu in cpus {
        match usize::try_from(*cpu) {
            Ok(cpu) if cpu < CpuSet::MAX_CPU => set.set(cpu),
            _ => return Err(failed(io::ErrorKind::Unsupported.into())),
        }
    }
    match rustix::thread::sched_setaffinity(Pid::from_raw(thread.number), &set) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(name: &str) -> Thread {
        Thread { number: 1, name: name.into() }
    }

    #[test]
    fn vcpus_have_their_own_cpus_and_all_others_the_rest() {
        let everywhere = Set::from([0, 1, 2, 3]);
        let pinned = Placement {
            cpus: Set::from([1, 2, 3]),
            pins: vec![2, 1],
            others: Set::from([3]),
            ..Default::default()
        };
        for (name, cpus) in [
            ("vcpu0", "2"),
            ("vcpu1", "1"),
            ("vcpu2", "3"),
            ("vcpu", "3"),
            ("vcpu-1", "3"),
            ("io", "3"),
            // The kernel's, for a network.
            ("vhost-12", "3"),
        ] {
            assert_eq!(show(&thread(name).cpus(&pinned, &everywhere)), cpus, "{name}");
        }
        let free = Placement::default();
        assert_eq!(thread("vcpu0").cpus(&free, &everywhere), everywhere);
    }

    #[test]
    fn thread_is_kept_to_its_cpus() {
        let (told, name) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let other = std::thread::Builder::new()
            .name("vcpu7".into())
            .spawn(move || {
                told.send(()).unwrap();
                let _ = ends.recv();
            })
            .unwrap();
        name.recv().unwrap();
        let tasks = Path::new("/proc/self/task");
        let mut found = threads(tasks).unwrap().into_iter().filter(|one| one.name == "vcpu7");
        let thread = found.next().unwrap();
        let cpu = Topology::of_host().unwrap().cpus().into_iter().next().unwrap();
        pin_thread(&thread, &Set::from([cpu])).unwrap();
        let status = tasks.join(thread.number.to_string()).join("status");
        let status = fs::read_to_string(status).unwrap();
        assert!(status.contains(&format!("Cpus_allowed_list:\t{cpu}\n")), "{status}");
        let error = pin_thread(&thread, &Set::from([8191])).unwrap_err().to_string();
        assert!(error.contains("vcpu7") && error.contains("8191"), "{error}");
        drop(end);
        other.join().unwrap();
    }

    fn subject(root: &Path) -> Subject {
        let dir = StateDir::new(root, "default", "demo").unwrap();
        dir.create().unwrap();
        Subject {
            wanted: Wanted::default(),
            size: Size { vcpus: 1, memory_mib: 128 },
            functions: Vec::new(),
            cgroup: None,
            dir,
            state_directory: root.into(),
        }
    }

    /// A process with one thread, which is called as a vCPU's. It stands for a VMM, until it is dropped.
    struct Vmm(std::process::Child);

    impl Vmm {
        fn new(root: &Path) -> Self {
            use std::os::unix::process::CommandExt;
            let program = root.join("vcpu0");
            fs::copy("/bin/sleep", &program).unwrap();
            let mut command = std::process::Command::new(&program);
            Self(command.arg0("sleep").arg("1000").spawn().unwrap())
        }

        fn identity(&self) -> Option<ProcessIdentity> {
            ProcessIdentity::of(self.0.id())
        }

        /// The CPUs that it may use.
        fn cpus(&self) -> String {
            let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            line.unwrap().trim().to_owned()
        }

        /// It may use all of these, as a thread that has just come.
        fn is_new(&self, cpus: &Set) {
            pin_thread(&Thread { number: self.0.id() as i32, name: "vcpu0".into() }, cpus).unwrap();
        }
    }

    impl Drop for Vmm {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn threads_of_a_vm_that_is_resized_have_the_cpus_that_they_are_to_have() {
        let all = Topology::of_host().unwrap().cpus();
        let own = *all.last().unwrap();
        let is_own = all.len() > 1; // The only one is everybody's.
        let root = tempfile::tempdir().unwrap();
        let vmm = Vmm::new(root.path());
        let claim = Claim { cpus: Set::from([own]), count: Some(1), ..Default::default() };
        let (placed, _) = Placed::new(subject(root.path()), Some(("a".into(), claim))).unwrap();
        placed.started(vmm.identity()).unwrap();
        let pins = || placed.subject.dir.read_placement().unwrap().unwrap().pins;
        assert_eq!(pins(), if is_own { vec![own] } else { vec![] });
        // Of the same size or not: threads that came have their CPU.
        vmm.is_new(&all);
        placed.resized(Size { vcpus: 1, memory_mib: 256 }).unwrap();
        assert_eq!(vmm.cpus(), own.to_string());
        // There is no CPU for each any more, and then again.
        placed.resized(Size { vcpus: 2, memory_mib: 256 }).unwrap();
        assert_eq!((pins(), vmm.cpus()), (vec![], own.to_string()));
        placed.resized(Size { vcpus: 1, memory_mib: 128 }).unwrap();
        assert_eq!(pins().len(), usize::from(is_own));
    }

    #[test]
    fn vm_of_a_pod_that_asks_for_nothing_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let subject = subject(root.path());
        let dir = subject.dir.clone();
        let (placed, told) = Placed::new(subject, Some(("a".into(), Claim::default()))).unwrap();
        assert_eq!((told, dir.read_placement().unwrap()), (api::Placement::default(), None));
        placed.started(ProcessIdentity::of(std::process::id())).unwrap();
        let resources: Resources =
            serde_json::from_str(r#"{"cpu": {"quota": 1, "shares": 2}}"#).unwrap();
        placed.update("a", &resources).unwrap();
        placed.release("a");
        assert_eq!(dir.read_placement().unwrap(), None);
        let all = Topology::of_host().unwrap().cpus();
        placed.claim("b", Claim { cpus: all.clone(), ..Default::default() }, vec![]).unwrap();
        assert_eq!(dir.read_placement().unwrap().unwrap().cpus, all);
        let absent = Claim { cpus: Set::from([8000]), ..Default::default() };
        assert!(placed.claim("c", absent, vec![]).unwrap_err().to_string().contains("8000"));
        assert_eq!(dir.read_placement().unwrap().unwrap().cpus, all);
    }
}
