//! Functions of the host in a VM: those that the pod asks for, those that CNI has given it, and those that containers bring into
//! it while it runs, and take with them.
//!
//! Coming: checked, written down, opened, handed to the VMM, found by the agent. Going: the agent
//! takes them from their drivers, the VMM resets them and closes them, whether the guest has let go
//! or not, and they are given back. The VMM holds the only descriptors, so that its end, however
//! it comes, is the end of all that.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use tokio::time::timeout;
use vial_agent_protocol::agent::{
    ChangeNetworkRequest, ConfigureNetworkRequest, FunctionName, GivenFunction, InterfaceChange,
};
use vial_vmm_api::{Action, AddedFunctions, Descriptor, MAX_PASSED_FUNCTIONS, PassedBy, Reply};

use super::{Given, Plan, Sandbox, vmm};
use crate::{
    agent::Agent,
    devices::{
        DeviceError,
        address::Address,
        binding,
        binding::Record,
        handles::{By, Handles, Opener},
        passed::{Granted, Passed, Set, WrongNumbers},
        pci::Sysfs,
        wanted::Wanted,
        ways::Way,
    },
    error::ServiceError,
    network::{
        NetworkError,
        chosen::{self, Chosen},
        functions::Moved,
    },
    state_dir::{State, StateDir},
    undo::UndoStack,
    vmm_client::VmmError,
};

/// How long the VMM may take to give all of a guest's memory to functions: it is zeroed by that.
const ADD_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to let go of them.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);

/// What the VM has, and what is written down of it.
#[derive(Debug)]
pub(super) struct Functions {
    pub(super) passed: Passed,
    /// Where CNI's results are kept.
    pub(super) caches: Vec<PathBuf>,
    /// As on disk.
    pub(super) state: State,
    /// Whether more can come.
    pub(super) hot_plug: bool,
    /// By which they are opened.
    pub(super) opener: Opener,
}

/// Functions did not come.
struct NotGiven {
    why: ServiceError,
    /// Whether the VM certainly has not got them. If it may, they stay written down, and are given
    /// back with the pod.
    absent: bool,
}

impl NotGiven {
    fn absent(why: impl Into<ServiceError>) -> Self {
        Self { why: why.into(), absent: true }
    }

    fn perhaps_kept(why: impl Into<ServiceError>) -> Self {
        Self { why: why.into(), absent: false }
    }
}

impl Functions {
    /// Those that the VM was started with, which `state` has.
    pub(super) fn begin(
        state: State,
        listed: Option<&AddedFunctions>,
        (hot_plug, opener): (bool, Opener),
        caches: &[PathBuf],
    ) -> Result<Self, ServiceError> {
        let mut passed = Passed::default();
        if let Some(AddedFunctions { set, devices }) = listed {
            passed.add(None, *set, &state.devices, devices)?;
        }
        Ok(Self { passed, caches: caches.into(), state, hot_plug, opener })
    }

    /// The groups that a container's devices are in, and what of them the VM has not.
    fn missing(&self, wanted: &Wanted) -> Result<(BTreeSet<u32>, Wanted), DeviceError> {
        let by_group = wanted.by_group(&Sysfs::default())?;
        let groups: BTreeSet<u32> = by_group.keys().copied().collect();
        let missing = self.passed.missing(&groups);
        if let Some(group) = missing.first().filter(|_| !self.hot_plug) {
            return Err(DeviceError::Late(*group));
        }
        let mut wanted = Wanted::default();
        let due = by_group.into_iter().filter(|(group, _)| missing.contains(group));
        due.for_each(|(_, one)| wanted.extend(one));
        Ok((groups, wanted))
    }

    /// What CNI has chosen for those of the functions that no interface tells of.
    fn chosen(&self, records: &[Record]) -> Result<Vec<Chosen>, NetworkError> {
        let told: Vec<Address> = moved(&self.state).iter().map(|one| one.address).collect();
        let addresses = records.iter().map(|record| record.address);
        let addresses: Vec<Address> = addresses.filter(|one| !told.contains(one)).collect();
        match addresses.is_empty() {
            true => Ok(Vec::new()),
            false => Ok(chosen::search(&self.caches, &self.state.id, &addresses)?),
        }
    }

    /// Lets the interfaces of the functions that the VM was started with be what CNI has chosen.
    pub(super) async fn configure_first(&self, agent: &Agent) -> Result<(), ServiceError> {
        let chosen = self.chosen(&self.state.devices)?;
        if chosen.is_empty() {
            return Ok(());
        }
        let devices: Vec<u32> = self.passed.devices().map(|(_, device)| device.into()).collect();
        let drivers = agent.add_functions(devices).await?;
        let places = self.passed.devices().map(|(record, device)| (record.address, device));
        Ok(configure(agent, &chosen, places.zip(drivers)).await?)
    }
}

