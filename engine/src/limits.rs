//! Every bound in the program, by module. A bound that is reached answers 4xx, 429 or waits; nothing grows without one.
//!
//! Over 500 lines: one constant for each bound, with its reason.

// config

/// One configuration file, in bytes.
pub(crate) const CONFIG_FILE_BYTES_MAX: u64 = 8 << 20;
/// The main configuration file and all that it includes.
pub(crate) const CONFIG_FILES_MAX: usize = 4_096;
/// Errors printed for one configuration; the rest is counted.
pub(crate) const CONFIG_ERRORS_MAX: usize = 100;
/// A certificate or private key file, in bytes.
pub(crate) const PEM_FILE_BYTES_MAX: u64 = 1 << 20;
/// A username or password of a route.
pub(crate) const CREDENTIAL_BYTES_MAX: usize = 255;
pub(crate) const CONFIG_SHARDS_MAX: u64 = 256;
pub(crate) const CONFIG_LISTENERS_MAX: usize = 64;
pub(crate) const CONFIG_ROUTE_TARGETS_MAX: usize = 64;
pub(crate) const CONFIG_EGRESS_SOURCES_MAX: usize = 4_096;
pub(crate) const CONFIG_SOURCE_WEIGHT_MAX: u64 = 1_000_000;
pub(crate) const CONFIG_TENANTS_MAX: usize = 100_000;
/// `[[limit]]` tables.
pub(crate) const CONFIG_SHARED_LIMITS_MAX: usize = 1_000;
/// Domains of one tenant.
pub(crate) const CONFIG_TENANT_DOMAINS_MAX: usize = 10_000;
pub(crate) const CONFIG_RETRY_INTERVALS_MAX: usize = 100;
pub(crate) const CONFIG_CONNECTION_LIMIT_MAX: u64 = 10_000;
pub(crate) const CONFIG_DELIVERIES_PER_CONNECTION_MAX: u64 = 1_000_000;
/// What a rate's period may let pass.
pub(crate) const CONFIG_RATE_COUNT_MAX: u32 = 10_000_000;
/// RFC 5321 §4.5.3.1.8: a server takes at least 100 recipients; few take more than 1,000.
pub(crate) const CONFIG_RECIPIENTS_PER_BATCH_MAX: u64 = 1_000;
/// A message is one record and so must fit into one segment of the spool (64 MiB), headers that we add included.
pub(crate) const CONFIG_MESSAGE_BYTES_MAX: u64 = 60 << 20;
pub(crate) const CONFIG_MESSAGE_BYTES_MIN: u64 = 1 << 10;
/// The least that `spool.max_size` may be.
pub(crate) const CONFIG_SPOOL_BYTES_MIN: u64 = 16 << 20;
/// Days of a warm-up.
pub(crate) const CONFIG_WARMUP_DAYS_MAX: usize = 366;
/// Automation rules of one table, a rule's pattern in bytes, and what it may take when it is compiled.
pub(crate) const CONFIG_AUTOMATION_RULES_MAX: usize = 200;
pub(crate) const CONFIG_PATTERN_BYTES_MAX: usize = 4_096;
pub(crate) const CONFIG_PATTERN_COMPILED_BYTES_MAX: usize = 1 << 20;
/// Answers that a rule may wait for.
pub(crate) const CONFIG_THRESHOLD_MAX: u32 = 1_000;

// schedule

/// Answers of peers that a home keeps for its entries, each once.
pub const ANSWERS_KEPT: usize = 65_536;
/// The same in octets: unlike answers may be long.
pub const ANSWERS_KEPT_OCTETS: usize = 16 << 20;
/// Tickets that a home may send to an idle pair's owner without being asked.
pub const STANDING_CREDITS: u32 = 2;
/// Tenants, or campaigns of one, whose debt to the others is remembered while they want no turn.
pub(crate) const FAIR_DEBTORS_KEPT: usize = 1_000;
/// Queues that a home keeps although they hold nothing.
pub const QUEUES_KEPT: usize = 50_000;
/// Pairs that a home, and an owner, keeps although they hold nothing.
pub const PAIRS_KEPT: usize = 50_000;
/// The longest that may be configured between two attempts, and what jitter adds: an eighth.
pub const RETRY_INTERVAL_MAX: std::time::Duration = std::time::Duration::from_secs(7 * 86_400);
pub const RETRY_PAUSE_MAX: std::time::Duration = std::time::Duration::from_secs(8 * 86_400);
const _: () = assert!(RETRY_INTERVAL_MAX.as_secs() * 9 / 8 < RETRY_PAUSE_MAX.as_secs());
/// Entries looked at by one expiry sweep.
pub const EXPIRY_SWEEP_ENTRIES: usize = 20_000;

