//! What a peer said before its connection broke is heard: a refusal in the midst of the content, though nothing more
//! can be sent to it, and what came in TLS in front of octets in the clear.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use postrider::config::Chunking;
use postrider::outcome::event::EventKind;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::support::embedded::{Running, to_sink};
use crate::support::message;
use crate::support::policy_server::identity;

/// More than what sockets hold, so that a send is under way when the reply comes.
const OCTETS: usize = 24 << 20;

#[test]
fn a_refusal_amid_the_content_by_data() {
    refuses_amid_the_content("250 PIPELINING", "DATA", ".");
}

#[test]
fn a_refusal_amid_the_content_by_bdat() {
    refuses_amid_the_content("250-PIPELINING\r\n250 CHUNKING", "BDAT", "BDAT ");
}

fn refuses_amid_the_content(offers: &'static str, verb: &'static str, command: &str) {
    let peer = listen(move |stream| refuse(stream, offers, verb));
    let directory = tempfile::tempdir().unwrap();
    let mut running = Running::start(to_sink(directory.path(), peer));
    let mut content = message("large");
    content.extend(b"A line of sixty-two octets, which comes again, and again, ...\r\n".repeat(OCTETS / 63));
    running.inject(&["a@d.test"], &content);
    let bounce = running.event(EventKind::Bounce).to_json().to_owned();
    assert!(bounce.contains("\"content\":\"Too much of it\"") && bounce.contains("\"num_attempts\":1"), "{bounce}");
    assert!(bounce.contains(&format!("\"command\":\"{command}")), "{bounce}");
    running.shutdown();
}

/// Says 552 after a part of the content and closes with the rest unread, so that the kernel resets the connection.
fn refuse(mut stream: TcpStream, offers: &str, verb: &str) -> io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    stream.write_all(b"220 peer.test\r\n")?;
    loop {
        let line = line(&mut input)?;
        if line.starts_with("EHLO") {
            stream.write_all(format!("250-peer.test\r\n{offers}\r\n").as_bytes())?;
        } else if line.starts_with(verb) {
            if verb == "DATA" {
                stream.write_all(b"354 Go ahead\r\n")?;
            }
            input.read_exact(&mut vec![0; 100_000])?;
            return stream.write_all(b"552 5.3.4 Too much of it\r\n");
        } else {
            stream.write_all(b"250 2.0.0 OK\r\n")?;
        }
    }
}

/// Exim 4.96 does so when it has had enough of commands that are no mail.
#[test]
fn replies_in_front_of_one_in_the_clear() {
    let (_, tls) = identity(&["peer.test"]);
    let peer = listen(move |stream| take_and_part(stream, &tls));
    let directory = tempfile::tempdir().unwrap();
    let mut config = to_sink(directory.path(), peer);
    config.shaping.chunking = Chunking::Off;
    let mut running = Running::start(config);
    running.inject(&["a@d.test"], &message("taken"));
    let end = running.event_where("outcome", |event| event.kind != EventKind::Reception).to_json().to_owned();
    assert!(end.contains("\"type\":\"Delivery\"") && end.contains("\"content\":\"Queued\""), "{end}");
    running.shutdown();
}

/// Takes a message in TLS, and says 554 in the clear in the same write as that.
fn take_and_part(mut stream: TcpStream, tls: &Arc<ServerConfig>) -> io::Result<()> {
    stream.write_all(b"220 peer.test\r\n")?;
    let mut input = BufReader::new(stream.try_clone()?);
    line(&mut input)?;
    stream.write_all(b"250-peer.test\r\n250 STARTTLS\r\n")?;
    line(&mut input)?;
    stream.write_all(b"220 Go ahead\r\n")?;
    let connection = ServerConnection::new(Arc::clone(tls)).map_err(io::Error::other)?;
    let mut input = BufReader::new(StreamOwned::new(connection, stream));
    loop {
        let command = line(&mut input)?;
        if command != "DATA\r\n" {
            input.get_mut().write_all(b"250 2.0.0 OK\r\n")?;
            continue;
        }
        input.get_mut().write_all(b"354 Go ahead\r\n")?;
        while line(&mut input)? != ".\r\n" {}
        let StreamOwned { conn, sock } = input.get_mut();
        conn.writer().write_all(b"250 2.0.0 Queued\r\n")?;
        let mut wire = Vec::new();
        conn.write_tls(&mut wire)?;
        wire.extend_from_slice(b"554 Too many nonmail commands\r\n");
        return sock.write_all(&wire);
    }
}

fn listen(serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let serve = Arc::clone(&serve);
            // An error is the other side's end of the connection.
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Its next line; an error at the end.
fn line(input: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if input.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}
