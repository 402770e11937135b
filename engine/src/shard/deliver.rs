//! Stages 4 and 5 at a shard that owns pairs: the pools' orders, carried out by SMTP clients.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{Action, Shard};
use crate::admin::answer_text;
use crate::config::{AutomationRule, Chunking, Shaping};
use crate::deliver::attempt::{Stage, Transaction, TransactionResult};
use crate::deliver::content::Chunk;
use crate::deliver::dane::HostDane;
use crate::deliver::smtp_client::{ClientEvent, ClientOptions, SmtpClient};
use crate::deliver::verdict::{self, Fate, HostAction, RecipientVerdict, Scope, SessionFailure};
use crate::handover::{
    Attempt, ControlMessage, DeliveryContext, HandshakeError, IntentKey, Settled, ShardMessage, TlsFailure,
    TlsPolicyKey, TlsRequirement,
};
use crate::limits::{QUIT_PATIENCE_STOPPING, SMALL_INPUT_BYTES, SOURCE_REFUSED_PAUSE};
use crate::mail::endpoint::Endpoint;
use crate::mail::time::Now;
use crate::pool::connection::ConnectionKey;
use crate::pool::pair::{Connect, HostFate};
use crate::pool::site::Reception;
use crate::pool::suspension::{self, Effect};

type Piece = postrider_spool::Piece;

/// A connection to a peer.
pub(super) struct Delivery {
    state: DeliveryState,
    pub(super) host_name: String,
    tls: TlsRequirement,
    /// What its session counts for, until it is counted.
    pub(super) policy: Option<TlsPolicyKey>,
    source: usize,
    /// As it was when the connection was begun.
    shaping: Arc<Shaping>,
    /// What the client works on, in its order, and since when.
    pub(super) attempts: VecDeque<(Duration, Box<Attempt>)>,
    /// What the client waits for before it ends the content of the first of them.
    pub(super) intent: Option<IntentKey>,
    context: Arc<DeliveryContext>,
}

impl Delivery {
    pub(super) fn automation(&self) -> &Arc<[Arc<AutomationRule>]> {
        &self.shaping.automation
    }
}

enum DeliveryState {
    Connecting {
        deadline: Duration,
    },
    Up(Box<SmtpClient<postrider_spool::Message>>),
    /// The driver closes it.
    Over,
}

/// What a connection was told when it was made.
#[derive(Debug, Clone, Copy)]
pub struct Connected {
    /// None over a Unix socket.
    pub local: Option<SocketAddr>,
    pub peer: Endpoint,
}

/// What a handshake agreed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsStarted {
    /// `TLSv1.3`.
    pub protocol: String,
    /// `TLS_AES_256_GCM_SHA384`.
    pub cipher: String,
    /// The parts of the certificate's subject name, as in `CN=mx.example.com`.
    pub peer_subject: Vec<String>,
}

/// Why a connection could not be made.
#[derive(Debug)]
pub enum ConnectError {
    /// The source's address isn't on this machine.
    Unplumbed,
    /// The process has no descriptor left, or the kernel no memory.
    NoSocket,
    /// All ports of the source's address are in use for this host.
    NoPort,
    Failed(std::io::Error),
}

impl Shard {
    /// The connection that [`Action::Connect`] asked for is made.
    pub fn connected(&mut self, now: Now, connection: ConnectionKey, made: Connected) {
        let Some(delivery) = self.deliveries.get_mut(&connection) else { return };
        if !matches!(delivery.state, DeliveryState::Connecting { .. }) {
            return;
        }
        self.inputs += 1;
        self.metrics.connections_out_made.inc();
        let context = Arc::make_mut(&mut delivery.context);
        context.peer_address = made.peer.to_string();
        context.source_address = made.local.map(|local| local.to_string()).unwrap_or_default();
        let terms = &self.pools.slot(connection).terms;
        let options = ClientOptions {
            ehlo: self.config.egress_sources[delivery.source].ehlo_domain.clone(),
            protocol: terms.protocol,
            auth: terms.auth.clone(),
            pipelining: delivery.shaping.pipelining,
            chunking: self.pools.chunking(now, connection),
            max_in_flight: terms.max_in_flight.unwrap_or(delivery.shaping.max_in_flight),
            in_doubt: delivery.shaping.in_doubt,
            eight_bit: delivery.shaping.eight_bit,
            tls: delivery.tls.mode(),
            timeouts: delivery.shaping.timeouts,
        };
        delivery.state = DeliveryState::Up(Box::new(SmtpClient::new(now, options)));
    }

