//! Operations on a real ring: the same results as by plain I/O.

#![cfg_attr(feature = "uring", expect(clippy::unwrap_used, reason = "a test stops at the first surprise"))]
#![cfg(feature = "uring")]

use std::time::Duration;

use postrider_spool::{
    Envelope, Fetch, Log, Progress, Recipient, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions,
    execute_on_ring,
};

const SEGMENT_BYTES: u64 = 1 << 20;

fn options() -> SpoolOptions {
    SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() }
}

fn recover(path: &std::path::Path, visit: &mut dyn FnMut(Recovered<'_>)) -> (Spool, Log) {
    let mut spool = Spool::open(path, options()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let log = Log::recover(
        directory,
        RecoverOptions { seed: 5, event_cursor: Sequence(0), ..RecoverOptions::default() },
        visit,
    )
    .unwrap();
    (spool, log)
}

/// Runs what there is to do, all of it at once, until nothing is left.
async fn settle(log: &mut Log, now: Duration) -> Vec<Progress> {
    let mut progress = Vec::new();
    loop {
        let mut running = Vec::new();
        while let Some(operation) = log.poll_operation(now, &mut ()) {
            running.push(tokio_uring::spawn(execute_on_ring(operation)));
        }
        if running.is_empty() {
            return progress;
        }
        for task in running {
            progress.push(log.handle_completion(now, task.await.unwrap()));
        }
    }
}

fn envelope() -> Envelope {
    let recipients = vec![Recipient { address: "b@example.net".into() }];
    Envelope { reverse_path: "a@example.com".into(), recipients, ..Envelope::default() }
}

#[test]
fn appends_are_durable_and_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let ids: Vec<_> = tokio_uring::start(async {
        let (_spool, mut log) = recover(directory.path(), &mut |_| {});
        let mut ids = Vec::new();
        // Enough for several segments, so that files are created and zeroed on the way.
        for round in 0..60_u64 {
            let body = vec![round as u8; 40_000];
            let (id, commit) = log.append_message(&envelope(), b"P: x\r\n", &body).unwrap();
            assert!(log.durable() < commit);
            settle(&mut log, Duration::from_millis(round * 20)).await;
            assert_eq!(log.durable(), commit);
            ids.push(id);
            let Ok(Fetch::Ready(message)) = log.message(id) else { panic!("{id} is not in the map") };
            assert_eq!(message.body(), body);
            assert_eq!(message.envelope().unwrap().reverse_path, "a@example.com");
        }
        assert!(log.statistics().segments_in_use > 2);
        assert!(!log.has_operations());
        ids
    });
    tokio_uring::start(async {
        let mut found = Vec::new();
        let (_spool, mut log) = recover(directory.path(), &mut |recovered| {
            if let Recovered::Message { id, .. } = recovered {
                found.push(id);
            }
        });
        assert_eq!(found, ids);
        for (round, id) in ids.iter().enumerate() {
            let Ok(Fetch::Read(operation)) = log.message(*id) else { panic!("{id} is not on disk") };
            let completion = execute_on_ring(operation).await;
            let Progress::Read { result, .. } = log.handle_completion(Duration::ZERO, completion) else { panic!() };
            let message = result.unwrap();
            assert_eq!(message.prefix(), b"P: x\r\n");
            assert_eq!(message.body_piece().as_ref(), vec![round as u8; 40_000]);
        }
    });
}
