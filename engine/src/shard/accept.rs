//! Stage 1 at a shard: client sessions, and messages on their way to the spool.

use std::collections::hash_map;
use std::sync::Arc;
use std::time::Duration;

use ahash::HashMap;
use postrider_spool::AppendError;

use super::home_log::{AnswerTo, Appended, NoMail, Uncommitted};
use super::unplaced::refusal_of;
use super::{Action, SessionKey, Shard};
use crate::accept::Refusal;
use crate::accept::smtp_server::ServerEvent;
use crate::accept::{Admitted, Policy, Received, SessionOptions, SmtpServer};
use crate::config::SmtpListener;
use crate::handover::{AcceptAnswer, ShardMessage};
use crate::limits::{
    LIMIT_KEEPER, RECEIVING_SMALL_BYTES, RSA_SIGNATURES_PER_TURN, SESSION_CLOSE_MAX, SESSIONS_MAX, SIGNING_QUEUE_MAX,
    SMALL_INPUT_BYTES,
};
use crate::mail::time::Now;

/// A client's session.
#[derive(Debug)]
pub(super) struct Session {
    server: SmtpServer,
    /// What was in force when its transaction began.
    policy: Arc<Policy>,
    /// Input that the server didn't take yet, because it waits for an answer.
    pending: Vec<u8>,
    /// Once it is to be closed: until when what waits to be sent may take its time.
    closing: Option<Duration>,
    /// Memory of the content that it is receiving, as it was counted last.
    content_bytes: u64,
}

/// An admitted message whose signatures wait for their turn.
#[derive(Debug)]
pub(super) struct Signing {
    admitted: Box<Admitted>,
    answer_to: AnswerTo,
}

/// Admitted messages of tenants whose injection is limited, which wait for the limits' keeper.
#[derive(Debug, Default)]
pub(super) struct Asking {
    waiting: HashMap<u64, (Box<Admitted>, AnswerTo)>,
    asked: u64,
}

impl Shard {
    /// A client connected. `None`: the shard has all the sessions it may have; the caller answers 421 and closes.
    pub fn open_session(
        &mut self,
        now: Now,
        listener: &SmtpListener,
        client: std::net::SocketAddr,
    ) -> Option<SessionKey> {
        if self.sessions.len() >= self.sessions_max() || self.stopping {
            self.metrics.connections_in_denied.inc();
            return None;
        }
        self.next_session = self.next_session.wrapping_add(1);
        let key = SessionKey(self.next_session);
        let options = SessionOptions::new(Arc::from(&*self.config.hostname), listener, client);
        let mut greeting = Vec::new();
        let server = SmtpServer::new(now, options, key.0, &mut greeting);
        let policy = Arc::clone(&self.policy);
        self.sessions.insert(key, Session { server, policy, pending: Vec::new(), closing: None, content_bytes: 0 });
        self.metrics.connections_in_accepted.inc();
        self.metrics.connections_in.set(self.sessions.len() as u64);
        self.actions.push_back(Action::SessionSend { session: key, bytes: greeting });
        Some(key)
    }

    /// Three in four sockets: mail that came in must also get out.
    fn sessions_max(&self) -> usize {
        (self.sockets_max / 4 * 3).min(SESSIONS_MAX)
    }

