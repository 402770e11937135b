//! Messages that the embedder hands over, one by one.

use std::fmt;
use std::sync::atomic::Ordering;

use postrider_spool::record::MessageId;
use tokio::sync::oneshot;

use super::{Engine, Shared};
use crate::accept::smtp_data::clean_content;
use crate::accept::{Admitted, Received, Refusal};
use crate::config::{LineEndings, SmtpListener};
use crate::handover::AcceptAnswer;
use crate::limits::{CAPTURED_FIELDS_MAX, INJECT_PATIENCE, ROUTING_NAME_BYTES_MAX};
use crate::mail::address::Address;
use crate::mail::dsn::{self, BadDsn, DsnRequest};
use crate::runtime::mailbox::Full;
use crate::runtime::random::os_random_u64;
use crate::runtime::shard_loop::Mail;

/// A message for [`Engine::inject`].
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// Empty: the null reverse path.
    pub reverse_path: String,
    pub recipients: Vec<String>,
    /// RFC 5322: header, empty line, body. Bare CR and LF become CRLF.
    pub content: Vec<u8>,
    /// What is passed on to peers that offer DSN. Nobody else is told: this engine makes no notifications yet.
    pub dsn: DsnRequest,
    /// Names and values that stand in the message's events as `[events] meta` says: at most 64, each name once, of 1
    /// to 255 octets; of a value the first 1,024 octets are kept.
    pub meta: Vec<(String, String)>,
}

/// A message that the engine has taken over: it is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    pub id: MessageId,
}

/// Why a message wasn't taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InjectError {
    /// An address or the content is unacceptable, or the engine takes nothing now: the text of an SMTP reply.
    Refused(String),
    /// The engine is ending.
    Ended,
}

impl InjectError {
    /// Whether the same message may be taken later: by this engine, or by the next where this one ends.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Refused(reply) => reply.starts_with('4'),
            Self::Ended => true,
        }
    }
}

impl fmt::Display for InjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reply) => f.write_str(reply),
            Self::Ended => f.write_str("the engine is shutting down"),
        }
    }
}

impl std::error::Error for InjectError {}

impl From<Refusal> for InjectError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.to_string())
    }
}

impl Engine {
    /// Hands a message over. When this returns `Ok`, the message is durable and will be delivered or reported.
    ///
    /// The caller's thread applies policy and signs. Runs on any executor.
    pub async fn inject(&self, message: Message) -> Result<Accepted, InjectError> {
        let now = self.shared.clock.now();
        let received = received(message, self.shared.message_bytes_max())?;
        let mut admitted = self.shared.policy().admit(now, received, [os_random_u64(), os_random_u64()])?;
        admitted.sign(now)?;
        let shard = self.shared.next_shard.fetch_add(1, Ordering::Relaxed) % self.shared.shards.len();
        self.shared.send(shard, admitted).await?.answer().await
    }
}

impl Shared {
    /// Waits while the shard has more to do than its mailbox holds; others run on the caller's executor meanwhile.
    pub(super) async fn send(&self, shard: usize, admitted: Admitted) -> Result<Waiting, InjectError> {
        let (reply, answer) = oneshot::channel();
        let mut mail = Mail::Inject { admitted: Box::new(admitted), reply };
        let mut give_up = None;
        while let Err(Full(back)) = self.shards[shard].send(mail) {
            if self.shards[shard].is_closed() {
                return Err(InjectError::Ended);
            }
            let now = self.clock.now().monotonic;
            if now >= *give_up.get_or_insert(now + INJECT_PATIENCE) {
                return Err(InjectError::Refused("452 4.3.1 The shard's mailbox is full, try again".to_owned()));
            }
            mail = back;
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
        Ok(Waiting(answer))
    }

    /// The largest that a listener takes is what an embedder may inject.
    pub(super) fn message_bytes_max(&self) -> u64 {
        let config = self.config();
        let listeners = config.smtp_listeners.iter().map(|listener| listener.max_message_bytes);
        listeners.max().unwrap_or_else(|| SmtpListener::default().max_message_bytes)
    }
}

/// A message that a shard has been sent.
pub(super) struct Waiting(oneshot::Receiver<AcceptAnswer>);

impl Waiting {
    pub(super) async fn answer(self) -> Result<Accepted, InjectError> {
        match self.0.await {
            Ok(Ok(id)) => Ok(Accepted { id }),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(InjectError::Ended),
        }
    }
}

pub(super) fn received(message: Message, bytes_max: u64) -> Result<Received, InjectError> {
    let address = |text: &str| {
        let parsed =
            Address::parse(text).map_err(|error| InjectError::Refused(format!("553 5.1.3 <{text}>: {error}")))?;
        Ok::<_, InjectError>(parsed.to_string())
    };
    let reverse_path = if message.reverse_path.is_empty() { String::new() } else { address(&message.reverse_path)? };
    let mut recipients = Vec::with_capacity(message.recipients.len());
    let mut places = Vec::with_capacity(message.recipients.len());
    for recipient in &message.recipients {
        let recipient = address(recipient)?;
        let known = recipients.iter().position(|known| *known == recipient);
        places.push(known.unwrap_or(recipients.len()) as u32);
        if known.is_none() {
            recipients.push(recipient);
        }
    }
    if message.dsn.recipients.len() > places.len() {
        return Err(InjectError::Refused("501 5.5.4 DSN requests for more recipients than there are".to_owned()));
    }
    let dsn = dsn::parameters(&message.dsn, |place| places[place])
        .map_err(|BadDsn(why)| InjectError::Refused(format!("501 5.5.4 {why}")))?;
    if message.meta.len() > CAPTURED_FIELDS_MAX {
        return Err(InjectError::Refused(format!("501 5.5.4 meta: more than {CAPTURED_FIELDS_MAX} names")));
    }
    for (number, (name, _)) in message.meta.iter().enumerate() {
        let is_name = (1..=ROUTING_NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control);
        if !is_name || message.meta[..number].iter().any(|(other, _)| other == name) {
            return Err(InjectError::Refused(format!("501 5.5.4 meta: {name:?} is no name, or is there twice")));
        }
    }
    if recipients.is_empty() {
        return Err(InjectError::Refused("554 5.5.1 No valid recipients".to_owned()));
    }
    let content = clean_content(&message.content, LineEndings::Fix, bytes_max)?;
    Ok(Received { dsn, meta: message.meta, ..Received::embedded(reverse_path, recipients, content) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_4xx_and_an_end_may_pass() {
        let refused = |reply: &str| InjectError::Refused(reply.to_owned()).is_temporary();
        assert!(refused("452 4.3.1 The shard's mailbox is full, try again"));
        assert!(!refused("553 5.1.3 <a>: the address has no domain"));
        assert!(InjectError::Ended.is_temporary());
    }
}
