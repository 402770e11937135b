//! As much of HTTP as asking the admin API takes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use super::PATIENCE;

/// Status and body.
pub(crate) fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    ask(address, &format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n"))
}

/// The same for a JSON body that is sent.
pub(crate) fn post(address: SocketAddr, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\n");
    ask(address, &format!("{head}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"))
}

fn ask(address: SocketAddr, request: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // HTTP/1.0: the body ends with the connection, never in chunks.
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| std::io::Error::other("no HTTP answer"))?;
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| std::io::Error::other("no HTTP status"))?, body.to_owned()))
}

/// A good answer's JSON.
pub(crate) fn json(address: SocketAddr, path: &str) -> Value {
    let (status, body) = get(address, path).unwrap_or_else(|error| panic!("GET {path}: {error}"));
    assert_eq!(status, 200, "GET {path}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("GET {path}: {error}: {body}"))
}

/// The rows of `GET /api/admin/messages/v1` that fit a query such as `recipient=a@b.test`.
pub(crate) fn messages(address: SocketAddr, query: &str) -> Vec<Value> {
    let answer = json(address, &format!("/api/admin/messages/v1?{query}"));
    answer["messages"].as_array().expect("a list of messages").clone()
}
