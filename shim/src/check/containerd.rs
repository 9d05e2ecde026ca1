//! What containerd this machine has, and what its configuration says of Vial.

use std::path::Path;
use std::process::Command;

use toml::{Table, Value};

use super::{Answer, Finding, Verdict, ask, finding};
use crate::runtime::{PROGRAM, RUNTIME};

/// The oldest containerd that speaks the task API of this shim.
const OLDEST: Version = Version(2, 0);
/// The first whose Sandbox API can be asked for a pod with `hostNetwork` (containerd's issue 12983): before, containerd itself
/// ends.
const HOST_NETWORK_IS_SAFE: Version = Version(2, 3);
/// Where its CRI plugin has its configuration, in versions 3 and 2 of that.
const PLUGINS: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];
/// What a pod's annotations are called that mean something to Vial.
const ANNOTATIONS: [&str; 2] = ["io.vial/*", "io.vial/"];

/// Major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    /// The first word that looks like one.
    fn of(text: &str) -> Option<Self> {
        text.split_ascii_whitespace().find_map(|word| {
            let mut parts = word.strip_prefix('v').unwrap_or(word).split('.');
            let mut number = || parts.next()?.parse().ok();
            Some(Self(number()?, number()?))
        })
    }
}

/// Looks at the program, and at the configuration that `config` is the first file of.
pub(super) fn look(config: &Path) -> Vec<Finding> {
    let remedy = "Vial needs containerd 2.0 or newer";
    let (program, version) = match ask(Command::new("containerd").arg("--version")) {
        Ok(answer) => {
            let (text, version) = (answer.first_line().to_owned(), Version::of(&answer.text));
            match version.filter(|&version| version >= OLDEST) {
                Some(version) => (finding("containerd", Verdict::Ok, text), Some(version)),
                None => {
                    let text = format!("{text}; {remedy}");
                    (finding("containerd", Verdict::Broken, text), None)
                }
            }
        }
        Err(error) => (finding("containerd", Verdict::Missing, format!("{error}; {remedy}")), None),
    };
    match version {
        Some(version) => vec![program, configured(config, version)],
        None => vec![program],
    }
}

/// What is configured. Containers by `ctr` need nothing of it.
fn configured(config: &Path, version: Version) -> Finding {
    let told = |verdict, text: String| Finding {
        required: false,
        ..finding("CRI handlers", verdict, text)
    };
    let remedy = "put runtimeclass/containerd.toml where it imports it, and restart containerd";
    if !config.exists() {
        let text = format!("{}: there is no such file; {remedy}", config.display());
        return told(Verdict::Missing, text);
    }
    let mut dump = Command::new("containerd");
    let text = match ask(dump.arg("--config").arg(config).args(["config", "dump"])) {
        Ok(Answer { success: true, text }) => text,
        Ok(answer) => {
            let text = format!("containerd config dump: {}", answer.first_line());
            return told(Verdict::Broken, text);
        }
        Err(error) => return told(Verdict::Broken, format!("containerd config dump: {error}")),
    };
    match handlers(&text) {
        Err(error) => {
            let error = error.message().replace('\n', ", ");
            told(Verdict::Broken, format!("containerd config dump: {error}"))
        }
        Ok(found) if found.is_empty() => {
            let text = format!("{}: no runtime is of type {RUNTIME}; {remedy}", config.display());
            told(Verdict::Missing, text)
        }
        Ok(found) => {
            let shown: Vec<String> = found.iter().map(Handler::shown).collect();
            let wrong = complaints(&found, version);
            let verdict = if wrong.is_empty() { Verdict::Ok } else { Verdict::Broken };
            let all: Vec<String> = std::iter::once(shown.join(", ")).chain(wrong).collect();
            told(verdict, all.join("; "))
        }
    }
}

/// One runtime of the CRI plugin that is Vial's.
#[derive(Debug, PartialEq, Eq)]
struct Handler {
    name: String,
    sandbox_api: bool,
    annotations: bool,
    privileged: bool,
}

impl Handler {
    fn shown(&self) -> String {
        let way = if self.sandbox_api { "Sandbox API" } else { "pod sandbox controller" };
        format!("{} ({way})", self.name)
    }
}

