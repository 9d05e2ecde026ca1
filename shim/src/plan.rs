//! What a sandbox is made from: the configuration, and what containerd tells of the pod.
//!
//! It tells in one of two ways. By default a sandbox is a container to it, whose spec is in the
//! bundle. With the Sandbox API it sends the pod's configuration as CRI has it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim_protos::{
    protobuf::{
        Message, MessageField, UnknownFields, UnknownValueRef,
        well_known_types::{any::Any, empty::Empty},
    },
    sandbox_api::CreateSandboxRequest,
};
use vial_agent_protocol::{agent::ConfigurePodRequest, users::Users};
use vial_vmm_api::HugePages;

use crate::{
    config::Config,
    core_scheduling::{self, CoreSchedulingError},
    devices::wanted::Wanted,
    disks::cache::{self, Cache},
    numa::{self, NumaError, claim::Claim},
    pod_files::PodFiles,
    sandbox::Plan,
    size::{self, Limits, Size},
    spec::{Role, Spec, SpecError, check_annotations},
    template,
    timeline::Timeline,
    vhost_user::{self, listed::Listed},
};

/// The name of CRI's type of a pod's configuration.
const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// Why a sandbox cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The operator's configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// See [`SpecError`].
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// See [`NumaError`].
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// See [`CoreSchedulingError`].
    #[error(transparent)]
    CoreScheduling(#[from] CoreSchedulingError),
    /// See [`template::ANNOTATION`].
    #[error(transparent)]
    Template(#[from] template::WrongAnnotation),
    /// The options of a sandbox are of another type.
    #[error("the options of a sandbox have to be a {POD_CONFIG}, not '{0}'")]
    Options(String),
    /// They are of the type and cannot be read.
    #[error("the {POD_CONFIG} of the sandbox cannot be read: {0}")]
    Decode(containerd_shim_protos::protobuf::Error),
}

/// Where a shim serves which sandbox.
#[derive(Debug, Clone)]
pub struct Place {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// The socket that the shim serves.
    pub socket: PathBuf,
    /// The operator's configuration, or what is wrong with it.
    pub config: Result<Config, String>,
    /// Where the phases of the start are marked.
    pub timeline: Arc<Timeline>,
}

/// What a pod's annotations ask for beside functions of the host.
#[derive(Debug)]
struct Asked {
    served: Vec<Listed>,
    numa: numa::Wanted,
    template: bool,
    own_cores: bool,
    disk_cache: Option<Cache>,
}

impl Asked {
    fn new(annotations: &HashMap<String, String>, listed: &[Listed]) -> Result<Self, PlanError> {
        Ok(Self {
            served: vhost_user::wanted(annotations, listed).map_err(SpecError::from)?,
            numa: numa::Wanted::new(annotations)?,
            template: template::allowed(annotations)?,
            own_cores: core_scheduling::wanted(annotations)?,
            disk_cache: cache::wanted(annotations).map_err(SpecError::from)?,
        })
    }
}

impl Place {
    /// The plan for the container in `bundle`, or for the pod that it is the sandbox of.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn plan_of_bundle(&self, bundle: &Path) -> Result<Plan, PlanError> {
        let (_, spec) = Spec::read(bundle)?;
        let network = spec.network_namespace().map(Path::to_path_buf);
        let cgroups_path = spec.linux.cgroups_path.clone();
        let config = self.config.as_ref().map_err(|error| PlanError::Config(error.clone()))?;
        let devices = spec.wanted_devices(&config.pci_devices)?;
        let asked = Asked::new(&spec.annotations, &config.vhost_user)?;
        let claim = spec.claim()?;
        let user_namespace = MessageField::from_option(spec.users()?.map(Users::to_wire));
        if spec.role()? != Role::Sandbox {
            let pod = ConfigurePodRequest { user_namespace, ..Default::default() };
            // A container by itself is all that its VM is for.
            let limits = Limits::default().changed(&spec.linux.resources);
            let plan = self.plan(limits, network, pod, asked)?;
            return Ok(Plan { cgroups_path, devices, claim, ..plan });
        }
        spec.check_sandbox()?;
        let pod = ConfigurePodRequest {
            hostname: spec.hostname.unwrap_or_default(),
            sysctls: spec.linux.sysctl,
            user_namespace,
            ..Default::default()
        };
        let plan = self.plan(Limits::of_annotations(&spec.annotations), network, pod, asked)?;
        Ok(Plan { cgroups_path, devices, claim, ..plan })
    }

    /// The plan for a sandbox that is asked for by the Sandbox API.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn plan_of_request(&self, request: &CreateSandboxRequest) -> Result<Plan, PlanError> {
        let (limits, pod, files) = match request.options.as_ref() {
            Some(options) => read_pod_config(options)?,
            None => Default::default(),
        };
        let network = (!request.netns_path.is_empty()).then(|| request.netns_path.clone().into());
        let cgroups_path = match request.options.as_ref() {
            Some(options) => cgroup_of(options, &self.id)?,
            None => None,
        };
        let (devices, asked) = match request.options.as_ref() {
            Some(options) => self.annotations_of(options)?,
            None => (Wanted::default(), Asked::new(&HashMap::new(), &[])?),
        };
        let plan = self.plan(limits, network, pod, asked)?;
        Ok(Plan { files: Some(files), cgroups_path, devices, ..plan })
    }

    /// What the pod's annotations ask for.
    fn annotations_of(&self, options: &Any) -> Result<(Wanted, Asked), PlanError> {
        let config = self.config.as_ref().map_err(|error| PlanError::Config(error.clone()))?;
        let annotations = Fields::read(&options.value)?.map(field::CONFIG_ANNOTATIONS)?;
        check_annotations(&annotations)?;
        let devices = Wanted::new(&annotations, std::iter::empty(), &config.pci_devices)
            .map_err(SpecError::from)?;
        Ok((devices, Asked::new(&annotations, &config.vhost_user)?))
    }

    fn plan(
        &self,
        limits: Limits,
        network_namespace: Option<PathBuf>,
        pod: ConfigurePodRequest,
        Asked { served, numa, template, own_cores, disk_cache }: Asked,
    ) -> Result<Plan, PlanError> {
        let mut config = self.config.clone().map_err(PlanError::Config)?;
        config.core_scheduling |= own_cores;
        config.disk_cache = disk_cache.unwrap_or(config.disk_cache);
        let own = Size { vcpus: config.vcpus, memory_mib: config.memory_mib };
        (config.vcpus, config.memory_mib) = size::of_vm(limits, config.vcpus, config.memory_mib);
        // The most memory is a multiple of both sizes of pages.
        let page_mib = numa.huge_pages.map_or(1, HugePages::mib);
        config.memory_mib = config.memory_mib.next_multiple_of(page_mib);
        Ok(Plan {
            config,
            own,
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            socket: self.socket.clone(),
            network_namespace,
            cgroups_path: None,
            devices: Wanted::default(),
            served,
            template,
            numa,
            claim: Claim::default(),
            pod,
            files: None,
            timeline: self.timeline.clone(),
        })
    }
}

