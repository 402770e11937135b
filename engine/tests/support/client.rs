//! A submitting SMTP client, one command at a time.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::PATIENCE;

pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    pub(crate) greeting: Reply,
}

/// A whole reply; lines are joined by LF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: u16,
    pub(crate) text: String,
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code, self.text)
    }
}

impl Client {
    /// Connects and reads the greeting.
    pub(crate) fn connect(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut client = Self { stream: BufReader::new(stream), greeting: Reply { code: 0, text: String::new() } };
        client.greeting = client.reply()?;
        Ok(client)
    }

    /// Connects and says EHLO.
    pub(crate) fn ready(address: SocketAddr) -> std::io::Result<Self> {
        let mut client = Self::connect(address)?;
        expect(&client.command("EHLO client.test")?, 250)?;
        Ok(client)
    }

    pub(crate) fn command(&mut self, line: &str) -> std::io::Result<Reply> {
        self.write(format!("{line}\r\n").as_bytes())?;
        self.reply()
    }

    pub(crate) fn write(&mut self, octets: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(octets)
    }

    pub(crate) fn reply(&mut self) -> std::io::Result<Reply> {
        let mut text = String::new();
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end();
            let invalid = || std::io::Error::other(format!("not a reply: {line:?}"));
            let code: u16 = line.get(..3).and_then(|code| code.parse().ok()).ok_or_else(invalid)?;
            text.push_str(line.get(4..).unwrap_or_default());
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok(Reply { code, text });
            }
            text.push('\n');
        }
    }

    /// Whatever the server still says before it closes.
    pub(crate) fn rest(&mut self) -> std::io::Result<String> {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest)?;
        Ok(rest)
    }

    /// One transaction, pipelined; `content` has CRLF line ends. The reply to the final dot, or the first refusal.
    pub(crate) fn send(&mut self, reverse_path: &str, recipients: &[&str], content: &[u8]) -> std::io::Result<Reply> {
        let mut envelope = format!("MAIL FROM:<{reverse_path}>\r\n");
        for recipient in recipients {
            envelope.push_str(&format!("RCPT TO:<{recipient}>\r\n"));
        }
        envelope.push_str("DATA\r\n");
        self.write(envelope.as_bytes())?;
        let mut refused = None;
        for _ in 0..=recipients.len() {
            let reply = self.reply()?;
            if reply.code != 250 {
                refused.get_or_insert(reply);
            }
        }
        let data = self.reply()?;
        if data.code != 354 {
            return Ok(refused.unwrap_or(data));
        }
        self.write(&stuffed(content))?;
        self.reply()
    }

    /// [`Self::send`], and the message's id.
    pub(crate) fn submit(
        &mut self,
        reverse_path: &str,
        recipients: &[&str],
        content: &[u8],
    ) -> std::io::Result<String> {
        let reply = self.send(reverse_path, recipients, content)?;
        expect(&reply, 250)?;
        let id = reply.text.split("id=").nth(1).map(|id| id.trim().to_owned());
        id.ok_or_else(|| std::io::Error::other(format!("a reply that names the id: {reply}")))
    }
}

/// Sends one message on a connection of its own.
pub(crate) fn submit(to: SocketAddr, reverse_path: &str, recipients: &[&str], content: &[u8]) -> String {
    let sent = Client::ready(to).and_then(|mut client| client.submit(reverse_path, recipients, content));
    sent.unwrap_or_else(|error| panic!("submitting to {to}: {error}"))
}

fn expect(reply: &Reply, code: u16) -> std::io::Result<()> {
    if reply.code == code { Ok(()) } else { Err(std::io::Error::other(format!("{code} expected: {reply}"))) }
}

/// Content as it goes over the wire, with the final dot (RFC 5321 §4.5.2).
pub(crate) fn stuffed(content: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(content.len() + 5);
    for line in content.split_inclusive(|&octet| octet == b'\n') {
        if line.first() == Some(&b'.') {
            wire.push(b'.');
        }
        wire.extend_from_slice(line);
    }
    if !wire.is_empty() && !wire.ends_with(b"\r\n") {
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b".\r\n");
    wire
}
