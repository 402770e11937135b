//! Tests of sockets on a ring, against plain ones of the standard library.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::task::Poll;
use std::thread;

use tokio::time::timeout;

use super::*;
use crate::runtime::net::bind_listener;
use crate::runtime::uring::run_shard;

fn listen() -> (TcpListener, SocketAddr) {
    let listener = bind_listener("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn to(to: SocketAddr) -> ConnectOptions {
    ConnectOptions { source: None, freebind: false, to: to.into() }
}

async fn connected(address: SocketAddr) -> Socket {
    let socket = Socket::open(&to(address)).unwrap();
    socket.connect().await.unwrap();
    socket
}

async fn poll_once<F: Future + Unpin>(future: &mut F) {
    future::poll_fn(|context| {
        assert!(Pin::new(&mut *future).poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// Lets the ring turn until all operations have ended.
async fn nothing_in_flight() {
    while uring::operations_in_flight() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn connects_from_the_bound_source() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let source = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));
        for _ in 0..3 {
            let socket =
                Socket::open(&ConnectOptions { source: Some(source), freebind: false, to: address.into() }).unwrap();
            socket.connect().await.unwrap();
            let (mut peer, from) = listener.accept().unwrap();
            assert_eq!((from.ip(), from), (source, socket.local_addr().unwrap().unwrap()));
            assert_eq!(socket.peer_addr().unwrap(), Some(address));
            assert!(SockRef::from(&*socket.0.descriptor).tcp_nodelay().unwrap());
            let (sent, _) = socket.send(vec!["QUIT\r\n"]).await;
            assert_eq!(sent.unwrap(), 6);
            let mut text = [0; 6];
            peer.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"QUIT\r\n");
            assert!(socket.connect().await.is_err(), "only once");
        }
    })
    .unwrap();
}

/// In a dialog the kernel waits for something to be sent that acknowledges what came; the option tells whether it does.
#[test]
fn what_came_is_acknowledged_when_it_has_to_be() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let socket = connected(address).await;
        let (mut peer, _) = listener.accept().unwrap();
        let acknowledges_at_once = || SockRef::from(&*socket.0.descriptor).tcp_quickack().unwrap();
        while acknowledges_at_once() {
            peer.write_all(b"250 ok\r\n").unwrap();
            let (received, _) = timeout(STUCK, socket.recv(Vec::with_capacity(64))).await.unwrap();
            assert_eq!(received.unwrap(), 8);
            let (sent, _) = socket.send(vec!["NOOP\r\n"]).await;
            assert_eq!(sent.unwrap(), 6);
        }
        socket.acknowledge();
        assert!(acknowledges_at_once());
    })
    .unwrap();
}

#[test]
fn a_refused_connect_says_so() {
    let (listener, address) = listen();
    drop(listener);
    let error = run_shard("test", async move { Socket::open(&to(address)).unwrap().connect().await }).unwrap();
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

/// A listener whose backlog is full, so that the next connect hangs: the kernel drops its SYN.
fn full_listener() -> (TcpListener, SocketAddr, Vec<TcpStream>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let listener: TcpListener = socket.into();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        waiting.push(stream);
        assert!(waiting.len() < 16, "the backlog never fills");
    }
    (listener, address, waiting)
}

#[test]
fn a_pending_connect_is_aborted_and_awaited() {
    let (_listener, address, _waiting) = full_listener();
    run_shard("test", async move {
        let socket = Socket::open(&to(address)).unwrap();
        let mut connect = Box::pin(socket.connect());
        timeout(Duration::from_millis(50), &mut connect).await.expect_err("the backlog is full");
        socket.abort();
        socket.abort();
        let error = timeout(STUCK, connect).await.expect("aborted").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
        assert!(socket.is_aborted());
        // Aborted in the very turn in which it began: the connect is queued, not submitted.
        let socket = Socket::open(&to(address)).unwrap();
        let mut connect = Box::pin(socket.connect());
        poll_once(&mut connect).await;
        socket.abort();
        assert!(timeout(STUCK, connect).await.expect("aborted").is_err());
        // Aborted before it began.
        let socket = Socket::open(&to(address)).unwrap();
        socket.abort();
        assert_eq!(socket.connect().await.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        timeout(STUCK, nothing_in_flight()).await.expect("cancellations end too");
    })
    .unwrap();
}

#[test]
fn an_abort_races_with_connects_that_succeed() {
    let (listener, address) = listen();
    run_shard("test", async move {
        for turn in 0..200_u32 {
            let socket = Socket::open(&to(address)).unwrap();
            let connect = uring::spawn(socket.connect());
            for _ in 0..turn % 5 {
                tokio::task::yield_now().await;
            }
            socket.abort();
            let _ = timeout(STUCK, connect).await.expect("it ends either way");
            let (result, _) = timeout(STUCK, socket.recv(Vec::with_capacity(8))).await.expect("nothing is received");
            assert!(!matches!(result, Ok(1..)));
        }
    })
    .unwrap();
    drop(listener);
}

#[test]
fn a_pending_receive_is_aborted() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let socket = connected(address).await;
        let peer = listener.accept().unwrap();
        let mut receive = Box::pin(socket.recv(Vec::with_capacity(64)));
        poll_once(&mut receive).await;
        socket.abort();
        let (result, buffer) = timeout(STUCK, receive).await.expect("aborted");
        assert!(matches!(result, Ok(0) | Err(_)), "{result:?}");
        assert!(buffer.is_empty() && socket.is_aborted());
        drop(peer);
    })
    .unwrap();
}

