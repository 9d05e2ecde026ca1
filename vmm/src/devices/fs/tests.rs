use std::sync::{Mutex, MutexGuard};

use super::super::testing::{BUFFERS, Bench, RAM_BYTES, WRITE, ram};
use super::*;

/// The working directory belongs to the process: one test at a time.
static WORKING_DIRECTORY: Mutex<()> = Mutex::new(());

const IN: u64 = BUFFERS;
const OUT: u64 = BUFFERS + 0x10000;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const MKDIR: u32 = 9;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE_FILE: u32 = 16;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const READDIRPLUS: u32 = 44;
const BATCH_FORGET: u32 = 42;

struct Share {
    bench: Bench,
    directory: tempfile::TempDir,
    device: Fs,
    /// Who asks: user and group.
    asker: (u32, u32),
    _alone: MutexGuard<'static, ()>,
}

fn share() -> Share {
    let alone = WORKING_DIRECTORY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("hello"), "hello from the host").unwrap();
    let mut device =
        Fs::new("vial", OwnedFd::from(File::open(directory.path()).unwrap()), None).unwrap();
    let bench = Bench::activate(&mut device, &ram());
    Share { bench, directory, device, asker: (0, 0), _alone: alone }
}

impl Share {
    /// Sends a request and returns the error of its reply and what follows the header.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> (i32, Vec<u8>) {
        let bytes = self.write_request(opcode, node, body);
        let used = self
            .bench
            .request(1, &[(IN, bytes, 0), (OUT, room, WRITE)])
            .expect("the request was answered");
        let reply = self.bench.read(OUT, used as usize);
        assert_eq!(u32::from_le_bytes(reply[..4].try_into().unwrap()), used);
        assert_eq!(reply[8..16], 77_u64.to_le_bytes());
        (i32::from_le_bytes(reply[4..8].try_into().unwrap()), reply[16..].to_vec())
    }

    fn write_request(&mut self, opcode: u32, node: u64, body: &[u8]) -> u32 {
        let bytes = 40 + body.len() as u32;
        let mut request = bytes.to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(77_u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(self.asker.0.to_le_bytes());
        request.extend(self.asker.1.to_le_bytes());
        request.extend([0; 8]);
        request.extend(body);
        self.bench.write(IN, &request);
        bytes
    }

    fn init(&mut self) {
        let mut body = Vec::new();
        for field in [7_u32, 38, 1 << 20, 0] {
            body.extend(field.to_le_bytes());
        }
        assert_eq!(self.call(INIT, 0, &body, 80).0, 0);
    }

    fn lookup(&mut self, name: &str) -> Result<u64, i32> {
        match self.call(LOOKUP, 1, format!("{name}\0").as_bytes(), 256) {
            (0, entry) => Ok(u64::from_le_bytes(entry[..8].try_into().unwrap())),
            (error, _) => Err(error),
        }
    }

    fn open(&mut self, opcode: u32, node: u64, flags: i32) -> u64 {
        let mut body = flags.to_le_bytes().to_vec();
        body.extend([0; 4]);
        let (error, reply) = self.call(opcode, node, &body, 64);
        assert_eq!(error, 0);
        u64::from_le_bytes(reply[..8].try_into().unwrap())
    }

    fn read_body(handle: u64, size: u32) -> Vec<u8> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0_u64.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        body
    }
}

#[test]
fn tag_beyond_its_bounds_is_refused() {
    let root = || OwnedFd::from(File::open("/").unwrap());
    let _alone = WORKING_DIRECTORY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for tag in ["", "0123456789012345678901234567890123456", "a\0b"] {
        assert!(matches!(Fs::new(tag, root(), None), Err(FsError::Tag { .. })));
    }
    let longest = "012345678901234567890123456789012345";
    let device = Fs::new(longest, root(), None).unwrap();
    assert_eq!(&device.config()[..36], longest.as_bytes());
    assert_eq!(device.config()[36..], [1, 0, 0, 0]);
}

