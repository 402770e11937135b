//! The other mail systems: each with a configuration of its own making, in a directory of its own, started in the
//! foreground. They accept everything from this machine by SMTP and send it on to one address, as the engine does.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::group::ControlGroup;
use crate::interrupt::Interrupt;
use crate::peers::{disk_directory, free_port};

/// A rival, with where its programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mta {
    /// The system's own, or one in a tree of unpacked packages.
    Postfix(Option<PathBuf>),
    /// In a tree of unpacked packages.
    Exim(PathBuf),
    OpenSmtpd(PathBuf),
    /// The program `kumod`.
    KumoMta(PathBuf),
}

/// A rival that is running; ended when dropped, and the rest of its processes with its group.
#[derive(Debug)]
pub(crate) struct RunningMta {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(super) version: String,
    pub(super) config: String,
    directory: TempDir,
}

struct Prepared {
    directory: TempDir,
    command: Command,
    config: String,
}

impl Mta {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Postfix(_) => "postfix",
            Self::Exim(_) => "exim",
            Self::OpenSmtpd(_) => "opensmtpd",
            Self::KumoMta(_) => "kumomta",
        }
    }

    /// What a 250 of it means in the configuration made here: by the calls that were seen; KumoMTA's by its
    /// documentation.
    pub fn durability(&self) -> &'static str {
        match self {
            Self::Postfix(_) => "synced before 250 (1 fsync a message)",
            Self::Exim(_) => "synced before 250 (4 fsyncs a message, later ones included)",
            Self::OpenSmtpd(_) => "not synced before 250 (no fsync)",
            Self::KumoMta(_) => "synced before 250 (spools with flush = true)",
        }
    }

    /// By its own account, run in its tree where it has one.
    fn version(&self, directory: &Path) -> Result<String> {
        let mut command = match self {
            Self::Postfix(root) => {
                in_tree(root.as_ref().map(|_| directory), "/usr/sbin/postconf", &["-d", "mail_version"])
            }
            Self::Exim(_) => in_tree(Some(directory), "/usr/sbin/exim4", &["-bV"]),
            Self::OpenSmtpd(_) => in_tree(Some(directory), "/usr/sbin/smtpd", &["-h"]),
            Self::KumoMta(program) => in_tree(None, &program.to_string_lossy(), &["--version"]),
        };
        let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find(|line| line.contains("version")).or_else(|| text.lines().next());
        Ok(line.unwrap_or_default().trim().to_owned())
    }

    /// Starts it in a control group, passing on to `to`, or else throwing away what it takes.
    pub(crate) fn start(
        &self,
        to: Option<SocketAddr>,
        group: &ControlGroup,
        interrupt: &Interrupt,
    ) -> Result<RunningMta> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "{} has to be started by root: its processes run as users of their own",
            self.name()
        );
        let address = free_port()?;
        let prepared = match (self, to) {
            (Self::Postfix(root), to) => postfix(root.as_deref(), address, to)?,
            (Self::Exim(root), to) => exim(root, address, to)?,
            (Self::OpenSmtpd(root), Some(to)) => opensmtpd(root, address, to)?,
            (Self::KumoMta(program), Some(to)) => kumomta(program, address, to)?,
            (Self::OpenSmtpd(_) | Self::KumoMta(_), None) => bail!("{} throws no mail away here", self.name()),
        };
        let Prepared { directory, command, config } = prepared;
        let version = self.version(directory.path())?;
        let log = File::create(directory.path().join("output"))?;
        let mut command = group.inside(&command);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let mut running = RunningMta { child, address, version, config, directory };
        let ready = interrupt.wait_until(READY_PATIENCE, || {
            if let Some(status) = running.child.try_wait()? {
                bail!("{} ended ({status}) before it was ready:\n{}", self.name(), running.output());
            }
            Ok(greets(address))
        })?;
        ensure!(ready, "{} was not ready after {READY_PATIENCE:?}:\n{}", self.name(), running.output());
        Ok(running)
    }
}