#[test]
fn a_pending_send_is_aborted() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let socket = connected(address).await;
        let peer = listener.accept().unwrap();
        let mut send = Box::pin(socket.send(vec![vec![b'x'; 64 << 20]]));
        timeout(Duration::from_millis(50), &mut send).await.expect_err("nobody reads");
        let sent = socket.bytes_sent();
        assert!(sent > 0, "progress shows while the send is pending");
        socket.abort();
        let (result, parts) = timeout(STUCK, send).await.expect("aborted");
        result.unwrap_err();
        assert_eq!(parts[0].len(), 64 << 20, "parts come back");
        drop(peer);
    })
    .unwrap();
}

/// Trap: dropping an operation does not cancel it. It would receive the next octets into a buffer that nobody sees.
#[test]
fn an_abandoned_receive_poisons_the_socket() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let socket = connected(address).await;
        let (mut peer, _) = listener.accept().unwrap();
        let mut receive = Box::pin(socket.recv(Vec::with_capacity(64)));
        poll_once(&mut receive).await;
        drop(receive);
        let _ = peer.write_all(b"250 lost\r\n");
        let (result, _) = timeout(STUCK, socket.recv(Vec::with_capacity(64))).await.unwrap();
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        let (result, parts) = socket.send(vec!["MAIL"]).await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(parts, ["MAIL"]);
        // A future that has not begun may be dropped.
        let socket = connected(address).await;
        drop(socket.recv(Vec::with_capacity(64)));
        assert_eq!(socket.send(vec!["x"]).await.0.unwrap(), 1);
    })
    .unwrap();
}

#[test]
fn receives_go_into_the_spare_capacity() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let socket = connected(address).await;
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"220 mx").unwrap();
        let mut buffer = Vec::with_capacity(8);
        buffer.extend_from_slice(b"--");
        let (result, buffer) = socket.recv(buffer).await;
        assert_eq!((result.unwrap(), buffer.as_slice()), (6, &b"--220 mx"[..]));
        assert_eq!(socket.bytes_received(), 6);
        let mut full = buffer;
        full.shrink_to_fit();
        while full.len() < full.capacity() {
            full.push(b'-');
        }
        let (result, full) = socket.recv(full).await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(full.starts_with(b"--220 mx"));
        drop(peer);
        let (result, _) = socket.recv(Vec::with_capacity(8)).await;
        assert_eq!(result.unwrap(), 0);
    })
    .unwrap();
}

/// Parts of every size, inline and on the heap; more of them than one SENDMSG takes.
enum Part {
    Inline([u8; 7]),
    Heap(Vec<u8>),
    Shared(Rc<[u8]>),
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Inline(octets) => octets,
            Self::Heap(octets) => octets,
            Self::Shared(octets) => octets,
        }
    }
}

#[test]
fn mixed_parts_arrive_in_order() {
    let parts: Vec<_> = (0..5_000_u32)
        .map(|number| match number % 5 {
            0 => Part::Inline((u64::from(number) + 1).to_le_bytes()[..7].try_into().unwrap()),
            1 => Part::Heap(Vec::new()),
            2 => Part::Heap(vec![number as u8; number as usize % 977]),
            3 => Part::Shared(vec![(number >> 3) as u8; 1 + number as usize % 13].into()),
            _ => Part::Heap(number.to_string().into_bytes()),
        })
        .collect();
    let whole: Vec<u8> = parts.iter().flat_map(|part| part.as_ref().to_vec()).collect();
    let (listener, address) = listen();
    let reader = thread::spawn(move || {
        let mut octets = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut octets).unwrap();
        octets
    });
    let total = run_shard("test", async move {
        let socket = connected(address).await;
        let (result, parts) = socket.send(parts).await;
        assert_eq!(parts.len(), 5_000);
        assert_eq!(socket.send(Vec::<Part>::new()).await.0.unwrap(), 0);
        result.unwrap()
    })
    .unwrap();
    let received = reader.join().unwrap();
    assert_eq!(total, whole.len());
    assert!(received == whole);
}

