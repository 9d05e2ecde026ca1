//! A VM that follows what its containers may use, while it runs.
//!
//! It grows before a container has the limits that it grows for, and is asked for less some time
//! after there are fewer or lower ones. What fails on the way leaves the VM as it was; what is asked
//! back may never come. One change at a time: [`Growth::turn`] orders those that ask for changes.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::{Mutex, MutexGuard};
use vial_vmm_api::{Action, GROWTH_STEP_MIB, MEMORY_MIB, Reply, VmSize};

use crate::{
    agent::{Agent, AgentError},
    config::Config,
    jail::cgroup::{self, Cgroup, CgroupError},
    numa::{claim::Resources, placed::Placed},
    size::{Limits, Size},
    state_dir::StateDir,
    vmm_client::{VmmClient, VmmError},
};

/// How long a VM stays as it is that could be smaller: a container that ends is often started
/// again.
const REST: Duration = Duration::from_secs(5);
/// How long the VMM may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a VM does not follow its containers.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    /// There would be more than the operator allows, or the guest was told of.
    #[error(
        "with these limits the pod's VM would have {} vCPUs and {} MiB of memory, and it can grow \
         to {} and {}: give its containers less, or raise `max_vcpus` and `max_memory_mib` in the \
         configuration for pods to come (a VM from a template has 8 vCPUs at most)",
        .wanted.vcpus, .wanted.memory_mib, .most.vcpus, .most.memory_mib
    )]
    Beyond {
        /// What is wanted.
        wanted: Size,
        /// What there can be.
        most: Size,
    },
    /// It keeps its size.
    #[error(
        "with these limits the pod's VM would have {} vCPUs and {} MiB of memory, and it keeps its \
         {} and {}, {why}: make the pod anew with these limits",
        .wanted.vcpus, .wanted.memory_mib, .has.vcpus, .has.memory_mib
    )]
    Fixed {
        /// What is wanted.
        wanted: Size,
        /// What there is.
        has: Size,
        /// Why.
        why: &'static str,
    },
    /// The VMM.
    #[error("the VMM does not make the VM larger: {0}")]
    Vmm(#[from] VmmError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The VMM's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl GrowthError {
    /// Whether it is for what the pod asks, rather than for a failure.
    pub fn is_of_the_pod(&self) -> bool {
        matches!(self, Self::Beyond { .. } | Self::Fixed { .. })
    }
}

/// How far a VM can grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Not at all, for this reason.
    Fixed(&'static str),
    /// From a template that has so much memory, in MiB, up to there.
    UpTo {
        /// Memory of the template.
        base_mib: u32,
        /// The most.
        most: Size,
    },
}

/// The most memory in MiB that a VM can grow to: the operator's word, or all that the host has.
/// Nothing when it is to keep its size.
pub(super) fn most_memory_mib(config: &Config) -> Option<u32> {
    let host = || std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_mib(&text));
    let most = config.max_memory_mib.or_else(host).unwrap_or(0).min(*MEMORY_MIB.end());
    (most > 0 && config.max_vcpus > 0).then_some(most)
}

/// `MemTotal` of /proc/meminfo (proc_meminfo(5)), in MiB.
fn total_mib(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(u32::try_from(kib >> 10).unwrap_or(u32::MAX))
}

/// What a VM is grown by.
#[derive(Debug)]
pub struct Means {
    /// Its VMM.
    pub vmm: Arc<VmmClient>,
    /// Its agent.
    pub agent: Agent,
    /// The VMM's cgroup, and what is allowed there beside the guest's memory, in MiB.
    pub cgroup: Option<(Cgroup, u32)>,
    /// Where its threads are.
    pub placed: Arc<Placed>,
    /// Where its size is written down.
    pub dir: StateDir,
}

#[derive(Debug)]
struct Now {
    containers: BTreeMap<String, Limits>,
    /// What the guest is to have.
    size: Size,
    /// The vCPUs that the VMM has made, which never get fewer.
    made_vcpus: u8,
}

/// How large a VM is, and is to be.
#[derive(Debug)]
pub struct Growth {
    /// The configuration's own, for kernel and agent.
    own: Size,
    /// What the VM started with.
    start: Size,
    reach: Reach,
    means: Means,
    now: Mutex<Now>,
    turn: Mutex<()>,
}

