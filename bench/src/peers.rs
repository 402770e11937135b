//! The processes that a run starts: the engine under test, and Postfix's smtp-source and smtp-sink where a result shall
//! not rest on our own tools.

use std::ffi::OsString;
use std::fmt::{Display, Write as _};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;
use tempfile::TempDir;

use crate::interrupt::Interrupt;
use crate::keys;
use crate::measure::{self, Usage};
use crate::message::{Random, tenant_domain};

/// How the engine is set up.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    pub program: PathBuf,
    /// Behind `serve --config FILE`.
    pub arguments: Vec<OsString>,
    pub shards: Option<usize>,
    pub durability: Durability,
    pub dkim: Dkim,
    /// Above one, so many `[[tenant]]` tables, as the injector's.
    pub tenants: usize,
    /// What the routes say of TLS towards the sink; `None`: nothing.
    pub tls: Option<OutboundTls>,
    /// Where the spool's temporary directory is made; `None`: a place on disk.
    pub spool_parent: Option<PathBuf>,
    /// TOML put at the end of the configuration.
    pub config_extra: String,
    /// Leaves the directory with configuration, spool and log behind.
    pub keep: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Synced before 250.
    Fsync,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dkim {
    None,
    Rsa,
    Ed25519,
    Both,
}

/// TLS on every outbound connection, or on none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OutboundTls {
    Required,
    Disabled,
}

/// A directory with a configuration, from which the engine can be started again and again.
#[derive(Debug)]
pub struct EngineSite {
    directory: TempDir,
    options: EngineOptions,
    pub smtp: SocketAddr,
    pub http: SocketAddr,
    /// For a report: without most of the routes, where there are many.
    pub config: String,
    /// The keys that it signs with: names and texts of their TXT records.
    pub dkim_records: Vec<(String, String)>,
    pub filesystem: &'static str,
}

impl EngineSite {
    /// Every domain is routed to `sink`.
    pub fn prepare(options: EngineOptions, sink: SocketAddr) -> Result<Self> {
        Self::prepare_routed(options, &[("*".to_owned(), sink)])
    }

    /// Each domain is routed to its address, or to `"discard"`: nothing is sent.
    pub fn prepare_routed(mut options: EngineOptions, routes: &[(String, impl Display)]) -> Result<Self> {
        ensure!(
            options.program.is_file(),
            "no engine at {}; build it, or name it by --engine",
            options.program.display()
        );
        // It is started in another directory.
        options.program = options.program.canonicalize()?;
        let parent = match &options.spool_parent {
            Some(parent) => parent.clone(),
            None => disk_directory()?,
        };
        let mut directory = tempfile::Builder::new().prefix("postbench-").tempdir_in(&parent)?;
        directory.disable_cleanup(options.keep);
        let (smtp, http) = (free_port()?, free_port()?);
        let mut dkim_records = Vec::new();
        let config = Self::write_config(&options, directory.path(), (smtp, http), routes, &mut dkim_records)?;
        fs::write(directory.path().join("postrider.toml"), &config)?;
        let config = told(&config, routes.len());
        let filesystem = measure::filesystem_of(directory.path())?;
        Ok(Self { directory, options, smtp, http, config, dkim_records, filesystem })
    }