#[test]
fn a_large_send_to_a_slow_reader_is_complete_and_in_order() {
    const SIZE: usize = 20 << 20;
    let octet = |position: usize| (position / 3 % 251) as u8;
    let (listener, address) = listen();
    let (go, started) = mpsc::channel();
    let reader = thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        started.recv().unwrap();
        let (mut buffer, mut position) = (vec![0; 10_007], 0);
        loop {
            let received = peer.read(&mut buffer).unwrap();
            if received == 0 {
                return position;
            }
            for octet_received in &buffer[..received] {
                assert!(*octet_received == octet(position), "wrong octet at {position}");
                position += 1;
            }
            thread::yield_now();
        }
    });
    run_shard("test", async move {
        let socket = connected(address).await;
        let whole: Vec<u8> = (0..SIZE).map(octet).collect();
        let parts =
            vec![whole[..1_000_003].to_vec(), whole[1_000_003..1_000_004].to_vec(), whole[1_000_004..].to_vec()];
        let mut send = Box::pin(socket.send(parts));
        timeout(Duration::from_millis(20), &mut send).await.expect_err("nobody reads yet");
        go.send(()).unwrap();
        assert_eq!(timeout(STUCK, send).await.expect("it goes on").0.unwrap(), SIZE);
        assert_eq!(socket.bytes_sent(), SIZE as u64);
        socket.finish().unwrap();
        let (result, _) = timeout(STUCK, socket.recv(Vec::with_capacity(1))).await.unwrap();
        assert_eq!(result.unwrap(), 0, "the peer's FIN");
    })
    .unwrap();
    assert_eq!(reader.join().unwrap(), SIZE);
}

/// A peer that goes away must be an error, not a SIGPIPE.
#[test]
fn sending_to_a_closed_peer_is_an_error() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let socket = connected(address).await;
        drop(listener.accept().unwrap());
        let mut failed = false;
        for _ in 0..100 {
            failed |= socket.send(vec![[0_u8; 512]]).await.0.is_err();
        }
        assert!(failed);
    })
    .unwrap();
}

#[test]
fn two_shards_share_a_listener() {
    let (listener, address) = listen();
    let (report, reports) = mpsc::channel();
    let shards: Vec<_> = (0..2)
        .map(|_| {
            let (listener, report) = (listener.try_clone().unwrap(), report.clone());
            thread::spawn(move || {
                run_shard("test", async move {
                    let listener = Listener::new(&listener).unwrap();
                    assert_eq!(listener.local_addr().unwrap(), address);
                    loop {
                        let (socket, peer) = listener.accept().await.unwrap();
                        assert_eq!(socket.peer_addr().unwrap(), Some(peer));
                        let (result, buffer) = socket.recv(Vec::with_capacity(4)).await;
                        if result.unwrap() == 4 {
                            break;
                        }
                        report.send(buffer[0]).unwrap();
                    }
                    assert!(listener.close().await.is_none());
                })
                .unwrap();
            })
        })
        .collect();
    for number in 0..40 {
        TcpStream::connect(address).unwrap().write_all(&[number]).unwrap();
    }
    let mut seen: Vec<u8> = reports.iter().take(40).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    for shard in shards {
        // Whichever shard gets it ends.
        let mut last = TcpStream::connect(address).unwrap();
        last.write_all(b"stop").unwrap();
        last.read_to_end(&mut Vec::new()).unwrap();
        drop(shard);
    }
}

/// Trap: a dropped accept would take a connection that nobody serves.
#[test]
fn a_dropped_accept_loses_no_connection() {
    let (listener, address) = listen();
    run_shard("test", async move {
        let listener = Listener::new(&listener).unwrap();
        for _ in 0..3 {
            timeout(Duration::from_millis(1), listener.accept()).await.expect_err("nobody came");
        }
        let client = TcpStream::connect(address).unwrap();
        let (_, peer) = timeout(STUCK, listener.accept()).await.expect("accepted").unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(uring::operations_in_flight(), 0);
        // One that came while closing is handed out.
        timeout(Duration::from_millis(1), listener.accept()).await.expect_err("nobody came");
        let client = TcpStream::connect(address).unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let (_, peer) = timeout(STUCK, listener.close()).await.expect("closed").expect("it was accepted");
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(uring::operations_in_flight(), 0);
    })
    .unwrap();
}

#[test]
fn running_out_of_descriptors_is_told_apart() {
    assert!(is_out_of_descriptors(&io::Error::from_raw_os_error(libc::EMFILE)));
    assert!(is_out_of_descriptors(&io::Error::from_raw_os_error(libc::ENFILE)));
    assert!(!is_out_of_descriptors(&io::Error::from_raw_os_error(libc::ECONNABORTED)));
}

const STUCK: Duration = Duration::from_secs(20);
