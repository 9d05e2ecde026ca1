//! The format of the guest image, for the program that writes it and for tests that boot one of their own.

pub mod erofs;
