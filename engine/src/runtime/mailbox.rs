//! Queues between threads: bounded, never blocking, and the consumer is woken only when it sleeps.
//!
//! Many may send, one receives. A sender pushes and then looks whether the consumer sleeps; the consumer declares that
//! it sleeps and then looks once more whether something was pushed. Both steps have a sequentially consistent fence
//! between them, so that at least one side sees the other: a value is never left behind a sleeping consumer. Only the
//! sender that finds it asleep pays for the system call, a write to the consumer's eventfd.

#![expect(unsafe_code, reason = "std does not make eventfds")]

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::uring::{self, Descriptor, Operation};

/// A queue of at most `capacity` values.
pub(crate) fn mailbox<T: Send>(capacity: usize) -> io::Result<(Sender<T>, Receiver<T>)> {
    let shared = Shared::new(capacity)?;
    Ok((Sender(shared.clone()), Receiver(shared)))
}

struct Shared<T> {
    queue: ArrayQueue<T>,
    /// The consumer waits for its eventfd, or is about to.
    asleep: CachePadded<AtomicBool>,
    senders: AtomicUsize,
    receiver_gone: AtomicBool,
    eventfd: File,
}

impl<T> Shared<T> {
    fn new(capacity: usize) -> io::Result<Arc<Self>> {
        // SAFETY: eventfd takes no pointers.
        let number = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours alone.
        let eventfd = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(Arc::new(Self {
            queue: ArrayQueue::new(capacity),
            asleep: CachePadded::new(AtomicBool::new(false)),
            senders: AtomicUsize::new(1),
            receiver_gone: AtomicBool::new(false),
            eventfd: eventfd.into(),
        }))
    }

    /// Called after a push, or after the last sender has gone.
    fn wake_if_asleep(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            // The counter can't be full: only who finds the consumer asleep writes, once for each sleep.
            let _ = (&self.eventfd).write(&1_u64.to_ne_bytes());
        }
    }

    /// Whether there is nothing left to do but sleep. Declares so before the second look.
    fn falls_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.queue.is_empty() && !self.has_ended() {
            return true;
        }
        self.asleep.store(false, Ordering::Relaxed);
        false
    }

    /// No sender is left, so that an empty queue stays empty. Senders go after their last push.
    fn has_ended(&self) -> bool {
        self.senders.load(Ordering::Acquire) == 0
    }

    fn take(&self, into: &mut Vec<T>, max: usize) -> usize {
        let before = into.len();
        while into.len() - before < max {
            let Some(value) = self.queue.pop() else { break };
            into.push(value);
        }
        into.len() - before
    }
}

/// The sending end. Clones send to the same consumer.
pub(crate) struct Sender<T>(Arc<Shared<T>>);

impl<T: Send> Sender<T> {
    /// Hands `value` over, or gives it back when the queue is full or the receiver is gone. Never blocks.
    pub(crate) fn send(&self, value: T) -> Result<(), Full<T>> {
        self.send_quietly(value)?;
        self.wake();
        Ok(())
    }

    /// As [`Self::send`], but a consumer that sleeps sleeps on until someone wakes it: [`Self::wake`] must follow.
    pub(crate) fn send_quietly(&self, value: T) -> Result<(), Full<T>> {
        if self.is_closed() {
            return Err(Full(value));
        }
        self.0.queue.push(value).map_err(Full)
    }

    pub(crate) fn wake(&self) {
        self.0.wake_if_asleep();
    }

    /// Whether the receiver is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.receiver_gone.load(Ordering::Acquire)
    }

    /// How many values would fit now; other senders may take the room.
    #[cfg(test)]
    pub(crate) fn free_slots(&self) -> usize {
        self.0.queue.capacity() - self.0.queue.len()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.wake_if_asleep();
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sender({}/{})", self.0.queue.len(), self.0.queue.capacity())
    }
}

/// The value that a full queue gave back.
pub(crate) struct Full<T>(pub(crate) T);

impl<T> fmt::Debug for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Full")
    }
}

/// The receiving end, not yet at its thread. Dropping any receiving end closes the mailbox.
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

impl<T> Receiver<T> {
    /// Receives on this shard.
    pub(crate) fn on_shard(self) -> io::Result<ShardReceiver<T>> {
        let eventfd = Rc::new(self.0.eventfd.try_clone()?.into());
        Ok(ShardReceiver { inbox: self, eventfd, read: None })
    }

    /// Receives on the ordinary tokio runtime that the caller is in.
    pub(crate) fn on_control(self) -> io::Result<ControlReceiver<T>> {
        let eventfd = self.0.eventfd.try_clone()?;
        // SAFETY: fcntl takes no pointers here.
        let result = unsafe { libc::fcntl(eventfd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a `File` owns its descriptor and keeps the same one until it is dropped.
        let eventfd = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE)? };
        Ok(ControlReceiver { inbox: self, eventfd })
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.receiver_gone.store(true, Ordering::Release);
        while self.0.queue.pop().is_some() {}
    }
}

