//! Sockets before they get onto a ring, and what the machine allows us: descriptors, CPUs, addresses.

#![expect(unsafe_code, reason = "a socket option and calls that std and socket2 do not offer")]

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, Socket, Type};

use super::cgroup;
use crate::limits::LISTEN_BACKLOG;
use crate::mail::endpoint::Endpoint;

/// Listens on `address`. The error's text names the address and what to do.
pub(crate) fn bind_listener(address: SocketAddr) -> io::Result<TcpListener> {
    try_bind(address).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AddrInUse => "another process listens there; stop it or choose another port",
            io::ErrorKind::PermissionDenied if address.port() < 1024 => {
                "ports below 1024 need the capability CAP_NET_BIND_SERVICE (AmbientCapabilities= under systemd)"
            }
            io::ErrorKind::AddrNotAvailable => "this machine does not have that address",
            _ => return io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")),
        };
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}: {advice}"))
    })
}

fn try_bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of a former process in TIME_WAIT must not keep us from starting.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Otherwise "[::]:25" and "0.0.0.0:25" could not both be configured.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok(socket.into())
}

/// Makes a stream socket, bound to `source` where given, ready to be connected to `to`. A Unix socket has no source.
pub(crate) fn open_stream(source: Option<IpAddr>, freebind: bool, to: Endpoint) -> io::Result<Socket> {
    let Endpoint::Ip(to) = to else { return Socket::new(Domain::UNIX, Type::STREAM, None) };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    let Some(source) = source else { return Ok(socket) };
    if source.is_ipv4() != to.is_ipv4() {
        let text = format!("source address {source} can't reach {to}: IPv4 and IPv6 don't mix");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    set_bind_address_no_port(&socket)?;
    if freebind {
        match source {
            IpAddr::V4(_) => socket.set_freebind_v4(true)?,
            IpAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
    }
    socket.bind(&SocketAddr::new(source, 0).into())?;
    Ok(socket)
}

/// Lets bind(2) leave the port to connect(2), which may use one port for many peers. Without it one source address has
/// no more than some 28,000 connections to the whole world.
fn set_bind_address_no_port(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the option's value is a c_int, given with its own length; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            length,
        )
    };
    check(result).map(|_| ())
}

/// The bound on open descriptors: now, and what it may be raised to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FdLimit {
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// Raises the soft limit of open descriptors to the hard limit and returns both.
pub(crate) fn raise_fd_limit() -> io::Result<FdLimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole rlimit.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    }
    Ok(FdLimit { soft: limit.rlim_cur, hard: limit.rlim_max })
}

/// Above the limit of a file's size (RLIMIT_FSIZE) a write fails, as on a full disk, instead of a signal ending the
/// process without a word. Who handles the signal already goes on doing so.
pub(crate) fn survive_file_size_limit() -> io::Result<()> {
    // SAFETY: zeroes are a sigaction.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: the pointer is to a whole sigaction, and nothing is set.
    check(unsafe { libc::sigaction(libc::SIGXFSZ, std::ptr::null(), &raw mut action) })?;
    if action.sa_sigaction == libc::SIG_DFL {
        action.sa_sigaction = libc::SIG_IGN;
        // SAFETY: as above, and nothing runs where a signal is ignored.
        check(unsafe { libc::sigaction(libc::SIGXFSZ, &raw const action, std::ptr::null_mut()) })?;
    }
    Ok(())
}

/// The CPUs that this process may use: its affinity mask, and no more of them than its cgroup's quota pays for.
/// Never empty.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let mut cpus = affinity_mask().unwrap_or_default();
    if cpus.is_empty() {
        cpus.push(0);
    }
    if let Some(quota) = cgroup::cpus() {
        cpus.truncate(quota.max(1));
    }
    cpus
}

fn affinity_mask() -> io::Result<Vec<usize>> {
    // SAFETY: a cpu_set_t of zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the pointer is to a whole cpu_set_t of the size given; 0 is the calling thread.
    check(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) })?;
    let numbers = 0..libc::CPU_SETSIZE as usize;
    // SAFETY: the numbers are below CPU_SETSIZE.
    Ok(numbers.filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect())
}