/// What an operator meets with them that was hardly meant.
fn complaints(handlers: &[Handler], version: Version) -> Vec<String> {
    let of = |is: &dyn Fn(&Handler) -> bool, text: &str| {
        let names: Vec<&str> =
            handlers.iter().filter(|one| is(one)).map(|one| one.name.as_str()).collect();
        (!names.is_empty()).then(|| format!("{}: {text}", names.join(", ")))
    };
    let all = [
        of(
            &|one| one.sandbox_api && version < HOST_NETWORK_IS_SAFE,
            "a pod with hostNetwork ends this containerd, before Vial can refuse it; take \
             `sandboxer` away, let runtimeclass/policy.yaml refuse such pods, or use containerd 2.3",
        ),
        of(
            &|one| !one.privileged,
            "privileged containers ask for all devices of the host, and are refused; set \
             `privileged_without_host_devices`",
        ),
        of(
            &|one| !one.annotations,
            "annotations of pods do not arrive; set `pod_annotations = ['io.vial/*']`",
        ),
    ];
    all.into_iter().flatten().collect()
}

/// The runtimes in a configuration that are Vial's, by their type or by the path of their shim.
fn handlers(text: &str) -> Result<Vec<Handler>, toml::de::Error> {
    let top: Table = toml::from_str(text)?;
    let table = |table: Option<&Value>| table.and_then(Value::as_table).cloned();
    let plugins = table(top.get("plugins")).unwrap_or_default();
    let found = PLUGINS.iter().filter_map(|plugin| {
        let plugin = plugins.get(*plugin)?;
        table(plugin.get("containerd")?.get("runtimes"))
    });
    Ok(found.flatten().filter_map(|(name, runtime)| handler(name, &runtime)).collect())
}

fn handler(name: String, runtime: &Value) -> Option<Handler> {
    let word = |key: &str| runtime.get(key).and_then(Value::as_str).unwrap_or_default();
    let shim = Path::new(word("runtime_path")).file_name();
    if word("runtime_type") != RUNTIME && shim.is_none_or(|name| name != PROGRAM) {
        return None;
    }
    let annotations = runtime.get("pod_annotations").and_then(Value::as_array);
    let privileged = runtime.get("privileged_without_host_devices").and_then(Value::as_bool);
    Some(Handler {
        name,
        sandbox_api: word("sandboxer") == "shim",
        annotations: annotations.is_some_and(|all| all.iter().any(passes_annotations)),
        privileged: privileged == Some(true),
    })
}

fn passes_annotations(pattern: &Value) -> bool {
    let pattern = pattern.as_str().unwrap_or_default();
    pattern == "*" || ANNOTATIONS.iter().any(|prefix| pattern.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_containerd_are_read() {
        for (text, version) in [
            ("containerd containerd.io 1.7.24 abc", Some(Version(1, 7))),
            ("containerd github.com/containerd/containerd/v2 2.1.9 e1b5", Some(Version(2, 1))),
            ("containerd github.com/containerd/containerd/v2 v2.3.0-rc.1 e1", Some(Version(2, 3))),
            ("nothing", None),
        ] {
            assert_eq!(Version::of(text), version, "{text}");
        }
        assert!(Version(2, 10) > HOST_NETWORK_IS_SAFE && Version(1, 9) < OLDEST);
    }

    #[test]
    fn drop_in_is_as_it_should_be() {
        let drop_in = include_str!("../../../runtimeclass/containerd.toml");
        let found = handlers(drop_in).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].shown(), "vial (pod sandbox controller)");
        assert_eq!(complaints(&found, OLDEST), [""; 0]);
    }

    #[test]
    fn each_handler_is_judged() {
        let text = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]\n\
             runc = { runtime_type = 'io.containerd.runc.v2' }\n\
             one = { runtime_type = 'io.containerd.vial.v2', sandboxer = 'shim',\
                     privileged_without_host_devices = true, pod_annotations = ['io.vial/*'] }\n\
             two = { runtime_path = '/opt/containerd-shim-vial-v2', pod_annotations = ['a/*'] }\n";
        let found = handlers(text).unwrap();
        assert_eq!(found.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(complaints(&found[..1], HOST_NETWORK_IS_SAFE), [""; 0]);
        let old = complaints(&found[..1], Version(2, 2));
        assert!(old.len() == 1 && old[0].starts_with("one: a pod with hostNetwork"), "{old:?}");
        let wrong = complaints(&found, HOST_NETWORK_IS_SAFE);
        assert!(wrong.len() == 2 && wrong[1].starts_with("two: annotations"), "{wrong:?}");
        let both = [&found[1], &found[1]].map(|one| Handler { name: one.name.clone(), ..*one });
        let wrong = complaints(&both, HOST_NETWORK_IS_SAFE);
        assert!(wrong[0].starts_with("two, two: privileged"), "{wrong:?}");
    }

    #[test]
    fn configurations_without_vial_have_no_handler() {
        for text in ["", "plugins = 1", "[plugins.'io.containerd.grpc.v1.cri']\ncontainerd = 1"] {
            assert_eq!(handlers(text).unwrap(), [], "{text}");
        }
        assert!(handlers("plugins = ").is_err());
    }
}
