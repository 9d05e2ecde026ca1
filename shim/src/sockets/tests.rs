use std::{
    cell::Cell,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

use proptest::prelude::*;
use vial_agent_protocol::SOCKET_REACHED;

use super::{connector::Connector, *};

/// As many different ones as are asked for.
fn identities(count: usize) -> Vec<Identity> {
    let volume = tempfile::tempdir().unwrap();
    let listeners: Vec<UnixListener> = (0..count)
        .map(|n| UnixListener::bind(volume.path().join(n.to_string())).unwrap())
        .collect();
    let base = rustix::fs::open(volume.path(), OFlags::PATH, Mode::empty()).unwrap();
    let found = search(&base, None);
    assert_eq!(found.sockets.len(), listeners.len());
    found.sockets.into_values().collect()
}

proptest! {
    /// After each look the guest knows what there is, up to the bound, and by numbers that
    /// were never used.
    #[test]
    fn guest_is_told_of_what_there_is(
        looks in prop::collection::vec(prop::collection::btree_map(0u32..6, 0usize..3, 0..6), 1..8),
        most in 0usize..6,
    ) {
        let identities = identities(3);
        let next = Cell::new(1);
        let draw = || next.replace(next.get() + 1);
        let mut told = BTreeMap::new();
        let mut guest: BTreeMap<u64, Place> = BTreeMap::new();
        for look in looks {
            let found: BTreeMap<Place, Identity> = look
                .iter()
                .map(|(name, kind)| ((0, name.to_string().into()), identities[*kind]))
                .collect();
            let left = most - told.len();
            let difference = advance(&mut told, &[0], &found, left, draw);
            for number in difference.removed {
                prop_assert!(guest.remove(&number).is_some());
            }
            for (place, identity, number) in difference.added {
                prop_assert_eq!(found[&place], identity);
                // One that is there for the same path is replaced.
                guest.retain(|_, known| *known != place);
                prop_assert!(guest.insert(number, place.clone()).is_none());
                told.get_mut(&place).unwrap().taken = true;
            }
            prop_assert!(told.len() <= most);
            prop_assert!(told.len() == found.len().min(most) || told.len() == most);
            let known: BTreeMap<u64, Place> =
                told.iter().map(|(place, told)| (told.number, place.clone())).collect();
            prop_assert_eq!(&known, &guest);
            for (place, told) in &told {
                prop_assert_eq!(told.identity, found[place]);
            }
        }
    }
}

#[test]
fn socket_that_the_guest_does_not_take_is_told_a_few_times() {
    let identity = identities(1)[0];
    let found = BTreeMap::from([((0, "s".into()), identity)]);
    let mut told = BTreeMap::new();
    for _ in 0..MOST_TRIES {
        assert_eq!(advance(&mut told, &[0], &found, 1, draw_number).added.len(), 1);
        told.values_mut().for_each(|told| told.failures += 1);
    }
    assert!(advance(&mut told, &[0], &found, 1, draw_number).added.is_empty());
    // Of another volume nothing is known.
    assert!(advance(&mut told, &[1], &BTreeMap::new(), 1, draw_number).removed.is_empty());
    assert_eq!(advance(&mut told, &[0], &BTreeMap::new(), 1, draw_number).removed.len(), 1);
}

/// How long something may take that is due at once.
const SOON: Duration = Duration::from_secs(10);

/// A container with a volume in which there is one socket of the host's, and its number. It has a
/// connector already.
async fn with_one_socket(volume: &Path) -> (Sockets, u64) {
    let (stream, _) = tokio::net::UnixStream::pair().unwrap();
    let dir = StateDir::new(volume, "test", "pod").unwrap();
    let sockets = Sockets::new(Agent::unmet(stream), dir, None);
    let base = rustix::fs::open(volume, OFlags::PATH, Mode::empty()).unwrap();
    let identity = search(&base, None).sockets.into_values().next().unwrap();
    let spec: Spec = serde_json::from_str("{}").unwrap();
    let (gone, ends) = watch::channel(());
    let caller = Caller::new(&spec, "test", ends);
    caller.use_connector(Connector::of_this_process()).await;
    let volume = Volume { index: 0, base: Arc::new(base), is_directory: true };
    let told = Told { identity, number: draw_number(), taken: true, failures: 0 };
    let followed = Followed {
        volumes: vec![volume],
        told: BTreeMap::from([((0, "s".into()), told)]),
        caller: Arc::new(caller),
        _gone: gone,
    };
    lock(&sockets.common.containers).insert("test".into(), followed);
    (sockets, told.number)
}

/// What the guest has of a connection that the shim has taken.
fn connect(sockets: &Sockets) -> UnixStream {
    let (guest, shim) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(SOON)).unwrap();
    sockets.take(shim.into());
    guest
}

/// Names a socket, and tells whether it was reached.
async fn reaches(mut guest: UnixStream, number: u64) -> Option<UnixStream> {
    tokio::task::spawn_blocking(move || {
        // What is refused may be closed by then.
        let _ = guest.write_all(&number.to_le_bytes());
        let mut answer = [0];
        match guest.read(&mut answer) {
            Ok(1) => {
                assert_eq!(answer[0], SOCKET_REACHED);
                Some(guest)
            }
            Ok(_) => None,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                None
            }
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn connections_beyond_the_bound_are_refused_until_one_ends() {
    let volume = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(volume.path().join("s")).unwrap();
    // Each is held as long as its client holds it.
    std::thread::spawn(move || {
        while let Ok((mut held, _)) = listener.accept() {
            std::thread::spawn(move || held.read(&mut [0]));
        }
    });
    let (sockets, number) = with_one_socket(volume.path()).await;
    // One that has named none yet counts as well.
    let unnamed = connect(&sockets);
    let mut guests = Vec::new();
    for _ in 1..MAX_SOCKET_CONNECTIONS {
        guests.push(reaches(connect(&sockets), number).await.expect("one within the bound"));
    }
    for _ in 0..3 {
        assert!(reaches(connect(&sockets), number).await.is_none(), "one beyond the bound");
    }
    let first = reaches(unnamed, number).await.expect("the first of all");
    drop(guests.pop());
    // Its end goes through the shim first.
    let start = Instant::now();
    let again = loop {
        match reaches(connect(&sockets), number).await {
            Some(again) => break again,
            None => assert!(start.elapsed() < SOON, "no room after one has ended"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(reaches(connect(&sockets), number).await.is_none(), "two took the place of one");
    drop((first, again, guests));
}

#[tokio::test]
async fn connection_that_names_no_socket_is_ended() {
    let volume = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(volume.path().join("s")).unwrap();
    let (sockets, number) = with_one_socket(volume.path()).await;
    assert!(reaches(connect(&sockets), number ^ 1).await.is_none(), "a number that is none");
    let room = || sockets.common.room.available_permits();
    assert_eq!(room(), MAX_SOCKET_CONNECTIONS);
    let mut silent = connect(&sockets);
    assert_eq!(room(), MAX_SOCKET_CONNECTIONS - 1);
    silent.set_read_timeout(Some(2 * carry::PATIENCE)).unwrap();
    let start = Instant::now();
    let read = tokio::task::spawn_blocking(move || silent.read(&mut [0])).await.unwrap();
    assert_eq!(read.unwrap(), 0);
    assert!(start.elapsed() >= carry::PATIENCE, "after {:?} only", start.elapsed());
    while room() < MAX_SOCKET_CONNECTIONS {
        assert!(start.elapsed() < 2 * carry::PATIENCE, "its place is not free");
        tokio::task::yield_now().await;
    }
}