/// Lets the guest's interfaces of functions be what CNI has chosen. `places` are functions, where the
/// guest has them, and with which drivers.
async fn configure(
    agent: &Agent,
    chosen: &[Chosen],
    places: impl Iterator<Item = ((Address, u8), String)>,
) -> Result<(), NetworkError> {
    for ((address, device), driver) in places {
        let Some(one) = chosen.iter().find(|one| one.address == address) else { continue };
        let interface = one.interface.clone();
        if driver.is_empty() {
            tracing::warn!(
                "{interface} of the pod's network is not there: the guest's kernel has no driver for \
                 {address}"
            );
            continue;
        }
        let change = InterfaceChange {
            name: interface.clone(),
            mac: one.mac.map(Vec::from).unwrap_or_default(),
            mtu: one.mtu.unwrap_or_default().into(),
            comes: true,
            added_addresses: one.addresses.clone(),
            function: device.into(),
            ..Default::default()
        };
        let request = ChangeNetworkRequest {
            interfaces: vec![change],
            added_routes: one.routes.clone(),
            ..Default::default()
        };
        let failed = |error| NetworkError::Chosen { interface: interface.clone(), address, error };
        agent.change_network(&request).await.map_err(failed)?;
        tracing::info!("the guest's {interface}, of {address}, is what CNI has chosen");
    }
    Ok(())
}

/// The functions that the pod gets, once all of them are fit: what it asks for, and what CNI has
/// moved into its network.
fn check(plan: &Plan, moved: &[Moved]) -> Result<Vec<Record>, ServiceError> {
    let sysfs = Sysfs::default();
    if moved.is_empty() {
        return Ok(binding::check(&sysfs, &plan.devices)?);
    }
    let mut wanted = plan.devices.clone();
    wanted.addresses.extend(moved.iter().map(|one| one.address));
    binding::check(&sysfs, &wanted).map_err(|error| {
        // What cannot be had without those of the network either is not their fault.
        match binding::check(&sysfs, &plan.devices) {
            Ok(_) => of_network(moved, error),
            Err(error) => error.into(),
        }
    })
}

fn of_network(moved: &[Moved], error: DeviceError) -> ServiceError {
    let interfaces: Vec<&str> = moved.iter().map(|one| one.interface.as_str()).collect();
    NetworkError::Function { interfaces: interfaces.join(", "), error }.into()
}

/// Tells the guest which of its functions an interface is of.
pub(super) fn place(
    network: &mut ConfigureNetworkRequest,
    state: &State,
    listed: Option<&AddedFunctions>,
) -> Result<(), WrongNumbers> {
    for Moved { address, interface, .. } in moved(state) {
        let at = state.devices.iter().position(|record| record.address == *address);
        let device = at.zip(listed).and_then(|(at, listed)| listed.devices.get(at));
        let device = u32::from(*device.ok_or(WrongNumbers)?);
        for wire in network.interfaces.iter_mut().filter(|wire| wire.name == *interface) {
            wire.function = device;
        }
    }
    Ok(())
}

fn moved(state: &State) -> &[Moved] {
    state.network.as_ref().map_or(&[], |attachment| &attachment.functions)
}

/// Binds the functions that the pod gets, and opens them. What is about to be bound is written
/// down first.
pub(super) fn pass_devices(
    plan: &Plan,
    dir: &StateDir,
    state: &mut State,
    opener: &mut Opener,
    undo: &mut UndoStack,
) -> Result<Option<Handles>, ServiceError> {
    let moved = moved(state).to_vec();
    if plan.devices.is_empty() && moved.is_empty() {
        return Ok(None);
    }
    let records = check(plan, &moved)?;
    state.devices.clone_from(&records);
    dir.write_state(state)?;
    // Before the step: it may come half of its way.
    undo.push("bind the pod's PCI functions", || async move {
        // Their driver lets go of them when the last descriptor is closed, with the VMM.
        let given = tokio::task::spawn_blocking(move || {
            binding::give_back(&Sysfs::default(), &records).map_err(|error| error.to_string())
        });
        given.await.unwrap_or_else(|error| Err(error.to_string()))
    });
    binding::bind(&Sysfs::default(), &state.devices).map_err(|error| match moved.is_empty() {
        true => error.into(),
        false => of_network(&moved, error),
    })?;
    let handles = opener.open_all(&state.devices)?;
    plan.timeline.mark("PCI functions opened");
    Ok(Some(handles))
}