#[test]
fn root_that_is_a_file_is_refused() {
    let _alone = WORKING_DIRECTORY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    assert!(matches!(Fs::new("vial", file, None), Err(FsError::Root { .. })));
}

#[test]
fn file_of_the_host_is_read_and_written() {
    let mut share = share();
    share.init();
    let node = share.lookup("hello").unwrap();
    let handle = share.open(OPEN, node, libc::O_RDWR);
    let body = Share::read_body(handle, 4096);
    assert_eq!(share.call(READ, node, &body, 16 + 4096), (0, b"hello from the host".to_vec()));
    let mut body = Share::read_body(handle, 5);
    body.extend(b"HELLO");
    assert_eq!(share.call(WRITE_FILE, node, &body, 64).0, 0);
    let host = std::fs::read_to_string(share.directory.path().join("hello")).unwrap();
    assert_eq!(host, "HELLO from the host");
}

#[test]
fn name_that_the_host_adds_is_seen_at_once() {
    let mut share = share();
    share.init();
    assert_eq!(share.lookup("later"), Err(-libc::ENOENT));
    std::fs::create_dir(share.directory.path().join("later")).unwrap();
    assert!(share.lookup("later").is_ok());
}

#[test]
fn parent_of_the_root_is_not_reached() {
    let mut share = share();
    share.init();
    for name in ["..", "../..", "/etc"] {
        assert_eq!(share.lookup(name), Err(-libc::EINVAL), "{name}");
    }
    let outside = tempfile::tempdir().unwrap();
    let name = format!("../{}/made\0", outside.path().file_name().unwrap().display());
    let mut body = vec![0; 8];
    body.extend(name.as_bytes());
    assert_eq!(share.call(MKDIR, 1, &body, 256).0, -libc::EINVAL);
    assert!(!outside.path().join("made").exists());
}

#[test]
fn request_without_room_for_a_reply_is_survived() {
    let mut share = share();
    share.init();
    let node = share.lookup("hello").unwrap();
    let file = share.open(OPEN, node, libc::O_RDONLY);
    let directory = share.open(OPENDIR, 1, libc::O_RDONLY);
    for (opcode, node, handle) in
        [(READ, node, file), (READDIR, 1, directory), (READDIRPLUS, 1, directory)]
    {
        for size in [0, 8, 4096] {
            for room in [0, 1, 15] {
                let bytes = share.write_request(opcode, node, &Share::read_body(handle, size));
                let chain = [(IN, bytes, 0), (OUT, room, WRITE)];
                assert_eq!(share.bench.request(1, &chain), Some(0));
            }
        }
    }
    let bytes = share.write_request(FORGET, node, &1_u64.to_le_bytes());
    assert_eq!(share.bench.request(0, &[(IN, bytes, 0)]), Some(0));
    assert!(!share.bench.fault.is_reported());
    assert!(share.lookup("hello").is_ok());
}

#[test]
fn request_that_lies_about_its_length_is_answered_or_ignored() {
    let mut share = share();
    share.init();
    let lengths = [0, 1, 39, 40, 41, 4096, (1 << 20) + 4097, u32::MAX];
    for opcode in 0..60 {
        for length in lengths {
            share.write_request(opcode, 1, &[0xff; 64]);
            share.bench.write(IN, &u32::to_le_bytes(length));
            assert!(share.bench.request(1, &[(IN, 104, 0), (OUT, 256, WRITE)]).is_some());
            assert!(share.bench.request(1, &[(IN, 40, 0), (OUT, 256, WRITE)]).is_some());
        }
    }
    let mut body = u32::MAX.to_le_bytes().to_vec();
    body.extend([0; 4]);
    let bytes = share.write_request(BATCH_FORGET, 1, &body);
    assert_eq!(share.bench.request(0, &[(IN, bytes, 0)]), Some(0));
    share.init();
    assert!(share.lookup("hello").is_ok());
}

