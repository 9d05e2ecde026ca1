//! Pods through CRI, as a kubelet starts them: many at once.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use tempfile::TempDir;

use super::cri::client::Cri;
use super::cri::configs;
use super::cri::wire::{ContainerConfig, ContainerMetadata, PodSandboxConfig};
use super::subject::since;

/// Pods that were started together, until they are dropped.
pub(crate) struct Pods {
    cri: Cri,
    ids: Vec<String>,
    /// From the first request until the last container was running, in milliseconds.
    pub(crate) started: f64,
    _logs: TempDir,
}

impl Pods {
    /// Starts so many of a handler, each with a container that sleeps, all at once.
    pub(crate) fn start(socket: &Path, handler: &str, image: &str, count: usize) -> Result<Self> {
        let cri = Cri::at(socket);
        let logs = tempfile::tempdir()?;
        let configs: Vec<_> = (0..count).map(|number| config(logs.path(), number)).collect();
        let start = Instant::now();
        let results: Vec<Result<String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = configs
                .iter()
                .map(|config| scope.spawn(|| start_one(&cri, handler, image, config)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<String>>| {
                thread.join().unwrap_or_else(|_| Err(anyhow!("starting a pod panicked")))
            };
            threads.into_iter().map(join).collect()
        });
        let started = since(start);
        let (ids, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        let pods = Self { cri, ids: ids.into_iter().flatten().collect(), started, _logs: logs };
        match failed.into_iter().find_map(Result::err) {
            Some(error) => Err(error.context(format!("start {count} pods with {handler}"))),
            None => Ok(pods),
        }
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        std::thread::scope(|scope| {
            for id in &self.ids {
                scope.spawn(|| remove(&self.cri, id));
            }
        });
    }
}

fn remove(cri: &Cri, id: &str) {
    for result in [cri.stop_pod(id), cri.remove_pod(id)] {
        if let Err(error) = result {
            eprintln!("the pod {id} stays: {error:#}");
        }
    }
}

fn start_one(cri: &Cri, handler: &str, image: &str, config: &PodSandboxConfig) -> Result<String> {
    let id = cri.run_pod(config, handler)?;
    let container = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "sleep".into(), attempt: 0 }),
        log_path: "sleep.log".into(),
        ..configs::container(image, &["sleep", "1000"])
    };
    let started = cri.create(&id, &container, config).and_then(|container| cri.start(&container));
    if started.is_err() {
        remove(cri, &id);
    }
    started.context("start its container")?;
    Ok(id)
}

fn config(logs: &Path, number: usize) -> PodSandboxConfig {
    let name = format!("bench-{number}");
    configs::pod(&name, &name, "bench", &logs.join(&name))
}