/// The numbers of CRI's fields (k8s.io/cri-api, pkg/apis/runtime/v1/api.proto).
mod field {
    pub(super) const CONFIG_HOSTNAME: u32 = 2;
    pub(super) const CONFIG_DNS: u32 = 4;
    pub(super) const CONFIG_ANNOTATIONS: u32 = 7;
    pub(super) const CONFIG_LINUX: u32 = 8;
    pub(super) const DNS_SERVERS: u32 = 1;
    pub(super) const DNS_SEARCHES: u32 = 2;
    pub(super) const DNS_OPTIONS: u32 = 3;
    pub(super) const LINUX_CGROUP_PARENT: u32 = 1;
    pub(super) const LINUX_SECURITY: u32 = 2;
    pub(super) const LINUX_SYSCTLS: u32 = 3;
    pub(super) const LINUX_RESOURCES: u32 = 5;
    pub(super) const SECURITY_NAMESPACES: u32 = 1;
    pub(super) const NAMESPACES_NETWORK: u32 = 1;
    pub(super) const NAMESPACES_PID: u32 = 2;
    pub(super) const NAMESPACES_IPC: u32 = 3;
    pub(super) const NAMESPACES_USERS: u32 = 5;
    pub(super) const USERS_MODE: u32 = 1;
    pub(super) const USERS_UIDS: u32 = 2;
    pub(super) const USERS_GIDS: u32 = 3;
    pub(super) const MAPPING_HOST: u32 = 1;
    pub(super) const MAPPING_CONTAINER: u32 = 2;
    pub(super) const MAPPING_LENGTH: u32 = 3;
    pub(super) const RESOURCES_PERIOD: u32 = 1;
    pub(super) const RESOURCES_QUOTA: u32 = 2;
    pub(super) const RESOURCES_SHARES: u32 = 3;
    pub(super) const RESOURCES_MEMORY: u32 = 4;
}