// runtime

/// A file of the engine's own state, and so what there may be of it.
pub(crate) const STATE_FILE_BYTES_MAX: u64 = 16 << 20;
const _: () = assert!(SUSPENSIONS_MAX as u64 * 1_400 < STATE_FILE_BYTES_MAX);

/// Submission queue entries of a shard's ring. A full queue is submitted early, so this bounds batches, not operations.
pub(crate) const RING_ENTRIES: u32 = 4_096;
/// Completion queue entries. Beyond them the kernel keeps completions in a list of its own, which is slower.
pub(crate) const RING_COMPLETIONS: u32 = 32_768;
const _: () = assert!(RING_COMPLETIONS >= 2 * RING_ENTRIES);
/// How often a ring is asked for while the kernel has no memory for it, and the pause between.
pub(crate) const RING_SET_UP_TRIES: u32 = 20;
pub(crate) const RING_SET_UP_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
/// What one send operation carries, so that a large message shows its progress on the wire.
pub(crate) const SEND_BYTES_PER_OPERATION: usize = 256 << 10;
/// The kernel's own bound on the pieces of one SENDMSG (IOV_MAX).
pub(crate) const SEND_PIECES_PER_OPERATION: usize = 1_024;
/// Connections that wait in the kernel to be accepted, per listening socket; `net.core.somaxconn` may lower it.
pub(crate) const LISTEN_BACKLOG: i32 = 16_384;
/// TLS sessions that one verifier remembers for resumption.
pub(crate) const TLS_SESSIONS_MAX: usize = 4_096;
/// Hosts of an MX set that are looked up; the rest, which has the highest preferences, is not used.
pub(crate) const MX_HOSTS_MAX: usize = 20;
/// Addresses of one host that are used.
pub(crate) const HOST_ADDRESSES_MAX: usize = 16;
/// Answers in the resolver's cache, positive and negative.
pub(crate) const DNS_CACHE_ANSWERS_MAX: u64 = 65_536;
/// Routes that are looked up at once; more wait their turn.
pub(crate) const ROUTE_LOOKUPS_MAX: usize = 256;

/// Usable TLSA records of a host that count.
pub(crate) const TLSA_RECORDS_MAX: usize = 32;
/// Sets of TLSA records whose sessions a shard remembers, and the sessions of each.
pub(crate) const DANE_VERIFIERS_MAX: usize = 1_024;
pub(crate) const DANE_SESSIONS_MAX: usize = 32;
/// Aliases that an answer may lead through.
pub(crate) const DNS_ALIASES_MAX: usize = 16;

/// Policies whose TLS sessions a shard counts.
pub(crate) const TLS_REPORT_POLICIES_MAX: usize = 20_000;

/// An MTA-STS policy, in bytes (RFC 8461 §3.3 suggests 64 KiB), and the hosts that it may name.
pub(crate) const STS_POLICY_BYTES_MAX: usize = 64 << 10;
pub(crate) const STS_HOSTS_MAX: usize = 1_000;
/// A policy holds for a year at most (RFC 8461 §3.2).
pub(crate) const STS_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(31_557_600);
/// Policies that are kept. Beyond, the one that ends first makes room.
pub(crate) const STS_POLICIES_MAX: usize = 20_000;
/// Policies that are fetched at once, and how long a fetch may take; the domain's mail waits for it.
pub(crate) const STS_FETCHES_MAX: usize = 64;
pub(crate) const STS_FETCH_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);
/// Between two fetches for one domain (RFC 8461 §3.3), and the domains for which it is remembered.
pub(crate) const STS_FETCH_PAUSE: std::time::Duration = std::time::Duration::from_secs(300);
pub(crate) const STS_PAUSES_KEPT: usize = 20_000;
/// A policy is fetched anew at this age (RFC 8461 §3.3 suggests a day).
pub(crate) const STS_REFRESH_AGE: std::time::Duration = std::time::Duration::from_secs(86_400);

// pool

