//! The header of a vsock packet (virtio 1.2, 5.10.6).

use super::HOST_CID;

/// The size of a header.
pub(super) const HEADER_BYTES: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_RCV`: the sender of it will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender of it will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for (virtio 1.2, 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// Says which directions are over.
    Shutdown,
    /// Carries data.
    Data,
    /// Tells the sender's buffer space.
    CreditUpdate,
    /// Asks for a [`Operation::CreditUpdate`].
    CreditRequest,
}

impl Operation {
    const fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    fn from_code(code: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|operation| operation.code() == code)
    }
}

/// The two ends of a connection, as a device sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    /// The port on the host's side.
    pub(super) host: u32,
    /// The port on the guest's side.
    pub(super) guest: u32,
}

/// A header that the guest wrote. Nothing in it is checked but the fields' sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Received {
    /// Where it says that it comes from.
    pub(super) source_cid: u64,
    /// Where it wants to go.
    pub(super) destination_cid: u64,
    pub(super) ports: Ports,
    /// Of data that follows the header, in bytes.
    pub(super) bytes: u32,
    /// The kind of socket.
    pub(super) kind: u16,
    /// `None` for a code that the specification does not have.
    pub(super) operation: Option<Operation>,
    pub(super) flags: u32,
    /// The size of the guest's receive buffer for this connection.
    pub(super) buffer: u32,
    /// How many bytes the guest has taken out of that buffer in all, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Received {
    /// The fields of a header.
    pub(super) fn parse(header: &[u8; HEADER_BYTES]) -> Self {
        let field = |offset: usize| {
            u32::from_le_bytes([
                header[offset],
                header[offset + 1],
                header[offset + 2],
                header[offset + 3],
            ])
        };
        let cid = |offset: usize| u64::from(field(offset)) | u64::from(field(offset + 4)) << 32;
        let kind_and_operation = field(28);
        Self {
            source_cid: cid(0),
            destination_cid: cid(8),
            ports: Ports { guest: field(16), host: field(20) },
            bytes: field(24),
            kind: kind_and_operation as u16,
            operation: Operation::from_code((kind_and_operation >> 16) as u16),
            flags: field(32),
            buffer: field(36),
            forwarded: field(40),
        }
    }
}

/// A header for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) ports: Ports,
    pub(super) kind: u16,
    pub(super) operation: Operation,
    pub(super) bytes: u32,
    pub(super) flags: u32,
    /// The size of our receive buffer for this connection.
    pub(super) buffer: u32,
    /// How many bytes we have passed on in all, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Sent {
    /// The answer to a packet that has no connection.
    pub(super) fn reset(ports: Ports, kind: u16) -> Self {
        Self {
            ports,
            kind,
            operation: Operation::Reset,
            bytes: 0,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }

    /// The header's bytes, for the guest with that context id.
    pub(super) fn encode(&self, guest_cid: u32) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let fields: [(usize, u32); 9] = [
            (0, HOST_CID),
            (8, guest_cid),
            (16, self.ports.host),
            (20, self.ports.guest),
            (24, self.bytes),
            (28, u32::from(self.kind) | u32::from(self.operation.code()) << 16),
            (32, self.flags),
            (36, self.buffer),
            (40, self.forwarded),
        ];
        for (offset, value) in fields {
            header[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        header
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header as a guest's driver writes it.
    #[derive(Debug, Clone, Copy)]
    pub(in super::super) struct GuestHeader {
        pub(in super::super) source_cid: u64,
        pub(in super::super) destination_cid: u64,
        pub(in super::super) guest_port: u32,
        pub(in super::super) host_port: u32,
        pub(in super::super) bytes: u32,
        pub(in super::super) kind: u16,
        pub(in super::super) code: u16,
        pub(in super::super) flags: u32,
        pub(in super::super) buffer: u32,
        pub(in super::super) forwarded: u32,
    }

    impl GuestHeader {
        pub(in super::super) fn encode(&self) -> [u8; HEADER_BYTES] {
            let mut header = Vec::new();
            header.extend(self.source_cid.to_le_bytes());
            header.extend(self.destination_cid.to_le_bytes());
            header.extend(self.guest_port.to_le_bytes());
            header.extend(self.host_port.to_le_bytes());
            header.extend(self.bytes.to_le_bytes());
            header.extend(self.kind.to_le_bytes());
            header.extend(self.code.to_le_bytes());
            header.extend(self.flags.to_le_bytes());
            header.extend(self.buffer.to_le_bytes());
            header.extend(self.forwarded.to_le_bytes());
            header.try_into().unwrap()
        }
    }

    #[test]
    fn header_of_the_guest_is_read_field_by_field() {
        let header = GuestHeader {
            source_cid: 0x1_0000_0003,
            destination_cid: 2,
            guest_port: 0x1111_2222,
            host_port: 1024,
            bytes: 77,
            kind: 1,
            code: 4,
            flags: 3,
            buffer: 0x10000,
            forwarded: u32::MAX,
        };
        let received = Received::parse(&header.encode());
        assert_eq!(
            received,
            Received {
                source_cid: 0x1_0000_0003,
                destination_cid: 2,
                ports: Ports { host: 1024, guest: 0x1111_2222 },
                bytes: 77,
                kind: TYPE_STREAM,
                operation: Some(Operation::Shutdown),
                flags: SHUTDOWN_BOTH,
                buffer: 0x10000,
                forwarded: u32::MAX,
            }
        );
    }

    #[test]
    fn operation_codes_beyond_the_specification_are_none() {
        assert_eq!(Operation::from_code(0), None);
        assert_eq!(Operation::from_code(8), None);
        assert_eq!(Operation::from_code(u16::MAX), None);
        for code in 1..=7 {
            assert_eq!(Operation::from_code(code).unwrap().code(), code);
        }
    }

    proptest! {
        #[test]
        fn any_header_can_be_parsed(header in any::<[u8; 32]>(), rest in any::<[u8; 12]>()) {
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&header);
            whole[32..].copy_from_slice(&rest);
            let _ = Received::parse(&whole);
        }
    }
}