    /// The connection that [`Action::Connect`] asked for can't be made.
    pub fn connect_failed(&mut self, now: Now, connection: ConnectionKey, error: &ConnectError) {
        let Some(delivery) = self.deliveries.get_mut(&connection) else { return };
        let DeliveryState::Connecting { deadline } = delivery.state else { return };
        delivery.state = DeliveryState::Over;
        let source = delivery.source;
        let failure = match error {
            ConnectError::Unplumbed if self.config.egress_sources[source].suspend_when_unplumbed => {
                self.pools.handle_closing(now, connection, HostFate::Fine);
                self.actions.push_back(Action::Control(ControlMessage::Unplumbed { source }));
                self.set_plumbed(now, source, false);
                // Whatever is left would connect again, and fail at once again.
                self.pools.call_back(|pair| pair.source == source);
                return self.connection_gone(now, connection);
            }
            ConnectError::NoSocket => {
                // Not the host's fault: the pair waits. Until the next sweep there are no more than there are now.
                self.sockets_left = self.sessions.len() + self.pools.connections() - 1;
                self.pools.out_of_sockets();
                self.pools.handle_closing(now, connection, HostFate::Fine);
                return self.connection_gone(now, connection);
            }
            ConnectError::Unplumbed => verdict::connect_failed("the source's address is not on this machine"),
            ConnectError::Failed(_) if deadline <= now.monotonic => {
                verdict::connect_timed_out(delivery.shaping.timeouts.connect)
            }
            ConnectError::NoPort => verdict::no_port(),
            ConnectError::Failed(error) => verdict::connect_failed(&error.to_string()),
        };
        self.close_delivery(now, connection, Some(failure));
        self.connection_gone(now, connection);
    }

    /// The peer sent something (in the clear, once TLS is up).
    pub fn connection_received(&mut self, now: Now, connection: ConnectionKey, input: &[u8]) {
        self.inputs += 1;
        let mut awaits_more = false;
        let has_said = self.with_client(now, connection, |client, out| {
            client.handle(now, input, out);
            awaits_more = client.awaits_replies();
        });
        if awaits_more && !has_said && input.len() < SMALL_INPUT_BYTES {
            self.actions.push_back(Action::ConnectionAcknowledge { connection });
        }
    }

    /// That many more octets of what was to be sent are with the kernel.
    pub fn connection_sent(&mut self, now: Now, connection: ConnectionKey, octets: usize) {
        self.with_client(now, connection, |client, out| client.handle_written(now, octets, out));
    }

    /// The handshake that [`Action::ConnectionStartTls`] asked for has ended.
    pub fn connection_tls(&mut self, now: Now, connection: ConnectionKey, result: Result<TlsStarted, HandshakeError>) {
        self.count_session(connection, result.as_ref().map(|_| ()).map_err(|error| error.failure));
        if let (Ok(started), Some(delivery)) = (&result, self.deliveries.get_mut(&connection)) {
            let context = Arc::make_mut(&mut delivery.context);
            context.tls_protocol.clone_from(&started.protocol);
            context.tls_verified_by = delivery.tls.proof_of_handshake().verified_by();
            context.tls_cipher.clone_from(&started.cipher);
            context.tls_peer_subject.clone_from(&started.peer_subject);
            self.pools.handle_encrypted(connection);
        }
        self.with_client(now, connection, |client, out| match &result {
            Ok(_) => client.handle_tls_started(now, out),
            Err(error) => client.handle_tls_failed(&error.text),
        });
    }

    /// The connection ended: the peer closed it, it was reset, or a write failed.
    pub fn connection_closed(&mut self, now: Now, connection: ConnectionKey, reason: &str) {
        self.with_client(now, connection, |client, _| client.handle_closed(reason));
    }

    /// The peer has closed too; the connection no longer counts.
    pub fn connection_gone(&mut self, now: Now, connection: ConnectionKey) {
        if let Some(delivery) = self.deliveries.remove(&connection) {
            assert!(delivery.attempts.is_empty(), "every attempt was settled before its connection closed");
            self.pools.handle_gone(now, &mut |below| self.random.u64(0..below), connection);
            self.metrics.connections_out.set(self.pools.connections() as u64);
        }
    }