/// Hosts whose failures one pair remembers.
pub const HOST_MEMORIES_MAX: usize = 1_000;
/// Input that is smaller may be one segment that isn't full: what its sender has more of may wait to be asked for.
pub(crate) const SMALL_INPUT_BYTES: usize = 4_096;
/// For how long a host whose TLS failed gets opportunistic mail in the clear.
pub const CLEAR_MEMORY: std::time::Duration = std::time::Duration::from_secs(3_600);
/// For how long it comes before the hosts that the DNS prefers: the mail that waits is to go there in the clear. What
/// comes later goes to whom it should.
pub const CLEAR_AT_ONCE: std::time::Duration = std::time::Duration::from_secs(30);
/// For how long a host that lacked what a message needed is not asked for it again, while others may have it.
pub const LACK_MEMORY: std::time::Duration = std::time::Duration::from_secs(3_600);
/// For how long retries prefer other hosts to one that put a message off for its own sake and has taken none since. It
/// is longer than a retry waits by default.
pub const UNWELL_MEMORY: std::time::Duration = std::time::Duration::from_secs(86_400);
/// The longest first pause after a host failed.
pub const HOST_BACK_OFF_FIRST_MAX: std::time::Duration = std::time::Duration::from_secs(30);
/// For how long others wait for the one connection that tries a host again.
pub const PROBE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
/// Where there may be no more connections, one ends after so many deliveries, whatever is allowed, if mail waits that
/// fits none of its pair's, or a site of the same provider that has fewer. It is what is allowed by default.
pub const DELIVERIES_IN_A_ROW: u32 = 100;
/// How long a source leaves a host alone for which it has no port left; one that was used may be again after a minute.
pub const PORT_PAUSE: std::time::Duration = std::time::Duration::from_secs(2);
/// The longest pause after a host failed often.
pub const HOST_BACK_OFF_MAX: std::time::Duration = std::time::Duration::from_secs(600);

/// For how long less is put in flight with a site after something went wrong between its messages.
pub const DISTRUST: std::time::Duration = std::time::Duration::from_secs(86_400);
/// Sites that a shard trusts less at a time; those that it has distrusted longest are trusted again first.
pub const DISTRUSTED_SITES_MAX: usize = 10_000;
/// Thresholds of automation rules that a shard counts answers for.
pub(crate) const AUTOMATION_WINDOWS_MAX: usize = 4_096;
/// For how long limits that were just halved are not halved again.
pub(crate) const HALVE_PAUSE: std::time::Duration = std::time::Duration::from_secs(10);
/// Suspensions in force, and limits that rules have set.
pub const SUSPENSIONS_MAX: usize = 10_000;
/// For how long mail waits that its owner takes for suspended, and its home does not.
pub(crate) const SUSPENDED_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);
/// Of a suspension's reason this much is kept.
pub const SUSPENSION_REASON_OCTETS_MAX: usize = 400;
/// The longest time that an operator may suspend for.
pub const SUSPENSION_MAX: std::time::Duration = std::time::Duration::from_secs(366 * 86_400);
/// For how long a source gets no mail for a roll-up one of whose hosts refuses its address in the greeting.
pub const SOURCE_REFUSED_PAUSE: std::time::Duration = std::time::Duration::from_secs(1_800);
/// A site's name in the configuration: the hosts of a large MX set.
pub(crate) const SITE_NAME_BYTES_MAX: usize = 4_096;
/// For how long a domain whose peer refuses a source's address gets its mail from the pool's other sources.
pub const SOURCE_AVOIDED: std::time::Duration = std::time::Duration::from_secs(4 * 3_600);
/// Refused (domain, source) pairs that a home remembers.
pub const SOURCES_AVOIDED_MAX: usize = 10_000;