    /// Leaves the directory behind, for whoever looks into what went wrong.
    pub fn keep(&mut self) -> &Path {
        self.directory.disable_cleanup(true);
        self.directory.path()
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write_config(
        options: &EngineOptions,
        directory: &Path,
        (smtp, http): (SocketAddr, SocketAddr),
        routes: &[(String, impl Display)],
        dkim_records: &mut Vec<(String, String)>,
    ) -> Result<String> {
        let mut text = String::from("hostname = \"engine.postbench.test\"\n");
        if let Some(shards) = options.shards {
            writeln!(text, "shards = {shards}")?;
        }
        let durability = match options.durability {
            Durability::Fsync => "fsync",
            Durability::None => "none",
        };
        writeln!(text, "\n[spool]\npath = {}\ndurability = \"{durability}\"", quoted(&directory.join("spool"))?)?;
        writeln!(text, "\n[events]\npath = {}", quoted(&directory.join("events"))?)?;
        writeln!(text, "\n[[listener]]\nprotocol = \"smtp\"\naddress = \"{smtp}\"")?;
        writeln!(text, "\n[[listener]]\nprotocol = \"http\"\naddress = \"{http}\"")?;
        for (domain, to) in routes {
            writeln!(text, "\n[[route]]\ndomain = \"{domain}\"\nto = [\"{to}\"]")?;
            match options.tls {
                Some(OutboundTls::Required) => writeln!(text, "tls = \"required\"")?,
                Some(OutboundTls::Disabled) => writeln!(text, "tls = \"disabled\"")?,
                None => {}
            }
        }
        if options.tenants > 1 {
            for tenant in 0..options.tenants {
                let domain = tenant_domain(tenant, SENDER_DOMAIN);
                writeln!(text, "\n[[tenant]]\nname = \"t{tenant:06}\"\ndomains = [\"{domain}\"]")?;
            }
        }
        let mut dkim_keys = Vec::new();
        if matches!(options.dkim, Dkim::Rsa | Dkim::Both) {
            dkim_keys.push(keys::write_rsa_2048(directory)?);
        }
        if matches!(options.dkim, Dkim::Ed25519 | Dkim::Both) {
            dkim_keys.push(keys::write_ed25519(directory)?);
        }
        for key in dkim_keys {
            let (selector, path) = (key.selector, quoted(&key.path)?);
            dkim_records.push((format!("{selector}._domainkey.{SENDER_DOMAIN}"), key.record));
            writeln!(text, "\n[[dkim]]\ndomain = \"{SENDER_DOMAIN}\"\nselector = \"{selector}\"\nkey = {path}")?;
        }
        if !options.config_extra.is_empty() {
            writeln!(text, "\n{}", options.config_extra)?;
        }
        Ok(text)
    }

    pub fn start(&self, interrupt: &Interrupt) -> Result<Engine> {
        let log = File::options().create(true).append(true).open(self.directory.path().join("log"))?;
        let started = Instant::now();
        let child = Command::new(&self.options.program)
            .args(["serve", "--config"])
            .arg(self.directory.path().join("postrider.toml"))
            .args(&self.options.arguments)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.options.program.display()))?;
        let mut engine = Engine { process: Process(child), started, ready_after: Duration::ZERO };
        let ready = interrupt.wait_until(READY_PATIENCE, || {
            if let Some(status) = engine.process.0.try_wait()? {
                bail!("the engine ended ({status}) before it was ready:\n{}", self.log_tail());
            }
            Ok(is_ready(self.http))
        })?;
        ensure!(ready, "the engine was not ready after {READY_PATIENCE:?}:\n{}", self.log_tail());
        engine.ready_after = started.elapsed();
        Ok(engine)
    }

    /// Recipients in the running engine's queues, by its own account: of all, and of one domain.
    pub fn queued(&self, domain: &str) -> Result<(u64, u64)> {
        let answer = self.call("GET", QUEUES, &Value::Null)?;
        let total = answer["total"].as_u64().with_context(|| format!("{QUEUES} was answered without a total"))?;
        let queues = answer["queues"].as_array().with_context(|| format!("{QUEUES} was answered without queues"))?;
        let of_domain = queues.iter().filter(|queue| queue["domain"] == domain);
        Ok((total, of_domain.filter_map(|queue| queue["depth"].as_u64()).sum()))
    }

    /// A call of the running engine's HTTP service, with this request unless it is null, and the answer.
    pub fn call(&self, method: &str, path: &str, request: &Value) -> Result<Value> {
        let request = if request.is_null() { String::new() } else { request.to_string() };
        let (code, body) =
            http(self.http, method, path, &request).context("the engine's HTTP service does not answer")?;
        ensure!(code == 200, "{method} {path} was answered {code}: {body}");
        if body.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&body)?) }
    }

    /// The engine's last words.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

