//! Real mail servers as peers, each started for one test on a loopback port of its own. What they take they pass on
//! to a scripted sink, which tells envelope and content.
//!
//! Postfix is the system's own; Exim and OpenSMTPD, which Debian allows on no machine beside it, and Dovecot run in a
//! tree of unpacked packages (`TARGET/interop/root`), Haraka from `TARGET/interop/haraka`. `.ci/run` makes both.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::poll;
use crate::tools;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Postfix,
    Exim,
    OpenSmtpd,
    Aiosmtpd,
    Haraka,
}

/// What a peer does with recipients.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Recipients {
    Accept,
    /// All of every second transaction of a connection are answered 4xx.
    DeferEverySecond,
    /// As Postfix's policy server at this address decides.
    AskPolicy(SocketAddr),
    /// Those whose number is odd are refused, and the connection is closed.
    DropOdd,
    /// Of no more than so many messages in a session.
    FewASession(usize),
    /// No more than so many in a transaction.
    FewATransaction(usize),
}

/// A running server; it and all its children are killed when dropped.
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    child: Child,
    directory: tempfile::TempDir,
}

impl Kind {
    /// Starts it, passing on to `to`. None, with the reason printed, where it is not installed.
    pub(crate) fn start(self, to: SocketAddr, recipients: Recipients) -> Option<Peer> {
        if tools::run(Command::new("id").arg("-u")).trim() != "0" {
            tools::missing(&format!("{self:?} has to be started by root"));
            return None;
        }
        let address = tools::free_address();
        let (directory, command) = match self {
            Self::Postfix => postfix(address, to, recipients)?,
            Self::Exim => exim(address, to, recipients)?,
            Self::OpenSmtpd => opensmtpd(address, to, recipients)?,
            Self::Aiosmtpd => aiosmtpd(address, to)?,
            Self::Haraka => haraka(address, to)?,
        };
        Some(Peer::start(&format!("{self:?}"), address, directory, command))
    }
}

impl Peer {
    fn start(name: &str, address: SocketAddr, directory: tempfile::TempDir, mut command: Command) -> Self {
        let log = fs::File::create(directory.path().join("output")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        // A group of its own, so that its children can be ended with it.
        let child = command.process_group(0).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut peer = Self { address, child, directory };
        poll("the server accepts connections", || {
            let ended = peer.child.try_wait().expect("a child can be asked");
            assert!(ended.is_none(), "{name} ended: {ended:?}\n{}", peer.output());
            std::net::TcpStream::connect(address).ok()
        });
        peer
    }

    /// What it has said so far.
    pub(crate) fn output(&self) -> String {
        let output = fs::read(self.directory.path().join("output")).unwrap_or_default();
        String::from_utf8_lossy(&output).into_owned()
    }

    fn signal(&self, name: &str) {
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill").args(["-s", name, "--", &group]).stderr(Stdio::null()).status();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the server's output ---\n{}\n---", self.output());
        }
        self.signal("KILL");
        let _ = self.child.wait();
    }
}

type Prepared = Option<(tempfile::TempDir, Command)>;

