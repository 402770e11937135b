//! What a sender asks to be told about a message (RFC 3461), and the parameters of MAIL and RCPT that say it.
//!
//! What comes in is values; what is kept in the spool and sent to peers is parameters, encoded once ([`parameters`]).
//! They are looked at again before they go into a command ([`is_parameters`]).

use postrider_spool::record::DsnParameters;

/// The message's part: RET and ENVID (RFC 3461 §4.3, §4.4).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DsnRequest {
    /// How much of the message a notification of failure brings back. None: as whoever makes it likes.
    pub content: Option<ReturnedContent>,
    /// Comes back in notifications; printable ASCII, at most 100 octets encoded.
    pub envelope_id: Option<String>,
    /// By the recipient's place in the message; none beyond the last. Empty where nothing is asked for.
    pub recipients: Vec<RecipientDsn>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnedContent {
    Full,
    Headers,
}

/// A recipient's part: NOTIFY and ORCPT (RFC 3461 §4.1, §4.2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecipientDsn {
    /// None: as whoever makes notifications likes, which is usually of failures and delays.
    pub notify: Option<Notify>,
    /// The address that the sender wrote to, an ASCII one, where it is another than the recipient's.
    pub original_recipient: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    Never,
    /// Of these; at least one.
    Of {
        success: bool,
        failure: bool,
        delay: bool,
    },
}

/// Why a request can't be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadDsn(pub &'static str);

/// The parameters that say a request. `place_of` tells where a recipient stands in the envelope; the first that stands
/// there counts.
pub fn parameters(request: &DsnRequest, place_of: impl Fn(usize) -> u32) -> Result<DsnParameters, BadDsn> {
    let mut mail = Vec::new();
    if let Some(content) = request.content {
        mail.push(match content {
            ReturnedContent::Full => "RET=FULL".to_owned(),
            ReturnedContent::Headers => "RET=HDRS".to_owned(),
        });
    }
    if let Some(id) = &request.envelope_id {
        let id = xtext(id).filter(|id| !id.is_empty() && id.len() <= ENVELOPE_ID_OCTETS_MAX);
        mail.push(format!("ENVID={}", id.ok_or(BadDsn("the envelope id is not printable ASCII, or too long"))?));
    }
    let mut recipients: Vec<(u32, String)> = Vec::new();
    for (place, asked) in request.recipients.iter().enumerate() {
        let mut words = Vec::new();
        if let Some(notify) = asked.notify {
            words.push(format!("NOTIFY={}", notify_list(notify)?));
        }
        if let Some(original) = &asked.original_recipient {
            let original = xtext(original).filter(|text| !text.is_empty() && text.len() <= ORCPT_OCTETS_MAX);
            let original = original.ok_or(BadDsn("the original recipient is not printable ASCII, or too long"))?;
            words.push(format!("ORCPT=rfc822;{original}"));
        }
        let place = place_of(place);
        if !words.is_empty() && !recipients.iter().any(|(known, _)| *known == place) {
            recipients.push((place, words.join(" ")));
        }
    }
    Ok(DsnParameters { mail: mail.join(" "), recipients })
}

fn notify_list(notify: Notify) -> Result<String, BadDsn> {
    let Notify::Of { success, failure, delay } = notify else { return Ok("NEVER".to_owned()) };
    let events = [(success, "SUCCESS"), (failure, "FAILURE"), (delay, "DELAY")];
    let events: Vec<&str> = events.into_iter().filter_map(|(on, event)| on.then_some(event)).collect();
    if events.is_empty() {
        Err(BadDsn("notify names no event; never is a choice of its own"))
    } else {
        Ok(events.join(","))
    }
}

/// RFC 3461 §4: printable ASCII, but for "+", "=" and space, which go as "+" and two upper-case hexadecimal digits.
fn xtext(text: &str) -> Option<String> {
    let mut encoded = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '+' | '=' | ' ' => encoded.push_str(&format!("+{:02X}", u32::from(character))),
            '!'..='~' => encoded.push(character),
            _ => return None,
        }
    }
    Some(encoded)
}

