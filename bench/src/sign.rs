//! What signing and outbound TLS cost an engine a message, beside what a bare signature and a bare handshake cost on
//! the same machine in the same run.
//!
//! Each round measures the bare operations and then relays the same load unsigned, signed with RSA-2048, and signed
//! with Ed25519, each with delivery in clear and in TLS. What a kind of signature costs beyond the unsigned case, by
//! the bare signature, tells how much of it is hashing, canonicalisation and a second pass over the message. Handshakes
//! are found from relays that open a connection for each message, in clear and in TLS.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{Ed25519KeyPair, RSA_PKCS1_SHA256};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, ServerConnection, SignatureScheme, version,
};
use serde_json::Value;

use crate::interrupt::Interrupt;
use crate::measure::this_thread_cpu;
use crate::peers::{Dkim, EngineOptions, OutboundTls};
use crate::relay::{RelayOptions, relay};
use crate::report::{Figures, note, rounds_json, table};
use crate::sink::tls::TlsIdentity;

#[derive(Debug, Clone)]
pub struct SignOptions {
    /// Its signing and TLS are set here, and its rounds are single ones.
    pub relay: RelayOptions,
    pub rounds: usize,
    /// Messages, each over a connection of its own, of the relays that handshakes are found from; 0 leaves them out.
    pub handshakes: u64,
    /// How long each bare operation is repeated.
    pub bare: Duration,
}

#[derive(Debug)]
pub struct SignReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
    complete: bool,
}

impl SignReport {
    /// Whether every relay delivered everything once, validly signed.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    pub fn to_json(&self) -> Value {
        rounds_json(&self.setup, &self.rounds)
    }

    pub fn to_table(&self) -> String {
        table(&self.rounds)
    }
}

/// A way to relay, with the names of its figures: CPU by message and, where wanted, its unit with the goal.
struct Case {
    dkim: Dkim,
    tls: OutboundTls,
    cpu: &'static str,
    cpu_unit: &'static str,
    rate: &'static str,
    rate_unit: &'static str,
}

pub fn sign(options: &SignOptions, interrupt: &Interrupt) -> Result<SignReport> {
    ensure!(options.rounds > 0, "at least one round is needed");
    ensure!(options.relay.smtp_sink.is_none(), "smtp-sink neither speaks TLS nor verifies signatures");
    let mut report = SignReport { rounds: Vec::new(), setup: Value::Null, complete: true };
    for number in 1..=options.rounds {
        let figures = round(options, number, interrupt, &mut report)?;
        if options.rounds > 1 {
            note(&format!("round {number} of {}: {}", options.rounds, figures.to_json()));
        }
        report.rounds.push(figures);
    }
    Ok(report)
}

fn round(options: &SignOptions, number: usize, interrupt: &Interrupt, report: &mut SignReport) -> Result<Figures> {
    let mut figures = Figures::default();
    figures.push("bare_rsa_us", "µs", bare_rsa(options.bare)?);
    figures.push("bare_ed25519_us", "µs", bare_ed25519(options.bare)?);
    // Each round begins with another case: a machine that speeds up or slows down meanwhile shall favour none.
    let mut found = Vec::new();
    for case in CASES.iter().cycle().skip(number - 1).take(CASES.len()) {
        let engine = EngineOptions { dkim: case.dkim, tls: Some(case.tls), ..options.relay.engine.clone() };
        let measured = one(&RelayOptions { engine, ..options.relay.clone() }, interrupt, report)?;
        let get = |name: &str| measured.get(name).with_context(|| format!("the relay found no {name}"));
        found.push((case.cpu, get("engine_cpu_us_per_message")?, get("delivered_per_second")?));
    }
    for case in &CASES {
        for (_, cpu, rate) in found.iter().filter(|(name, ..)| *name == case.cpu) {
            figures.push(case.cpu, case.cpu_unit, *cpu);
            figures.push(case.rate, case.rate_unit, *rate);
        }
    }
    let us = |name: &str| figures.get(name).unwrap_or_default();
    let beyond = |signed: &str, unsigned: &str, bare: &str| (us(signed) - us(unsigned)) / us(bare);
    let ratios = [
        ("rsa_beyond_unsigned_by_bare", beyond("rsa_us", "unsigned_us", "bare_rsa_us")),
        ("ed25519_beyond_unsigned_by_bare", beyond("ed25519_us", "unsigned_us", "bare_ed25519_us")),
        ("rsa_tls_beyond_unsigned_by_bare", beyond("rsa_tls_us", "unsigned_tls_us", "bare_rsa_us")),
        ("rsa_tls_by_bare", us("rsa_tls_us") / us("bare_rsa_us")),
    ];
    let tls_us = us("unsigned_tls_us") - us("unsigned_us");
    for (name, ratio) in ratios {
        figures.push(name, "", ratio);
    }
    figures.push("tls_beyond_clear_us", "µs", tls_us);
    if options.handshakes > 0 {
        handshakes(options, interrupt, report, &mut figures)?;
    }
    Ok(figures)
}