/// A transaction that is late by no more keeps its place in the pace: half an interval, but between these.
pub(crate) const PACE_LATENESS_MIN: std::time::Duration = std::time::Duration::from_millis(10);
pub(crate) const PACE_LATENESS_MAX: std::time::Duration = std::time::Duration::from_millis(100);
/// MAILs may arrive by so much closer together than they were sent, and a limit still holds where they arrive.
pub const ARRIVAL_SPREAD: std::time::Duration = std::time::Duration::from_millis(10);
/// Rates over periods from here on are reserved ahead durably.
pub(crate) const RESERVED_PERIOD_MIN: std::time::Duration = std::time::Duration::from_secs(60);
/// A paced pair asks homes for what goes in this time.
pub(crate) const PACED_AHEAD: std::time::Duration = std::time::Duration::from_millis(100);
/// The shard that keeps the limits over many pairs. There is one in every engine.
pub(crate) const LIMIT_KEEPER: usize = 0;
/// For how long an owner tries to let a roll-up go to another shard. Its mail waits meanwhile.
pub(crate) const MOVE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(3);
/// How often it is looked how busy shards are, and at how many looks one must have been so before something moves.
pub(crate) const MOVE_LOOK_INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);
pub(crate) const MOVE_LOOKS: u32 = 4;
/// For how long what has moved, or could not, stays where it is. It bounds how many such there are.
pub(crate) const MOVE_STAY: std::time::Duration = std::time::Duration::from_secs(300);
/// Roll-ups of a shard, those that carry most, of which it is looked whether one should move.
pub(crate) const ROLLUPS_TOLD_MAX: usize = 64;
/// Limits over many pairs that reloads since the start have taken away: their ids stay.
pub(crate) const RETIRED_LIMITS_MAX: usize = 10_000;
/// How long a permit of a limit over many pairs may lie with a ticket that isn't begun.
pub(crate) const PERMIT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);
/// How often homes are told when a paced pair goes on.
pub(crate) const PACED_NOTICE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);

// mail/reply and deliver

/// RFC 5321 §4.5.3.1.5 allows 512 octets a reply line; large providers send more. The rest of a longer line is dropped.
pub(crate) const REPLY_LINE_OCTETS_MAX: usize = 2_048;
/// Lines of one reply; an EHLO reply has about 20.
pub(crate) const REPLY_LINES_MAX: usize = 128;
/// Octets dropped from one reply before the peer is given up.
pub(crate) const REPLY_DROPPED_OCTETS_MAX: usize = 65_536;
/// Of a refusal's text this much is read to see whom it blames.
pub(crate) const BLAME_TEXT_OCTETS_MAX: usize = 2_048;
/// Of a reply's text this much is kept in records.
pub(crate) const ANSWER_TEXT_OCTETS_MAX: usize = 4_096;
/// Transactions on one connection: the one whose content is under way, and the one that rides behind it.
pub(crate) const IN_FLIGHT_MAX: usize = 2;
/// Whole transactions on one connection, `max_in_flight`. The peer's replies to all of them must find room in the
/// kernel's buffers while we write.
pub(crate) const CONFIG_IN_FLIGHT_MAX: u64 = 64;
/// Octets of content in flight above which no further whole transaction is begun.
pub(crate) const IN_FLIGHT_OCTETS_MAX: u64 = 1 << 20;
/// Content that needs dot-stuffing is copied in windows of this size.
pub(crate) const STUFF_WINDOW_OCTETS: usize = 262_144;

// accept

/// A command line with its CRLF. RFC 5321 §4.5.3.1.4 asks for 512 octets and more with each extension; a caller's read
/// buffer must hold one whole line.
pub const COMMAND_LINE_BYTES_MAX: usize = 4_096;
/// `SmtpServer::handle` returns once it has appended this much, so that the replies can be written.
pub const REPLY_BYTES_MAX: usize = 16 << 10;
/// Recipients of one transaction; said in `LIMITS RCPTMAX`, above it 452 (RFC 5321 §4.5.3.1.8 asks for 100).
pub const RECIPIENTS_MAX: usize = 1_000;
/// Refused commands and recipients since the last accepted message; then 421.
pub const SESSION_ERRORS_MAX: u32 = 20;
/// RFC 5321 §4.5.3.2.7: what a server waits for the next command or octet of content.
pub const SERVER_IDLE_MAX: std::time::Duration = std::time::Duration::from_secs(300);
/// Content memory taken at once because a client declared SIZE; the rest is taken as octets arrive.
pub(crate) const CONTENT_RESERVE_BYTES_MAX: u64 = 1 << 20;
/// A client's EHLO name as we keep it (RFC 5321 §4.5.3.1.2).
pub(crate) const HELO_BYTES_MAX: usize = 255;
/// RFC 5321 §4.5.3.1.1 says 64, but bounce addresses with keys in them (VERP, BATV, SRS) are longer.
pub(crate) const LOCAL_PART_BYTES_MAX: usize = 255;
/// RFC 5321 §4.5.3.1.2 and RFC 1035 §2.3.4.
pub(crate) const DOMAIN_BYTES_MAX: usize = 255;
pub(crate) const DOMAIN_LABEL_BYTES_MAX: usize = 63;
/// Text of one reply line that tells why something was refused.
pub(crate) const REFUSAL_TEXT_BYTES_MAX: usize = 400;
/// Received fields of a message; above it, it loops (RFC 5321 §6.3).
pub(crate) const RECEIVED_FIELDS_MAX: usize = 100;
/// X-Campaign and X-Virtual-MTA values.
pub(crate) const ROUTING_NAME_BYTES_MAX: usize = 255;
pub(crate) const SCHEDULE_FIELD_BYTES_MAX: usize = 1_024;
/// Header fields kept in an envelope for events, and how much of each value.
pub(crate) const CAPTURED_FIELDS_MAX: usize = 64;
pub(crate) const CAPTURED_VALUE_BYTES_MAX: usize = 1_024;
/// Field occurrences that one signature names; further ones, those on top, stay unsigned (RFC 6376 §5.4.2).
pub(crate) const SIGNED_FIELDS_MAX: usize = 256;
/// Signatures on one message.
pub(crate) const SIGNATURES_MAX: usize = 16;