#[test]
fn guest_that_mounts_twice_is_served() {
    let mut share = share();
    share.init();
    assert!(share.lookup("hello").is_ok());
    share.init();
    assert!(share.lookup("hello").is_ok());
}

#[test]
fn chain_outside_memory_breaks_the_device() {
    let mut share = share();
    assert_eq!(share.bench.request(1, &[(RAM_BYTES as u64 - 4, 40, 0), (OUT, 64, WRITE)]), None);
    assert!(share.bench.fault.is_reported());
    // It stays silent, and does not spin.
    share.bench.kick(1);
    share.bench.kick(0);
}

#[test]
fn available_index_beyond_the_queue_breaks_the_device() {
    let mut share = share();
    share.bench.queues[1].set_available_index(1025);
    share.bench.kick(1);
    assert!(share.bench.fault.is_reported());
}

#[test]
fn device_is_served_again_after_a_reset() {
    let mut share = share();
    share.init();
    assert!(share.lookup("hello").is_ok());
    let Share { bench, directory, mut device, asker, _alone } = share;
    bench.reset();
    let bench = Bench::activate(&mut device, &ram());
    let mut share = Share { bench, directory, device, asker, _alone };
    share.init();
    assert!(share.lookup("hello").is_ok());
}

/// The guest's kernel has checked whether a process may, which can have `CAP_DAC_OVERRIDE`.
#[test]
fn directory_of_another_user_takes_what_the_guest_allows() {
    // As the file server's thread, which there is no way back from.
    let served = std::thread::spawn(|| {
        crate::privileges::become_file_server().unwrap();
        make_in_directory_of_another_user();
    });
    served.join().unwrap();
}

fn make_in_directory_of_another_user() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let mut share = share();
    // Groups come with the requests: FUSE_INIT_EXT, FUSE_CREATE_SUPP_GROUP.
    let mut body = Vec::new();
    for field in [7_u32, 38, 1 << 20, 1 << 30, 1 << (34 - 32)].into_iter().chain([0; 11]) {
        body.extend(field.to_le_bytes());
    }
    assert_eq!(share.call(INIT, 0, &body, 80).0, 0);
    let directory = share.directory.path().join("theirs");
    std::fs::create_dir(&directory).unwrap();
    chown(&directory, Some(1000), Some(1001)).expect("run the tests as root");
    let node = share.lookup("theirs").unwrap();
    let make = |share: &mut Share, (name, mode): (&str, u32), asker: (u32, u32)| {
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(mode)).unwrap();
        let mut body = 0o700_u32.to_le_bytes().to_vec();
        body.extend(0_u32.to_le_bytes());
        body.extend(format!("{name}\0").as_bytes());
        share.asker = asker;
        let (error, entry) = share.call(MKDIR, node, &body, 256);
        assert_eq!(error, 0, "{name}");
        assert_eq!(rustix::process::geteuid().as_raw(), 0, "the server is itself again");
        let made = std::fs::metadata(directory.join(name)).unwrap();
        // `uid` and `gid` of the reply's attributes (linux/fuse.h, `fuse_entry_out`).
        let told = [108, 112].map(|at| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()));
        assert_eq!(told, [made.uid(), made.gid()], "{name}");
        (made.uid(), made.gid())
    };
    assert_eq!(make(&mut share, ("open", 0o777), (70, 71)), (70, 71));
    assert_eq!(make(&mut share, ("shut", 0o755), (70, 71)), (70, 71));
    // A directory's group can be that of all that is in it.
    assert_eq!(make(&mut share, ("group's", 0o2755), (70, 71)), (70, 1001));
    // As whoever runs a package manager has them, who is no root of the host's.
    assert_eq!(make(&mut share, ("read-only", 0o555), (1000, 1001)), (1000, 1001));
    assert_eq!(make(&mut share, ("root's", 0o555), (0, 0)), (0, 0));
}
