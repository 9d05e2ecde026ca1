//! All targets in one program, which is built in a fraction of the time that one of each takes: `VIAL_FUZZ_TARGET` names
//! the one that it is.
#![no_main]

use std::sync::OnceLock;

/// Each body, by its name.
macro_rules! bodies {
    ($($name:ident),* $(,)?) => {
        mod bodies {
            $(pub(crate) mod $name;)*
        }

        /// What the named target does with an input.
        fn body(name: &str) -> Option<fn(&[u8])> {
            match name {
                $(stringify!($name) => Some(bodies::$name::run),)*
                _ => None,
            }
        }
    };
}

bodies![agent_reply, balloon, block, bus, fs, mem, net, oci_spec, rng, snapshot, vmm_api, vsock];

static BODY: OnceLock<fn(&[u8])> = OnceLock::new();

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let run = BODY.get_or_init(|| {
        let name = std::env::var("VIAL_FUZZ_TARGET").unwrap_or_default();
        body(&name).unwrap_or_else(|| panic!("VIAL_FUZZ_TARGET is {name:?}, which is no target"))
    });
    run(input)
});