/// CRI's `NamespaceMode` POD and NODE.
const POD: u64 = 0;
const NODE: u64 = 2;

/// A message of which a handful of fields matter, by their numbers.
struct Fields(UnknownFields);

impl Fields {
    fn read(bytes: &[u8]) -> Result<Self, PlanError> {
        // A message without fields of its own keeps all that come.
        let mut message = Empty::parse_from_bytes(bytes).map_err(PlanError::Decode)?;
        Ok(Self(std::mem::take(message.special_fields.mut_unknown_fields())))
    }

    fn all(&self, number: u32) -> impl Iterator<Item = UnknownValueRef<'_>> {
        self.0.iter().filter_map(move |(found, value)| (found == number).then_some(value))
    }

    fn bytes(&self, number: u32) -> &[u8] {
        let bytes = |value| match value {
            UnknownValueRef::LengthDelimited(bytes) => Some(bytes),
            _ => None,
        };
        self.all(number).filter_map(bytes).last().unwrap_or_default()
    }

    fn number(&self, number: u32) -> u64 {
        let varint = |value| match value {
            UnknownValueRef::Varint(value) => Some(value),
            _ => None,
        };
        self.all(number).filter_map(varint).last().unwrap_or_default()
    }

    fn message(&self, number: u32) -> Result<Self, PlanError> {
        Self::read(self.bytes(number))
    }

    fn texts(&self, number: u32) -> Vec<String> {
        let text = |value| match value {
            UnknownValueRef::LengthDelimited(bytes) => {
                Some(String::from_utf8_lossy(bytes).into_owned())
            }
            _ => None,
        };
        self.all(number).filter_map(text).collect()
    }

    /// A map of texts.
    fn map(&self, number: u32) -> Result<HashMap<String, String>, PlanError> {
        let mut map = HashMap::new();
        for value in self.all(number) {
            if let UnknownValueRef::LengthDelimited(bytes) = value {
                let pair = Self::read(bytes)?;
                let text = |number| String::from_utf8_lossy(pair.bytes(number)).into_owned();
                map.insert(text(1), text(2));
            }
        }
        Ok(map)
    }
}

/// resolv.conf(5) of a pod's DNS configuration; none when that says nothing.
fn resolver(dns: &Fields) -> Option<String> {
    let mut text = String::new();
    let searches = dns.texts(field::DNS_SEARCHES);
    if !searches.is_empty() {
        text += &format!("search {}\n", searches.join(" "));
    }
    for server in dns.texts(field::DNS_SERVERS) {
        text += &format!("nameserver {server}\n");
    }
    let options = dns.texts(field::DNS_OPTIONS);
    if !options.is_empty() {
        text += &format!("options {}\n", options.join(" "));
    }
    (!text.is_empty()).then_some(text)
}