/// The receiving end on a shard.
pub(crate) struct ShardReceiver<T> {
    inbox: Receiver<T>,
    /// A duplicate that ring operations own.
    eventfd: Descriptor,
    /// A wait in flight stays here when [`ShardReceiver::recv_batch`] is dropped; the next call continues it.
    read: Option<Operation<(Descriptor, Box<[u8; 8]>)>>,
}

impl<T> ShardReceiver<T> {
    /// Waits for values and appends at most `max` of them; returns how many. 0: all senders are gone, or the wait was
    /// cancelled because the shard ends. May be dropped and called again without loss.
    pub(crate) async fn recv_batch(&mut self, into: &mut Vec<T>, max: usize) -> usize {
        loop {
            let ended = self.inbox.0.has_ended();
            let taken = self.inbox.0.take(into, max);
            if taken > 0 || ended {
                return taken;
            }
            if self.inbox.0.falls_asleep() && self.woken().await.is_err() {
                return 0;
            }
        }
    }

    /// A read that ends early only leads to one more look into the queue.
    async fn woken(&mut self) -> io::Result<()> {
        let operation = self.read.get_or_insert_with(|| uring::read_counter(self.eventfd.clone()));
        let (result, _) = operation.await;
        self.read = None;
        match result {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

/// The receiving end on an ordinary tokio runtime.
pub(crate) struct ControlReceiver<T> {
    inbox: Receiver<T>,
    eventfd: AsyncFd<File>,
}

impl<T> ControlReceiver<T> {
    /// As [`ShardReceiver::recv_batch`].
    pub(crate) async fn recv_batch(&mut self, into: &mut Vec<T>, max: usize) -> usize {
        loop {
            let ended = self.inbox.0.has_ended();
            let taken = self.inbox.0.take(into, max);
            if taken > 0 || ended {
                return taken;
            }
            if self.inbox.0.falls_asleep() && self.woken().await.is_err() {
                return 0;
            }
        }
    }

    async fn woken(&mut self) -> io::Result<()> {
        let mut ready = self.eventfd.readable().await?;
        match ready.try_io(|eventfd| eventfd.get_ref().read(&mut [0; 8])) {
            Ok(Err(error)) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::future::{self, Future};
    use std::thread;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const PRODUCERS: usize = 3;
    const EACH: usize = 30_000;

    fn on_control<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    /// Several producers that pause now and then, so that the consumer falls asleep often.
    fn produce(sender: &Sender<(usize, usize)>) -> Vec<thread::JoinHandle<()>> {
        let produce = |producer| {
            let sender = sender.clone();
            thread::spawn(move || {
                for number in 0..EACH {
                    let mut value = (producer, number);
                    while let Err(Full(back)) = sender.send(value) {
                        value = back;
                        thread::yield_now();
                    }
                    if number % 7 == producer {
                        thread::yield_now();
                    }
                }
            })
        };
        (0..PRODUCERS).map(produce).collect()
    }

    /// Every value once, in order per producer.
    fn check(values: &[(usize, usize)]) {
        let mut next = HashMap::new();
        for (producer, number) in values {
            let expected = next.entry(producer).or_insert(0);
            assert_eq!(number, expected);
            *expected += 1;
        }
        assert_eq!(values.len(), PRODUCERS * EACH);
    }

    #[test]
    fn no_wakeup_is_lost_on_a_shard() {
        let (sender, receiver) = mailbox(64).unwrap();
        let producers = produce(&sender);
        drop(sender);
        let values = uring::run_shard("test", async move {
            let mut receiver = receiver.on_shard().unwrap();
            let mut values = Vec::new();
            while timeout(STUCK, receiver.recv_batch(&mut values, 16)).await.expect("a wakeup was lost") > 0 {}
            values
        })
        .unwrap();
        check(&values);
        producers.into_iter().for_each(|producer| producer.join().unwrap());
    }

    #[test]
    fn no_wakeup_is_lost_on_control() {
        let (sender, receiver) = mailbox(64).unwrap();
        let producers = produce(&sender);
        drop(sender);
        let values = on_control(async move {
            let mut receiver = receiver.on_control().unwrap();
            let mut values = Vec::new();
            while timeout(STUCK, receiver.recv_batch(&mut values, 16)).await.expect("a wakeup was lost") > 0 {}
            values
        });
        check(&values);
        producers.into_iter().for_each(|producer| producer.join().unwrap());
    }

    /// Ping-pong between two shards: each step sleeps, so each needs its wakeup.
    #[test]
    fn two_shards_wake_each_other() {
        let (to_echo, at_echo) = mailbox::<u32>(4).unwrap();
        let (to_us, at_us) = mailbox::<u32>(4).unwrap();
        let echo = thread::spawn(move || {
            uring::run_shard("echo", async move {
                let (mut at_echo, mut batch) = (at_echo.on_shard().unwrap(), Vec::new());
                while at_echo.recv_batch(&mut batch, 4).await > 0 {
                    for value in batch.drain(..) {
                        to_us.send(value).unwrap();
                    }
                }
            })
        });
        uring::run_shard("us", async move {
            let (mut at_us, mut batch) = (at_us.on_shard().unwrap(), Vec::new());
            for value in 0..5_000 {
                to_echo.send(value).unwrap();
                assert_eq!(timeout(STUCK, at_us.recv_batch(&mut batch, 4)).await, Ok(1));
                assert_eq!(batch.pop(), Some(value));
            }
        })
        .unwrap();
        echo.join().unwrap().unwrap();
    }

    /// The race that the fences are for, step by step: something comes after the last look and before the declaration.
    #[test]
    fn who_falls_asleep_looks_once_more() {
        let (sender, receiver) = mailbox(4).unwrap();
        let shared = &receiver.0;
        assert!(shared.falls_asleep());
        shared.wake_if_asleep();
        assert!(!shared.asleep.load(Ordering::Relaxed), "woken once");
        sender.send(1).unwrap();
        assert!(!shared.falls_asleep(), "a value is there");
        assert!(!shared.asleep.load(Ordering::Relaxed), "a sender need not wake who is awake");
        assert_eq!(shared.queue.pop(), Some(1));
        drop(sender);
        assert!(!shared.falls_asleep(), "nobody is left to wake it");
    }

    /// What is sent quietly wakes nobody, whoever is awake finds it, and one wake-up serves all of it.
    #[test]
    fn who_sleeps_sleeps_on_until_it_is_woken() {
        let (sender, receiver) = mailbox::<u8>(4).unwrap();
        uring::run_shard("test", async move {
            let mut receiver = receiver.on_shard().unwrap();
            let mut values = Vec::new();
            timeout(Duration::ZERO, receiver.recv_batch(&mut values, 4)).await.expect_err("it sleeps now");
            sender.send_quietly(1).unwrap();
            sender.send_quietly(2).unwrap();
            assert!(sender.0.asleep.load(Ordering::Relaxed), "nobody woke it");
            sender.wake();
            assert!(!sender.0.asleep.load(Ordering::Relaxed));
            assert_eq!(timeout(STUCK, receiver.recv_batch(&mut values, 4)).await, Ok(2));
            sender.send_quietly(3).unwrap();
            assert_eq!(timeout(STUCK, receiver.recv_batch(&mut values, 4)).await, Ok(1), "it looks before it sleeps");
            assert_eq!(values, [1, 2, 3]);
        })
        .unwrap();
    }

    #[test]
    fn an_idle_consumer_sleeps_instead_of_spinning() {
        let (sender, receiver) = mailbox::<u8>(4).unwrap();
        uring::run_shard("test", async move {
            let mut receiver = receiver.on_shard().unwrap();
            let mut values = Vec::new();
            let mut polls = 0;
            let mut wait = Box::pin(receiver.recv_batch(&mut values, 4));
            let counted = future::poll_fn(|context| {
                polls += 1;
                wait.as_mut().poll(context)
            });
            timeout(Duration::from_millis(50), counted).await.expect_err("nothing was sent");
            assert!(polls <= 2, "{polls} polls while idle");
            drop(wait);
            drop(sender);
            assert_eq!(receiver.recv_batch(&mut values, 4).await, 0);
        })
        .unwrap();
    }

    /// Trap: a dropped wait must neither lose values nor leave a second read on the ring.
    #[test]
    fn a_dropped_wait_is_continued() {
        let (sender, receiver) = mailbox::<usize>(4).unwrap();
        uring::run_shard("test", async move {
            let mut receiver = receiver.on_shard().unwrap();
            let mut values = Vec::new();
            for number in 0..50 {
                for _ in 0..2 {
                    let mut wait = Box::pin(receiver.recv_batch(&mut values, 4));
                    future::poll_fn(|context| {
                        assert!(wait.as_mut().poll(context).is_pending());
                        std::task::Poll::Ready(())
                    })
                    .await;
                }
                assert!(uring::operations_in_flight() <= 1);
                sender.send(number).unwrap();
                assert_eq!(timeout(STUCK, receiver.recv_batch(&mut values, 4)).await, Ok(1));
            }
            assert_eq!(values, (0..50).collect::<Vec<_>>());
        })
        .unwrap();
    }

    #[test]
    fn a_full_mailbox_gives_the_value_back() {
        let (sender, receiver) = mailbox(2).unwrap();
        assert_eq!(sender.free_slots(), 2);
        sender.send(1).unwrap();
        sender.send(2).unwrap();
        let Err(Full(back)) = sender.send(3) else { panic!("it was full") };
        assert_eq!((back, sender.free_slots()), (3, 0));
        on_control(async {
            let mut receiver = receiver.on_control().unwrap();
            let mut values = Vec::new();
            assert_eq!(receiver.inbox.0.take(&mut values, 1), 1);
            sender.send(4).unwrap();
            assert_eq!(receiver.recv_batch(&mut values, 8).await, 2);
            assert_eq!(values, [1, 2, 4]);
        });
        assert!(sender.is_closed());
        assert!(sender.send(5).is_err());
    }

    #[test]
    fn values_left_behind_are_dropped_with_the_receiver() {
        let (sender, receiver) = mailbox(2).unwrap();
        let value = Arc::new(());
        sender.send(value.clone()).unwrap();
        drop(receiver);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    const STUCK: Duration = Duration::from_secs(20);
}
