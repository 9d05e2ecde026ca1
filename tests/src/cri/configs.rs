//! What a kubelet asks for unless a pod says otherwise.

use std::path::Path;

use super::wire::*;

/// A pod by its name, and where its containers' logs go.
pub(crate) fn pod(name: &str, uid: &str, namespace: &str, logs: &Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: uid.into(),
            namespace: namespace.into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: logs.display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container of an image that runs these words.
pub(crate) fn container(image: &str, words: &[&str]) -> ContainerConfig {
    ContainerConfig {
        image: Some(ImageSpec { image: image.into() }),
        command: words.iter().map(|&word| word.into()).collect(),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// All is the pod's but the processes.
fn namespaces() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }
}