    pub(super) fn time_out_deliveries(&mut self, now: Now) {
        let late = |(&key, delivery): (&ConnectionKey, &Delivery)| {
            let deadline = match &delivery.state {
                DeliveryState::Connecting { deadline } => Some(*deadline),
                DeliveryState::Up(client) => client.next_timeout(),
                DeliveryState::Over => None,
            };
            deadline.is_some_and(|deadline| deadline <= now.monotonic).then_some(key)
        };
        let mut late: Vec<ConnectionKey> = self.deliveries.iter().filter_map(late).collect();
        late.sort_unstable();
        for connection in late {
            let connecting = matches!(self.deliveries[&connection].state, DeliveryState::Connecting { .. });
            if connecting {
                self.actions.push_back(Action::ConnectionAbort { connection });
            } else {
                self.with_client(now, connection, |client, _| client.handle_timeout(now));
                // What hangs in the socket would hold the slot for as long as the peer likes.
                self.actions.push_back(Action::ConnectionAbort { connection });
            }
        }
    }

    pub(super) fn open_delivery(&mut self, now: Now, connect: Connect) {
        let Connect { connection, source, host_name, to, tls, policy, shaping } = connect;
        let deadline = now.monotonic + shaping.timeouts.connect;
        let context = Arc::new(DeliveryContext {
            peer_name: host_name.clone(),
            session_id: self.random.u64(..),
            ..DeliveryContext::default()
        });
        let state = DeliveryState::Connecting { deadline };
        let attempts = VecDeque::new();
        let policy = (tls != TlsRequirement::Disabled).then_some(policy);
        let delivery = Delivery { state, host_name, tls, policy, source, shaping, attempts, intent: None, context };
        self.deliveries.insert(connection, delivery);
        self.metrics.connections_out.set(self.pools.connections() as u64);
        self.actions.push_back(Action::Connect { connection, source, to });
    }

    pub(super) fn start(&mut self, now: Now, connection: ConnectionKey, attempt: Box<Attempt>) {
        let delivery = self.deliveries.get_mut(&connection).expect("an idle connection is up");
        let slot = self.pools.slot(connection);
        assert_eq!(*slot.site, *attempt.route.site.name, "a transaction stays with its site");
        assert!(attempt.route.is_met_by(&slot.host_name, &slot.proof), "a transaction has the TLS that it requires");
        assert_eq!(delivery.source, attempt.pair.source, "a message leaves from a source of its own pool");
        let transaction = transaction(&attempt);
        delivery.attempts.push_back((now.monotonic, attempt));
        self.with_client(now, connection, |client, out| client.start(now, transaction, out));
    }

    pub(super) fn is_up(&self, connection: ConnectionKey) -> bool {
        self.deliveries.get(&connection).is_some_and(|delivery| matches!(delivery.state, DeliveryState::Up(_)))
    }

    pub(super) fn quit(&mut self, now: Now, connection: ConnectionKey) {
        let stopping = self.stopping;
        self.with_client(now, connection, |client, out| {
            client.quit(now, out);
            if stopping {
                client.bound_quit(now.monotonic + QUIT_PATIENCE_STOPPING);
            }
        });
    }

    /// A client should wait for the answer to QUIT (RFC 5321 §4.1.1.10), but a stop does not for peers that are silent.
    pub(super) fn bound_quits(&mut self, now: Now) {
        for delivery in self.deliveries.values_mut() {
            if let DeliveryState::Up(client) = &mut delivery.state {
                client.bound_quit(now.monotonic + QUIT_PATIENCE_STOPPING);
            }
        }
    }

