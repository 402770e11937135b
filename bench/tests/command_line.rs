//! The `postbench` commands as a user runs them.

#![expect(clippy::unwrap_used, reason = "clippy takes only the test functions themselves for tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;

use rustls::DigitallySignedStruct;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::Value;

const POSTBENCH: &str = env!("CARGO_BIN_EXE_postbench");

/// A sink process on a free port.
struct SinkProcess {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: SocketAddr,
}

impl SinkProcess {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(POSTBENCH);
        command.args(["sink", "--listen", "127.0.0.1:0", "--quiet"]).args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap().parse().unwrap();
        Self { child, stderr, address }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    fn finish(mut self) -> Value {
        let mut json = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut json).unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&json).unwrap()
    }
}

fn inject(to: SocketAddr, arguments: &[&str]) -> (bool, Value) {
    let mut command = Command::new(POSTBENCH);
    command.args(["inject", &to.to_string(), "--json", "--sessions", "3"]).args(arguments);
    let output = command.output().unwrap();
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_sink_ends_when_it_has_what_it_expects() {
    let sink = SinkProcess::start(&["--expect", "60"]);
    let (success, injected) = inject(sink.address, &["--messages", "60"]);
    assert!(success);
    assert_eq!(injected["accepted"], 60);
    assert_eq!(injected["accept"]["count"], 60);
    let report = sink.finish();
    assert_eq!(report["messages"], 60);
    assert_eq!(report["duplicates"], 0);
    assert_eq!(report["connections"], 3);
    assert_eq!(report["peers"]["127.0.0.1"]["ehlo"]["postbench.test"], 3);
}

#[test]
fn a_sink_refuses_until_told_otherwise() {
    let mut sink = SinkProcess::start(&["--reply-rcpt", "451 4.2.1 busy"]);
    let (success, injected) = inject(sink.address, &["--messages", "5"]);
    assert!(!success);
    assert_eq!(injected["refused"], 5);
    assert_eq!(injected["trouble"], "451 4.2.1 busy");
    sink.signal("-USR1");
    let mut line = String::new();
    sink.stderr.read_line(&mut line).unwrap();
    assert_eq!(line, "refusing no more\n");
    let (success, injected) = inject(sink.address, &["--messages", "5"]);
    assert!(success);
    assert_eq!(injected["accepted"], 5);
    sink.signal("-TERM");
    let report = sink.finish();
    assert_eq!(report["messages"], 5);
    assert_eq!(report["refused"]["rcpt"], 5);
}

#[test]
fn a_dumped_message_is_what_was_sent() {
    let directory = tempfile::tempdir().unwrap();
    let sink = SinkProcess::start(&["--dump", directory.path().to_str().unwrap(), "--expect", "1"]);
    let mut session = b"EHLO me\r\nMAIL FROM:<a@b> BODY=8BITMIME\r\nRCPT TO:<c@d>\r\nDATA\r\n".to_vec();
    session.extend_from_slice(b"X: y\r\n\r\n..\r\n\xff\r\n.\r\nQUIT\r\n");
    let mut stream = TcpStream::connect(sink.address).unwrap();
    stream.write_all(&session).unwrap();
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    assert!(replies.contains("354 ") && replies.ends_with("221 2.0.0 Bye\r\n"), "{replies}");
    sink.finish();
    assert_eq!(std::fs::read(directory.path().join("00000001.eml")).unwrap(), b"X: y\r\n\r\n.\r\n\xff\r\n");
    let envelope = std::fs::read_to_string(directory.path().join("00000001.json")).unwrap();
    let envelope: Value = serde_json::from_str(&envelope).unwrap();
    assert_eq!(envelope["mail"], "<a@b> BODY=8BITMIME");
    assert_eq!(envelope["rcpt"][0], "<c@d>");
    assert_eq!(envelope["ehlo"], "me");
}

/// Speaks to a sink in clear, and then in TLS.
#[test]
fn a_sink_takes_mail_by_starttls() {
    let sink = SinkProcess::start(&["--tls", "--expect", "1"]);
    let mut stream = TcpStream::connect(sink.address).unwrap();
    stream.write_all(b"EHLO me\r\nSTARTTLS\r\n").unwrap();
    let mut replies = String::new();
    while !replies.contains("220 2.0.0") {
        let mut octet = [0];
        stream.read_exact(&mut octet).unwrap();
        replies.push(octet[0].into());
    }
    assert!(replies.contains("250-STARTTLS\r\n"), "{replies}");
    stream.read_exact(&mut vec![0; "Go ahead\r\n".len() + 1]).unwrap();

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let name = "postbench.test".try_into().unwrap();
    let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut tls = rustls::StreamOwned::new(connection, stream);
    tls.write_all(b"EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nX: y\r\n\r\nz\r\n.\r\nQUIT\r\n").unwrap();
    let mut replies = Vec::new();
    // It closes without close_notify, which rustls makes an error.
    let _ = tls.read_to_end(&mut replies);
    let replies = String::from_utf8(replies).unwrap();
    assert!(!replies.contains("STARTTLS") && replies.ends_with("221 2.0.0 Bye\r\n"), "{replies}");
    let report = sink.finish();
    assert_eq!(report["messages"], 1);
    assert_eq!(report["tls"]["TLSv1_3 full"], 1);
    assert_eq!(report["tls_failed"], 0);
}

/// Takes what the sink shows; its signatures have to be right.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn a_greylisted_message_is_taken_later() {
    let sink = SinkProcess::start(&["--greylist", "100ms", "--expect", "1"]);
    let mut stream = BufReader::new(TcpStream::connect(sink.address).unwrap());
    let mut ask = |command: &str| {
        stream.get_mut().write_all(command.as_bytes()).unwrap();
        let mut line = String::new();
        while line.as_bytes().get(3) != Some(&b' ') {
            line.clear();
            stream.read_line(&mut line).unwrap();
        }
        line
    };
    let mut put_off = 0;
    assert!(ask("").starts_with("220 "));
    assert!(ask("EHLO me\r\n").starts_with("250 "));
    while ask("MAIL FROM:<a@b>\r\n").starts_with("250 ") {
        let answer = ask("RCPT TO:<c@d>\r\n");
        if answer.starts_with("250 ") {
            break;
        }
        assert_eq!(answer, "450 4.2.0 greylisted, try again later\r\n");
        put_off += 1;
        assert!(ask("RSET\r\n").starts_with("250 "));
    }
    assert!(ask("DATA\r\n").starts_with("354 "));
    assert!(ask("X: y\r\n\r\n.\r\n").starts_with("250 "));
    drop(stream);
    let report = sink.finish();
    assert_eq!(report["messages"], 1);
    assert_eq!(report["greylisted"], put_off);
    assert!(put_off > 0);
}

