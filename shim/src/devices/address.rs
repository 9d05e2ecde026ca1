//! The address of a PCI function: domain, bus, device and function, as `lspci -D` writes it.

use serde::{Deserialize, Serialize};

use super::DeviceError;

/// An address, such as `0000:3b:02.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl Address {
    /// That of a device of one function on a guest's first bus, whose numbers are below 32.
    pub fn on_guest_bus(device: u8) -> Self {
        Self { domain: 0, bus: 0, device: device % 32, function: 0 }
    }
}

impl std::str::FromStr for Address {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let wrong = || DeviceError::Address(text.chars().take(32).collect());
        let hex = |digits: &str, most: usize| {
            let is_hex = digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            let fits = is_hex && (most / 2..=most).contains(&digits.len());
            fits.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
        };
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            if bus.len() != 2 || device.len() != 2 || function.len() != 1 {
                return None;
            }
            Some(Self {
                // Four digits; domains that software makes up, such as those of VMD, have more.
                domain: hex(domain, 8)?,
                bus: u8::try_from(hex(bus, 2)?).ok()?,
                device: u8::try_from(hex(device, 2)?).ok().filter(|device| *device < 32)?,
                function: u8::try_from(hex(function, 1)?).ok().filter(|function| *function < 8)?,
            })
        };
        parse().ok_or_else(wrong)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl TryFrom<String> for Address {
    type Error = DeviceError;

    fn try_from(text: String) -> Result<Self, DeviceError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn address_that_is_none_is_refused() {
        for text in [
            "",
            "00:02.0",
            "0000:00:20.0",
            "0000:00:02.8",
            "0000:0:02.0",
            "0000:00:02",
            "x:00:02.0",
            "0000:00:02.0/..",
            "../0000:00:02.0",
            "0000:00:+2.0",
            "000000000:00:02.0",
            "0000:AB:02.0",
            "0000:00:02.00",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn address_survives_its_text(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = Address { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }

        #[test]
        fn any_text_is_an_address_as_it_is_written_or_none(text in "[0-9a-f:.]{0,16}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string(), text);
            }
        }
    }
}