    /// Lets a connection's client act, sends what it wants sent, and handles its events.
    /// True: something was said to the peer.
    pub(super) fn with_client(
        &mut self,
        now: Now,
        connection: ConnectionKey,
        act: impl FnOnce(&mut SmtpClient<postrider_spool::Message>, &mut Vec<Chunk<Piece>>),
    ) -> bool {
        let Some(delivery) = self.deliveries.get_mut(&connection) else { return false };
        let DeliveryState::Up(client) = &mut delivery.state else { return false };
        if let Some((_, attempt)) = delivery.attempts.front() {
            self.progress.begin_work(attempt.message.id());
        }
        let mut chunks = Vec::new();
        client.set_chunking(self.pools.chunking(now, connection));
        act(client, &mut chunks);
        while client.can_ride()
            && let Some(attempt) = self.pools.take_riding(now, connection)
        {
            assert_eq!(delivery.source, attempt.pair.source, "a message leaves from a source of its own pool");
            let slot = self.pools.slot(connection);
            assert!(
                attempt.route.is_met_by(&slot.host_name, &slot.proof),
                "a transaction has the TLS that it requires"
            );
            client.ride(transaction(&attempt), &mut chunks);
            delivery.attempts.push_back((now.monotonic, attempt));
        }
        while let Some(ticket) = client.poll_mail() {
            let begun = delivery.attempts.iter_mut().map(|(_, attempt)| attempt);
            let mut begun = begun.filter(|attempt| !attempt.is_counted && u64::from(attempt.ticket.entry.0) == ticket);
            let attempt = begun.next().expect("MAIL is written for what was given");
            self.pools.mail_written(now, connection, attempt);
        }
        self.progress.add_sent(client.take_sent());
        let first = client.poll_event();
        let rest: Vec<ClientEvent> = std::iter::from_fn(|| client.poll_event()).collect();
        let has_said = !chunks.is_empty();
        if has_said {
            let mut lost = delivery.attempts.iter().filter(|(_, attempt)| !attempt.message.is_intact());
            self.actions.push_back(match lost.next() {
                None => Action::ConnectionSend { connection, chunks },
                // What was just read of it may be no part of it.
                Some((_, attempt)) => {
                    let (id, peer) = (attempt.message.id(), &delivery.context.peer_name);
                    tracing::error!(%id, peer, "the disk does not give the message back; its connection is cut off");
                    Action::ConnectionAbort { connection }
                }
            });
        }
        for event in first.into_iter().chain(rest) {
            self.handle_client_event(now, connection, event);
        }
        self.progress.end_work();
        has_said
    }

    fn handle_client_event(&mut self, now: Now, connection: ConnectionKey, event: ClientEvent) {
        match event {
            ClientEvent::Idle => {
                // Without a handshake so far there is none.
                self.count_session(connection, Err(TlsFailure::StartTlsNotSupported));
                if self.pools.slot(connection).deliveries == 0
                    && let DeliveryState::Up(client) = &self.deliveries[&connection].state
                    && let Some(max) = client.extensions().mails_max
                {
                    self.pools.bound_deliveries(connection, max);
                }
                self.pools.handle_idle(now, &mut |below| self.random.u64(0..below), connection);
            }
            ClientEvent::StartTls => {
                let delivery = &self.deliveries[&connection];
                let (host_name, tls) = (delivery.host_name.clone(), delivery.tls.clone());
                self.actions.push_back(Action::ConnectionStartTls { connection, host_name, tls });
            }
            ClientEvent::Intend { ticket, recipients } => self.ask_for_intent(connection, ticket, recipients),
            ClientEvent::Finished(result) => self.finish_attempt(now, connection, result),
            ClientEvent::Closed { failure } => {
                self.close_delivery(now, connection, failure);
                self.actions.push_back(Action::ConnectionClose { connection });
            }
        }
    }

    /// A client is done with the oldest of its transactions: its home is told, and who looks at answers.
    fn finish_attempt(&mut self, now: Now, connection: ConnectionKey, mut result: TransactionResult) {
        let delivery = self.deliveries.get_mut(&connection).expect("its client just spoke");
        let (began, mut attempt) = delivery.attempts.pop_front().expect("a client finishes what it was given");
        if attempt.is_counted {
            let took = now.monotonic.saturating_sub(began);
            self.metrics.delivery_duration_s.observe(took.as_secs_f64());
        }
        assert_eq!(u64::from(attempt.ticket.entry.0), result.ticket, "in the order in which it was given");
        delivery.intent = None;
        if !attempt.is_counted {
            self.pools.mail_not_written(now, &mut attempt);
        }
        if let Some(irregularity) = result.irregularity {
            let (id, peer) = (attempt.message.id(), &delivery.host_name);
            if irregularity.is_confusion() {
                tracing::error!(%id, peer, "{irregularity}");
            } else {
                tracing::warn!(%id, peer, "{irregularity}");
            }
            self.distrust(connection, irregularity.leaves());
        }
        let context = Arc::clone(&self.deliveries[&connection].context);
        for (_, verdict) in &mut result.results {
            if let Fate::BounceIfLastHost(need) = verdict.fate {
                verdict.elsewhere(self.pools.lacks(now, connection, &attempt, need));
            }
        }
        let has = |is_meant: fn(&RecipientVerdict) -> bool| result.results.iter().any(|(_, it)| is_meant(it));
        if has(|verdict| verdict.fate == Fate::Delivered) {
            self.pools.host_said(now, connection, Reception::Taken);
        } else if has(|verdict| verdict.rule == verdict::HOST_UNWELL) {
            self.pools.host_said(now, connection, Reception::Unwell);
        } else if attempt.is_retry && has(|verdict| matches!(verdict.fate, Fate::Retry(_))) {
            self.pools.host_said(now, connection, Reception::RetryPutOff);
        }
        self.react_to_result(now, &attempt, &mut result);
        let home = attempt.ticket.home;
        self.tell(home, ShardMessage::Settled(Box::new(Settled { attempt, result, context })));
    }