/// A running engine; killed when dropped.
#[derive(Debug)]
pub struct Engine {
    process: Process,
    pub started: Instant,
    /// From its start until it answered that it is ready.
    pub ready_after: Duration,
}

impl Engine {
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    pub fn check_alive(&mut self, site: &EngineSite) -> Result<()> {
        match self.process.0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the engine ended unasked ({status}):\n{}", site.log_tail()),
        }
    }

    /// kill -9. Gives when the signal was sent.
    pub fn kill(mut self) -> Result<Instant> {
        let sent = Instant::now();
        self.process.0.kill()?;
        self.process.0.wait()?;
        Ok(sent)
    }

    /// SIGTERM; it must end by itself with exit code 0.
    pub fn terminate(&mut self, interrupt: &Interrupt, site: &EngineSite) -> Result<()> {
        let mut status: Option<ExitStatus> = None;
        signal_process(&self.process.0, Signal::TERM)?;
        interrupt.wait_until(TERMINATE_PATIENCE, || {
            status = self.process.0.try_wait()?;
            Ok(status.is_some())
        })?;
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the engine answered SIGTERM with {status}:\n{}", site.log_tail()),
            None => bail!("the engine did not end {TERMINATE_PATIENCE:?} after SIGTERM:\n{}", site.log_tail()),
        }
    }
}

/// A child that does not outlive its owner.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended and been waited for already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn signal_process(child: &Child, signal: Signal) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process id out of range")?;
    Ok(kill_process(pid, signal)?)
}

/// Postfix's smtp-sink.
#[derive(Debug)]
pub struct SmtpSink {
    process: Process,
    pub address: SocketAddr,
    count: Arc<Mutex<SinkCount>>,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct SinkCount {
    pub messages: u64,
    /// When the last message was counted.
    pub last: Option<Instant>,
}

impl SmtpSink {
    pub fn start(program: &Path, interrupt: &Interrupt) -> Result<Self> {
        let address = free_port()?;
        let mut command = Command::new(program);
        if rustix::process::geteuid().is_root() {
            // It refuses to run as root.
            command.args(["-u", "nobody"]);
        }
        command.arg("-c").arg(address.to_string()).arg(SMTP_SINK_BACKLOG.to_string());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        let child = child.with_context(|| format!("cannot start {}", program.display()))?;
        let mut process = Process(child);
        let mut output = process.0.stdout.take().context("smtp-sink has no output")?;
        let count = Arc::new(Mutex::new(SinkCount::default()));
        let counted = count.clone();
        let follow = move || {
            let mut text = Vec::new();
            let mut room = vec![0; 64 << 10];
            while let Ok(length @ 1..) = output.read(&mut room) {
                text.extend_from_slice(&room[..length]);
                if let Some(messages) = last_count(&mut text) {
                    let mut count = counted.lock().unwrap_or_else(PoisonError::into_inner);
                    if messages != count.messages {
                        *count = SinkCount { messages, last: Some(Instant::now()) };
                    }
                }
            }
        };
        std::thread::Builder::new().name("smtp-sink".into()).spawn(follow)?;
        let ready = interrupt.wait_until(READY_PATIENCE, || {
            if let Some(status) = process.0.try_wait()? {
                bail!("{} ended: {status}", program.display());
            }
            Ok(TcpStream::connect(address).is_ok())
        })?;
        ensure!(ready, "{} does not listen on {address}", program.display());
        Ok(Self { process, address, count })
    }