/// Private key and certificate for `mx.test` that nobody else has signed, as PEM files.
fn certificate(folder: &Path) {
    let made = rcgen::generate_simple_self_signed(["mx.test".to_owned()]).unwrap();
    fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    fs::set_permissions(folder.join("key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
}

fn postfix(address: SocketAddr, to: SocketAddr, recipients: Recipients) -> Prepared {
    let postfix = tools::program("postfix", "Debian: postfix")?;
    let directory = tempfile::tempdir().unwrap();
    // Its processes run as a user of their own.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let place = |name: &str| directory.path().join(name);
    for folder in ["etc", "spool", "data"] {
        fs::create_dir(place(folder)).unwrap();
        fs::set_permissions(place(folder), fs::Permissions::from_mode(0o755)).unwrap();
    }
    tools::run(Command::new("chown").arg("postfix").arg(place("data")));
    certificate(&place("etc"));
    let policy = match recipients {
        Recipients::Accept => String::new(),
        Recipients::AskPolicy(policy) => format!("check_policy_service inet:{policy}, "),
        other => panic!("Postfix can't do {other:?}"),
    };
    let (here, port) = (directory.path().display(), to.port());
    let main = format!(
        "compatibility_level = 3.6\nqueue_directory = {here}/spool\ndata_directory = {here}/data\n\
         maillog_file = {here}/maillog\nmaillog_file_prefixes = {here}\nmyhostname = postfix.test\nmydestination =\n\
         mynetworks = 127.0.0.0/8\ninet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nalias_maps =\n\
         relayhost = [127.0.0.1]:{port}\nsmtp_line_length_limit = 0\nmessage_size_limit = 0\n\
         smtpd_recipient_restrictions = {policy}permit_mynetworks, reject\nsmtpd_policy_service_timeout = 10\n\
         smtpd_tls_security_level = may\nsmtpd_tls_cert_file = {here}/etc/cert.pem\n\
         smtpd_tls_key_file = {here}/etc/key.pem\n\
         smtpd_client_connection_count_limit = 0\nsmtpd_peername_lookup = no\n",
    );
    fs::write(place("etc/main.cf"), main).unwrap();
    let services = "cleanup unix n - n - 0 cleanup\nqmgr unix n - n 300 1 qmgr\ntlsmgr unix - - n 1000? 1 tlsmgr\n\
                    rewrite unix - - n - - trivial-rewrite\nproxymap unix - - n - - proxymap\n\
                    bounce unix - - n - 0 bounce\ndefer unix - - n - 0 bounce\ntrace unix - - n - 0 bounce\n\
                    smtp unix - - n - - smtp\nerror unix - - n - - error\nretry unix - - n - - error\n\
                    scache unix - - n - 1 scache\nanvil unix - - n - 1 anvil\n\
                    postlog unix-dgram n - n - 1 postlogd\n";
    fs::write(place("etc/master.cf"), format!("{address} inet n - n - - smtpd\n{services}")).unwrap();
    tools::run(Command::new(postfix).arg("-c").arg(place("etc")).arg("check"));
    let postconf = tools::program("postconf", "Debian: postfix")?;
    let daemons = tools::run(Command::new(postconf).arg("-c").arg(place("etc")).args(["-h", "daemon_directory"]));
    let mut command = Command::new(Path::new(daemons.trim()).join("master"));
    command.arg("-c").arg(place("etc")).arg("-d").env("MAIL_CONFIG", place("etc"));
    Some((directory, command))
}

/// A copy of the tree of unpacked packages for one server, with users and a null device.
fn tree(program: &str, users: &[&str]) -> Option<tempfile::TempDir> {
    let root = installed("root")?;
    if !root.join(program).is_file() {
        tools::missing(&format!("no {program} in {} (.ci/run makes it)", root.display()));
        return None;
    }
    let directory = tempfile::tempdir_in(root.parent()?).unwrap();
    // Hard links: the files are only read. What is changed below is written anew.
    tools::run(Command::new("cp").args(["-al", "--"]).arg(root.join(".")).arg(directory.path()));
    let mut passwd = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n".to_owned();
    let mut group = "root:x:0:\nnogroup:x:65534:\nmail:x:8:\n".to_owned();
    for (number, user) in (USER..).zip(users) {
        passwd += &format!("{user}:x:{number}:{number}::/:/bin/false\n");
        group += &format!("{user}:x:{number}:\n");
    }
    let etc = directory.path().join("etc");
    write_anew(&etc.join("passwd"), &passwd);
    write_anew(&etc.join("group"), &group);
    certificate(&etc);
    tools::run(Command::new("mknod").args(["-m", "666"]).arg(directory.path().join("dev/null")).args(["c", "1", "3"]));
    Some(directory)
}

/// A file of its own, in place of one that all copies of the tree share.
fn write_anew(path: &Path, text: &str) {
    let _ = fs::remove_file(path);
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

fn exim(address: SocketAddr, to: SocketAddr, recipients: Recipients) -> Prepared {
    let directory = tree("usr/sbin/exim4", &["Debian-exim"])?;
    for folder in ["var/spool/exim4", "var/log/exim4"] {
        fs::create_dir_all(directory.path().join(folder)).unwrap();
        tools::run(Command::new("chown").args(["-R", &format!("{USER}:{USER}")]).arg(directory.path().join(folder)));
    }
    tools::run(Command::new("chown").arg(USER.to_string()).arg(directory.path().join("etc/key.pem")));
    let rcpt = match recipients {
        Recipients::Accept => "",
        Recipients::DeferEverySecond => {
            "  defer condition = ${if eq{${eval10:$acl_c_transaction % 2}}{0}}\n        message = 4.7.1 Not this one\n"
        }
        Recipients::DropOdd => "  drop local_parts = ^r[0-9]*[13579]\\$\n       message = 550 5.1.1 Unknown\n",
        Recipients::FewASession(_) => "",
        other => panic!("Exim is not told {other:?}"),
    };
    let session_max = if let Recipients::FewASession(count) = recipients { count } else { 0 };
    let config = format!(
        "primary_hostname = exim.test\ndisable_ipv6\nlocal_interfaces = 127.0.0.1\ndaemon_smtp_ports = {}\n\
         tls_advertise_hosts = *\ntls_certificate = /etc/cert.pem\ntls_privatekey = /etc/key.pem\n\
         smtputf8_advertise_hosts = *\nchunking_advertise_hosts = *\nsmtp_accept_max = 0\n\
         smtp_accept_max_per_connection = {session_max}\nsmtp_accept_queue_per_connection = 0\nmessage_size_limit = 0\n\
         smtp_connect_backlog = 50\n\
         rfc1413_query_timeout = 0s\nnever_users =\nkeep_environment =\nlog_file_path = /tmp/log_%s\n\
         acl_smtp_mail = mail\nacl_smtp_rcpt = rcpt\nacl_smtp_data = accept\n\
         begin acl\nmail:\n  warn set acl_c_transaction = ${{eval10:0$acl_c_transaction + 1}}\n  accept\n\
         rcpt:\n{rcpt}  accept\n\
         begin routers\non:\n  driver = manualroute\n  transport = smtp\n  route_list = * 127.0.0.1 byname\n\
         \x20 self = send\n\
         begin transports\nsmtp:\n  driver = smtp\n  port = {}\n  allow_localhost\n  hosts_avoid_tls = *\n\
         \x20 message_linelength_limit = 1000000\n\
         begin retry\n* * F,1h,1s\n",
        address.port(),
        to.port(),
    );
    fs::create_dir_all(directory.path().join("etc/exim4")).unwrap();
    write_anew(&directory.path().join("etc/exim4/exim4.conf"), &config);
    fs::set_permissions(directory.path().join("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new("chroot");
    command.arg(directory.path()).args(["/usr/sbin/exim4", "-bdf"]);
    Some((directory, command))
}

fn opensmtpd(address: SocketAddr, to: SocketAddr, recipients: Recipients) -> Prepared {
    let directory = tree("usr/sbin/smtpd", &["opensmtpd", "opensmtpq"])?;
    let limit = match recipients {
        Recipients::Accept => String::new(),
        Recipients::FewASession(count) => format!("smtp limit max-mails {count}\n"),
        Recipients::FewATransaction(count) => format!("smtp limit max-rcpt {count}\n"),
        other => panic!("OpenSMTPD can't do {other:?}"),
    };
    let config = format!(
        "{limit}smtp max-message-size 40M\npki peer cert \"/etc/cert.pem\"\npki peer key \"/etc/key.pem\"\n\
         listen on 127.0.0.1 port {} tls pki peer hostname opensmtpd.test\n\
         action \"on\" relay host \"smtp://{to}\"\nmatch from any for any action \"on\"\n",
        address.port(),
    );
    write_anew(&directory.path().join("etc/smtpd.conf"), &config);
    std::os::unix::fs::symlink("../run", directory.path().join("var/run")).unwrap();
    let mut command = Command::new("chroot");
    command.arg(directory.path()).args(["/usr/sbin/smtpd", "-d", "-f", "/etc/smtpd.conf"]);
    Some((directory, command))
}

/// Dovecot's LMTP server, which keeps what it takes: "ada" takes all, the mailbox of "full" takes nothing, and there
/// are no others.
pub(crate) struct Dovecot {
    pub(crate) peer: Peer,
    pub(crate) socket: PathBuf,
    /// Has a maildir for each user.
    pub(crate) mail: PathBuf,
}

/// None, with the reason printed, where it is not installed.
pub(crate) fn dovecot() -> Option<Dovecot> {
    if tools::run(Command::new("id").arg("-u")).trim() != "0" {
        tools::missing("Dovecot has to be started by root");
        return None;
    }
    let address = tools::free_address();
    let directory = tree("usr/sbin/dovecot", &["dovecot", "dovenull", "vmail"])?;
    let place = |name: &str| directory.path().join(name);
    // The third of the users.
    let vmail = USER + 2;
    let config = format!(
        "protocols = lmtp\nlisten = 127.0.0.1\nbase_dir = /run/dovecot\nlog_path = /tmp/log\nhostname = dovecot.test\n\
         mail_location = maildir:/mail/%n\nmail_save_crlf = yes\nfirst_valid_uid = {vmail}\n\
         ssl = yes\nssl_cert = </etc/cert.pem\nssl_key = </etc/key.pem\nmail_plugins = quota\n\
         plugin {{\n  quota = count:User quota\n  quota_vsizes = yes\n}}\n\
         passdb {{\n  driver = passwd-file\n  args = username_format=%n /etc/users\n}}\n\
         userdb {{\n  driver = passwd-file\n  args = username_format=%n /etc/users\n}}\n\
         service lmtp {{\n  inet_listener lmtp {{\n    address = 127.0.0.1\n    port = {}\n  }}\n\
         \x20 unix_listener lmtp {{\n    mode = 0666\n  }}\n}}\n",
        address.port(),
    );
    fs::create_dir_all(place("etc/dovecot")).unwrap();
    write_anew(&place("etc/dovecot/dovecot.conf"), &config);
    let user = |name: &str, more: &str| format!("{name}::{vmail}:{vmail}::/mail/{name}::{more}\n");
    write_anew(&place("etc/users"), &(user("ada", "") + &user("full", "userdb_quota_rule=*:bytes=10")));
    fs::create_dir(place("mail")).unwrap();
    tools::run(Command::new("chown").arg(vmail.to_string()).arg(place("mail")));
    fs::set_permissions(place("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    let (socket, mail) = (place("run/dovecot/lmtp"), place("mail"));
    let mut command = Command::new("chroot");
    command.arg(directory.path()).args(["/usr/sbin/dovecot", "-F"]);
    Some(Dovecot { peer: Peer::start("Dovecot", address, directory, command), socket, mail })
}

fn aiosmtpd(address: SocketAddr, to: SocketAddr) -> Prepared {
    let python = tools::python("aiosmtpd.smtp")?;
    let directory = tempfile::tempdir().unwrap();
    certificate(directory.path());
    let mut command = Command::new(python);
    command.arg(tools::script("aiosmtpd_relay.py")).args([address.port().to_string(), to.port().to_string()]);
    command.arg(directory.path());
    Some((directory, command))
}

fn haraka(address: SocketAddr, to: SocketAddr) -> Prepared {
    let node = tools::program("node", "Debian: nodejs")?;
    let program = installed("haraka")?.join("node_modules/Haraka");
    if !program.join("bin/haraka").is_file() {
        tools::missing(&format!("no Haraka in {} (.ci/run makes it)", program.display()));
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config");
    for folder in ["config", "plugins", "queue"] {
        fs::create_dir(directory.path().join(folder)).unwrap();
    }
    certificate(&config);
    let files = [
        ("smtp.ini", format!("listen={address}\nnodes=0\n")),
        ("smtp_forward.ini", format!("host=127.0.0.1\nport={}\n", to.port())),
        ("tls.ini", "key=key.pem\ncert=cert.pem\n".to_owned()),
        ("plugins", "tls\nanyone\nqueue/smtp_forward\n".to_owned()),
        ("me", "haraka.test\n".to_owned()),
        ("log.ini", "level=warn\n".to_owned()),
        // Its own default would break lines.
        (
            "connection.ini",
            "[haproxy]\nhosts[] =\n[headers]\nmax_lines=1000\nmax_received=100\n\
          [max]\nbytes=104857600\nmime_parts=1000\nline_length=512\ndata_line_length=1000000\n\
          [message]\nhelo=Haraka\nclose=bye\n[uuid]\nbanner_chars=6\ndeny_chars=0\n"
                .to_owned(),
        ),
        ("../plugins/anyone.js", "exports.hook_rcpt = function (next) { next(OK) }\n".to_owned()),
    ];
    for (name, text) in files {
        fs::write(config.join(name), text).unwrap();
    }
    let mut command = Command::new(node);
    command.arg(program.join("bin/haraka")).arg("-c").arg(directory.path());
    Some((directory, command))
}

/// What `.ci/run` has unpacked for these tests.
pub(crate) fn installed(name: &str) -> Option<PathBuf> {
    // The binary is in TARGET/PROFILE.
    let target = Path::new(env!("CARGO_BIN_EXE_postrider")).ancestors().nth(2)?;
    let folder = target.join("interop").join(name);
    if !folder.is_dir() {
        tools::missing(&format!("{} is not there (.ci/run makes it)", folder.display()));
        return None;
    }
    Some(folder)
}

/// The first of the users made for a server in its tree.
const USER: u32 = 91;