fn read_pod_config(options: &Any) -> Result<(Limits, ConfigurePodRequest, PodFiles), PlanError> {
    if options.type_url.rsplit('/').next() != Some(POD_CONFIG) {
        return Err(PlanError::Options(options.type_url.chars().take(80).collect()));
    }
    let config = Fields::read(&options.value)?;
    let linux = config.message(field::CONFIG_LINUX)?;
    let security = linux.message(field::LINUX_SECURITY)?;
    let namespaces = security.message(field::SECURITY_NAMESPACES)?;
    for (number, asked) in [
        (field::NAMESPACES_NETWORK, "hostNetwork"),
        (field::NAMESPACES_PID, "hostPID"),
        (field::NAMESPACES_IPC, "hostIPC"),
    ] {
        if namespaces.number(number) == NODE {
            return Err(SpecError::OfTheHost(asked).into());
        }
    }
    let users = users_of(&namespaces)?;
    let resources = linux.message(field::LINUX_RESOURCES)?;
    let limits = Limits {
        cpu_quota: resources.number(field::RESOURCES_QUOTA).cast_signed(),
        cpu_period: resources.number(field::RESOURCES_PERIOD).cast_signed(),
        cpu_shares: resources.number(field::RESOURCES_SHARES).cast_signed(),
        memory: resources.number(field::RESOURCES_MEMORY).cast_signed(),
    };
    let hostname = String::from_utf8_lossy(config.bytes(field::CONFIG_HOSTNAME)).into_owned();
    let pod = ConfigurePodRequest {
        hostname: hostname.clone(),
        sysctls: linux.map(field::LINUX_SYSCTLS)?,
        user_namespace: MessageField::from_option(users.map(Users::to_wire)),
        ..Default::default()
    };
    let resolver = resolver(&config.message(field::CONFIG_DNS)?);
    Ok((limits, pod, PodFiles { hostname, resolver }))
}

/// The users of a pod that has some of its own.
fn users_of(namespaces: &Fields) -> Result<Option<Users>, PlanError> {
    if namespaces.all(field::NAMESPACES_USERS).next().is_none() {
        return Ok(None);
    }
    let asked = namespaces.message(field::NAMESPACES_USERS)?;
    match asked.number(field::USERS_MODE) {
        NODE => return Ok(None),
        POD => {}
        other => return Err(SpecError::UsersMode(other).into()),
    }
    let ranges = |number: u32| -> Result<Vec<(u32, u32, u32)>, PlanError> {
        let range = |value| match value {
            UnknownValueRef::LengthDelimited(bytes) => {
                let mapping = Fields::read(bytes)?;
                // They are of 32 bits in CRI: what is more is no range.
                let id = |number| u32::try_from(mapping.number(number)).unwrap_or(u32::MAX);
                let (first, host) = (id(field::MAPPING_CONTAINER), id(field::MAPPING_HOST));
                Ok((first, host, id(field::MAPPING_LENGTH)))
            }
            // No range, which is refused.
            _ => Ok((0, 0, 0)),
        };
        asked.all(number).map(range).collect()
    };
    let users = Users::new(&ranges(field::USERS_UIDS)?, &ranges(field::USERS_GIDS)?);
    Ok(Some(users.map_err(SpecError::from)?))
}