/// When a VM cannot be as large as is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortage {
    /// It is an error.
    Refused,
    /// It becomes as large as it can.
    Borne,
}

impl Growth {
    /// Of a VM that has started with `start`, of which the configuration's own is `own`.
    pub fn new(own: Size, start: Size, reach: Reach, means: Means) -> Arc<Self> {
        let now = Now { containers: BTreeMap::new(), size: start, made_vcpus: start.vcpus };
        Arc::new(Self { own, start, reach, means, now: now.into(), turn: Mutex::default() })
    }

    /// Held while a container's limits change, in the VM and in the guest.
    pub async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Makes room for a container that is to have these limits, where they say something, and
    /// returns what it had.
    ///
    /// # Errors
    /// [`GrowthError`]; it has what it had, then, and the VM too.
    pub async fn claim(
        &self,
        id: &str,
        asked: &Resources,
        shortage: Shortage,
    ) -> Result<Option<Limits>, GrowthError> {
        let mut now = self.now.lock().await;
        // A pod that was not told of its containers' limits is not held to them.
        let was_enough = self.needed(&now).within(now.size);
        let before = now.containers.get(id).copied();
        now.containers.insert(id.into(), before.unwrap_or_default().changed(asked));
        let shortage = if was_enough { shortage } else { Shortage::Borne };
        match self.grow(&mut now, shortage).await {
            Ok(()) => Ok(before),
            Err(error) => {
                restore(&mut now, id, before);
                Err(error)
            }
        }
    }

    /// A container has what it had before a claim, or nothing. The VM may be smaller then, later.
    pub async fn put_back(self: &Arc<Self>, id: &str, before: Option<Limits>) {
        let mut now = self.now.lock().await;
        restore(&mut now, id, before);
        drop(now);
        self.settle().await;
    }

