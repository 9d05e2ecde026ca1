//! What differs between networks, disks and file systems.

use std::os::fd::OwnedFd;

use vial_vmm_api::{MAX_TAG_BYTES, VHOST_USER_QUEUES};

use super::connection::{BackendError, Connection};
use super::messages::{PROTOCOL_CONFIG, PROTOCOL_INFLIGHT, PROTOCOL_MQ, PROTOCOL_REPLY_ACK};
use crate::devices::net;
use crate::virtio::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};

/// The size of each ring.
pub(super) const RING_SIZE: u16 = 256;

// Of a network (virtio 1.2, 5.1.3), beside those of several pairs of queues.
const NET_MTU: u64 = 1 << 3;
const NET_MAC: u64 = 1 << 5;
/// Checksums and segmentation in both directions, buffers that are merged.
const NET_OFFLOADS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15;

// Of a disk (virtio 1.2, 5.2.3).
const BLOCK_READ_ONLY: u64 = 1 << 5;
const BLOCK_MQ: u64 = 1 << 12;
/// Sizes, geometry, topology, flush, discard, zeros. Not what is written to the configuration.
const BLOCK_OTHERS: u64 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14;
/// The configuration up to what those features say.
const BLOCK_CONFIG_BYTES: usize = 60;
/// Where it has the number of queues.
const BLOCK_QUEUES: usize = 34;

/// A device's kind, and what the configuration says of it.
#[derive(Debug)]
pub enum Kind {
    /// A network interface.
    Net {
        /// The guest's address.
        mac: [u8; 6],
        /// In bytes, without the Ethernet header.
        mtu: u16,
    },
    /// A disk.
    Block {
        /// Whether the backend has to be one that refuses writes.
        read_only: bool,
        /// Memory for rings of the VMM's own.
        rings: OwnedFd,
    },
    /// A file system.
    Fs {
        /// Its name.
        tag: String,
    },
}

/// What a device is to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    /// Offered to the driver, without what the transport adds.
    pub(super) features: u64,
    /// Those that the backend serves.
    pub(super) rings: usize,
    pub(super) config: Vec<u8>,
    /// What was agreed on with the backend.
    pub(super) protocol: u64,
}

impl Kind {
    /// The device's id (virtio 1.2, 5).
    pub(super) fn id(&self) -> u32 {
        match self {
            Self::Net { .. } => virtio_bindings::virtio_ids::VIRTIO_ID_NET,
            Self::Block { .. } => virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
            Self::Fs { .. } => virtio_bindings::virtio_ids::VIRTIO_ID_FS,
        }
    }

    /// What is wrong with what the configuration says.
    pub(super) fn check(&self, queues: u8) -> Result<(), BackendError> {
        let (least, most) = (VHOST_USER_QUEUES.start(), VHOST_USER_QUEUES.end());
        let wrong = |text: String| Err(BackendError::Unfit(text));
        match self {
            _ if !VHOST_USER_QUEUES.contains(&queues) => {
                wrong(format!("{queues} queues: give {least} to {most}"))
            }
            Self::Net { mac, .. } if *mac == [0; 6] || mac[0] & 1 != 0 => {
                wrong(format!("{mac:02x?} is no unicast MAC address"))
            }
            Self::Net { mtu: ..68, .. } => wrong("an MTU below 68 is too small for IPv4".into()),
            Self::Fs { tag } if !(1..=MAX_TAG_BYTES).contains(&tag.len()) => {
                wrong(format!("the name {tag:?} has not 1 to {MAX_TAG_BYTES} bytes"))
            }
            _ => Ok(()),
        }
    }

    fn wanted(&self) -> u64 {
        let own = match self {
            // Packets are served in order: what was not, is known by the rings.
            Self::Net { .. } => 0,
            Self::Block { .. } => PROTOCOL_CONFIG | PROTOCOL_INFLIGHT,
            Self::Fs { .. } => PROTOCOL_INFLIGHT,
        };
        PROTOCOL_MQ | PROTOCOL_REPLY_ACK | own
    }

    /// Agrees with a backend on what the device is.
    pub(super) fn negotiate(
        &self,
        connection: &mut Connection,
        queues: u8,
    ) -> Result<Shape, BackendError> {
        let has = connection.features()?;
        if has & FEATURE_VERSION_1 == 0 {
            return Err(BackendError::Lacks("virtio 1 (VIRTIO_F_VERSION_1)"));
        }
        let (protocol, most) = connection.agree(self.wanted())?;
        let any = FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX;
        match self {
            Self::Net { mac, mtu } => {
                let pairs = match has & net::MQ {
                    0 => 1,
                    _ => u64::from(queues).min(most).max(1) as u16,
                };
                let config = net::config(*mac, pairs, *mtu).to_vec();
                // Which of several pairs are used is told by a queue that no backend serves.
                let several = if pairs > 1 { net::MQ | net::CTRL_VQ } else { 0 };
                // Address and MTU are the configuration's, whatever the backend knows of them.
                let features = has & (any | NET_OFFLOADS) | NET_MAC | NET_MTU | several;
                Ok(Shape { features, rings: 2 * usize::from(pairs), config, protocol })
            }
            Self::Block { read_only, .. } => {
                if protocol & PROTOCOL_CONFIG == 0 {
                    return Err(BackendError::Lacks("a disk's configuration (CONFIG)"));
                }
                if *read_only && has & BLOCK_READ_ONLY == 0 {
                    return Err(BackendError::Unfit(
                        "the disk is to be read-only, and the backend lets it be written; have it \
                         export the disk read-only"
                            .into(),
                    ));
                }
                let mut config = vec![0; BLOCK_CONFIG_BYTES];
                connection.read_config(&mut config)?;
                let queues = u64::from(queues).min(most).max(1) as u16;
                config[BLOCK_QUEUES..BLOCK_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
                let multiple = if queues > 1 { BLOCK_MQ } else { 0 };
                let features = has & (any | BLOCK_READ_ONLY | multiple | BLOCK_OTHERS);
                let rings = match features & BLOCK_MQ {
                    0 => 1,
                    _ => queues.into(),
                };
                Ok(Shape { features, rings, config, protocol })
            }
            Self::Fs { tag } => {
                // One for urgent requests beside the others (virtio 1.2, 5.11.2).
                let queues = u64::from(queues).min(most.saturating_sub(1)).max(1);
                let mut config = vec![0; MAX_TAG_BYTES + 4];
                config[..tag.len()].copy_from_slice(tag.as_bytes());
                config[MAX_TAG_BYTES..].copy_from_slice(&(queues as u32).to_le_bytes());
                Ok(Shape { features: has & any, rings: queues as usize + 1, config, protocol })
            }
        }
    }

    /// Features that the VMM sees to, and a backend may know nothing of.
    pub(super) fn own_features(&self) -> u64 {
        match self {
            Self::Net { .. } => NET_MAC | NET_MTU | net::CTRL_VQ,
            Self::Block { .. } | Self::Fs { .. } => 0,
        }
    }
}