/// The cgroup of the sandbox `id` below the pod's, in the words of an OCI spec: the form depends on
/// whether the kubelet has systemd make its cgroups.
fn cgroup_of(options: &Any, id: &str) -> Result<Option<String>, PlanError> {
    let linux = Fields::read(&options.value)?.message(field::CONFIG_LINUX)?;
    let parent = String::from_utf8_lossy(linux.bytes(field::LINUX_CGROUP_PARENT)).into_owned();
    Ok(match parent.rsplit('/').next() {
        _ if parent.is_empty() => None,
        Some(slice) if slice.ends_with(".slice") => Some(format!("{slice}:vial:{id}")),
        _ => Some(format!("{}/{id}", parent.trim_end_matches('/'))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field on the wire: a varint, or bytes.
    fn varint(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    fn bytes(number: u8, value: &[u8]) -> Vec<u8> {
        let length = u8::try_from(value.len()).unwrap();
        assert!(length < 128);
        [&[number << 3 | 2, length], value].concat()
    }

    fn options(value: Vec<u8>) -> Any {
        Any { type_url: POD_CONFIG.into(), value, ..Default::default() }
    }

    #[test]
    fn pod_config_is_read_by_its_numbers() {
        let sysctl = [bytes(1, b"net.core.somaxconn"), bytes(2, b"77")].concat();
        let resources = [varint(1, 100), varint(2, 50), varint(3, 2), varint(4, 127)].concat();
        let linux = [bytes(1, b"/parent"), bytes(3, &sysctl), bytes(5, &resources)].concat();
        let dns =
            [bytes(1, b"192.0.2.1"), bytes(1, b"192.0.2.2"), bytes(2, b"a.b"), bytes(2, b"c")];
        let dns = [dns.concat(), bytes(3, b"ndots:5")].concat();
        let config = [bytes(1, b"x"), bytes(2, b"web"), bytes(4, &dns), bytes(8, &linux)].concat();
        let (limits, pod, files) = read_pod_config(&options(config)).unwrap();
        assert_eq!(limits, Limits { cpu_quota: 50, cpu_period: 100, cpu_shares: 2, memory: 127 });
        assert_eq!(pod.hostname, "web");
        assert_eq!(pod.sysctls["net.core.somaxconn"], "77");
        let resolver =
            "search a.b c\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:5\n";
        assert_eq!(files, PodFiles { hostname: "web".into(), resolver: Some(resolver.into()) });
        let (limits, pod, files) = read_pod_config(&options(Vec::new())).unwrap();
        assert_eq!((limits, pod), (Limits::default(), ConfigurePodRequest::default()));
        assert_eq!(files, PodFiles::default());
    }

    #[test]
    fn cgroup_is_below_the_pods_in_its_form() {
        let below = |parent: &str| {
            cgroup_of(&options(bytes(8, &bytes(1, parent.as_bytes()))), "id").unwrap()
        };
        assert_eq!(below("/kubepods/pod1/").as_deref(), Some("/kubepods/pod1/id"));
        let slice = "/kubepods.slice/kubepods-pod1.slice";
        assert_eq!(below(slice).as_deref(), Some("kubepods-pod1.slice:vial:id"));
        assert_eq!(below(""), None);
    }

    #[test]
    fn pod_that_shares_with_the_host_is_refused() {
        for (number, asked) in [(1, "hostNetwork"), (2, "hostPID"), (3, "hostIPC")] {
            let security = bytes(1, &varint(number, 2));
            let config = bytes(8, &bytes(2, &security));
            let error = read_pod_config(&options(config)).unwrap_err().to_string();
            assert!(error.contains(asked), "{error}");
        }
    }

    #[test]
    fn users_of_a_pod_are_read_and_checked() {
        let of = |users: &[u8]| {
            let config = bytes(8, &bytes(2, &bytes(1, &bytes(5, users))));
            read_pod_config(&options(config)).map(|(_, pod, _)| pod.user_namespace.into_option())
        };
        let mapping = |host: u8, container: u8, length: u8| {
            [varint(1, host), varint(2, container), varint(3, length)].concat()
        };
        let pod = [bytes(2, &mapping(100, 0, 50)), bytes(3, &mapping(110, 0, 60))].concat();
        let users = Users::of_wire(&of(&pod).unwrap().unwrap()).unwrap();
        assert_eq!((users.uids.on_host(49), users.uids.on_host(50)), (Some(149), None));
        assert_eq!(users.gids.on_host(59), Some(169));
        // Those of the host.
        assert_eq!(of(&varint(1, 2)).unwrap(), None);
        for (wrong, said) in [
            (varint(1, 1), "kind"),
            (varint(1, 3), "kind"),
            (Vec::new(), "0 ranges"),
            ([pod.clone(), bytes(2, &mapping(1, 0, 1))].concat(), "2 ranges"),
            ([bytes(2, &mapping(100, 1, 50)), bytes(3, &mapping(100, 0, 50))].concat(), "root"),
            ([bytes(2, &mapping(100, 0, 0)), bytes(3, &mapping(100, 0, 50))].concat(), "empty"),
        ] {
            let error = of(&wrong).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn other_options_and_broken_ones_are_refused() {
        let other = Any { type_url: "a/b.Config".into(), ..Default::default() };
        assert!(matches!(read_pod_config(&other), Err(PlanError::Options(_))));
        let broken = options(vec![0x12, 100, 1]);
        assert!(matches!(read_pod_config(&broken), Err(PlanError::Decode(_))));
    }
}
