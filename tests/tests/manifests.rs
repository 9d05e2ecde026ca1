//! Every manifest in `runtimeclass/` is what Kubernetes takes: the kinds, fields and types that are
//! used there, strictly. A field that is not below is refused, as the API server refuses it.

// The types say what is allowed; what no rule here compares is never read.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cel::{Context, Program, Value};
use serde::Deserialize;
use serde_json::json;

type Words = BTreeMap<String, String>;

/// A type that takes the fields it has, in the spelling of Kubernetes, and no other.
macro_rules! kinds {
    ($($name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {
        $(
            #[derive(Debug, Deserialize)]
            #[serde(rename_all = "camelCase", deny_unknown_fields)]
            struct $name { $($field: $kind),* }
        )*
    };
}

kinds! {
    Metadata { name: String, namespace: Option<String>, labels: Option<Words>, annotations: Option<Words> }
    RuntimeClass { metadata: Metadata, handler: String, overhead: Option<Overhead>, scheduling: Option<Scheduling> }
    Overhead { pod_fixed: Words }
    Scheduling { node_selector: Option<Words>, tolerations: Option<Vec<Toleration>> }
    Toleration { key: Option<String>, operator: Option<String>, value: Option<String>, effect: Option<String> }
    ConfigMap { metadata: Metadata, data: Words }
    Pod { metadata: Metadata, spec: PodSpec }
    DaemonSet { metadata: Metadata, spec: DaemonSetSpec }
    DaemonSetSpec { selector: Selector, update_strategy: Option<UpdateStrategy>, template: Template }
    Selector { match_labels: Words }
    RollingUpdate { max_unavailable: Option<u32> }
    Template { metadata: TemplateMetadata, spec: PodSpec }
    TemplateMetadata { labels: Words, annotations: Option<Words> }
    PodSpec {
        runtime_class_name: Option<String>,
        restart_policy: Option<RestartPolicy>,
        node_selector: Option<Words>,
        tolerations: Option<Vec<Toleration>>,
        priority_class_name: Option<String>,
        automount_service_account_token: Option<bool>,
        share_process_namespace: Option<bool>,
        termination_grace_period_seconds: Option<u32>,
        init_containers: Option<Vec<Container>>,
        containers: Vec<Container>,
        volumes: Option<Vec<Volume>>,
    }
    Container {
        name: String,
        image: String,
        command: Option<Vec<String>>,
        args: Option<Vec<String>>,
        ports: Option<Vec<Port>>,
        restart_policy: Option<RestartPolicy>,
        readiness_probe: Option<Probe>,
        liveness_probe: Option<Probe>,
        resources: Option<Resources>,
        security_context: Option<SecurityContext>,
        volume_mounts: Option<Vec<VolumeMount>>,
    }
    Port { name: Option<String>, container_port: u16, host_port: Option<u16> }
    Probe { http_get: Option<HttpGet>, exec: Option<Exec>, period_seconds: Option<u32> }
    HttpGet { path: Option<String>, port: String }
    Exec { command: Vec<String> }
    Resources { requests: Option<Words>, limits: Option<Words> }
    SecurityContext {
        privileged: Option<bool>,
        run_as_non_root: Option<bool>,
        run_as_user: Option<i64>,
        allow_privilege_escalation: Option<bool>,
        read_only_root_filesystem: Option<bool>,
        capabilities: Option<Capabilities>,
        seccomp_profile: Option<SeccompProfile>,
    }
    Capabilities { add: Option<Vec<String>>, drop: Option<Vec<String>> }
    VolumeMount { name: String, mount_path: String, read_only: Option<bool>, sub_path: Option<String> }
    Volume { name: String, host_path: Option<HostPath>, empty_dir: Option<EmptyDir>, config_map: Option<ConfigMapVolume> }
    HostPath { path: String, r#type: Option<String> }
    EmptyDir { medium: Option<String>, size_limit: Option<String> }
    ConfigMapVolume { name: String }
    Policy { metadata: Metadata, spec: PolicySpec }
    PolicySpec {
        failure_policy: FailurePolicy,
        match_constraints: MatchConstraints,
        match_conditions: Vec<MatchCondition>,
        validations: Vec<Validation>,
    }
    MatchConstraints { resource_rules: Vec<Rule> }
    Rule {
        api_groups: Vec<String>,
        api_versions: Vec<String>,
        operations: Vec<Operation>,
        resources: Vec<String>,
    }
    MatchCondition { name: String, expression: String }
    Validation { expression: String, message: Option<String> }
    PolicyBinding { metadata: Metadata, spec: PolicyBindingSpec }
    PolicyBindingSpec { policy_name: String, validation_actions: Vec<ValidationAction> }
}

#[derive(Debug, Deserialize)]
enum FailurePolicy {
    Fail,
    Ignore,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

#[derive(Debug, Deserialize)]
enum ValidationAction {
    Deny,
    Warn,
    Audit,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct UpdateStrategy {
    r#type: String,
    rolling_update: Option<RollingUpdate>,
}

#[derive(Debug, Deserialize)]
enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SeccompProfile {
    r#type: SeccompType,
}

#[derive(Debug, Deserialize)]
enum SeccompType {
    RuntimeDefault,
    Unconfined,
}

/// What a document is, by `kind` and `apiVersion`.
enum Object {
    RuntimeClass(RuntimeClass),
    Pod(Pod),
    DaemonSet(DaemonSet),
    ConfigMap(ConfigMap),
    Policy(Policy),
    PolicyBinding(PolicyBinding),
}

fn object(mut document: serde_yaml_ng::Mapping) -> Result<Object, String> {
    let mut word = |key: &str| {
        let value = document.remove(key);
        value.and_then(|value| value.as_str().map(String::from)).ok_or(format!("no {key}"))
    };
    let kind = (word("apiVersion")?, word("kind")?);
    fn typed<T: for<'a> Deserialize<'a>>(document: serde_yaml_ng::Mapping) -> Result<T, String> {
        serde_yaml_ng::from_value(document.into()).map_err(|error| error.to_string())
    }
    match (kind.0.as_str(), kind.1.as_str()) {
        ("node.k8s.io/v1", "RuntimeClass") => typed(document).map(Object::RuntimeClass),
        ("v1", "Pod") => typed(document).map(Object::Pod),
        ("v1", "ConfigMap") => typed(document).map(Object::ConfigMap),
        ("apps/v1", "DaemonSet") => typed(document).map(Object::DaemonSet),
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => {
            typed(document).map(Object::Policy)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
            typed(document).map(Object::PolicyBinding)
        }
        _ => Err(format!("no rules for {kind:?}")),
    }
}

/// A name as RFC 1123 has labels.
fn is_label(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= 63
        && name.starts_with(letter)
        && name.ends_with(letter)
        && name.chars().all(|c| letter(c) || c == '-')
}

/// A quantity of Kubernetes: a number and one of its suffixes.
fn is_quantity(text: &str) -> bool {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = &text[digits.len()..];
    digits.parse::<f64>().is_ok_and(|value| value >= 0.0)
        && ["", "m", "k", "M", "G", "Ki", "Mi", "Gi"].contains(&suffix)
}

fn check_pod(spec: &PodSpec) -> Result<(), String> {
    let volumes: Vec<&str> =
        spec.volumes.iter().flatten().map(|volume| volume.name.as_str()).collect();
    for volume in spec.volumes.iter().flatten() {
        let sources =
            [volume.host_path.is_some(), volume.empty_dir.is_some(), volume.config_map.is_some()];
        if sources.iter().filter(|&&is| is).count() != 1 {
            return Err(format!("the volume {} has not one source", volume.name));
        }
    }
    let inits = spec.init_containers.iter().flatten();
    let all: Vec<&Container> = inits.clone().chain(&spec.containers).collect();
    if spec.containers.is_empty() || spec.containers.iter().any(|one| one.restart_policy.is_some())
    {
        return Err("no containers, or one with a restart policy that is no init container".into());
    }
    for (index, container) in all.iter().enumerate() {
        if !is_label(&container.name)
            || all[..index].iter().any(|other| other.name == container.name)
        {
            return Err(format!("the container's name {:?} is none or taken", container.name));
        }
        for mount in container.volume_mounts.iter().flatten() {
            if !volumes.contains(&mount.name.as_str()) || !mount.mount_path.starts_with('/') {
                return Err(format!("the mount {mount:?} has no volume or no absolute path"));
            }
        }
        for limits in container.resources.iter().flat_map(|r| [&r.requests, &r.limits]).flatten() {
            check_quantities(limits)?;
        }
        for port in [&container.readiness_probe, &container.liveness_probe]
            .into_iter()
            .flatten()
            .filter_map(|probe| Some(&probe.http_get.as_ref()?.port))
        {
            if !container.ports.iter().flatten().any(|has| has.name.as_ref() == Some(port)) {
                return Err(format!("no port is called {port}"));
            }
        }
    }
    Ok(())
}

fn check_quantities(quantities: &Words) -> Result<(), String> {
    match quantities
        .iter()
        .find(|(name, value)| !["cpu", "memory"].contains(&name.as_str()) || !is_quantity(value))
    {
        Some(wrong) => Err(format!("{wrong:?} is no quantity")),
        None => Ok(()),
    }
}

fn check(text: &str) -> Result<Vec<Object>, String> {
    let mut objects = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let document =
            serde_yaml_ng::Mapping::deserialize(document).map_err(|error| error.to_string())?;
        let object = object(document)?;
        let name = match &object {
            Object::RuntimeClass(class) => {
                class
                    .overhead
                    .iter()
                    .try_for_each(|overhead| check_quantities(&overhead.pod_fixed))?;
                &class.metadata.name
            }
            Object::Pod(pod) => {
                check_pod(&pod.spec)?;
                &pod.metadata.name
            }
            Object::DaemonSet(set) => {
                check_pod(&set.spec.template.spec)?;
                if set.spec.selector.match_labels != set.spec.template.metadata.labels {
                    return Err("the selector does not match the template's labels".into());
                }
                &set.metadata.name
            }
            Object::ConfigMap(map) => &map.metadata.name,
            Object::Policy(policy) => {
                for expression in expressions(&policy.spec) {
                    Program::compile(expression).map_err(|error| error.to_string())?;
                }
                &policy.metadata.name
            }
            Object::PolicyBinding(binding) => &binding.metadata.name,
        };
        if !is_label(name) {
            return Err(format!("{name:?} is no name"));
        }
        objects.push(object);
    }
    Ok(objects)
}

fn expressions(policy: &PolicySpec) -> impl Iterator<Item = &str> {
    let conditions = policy.match_conditions.iter().map(|condition| &condition.expression);
    conditions.chain(policy.validations.iter().map(|one| &one.expression)).map(String::as_str)
}

/// What an expression says of a pod.
fn holds(expression: &str, pod: &serde_json::Value) -> bool {
    let mut context = Context::default();
    context.add_variable("object", pod).unwrap();
    match Program::compile(expression).unwrap().execute(&context) {
        Ok(Value::Bool(answer)) => answer,
        other => panic!("{expression}: {other:?}"),
    }
}

/// The messages with which a policy refuses a pod; none when it says nothing of such pods.
fn refusals<'a>(policy: &'a PolicySpec, pod: &serde_json::Value) -> Vec<&'a str> {
    if !policy.match_conditions.iter().all(|one| holds(&one.expression, pod)) {
        return Vec::new();
    }
    let refused = policy.validations.iter().filter(|one| !holds(&one.expression, pod));
    refused.map(|one| one.message.as_deref().unwrap()).collect()
}

fn manifests(directory: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(manifests(&path));
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push((path.display().to_string(), fs::read_to_string(&path).unwrap()));
        }
    }
    found
}

