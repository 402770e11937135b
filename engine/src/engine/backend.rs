//! What the engine answers who watches and operates it: the HTTP API's calls, which are [`super::Engine`]'s, too.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use postrider_spool::record::MessageId;
use tokio::sync::oneshot;

use super::Shared;
use super::reload::ReloadError;
use crate::admin::metrics::ShardMetrics;
use crate::admin::{
    Backend, Chosen, EventsStatus, Inspected, LimitsRow, MailChoice, MessageFilter, MessageRow, QueueReport, QueueRow,
    Reloaded, Reply, SpoolStatus, Status, SuspensionEnd, SuspensionRow, TlsReportRow, Unavailable, WallTime,
};
use crate::config::{Durability, LimitSettings};
use crate::handover::{Ask, Told};
use crate::limits::{HEARTBEAT_PATIENCE, SUSPENSION_MAX, SUSPENSION_REASON_OCTETS_MAX, WRITE_PATIENCE};
use crate::pool::suspension::{Effect, Scope, Suspension};
use crate::runtime::control::{Command, SuspensionAnswer, SuspensionCall};
use crate::runtime::random::os_random_u64;
use crate::runtime::suspension_list::{id_text, parse_id};

impl Backend for Shared {
    fn queues(&self, limit: usize) -> Reply<'_, QueueReport> {
        Box::pin(async move {
            let mut report = QueueReport { total: 0, queues: Vec::new() };
            for told in self.ask(Ask::Queues { limit }).await? {
                if let Told::Queues { total, rows, .. } = told {
                    report.total += total;
                    for row in rows {
                        merge(&mut report.queues, row);
                    }
                }
            }
            report.queues.truncate(limit);
            Ok(report)
        })
    }

    fn tls_report(&self) -> Reply<'_, Vec<TlsReportRow>> {
        Box::pin(async move {
            let mut all: Vec<TlsReportRow> = Vec::new();
            for told in self.ask(Ask::TlsReport).await? {
                let Told::TlsReport(rows) = told else { continue };
                all.extend(rows);
            }
            all.sort();
            all.dedup_by(|row, kept| {
                let of =
                    |row: &TlsReportRow| (row.policy_type, row.policy_domain.clone(), row.recipient_domain.clone());
                let same = of(row) == of(kept);
                if same {
                    kept.successful_sessions += row.successful_sessions;
                    for (name, count) in &row.failed_sessions {
                        *kept.failed_sessions.entry(name).or_default() += count;
                    }
                }
                same
            });
            Ok(all)
        })
    }

    fn messages(&self, filter: MessageFilter) -> Reply<'_, Vec<MessageRow>> {
        Box::pin(async move {
            let limit = filter.limit;
            let (mut rows, mut unread) = (Vec::new(), 0);
            for told in self.ask(Ask::Messages { filter }).await? {
                match told {
                    Told::Messages(mut more) => rows.append(&mut more),
                    Told::MessagesUnread(left) => unread += left,
                    _ => {}
                }
            }
            // Without them nobody could say that there is none.
            if unread > 0 && rows.len() < limit {
                return Err(Unavailable(format!(
                    "{unread} more messages would have to be read from the disk, which takes too long for an answer; \
                     ask for one by its id, or for fewer"
                )));
            }
            rows.sort_by(|a, b| (&a.id, &a.recipient).cmp(&(&b.id, &b.recipient)));
            rows.truncate(limit);
            Ok(rows)
        })
    }

    fn status(&self) -> Reply<'_, Status> {
        Box::pin(async move {
            let (mut recipients, mut messages) = (0, 0);
            for told in self.ask(Ask::Queues { limit: 0 }).await? {
                if let Told::Queues { total, messages: of_shard, .. } = told {
                    recipients += total;
                    messages += of_shard;
                }
            }
            let (now, config) = (self.clock.now(), self.config());
            let sum = |field: fn(&ShardMetrics) -> u64| self.metrics.sum(field);
            let closed = self.readiness().err();
            Ok(Status {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                hostname: config.hostname.clone(),
                node_id: self.node.clone(),
                started: WallTime(self.started_ms),
                uptime_s: now.wall_ms.saturating_sub(self.started_ms) / 1000,
                shards: self.shards.len() as u32,
                listeners: self.listeners.clone(),
                spool: SpoolStatus {
                    path: config.spool.path.display().to_string(),
                    durability: match config.spool.durability {
                        Durability::Fsync => "fsync".to_owned(),
                        Durability::None => "none".to_owned(),
                    },
                    used_bytes: sum(|metrics| metrics.spool_used_bytes.get()),
                    max_bytes: config.spool.max_size_bytes,
                    open: closed.is_none(),
                    closed_reason: closed,
                },
                events: EventsStatus {
                    path: config.events_path().display().to_string(),
                    blocked: self.events.blocked_reason(),
                },
                messages,
                recipients,
                connections_in: sum(|metrics| metrics.connections_in.get()),
                connections_out: sum(|metrics| metrics.connections_out.get()),
                received: sum(|metrics| {
                    metrics.received_smtp.get() + metrics.received_http.get() + metrics.received_embedded.get()
                }),
                delivered: sum(|metrics| metrics.delivered.get()),
                deferred: sum(|metrics| metrics.transient_failures.get()),
                failed: sum(|metrics| metrics.failures.get()),
            })
        })
    }

    fn suspensions(&self) -> Reply<'_, Vec<SuspensionRow>> {
        Box::pin(async move {
            let SuspensionAnswer::List(list) = self.ask_suspensions(SuspensionCall::List).await? else {
                return Ok(Vec::new());
            };
            let text = |part: Option<Arc<str>>| part.map(|part| part.to_string());
            let (now_ms, config) = (self.clock.now().wall_ms, self.config());
            let row = |suspension: Suspension| SuspensionRow {
                left: Duration::from_millis(suspension.until_ms.saturating_sub(now_ms)),
                id: id_text(suspension.id),
                egress_source: suspension.scope.source.map(|source| config.egress_sources[source].name.clone()),
                site: text(suspension.scope.rollup),
                tenant: text(suspension.scope.tenant),
                campaign: text(suspension.scope.campaign),
                domain: text(suspension.scope.domain),
                limits: match suspension.effect {
                    Effect::Stop => None,
                    Effect::Limit(limited) => Some(limits_row(limited.at(now_ms))),
                },
                reason: suspension.reason.to_string(),
                until: WallTime(suspension.until_ms),
            };
            let mut rows: Vec<SuspensionRow> = list.into_iter().map(row).collect();
            rows.sort_by(|a, b| (a.until.0, &a.id).cmp(&(b.until.0, &b.id)));
            Ok(rows)
        })
    }

    fn suspend(&self, suspension: SuspensionRow, end: SuspensionEnd) -> Reply<'_, Result<String, String>> {
        Box::pin(async move {
            let now_ms = self.clock.now().wall_ms;
            let until_ms = match end {
                SuspensionEnd::After(lasts) => now_ms.saturating_add(lasts.as_millis() as u64),
                SuspensionEnd::At(WallTime(until_ms)) => until_ms,
            };
            if until_ms <= now_ms || until_ms - now_ms > SUSPENSION_MAX.as_millis() as u64 {
                return Ok(Err("it has to end at a time from now on, at most a year ahead".to_owned()));
            }
            let source = match &suspension.egress_source {
                None => None,
                Some(name) => match self.config().source_named(name) {
                    Some(source) => Some(source),
                    None => return Ok(Err(format!("there is no egress source {name:?}"))),
                },
            };
            let part = |part: Option<String>| part.map(|part| Arc::from(&*part));
            let SuspensionRow { site, tenant, campaign, domain, mut reason, .. } = suspension;
            reason.truncate(reason.floor_char_boundary(SUSPENSION_REASON_OCTETS_MAX));
            let reason = reason.replace(|c: char| c.is_control(), " ");
            let (rollup, tenant, campaign, domain) = (part(site), part(tenant), part(campaign), part(domain));
            let scope = Scope { source, rollup, tenant, campaign, domain };
            let id = u128::from(os_random_u64()) << 64 | u128::from(os_random_u64());
            let suspension = Suspension { id, scope, effect: Effect::Stop, reason: Arc::from(&*reason), until_ms };
            match self.ask_suspensions(SuspensionCall::Add(suspension)).await? {
                SuspensionAnswer::Added(Some(id)) => Ok(Ok(id_text(id))),
                _ => Ok(Err("there are too many suspensions".to_owned())),
            }
        })
    }

    fn has_tenant(&self, name: &str) -> bool {
        self.config().tenants.iter().any(|tenant| tenant.name == name)
    }

    fn resume(&self, id: String) -> Reply<'_, bool> {
        Box::pin(async move {
            let Some(id) = parse_id(&id) else { return Ok(false) };
            let answer = self.ask_suspensions(SuspensionCall::Remove { id }).await?;
            Ok(matches!(answer, SuspensionAnswer::Removed(true)))
        })
    }

    fn inspect(&self, id: MessageId, want_body: bool) -> Reply<'_, Option<Inspected>> {
        Box::pin(async move {
            let told = self.ask(Ask::Inspect { id, want_body }).await?;
            Ok(told
                .into_iter()
                .find_map(|told| if let Told::Inspected(found) = told { found } else { None })
                .map(|it| *it))
        })
    }

    fn bounce(&self, choice: MailChoice, reason: String) -> Reply<'_, (String, Chosen)> {
        Box::pin(async move {
            let id = id_text(u128::from(os_random_u64()) << 64 | u128::from(os_random_u64()));
            tracing::warn!(%id, reason, "mail is bounced by the operator: {choice}");
            Ok((id, self.choose(Ask::Bounce { choice, reason: reason.into() }).await?))
        })
    }

    fn release(&self, choice: MailChoice, reason: String) -> Reply<'_, Chosen> {
        Box::pin(async move {
            tracing::warn!(reason, "mail that is held as in doubt is released by the operator: {choice}");
            self.choose(Ask::Release { choice, reason: reason.into() }).await
        })
    }

    fn reload(&self) -> Reply<'_, Result<Reloaded, ReloadError>> {
        Box::pin(async { Ok(self.reload_source().await) })
    }

    fn readiness(&self) -> Result<(), String> {
        if self.stopping.load(Ordering::Relaxed) || self.commands.is_closed() {
            return Err("the engine is shutting down".to_owned());
        }
        let closed = self.metrics.sum(|metrics| metrics.spool_closed.get());
        if closed > 0 {
            let reason = self.metrics.spool_closed_reason();
            let reason = reason.map_or(String::new(), |reason| format!(": {reason}"));
            return Err(format!("the spool takes no mail at {closed} of {} shards{reason}", self.shards.len()));
        }
        match self.events.blocked_reason() {
            Some(reason) => Err(format!("the event log can not be written: {reason}")),
            None => Ok(()),
        }
    }

    fn liveness(&self) -> Result<(), String> {
        if let Some(shard) = self.heartbeats.stuck(self.clock.now().monotonic, HEARTBEAT_PATIENCE) {
            return Err(format!("shard {shard} has taken no turn for {HEARTBEAT_PATIENCE:?}"));
        }
        // While one of them works, mail goes out that another start might not get to.
        match self.metrics.sum(|metrics| metrics.spool_broken.get()) == self.shards.len() as u64 {
            true => Err(format!("no log of the spool has taken a write for {WRITE_PATIENCE:?}")),
            false => Ok(()),
        }
    }
}