// outcome and runtime/event_file

/// Of an answer's text this much is read to classify it.
pub(crate) const CLASSIFY_TEXT_OCTETS_MAX: usize = 2_048;
/// JSON gathered in memory before it becomes a frame; a frame exceeds it by at most one record's events.
pub(crate) const EVENT_FRAME_BYTES_MAX: usize = 4 << 20;
/// Batches of records that wait for the event writer. Beyond them senders keep theirs.
pub(crate) const EVENT_BATCHES_MAX: usize = 256;
/// An event file, compressed, before the next is begun.
pub(crate) const EVENT_FILE_BYTES_MAX: u64 = 128 << 20;
/// A file's age before the next is begun.
pub(crate) const EVENT_FILE_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(3_600);
/// The longest pause between two tries on a failing event disk.
pub(crate) const EVENT_RETRY_PAUSE_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// Events that wait for one subscriber; it is told how many more it missed.
pub(crate) const EVENT_STREAM_EVENTS_MAX: usize = 65_536;
/// Subscribers of one engine that are served at a time.
pub(crate) const EVENT_STREAMS_MAX: usize = 64;

// shard

/// Messages that wait for reads of others to end, and are asked for again in one turn.
pub const UNREAD_PER_TURN: usize = 256;

/// Client sessions of one shard, however many sockets it may have.
pub const SESSIONS_MAX: usize = 20_000;
/// How long a client may take to read our last words before its session is broken off.
pub const SESSION_CLOSE_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// RSA signatures of one turn, at about a quarter of a millisecond each.
pub const RSA_SIGNATURES_PER_TURN: usize = 4;
/// Memory of what is being received by one shard's sessions, or waits to be signed. Above it the next to go on is
/// refused at its end, but for what is small.
pub(crate) const RECEIVING_BYTES_MAX: u64 = 512 << 20;
pub(crate) const RECEIVING_SMALL_BYTES: u64 = 64 << 10;
/// Octets of messages that wait in one shard for room that the spool is about to have, and how long each does. Clients
/// wait ten minutes for the answer (RFC 5321 §4.5.3.2.6), programs often half a minute.
pub(crate) const UNPLACED_BYTES_MAX: u64 = 512 << 20;
pub(crate) const UNPLACED_PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);
/// Messages that wait to be signed.
pub const SIGNING_QUEUE_MAX: usize = 10_000;
/// What peers may bring between two turns; a shard that has so much is behind.
pub const TURN_INPUTS: usize = 64;
/// Connections that a shard which is behind begins in one turn.
pub const OPENINGS_BEHIND: usize = 16;
/// Idle connections that are dismissed in one turn because there may be no more sockets.
pub const DISMISSED_PER_TURN: usize = 64;
/// Messages from other shards handled in one turn.
pub const INBOX_MESSAGES_PER_TURN: usize = 4_096;
/// Entries released in one turn.
pub const DUE_ENTRIES_PER_TURN: usize = 1_024;
/// Routes that a shard remembers.
pub const ROUTES_CACHED_MAX: usize = 100_000;
/// Messages read from the disk at once for one question, and how long it goes on with more of them: less than
/// `HTTP_BACKEND_TIMEOUT`.
pub const ASK_READS_MAX: usize = 1_000;
pub const ASK_PATIENCE: std::time::Duration = std::time::Duration::from_secs(4);
/// Of a message that an operator looks at.
pub const INSPECTED_OCTETS_MAX: usize = 16 << 20;
/// How often time limits of minutes are looked at.
pub const SWEEP_INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);
/// How long an outcome waits for a message's commit to ride with, and how many of a log do; a crash repeats the
/// deliveries of these, and of `QUIET_DELAY`.
pub const OUTCOME_COMMIT_DELAY: std::time::Duration = std::time::Duration::from_millis(5);
pub const OUTCOMES_GATHERED_MAX: usize = 64;
/// How long a log's upkeep, where some is due, waits for such a commit.
pub const UPKEEP_DELAY: std::time::Duration = std::time::Duration::from_millis(2);
/// Starts in a row that find a shard dead over the same message, before that is quarantined; and such messages that are
/// remembered.
pub const UNCLEAN_STARTS_MAX: u64 = 3;
pub const SUSPECTS_MAX: usize = 32;
/// How long after a commit that several messages shared the next may begin.
pub const COMMIT_GATHER: std::time::Duration = std::time::Duration::from_micros(250);
/// A log whose commit takes longer takes no mail, and nothing is begun that would have to be recorded. To refuse is
/// better than to let senders wait until they give up, and send again what is then taken twice.
pub const COMMIT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
/// A log that failed to write is opened again at once. Where it fails again, such pauses come between, each twice the
/// last, until it has worked for twice the longest.
pub const REOPEN_PAUSE_MIN: std::time::Duration = std::time::Duration::from_millis(100);
pub const REOPEN_PAUSE_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// A log that has taken no write for so long does not work.
pub const WRITE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
const _: () = assert!(WRITE_PATIENCE.as_secs() > 2 * REOPEN_PAUSE_MAX.as_secs());
/// How often it is told that a log fails still.
pub(crate) const FAILURE_COMPLAINT_INTERVAL: std::time::Duration = std::time::Duration::from_secs(60);
/// Turns in which a commit goes before the upkeep of its log; then both are done in one.
pub const UPKEEP_SKIPPED_MAX: u32 = 8;
/// When a pool without a usable source is looked at again.
pub const SOURCE_RETRY: std::time::Duration = std::time::Duration::from_secs(5);
/// When a message whose log takes no outcomes, or whose events no more, is looked at again.
pub const UNRECORDED_RETRY: std::time::Duration = std::time::Duration::from_secs(5);
/// When a message that can't be read from the spool is tried again.
pub const UNREADABLE_RETRY: std::time::Duration = std::time::Duration::from_secs(3_600);