fn directory() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtimeclass")
}

#[test]
fn every_manifest_is_what_kubernetes_takes() {
    let manifests = manifests(&directory());
    assert!(manifests.len() >= 7, "{} manifests", manifests.len());
    for (path, text) in manifests {
        check(&text).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

#[test]
fn examples_run_with_the_runtime_class() {
    let class = fs::read_to_string(directory().join("runtimeclass.yaml")).unwrap();
    let [Object::RuntimeClass(class)] = &check(&class).unwrap()[..] else {
        panic!("not one RuntimeClass");
    };
    let drop_in = fs::read_to_string(directory().join("containerd.toml")).unwrap();
    assert!(drop_in.contains(&format!("containerd.runtimes.{}]", class.handler)));
    for (path, text) in manifests(&directory().join("examples")) {
        for object in check(&text).unwrap() {
            if let Object::Pod(pod) = object {
                assert_eq!(
                    pod.spec.runtime_class_name,
                    Some(class.metadata.name.clone()),
                    "{path}"
                );
            }
        }
    }
}

#[test]
fn policy_refuses_namespaces_of_the_host_for_pods_of_the_runtime_class() {
    let text = fs::read_to_string(directory().join("policy.yaml")).unwrap();
    let objects = check(&text).unwrap();
    let [Object::Policy(policy), Object::PolicyBinding(binding)] = &objects[..] else {
        panic!("not one policy and its binding");
    };
    assert_eq!(binding.spec.policy_name, policy.metadata.name);
    let refused = |spec| refusals(&policy.spec, &json!({ "spec": spec }));
    assert_eq!(refused(json!({ "runtimeClassName": "vial" })), [""; 0]);
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        let messages = refused(json!({ "runtimeClassName": "vial", field: true }));
        assert!(messages.len() == 1 && messages[0].starts_with(field), "{messages:?}");
        assert_eq!(refused(json!({ "runtimeClassName": "vial", field: false })), [""; 0]);
        assert_eq!(refused(json!({ "runtimeClassName": "runc", field: true })), [""; 0]);
        assert_eq!(refused(json!({ field: true })), [""; 0]);
    }
    // Whether a node can have them, its runtime tells the kubelet.
    assert_eq!(refused(json!({ "runtimeClassName": "vial", "hostUsers": false })), [""; 0]);
}

#[test]
fn wrong_manifests_are_refused() {
    let pod = fs::read_to_string(directory().join("examples/web.yaml")).unwrap();
    assert!(check(&pod).is_ok());
    for (right, wrong) in [
        ("runtimeClassName", "runtimeClass"),
        ("apiVersion: v1", "apiVersion: v2"),
        ("memory: 64Mi", "memory: 64MB"),
        ("name: http", "name: web"),
        ("containerPort: 8080", "containerPort: many"),
        ("mountPath: /site", "mountPath: site"),
        ("- name: site\n          mount", "- name: absent\n          mount"),
        ("type: RuntimeDefault", "type: Default"),
        ("name: web", "name: Web"),
    ] {
        assert!(pod.contains(right), "{right:?} is not there");
        assert!(check(&pod.replacen(right, wrong, 1)).is_err(), "{wrong:?} passed");
    }
}
