//! CRI as the suite's cases call it.
// The measurements need a part of it; the rest is used, and told of when it is not, in the suite.
#![allow(dead_code)]

#[path = "../cri/client.rs"]
pub(crate) mod client;
#[path = "../cri/configs.rs"]
pub(crate) mod configs;
#[path = "../cri/grpc.rs"]
mod grpc;
#[path = "../cri/wire.rs"]
pub(crate) mod wire;