// runtime: shard loop

/// Messages that a shard's mailbox holds.
pub(crate) const MAILBOX_CAPACITY: usize = 65_536;
/// How long an outcome, and how many of them, wait at a pair's owner for their home to wake by itself.
pub(crate) const QUIET_DELAY: std::time::Duration = std::time::Duration::from_millis(1);
pub(crate) const QUIET_MESSAGES_MAX: usize = 32;
/// How soon a turn follows one that left something overdue, unless something happens before.
pub(crate) const OVERDUE_PAUSE: std::time::Duration = std::time::Duration::from_millis(1);
/// Messages taken from a mailbox at a time.
pub(crate) const MAILBOX_BATCH: usize = 256;
/// Durable records of a shard that wait for the event log; above it no mail is taken.
pub(crate) const EVENTS_WAITING_MAX: usize = 20_000;
/// Above it no attempt is begun either: each takes some 1.5 KB of memory, and a start has to hold all of them again.
pub(crate) const EVENTS_HELD_MAX: usize = 100_000;
/// Sessions that a shard may have above its share before it leaves the next to others.
pub(crate) const SESSIONS_ABOVE_SHARE: usize = 1;
pub(crate) const SHARE_PAUSE: std::time::Duration = std::time::Duration::from_millis(2);
/// How long a listener pauses when descriptors have run out.
pub(crate) const LISTENER_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
/// How often a listener that can't accept says so.
pub(crate) const LISTENER_COMPLAINT_INTERVAL: std::time::Duration = std::time::Duration::from_secs(60);
/// Descriptors that the engine itself needs: rings, logs, event files, HTTP, DNS; and more for each shard.
pub(crate) const DESCRIPTORS_OWN: usize = 24;
pub(crate) const DESCRIPTORS_OWN_PER_SHARD: usize = 12;
/// What must be left for each shard's connections, in and out. An eighth stays in reserve, and one socket in four is
/// for what goes out, so this is the least that serves a client.
pub(crate) const DESCRIPTORS_PER_SHARD_MIN: usize = 8;
/// How long a shard that exits waits for its last commits.
pub(crate) const SHUTDOWN_COMMIT_GRACE: std::time::Duration = std::time::Duration::from_secs(5);
/// A connection's receive buffer, at first and when it was filled. A command line fits into the first.
pub(crate) const RECEIVE_BYTES_MIN: usize = 4_096;
pub(crate) const RECEIVE_BYTES_MAX: usize = 65_536;
/// Plain octets that are encrypted and sent at a time.
pub(crate) const TLS_WRITE_BYTES: usize = 131_072;
/// Plain octets of a full TLS record (RFC 8446 §5.1).
pub(crate) const TLS_RECORD_BYTES: usize = 16_384;
const _: () = assert!(TLS_WRITE_BYTES.is_multiple_of(TLS_RECORD_BYTES));
/// How long a connection that can't be sent to any more is still listened to.
pub(crate) const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(1);
/// How long the answer to QUIT is waited for while the engine stops; looked at once a second.
pub(crate) const QUIT_PATIENCE_STOPPING: std::time::Duration = std::time::Duration::from_millis(500);
/// How long a closed connection waits for the peer's FIN.
pub(crate) const LINGER: std::time::Duration = std::time::Duration::from_secs(2);
/// The same while the engine stops.
pub(crate) const LINGER_STOPPING: std::time::Duration = std::time::Duration::from_millis(100);

