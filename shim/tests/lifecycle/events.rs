//! containerd's side of events: takes them and remembers their topics.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::Empty,
    shim::events::ForwardRequest,
    shim_async::{Events, create_events},
};
use ttrpc::asynchronous::{Server, TtrpcContext};

#[derive(Clone, Default)]
pub(crate) struct Topics(Arc<Mutex<Vec<String>>>);

impl Topics {
    pub(crate) async fn serve(path: &Path) -> (Self, Server) {
        let topics = Self::default();
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(topics.clone())));
        server.start().await.unwrap();
        (topics, server)
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

#[async_trait]
impl Events for Topics {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.lock().unwrap().push(request.envelope.topic.clone());
        Ok(Empty::default())
    }
}