#[test]
fn a_missing_signature_is_exit_code_1() {
    let record = "x._domainkey.sender.test=v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
    let mut sink = SinkProcess::start(&["--dkim-record", record, "--dkim-sample", "100", "--expect", "5"]);
    let (success, _) = inject(sink.address, &["--messages", "5"]);
    assert!(success);
    let mut json = String::new();
    sink.child.stdout.take().unwrap().read_to_string(&mut json).unwrap();
    assert_eq!(sink.child.wait().unwrap().code(), Some(1));
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["dkim"]["failed"], 5);
    assert_eq!(report["dkim"]["failure"], "a message has no signature x");
}

#[test]
fn mistakes_on_the_command_line_are_exit_code_2() {
    let exit_code = |arguments: &[&str]| {
        let output = Command::new(POSTBENCH).args(arguments).output().unwrap();
        assert!(!output.stderr.is_empty(), "{arguments:?}");
        output.status.code()
    };
    assert_eq!(exit_code(&["inject", "--size", "2 parsecs"]), Some(2));
    assert_eq!(exit_code(&["sink", "--listen", "nowhere"]), Some(2));
    assert_eq!(exit_code(&["sink", "--reply-rcpt", "busy"]), Some(2));
    assert_eq!(exit_code(&["sink", "--reply-rcpt", "60%:451 a", "--reply-rcpt", "50%:452 b"]), Some(2));
    assert_eq!(exit_code(&["sink", "--dkim-record", "nothing"]), Some(2));
    assert_eq!(exit_code(&["relay", "--injector", "smtp-source:/no/such/file"]), Some(2));
    assert_eq!(exit_code(&["relay", "--engine", "/no/such/engine"]), Some(1));
}