/// The file of reserved limits before it is shortened; twice what still counts, where that is more.
pub(crate) const LIMIT_FILE_BYTES_MAX: u64 = 16 << 20;
/// How soon it is tried again after an error.
pub(crate) const LIMIT_FILE_RETRY_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);
/// The longest period of a rate.
pub(crate) const LIMIT_PERIOD_MAX: std::time::Duration = std::time::Duration::from_secs(86_400);

// runtime: control

/// DNS lookups under way at once.
pub(crate) const LOOKUPS_RUNNING_MAX: usize = 1_000;
/// Pairs whose owner the directory remembers; beyond, the pair's name decides.
pub(crate) const PAIRS_MAX: usize = 1_000_000;
/// How long a log line waits for its reader before it is lost.
pub(crate) const LOG_PATIENCE: std::time::Duration = std::time::Duration::from_millis(20);

/// Questions about queued mail that shards are asked at a time; each may take them some 100 ms.
pub(crate) const QUESTIONS_RUNNING_MAX: usize = 2;
/// How often it is looked whether the sources' addresses are on this machine.
pub(crate) const PLUMBING_INTERVAL: std::time::Duration = std::time::Duration::from_secs(2);
/// How often the site of a domain that shaping has a table for is looked up, whatever its TTL.
pub(crate) const RULE_SITE_INTERVAL_MIN: std::time::Duration = std::time::Duration::from_secs(5);
pub(crate) const RULE_SITE_INTERVAL_MAX: std::time::Duration = std::time::Duration::from_secs(3_600);
/// How long the first mail waits until those sites are known.
pub(crate) const RULE_SITES_PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
/// A shard that takes no turn for this long is stuck: it takes one every second at least.
pub(crate) const HEARTBEAT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(15);
/// Campaigns of the embedding API that are open at a time.
pub(crate) const CAMPAIGNS_MAX: usize = 10_000;
/// Of a campaign's messages that come in one call, those whose answer is waited for at a time.
pub(crate) const CAMPAIGN_MESSAGES_UNANSWERED_MAX: usize = 1_024;
/// The longest that an embedder's message waits in a shard's full mailbox before it is refused.
pub(crate) const INJECT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

// admin

