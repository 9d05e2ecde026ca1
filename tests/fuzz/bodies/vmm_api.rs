//! The messages between shim and VMM, either of which may be the attacker's.

use vial_vmm_api::{Message, Request, decode, encode};

/// Panics where the rules above are broken.
pub(crate) fn run(bytes: &[u8]) {
    if let Ok(request) = decode::<Request>(bytes) {
        let again = encode(&request).expect("what was decoded can be encoded");
        assert_eq!(decode::<Request>(&again).expect("and decoded again"), request);
    }
    if let Ok(message) = decode::<Message>(bytes) {
        let again = encode(&message).expect("what was decoded can be encoded");
        assert_eq!(decode::<Message>(&again).expect("and decoded again"), message);
    }
}
