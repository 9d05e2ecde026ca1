//! Starts as traces: a span for a start and one for each of its phases, in OpenTelemetry's JSON (OTLP 1.3, "JSON Protobuf
//! Encoding"), a line for each sandbox, as collectors read them from files and by HTTP.

use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::is_from_template;
use crate::{ps::Listed, timeline::Mark};

/// `SPAN_KIND_INTERNAL`.
const INTERNAL: u8 = 1;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Span {
    trace_id: String,
    span_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_span_id: Option<String>,
    name: String,
    kind: u8,
    // OTLP has 64-bit numbers as strings.
    start_time_unix_nano: String,
    end_time_unix_nano: String,
    attributes: Vec<Value>,
}

/// The sandboxes whose starts have marks, in lines. `since_epoch_ns` is what the host's `CLOCK_REALTIME` is ahead of its
/// `CLOCK_MONOTONIC`.
pub fn lines(sandboxes: &[Listed], since_epoch_ns: u64) -> String {
    sandboxes
        .iter()
        .filter(|listed| !listed.timeline.is_empty())
        .map(|listed| format!("{}\n", trace(listed, since_epoch_ns)))
        .collect()
}

fn trace(listed: &Listed, since_epoch_ns: u64) -> Value {
    let spans = spans(listed, since_epoch_ns);
    let scope = json!({ "name": "vial", "version": env!("CARGO_PKG_VERSION") });
    let mut resource = vec![attribute("service.name", "vial")];
    if let Ok(name) = std::fs::read_to_string("/proc/sys/kernel/hostname") {
        resource.push(attribute("host.name", name.trim()));
    }
    json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{ "scope": scope, "spans": spans }],
    }] })
}

/// The whole first. A phase ends with its mark and begins with the one before.
fn spans(listed: &Listed, since_epoch_ns: u64) -> Vec<Span> {
    let state = &listed.state;
    let key = [state.namespace.as_str(), &state.id, &state.created_unix_seconds.to_string()];
    // The trace is number 0, the whole 1, and its phases the numbers from 2 on.
    let span = |name: &str, number: usize, from: &Mark, to: &Mark| Span {
        trace_id: identifier(&key, 0, 16),
        span_id: identifier(&key, number, 8),
        parent_span_id: (number > 1).then(|| identifier(&key, 1, 8)),
        name: name.to_owned(),
        kind: INTERNAL,
        start_time_unix_nano: from.at_ns.saturating_add(since_epoch_ns).to_string(),
        end_time_unix_nano: to.at_ns.saturating_add(since_epoch_ns).to_string(),
        attributes: Vec::new(),
    };
    let (Some(first), Some(last)) = (listed.timeline.first(), listed.timeline.last()) else {
        return Vec::new();
    };
    let mut whole = span("start sandbox", 1, first, last);
    let from = if is_from_template(&listed.timeline) { "template" } else { "kernel" };
    whole.attributes = vec![
        attribute("vial.namespace", &state.namespace),
        attribute("vial.sandbox", &state.id),
        attribute("vial.from", from),
    ];
    let pairs = listed.timeline.iter().zip(listed.timeline.iter().skip(1));
    let phases = pairs.enumerate().map(|(n, (from, to))| span(&to.name, n + 2, from, to));
    std::iter::once(whole).chain(phases).collect()
}

fn attribute(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

/// The same for the same start, however often it is told, so that a collector takes it for one: that many bytes in
/// hexadecimal, which are not all zeros.
fn identifier(key: &[&str], number: usize, bytes: usize) -> String {
    let mut hash = Sha256::new();
    for word in key {
        hash.update((word.len() as u64).to_le_bytes());
        hash.update(word);
    }
    hash.update((number as u64).to_le_bytes());
    let hash = hash.finalize();
    hash[..bytes].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(id: &str, marks: &[(&str, u64)]) -> Listed {
        let mark = |&(name, at_ns): &(&str, u64)| Mark { name: name.into(), at_ns };
        super::super::listed(id, true, marks.iter().map(mark).collect())
    }

    #[test]
    fn start_is_a_span_and_its_phases_are_below_it() {
        let marks = [("shim exec", 10), ("VMM spawned", 30), ("agent greeted", 60)];
        let one = listed("one", &marks);
        let text = lines(&[one, listed("none", &[])], 1_000);
        assert_eq!(text.lines().count(), 1);
        let value: Value = serde_json::from_str(&text).unwrap();
        let spans = value["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
        let times: Vec<[&str; 3]> = spans
            .iter()
            .map(|span| {
                let keys = ["name", "startTimeUnixNano", "endTimeUnixNano"];
                keys.map(|key| span[key].as_str().unwrap())
            })
            .collect();
        assert_eq!(
            times,
            [
                ["start sandbox", "1010", "1060"],
                ["VMM spawned", "1010", "1030"],
                ["agent greeted", "1030", "1060"]
            ]
        );
        let root = spans[0]["spanId"].as_str().unwrap();
        assert!(root.len() == 16 && spans[0].get("parentSpanId").is_none());
        for phase in &spans[1..] {
            assert_eq!(phase["parentSpanId"], *root);
            assert_eq!(phase["traceId"], spans[0]["traceId"]);
            assert_ne!(phase["spanId"], *root);
        }
        assert_eq!(spans[0]["traceId"].as_str().unwrap().len(), 32);
    }

    #[test]
    fn same_start_has_the_same_identifiers_and_another_has_others() {
        let marks = [("shim exec", 10), ("VMM spawned", 30)];
        let ids = |id| spans(&listed(id, &marks), 0).into_iter().map(|span| span.trace_id);
        assert!(ids("one").eq(ids("one")));
        assert!(ids("one").ne(ids("two")));
    }
}