    pub fn count(&self) -> SinkCount {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn cpu(&self) -> Result<Duration> {
        Ok(Usage::of(self.process.0.id())?.cpu())
    }
}

/// smtp-sink -c prints `sess=1 quit=0 mesg=12\r` over and over; takes all but an unfinished one off `text`.
fn last_count(text: &mut Vec<u8>) -> Option<u64> {
    let end = memchr::memrchr(b'\r', text)?;
    let start = memchr::memrchr(b'=', &text[..end])? + 1;
    let count = std::str::from_utf8(&text[start..end]).ok().and_then(|digits| digits.trim().parse().ok());
    text.drain(..=end);
    count
}

/// What Postfix's smtp-source is asked to send.
#[derive(Debug, Clone)]
pub struct SmtpSourceRun {
    pub program: PathBuf,
    pub to: SocketAddr,
    pub sessions: usize,
    pub messages: u64,
    pub message_bytes: usize,
    pub one_connection_per_message: bool,
}

/// When it began and ended, and its CPU time.
#[derive(Debug, Clone, Copy)]
pub struct SourceRun {
    pub begun: Instant,
    pub ended: Instant,
    pub cpu: Duration,
}

impl SmtpSourceRun {
    /// smtp-source gives up at the first refusal; having ended well it had all messages accepted.
    pub fn run(&self, interrupt: &Interrupt) -> Result<SourceRun> {
        let mut command = Command::new(&self.program);
        if !self.one_connection_per_message {
            command.arg("-d");
        }
        command.args(["-s", &self.sessions.to_string(), "-m", &self.messages.to_string()]);
        command.args([
            "-l",
            &self.message_bytes.to_string(),
            "-f",
            &format!("bench@{SENDER_DOMAIN}"),
            "-t",
            "r@bench.test",
        ]);
        let begun = Instant::now();
        let child = command.arg(self.to.to_string()).stdin(Stdio::null()).spawn();
        let mut process = Process(child.with_context(|| format!("cannot start {}", self.program.display()))?);
        let pid = process.0.id();
        let wait = WaitId::Pid(i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process id out of range")?);
        // It is left a zombie until its CPU time was read.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        interrupt.wait_until(SOURCE_PATIENCE, || Ok(waitid(wait.clone(), look)?.is_some()))?;
        let ended = Instant::now();
        let cpu = Usage::of(pid)?.cpu();
        let status = process.0.wait()?;
        ensure!(status.success(), "{} ended with {status}", self.program.display());
        Ok(SourceRun { begun, ended, cpu })
    }
}

/// A metric without labels.
pub(crate) fn metric(http: SocketAddr, name: &str) -> Result<f64> {
    let (_, text) = self::http(http, "GET", "/metrics", "").context("the engine's metrics")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok()).with_context(|| format!("no metric {name}"))
}

fn is_ready(http: SocketAddr) -> bool {
    self::http(http, "GET", READINESS, "").is_ok_and(|(code, _)| code == 200)
}

/// Status and body.
fn http(http: SocketAddr, method: &str, path: &str, request: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&http, HTTP_PATIENCE)?;
    stream.set_read_timeout(Some(HTTP_PATIENCE))?;
    let length = request.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all([head.as_bytes(), request.as_bytes()].concat().as_slice())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    Ok((code.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
}

/// A loopback port below the kernel's range for outgoing connections: from inside it, a client that keeps trying a dead
/// server's port will at some time be given that very port as its own, and is connected to itself.
pub(crate) fn free_port() -> Result<SocketAddr> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let low: u16 = range.split_ascii_whitespace().next().and_then(|low| low.parse().ok()).unwrap_or(32_768);
    let span = u64::from(low.saturating_sub(PORT_MIN)).max(1_000);
    let mut random = Random::new(crate::message::draw_run_id());
    for _ in 0..PORT_TRIES {
        let port = PORT_MIN + (random.next_u64() % span) as u16;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no free loopback port above {PORT_MIN}")
}

/// The system's directory for temporary files, unless that is in memory.
pub(crate) fn disk_directory() -> Result<PathBuf> {
    let usual = std::env::temp_dir();
    Ok(if measure::filesystem_of(&usual)? == "tmpfs" { PathBuf::from("/var/tmp") } else { usual })
}

/// A configuration with so many routes, of which a reader gets the first and the last.
fn told(config: &str, routes: usize) -> String {
    const ROUTE: &str = "\n[[route]]";
    if routes <= ROUTES_TOLD_MAX {
        return config.to_owned();
    }
    let begins: Vec<usize> = config.match_indices(ROUTE).map(|(place, _)| place).collect();
    let (second, last) = (begins[1], begins[routes - 1]);
    format!("{}\n# … and {} more like it …\n{}", &config[..second], routes - 2, &config[last..])
}

/// A TOML basic string.
fn quoted(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")))
}

pub const SENDER_DOMAIN: &str = "sender.test";
const READINESS: &str = "/api/check-readiness/v1";
const QUEUES: &str = "/api/admin/queues/v1";
/// A full spool takes its time.
const READY_PATIENCE: Duration = Duration::from_secs(300);
const TERMINATE_PATIENCE: Duration = Duration::from_secs(60);
const SOURCE_PATIENCE: Duration = Duration::from_secs(3600);
const HTTP_PATIENCE: Duration = Duration::from_secs(6);
const LOG_TAIL_LINES: usize = 30;
const ROUTES_TOLD_MAX: usize = 10;
const SMTP_SINK_BACKLOG: u32 = 1024;
const PORT_MIN: u16 = 12_000;
const PORT_TRIES: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_follows_the_interface() {
        let directory = tempfile::tempdir().unwrap();
        let options = EngineOptions {
            program: PathBuf::from("/bin/true"),
            arguments: Vec::new(),
            shards: Some(2),
            durability: Durability::None,
            dkim: Dkim::Both,
            tenants: 2,
            tls: Some(OutboundTls::Required),
            spool_parent: Some(directory.path().to_owned()),
            config_extra: "[shaping.default]\nconnection_limit = 7".into(),
            keep: false,
        };
        let site = EngineSite::prepare(options, "127.0.0.1:2526".parse().unwrap()).unwrap();
        let expected = [
            "shards = 2\n\n[spool]\npath = \"",
            "durability = \"none\"\n",
            "[[listener]]\nprotocol = \"smtp\"\naddress = \"127.0.0.1:",
            "[[listener]]\nprotocol = \"http\"\naddress = \"127.0.0.1:",
            "[[route]]\ndomain = \"*\"\nto = [\"127.0.0.1:2526\"]\ntls = \"required\"\n",
            "[[tenant]]\nname = \"t000001\"\ndomains = [\"t000001.sender.test\"]\n",
            "[[dkim]]\ndomain = \"sender.test\"\nselector = \"rsa\"\nkey = \"",
            "selector = \"ed25519\"\n",
            "[shaping.default]\nconnection_limit = 7\n",
        ];
        for part in expected {
            assert!(site.config.contains(part), "{part} is missing in\n{}", site.config);
        }
        assert!(site.path().join("rsa.pem").exists());
        // It ends at once, unready.
        let error = site.start(&Interrupt::default()).unwrap_err().to_string();
        assert!(error.contains("before it was ready"), "{error}");
    }

    #[test]
    fn of_many_routes_a_report_tells_two() {
        let routes: Vec<String> = (0..20).map(|site| format!("\n[[route]]\ndomain = \"d{site}\"\n")).collect();
        let config = format!("hostname = \"x\"\n{}\n[[tenant]]\nname = \"t\"\n", routes.concat());
        let text = told(&config, 20);
        assert!(text.contains("\"d0\"") && text.contains("and 18 more") && text.contains("\"d19\""), "{text}");
        assert!(text.contains("[[tenant]]") && !text.contains("\"d1\""), "{text}");
    }

    #[test]
    fn smtp_sinks_counter_is_followed() {
        let mut text = b"sess=1 quit=0 mesg=11\rsess=1 quit=0 mesg=12\rsess=1 qu".to_vec();
        assert_eq!(last_count(&mut text), Some(12));
        assert_eq!(text, b"sess=1 qu");
        assert_eq!(last_count(&mut text), None);
        text.extend_from_slice(b"it=1 mesg=13\r");
        assert_eq!(last_count(&mut text), Some(13));
    }

    #[test]
    fn ports_are_outside_the_range_of_outgoing_connections() {
        let address = free_port().unwrap();
        assert!(TcpListener::bind(address).is_ok());
        assert!(address.port() >= PORT_MIN);
    }
}
