//! Where a peer is connected to: an address and a port, or a socket in the file system.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

/// Small enough to be copied, also where it is a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Endpoint {
    Ip(SocketAddr),
    Unix(UnixPath),
}

impl Endpoint {
    pub fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    pub fn as_socket(&self) -> Option<SocketAddr> {
        match *self {
            Self::Ip(address) => Some(address),
            Self::Unix(_) => None,
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// The path of a socket: UTF-8 without NUL, of 1 to [`UnixPath::OCTETS_MAX`] octets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnixPath {
    octets: [u8; Self::OCTETS_MAX],
    length: u8,
}

impl UnixPath {
    /// `sun_path` has 108 octets on Linux, of which the last is NUL (unix(7)).
    pub const OCTETS_MAX: usize = 107;

    /// None where it is empty, too long, or has a NUL.
    pub fn new(path: &str) -> Option<Self> {
        if path.is_empty() || path.len() > Self::OCTETS_MAX || path.contains('\0') {
            return None;
        }
        let mut octets = [0; Self::OCTETS_MAX];
        octets[..path.len()].copy_from_slice(path.as_bytes());
        Some(Self { octets, length: path.len() as u8 })
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.octets[..usize::from(self.length)]).expect("it was made of a str")
    }

    pub fn as_path(&self) -> &Path {
        Path::new(self.as_str())
    }
}

impl fmt::Debug for UnixPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

impl fmt::Display for UnixPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_fits_comes_out_as_it_went_in() {
        let longest = format!("/{}", "x".repeat(UnixPath::OCTETS_MAX - 1));
        for path in ["/run/lmtp", "/ü", longest.as_str()] {
            assert_eq!(UnixPath::new(path).unwrap().as_str(), path);
        }
        assert!(UnixPath::new("").is_none() && UnixPath::new("/a\0").is_none());
        assert!(UnixPath::new(&format!("{longest}x")).is_none());
        assert_eq!(Endpoint::Unix(UnixPath::new("/run/lmtp").unwrap()).to_string(), "unix:/run/lmtp");
    }
}