impl Shared {
    async fn ask(&self, ask: Ask) -> Result<Vec<Told>, Unavailable> {
        let (reply, answers) = oneshot::channel();
        let ended = || Unavailable("the engine is shutting down".to_owned());
        self.commands.send(Command::Ask { ask, reply }).map_err(|_| ended())?;
        answers.await.map_err(|_| ended())
    }

    async fn choose(&self, ask: Ask) -> Result<Chosen, Unavailable> {
        let mut all = Chosen::default();
        for told in self.ask(ask).await? {
            let Told::Chosen(chosen) = told else { continue };
            for (queue, recipients) in chosen.recipients {
                *all.recipients.entry(queue).or_default() += recipients;
            }
        }
        Ok(all)
    }

    async fn ask_suspensions(&self, call: SuspensionCall) -> Result<SuspensionAnswer, Unavailable> {
        let (reply, answer) = oneshot::channel();
        let ended = || Unavailable("the engine is shutting down".to_owned());
        self.commands.send(Command::Suspensions { call, reply }).map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }
}

fn limits_row(settings: LimitSettings) -> LimitsRow {
    LimitsRow {
        connection_limit: settings.connection_limit,
        max_deliveries_per_connection: settings.max_deliveries_per_connection,
        max_message_rate: settings.max_message_rate.map(|rate| rate.to_string()),
    }
}

/// A queue has entries at several homes: one row tells of all.
fn merge(rows: &mut Vec<QueueRow>, row: QueueRow) {
    let Some(known) = rows.iter_mut().find(|known| known.queue == row.queue) else {
        rows.push(row);
        return;
    };
    known.depth += row.depth;
    known.ready += row.ready;
    known.rate_per_s += row.rate_per_s;
    known.next_due = match (known.next_due, row.next_due) {
        (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
        (a, b) => a.or(b),
    };
    known.site = known.site.take().or(row.site);
    known.egress_source = known.egress_source.take().or(row.egress_source);
    known.last_answer = known.last_answer.take().or(row.last_answer);
}
