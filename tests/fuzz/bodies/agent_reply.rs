//! What the agent, which is the guest's, answers the shim about what a container uses.

use containerd_shim_protos::protobuf::Message;
use vial_agent_protocol::agent::StatsResponse;
use vial_shim::metrics;

/// Panics where the rules above are broken.
pub(crate) fn run(bytes: &[u8]) {
    if let Ok(stats) = StatsResponse::parse_from_bytes(bytes) {
        let told = metrics::encode(&metrics::of_container(&stats)).expect("numbers are encoded");
        assert!(told.value.len() <= 64 << 10, "{} bytes for containerd", told.value.len());
    }
}
