//! A body that messages share is in the spool for as long as one of them is, or one more may come.

use super::*;
use crate::accept::{Received, SharedContent};
use crate::shard::ConnectError;

const BODY_BYTES: u64 = 40_000;

impl World {
    fn share(&self, id: u64) -> Arc<SharedContent> {
        let mut content = b"From: a@client.example\r\n\r\n".to_vec();
        content.resize(BODY_BYTES as usize - 2, b'x');
        content.extend_from_slice(b"\r\n");
        Arc::new(self.shard.policy.share(id, content).unwrap())
    }

    /// On its way to the shard.
    fn send(&mut self, shared: &Arc<SharedContent>) {
        let recipients = vec!["b@peer.example".to_owned()];
        let received =
            Received::embedded("a@client.example".to_owned(), recipients, b"To: b@peer.example\r\n".to_vec());
        let admitted = self.shard.policy.admit_sharing(self.now, received, shared, [1, 2]).unwrap();
        self.shard.handle_message(ShardMessage::Inject { injection: 1, admitted: Box::new(admitted) });
    }

    /// Time goes by, and nobody is there to connect to.
    fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds {
            for (connection, _) in std::mem::take(&mut self.connects) {
                let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
                self.shard.connect_failed(self.now, connection, &refused);
            }
            self.pass(Duration::from_secs(1));
        }
    }

    /// What counts in the log, in whole bodies.
    fn bodies(&self) -> u64 {
        self.shard.logs[0].log.statistics().live_bytes / BODY_BYTES
    }
}

fn world() -> World {
    let mut config = Config::new("mta.example");
    config.retry.max_age = Duration::from_secs(60);
    World::open(TempDir::new().unwrap(), START, config)
}

#[test]
fn a_body_goes_with_the_last_message_and_its_handle() {
    let mut world = world();
    let (one, other, unused) = (world.share(1), world.share(2), world.share(3));
    world.sync();
    assert_eq!(world.bodies(), 0, "content without a message is not spooled");
    world.send(&one);
    world.send(&other);
    world.send(&other);
    world.sync();
    assert_eq!(world.bodies(), 2);
    drop(other);
    world.wait(2);
    assert_eq!(world.bodies(), 2, "its messages live");
    // All expire; the handle of one is still there.
    world.wait(62);
    assert_eq!((world.shard.home.len(), world.bodies()), (0, 1));
    world.send(&one);
    world.sync();
    assert_eq!((world.shard.home.len(), world.bodies()), (1, 1), "the same body serves");
    drop((one, unused));
    world.wait(62);
    assert_eq!(world.shard.logs[0].log.statistics().live_bytes, 0);
}

/// The handle is dropped while its message is on the way.
#[test]
fn a_message_on_its_way_keeps_the_body() {
    let mut world = world();
    let shared = world.share(1);
    world.send(&shared);
    world.sync();
    world.wait(62);
    assert_eq!((world.shard.home.len(), world.bodies()), (0, 1));
    world.send(&shared);
    drop(shared);
    world.wait(2);
    assert_eq!((world.shard.home.len(), world.bodies()), (1, 1));
}

/// The commit that had the body failed: the next message brings it again.
#[test]
fn a_body_that_went_with_a_failed_commit_is_brought_again() {
    use postrider_spool::sim::{Faults, SimDisk};
    let disk = SimDisk::new(1);
    let options = SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() };
    let spool = Spool::open_on(Arc::new(disk.clone()), std::path::Path::new("/spool"), options).unwrap();
    let mut world = World::open_spool(TempDir::new().unwrap(), spool, START, Config::new("mta.example"), &[]);
    world.sync();
    let shared = world.share(1);
    world.send(&shared);
    world.settle();
    disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
    world.sync();
    disk.set_faults(Faults::default());
    assert_eq!((world.shard.home.len(), world.bodies()), (0, 0), "it was refused");
    world.pass(Duration::from_secs(10));
    world.send(&shared);
    world.sync();
    assert_eq!((world.shard.home.len(), world.bodies()), (1, 1));
}
