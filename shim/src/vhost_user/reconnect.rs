//! Other connections in place of those that have broken.

use std::{
    os::fd::AsFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{Instant, sleep, sleep_until};
use vial_vmm_api::{Action, Descriptor};

use super::{connect::connect, listed::Listed};
use crate::vmm_client::{VmmClient, VmmError};

/// How long the next try waits, at first and at most. A backend that starts takes longer than the
/// first; the guest waits, and has time.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Connects the devices of a VM again, one at a time for each.
#[derive(Debug, Clone)]
pub struct Reconnector {
    client: Arc<VmmClient>,
    devices: Arc<[Listed]>,
    /// When each may be given a connection again: the VMM refuses some backends at once.
    next: Arc<Mutex<Vec<Instant>>>,
}

impl Reconnector {
    /// For a VM's devices, in the VMM's order.
    pub fn new(client: Arc<VmmClient>, devices: &[Listed]) -> Self {
        let next = vec![Instant::now(); devices.len()];
        Self { client, devices: devices.into(), next: Arc::new(Mutex::new(next)) }
    }

    /// A device's connection has broken: gets another, whenever that can be, as long as there is a
    /// VM.
    pub fn gone(&self, backend: u8) {
        let Some(device) = self.devices.get(usize::from(backend)) else {
            tracing::error!("the VMM tells of a vhost-user device {backend}, which there is not");
            return;
        };
        tracing::warn!(
            "the backend of '{}' is gone; the pod waits for it at {}",
            device.name,
            device.socket.display()
        );
        tokio::spawn(self.clone().connect_again(backend));
    }

    async fn connect_again(self, backend: u8) {
        let device = &self.devices[usize::from(backend)];
        let earliest = {
            let mut next = self.next.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let next = &mut next[usize::from(backend)];
            std::mem::replace(next, (*next).max(Instant::now()) + LONGEST_WAIT)
        };
        sleep_until(earliest).await;
        let mut wait = FIRST_WAIT;
        let socket = loop {
            match connect(device).await {
                Ok(socket) => break socket,
                // It is told once that the pod waits, and nobody looks at more.
                Err(error) => tracing::debug!("{error}"),
            }
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
            if self.client.is_closed() {
                return;
            }
        };
        let action = Action::ReconnectBackend { backend, socket: Descriptor(0) };
        match self.client.request(action, &[socket.as_fd()]).await {
            Ok(_) => tracing::info!("'{}' has a backend again", device.name),
            Err(VmmError::Closed) => {}
            Err(error) => tracing::error!("'{}' stays without a backend: {error}", device.name),
        }
    }
}
