//! What a shard tells once a second of how it stands: gauges, and whether its spool takes mail.

use postrider_spool::Statistics;

use super::Shard;
use crate::mail::time::Now;

impl Shard {
    pub(super) fn update_gauges(&mut self, now: Now) {
        let scheduled = self.home.scheduled_recipients();
        self.metrics.scheduled.set(scheduled);
        if self.id == 0 {
            self.metrics.suspensions.set(self.suspensions.len() as u64);
        }
        self.metrics.ready.set(self.home.recipients() - scheduled);
        let statistics: Vec<Statistics> = self.logs.iter().map(|home| home.log.statistics()).collect();
        let sum = |field: fn(&Statistics) -> u64| statistics.iter().map(field).sum::<u64>();
        self.metrics.messages.set(sum(|log| log.live_messages));
        self.metrics.spool_used_bytes.set(sum(|log| log.used_bytes));
        self.metrics.spool_segments.set(sum(|log| log.segments_in_use));
        let written = sum(|log| log.bytes_written);
        self.metrics.spool_commit_bytes.add(written.saturating_sub(self.metrics.spool_commit_bytes.get()));
        let closed = self.logs.first().and_then(|home| home.takes_mail(now).err());
        // What may wait for room is taken.
        let closed = closed.filter(|&closed| !self.may_wait(now, closed, 0));
        self.metrics.spool_broken.set(u64::from(self.logs.iter().all(|home| home.is_broken(now))));
        if closed != self.closed {
            match closed {
                Some(reason) => tracing::warn!(shard = self.id, "the spool takes no mail: {reason}"),
                None => tracing::info!(shard = self.id, "the spool takes mail again"),
            }
            self.closed = closed;
            self.metrics.set_spool_closed(closed.map(|closed| closed.to_string()));
        }
    }
}
