//! The emulated host: a QEMU machine without acceleration whose own `/dev/kvm` works, for machines that have no usable one.
//!
//! [`options`] is what the caller asks for, [`emulator`] the QEMU process made from it, [`control`] what the host's
//! init says over its control port, [`session`] one run from start to outcome. [`process`] holds the two system calls
//! that need unsafe code, [`vmrun`] what is corrected in QEMU. The init script itself is `tests/host/init`, the disk is
//! built by `tests/host/build`.

pub(crate) mod control;
mod devices;
pub(crate) mod emulator;
pub(crate) mod options;
pub(crate) mod process;
pub(crate) mod session;
mod vmrun;