/// One relay, whose set-up stands for all in the report.
fn one(options: &RelayOptions, interrupt: &Interrupt, report: &mut SignReport) -> Result<Figures> {
    let relayed = relay(&RelayOptions { rounds: 1, ..options.clone() }, interrupt)?;
    report.complete &= relayed.is_complete();
    report.setup = relayed.setup;
    relayed.rounds.into_iter().next().context("a relay without a round")
}

fn handshakes(
    options: &SignOptions,
    interrupt: &Interrupt,
    report: &mut SignReport,
    figures: &mut Figures,
) -> Result<()> {
    let mut measured = |tls: OutboundTls, tls_resumption: bool| {
        let engine = EngineOptions {
            dkim: Dkim::None,
            tls: Some(tls),
            config_extra: format!("{}\n{ONE_DELIVERY}", options.relay.engine.config_extra),
            ..options.relay.engine.clone()
        };
        let relay = RelayOptions { engine, tls_resumption, messages: options.handshakes, ..options.relay.clone() };
        let figures = one(&relay, interrupt, report)?;
        let get = |name: &str| figures.get(name).unwrap_or_default();
        Ok::<_, anyhow::Error>((
            get("engine_cpu_us_per_message"),
            get("tls_handshakes_full"),
            get("tls_handshakes_resumed"),
        ))
    };
    let (clear_us, ..) = measured(OutboundTls::Disabled, true)?;
    let (full_us, full, none) = measured(OutboundTls::Required, false)?;
    ensure!(full > 0.0 && none == 0.0, "{none} handshakes were resumed though the sink gave no tickets");
    let (resumed_us, few, resumed) = measured(OutboundTls::Required, true)?;
    let bare_full = bare_handshake(options.bare, false)?;
    let bare_resumed = bare_handshake(options.bare, true)?;
    // The second kind of run has some full handshakes, too: those of the first connections.
    let resumed_share = resumed / (few + resumed).max(1.0);
    let full_cost = full_us - clear_us;
    let resumed_cost = (resumed_us - clear_us - (1.0 - resumed_share) * full_cost) / resumed_share.max(0.01);
    figures.push("connection_a_message_clear_us", "µs", clear_us);
    figures.push("handshake_full_us", "µs", full_cost);
    figures.push("bare_handshake_full_us", "µs", bare_full);
    figures.push("handshake_full_by_bare", "goal ≤ 1.2", full_cost / bare_full);
    figures.push("handshake_resumed_us", "µs", resumed_cost);
    figures.push("bare_handshake_resumed_us", "µs", bare_resumed);
    figures.push("handshake_resumed_by_bare", "goal ≤ 1.2", resumed_cost / bare_resumed);
    figures.push("handshakes_resumed_share", "", resumed_share);
    Ok(())
}

/// CPU time of one call in µs, of calls repeated for so long.
fn repeat(lasting: Duration, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    let (begun, before, mut calls) = (Instant::now(), this_thread_cpu(), 0u32);
    while begun.elapsed() < lasting || calls < CALLS_MIN {
        call()?;
        calls += 1;
    }
    Ok(this_thread_cpu().saturating_sub(before).as_secs_f64() * 1e6 / f64::from(calls))
}

/// RSASSA-PKCS1-v1_5 with SHA-256 over what a DKIM header hash covers, as `openssl speed rsa2048` does over less.
fn bare_rsa(lasting: Duration) -> Result<f64> {
    let pair = KeyPair::generate(KeySize::Rsa2048).map_err(|_| anyhow!("cannot make an RSA key"))?;
    let random = SystemRandom::new();
    let mut signature = vec![0; pair.public_modulus_len()];
    repeat(lasting, || {
        pair.sign(&RSA_PKCS1_SHA256, &random, &[b'h'; HEADER_BYTES], &mut signature)
            .map_err(|_| anyhow!("cannot sign with RSA"))
    })
}

fn bare_ed25519(lasting: Duration) -> Result<f64> {
    let pair = Ed25519KeyPair::generate().map_err(|_| anyhow!("cannot make an Ed25519 key"))?;
    // RFC 8463 §3: it signs the SHA-256 of the header, not the header.
    repeat(lasting, || {
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &[b'h'; HEADER_BYTES]);
        std::hint::black_box(pair.sign(hash.as_ref()));
        Ok(())
    })
}

/// Of a client that speaks TLS 1.3 with any certificate.
pub(crate) fn client_config(resumes: bool) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    config.resumption = if resumes { Resumption::in_memory_sessions(8) } else { Resumption::disabled() };
    Ok(Arc::new(config))
}