/// Binds the calling thread to one CPU.
pub(crate) fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no CPU can have the number {cpu}")));
    }
    // SAFETY: a cpu_set_t of zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the number is below CPU_SETSIZE.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer is to a whole cpu_set_t of the size given; 0 is the calling thread.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) }).map(|_| ())
}

/// Whether the machine has this address, so that a socket may be bound to it.
pub(crate) fn is_local_address(address: IpAddr) -> bool {
    if address == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || address == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        return true;
    }
    let address = SocketAddr::new(address, 0);
    // A datagram socket takes no TCP port while we look.
    Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .and_then(|socket| socket.bind(&address.into()))
        .is_ok()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::TcpStream;

    use super::*;

    fn loopback(last: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))
    }

    #[test]
    fn a_port_in_use_is_named_with_advice() {
        let first = bind_listener(SocketAddr::new(loopback(1), 0)).unwrap();
        let address = first.local_addr().unwrap();
        let error = bind_listener(address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let text = error.to_string();
        assert!(text.contains(&address.to_string()) && text.contains("another process"), "{text}");
    }

    #[test]
    fn an_address_of_another_machine_is_named() {
        let error = bind_listener("192.0.2.1:2525".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("does not have that address"), "{error}");
    }

    #[test]
    fn a_listener_may_be_bound_again_at_once_after_connections_were_closed_by_it() {
        let listener = bind_listener(SocketAddr::new(loopback(1), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        drop(listener.accept().unwrap());
        drop(client);
        drop(listener);
        bind_listener(address).unwrap();
    }

    /// Trap: bind(2) of port 0 takes an ephemeral port for good, unless IP_BIND_ADDRESS_NO_PORT delays that to connect.
    #[test]
    fn binding_takes_no_port() {
        let to = SocketAddr::new(loopback(1), 25);
        let sockets: Vec<_> = (0..64).map(|_| open_stream(Some(loopback(12)), false, to.into()).unwrap()).collect();
        for socket in &sockets {
            let bound = socket.local_addr().unwrap().as_socket().unwrap();
            assert_eq!(bound, SocketAddr::new(loopback(12), 0), "bound to the source, no port chosen yet");
        }
    }

    #[test]
    fn one_port_of_a_source_serves_several_peers() {
        // The ephemeral range can't be narrowed here, so ports are counted: bound without a port, two connections to
        // different peers may share one; the kernel then chooses at connect(2), which is all that we can see.
        let listener = bind_listener(SocketAddr::new(loopback(1), 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let sockets: Vec<_> = (0..16).map(|_| open_stream(Some(loopback(12)), false, to.into()).unwrap()).collect();
        let mut ports = HashSet::new();
        for socket in &sockets {
            socket.connect(&to.into()).unwrap();
            let local = socket.local_addr().unwrap().as_socket().unwrap();
            assert_eq!(local.ip(), loopback(12));
            assert!(ports.insert(local.port()));
        }
    }

    #[test]
    fn freebind_takes_an_address_that_is_not_here() {
        let (absent, to) = ("192.0.2.9".parse().unwrap(), Endpoint::Ip("192.0.2.10:25".parse().unwrap()));
        let error = open_stream(Some(absent), false, to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
        assert!(open_stream(Some(absent), true, to).is_ok());
    }

    #[test]
    fn families_do_not_mix() {
        let error = open_stream(Some(loopback(1)), false, Endpoint::Ip("[::1]:25".parse().unwrap())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn local_addresses_are_known() {
        assert!(is_local_address(loopback(1)));
        assert!(is_local_address(loopback(77)));
        assert!(!is_local_address("192.0.2.1".parse().unwrap()));
    }

    #[test]
    fn the_descriptor_limit_is_raised_to_the_hard_one() {
        let limit = raise_fd_limit().unwrap();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(raise_fd_limit().unwrap(), limit);
    }

    #[test]
    fn cpus_are_those_of_the_mask() {
        let cpus = allowed_cpus();
        assert!(!cpus.is_empty());
        let last = *cpus.last().unwrap();
        std::thread::spawn(move || {
            pin_to_cpu(last).unwrap();
            assert_eq!(affinity_mask().unwrap(), [last]);
        })
        .join()
        .unwrap();
        assert!(pin_to_cpu(1 << 20).is_err());
    }
}
