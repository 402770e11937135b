//! A TCP proxy that delays every octet by the same time, in both directions, and limits nothing else.
//!
//! Each direction of a connection has a thread that reads and one that writes what is due, so that a delay never waits
//! for another's. Connecting is not delayed. Until it is opened, connections are accepted and nothing gets through.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// It serves until the process ends; its connections end with either side's.
#[derive(Debug)]
pub(super) struct Proxy {
    address: SocketAddr,
    gate: Sender<()>,
}

impl Proxy {
    pub(super) fn start(to: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let (gate, opened) = channel();
        let serve = move || {
            if opened.recv().is_err() {
                // Never opened.
                return;
            }
            for client in listener.incoming().flatten() {
                // A server that is gone closes the client's connection, too.
                let _ = TcpStream::connect(to).and_then(|server| join(&client, &server, delay));
            }
        };
        thread::Builder::new().name("proxy".into()).spawn(serve)?;
        Ok(Self { address, gate })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn open(&self) {
        // Its thread waits for this.
        let _ = self.gate.send(());
    }
}

fn join(client: &TcpStream, server: &TcpStream, delay: Duration) -> std::io::Result<()> {
    for (from, to) in [(client, server), (server, client)] {
        to.set_nodelay(true)?;
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let (line, out) = sync_channel(UNDER_WAY_MAX);
        thread::Builder::new().stack_size(STACK).spawn(move || receive(from, delay, &line))?;
        thread::Builder::new().stack_size(STACK).spawn(move || send(to, &out))?;
    }
    Ok(())
}

/// What came, and when it is due; nothing is the end.
type UnderWay = (Instant, Vec<u8>);

fn receive(mut from: TcpStream, delay: Duration, line: &SyncSender<UnderWay>) {
    let mut room = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut room).unwrap_or(0);
        if line.send((Instant::now() + delay, room[..length].to_vec())).is_err() || length == 0 {
            return;
        }
    }
}

fn send(mut to: TcpStream, line: &Receiver<UnderWay>) {
    while let Ok((due, octets)) = line.recv() {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if octets.is_empty() || to.write_all(&octets).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Reads under way in one direction: more than any peer here has in flight.
const UNDER_WAY_MAX: usize = 4_096;
const STACK: usize = 128 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_come_late_and_nothing_comes_before_it_is_opened() {
        let echo = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let delay = Duration::from_millis(20);
        let proxy = Proxy::start(echo.local_addr().unwrap(), delay).unwrap();
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(b"hello").unwrap();
        echo.set_nonblocking(true).unwrap();
        assert!(echo.accept().is_err(), "nobody got through");
        echo.set_nonblocking(false).unwrap();
        let opened = Instant::now();
        proxy.open();
        let (mut server, _) = echo.accept().unwrap();
        let mut room = [0; 5];
        server.read_exact(&mut room).unwrap();
        assert!(opened.elapsed() >= delay, "there");
        server.write_all(&room).unwrap();
        drop(server);
        let mut came = Vec::new();
        client.read_to_end(&mut came).unwrap();
        assert_eq!(came, b"hello", "all of it, and then the end");
        assert!(opened.elapsed() >= 2 * delay, "and back");
    }
}