impl RunningMta {
    pub(super) fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("it ended unasked ({status}):\n{}", self.output()),
        }
    }

    /// Its last words.
    pub(super) fn output(&self) -> String {
        let mut text = String::new();
        for name in ["output", "maillog", "tmp/log_main", "tmp/log_panic"] {
            let log = fs::read(self.directory.path().join(name)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            text.push_str(&lines[lines.len().saturating_sub(OUTPUT_LINES)..].join("\n"));
        }
        text
    }

    pub(super) fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id out of range")?;
        if self.child.try_wait()?.is_none() {
            kill_process(pid, Signal::TERM)?;
            let begun = std::time::Instant::now();
            while self.child.try_wait()?.is_none() && begun.elapsed() < STOP_PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        // It has ended, or is now made to; what it leaves behind ends with its group.
        let _ = self.child.kill();
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for RunningMta {
    fn drop(&mut self) {
        // What could not be ended was told of when it was tried.
        let _ = self.stop();
    }
}

/// Every rival says 220 when it can take mail.
fn greets(address: SocketAddr) -> bool {
    let greeting = || -> std::io::Result<bool> {
        let stream = TcpStream::connect_timeout(&address, GREETING_PATIENCE)?;
        stream.set_read_timeout(Some(GREETING_PATIENCE))?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line.starts_with("220"))
    };
    greeting().unwrap_or(false)
}

fn in_tree(root: Option<&Path>, program: &str, arguments: &[&str]) -> Command {
    let mut command = match root {
        Some(root) => {
            let mut command = Command::new("chroot");
            command.arg(root).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.args(arguments);
    command
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A place on disk for a system that is not in a tree, open to its users.
fn place() -> Result<TempDir> {
    let directory = tempfile::Builder::new().prefix("postbench-").tempdir_in(disk_directory()?)?;
    fs::set_permissions(directory.path(), Permissions::from_mode(0o711))?;
    Ok(directory)
}

/// A copy of a tree of unpacked packages, with users and a null device.
fn tree(root: &Path, users: &[&str]) -> Result<TempDir> {
    let parent = root.canonicalize()?;
    let parent = parent.parent().with_context(|| format!("{} is no tree of unpacked packages", root.display()))?;
    let directory = tempfile::Builder::new().prefix("postbench-").tempdir_in(parent)?;
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
    // Hard links: the files are only read. What is changed below is written anew.
    run(Command::new("cp").args(["-al", "--"]).arg(root.join(".")).arg(directory.path()))?;
    let mut passwd = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n".to_owned();
    let mut group = "root:x:0:\nnogroup:x:65534:\nmail:x:8:\n".to_owned();
    for (number, user) in (USER..).zip(users) {
        passwd += &format!("{user}:x:{number}:{number}::/:/bin/false\n");
        group += &format!("{user}:x:{number}:\n");
    }
    let etc = directory.path().join("etc");
    fs::create_dir_all(&etc)?;
    write_anew(&etc.join("passwd"), &passwd)?;
    write_anew(&etc.join("group"), &group)?;
    fs::create_dir_all(directory.path().join("dev"))?;
    let null = directory.path().join("dev/null");
    run(Command::new("mknod").args(["-m", "666"]).arg(null).args(["c", "1", "3"]))?;
    Ok(directory)
}

/// A file of its own, in place of one that all copies of the tree share.
fn write_anew(path: &Path, text: &str) -> Result<()> {
    // It need not be there.
    let _ = fs::remove_file(path);
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(0o644))?)
}

/// In a tree it runs chrooted and finds its directories at the usual places; else at those of the run.
fn postfix(root: Option<&Path>, address: SocketAddr, to: Option<SocketAddr>) -> Result<Prepared> {
    let directory = match root {
        Some(root) => tree(root, &["postfix", "postdrop"])?,
        None => place()?,
    };
    let inside = |name: &str| match root {
        Some(_) => Path::new("/postbench").join(name),
        None => directory.path().join(name),
    };
    let outside = |name: &str| match root {
        Some(_) => directory.path().join("postbench").join(name),
        None => directory.path().join(name),
    };
    for folder in ["etc", "spool", "data"] {
        fs::create_dir_all(outside(folder))?;
        fs::set_permissions(outside(folder), Permissions::from_mode(0o755))?;
    }
    let owner = if root.is_some() { USER.to_string() } else { "postfix".to_owned() };
    run(Command::new("chown").arg(owner).arg(outside("data")))?;
    let (queue, data, log) = (inside("spool"), inside("data"), inside("maillog"));
    let way = match to {
        Some(to) => format!("relayhost = [127.0.0.1]:{}", to.port()),
        None => "default_transport = discard:".to_owned(),
    };
    let main = format!(
        "compatibility_level = 3.6\nqueue_directory = {}\ndata_directory = {}\nmaillog_file = {}\n\
         maillog_file_prefixes = {}\nmyhostname = postfix.postbench.test\nmydestination =\nmynetworks = 127.0.0.0/8\n\
         inet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nalias_maps =\n{way}\n\
         smtpd_recipient_restrictions = permit_mynetworks, reject\nsmtpd_peername_lookup = no\n\
         smtpd_client_connection_count_limit = 0\ninitial_destination_concurrency = 20\n\
         default_process_limit = 200\nin_flow_delay = 0\nmessage_size_limit = 0\n",
        queue.display(),
        data.display(),
        log.display(),
        inside("").display(),
    );
    let services = "cleanup unix n - n - 0 cleanup\nqmgr unix n - n 300 1 qmgr\n\
                    rewrite unix - - n - - trivial-rewrite\nproxymap unix - - n - - proxymap\n\
                    bounce unix - - n - 0 bounce\ndefer unix - - n - 0 bounce\ntrace unix - - n - 0 bounce\n\
                    smtp unix - - n - - smtp\ndiscard unix - - n - - discard\n\
                    error unix - - n - - error\nretry unix - - n - - error\n\
                    scache unix - - n - 1 scache\nanvil unix - - n - 1 anvil\n\
                    postlog unix-dgram n - n - 1 postlogd\n";
    let master = format!("{address} inet n - n - - smtpd\n{services}");
    fs::write(outside("etc/main.cf"), &main)?;
    fs::write(outside("etc/master.cf"), &master)?;
    let etc = inside("etc");
    let etc = etc.to_str().context("a path that is not UTF-8")?;
    run(&mut in_tree(root.map(|_| directory.path()), "/usr/sbin/postfix", &["-c", etc, "check"]))?;
    let tree = root.map(|_| directory.path());
    let daemons = run(&mut in_tree(tree, "/usr/sbin/postconf", &["-c", etc, "-h", "daemon_directory"]))?;
    let mut command = in_tree(tree, &format!("{}/master", daemons.trim()), &["-c", etc, "-d"]);
    command.env("MAIL_CONFIG", etc);
    Ok(Prepared { directory, command, config: format!("# main.cf\n{main}# master.cf\n{master}") })
}

fn exim(root: &Path, address: SocketAddr, to: Option<SocketAddr>) -> Result<Prepared> {
    let directory = tree(root, &["Debian-exim"])?;
    for folder in ["var/spool/exim4", "var/log/exim4"] {
        fs::create_dir_all(directory.path().join(folder))?;
        run(Command::new("chown").args(["-R", &format!("{USER}:{USER}")]).arg(directory.path().join(folder)))?;
    }
    let way = match to {
        Some(to) => format!(
            "begin routers\non:\n  driver = manualroute\n  transport = smtp\n  route_list = * 127.0.0.1 byname\n\
             \x20 self = send\n\
             begin transports\nsmtp:\n  driver = smtp\n  port = {}\n  allow_localhost\n  hosts_avoid_tls = *\n",
            to.port(),
        ),
        None => "begin routers\naway:\n  driver = redirect\n  data = :blackhole:\n".to_owned(),
    };
    let config = format!(
        "primary_hostname = exim.postbench.test\ndisable_ipv6\nlocal_interfaces = 127.0.0.1\ndaemon_smtp_ports = {}\n\
         smtp_accept_max = 0\nsmtp_accept_max_per_connection = 0\nsmtp_accept_queue_per_connection = 0\n\
         smtp_connect_backlog = 50\nmessage_size_limit = 0\nrfc1413_query_timeout = 0s\nnever_users =\n\
         keep_environment =\nlog_file_path = /tmp/log_%s\ntls_advertise_hosts =\n\
         acl_smtp_mail = accept\nacl_smtp_rcpt = accept\nacl_smtp_data = accept\n\
         {way}begin retry\n* * F,1h,1s\n",
        address.port(),
    );
    fs::create_dir_all(directory.path().join("etc/exim4"))?;
    write_anew(&directory.path().join("etc/exim4/exim4.conf"), &config)?;
    fs::set_permissions(directory.path().join("tmp"), Permissions::from_mode(0o777))?;
    // Messages that met a lock of another delivery wait for a queue runner.
    let command = in_tree(Some(directory.path()), "/usr/sbin/exim4", &["-bdf", "-q5s"]);
    Ok(Prepared { directory, command, config: format!("# exim4 -bdf -q5s\n{config}") })
}

fn opensmtpd(root: &Path, address: SocketAddr, to: SocketAddr) -> Result<Prepared> {
    let directory = tree(root, &["opensmtpd", "opensmtpq"])?;
    let config = format!(
        "smtp max-message-size 100M\nsmtp limit max-mails 1000000\n\
         listen on 127.0.0.1 port {} hostname opensmtpd.postbench.test\n\
         action \"on\" relay host \"smtp://{to}\"\nmatch from any for any action \"on\"\n",
        address.port(),
    );
    write_anew(&directory.path().join("etc/smtpd.conf"), &config)?;
    let run_link = directory.path().join("var/run");
    if !run_link.exists() {
        fs::create_dir_all(directory.path().join("var"))?;
        fs::create_dir_all(directory.path().join("run"))?;
        // A link that leads nowhere from outside leads to the right place from inside.
        let _ = fs::remove_file(&run_link);
        std::os::unix::fs::symlink("../run", &run_link)?;
    }
    let command = in_tree(Some(directory.path()), "/usr/sbin/smtpd", &["-d", "-f", "/etc/smtpd.conf"]);
    Ok(Prepared { directory, command, config: format!("# smtpd.conf\n{config}") })
}

/// By its documentation: <https://docs.kumomta.com/userguide/configuration/example/>.
fn kumomta(program: &Path, address: SocketAddr, to: SocketAddr) -> Result<Prepared> {
    ensure!(program.is_file(), "no kumod at {}", program.display());
    let directory = place()?;
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777))?;
    let here = directory.path().display();
    let http = free_port()?;
    let config = format!(
        "local kumo = require 'kumo'\n\
         kumo.on('init', function()\n\
         \x20 for _, name in ipairs {{ 'data', 'meta' }} do\n\
         \x20   kumo.define_spool {{ name = name, path = '{here}/spool/' .. name, kind = 'RocksDB', flush = true }}\n\
         \x20 end\n\
         \x20 kumo.configure_local_logs {{ log_dir = '{here}/log' }}\n\
         \x20 kumo.start_http_listener {{ listen = '{http}' }}\n\
         \x20 kumo.start_esmtp_listener {{ listen = '{address}', hostname = 'kumomta.postbench.test',\n\
         \x20   relay_hosts = {{ '127.0.0.0/8' }} }}\n\
         end)\n\
         kumo.on('get_queue_config', function(domain, tenant, campaign, routing_domain)\n\
         \x20 return kumo.make_queue_config {{ protocol = {{ smtp = {{ mx_list = {{ '[127.0.0.1]' }} }} }} }}\n\
         end)\n\
         kumo.on('get_egress_path_config', function(domain, egress_source, site_name)\n\
         \x20 return kumo.make_egress_path {{ connection_limit = 32, enable_tls = 'Disabled',\n\
         \x20   smtp_port = {port}, prohibited_hosts = {{}} }}\n\
         end)\n",
        port = to.port(),
    );
    fs::write(directory.path().join("init.lua"), &config)?;
    let mut command = Command::new(program);
    command.arg("--policy").arg(directory.path().join("init.lua")).args(["--user", "nobody"]);
    Ok(Prepared { directory, command, config: format!("-- init.lua\n{config}") })
}

/// The first of the users made for a system in its tree.
const USER: u32 = 91;
const READY_PATIENCE: Duration = Duration::from_secs(60);
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
const STOP_PATIENCE: Duration = Duration::from_secs(5);
const OUTPUT_LINES: usize = 20;
