//! The messages of CRI (runtime.v1) that the cases send and read, with the fields that they use.
//!
//! Numbers and types are those of the Kubernetes CRI API; a field that is not here is left out
//! when sending, and skipped when reading, as protobuf has it. Written by hand: the types that
//! could be generated take longer to compile than the rest of the suite.

use std::collections::BTreeMap;

/// `[encoding] field: type = number;`
macro_rules! messages {
    ($(
        $(#[$about:meta])*
        $name:ident {
            $($(#[$note:meta])* [$($how:tt)*] $field:ident: $kind:ty = $number:tt;)*
        }
    )*) => {
        $(
            $(#[$about])*
            #[derive(Clone, PartialEq, ::prost::Message)]
            pub(crate) struct $name {
                $($(#[$note])* #[prost($($how)*, tag = $number)] pub(crate) $field: $kind,)*
            }
        )*
    };
}

/// The words of a pod or container.
pub(crate) type Words = BTreeMap<String, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub(crate) enum SandboxState {
    Ready = 0,
    NotReady = 1,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub(crate) enum ContainerState {
    Created = 0,
    Running = 1,
    Exited = 2,
    Unknown = 3,
}

/// Whose namespace a container gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub(crate) enum NamespaceMode {
    Pod = 0,
    Container = 1,
    Node = 2,
    Target = 3,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Propagation {
    Private = 0,
    HostToContainer = 1,
    Bidirectional = 2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Profile {
    RuntimeDefault = 0,
    Unconfined = 1,
    Localhost = 2,
}

// Requests and what answers them.
messages! {
    Empty {}
    VersionRequest {
        [string] version: String = 1;
    }
    VersionResponse {
        [string] runtime_name: String = 2;
        [string] runtime_version: String = 3;
    }
    StatusResponse {
        [message, repeated] runtime_handlers: Vec<RuntimeHandler> = 3;
    }
    RuntimeHandler {
        [string] name: String = 1;
        [message, optional] features: Option<RuntimeHandlerFeatures> = 2;
    }
    RuntimeHandlerFeatures {
        [bool] recursive_read_only_mounts: bool = 1;
        [bool] user_namespaces: bool = 2;
    }
    RunPodSandboxRequest {
        [message, optional] config: Option<PodSandboxConfig> = 1;
        [string] runtime_handler: String = 2;
    }
    /// Names one pod: asks to stop, remove or describe it, and answers its start.
    PodId {
        [string] pod_sandbox_id: String = 1;
    }
    PodSandboxStatusRequest {
        [string] pod_sandbox_id: String = 1;
        [bool] verbose: bool = 2;
    }
    PodSandboxStatusResponse {
        [message, optional] status: Option<PodSandboxStatus> = 1;
        /// JSON, when it is verbose.
        [btree_map = "string, string"] info: Words = 2;
    }
    ListPodSandboxResponse {
        [message, repeated] items: Vec<PodSandbox> = 1;
    }
    ListContainersResponse {
        [message, repeated] containers: Vec<ListedContainer> = 1;
    }
    /// `Container` in CRI.
    ListedContainer {
        [string] id: String = 1;
        [string] pod_sandbox_id: String = 2;
    }
    CreateContainerRequest {
        [string] pod_sandbox_id: String = 1;
        [message, optional] config: Option<ContainerConfig> = 2;
        [message, optional] sandbox_config: Option<PodSandboxConfig> = 3;
    }
    /// Names one container: asks to start, remove or describe it, and answers its creation.
    ContainerId {
        [string] container_id: String = 1;
    }
    StopContainerRequest {
        [string] container_id: String = 1;
        /// Seconds.
        [int64] timeout: i64 = 2;
    }
    ContainerStatusResponse {
        [message, optional] status: Option<ContainerStatus> = 1;
    }
    UpdateContainerResourcesRequest {
        [string] container_id: String = 1;
        [message, optional] linux: Option<LinuxContainerResources> = 2;
    }
    ExecSyncRequest {
        [string] container_id: String = 1;
        [string, repeated] cmd: Vec<String> = 2;
        /// Seconds; 0 is none.
        [int64] timeout: i64 = 3;
    }
    ExecSyncResponse {
        [bytes = "vec"] stdout: Vec<u8> = 1;
        [bytes = "vec"] stderr: Vec<u8> = 2;
        [int32] exit_code: i32 = 3;
    }
    ExecRequest {
        [string] container_id: String = 1;
        [string, repeated] cmd: Vec<String> = 2;
        [bool] tty: bool = 3;
        [bool] stdin: bool = 4;
        [bool] stdout: bool = 5;
        [bool] stderr: bool = 6;
    }
    AttachRequest {
        [string] container_id: String = 1;
        [bool] stdin: bool = 2;
        [bool] tty: bool = 3;
        [bool] stdout: bool = 4;
        [bool] stderr: bool = 5;
    }
    PortForwardRequest {
        [string] pod_sandbox_id: String = 1;
        [int32, repeated] port: Vec<i32> = 2;
    }
    /// Where a stream is served.
    Streaming {
        [string] url: String = 1;
    }
    ContainerStatsResponse {
        [message, optional] stats: Option<ContainerStats> = 1;
    }
    PodSandboxStatsResponse {
        [message, optional] stats: Option<PodSandboxStats> = 1;
    }
    ListPodSandboxStatsResponse {
        [message, repeated] stats: Vec<PodSandboxStats> = 1;
    }
    ListImagesResponse {
        [message, repeated] images: Vec<Image> = 1;
    }
}

// What a pod and a container are to be.
messages! {
    PodSandboxMetadata {
        [string] name: String = 1;
        [string] uid: String = 2;
        [string] namespace: String = 3;
        [uint32] attempt: u32 = 4;
    }
    PodSandboxConfig {
        [message, optional] metadata: Option<PodSandboxMetadata> = 1;
        [string] hostname: String = 2;
        [string] log_directory: String = 3;
        [message, optional] dns_config: Option<DnsConfig> = 4;
        [message, repeated] port_mappings: Vec<PortMapping> = 5;
        [btree_map = "string, string"] labels: Words = 6;
        [btree_map = "string, string"] annotations: Words = 7;
        [message, optional] linux: Option<LinuxPodSandboxConfig> = 8;
    }
    DnsConfig {
        [string, repeated] servers: Vec<String> = 1;
        [string, repeated] searches: Vec<String> = 2;
        [string, repeated] options: Vec<String> = 3;
    }
    /// Of TCP.
    PortMapping {
        [int32] container_port: i32 = 2;
        [int32] host_port: i32 = 3;
    }
    LinuxPodSandboxConfig {
        [string] cgroup_parent: String = 1;
        [message, optional] security_context: Option<LinuxSandboxSecurityContext> = 2;
        [btree_map = "string, string"] sysctls: Words = 3;
        [message, optional] overhead: Option<LinuxContainerResources> = 4;
        [message, optional] resources: Option<LinuxContainerResources> = 5;
    }
    LinuxSandboxSecurityContext {
        [message, optional] namespace_options: Option<NamespaceOption> = 1;
        [bool] privileged: bool = 6;
        [message, optional] seccomp: Option<SecurityProfile> = 9;
    }
    NamespaceOption {
        [enumeration = "NamespaceMode"] network: i32 = 1;
        [enumeration = "NamespaceMode"] pid: i32 = 2;
        [enumeration = "NamespaceMode"] ipc: i32 = 3;
        [string] target_id: String = 4;
        [message, optional] userns_options: Option<UserNamespace> = 5;
    }
    UserNamespace {
        [enumeration = "NamespaceMode"] mode: i32 = 1;
        [message, repeated] uids: Vec<IdMapping> = 2;
        [message, repeated] gids: Vec<IdMapping> = 3;
    }
    IdMapping {
        [uint32] host_id: u32 = 1;
        [uint32] container_id: u32 = 2;
        [uint32] length: u32 = 3;
    }
    SecurityProfile {
        [enumeration = "Profile"] profile_type: i32 = 1;
        [string] localhost_ref: String = 2;
    }
    ContainerMetadata {
        [string] name: String = 1;
        [uint32] attempt: u32 = 2;
    }
    ImageSpec {
        [string] image: String = 1;
    }
    KeyValue {
        [string] key: String = 1;
        [string] value: String = 2;
    }
    Mount {
        [string] container_path: String = 1;
        [string] host_path: String = 2;
        [bool] readonly: bool = 3;
        [enumeration = "Propagation"] propagation: i32 = 5;
        [message, repeated] uid_mappings: Vec<IdMapping> = 6;
        [message, repeated] gid_mappings: Vec<IdMapping> = 7;
        [bool] recursive_read_only: bool = 8;
    }
    Device {
        [string] container_path: String = 1;
        [string] host_path: String = 2;
        [string] permissions: String = 3;
    }
    ContainerConfig {
        [message, optional] metadata: Option<ContainerMetadata> = 1;
        [message, optional] image: Option<ImageSpec> = 2;
        [string, repeated] command: Vec<String> = 3;
        [string, repeated] args: Vec<String> = 4;
        [string] working_dir: String = 5;
        [message, repeated] envs: Vec<KeyValue> = 6;
        [message, repeated] mounts: Vec<Mount> = 7;
        [message, repeated] devices: Vec<Device> = 8;
        [btree_map = "string, string"] labels: Words = 9;
        [btree_map = "string, string"] annotations: Words = 10;
        [string] log_path: String = 11;
        [bool] stdin: bool = 12;
        [bool] stdin_once: bool = 13;
        [bool] tty: bool = 14;
        [message, optional] linux: Option<LinuxContainerConfig> = 15;
    }
    LinuxContainerConfig {
        [message, optional] resources: Option<LinuxContainerResources> = 1;
        [message, optional] security_context: Option<LinuxContainerSecurityContext> = 2;
    }
    LinuxContainerResources {
        /// Microseconds, as the quota is.
        [int64] cpu_period: i64 = 1;
        [int64] cpu_quota: i64 = 2;
        [int64] cpu_shares: i64 = 3;
        [int64] memory_limit_in_bytes: i64 = 4;
        [int64] oom_score_adj: i64 = 5;
        [string] cpuset_cpus: String = 6;
        [string] cpuset_mems: String = 7;
    }
    Int64Value {
        [int64] value: i64 = 1;
    }
    UInt64Value {
        [uint64] value: u64 = 1;
    }
    Capability {
        [string, repeated] add_capabilities: Vec<String> = 1;
        [string, repeated] drop_capabilities: Vec<String> = 2;
    }
    LinuxContainerSecurityContext {
        [message, optional] capabilities: Option<Capability> = 1;
        [bool] privileged: bool = 2;
        [message, optional] namespace_options: Option<NamespaceOption> = 3;
        [message, optional] run_as_user: Option<Int64Value> = 5;
        [string] run_as_username: String = 6;
        [bool] readonly_rootfs: bool = 7;
        [int64, repeated] supplemental_groups: Vec<i64> = 8;
        [bool] no_new_privs: bool = 11;
        [message, optional] run_as_group: Option<Int64Value> = 12;
        [string, repeated] masked_paths: Vec<String> = 13;
        [string, repeated] readonly_paths: Vec<String> = 14;
        [message, optional] seccomp: Option<SecurityProfile> = 15;
    }
}

// What is told of them.
messages! {
    PodSandboxStatus {
        [string] id: String = 1;
        [message, optional] metadata: Option<PodSandboxMetadata> = 2;
        [enumeration = "SandboxState"] state: i32 = 3;
        /// Nanoseconds since 1970.
        [int64] created_at: i64 = 4;
        [message, optional] network: Option<PodSandboxNetworkStatus> = 5;
        [btree_map = "string, string"] labels: Words = 7;
        [btree_map = "string, string"] annotations: Words = 8;
        [string] runtime_handler: String = 9;
    }
    PodSandboxNetworkStatus {
        [string] ip: String = 1;
        [message, repeated] additional_ips: Vec<PodIp> = 2;
    }
    PodIp {
        [string] ip: String = 1;
    }
    PodSandbox {
        [string] id: String = 1;
        [message, optional] metadata: Option<PodSandboxMetadata> = 2;
        [enumeration = "SandboxState"] state: i32 = 3;
    }
    ContainerStatus {
        [string] id: String = 1;
        [message, optional] metadata: Option<ContainerMetadata> = 2;
        [enumeration = "ContainerState"] state: i32 = 3;
        [int64] created_at: i64 = 4;
        [int64] started_at: i64 = 5;
        [int64] finished_at: i64 = 6;
        [int32] exit_code: i32 = 7;
        [string] reason: String = 10;
        [string] message: String = 11;
        [btree_map = "string, string"] labels: Words = 12;
        [btree_map = "string, string"] annotations: Words = 13;
        [message, repeated] mounts: Vec<Mount> = 14;
        [string] log_path: String = 15;
    }
    PodSandboxStats {
        [message, optional] attributes: Option<PodSandboxAttributes> = 1;
        [message, optional] linux: Option<LinuxPodSandboxStats> = 2;
    }
    PodSandboxAttributes {
        [string] id: String = 1;
        [message, optional] metadata: Option<PodSandboxMetadata> = 2;
    }
    LinuxPodSandboxStats {
        [message, optional] cpu: Option<CpuUsage> = 1;
        [message, optional] memory: Option<MemoryUsage> = 2;
        [message, optional] network: Option<NetworkUsage> = 3;
        [message, optional] process: Option<ProcessUsage> = 4;
        [message, repeated] containers: Vec<ContainerStats> = 5;
    }
    NetworkUsage {
        [message, optional] default_interface: Option<NetworkInterfaceUsage> = 2;
    }
    NetworkInterfaceUsage {
        [string] name: String = 1;
        [message, optional] rx_bytes: Option<UInt64Value> = 2;
        [message, optional] tx_bytes: Option<UInt64Value> = 4;
    }
    ProcessUsage {
        [message, optional] process_count: Option<UInt64Value> = 2;
    }
    ContainerAttributes {
        [string] id: String = 1;
    }
    ContainerStats {
        [message, optional] attributes: Option<ContainerAttributes> = 1;
        [message, optional] cpu: Option<CpuUsage> = 2;
        [message, optional] memory: Option<MemoryUsage> = 3;
        [message, optional] writable_layer: Option<FilesystemUsage> = 4;
    }
    CpuUsage {
        [message, optional] usage_core_nano_seconds: Option<UInt64Value> = 2;
    }
    MemoryUsage {
        [message, optional] working_set_bytes: Option<UInt64Value> = 2;
        [message, optional] available_bytes: Option<UInt64Value> = 3;
        [message, optional] usage_bytes: Option<UInt64Value> = 4;
        [message, optional] rss_bytes: Option<UInt64Value> = 5;
    }
    FilesystemUsage {
        [message, optional] used_bytes: Option<UInt64Value> = 3;
        [message, optional] inodes_used: Option<UInt64Value> = 4;
    }
    Image {
        [string] id: String = 1;
        [string, repeated] repo_tags: Vec<String> = 2;
        [bool] pinned: bool = 8;
    }
}
