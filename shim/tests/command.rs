//! The `vial` command as a shell runs it.

use std::process::Command;

#[test]
fn reader_that_has_seen_enough_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let vial = Command::new(env!("CARGO_BIN_EXE_vial")).arg("check").stdout(writer).output();
    let vial = vial.unwrap();
    let said = String::from_utf8_lossy(&vial.stderr);
    assert!(vial.status.success() && said.is_empty(), "{}: {said}", vial.status);
}