impl Sandbox {
    /// Gives the VM the functions that a container's devices stand for, as far as it has not got
    /// them.
    ///
    /// # Errors
    /// [`ServiceError`]; the VM has what it had then.
    pub async fn give_functions(
        &self,
        container: &str,
        wanted: &Wanted,
    ) -> Result<(), ServiceError> {
        let mut functions = self.functions.lock().await;
        let (groups, missing) = functions.missing(wanted)?;
        if !missing.is_empty() {
            self.plug(&mut functions, container, &missing).await?;
        }
        functions.passed.join(container, &groups);
        Ok(())
    }

    /// The functions that a container's devices stand for and its pod did not ask for, with their NUMA nodes
    /// where those are known. Nothing is touched.
    ///
    /// # Errors
    /// [`DeviceError`]: the VM cannot have them.
    pub async fn nodes_of_functions(
        &self,
        wanted: &Wanted,
    ) -> Result<Vec<(Address, u32)>, DeviceError> {
        if wanted.groups.is_empty() && wanted.nodes.is_empty() {
            return Ok(Vec::new());
        }
        let sysfs = Sysfs::default();
        let functions = self.functions.lock().await;
        let (groups, missing) = functions.missing(wanted)?;
        let mut addresses: Vec<Address> =
            functions.passed.brought(&groups).map(|record| record.address).collect();
        let records = binding::check(&sysfs, &missing)?;
        addresses.extend(records.iter().map(|record| record.address));
        let node = |address| sysfs.node(address).map(|node| (address, node));
        Ok(addresses.into_iter().filter_map(node).collect())
    }

    /// The functions whose device nodes a container has: those that its devices stand for, and those that
    /// its pod asks for by address.
    ///
    /// # Errors
    /// [`DeviceError`]: a device stands for no function any more.
    pub async fn given_functions(
        &self,
        wanted: &Wanted,
        of_pod: &BTreeSet<Address>,
    ) -> Result<Vec<GivenFunction>, DeviceError> {
        let asked = wanted.asked(&Sysfs::default(), of_pod)?;
        let given = self.functions.lock().await.passed.given(&asked).into_iter();
        let wire = |Granted { device, asked_by }| GivenFunction {
            device: device.into(),
            // Of the names that VFIO's devices have.
            asked_by: asked_by.map(|path| path.display().to_string()).unwrap_or_default(),
            ..Default::default()
        };
        Ok(given.map(wire).collect())
    }

    async fn plug(
        &self,
        functions: &mut Functions,
        container: &str,
        missing: &Wanted,
    ) -> Result<(), ServiceError> {
        let records = binding::check(&Sysfs::default(), missing)?;
        if functions.passed.records().count() + records.len() > MAX_PASSED_FUNCTIONS {
            return Err(DeviceError::TooMany(MAX_PASSED_FUNCTIONS).into());
        }
        if let Some(kept) = records.iter().find(|record| functions.state.devices.contains(record)) {
            return Err(DeviceError::Kept(kept.address).into());
        }
        let chosen = functions.chosen(&records)?;
        functions.state.devices.extend(records.iter().cloned());
        self.dir.write_state(&functions.state)?;
        self.hand_over(functions, container, &records, &chosen).await.map_err(
            |NotGiven { why, absent }| {
                if absent {
                    self.forget(&mut functions.state, &records);
                }
                why
            },
        )
    }

    async fn hand_over(
        &self,
        functions: &mut Functions,
        container: &str,
        records: &[Record],
        chosen: &[Chosen],
    ) -> Result<(), NotGiven> {
        let handles = functions.opener.open_all(records).map_err(NotGiven::absent)?;
        let times = match functions.opener.way() {
            // All have one address space.
            Some(Way::Iommufd) => 1,
            // Each set is an address space of its own, which counts all memory by itself.
            _ => u32::try_from(functions.passed.sets() + 1).unwrap_or(u32::MAX),
        };
        self.process
            .allow_locked_memory(functions.state.memory_mib, times)
            .map_err(NotGiven::absent)?;
        let AddedFunctions { set, devices } = self.ask_vmm(handles).await?;
        if let Err(error) = functions.passed.add(Some(container), set, records, &devices) {
            self.remove_from_vm(set).await.map_err(NotGiven::perhaps_kept)?;
            return Err(NotGiven::absent(error));
        }
        let Err(error) = self.let_find(records, &devices, chosen).await else { return Ok(()) };
        // Strikes out what the VM lets go of.
        for set in functions.passed.leave(container) {
            self.unplug(functions, &set).await;
        }
        Err(NotGiven::perhaps_kept(error))
    }

