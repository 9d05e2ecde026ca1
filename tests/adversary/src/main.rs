//! `vial-adversary`: takes the place of `vial-vmm`, and tries what an attacker would who has taken
//! over the VMM. Whatever works is a hole in the jail.
//!
//! It is started as the VMM is: `vial-adversary --api-fd NUMBER`. It takes the first request's
//! descriptors, makes its attempts, says on standard error which of them succeeded, and ends with
//! status 1 and a line that counts them. The suite's isolation cases run it.
//!
//! `vial-adversary --driver INTERFACE`, in a privileged container of a pod, is a hostile guest
//! instead ([`driver`]): it ends with 0 when each of its attempts broke the device and nothing
//! else.
//!
//! `vial-adversary --without REQUEST PROGRAM ARGUMENT...` runs a program on a host that lacks something
//! ([`without`]).
#![allow(unsafe_code)]

mod attempts;
mod driver;
mod handed;
mod taps;
mod without;

use std::ffi::c_long;

/// What came of the attempts.
#[derive(Default)]
pub(crate) struct Tally {
    tried: u32,
    succeeded: u32,
}

impl Tally {
    /// Counts an attempt, and tells of it when it succeeded.
    pub(crate) fn note(&mut self, what: &str, succeeded: bool) {
        self.tried += 1;
        if succeeded {
            self.succeeded += 1;
            eprintln!("WARN hole: {what}");
        }
    }

    /// Makes a system call that must not succeed.
    pub(crate) fn call(&mut self, what: &str, number: c_long, arguments: [c_long; 6]) {
        self.note(what, call(number, arguments) >= 0);
    }
}

/// A system call, with its error as a negative number.
pub(crate) fn call(number: c_long, [a, b, c, d, e, f]: [c_long; 6]) -> c_long {
    // SAFETY: this program is there to do what is wrong; it keeps no state that a call could
    // spoil, and passes pointers only to what lives as long as the call.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result >= 0 {
        return result;
    }
    // SAFETY: the location of errno is this thread's.
    c_long::from(-unsafe { *libc::__errno_location() })
}

/// The address of a string of C's, as an argument.
pub(crate) fn text(string: &std::ffi::CStr) -> c_long {
    string.as_ptr() as c_long
}

fn main() {
    if let Some(interface) = std::env::args().skip_while(|word| word != "--driver").nth(1) {
        match driver::try_all(&interface) {
            Ok(wrong) => std::process::exit(i32::from(!wrong.is_empty())),
            Err(error) => {
                eprintln!("the device of {interface} cannot be taken: {error}");
                std::process::exit(2);
            }
        }
    }
    if std::env::args().nth(1).as_deref() == Some("--without") {
        eprintln!("nothing is run: {}", without::run(std::env::args().skip(2)));
        std::process::exit(2);
    }
    let mut arguments = std::env::args().skip_while(|word| word != "--api-fd").skip(1);
    let socket = arguments.next().and_then(|number| number.parse().ok());
    let mut tally = Tally::default();
    attempts::all(&mut tally);
    match socket.and_then(handed::receive) {
        Some(descriptors) => handed::try_all(&mut tally, &descriptors),
        None => tally.note("nothing was handed over, so nothing was tried on it", true),
    }
    eprintln!("ERROR the adversary tried {} things: {} succeeded", tally.tried, tally.succeeded);
    std::process::exit(1);
}
