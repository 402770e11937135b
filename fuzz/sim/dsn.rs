//! Runs in which senders ask for notifications (RFC 3461), and peers offer them: what was asked for a recipient goes
//! with that recipient.
//!
//! What is drawn here comes from a generator of its own.

use postrider_spool::record::DsnParameters;

use crate::checker::{Marker, Sent, marker_of};
use crate::random::Random;

/// Of every so manieth seed.
const EVERY: u64 = 4;

pub(crate) fn draw(seed: u64) -> bool {
    Random::new(seed.rotate_left(44) ^ 0x6473_6e00).one_in(EVERY)
}

/// What is asked for a message: for some of its recipients.
pub(crate) fn asked(marker: Marker, sent: &Sent) -> DsnParameters {
    let recipients = sent.recipients.iter().enumerate();
    let asked = recipients.filter(|(place, address)| !(place + marker as usize).is_multiple_of(3) && is_xtext(address));
    let words = |(place, address): (usize, &String)| (place as u32, format!("NOTIFY=FAILURE ORCPT=rfc822;{address}"));
    DsnParameters { mail: format!("RET=HDRS ENVID=m{marker}"), recipients: asked.map(words).collect() }
}

/// RIGHT-ENVELOPE: nothing is asked in another's name. A peer has offered it, or not.
pub(crate) fn check(is_offered: bool, reverse_path: &str, recipient: &str, of_mail: &[String], of_rcpt: &[String]) {
    let value = |words: &[String], name: &str| words.iter().find_map(|word| word.strip_prefix(name).map(str::to_owned));
    let (envelope, original) = (value(of_mail, "ENVID="), value(of_rcpt, "ORCPT=rfc822;"));
    let is_asked = envelope.is_some() || original.is_some();
    assert!(is_offered || !is_asked, "RIGHT-ENVELOPE: {of_mail:?} and {of_rcpt:?} to one that knows no DSN");
    let marker = format!("m{}", marker_of(reverse_path));
    assert!(envelope.is_none_or(|envelope| envelope == marker), "RIGHT-ENVELOPE: {of_mail:?} for {reverse_path}");
    assert!(original.is_none_or(|original| original == recipient), "RIGHT-ENVELOPE: {of_rcpt:?} for {recipient}");
}

/// Whether it stands in a parameter as it is.
fn is_xtext(address: &str) -> bool {
    address.bytes().all(|octet| octet.is_ascii_graphic() && !matches!(octet, b'+' | b'=' | b'<' | b'>'))
}
