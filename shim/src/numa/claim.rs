//! What a container asks for of the host's CPUs and nodes, from its `linux.resources`.

use serde::Deserialize;

use super::{
    NumaError,
    list::{self, Set},
    start_of,
};

/// CFS's default period, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// `cpu.shares` of one CPU, as Kubernetes counts them.
const SHARES_OF_CPU: u64 = 1024;

/// The part of an OCI `linux.resources` that decides where a VM runs, and which of the host's devices it gets.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Resources {
    /// `cpu`.
    #[serde(default)]
    pub cpu: Option<Cpu>,
    /// `devices`.
    #[serde(default)]
    pub devices: Vec<crate::disks::Rule>,
    /// `memory`, which decides how large it is.
    #[serde(default)]
    pub memory: Option<Memory>,
}

/// `memory` of an OCI `linux.resources`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Memory {
    /// Bytes; 0 or less for no limit.
    #[serde(default)]
    pub limit: Option<i64>,
}

/// `cpu` of an OCI `linux.resources`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Cpu {
    /// Microseconds of CPU time in each period; 0 or less for no limit.
    #[serde(default)]
    pub quota: Option<i64>,
    /// In microseconds.
    #[serde(default)]
    pub period: Option<u64>,
    /// A weight.
    #[serde(default)]
    pub shares: Option<u64>,
    /// CPUs, as a list.
    #[serde(default)]
    pub cpus: Option<String>,
    /// Memory nodes, as a list.
    #[serde(default)]
    pub mems: Option<String>,
}

/// What a container asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// The CPUs that it may use; all of them when empty.
    pub cpus: Set,
    /// The nodes that its memory may come from; all of them when empty.
    pub mems: Set,
    /// How many CPUs it is meant to have, when that is told: 0 for a number that is not whole.
    pub count: Option<u64>,
}

impl Claim {
    /// What resources say.
    ///
    /// # Errors
    /// [`NumaError::List`].
    pub fn new(resources: &Resources) -> Result<Self, NumaError> {
        let Some(cpu) = &resources.cpu else { return Ok(Self::default()) };
        let read = |what: &'static str, text: &Option<String>| {
            let text = text.as_deref().unwrap_or_default();
            list::parse(text).ok_or_else(|| NumaError::List { what, text: start_of(text) })
        };
        let whole = |number: u64, one: u64| match number % one {
            0 => number / one,
            _ => 0,
        };
        let quota = cpu.quota.and_then(|quota| u64::try_from(quota).ok()).filter(|q| *q > 0);
        let period = cpu.period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
        let shares = cpu.shares.filter(|shares| *shares > 0);
        Ok(Self {
            cpus: read("the CPUs", &cpu.cpus)?,
            mems: read("the memory nodes", &cpu.mems)?,
            count: quota
                .map(|quota| whole(quota, period))
                .or(shares.map(|shares| whole(shares, SHARES_OF_CPU))),
        })
    }

    /// Whether it says nothing of where.
    pub fn is_empty(&self) -> bool {
        self.cpus.is_empty() && self.mems.is_empty()
    }

    /// Whether the CPUs can be taken for its own: they are not all of the host's, and as many as
    /// it is meant to have. What the kubelet's CPU manager leaves to all others it gives to each
    /// container that has no CPUs of its own, and those are more.
    pub fn is_exclusive(&self, online: &Set) -> bool {
        let count = self.cpus.len() as u64;
        count > 0 && self.cpus != *online && self.count.is_none_or(|meant| meant == count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(json: &str) -> Result<Claim, NumaError> {
        Claim::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn cpus_are_a_containers_own_when_they_are_as_many_as_it_has() {
        let online: Set = (0..8).collect();
        for (json, exclusive) in [
            (r#"{"cpu": {"cpus": "2-3"}}"#, true),
            (r#"{"cpu": {"cpus": "2-3", "quota": 200000, "period": 100000}}"#, true),
            (r#"{"cpu": {"cpus": "2-3", "quota": 200000}}"#, true),
            (r#"{"cpu": {"cpus": "2-3", "quota": -1, "shares": 2048}}"#, true),
            (r#"{"cpu": {"cpus": "2-3", "quota": 0, "shares": 2048}}"#, true),
            (r#"{"cpu": {"cpus": "2-7", "quota": 200000, "period": 100000}}"#, false),
            (r#"{"cpu": {"cpus": "2-7", "shares": 2}}"#, false),
            (r#"{"cpu": {"cpus": "2", "quota": 50000, "period": 100000}}"#, false),
            (r#"{"cpu": {"cpus": "0-7"}}"#, false),
            (r#"{"cpu": {"quota": 200000}}"#, false),
            (r#"{"memory": {}}"#, false),
        ] {
            assert_eq!(claim(json).unwrap().is_exclusive(&online), exclusive, "{json}");
        }
    }

    #[test]
    fn list_that_is_none_is_named() {
        for (json, words) in [
            (r#"{"cpu": {"cpus": "2-"}}"#, "CPUs '2-'"),
            (r#"{"cpu": {"mems": "all"}}"#, "nodes 'all'"),
        ] {
            let error = claim(json).unwrap_err();
            assert!(error.is_of_the_pod() && error.to_string().contains(words), "{error}");
        }
    }
}