/// The client's side of a TLS 1.3 handshake in memory, as rustls' own bench takes it: time of the client's calls alone.
fn bare_handshake(lasting: Duration, resumed: bool) -> Result<f64> {
    let (config, identity) = (client_config(resumed)?, TlsIdentity::generate(resumed)?);
    let (mut spent, mut handshakes, mut wire) = (Duration::ZERO, 0u32, Vec::new());
    let begun = Instant::now();
    // The first one is full, and warms up.
    let mut first = true;
    while begun.elapsed() < lasting || handshakes < CALLS_MIN {
        let mut server = ServerConnection::new(identity.config().clone())?;
        let started = Instant::now();
        let mut client = ClientConnection::new(config.clone(), ServerName::try_from("postbench.test")?)?;
        let mut this = started.elapsed();
        while client.is_handshaking() || server.is_handshaking() || server.wants_write() {
            this += pass(&mut wire, |wire| {
                while client.wants_write() {
                    client.write_tls(wire)?;
                }
                Ok(())
            })?;
            let mut rest = &wire[..];
            while !rest.is_empty() {
                server.read_tls(&mut rest)?;
                server.process_new_packets()?;
            }
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire)?;
            }
            this += pass(&mut wire, |wire| {
                let mut rest = &wire[..];
                while !rest.is_empty() {
                    client.read_tls(&mut rest)?;
                    client.process_new_packets()?;
                }
                Ok(())
            })?;
            wire.clear();
        }
        let kind = client.handshake_kind();
        if !first && resumed != (kind == Some(HandshakeKind::Resumed)) {
            bail!("a bare handshake was {kind:?}");
        }
        if !first {
            spent += this;
            handshakes += 1;
        }
        first = false;
    }
    Ok(spent.as_secs_f64() * 1e6 / f64::from(handshakes))
}

fn pass(wire: &mut Vec<u8>, work: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Duration> {
    let begun = Instant::now();
    work(wire)?;
    Ok(begun.elapsed())
}

/// As an opportunistic client: any certificate, whose key has to have signed the handshake.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

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
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

const CASES: [Case; 6] = [
    Case {
        dkim: Dkim::None,
        tls: OutboundTls::Disabled,
        cpu: "unsigned_us",
        cpu_unit: "µs, goal ≤ 50",
        rate: "unsigned_delivered_per_second",
        rate_unit: "messages/s",
    },
    Case {
        dkim: Dkim::Rsa,
        tls: OutboundTls::Disabled,
        cpu: "rsa_us",
        cpu_unit: "µs, goal ≤ 300",
        rate: "rsa_delivered_per_second",
        rate_unit: "messages/s",
    },
    Case {
        dkim: Dkim::Ed25519,
        tls: OutboundTls::Disabled,
        cpu: "ed25519_us",
        cpu_unit: "µs, goal ≤ 65",
        rate: "ed25519_delivered_per_second",
        rate_unit: "messages/s, goal ≥ 11,574",
    },
    Case {
        dkim: Dkim::None,
        tls: OutboundTls::Required,
        cpu: "unsigned_tls_us",
        cpu_unit: "µs",
        rate: "unsigned_tls_delivered_per_second",
        rate_unit: "messages/s",
    },
    Case {
        dkim: Dkim::Rsa,
        tls: OutboundTls::Required,
        cpu: "rsa_tls_us",
        cpu_unit: "µs, goal ≤ 320",
        rate: "rsa_tls_delivered_per_second",
        rate_unit: "messages/s, goal ≥ 5,000",
    },
    Case {
        dkim: Dkim::Ed25519,
        tls: OutboundTls::Required,
        cpu: "ed25519_tls_us",
        cpu_unit: "µs",
        rate: "ed25519_tls_delivered_per_second",
        rate_unit: "messages/s",
    },
];
const ONE_DELIVERY: &str = "[shaping.default]\nmax_deliveries_per_connection = 1\n";
/// Of the fields that DKIM signs, canonicalised, and the signature field itself.
const HEADER_BYTES: usize = 600;
const CALLS_MIN: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_operations_take_time_and_a_resumed_handshake_less() {
        let lasting = Duration::from_millis(20);
        let (rsa, ed25519) = (bare_rsa(lasting).unwrap(), bare_ed25519(lasting).unwrap());
        assert!(rsa > ed25519 && ed25519 > 0.0, "{rsa} {ed25519}");
        let (full, resumed) = (bare_handshake(lasting, false).unwrap(), bare_handshake(lasting, true).unwrap());
        assert!(full > 0.0 && resumed > 0.0, "{full} {resumed}");
    }

    #[test]
    fn figures_that_are_divided_are_those_that_are_measured() {
        let names: Vec<&str> = CASES.iter().map(|case| case.cpu).collect();
        for name in ["unsigned_us", "rsa_us", "ed25519_us", "unsigned_tls_us", "rsa_tls_us"] {
            assert!(names.contains(&name), "{name}");
        }
    }
}
