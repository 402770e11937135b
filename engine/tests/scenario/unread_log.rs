//! Whoever reads the engine's log stands still: mail and answers go on.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{http, poll};

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn the_engine_goes_on_while_nobody_reads_its_log() {
    let directory = tempfile::tempdir().unwrap();
    let (smtp, address) = (free_address(), free_address());
    let listener =
        |protocol: &str, at: SocketAddr| format!("[[listener]]\nprotocol = \"{protocol}\"\naddress = \"{at}\"\n");
    let config = format!(
        "hostname = \"mta.test\"\nshards = 1\n{}{}[spool]\nallow_filesystem = true\n\
         [[route]]\ndomain = \"*\"\nto = [\"discard\"]\n",
        listener("smtp", smtp),
        listener("http", address),
    );
    let file = directory.path().join("postrider.toml");
    fs::write(&file, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_postrider"));
    command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    poll("it serves", || http::get(address, "/api/check-readiness/v1").ok().filter(|(status, _)| *status == 200));
    // Its pipe is filled up to the last octet, and stays so.
    let log = running.0.stderr.take().unwrap();
    let mut writer = OpenOptions::new().write(true).open(format!("/proc/{}/fd/2", running.0.id())).unwrap();
    let is_read = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&is_read);
    std::thread::spawn(move || while !ends.load(Ordering::Relaxed) && writer.write_all(&[b'x'; 512]).is_ok() {});
    // Each is another, and so another line.
    let mut tenants = 0;
    let mut suspend = || {
        tenants += 1;
        let body = format!("{{\"tenant\":\"t{tenants}\",\"reason\":\"is logged\"}}");
        http::post(address, "/api/admin/suspend/v1", &body)
    };
    for _ in 0..200 {
        let (status, answer) = suspend().expect("it answers");
        assert_eq!(status, 200, "{answer}");
    }
    let mut client = TcpStream::connect(smtp).unwrap();
    client.set_read_timeout(Some(crate::support::PATIENCE)).unwrap();
    let dialog = "EHLO c\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\nSubject: x\r\n\r\nx\r\n.\r\n";
    client.write_all(dialog.as_bytes()).unwrap();
    let taken = BufReader::new(&client).lines().map_while(Result::ok).any(|line| line.contains("OK id="));
    assert!(taken);
    // Read again, it says what is missing.
    is_read.store(true, Ordering::Relaxed);
    let mut lines = BufReader::new(log).split(b'\n').map_while(Result::ok);
    let (sender, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let lost = |line: &Vec<u8>| String::from_utf8_lossy(line).contains("lines are lost");
        let _ = sender.send(lines.any(|line| lost(&line)));
        lines.for_each(drop);
    });
    let told = poll("the lost lines are told", || {
        suspend().expect("it answers");
        told.try_recv().ok()
    });
    assert!(told);
}