    /// All owners of the site's pairs are told, this shard among them.
    fn distrust(&mut self, connection: ConnectionKey, leaves: Chunking) {
        let site = Arc::clone(&self.pools.slot(connection).site);
        for shard in 0..self.pools.homes() {
            self.tell(shard, ShardMessage::Distrust { site: Arc::clone(&site), leaves });
        }
    }

    /// A session has come to this; the first word counts.
    fn count_session(&mut self, connection: ConnectionKey, result: Result<(), TlsFailure>) {
        let delivery = self.deliveries.get_mut(&connection);
        if let Some(policy) = delivery.and_then(|delivery| delivery.policy.take()) {
            self.tls_report.count(policy, result);
        }
    }

    /// No session was made, because nobody knows what TLSA records a host has.
    pub(super) fn count_unknown_tlsa(&mut self, attempt: &Attempt) {
        let hosts = attempt.route.site.hosts.iter();
        let unknown = hosts.map(|host| &host.dane).position(|dane| matches!(dane, HostDane::Unknown(_)));
        if let Some(host) = unknown.filter(|_| attempt.route.dane) {
            let policy = attempt.route.tls_policy(host, &attempt.domain);
            self.tls_report.count(policy, Err(TlsFailure::DnssecInvalid));
        }
    }

    fn close_delivery(&mut self, now: Now, connection: ConnectionKey, failure: Option<SessionFailure>) {
        if failure.as_ref().is_some_and(|failure| failure.stage == Stage::StartTls) {
            self.count_session(connection, Err(TlsFailure::StartTlsNotSupported));
        }
        if let Some(delivery) = self.deliveries.get_mut(&connection) {
            delivery.state = DeliveryState::Over;
        }
        if let Some(failure) = &failure {
            if let Some(place) = failure.session_rule() {
                self.metrics.session_failures[place].inc();
            }
            self.react_to_failure(now, connection, failure);
        }
        if let Some(failure) = failure.as_ref().filter(|failure| failure.scope == Scope::Source) {
            let pair = self.pools.pair_of(connection).clone();
            let answer = answer_text(failure.answer.code, failure.answer.enhanced, &failure.answer.text);
            let reason = format!("the peer refuses this address in its greeting: {answer}");
            let scope = suspension::Scope::pair(&pair);
            self.announce_suspension(now, scope, Effect::Stop, &reason, SOURCE_REFUSED_PAUSE);
        }
        let fate = match failure {
            None => HostFate::Fine,
            Some(SessionFailure { action: HostAction::RetryInClear, .. }) => HostFate::RetryInClear,
            Some(SessionFailure { action, stage, answer, .. }) => {
                let slot = self.pools.slot(connection);
                let answer = answer_text(answer.code, answer.enhanced, &answer.text);
                let reason = format!("{} ({}): {stage}: {answer}", slot.host_name, slot.address);
                tracing::debug!("{reason}");
                let reason = Arc::from(reason);
                match action {
                    HostAction::BackOffTls => HostFate::BackOffTls { reason },
                    HostAction::Pause => HostFate::Pause { reason },
                    _ => HostFate::BackOff { reason },
                }
            }
        };
        self.pools.handle_closing(now, connection, fate);
    }
}

/// What the client needs of an attempt.
fn transaction(attempt: &Attempt) -> Transaction<postrider_spool::Message> {
    Transaction {
        ticket: u64::from(attempt.ticket.entry.0),
        reverse_path: Arc::clone(&attempt.reverse_path),
        recipients: Arc::clone(&attempt.recipients),
        size: attempt.message.size(),
        eight_bit: attempt.eight_bit,
        smtputf8: attempt.smtputf8,
        dot_lines: attempt.dot_lines,
        dsn: attempt.dsn.clone(),
        content: attempt.message.clone(),
    }
}
