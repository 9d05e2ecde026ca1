//! CRI as the suite's cases call it, of which the measurements need a part.
#![allow(dead_code)]

#[path = "../cri/client.rs"]
pub(crate) mod client;
#[path = "../cri/grpc.rs"]
mod grpc;
#[path = "../cri/wire.rs"]
pub(crate) mod wire;
