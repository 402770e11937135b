//! Tests of the ring and of operations that end early.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::thread;

use super::*;

fn unavailable(errno: i32, disabled: Option<u8>) -> String {
    RingUnavailable { error: io::Error::from_raw_os_error(errno), disabled }.to_string()
}

#[test]
fn a_refused_ring_is_explained() {
    check_available().unwrap();
    let text = unavailable(libc::EPERM, Some(2));
    assert!(text.contains("kernel.io_uring_disabled is 2") && text.contains("io_uring_disabled=0"), "{text}");
    let text = unavailable(libc::EPERM, Some(1));
    assert!(text.contains("kernel.io_uring_group"), "{text}");
    let text = unavailable(libc::EPERM, Some(0));
    assert!(text.contains("io_uring_disabled is 0, which allows it") && text.contains("seccomp=unconfined"), "{text}");
    let text = unavailable(libc::EPERM, None);
    assert!(text.contains("can't be read") && text.contains("seccomp"), "{text}");
    let text = unavailable(libc::ENOSYS, None);
    assert!(text.contains("CONFIG_IO_URING") && text.contains("seccomp"), "{text}");
    assert!(unavailable(libc::EINVAL, None).contains("6.1"));
    assert!(unavailable(libc::ENOMEM, Some(0)).contains("ulimit -l"));
    assert!(unavailable(libc::EMFILE, Some(0)).contains("ulimit -n"));
}

/// The kernel's own answer under a filter such as container runtimes install.
#[test]
fn a_seccomp_filter_is_explained() {
    let text = thread::spawn(|| {
        forbid_io_uring_setup();
        (check_available().unwrap_err().to_string(), run_shard("shard 3", async {}).unwrap_err().to_string())
    });
    let (check, run) = text.join().unwrap();
    assert!(check.contains("seccomp filter"), "{check}");
    assert!(run.starts_with("shard 3: cannot set up its io_uring"), "{run}");
}

/// Has the calling thread get EPERM from io_uring_setup.
fn forbid_io_uring_setup() {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let mut program = [
        // The system call's number is the first field of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { code: jump as u16, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: these calls concern this thread only; the filter's program lives until the call has copied it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
}

fn pair() -> (Descriptor, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (Rc::new(listener.accept().unwrap().0.into()), peer)
}

async fn poll_once<F: Future + Unpin>(future: &mut F) {
    std::future::poll_fn(|context| {
        assert!(Pin::new(&mut *future).poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// Trap: a descriptor that closes with an SQE still queued sent one peer's octets to another.
#[test]
fn a_descriptor_is_not_closed_while_an_operation_on_it_is_queued() {
    run_shard("test", async {
        let (descriptor, mut peer) = pair();
        let (number, open) = (descriptor.as_raw_fd(), Rc::downgrade(&descriptor));
        let mut operation = Box::pin(receive(descriptor, Vec::with_capacity(16)));
        // Queued, not yet submitted: tokio has not parked since. Our own reference is gone.
        poll_once(&mut operation).await;
        drop(operation);
        let others: Vec<_> = (0..8).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        assert!(others.iter().all(|other| other.as_raw_fd() != number), "the number came to mean another socket");
        assert_eq!(operations_in_flight(), 1);
        peer.write_all(b"x").unwrap();
        while operations_in_flight() > 0 {
            // Not yield_now: the ring submits only when tokio parks.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(open.upgrade().is_none(), "closed once the operation has ended");
    })
    .unwrap();
}

/// Trap: tokio-uring frees the buffers of operations that are in flight when its runtime is dropped, and the kernel
/// then writes into freed memory.
#[test]
fn operations_end_before_their_shard_does() {
    let (peers, ended) = run_shard("test", async {
        let mut peers = Vec::new();
        let ended = Rc::new(Cell::new(0));
        for _ in 0..20 {
            let (descriptor, peer) = pair();
            peers.push(peer);
            let ended = ended.clone();
            // Each task begins another operation when its first is cancelled, which must not hold up the end.
            spawn(async move {
                loop {
                    let (result, _) = receive(descriptor.clone(), Vec::with_capacity(4_096)).await;
                    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
                    ended.set(ended.get() + 1);
                }
            });
        }
        tokio::task::yield_now().await;
        assert_eq!(operations_in_flight(), 20);
        (peers, ended)
    })
    .unwrap();
    assert_eq!(operations_in_flight(), 0);
    assert_eq!(ended.get(), 20);
    drop(peers);
}

#[test]
fn a_thread_may_have_one_shard_after_another() {
    for _ in 0..3 {
        let (descriptor, mut peer) = pair();
        peer.write_all(b"hello").unwrap();
        let (result, buffer) = run_shard("test", receive(descriptor, b"> ".to_vec_with_room(64))).unwrap();
        assert_eq!((result.unwrap(), buffer.as_slice()), (5, &b"> hello"[..]));
    }
}

trait WithRoom {
    fn to_vec_with_room(&self, room: usize) -> Vec<u8>;
}

impl WithRoom for [u8] {
    fn to_vec_with_room(&self, room: usize) -> Vec<u8> {
        let mut vector = Vec::with_capacity(self.len() + room);
        vector.extend_from_slice(self);
        vector
    }
}

/// Trap: tokio-uring submits only when tokio parks, so that a task which loops on `yield_now` starves all operations.
#[test]
fn a_busy_task_that_breathes_lets_operations_go_out() {
    run_shard("test", async {
        let (descriptor, mut peer) = pair();
        peer.write_all(b"x").unwrap();
        let receive = spawn(receive(descriptor, Vec::with_capacity(1)));
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
        }
        assert!(!receive.is_finished(), "yield_now is no help; if this fails, it has become one");
        for _ in 0..100 {
            breathe().await;
        }
        assert!(receive.is_finished());
        assert!(!is_closing());
    })
    .unwrap();
}

/// Trap: stable data that uses the ring in `Drop` panics the dispatcher. Ours only closes descriptors and frees memory;
/// this drops each kind while it is in flight, so that the dispatcher drops its data.
#[test]
fn the_dispatcher_may_drop_any_stable_data() {
    run_shard("test", async {
        let (descriptor, peer) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut accept = accept(Rc::new(listener.into()));
        poll_once(&mut accept).await;
        let mut connect = connect(
            Rc::new(super::super::net::open_stream(None, false, address.into()).unwrap().into()),
            address.into(),
        );
        poll_once(&mut connect).await;
        let parts = vec![vec![0_u8; 4 << 20]];
        let mut operation = send(descriptor.clone(), parts, SendPosition::default(), SendScratch::new());
        let Ok(operation) = &mut operation else { panic!("there is something to send") };
        poll_once(operation).await;
        let mut receive = Box::pin(receive(descriptor, Vec::with_capacity(1)));
        poll_once(&mut receive).await;
        drop((accept, connect, receive, peer));
        // The loop turns: completions of what was dropped are dispatched.
        tokio::time::sleep(Duration::from_millis(5)).await;
    })
    .unwrap();
    assert_eq!(operations_in_flight(), 0);
}

#[test]
fn a_send_position_walks_over_parts() {
    let parts = [&b"ab"[..], b"", b"cde"];
    let mut position = SendPosition::default();
    position.advance(&parts, 1);
    assert_eq!(position, SendPosition { part: 0, offset: 1 });
    position.advance(&parts, 2);
    assert_eq!(position, SendPosition { part: 2, offset: 1 });
    position.advance(&parts, 2);
    assert_eq!(position, SendPosition { part: 3, offset: 0 });
}