    /// Asks for less in a while, if there is more than is needed then.
    pub async fn settle(self: &Arc<Self>) {
        let now = self.now.lock().await;
        if now.size.within(self.needed(&now)) {
            return;
        }
        let growth = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(REST).await;
            if let Some(growth) = Weak::upgrade(&growth) {
                growth.shrink().await;
            }
        });
    }

    fn needed(&self, now: &Now) -> Size {
        self.start.for_containers(self.own, now.containers.values().copied())
    }

    async fn grow(&self, now: &mut Now, shortage: Shortage) -> Result<(), GrowthError> {
        let (has, wanted) = (now.size, self.needed(now).at_least(now.size));
        if wanted == has {
            return Ok(());
        }
        let target = match (self.reach, shortage) {
            (Reach::UpTo { most, .. }, _) if wanted.within(most) => wanted,
            (Reach::UpTo { most, .. }, Shortage::Borne) => wanted.at_most(most).at_least(has),
            (Reach::UpTo { most, .. }, Shortage::Refused) => {
                return Err(GrowthError::Beyond { wanted, most });
            }
            (Reach::Fixed(why), Shortage::Borne) => {
                tracing::warn!("{}", GrowthError::Fixed { wanted, has, why });
                return Ok(());
            }
            (Reach::Fixed(why), Shortage::Refused) => {
                return Err(GrowthError::Fixed { wanted, has, why });
            }
        };
        if target != wanted {
            let most = target;
            tracing::warn!("{}", GrowthError::Beyond { wanted, most });
        }
        if let Err(error) = self.change(now, target).await {
            self.back(now).await;
            return Err(error);
        }
        tracing::info!("the VM has {} vCPUs and {} MiB now", target.vcpus, target.memory_mib);
        self.write_down(now, target);
        Ok(())
    }

    /// The cgroup first, so that nothing is taken that it does not allow; the guest last, when new
    /// vCPUs have their CPUs.
    async fn change(&self, now: &mut Now, target: Size) -> Result<(), GrowthError> {
        self.allow(now, target)?;
        self.resize(now, target).await?;
        self.place(target);
        Ok(self.means.agent.grow(target.vcpus, self.more_mib(target)).await?)
    }

    /// What was changed half is as it was, as far as that can be.
    async fn back(&self, now: &mut Now) {
        let size = now.size;
        self.place(size);
        if let Err(error) = self.resize(now, size).await {
            tracing::warn!("the guest may be asked for more memory than is needed: {error}");
        } else if let Err(error) = self.allow(now, size) {
            tracing::warn!("{error}");
        }
    }

    /// Asks the guest for what is more than needed. It never fails the pod.
    async fn shrink(&self) {
        let mut now = self.now.lock().await;
        let target = self.needed(&now).at_most(now.size);
        if target == now.size || self.means.vmm.is_closed() {
            return;
        }
        // Processors first: one that is not used needs no memory. Of the cgroup's limits nothing is
        // taken, since the guest gives back what it likes, when it likes.
        let asked = self.means.agent.grow(target.vcpus, self.more_mib(target)).await;
        let asked = match asked {
            Ok(()) => self.resize(&mut now, target).await,
            Err(error) => Err(error.into()),
        };
        match asked {
            Ok(()) => {
                let Size { vcpus, memory_mib } = target;
                tracing::info!("the VM is to have {vcpus} vCPUs and {memory_mib} MiB");
                self.place(target);
                self.write_down(&mut now, target);
            }
            Err(error) => tracing::warn!("the VM stays larger than it has to be: {error}"),
        }
    }

    fn place(&self, size: Size) {
        if let Err(error) = self.means.placed.resized(size) {
            tracing::warn!("the VM's vCPUs are not where they should be: {error}");
        }
    }

    /// Whoever lists VMs sees it.
    fn write_down(&self, now: &mut Now, size: Size) {
        now.size = size;
        if let Err(error) = self.means.dir.write_size(size) {
            tracing::warn!("the VM is listed with the size that it had: {error}");
        }
    }

    /// What the guest is to have more than its template, in MiB.
    fn more_mib(&self, size: Size) -> u32 {
        match self.reach {
            Reach::Fixed(_) => 0,
            Reach::UpTo { base_mib, .. } => {
                size.memory_mib.saturating_sub(base_mib).next_multiple_of(GROWTH_STEP_MIB)
            }
        }
    }

    async fn resize(&self, now: &mut Now, size: Size) -> Result<(), GrowthError> {
        let Reach::UpTo { base_mib, .. } = self.reach else { return Ok(()) };
        let vcpus = size.vcpus.max(now.made_vcpus);
        let memory_mib = base_mib + self.more_mib(size);
        let asked = self.means.vmm.request(Action::Resize { vcpus, memory_mib }, &[]);
        let answer = tokio::time::timeout(PATIENCE, asked).await;
        match answer.map_err(|_| VmmError::Late(PATIENCE))?? {
            Reply::Size(VmSize { vcpus, .. }) => now.made_vcpus = vcpus,
            _ => return Err(VmmError::Answer.into()),
        }
        Ok(())
    }

    fn allow(&self, now: &Now, size: Size) -> Result<(), GrowthError> {
        let Some((cgroup, overhead_mib)) = &self.means.cgroup else { return Ok(()) };
        let limits = cgroup::Limits {
            vcpus: size.vcpus.max(now.made_vcpus),
            memory_mib: size.memory_mib.saturating_add(GROWTH_STEP_MIB),
            overhead_mib: *overhead_mib,
        };
        Ok(cgroup.allow(limits)?)
    }
}

