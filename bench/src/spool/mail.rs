//! The messages and outcomes that the spool is given: made once, with the fields that the engine fills in, so that a
//! record costs the bench little more than the call.

use anyhow::{Result, ensure};
use postrider_spool::record::Answer;
use postrider_spool::{Envelope, Fate, MessageId, Outcome, Recipient, RecipientResult};

use crate::message::plain_body;

/// What an attempt meant for a message's only recipient. Its number is an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turnout {
    Delivered,
    Deferred,
}

/// All messages have the same length, and so do all outcomes of a kind.
#[derive(Debug, Clone)]
pub(super) struct Mail {
    envelopes: Vec<Envelope>,
    drawn: usize,
    prefix: Vec<u8>,
    body: Vec<u8>,
    delivered: Outcome,
    deferred: Outcome,
}

impl Mail {
    /// Messages of so many octets, the trace field and the signature in front of them included.
    pub(super) fn new(message_bytes: usize) -> Result<Self> {
        let prefix = prefix();
        let least = prefix.len() + 2;
        ensure!(message_bytes >= least, "a message has at least {least} octets, its signature included");
        let body = plain_body(message_bytes - prefix.len(), false);
        let delivered = outcome(message_bytes, Fate::Delivered, 250, (2, 0, 0), QUEUED_AS);
        let later = Fate::Deferred { due_ms: CREATED_MS + 1_200_000 };
        let deferred = outcome(message_bytes, later, 451, (4, 7, 1), "4.7.1 Greylisted, please try again in 5 minutes");
        Ok(Self { envelopes: (0..ENVELOPES).map(envelope).collect(), drawn: 0, prefix, body, delivered, deferred })
    }

    /// Octets of a message as it is sent.
    pub(super) fn message_bytes(&self) -> u64 {
        (self.prefix.len() + self.body.len()) as u64
    }

    /// The next message: envelope, prefix, body.
    pub(super) fn draw(&mut self) -> (&Envelope, &[u8], &[u8]) {
        self.drawn = (self.drawn + 1) % self.envelopes.len();
        (&self.envelopes[self.drawn], &self.prefix, &self.body)
    }

    pub(super) fn outcome(&mut self, id: MessageId, turnout: Turnout) -> &Outcome {
        let outcome = match turnout {
            Turnout::Delivered => {
                name_queue_id(&mut self.delivered.results[0].answer.text, id.to_raw());
                &mut self.delivered
            }
            Turnout::Deferred => &mut self.deferred,
        };
        outcome.message = id.to_raw();
        outcome
    }
}

/// Peers give each message another name.
fn name_queue_id(text: &mut String, number: u64) {
    text.truncate(QUEUED_AS.len());
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    text.extend((0..15).map(|place| char::from(b'A' + (mixed >> (4 * place) & 15) as u8)));
}

fn envelope(number: u64) -> Envelope {
    Envelope {
        reverse_path: "bounces+4711@news.sender.test".into(),
        recipients: vec![Recipient { address: format!("recipient.{number:06}@example.test") }],
        tenant: "acme".into(),
        campaign: "spring-2026".into(),
        egress_pool: "default".into(),
        priority: 1,
        created_ms: CREATED_MS + number,
        first_attempt_ms: CREATED_MS + number,
        expires_ms: CREATED_MS + number + 432_000_000,
        reception_protocol: "ESMTP".into(),
        client_address: "192.0.2.17:40123".into(),
        client_name: "app1.sender.test".into(),
        session_id: 0x5bd1_e995_0000 + number,
        ..Envelope::default()
    }
}

fn outcome(message_bytes: usize, fate: Fate, code: u16, enhanced: (u8, u16, u16), text: &str) -> Outcome {
    let result = RecipientResult {
        index: 0,
        recipient: "recipient.000000@example.test".into(),
        queue: "spring-2026:acme@example.test".into(),
        fate,
        attempts: 1,
        answer: Answer { code, enhanced: Some(enhanced), text: text.into(), command: String::new() },
    };
    Outcome {
        message: 0,
        at_ms: CREATED_MS + 250,
        results: vec![result],
        reverse_path: "bounces+4711@news.sender.test".into(),
        tenant: "acme".into(),
        campaign: "spring-2026".into(),
        egress_pool: "default".into(),
        created_ms: CREATED_MS,
        size: message_bytes as u64,
        reception_protocol: "ESMTP".into(),
        site: "mx1.example.test".into(),
        peer_name: "mx1.example.test".into(),
        peer_address: "198.51.100.25:25".into(),
        egress_source: "ip-a".into(),
        source_address: "192.0.2.11".into(),
        delivery_protocol: "ESMTPS".into(),
        tls_protocol: "TLSv1.3".into(),
        tls_cipher: "TLS13_AES_256_GCM_SHA384".into(),
        session_id: 0x5bd1_e995_0000,
        ..Outcome::default()
    }
}

/// A trace field and a signature with a key of 2,048 bits.
fn prefix() -> Vec<u8> {
    let mut prefix = String::from(
        "DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d=sender.test; s=rsa; t=1764000000;\r\n \
         h=From:Reply-To:Subject:Date:To:Cc:Message-ID:MIME-Version:Content-Type:List-Unsubscribe:\r\n \
         List-Unsubscribe-Post:Feedback-ID; bh=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=;\r\n b=",
    );
    // 256 octets are 344 in Base64.
    for line in 0..5 {
        prefix.push_str(&"Zx9Q".repeat(if line == 4 { 14 } else { 18 }));
        prefix.push_str(if line == 4 { "\r\n" } else { "\r\n  " });
    }
    prefix.push_str(
        "Received: from app1.sender.test ([192.0.2.17]) by engine.postbench.test with ESMTP\r\n \
         id 000000000000002a; Sun, 22 Nov 2026 10:00:00 +0000\r\n",
    );
    prefix.into_bytes()
}

const QUEUED_AS: &str = "2.0.0 Ok: queued as ";
/// 2025-11-24T16:00:00Z.
const CREATED_MS: u64 = 1_764_000_000_000;
const ENVELOPES: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_the_size_asked_for() {
        let mut mail = Mail::new(2048).unwrap();
        assert_eq!(mail.message_bytes(), 2048);
        let (_, prefix, body) = mail.draw();
        assert_eq!(prefix.len() + body.len(), 2048);
        assert!(prefix.split(|octet| *octet == b'\n').all(|line| line.len() < 100));
        assert!(Mail::new(100).is_err());
    }
}
