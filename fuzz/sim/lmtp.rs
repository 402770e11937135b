//! Runs in which one domain's hosts are spoken to in LMTP (RFC 2033), as if a route led there: they say to the content
//! what became of each recipient, and may leave before all is said.
//!
//! What is drawn here comes from a generator of its own.

use crate::checker::Delivered;
use crate::clock::MINUTE;
use crate::dns::Dns;
use crate::mix::Fault;
use crate::peer::{Around, Peer, Say};
use crate::random::Random;

/// The domain.
pub(crate) const BY_LMTP: &str = "d4.example";

/// Of every so manieth seed.
const EVERY: u64 = 3;

/// What peers draw, where the run has any that speak it.
pub(crate) fn draw(seed: u64, dns: &mut Dns) -> Option<Random> {
    let mut random = Random::new(seed.rotate_left(56));
    let speaks = random.one_in(EVERY);
    if speaks {
        dns.speak_lmtp(BY_LMTP);
    }
    speaks.then_some(random)
}

impl Around<'_> {
    /// RIGHT-ENVELOPE: mail for the domain goes by LMTP, and no other does.
    pub(crate) fn check_protocol(&self, recipient: &str, is_lmtp: bool) {
        let wants_lmtp = self.lmtp.is_some() && recipient.ends_with(&format!("@{BY_LMTP}"));
        assert_eq!(is_lmtp, wants_lmtp, "RIGHT-ENVELOPE: the protocol for {recipient}");
    }

    fn strikes_lmtp(&mut self, fault: Fault, one_in: u64) -> bool {
        let strikes = !self.mix.is_healed() && self.lmtp.as_mut().expect("it is spoken").one_in(one_in);
        if strikes {
            self.mix.count(fault);
        }
        strikes
    }
}

impl Peer {
    /// One reply for each recipient, in order (RFC 2033 §4.2); or for the first of them, and no more.
    pub(crate) fn take_each(&mut self, delivered: Delivered<'_>, around: &mut Around<'_>) {
        for (place, recipient) in delivered.recipients.iter().enumerate() {
            let alone = Delivered { recipients: std::slice::from_ref(recipient), ..delivered };
            if place > 0 && around.strikes_lmtp(Fault::LmtpCutShort, 20) {
                let some = Delivered { recipients: &delivered.recipients[place..], ..delivered };
                return self.leave_unsaid(some, around);
            }
            if around.strikes_lmtp(Fault::LmtpDeferred, 20) {
                self.say("452 4.2.2 mailbox full");
            } else if around.strikes_lmtp(Fault::LmtpRefused, 20) {
                around.ledger.bounce(&self.asked_path(), recipient);
                self.say("550 5.2.1 mailbox closed");
            } else {
                let marker = around.ledger.take(alone);
                let wait = if around.strikes(Fault::Slow) { around.random.below(12 * MINUTE) } else { 0 };
                let takes = Some((marker, vec![recipient.clone()]));
                self.says.push_back(Say::Text { wait, text: b"250 2.0.0 taken\r\n".to_vec(), takes });
            }
        }
    }

    /// Nobody is told whether it was taken for the rest; 421 says that it was not.
    fn leave_unsaid(&mut self, rest: Delivered<'_>, around: &mut Around<'_>) {
        match around.random.below(3) {
            0 => self.close_with("421 4.3.2 closing"),
            1 => self.close(),
            _ => {
                let marker = around.ledger.take(rest);
                around.ledger.forget(marker, rest.recipients);
                self.close();
            }
        }
    }
}
