//! `vial-adversary --without REQUEST PROGRAM ARGUMENT...`: runs a program for which, and for all that it starts, the
//! kernel knows no such ioctl. Hosts lack what others have; this makes one lack it.

use std::ffi::c_long;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::call;

/// Where a filter finds the call's number and the lower half of its second argument (linux/seccomp.h).
const NUMBER: u32 = 0;
const SECOND: u32 = 24;
/// Instructions (linux/bpf_common.h): load a word, go on where it is equal, end.
const LOAD: u16 = 0x20;
const IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Becomes the program. Returns why it cannot.
pub(crate) fn run(mut words: impl Iterator<Item = String>) -> io::Error {
    let request =
        words.next().and_then(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (Some(request), Some(program)) = (request, words.next()) else {
        return io::Error::other("give a request such as 0x400454d9, and a program");
    };
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let refused = libc::SECCOMP_RET_ERRNO | libc::ENOTTY as u32;
    let mut steps = [
        step(LOAD, 0, 0, NUMBER),
        step(IF_EQUAL, 0, 3, libc::SYS_ioctl as u32),
        step(LOAD, 0, 0, SECOND),
        step(IF_EQUAL, 0, 1, request),
        step(RETURN, 0, 0, refused),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    let set = c_long::from(libc::SECCOMP_SET_MODE_FILTER as i32);
    let installed = call(libc::SYS_seccomp, [set, 0, (&raw const filter) as c_long, 0, 0, 0]);
    if installed < 0 {
        return io::Error::from_raw_os_error(-installed as i32);
    }
    Command::new(program).args(words).exec()
}