    /// A client sent something.
    pub fn session_received(&mut self, now: Now, key: SessionKey, input: &[u8]) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let said = self.actions.len();
        if session.pending.is_empty() {
            let taken = self.serve_session(now, key, input);
            if let Some(session) = self.sessions.get_mut(&key) {
                session.pending.extend_from_slice(&input[taken..]);
            }
        } else {
            session.pending.extend_from_slice(input);
            self.serve_pending(now, key);
        }
        if self.actions.len() == said
            && input.len() < SMALL_INPUT_BYTES
            && let Some(session) = self.sessions.get(&key)
            && session.closing.is_none()
            && !session.server.is_waiting()
            && (session.server.is_amid_content() || !session.pending.is_empty())
        {
            self.actions.push_back(Action::SessionAcknowledge { session: key });
        }
    }

    /// The handshake that [`Action::SessionStartTls`] asked for is done.
    pub fn session_tls_started(&mut self, now: Now, key: SessionKey) {
        if let Some(session) = self.sessions.get_mut(&key) {
            session.pending.clear();
            session.server.handle_tls_started(now);
        }
    }

    /// The client is gone. A message of its that waits for its commit is accepted all the same.
    pub fn session_closed(&mut self, key: SessionKey) {
        if let Some(session) = self.sessions.remove(&key) {
            self.receiving_bytes -= session.content_bytes;
        }
        self.metrics.connections_in.set(self.sessions.len() as u64);
    }

    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Whether the session takes input now; one that waits for an answer doesn't.
    pub fn session_wants_input(&self, key: SessionKey) -> bool {
        self.sessions.get(&key).is_some_and(|session| !session.server.is_waiting() && session.closing.is_none())
    }

    /// No message is taken while the event log can't be written and its records pile up.
    pub fn set_events_blocked(&mut self, blocked: bool) {
        self.events_blocked = blocked;
    }

    /// No attempt is begun while so many records wait for the event log that no more should be held in memory.
    pub fn set_events_full(&mut self, full: bool) {
        self.events_full = full;
    }

    /// Signs what waits for it, within a turn's bound: sixty ready RSA signatures would delay everything by 15 ms.
    pub(super) fn sign_waiting(&mut self, now: Now) {
        let mut rsa = 0;
        while rsa < RSA_SIGNATURES_PER_TURN {
            let Some(signing) = self.signing.pop_front() else { return };
            self.held_bytes -= signing.admitted.size();
            rsa += signing.admitted.rsa_signatures().max(1);
            self.sign(now, signing.admitted, signing.answer_to);
        }
    }

    fn sign(&mut self, now: Now, mut admitted: Box<Admitted>, answer_to: AnswerTo) {
        self.metrics.signatures_rsa.add(admitted.rsa_signatures() as u64);
        self.metrics.signatures_ed25519.add(admitted.ed25519_signatures() as u64);
        match admitted.sign(now) {
            Ok(()) => self.append(now, admitted, answer_to),
            Err(refusal) => self.answer_sender(now, answer_to, Err(refusal)),
        }
    }

    pub(super) fn inject(&mut self, now: Now, injection: u64, admitted: Admitted) {
        match self.admission(now) {
            Ok(()) => self.take(now, Box::new(admitted), AnswerTo::Injection(injection)),
            Err(refusal) => self.answer_sender(now, AnswerTo::Injection(injection), Err(refusal)),
        }
    }

    /// Tells a message's sender what became of it. That a success is durable is the caller's proof: only
    /// [`Shard::spool_completed`] makes the `Spooled` whose id is answered.
    pub(super) fn answer_sender(&mut self, now: Now, to: AnswerTo, answer: AcceptAnswer) {
        match (&answer, to) {
            (Ok(_), AnswerTo::Session(_)) => self.metrics.received_smtp.inc(),
            (Ok(_), AnswerTo::Injection(_)) => self.metrics.received_embedded.inc(),
            (Err(_), _) => {}
        }
        match to {
            AnswerTo::Injection(injection) => self.actions.push_back(Action::Injected { injection, answer }),
            AnswerTo::Session(key) => {
                let Some(session) = self.sessions.get_mut(&key) else { return };
                let mut out = Vec::with_capacity(REPLY_BYTES_TYPICAL);
                let took = session.server.handle_answer(now, answer, &mut out);
                self.metrics.transaction_duration_s.observe(took.as_secs_f64());
                self.actions.push_back(Action::SessionSend { session: key, bytes: out });
                self.serve_pending(now, key);
                self.actions.push_back(Action::SessionResume { session: key });
            }
        }
    }

    pub(super) fn time_out_sessions(&mut self, now: Now) {
        let late = |(key, session): (&SessionKey, &mut Session)| {
            let deadline = session.closing.unwrap_or_else(|| session.server.next_timeout());
            (deadline <= now.monotonic).then_some(*key)
        };
        let mut late: Vec<SessionKey> = self.sessions.iter_mut().filter_map(late).collect();
        late.sort_unstable();
        for key in late {
            let Some(session) = self.sessions.get_mut(&key) else { continue };
            if session.closing.is_some() {
                // A client that reads nothing would keep its socket, and its place among the sessions, for ever.
                self.actions.push_back(Action::SessionAbort { session: key });
                continue;
            }
            let mut out = Vec::new();
            session.server.handle_timeout(now, &mut out);
            self.close_session(now, key, out);
        }
    }

    pub(super) fn stop_sessions(&mut self, now: Now) {
        let mut keys: Vec<SessionKey> = self.sessions.keys().copied().collect();
        keys.sort_unstable();
        for key in keys {
            let Some(session) = self.sessions.get_mut(&key) else { continue };
            let mut out = Vec::new();
            if session.server.handle_shutdown(now, &mut out) {
                self.close_session(now, key, out);
            } else if !out.is_empty() {
                self.actions.push_back(Action::SessionSend { session: key, bytes: out });
            }
        }
    }

    fn close_session(&mut self, now: Now, key: SessionKey, out: Vec<u8>) {
        if let hash_map::Entry::Occupied(mut session) = self.sessions.entry(key) {
            session.get_mut().closing = Some(now.monotonic + SESSION_CLOSE_MAX);
            self.metrics.rejections.add(session.get_mut().server.take_refused().into());
            self.actions.push_back(Action::SessionSend { session: key, bytes: out });
            self.actions.push_back(Action::SessionClose { session: key });
        }
    }

    fn serve_pending(&mut self, now: Now, key: SessionKey) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let mut pending = std::mem::take(&mut session.pending);
        let taken = self.serve_session(now, key, &pending);
        if let Some(session) = self.sessions.get_mut(&key) {
            pending.drain(..taken);
            pending.append(&mut session.pending);
            session.pending = pending;
        }
    }

    /// Gives input to the session's server for as long as it takes any; tells how much it took.
    fn serve_session(&mut self, now: Now, key: SessionKey, input: &[u8]) -> usize {
        let mut taken = 0;
        loop {
            let Some(session) = self.sessions.get_mut(&key) else { return taken };
            if session.closing.is_some() {
                return input.len();
            }
            if !session.server.is_in_transaction() && !Arc::ptr_eq(&session.policy, &self.policy) {
                session.policy = Arc::clone(&self.policy);
            }
            let mut out = Vec::new();
            let handled = session.server.handle(now, &input[taken..], &mut out);
            taken += handled.consumed;
            let others = self.receiving_bytes - session.content_bytes;
            let own = session.server.content_bytes();
            if others + self.held_bytes + own > self.memory.receiving_bytes && own > RECEIVING_SMALL_BYTES {
                session.server.give_up_content();
            }
            session.content_bytes = session.server.content_bytes();
            self.receiving_bytes = others + session.content_bytes;
            let refused = session.server.take_refused();
            if refused > 0 {
                self.metrics.rejections.add(refused.into());
            }
            if !out.is_empty() {
                self.actions.push_back(Action::SessionSend { session: key, bytes: out });
            }
            match handled.event {
                Some(ServerEvent::Message(received)) => self.admit(now, *received, key),
                Some(ServerEvent::StartTls) => {
                    // Octets behind STARTTLS end the session (RFC 3207 §4.2): the server sees to it at the next look.
                    self.actions.push_back(Action::SessionStartTls { session: key });
                    if taken == input.len() {
                        return taken;
                    }
                }
                Some(ServerEvent::Close) => {
                    self.close_session(now, key, Vec::new());
                    return input.len();
                }
                None if handled.consumed == 0 => return taken,
                None => {}
            }
        }
    }

    /// Whether a message may be taken at all now.
    fn admission(&self, now: Now) -> Result<(), Refusal> {
        if let Err(closed) = self.logs[0].takes_mail(now)
            && !self.may_wait(now, closed, 0)
        {
            return Err(closed.refusal());
        }
        if self.events_blocked {
            return Err(Refusal::new(452, (4, 3, 1), "Event log can not be written now"));
        }
        if self.stopping {
            return Err(Refusal::new(451, (4, 3, 2), "System is shutting down"));
        }
        Ok(())
    }

    fn admit(&mut self, now: Now, received: Received, key: SessionKey) {
        let answer_to = AnswerTo::Session(key);
        let random = [self.random.u64(..), self.random.u64(..)];
        let policy = self.sessions.get(&key).map_or(&self.policy, |session| &session.policy);
        let admitted = self.admission(now).and_then(|()| policy.admit(now, received, random));
        match admitted {
            Err(refusal) => self.answer_sender(now, answer_to, Err(refusal)),
            Ok(admitted) => self.take(now, Box::new(admitted), answer_to),
        }
    }

    /// A tenant whose injection is limited has to ask first. Exactly one shard counts, so the answer takes a moment.
    fn take(&mut self, now: Now, admitted: Box<Admitted>, answer_to: AnswerTo) {
        let tenant = &admitted.envelope.tenant;
        let Some(rate) = self.shared_limits.injection(tenant) else {
            return self.take_permitted(now, admitted, answer_to);
        };
        let recipients = admitted.envelope.recipients.len() as u32;
        if recipients > rate.count {
            // RFC 3463 §3.6, X.5.3.
            let text = format!("Tenant {tenant} may inject {} recipients at most; divide the message", rate.count);
            return self.answer_sender(now, answer_to, Err(Refusal::new(554, (5, 5, 3), text)));
        }
        self.asking.asked += 1;
        let (home, number, tenant) = (self.id, self.asking.asked, Arc::from(tenant.as_str()));
        self.held_bytes += admitted.size();
        self.asking.waiting.insert(number, (admitted, answer_to));
        self.tell(LIMIT_KEEPER, ShardMessage::AskInjection { home, number, tenant, recipients });
    }

    /// What the keeper says to a message that asked.
    pub(super) fn may_inject(&mut self, now: Now, number: u64, may: bool) {
        let Some((admitted, answer_to)) = self.asking.waiting.remove(&number) else { return };
        self.held_bytes -= admitted.size();
        if may {
            return self.take_permitted(now, admitted, answer_to);
        }
        // RFC 3463 §3.8, X.7.0: a policy in force that no other code says better.
        let text = format!("Tenant {} injects more than it may; try again later", admitted.envelope.tenant);
        self.answer_sender(now, answer_to, Err(Refusal::new(450, (4, 7, 0), text)));
    }

    /// The keeper may be gone before it answers.
    pub(super) fn stop_asking(&mut self, now: Now) {
        let mut waiting: Vec<_> = self.asking.waiting.drain().collect();
        waiting.sort_unstable_by_key(|(number, _)| *number);
        for (_, (admitted, answer_to)) in waiting {
            self.held_bytes -= admitted.size();
            let refusal = Refusal::new(451, (4, 3, 2), "System is shutting down");
            self.answer_sender(now, answer_to, Err(refusal));
        }
    }

    fn take_permitted(&mut self, now: Now, admitted: Box<Admitted>, answer_to: AnswerTo) {
        if admitted.rsa_signatures() > 0 {
            if self.signing.len() < SIGNING_QUEUE_MAX {
                self.held_bytes += admitted.size();
                return self.signing.push_back(Signing { admitted, answer_to });
            }
            let refusal = Refusal::new(452, (4, 3, 1), "Too many messages wait to be signed, try again");
            return self.answer_sender(now, answer_to, Err(refusal));
        }
        self.sign(now, admitted, answer_to);
    }

    fn append(&mut self, now: Now, admitted: Box<Admitted>, answer_to: AnswerTo) {
        // Room that came meanwhile is for those that wait; too little for them, it may do for this one.
        self.place_waiting(now);
        match self.place(now, admitted, answer_to) {
            Ok(()) => {}
            Err((admitted, AppendError::Full(closed))) if self.may_wait(now, NoMail::Log(closed), admitted.size()) => {
                self.wait_for_room(now, admitted, answer_to);
            }
            Err((_, error)) => self.answer_sender(now, answer_to, Err(refusal_of(&error))),
        }
    }

    /// Gives the message to the log; back, with the reason, where that does not take it.
    pub(super) fn place(
        &mut self,
        now: Now,
        admitted: Box<Admitted>,
        answer_to: AnswerTo,
    ) -> Result<(), (Box<Admitted>, AppendError)> {
        let Admitted { envelope, prefix, content, shared, .. } = &*admitted;
        let appended = match shared {
            None => self.logs[0].log.append_message(envelope, prefix, content),
            Some(shared) => self.bodies.append_message(&mut self.logs[0].log, envelope, prefix, shared),
        };
        let (message, commit) = match appended {
            Ok(appended) => appended,
            Err(error) => return Err((admitted, error)),
        };
        let (size, Admitted { envelope, .. }) = (admitted.size(), *admitted);
        let active = &mut self.logs[0];
        active.appended_message(now);
        let appended = Appended { message, envelope: Box::new(envelope), size, answer_to };
        active.uncommitted.push_back((commit, Uncommitted::Message(appended)));
        Ok(())
    }
}

/// What a shard's sessions count from: another number after each start, since events name their sessions by it. Drawn
/// beside the shard's other numbers, so that a seed of the simulator goes on replaying what it did.
pub(super) fn first_session(seed: u64) -> u64 {
    fastrand::Rng::with_seed(!seed).u64(..)
}

/// One line.
const REPLY_BYTES_TYPICAL: usize = 64;
