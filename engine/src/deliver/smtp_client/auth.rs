//! AUTH (RFC 4954) to a smarthost, before the first transaction: PLAIN (RFC 4616), else LOGIN.
//!
//! What we say of ourselves stands in no answer, event or log: `session_command` names the mechanism only.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::{Expected, SmtpClient};
use crate::deliver::attempt::Stage;
use crate::deliver::content::{Chunk, Content};
use crate::deliver::verdict::Happened;
use crate::mail::reply::Reply;

/// What a reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AuthStep {
    /// AUTH PLAIN, which says all at once.
    Plain,
    /// The same once more, for a server that asks although it was told.
    PlainAgain,
    /// AUTH LOGIN; the server asks for the user's name.
    Login,
    /// The name; the server asks for the password.
    LoginUser,
    LoginPassword,
}

impl AuthStep {
    pub(super) fn command(self) -> &'static str {
        match self {
            Self::Plain | Self::PlainAgain => "AUTH PLAIN",
            Self::Login | Self::LoginUser | Self::LoginPassword => "AUTH LOGIN",
        }
    }
}

impl<C: Content> SmtpClient<C> {
    /// Whether there is something to say first.
    pub(super) fn must_authenticate(&self) -> bool {
        self.options.auth.is_some()
    }

    pub(super) fn authenticate(&mut self, out: &mut Vec<Chunk<C::Piece>>) {
        let Some(credentials) = &self.options.auth else { return };
        if !self.encrypted && !credentials.without_tls {
            return self.fail_session(Stage::Auth, &Happened::AuthInClear, "");
        }
        if self.offered.auth_plain {
            // RFC 4954 §4: the initial response saves a round trip.
            let command = format!("AUTH PLAIN {}", self.plain_response());
            self.write_command(&command, Expected::Auth(AuthStep::Plain), out);
        } else if self.offered.auth_login {
            self.write_command("AUTH LOGIN", Expected::Auth(AuthStep::Login), out);
        } else {
            self.fail_session(Stage::Auth, &Happened::AuthNotOffered, "");
        }
    }

    pub(super) fn on_auth(&mut self, step: AuthStep, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        let Some(credentials) = &self.options.auth else { unreachable!("AUTH was said") };
        let response = match (step, reply.code) {
            (AuthStep::Plain | AuthStep::PlainAgain | AuthStep::LoginPassword, _) if reply.is_positive() => {
                return self.open();
            }
            (AuthStep::Plain, 334) => Some((self.plain_response(), AuthStep::PlainAgain)),
            (AuthStep::Login, 334) => Some((BASE64_STANDARD.encode(&credentials.username), AuthStep::LoginUser)),
            (AuthStep::LoginUser, 334) => {
                Some((BASE64_STANDARD.encode(&credentials.password), AuthStep::LoginPassword))
            }
            _ => None,
        };
        match response {
            Some((text, next)) => self.write_command(&text, Expected::Auth(next), out),
            None => self.refuse_session(Expected::Auth(step), reply, out),
        }
    }

    /// RFC 4616 §2: no authorization identity, the name, the password.
    fn plain_response(&self) -> String {
        let Some(credentials) = &self.options.auth else { unreachable!("AUTH was said") };
        BASE64_STANDARD.encode(format!("\0{}\0{}", credentials.username, credentials.password))
    }
}
