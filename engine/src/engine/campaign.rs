//! Campaigns: messages that share their content, which is stored, hashed and canonicalised once.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::inject::{Accepted, InjectError, Waiting, received};
use super::{Engine, Shared};
use crate::accept::SharedContent;
use crate::accept::smtp_data::clean_content;
use crate::config::LineEndings;
use crate::limits::{CAMPAIGN_MESSAGES_UNANSWERED_MAX, CAMPAIGNS_MAX};
use crate::mail::dsn::DsnRequest;
use crate::runtime::random::os_random_u64;

/// Content that many messages share, for as long as more of them are to come. Cheap to clone.
///
/// Content is spooled once, with the first message, and lives there until the last message has its outcome, also over
/// restarts; a campaign without messages leaves nothing behind. The handle belongs to the engine that made it. After
/// that one's end it takes no message, and what it has taken goes on with the next start.
///
/// All messages of a campaign have one home shard, and campaigns take turns at the shards.
///
/// ```no_run
/// # async fn send(engine: &postrider::Engine) -> Result<(), postrider::InjectError> {
/// use postrider::CampaignMessage;
///
/// let content = "From: news@acme.example\r\nSubject: News\r\nMIME-Version: 1.0\r\n\
///                Content-Type: text/plain; charset=utf-8\r\n\r\nHello, here are the news.\r\n";
/// let campaign = engine.campaign(content)?;
/// let messages = ["ada@shop.test", "bob@shop.test"].map(|to| CampaignMessage {
///     reverse_path: format!("bounce+{}@acme.example", to.replace('@', "=")),
///     recipients: vec![to.to_owned()],
///     header: format!("To: {to}\r\nList-Unsubscribe: <https://acme.example/u/{to}>\r\n").into_bytes(),
///     ..CampaignMessage::default()
/// });
/// for accepted in campaign.inject_all(messages).await {
///     println!("{} is durable", accepted?.id);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Campaign {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<Shared>,
    content: Arc<SharedContent>,
    shard: usize,
}

/// A message of a [`Campaign`]: all that it has of its own.
#[derive(Debug, Clone, Default)]
pub struct CampaignMessage {
    /// Empty: the null reverse path.
    pub reverse_path: String,
    pub recipients: Vec<String>,
    /// Header fields, a line ending behind each, and nothing else. They go above those of the shared content.
    pub header: Vec<u8>,
    /// As in [`super::Message`].
    pub dsn: DsnRequest,
    /// As in [`super::Message`].
    pub meta: Vec<(String, String)>,
}

impl Engine {
    /// Makes a campaign of content: header fields that all its messages have in common, an empty line, a body. Content
    /// that begins with the empty line has no such fields. Bare CR and LF become CRLF.
    ///
    /// Fails where the header has a line that is no field, where the content is too large, and where there are as many
    /// campaigns as there may be, 10,000.
    pub fn campaign(&self, content: impl AsRef<[u8]>) -> Result<Campaign, InjectError> {
        let engine = &self.shared;
        let content = clean_content(content.as_ref(), LineEndings::Fix, engine.message_bytes_max())?;
        let id = engine.next_campaign.fetch_add(1, Ordering::Relaxed);
        let content = Arc::new(engine.policy().share(id, content)?);
        if engine.campaigns.fetch_add(1, Ordering::Relaxed) >= CAMPAIGNS_MAX {
            engine.campaigns.fetch_sub(1, Ordering::Relaxed);
            return Err(InjectError::Refused("452 4.3.1 There are too many campaigns, drop one".to_owned()));
        }
        let shard = engine.next_shard.fetch_add(1, Ordering::Relaxed) % engine.shards.len();
        Ok(Campaign { inner: Arc::new(Inner { engine: Arc::clone(engine), content, shard }) })
    }
}

impl Campaign {
    /// Hands a message over, like [`Engine::inject`]: when this returns `Ok`, the message is durable, shared content
    /// included, and will be delivered or reported. Many may be under way at once.
    pub async fn inject(&self, message: CampaignMessage) -> Result<Accepted, InjectError> {
        self.send(message).await?.answer().await
    }

    /// Hands messages over without waiting for one before the next; tells what became of each, in their order. Whoever
    /// drops the future leaves open what became of those that were under way; the event log tells.
    pub async fn inject_all(
        &self,
        messages: impl IntoIterator<Item = CampaignMessage>,
    ) -> Vec<Result<Accepted, InjectError>> {
        let messages = messages.into_iter();
        let mut answers = Vec::with_capacity(messages.size_hint().0);
        let mut unanswered: VecDeque<Result<Waiting, InjectError>> = VecDeque::new();
        for message in messages {
            if unanswered.len() >= CAMPAIGN_MESSAGES_UNANSWERED_MAX
                && let Some(oldest) = unanswered.pop_front()
            {
                answers.push(answer(oldest).await);
            }
            unanswered.push_back(self.send(message).await);
        }
        for waiting in unanswered {
            answers.push(answer(waiting).await);
        }
        answers
    }

    /// Policy and signatures are the caller's thread's work.
    async fn send(&self, message: CampaignMessage) -> Result<Waiting, InjectError> {
        let Inner { engine, content, shard } = &*self.inner;
        let now = engine.clock.now();
        let CampaignMessage { reverse_path, recipients, header, dsn, meta } = message;
        let message = super::Message { reverse_path, recipients, content: header, dsn, meta };
        let own_bytes_max = engine.message_bytes_max().saturating_sub(content.octets().len() as u64);
        let received = received(message, own_bytes_max)?;
        let random = [os_random_u64(), os_random_u64()];
        let mut admitted = engine.policy().admit_sharing(now, received, content, random)?;
        admitted.sign(now)?;
        engine.send(*shard, admitted).await
    }
}

async fn answer(waiting: Result<Waiting, InjectError>) -> Result<Accepted, InjectError> {
    waiting?.answer().await
}

impl Drop for Inner {
    /// The shard sees that nobody owns the content any more, and lets go of the body.
    fn drop(&mut self) {
        self.engine.campaigns.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Campaign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Campaign of {:?} at shard {}", self.inner.content, self.inner.shard)
    }
}
