//! A TCP proxy that remembers what the client said, and lets nobody through until it is told to.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub(crate) struct Tap {
    address: SocketAddr,
    said: Said,
    gate: Sender<()>,
}

/// What came at once, on all connections.
type Said = Arc<Mutex<Vec<Vec<u8>>>>;

impl Tap {
    /// In front of `to`. Its thread lives as long as the test.
    pub(crate) fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
        let address = listener.local_addr().expect("a bound socket has an address");
        let said = Said::default();
        let kept = Arc::clone(&said);
        let (gate, opened) = channel();
        thread::spawn(move || {
            // An error is the end of the test.
            let _ = opened.recv();
            for client in listener.incoming().map_while(Result::ok) {
                // A server that is gone closes the client's connection too.
                let Ok(server) = TcpStream::connect(to) else { continue };
                let _ = pass(&client, &server, &kept);
            }
        });
        Self { address, said, gate }
    }

    /// From now on connections get through. Until then they are accepted, and nobody speaks.
    pub(crate) fn open(&self) {
        let _ = self.gate.send(());
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often `octets` came at once, that is, in one segment.
    pub(crate) fn count(&self, octets: &[u8]) -> usize {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().map(|said| memchr::memmem::find_iter(said, octets).count()).sum()
    }
}

fn pass(client: &TcpStream, server: &TcpStream, said: &Said) -> std::io::Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let (mut from_server, mut to_client) = (server.try_clone()?, client.try_clone()?);
    for stream in [client, server] {
        stream.set_nodelay(true)?;
    }
    let said = Arc::clone(said);
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok(count @ 1..) = from_client.read(&mut buffer) {
            said.lock().unwrap_or_else(PoisonError::into_inner).push(buffer[..count].to_vec());
            if to_server.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to_server.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        // The end of either side ends both.
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Write);
    });
    Ok(())
}