/// HTTP connections served at a time, per listener; more wait in the kernel.
pub(crate) const HTTP_CONNECTIONS_MAX: usize = 64;
/// Requests served at a time, per listener, but for probes; above it 503.
pub(crate) const HTTP_REQUESTS_MAX: usize = 24;
const _: () = assert!(HTTP_REQUESTS_MAX < HTTP_CONNECTIONS_MAX);
/// From a request's first byte to its answer's first byte, and for a peer to take some of a waiting answer.
pub(crate) const HTTP_REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
/// How long a connection may stay open between requests.
pub(crate) const HTTP_IDLE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);
/// The shards' time to answer one administrative question.
pub(crate) const HTTP_BACKEND_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
const _: () = assert!(HTTP_BACKEND_TIMEOUT.as_secs() < HTTP_REQUEST_TIMEOUT.as_secs());
/// For a configuration to be read and all shards to have it: keys and routes may be many.
pub(crate) const HTTP_RELOAD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(9);
const _: () = assert!(HTTP_RELOAD_TIMEOUT.as_secs() < HTTP_REQUEST_TIMEOUT.as_secs());
/// After so long, what is due and held by nothing says what it waits for.
pub(crate) const DUE_FOR_LONG: std::time::Duration = std::time::Duration::from_secs(5);
/// Rows of one answer when the request doesn't say, and at most.
pub(crate) const HTTP_ROWS_DEFAULT: usize = 100;
pub(crate) const HTTP_ROWS_MAX: usize = 10_000;

// engine

/// Segments that a shard's share of the spool is divided into at least.
pub(crate) const SEGMENTS_PER_SHARD_MIN: u64 = 8;
pub(crate) const SEGMENT_BYTES_MIN: u64 = 1 << 20;
pub(crate) const SEGMENT_BYTES_UNIT: u64 = 1 << 16;

/// What content may take in memory, so that a process in a small machine or control group is not killed for it. The
/// constants above are the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBounds {
    /// Of each shard: being received; waiting for room in the spool; events that wait for their log.
    pub receiving_bytes: u64,
    pub unplaced_bytes: u64,
    pub events: usize,
    /// Of each log: waiting for its commit; read, and in somebody's hands.
    pub pending_bytes: u64,
    pub read_bytes: u64,
}

impl MemoryBounds {
    pub const MOST: Self = Self {
        receiving_bytes: RECEIVING_BYTES_MAX,
        unplaced_bytes: UNPLACED_BYTES_MAX,
        events: EVENTS_HELD_MAX,
        pending_bytes: postrider_spool::limits::PENDING_MAIL_BYTES_MAX,
        read_bytes: postrider_spool::limits::READ_BYTES_MAX,
    };

    /// A quarter for what is received, three sixteenths for what is then done with it, and an eighth for events: where
    /// all is used at once, nearly half is left for the rest, and for buffers that grow by being copied.
    pub fn of(memory_bytes: u64, shards: usize) -> Self {
        let content = memory_bytes.saturating_sub(MEMORY_OWN_BYTES).max(memory_bytes / 4) / shards as u64;
        let most = Self::MOST;
        Self {
            receiving_bytes: (content / 4).min(most.receiving_bytes),
            unplaced_bytes: (content / 16).min(most.unplaced_bytes),
            events: usize::try_from(content / 8 / EVENT_BYTES).unwrap_or(usize::MAX).min(most.events),
            pending_bytes: (content / 16).min(most.pending_bytes),
            read_bytes: (content / 16).min(most.read_bytes),
        }
    }
}

/// What an engine takes that has nothing to do.
const MEMORY_OWN_BYTES: u64 = 64 << 20;
/// What an event takes that waits.
const EVENT_BYTES: u64 = 1_536;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_takes_little_more_than_half_of_the_memory() {
        assert_eq!(MemoryBounds::of(u64::MAX, 2), MemoryBounds::MOST);
        assert_eq!(MemoryBounds::of(24 << 30, 2), MemoryBounds::MOST);
        for (mib, shards) in [(64, 1), (200, 2), (512, 4), (1_024, 64), (4_096, 2)] {
            let MemoryBounds { receiving_bytes, unplaced_bytes, events, pending_bytes, read_bytes } =
                MemoryBounds::of(mib << 20, shards);
            let shard = receiving_bytes + unplaced_bytes + events as u64 * EVENT_BYTES + pending_bytes + read_bytes;
            assert!(shard * shards as u64 <= (mib << 20) / 16 * 9, "{mib} MiB, {shards} shards: {shard}");
            assert!(receiving_bytes > RECEIVING_SMALL_BYTES);
        }
    }
}
