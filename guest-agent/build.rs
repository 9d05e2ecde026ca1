//! Links the agent small: a static position-independent program relocates itself at its start,
//! and the packed form of those relocations takes a tenth of the room.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