    /// Lets the guest find functions that have come, and have its interfaces of them be what CNI has
    /// chosen.
    async fn let_find(
        &self,
        records: &[Record],
        devices: &[u8],
        chosen: &[Chosen],
    ) -> Result<(), ServiceError> {
        let drivers =
            self.agent.add_functions(devices.iter().copied().map(u32::from).collect()).await?;
        for (record, driver) in records.iter().zip(&drivers) {
            let driver: String = driver.chars().take(32).collect();
            tracing::info!("the guest has {}; its driver: {driver:?}", record.address);
        }
        let places = records.iter().map(|record| record.address).zip(devices.iter().copied());
        Ok(configure(&self.agent, chosen, places.zip(drivers)).await?)
    }

    async fn ask_vmm(&self, handles: Handles) -> Result<AddedFunctions, NotGiven> {
        let mut given = Given::default();
        let (way, functions) = hand(&mut given, &handles);
        let action = Action::AddFunctions { way, functions };
        let asked = timeout(ADD_PATIENCE, self.vmm.request(action, &given.0)).await;
        let failed = vmm("give functions to the VM");
        match asked.unwrap_or(Err(VmmError::Late(ADD_PATIENCE))) {
            Ok(Reply::FunctionsAdded(added)) => Ok(added),
            Ok(_) => Err(NotGiven::perhaps_kept(failed(VmmError::Answer))),
            Err(error @ VmmError::Late(_)) => Err(NotGiven::perhaps_kept(failed(error))),
            Err(error) => Err(NotGiven::absent(failed(error))),
        }
    }

    /// A container has gone: takes the functions from the VM that nobody else uses. What cannot be
    /// taken stays with the pod, to its end.
    pub async fn take_functions(&self, container: &str) {
        let mut functions = self.functions.lock().await;
        for set in functions.passed.leave(container) {
            self.unplug(&mut functions, &set).await;
        }
    }

    async fn unplug(&self, functions: &mut Functions, set: &Set) {
        if self.end().is_none()
            && let Err(error) = self.take_from_vm(set).await
        {
            tracing::error!("the VM keeps its PCI functions {}: {error}", names(set));
            return;
        }
        functions.passed.remove(set.number);
        let records: Vec<Record> = set.records().cloned().collect();
        self.forget(&mut functions.state, &records);
        tracing::info!("the VM has no longer {}", names(set));
    }

    async fn take_from_vm(&self, set: &Set) -> Result<(), ServiceError> {
        if let Err(error) = self.agent.remove_functions(set.devices()).await {
            tracing::warn!("the guest does not let go of {}: {error}", names(set));
        }
        self.remove_from_vm(set.number).await
    }

    async fn remove_from_vm(&self, set: u32) -> Result<(), ServiceError> {
        let asked = self.vmm.request(Action::RemoveFunctions { set }, &[]);
        let asked = timeout(REMOVE_PATIENCE, asked).await;
        match asked.unwrap_or(Err(VmmError::Late(REMOVE_PATIENCE))) {
            // With its process, its descriptors are gone.
            Ok(Reply::Done) | Err(VmmError::Closed) => Ok(()),
            Ok(_) => Err(vmm("take functions from the VM")(VmmError::Answer)),
            Err(error) => Err(vmm("take functions from the VM")(error)),
        }
    }

    /// Gives functions back that the VM has not, and strikes them out on disk.
    fn forget(&self, state: &mut State, records: &[Record]) {
        if let Err(error) = binding::give_back(&Sysfs::default(), records) {
            tracing::error!("cannot give back what the VM had: {error}");
        }
        state.devices.retain(|device| !records.contains(device));
        if let Err(error) = self.dir.write_state(state) {
            tracing::error!("{error}");
        }
    }

    /// What the VM's functions are called on the host and in the guest.
    pub async fn function_names(&self) -> Vec<FunctionName> {
        let names = self.functions.lock().await.passed.names().into_iter();
        names
            .map(|(host, guest)| FunctionName {
                host: host.to_string(),
                guest: guest.to_string(),
                ..Default::default()
            })
            .collect()
    }
}

/// What the VMM is told of descriptors that it is handed.
pub(super) fn hand<'a>(given: &mut Given<'a>, handles: &'a Handles) -> (PassedBy, Vec<Descriptor>) {
    let way = match &handles.by {
        By::Groups { container, groups } => PassedBy::Groups {
            container: given.add(container),
            groups: groups.iter().map(|group| given.add(group)).collect(),
        },
        By::Iommufd(iommufd) => PassedBy::Iommufd {
            iommufd: given.add(iommufd.file()),
            address_space: iommufd.address_space(),
        },
    };
    (way, handles.functions.iter().map(|function| given.add(function)).collect())
}

fn names(set: &Set) -> String {
    set.records().map(|record| record.address.to_string()).collect::<Vec<_>>().join(", ")
}
