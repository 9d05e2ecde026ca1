//! What the agent, which is the guest's, answers the shim about what a container uses.
#![no_main]

use containerd_shim_protos::protobuf::Message;
use libfuzzer_sys::fuzz_target;
use vial_agent_protocol::agent::StatsResponse;
use vial_shim::metrics;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(stats) = StatsResponse::parse_from_bytes(bytes) {
        let told = metrics::encode(&metrics::of_container(&stats)).expect("numbers are encoded");
        assert!(told.value.len() <= 64 << 10, "{} bytes for containerd", told.value.len());
    }
});