/// Whether a text, as it was kept, can only be parameters of the command that it is put behind.
pub fn is_parameters(text: &str) -> bool {
    text.bytes().all(|octet| matches!(octet, b' '..=b'~'))
}

/// RFC 3461 §4.4.
const ENVELOPE_ID_OCTETS_MAX: usize = 100;
/// RFC 3461 §5 lets a command be 500 octets longer for ORCPT.
const ORCPT_OCTETS_MAX: usize = 480;

#[cfg(test)]
mod tests {
    use super::*;

    fn mail(request: &DsnRequest) -> String {
        parameters(request, |place| place as u32).unwrap().mail
    }

    #[test]
    fn parameters_are_those_of_rfc_3461() {
        let recipient =
            |notify, original: Option<&str>| RecipientDsn { notify, original_recipient: original.map(str::to_owned) };
        let request = DsnRequest {
            content: Some(ReturnedContent::Headers),
            envelope_id: Some("QQ314159".to_owned()),
            recipients: vec![
                recipient(Some(Notify::Of { success: true, failure: true, delay: false }), Some("Bob@Example.COM")),
                recipient(None, None),
                recipient(Some(Notify::Never), None),
            ],
        };
        let parameters = parameters(&request, |place| place as u32 + 7).unwrap();
        assert_eq!(parameters.mail, "RET=HDRS ENVID=QQ314159");
        let recipients =
            [(7, "NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Bob@Example.COM".to_owned()), (9, "NOTIFY=NEVER".to_owned())];
        assert_eq!(parameters.recipients, recipients);
        let full = DsnRequest { content: Some(ReturnedContent::Full), ..DsnRequest::default() };
        assert_eq!((mail(&full).as_str(), mail(&DsnRequest::default()).as_str()), ("RET=FULL", ""));
    }

    /// RFC 3461 §4: "+" and "=" never stand for themselves, nor does a space, which would end the parameter.
    #[test]
    fn xtext_is_exact() {
        assert_eq!(xtext("a+b=c d~!").unwrap(), "a+2Bb+3Dc+20d~!");
        assert_eq!(xtext("\"x y\"@z;<>").unwrap(), "\"x+20y\"@z;<>");
        for text in ["a\r\nRCPT TO:<b>", "a\tb", "\u{7f}", "ä", "\0"] {
            assert!(xtext(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn what_can_not_be_said_is_refused() {
        let with_id = |id: &str| DsnRequest { envelope_id: Some(id.to_owned()), ..DsnRequest::default() };
        let refused = |request: &DsnRequest| parameters(request, |place| place as u32).is_err();
        assert!(!refused(&with_id(&"x".repeat(100))) && refused(&with_id(&"x".repeat(101))));
        assert!(refused(&with_id("")) && refused(&with_id("ä")) && refused(&with_id(&"+".repeat(34))));
        let with = |recipient| DsnRequest { recipients: vec![recipient], ..DsnRequest::default() };
        let nothing = Some(Notify::Of { success: false, failure: false, delay: false });
        assert!(refused(&with(RecipientDsn { notify: nothing, ..RecipientDsn::default() })));
        let original = |text: &str| with(RecipientDsn { original_recipient: Some(text.to_owned()), notify: None });
        assert!(refused(&original("ä@b")) && refused(&original("")) && refused(&original(&"x".repeat(481))));
    }

    /// Of a recipient that is named twice the first counts.
    #[test]
    fn a_recipient_that_is_there_twice_has_one_request() {
        let never = RecipientDsn { notify: Some(Notify::Never), ..RecipientDsn::default() };
        let delay = Notify::Of { success: false, failure: false, delay: true };
        let other = RecipientDsn { notify: Some(delay), ..RecipientDsn::default() };
        let request = DsnRequest { recipients: vec![never, other], ..DsnRequest::default() };
        assert_eq!(parameters(&request, |_| 3).unwrap().recipients, [(3, "NOTIFY=NEVER".to_owned())]);
    }
}