fn restore(now: &mut Now, id: &str, before: Option<Limits>) {
    match before {
        Some(limits) => drop(now.containers.insert(id.into(), limits)),
        None => drop(now.containers.remove(id)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::numa::{Wanted, placed::Subject};

    #[test]
    fn memory_of_the_host_is_read() {
        let text = "MemTotal:       16384000 kB\nMemFree:         1024 kB\n";
        assert_eq!(total_mib(text), Some(16000));
        assert_eq!(total_mib("MemFree: 1 kB"), None);
        assert_eq!(total_mib("MemTotal: much"), None);
        assert_eq!(total_mib("MemTotal: 18446744073709551615 kB"), Some(u32::MAX));
    }

    /// A growth whose VMM answers with what `answer` makes of the size that it is asked for, below `root`.
    fn growth(
        root: &Path,
        reach: Reach,
        answer: impl Fn(u8, u32) -> Result<Reply, vial_vmm_api::Failure> + Send + 'static,
    ) -> Arc<Growth> {
        use std::os::fd::AsFd;
        use vial_vmm_api::{MAX_MESSAGE_BYTES, Message, Request, decode, encode};
        let (ours, theirs) = crate::vmm_client::socket_pair().unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; MAX_MESSAGE_BYTES];
            while let Ok(bytes @ 1..) = rustix::io::read(theirs.as_fd(), &mut buffer) {
                let Request { id, action } = decode(&buffer[..bytes]).unwrap();
                let Action::Resize { vcpus, memory_mib } = action else { panic!("{action:?}") };
                let message = Message::Reply { id, result: answer(vcpus, memory_mib) };
                rustix::io::write(&theirs, &encode(&message).unwrap()).unwrap();
            }
        });
        let (vmm, _events) = VmmClient::new(ours).unwrap();
        // Nobody is at the other end.
        let (stream, _) = tokio::net::UnixStream::pair().unwrap();
        let size = Size { vcpus: 1, memory_mib: 192 };
        let dir = StateDir::new(root, "default", "demo").unwrap();
        let subject = Subject {
            wanted: Wanted::default(),
            size,
            functions: Vec::new(),
            cgroup: None,
            dir: dir.clone(),
            state_directory: root.into(),
        };
        let placed = Arc::new(Placed::new(subject, None).unwrap().0);
        let agent = Agent::unmet(stream);
        let means = Means { vmm: Arc::new(vmm), agent, cgroup: None, placed, dir };
        Growth::new(Size { vcpus: 1, memory_mib: 128 }, size, reach, means)
    }

    fn memory(bytes: i64) -> Resources {
        serde_json::from_str(&format!(r#"{{"memory": {{"limit": {bytes}}}}}"#)).unwrap()
    }

    const UP_TO: Reach = Reach::UpTo { base_mib: 128, most: Size { vcpus: 8, memory_mib: 512 } };

    #[tokio::test]
    async fn what_cannot_be_had_is_refused_and_leaves_all_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        let refused = |_, _| -> Result<Reply, _> { unreachable!("nothing is asked of the VMM") };
        for (reach, words) in
            [(UP_TO, "max_memory_mib"), (Reach::Fixed("for a test"), "for a test")]
        {
            let growth = growth(root.path(), reach, refused);
            growth.claim("a", &memory(64 << 20), Shortage::Refused).await.unwrap();
            let error = growth.claim("a", &memory(1 << 30), Shortage::Refused).await.unwrap_err();
            assert!(error.is_of_the_pod() && error.to_string().contains(words), "{error}");
            let now = growth.now.lock().await;
            assert_eq!(now.size, growth.start);
            assert_eq!(now.containers["a"].memory, 64 << 20);
        }
    }

    #[tokio::test]
    async fn vmm_or_agent_that_fails_leaves_what_was() {
        let failure = vial_vmm_api::Failure {
            kind: vial_vmm_api::FailureKind::Host,
            message: "no memory".into(),
        };
        let root = tempfile::tempdir().unwrap();
        let growth_of_none = growth(root.path(), UP_TO, move |_, _| Err(failure.clone()));
        let error = growth_of_none.claim("a", &memory(128 << 20), Shortage::Borne).await;
        assert!(error.unwrap_err().to_string().contains("no memory"));
        assert!(growth_of_none.now.lock().await.containers.is_empty());

        let (tell, asked) = std::sync::mpsc::channel();
        let growth = growth(root.path(), UP_TO, move |vcpus, memory_mib| {
            tell.send(memory_mib).unwrap();
            Ok(Reply::Size(VmSize { vcpus, memory_mib, plugged_mib: 128 }))
        });
        let error = growth.claim("a", &memory(127 << 20), Shortage::Borne).await.unwrap_err();
        assert!(matches!(error, GrowthError::Agent(_)), "{error}");
        // In steps, and back again.
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [256, 192]);
        assert_eq!(growth.now.lock().await.size, growth.start);
    }
}
