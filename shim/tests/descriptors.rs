//! What a jailed VMM is handed, looked at by the calls that would misuse it. Needs root: a mount is
//! made for each descriptor.

use std::{
    fs::{File, Permissions},
    io::{ErrorKind, Read, Write},
    os::fd::AsRawFd,
    os::unix::fs::{MetadataExt, PermissionsExt, fchown},
    path::Path,
};

use vial_shim::jail::descriptors::{open_device, open_device_once, open_file, process_descriptors};

#[test]
fn handed_file_can_be_read_and_nothing_else() {
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    std::fs::write(&path, "kernel").unwrap();
    let mut file = open_file(&path).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kernel");
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    let error = File::options().write(true).open(again).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let error = file.set_permissions(Permissions::from_mode(0o666)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let error = fchown(&file, Some(1), None).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn handed_device_works_and_keeps_its_mode() {
    let mut null = open_device(Path::new("/dev/null")).unwrap();
    null.write_all(b"x").unwrap();
    let error = null.set_permissions(Permissions::from_mode(0o600)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn device_that_is_opened_once_is_not_opened_again() {
    let mut null = open_device_once(Path::new("/dev/null")).unwrap();
    null.write_all(b"x").unwrap();
    let again = format!("/proc/self/fd/{}", null.as_raw_fd());
    let error = File::options().read(true).open(again).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    let error = null.set_permissions(Permissions::from_mode(0o600)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn nothing_leads_up_from_a_handed_directory() {
    let own = process_descriptors(std::process::id()).unwrap();
    let inode = |path: &str| {
        let path = format!("/proc/self/fd/{}/{path}", own.as_raw_fd());
        std::fs::metadata(path).map(|metadata| metadata.ino())
    };
    assert_eq!(inode("..").unwrap(), inode(".").unwrap());
    assert_eq!(inode("../../..").unwrap(), inode(".").unwrap());
    assert!(inode(&own.as_raw_fd().to_string()).is_ok());
    assert!(inode("../../../etc").is_err());
}

#[test]
fn absent_file_is_not_found() {
    let error = open_file(Path::new("/nowhere/vmlinux")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
