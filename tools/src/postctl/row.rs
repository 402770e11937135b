//! What the engine tells, as far as the human views show it. The engine may tell more.

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(crate) struct Queues {
    pub(crate) total: u64,
    pub(crate) queues: Vec<Queue>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Queue {
    pub(crate) queue: String,
    pub(crate) domain: String,
    pub(crate) tenant: Option<String>,
    pub(crate) campaign: Option<String>,
    pub(crate) site: Option<String>,
    pub(crate) egress_source: Option<String>,
    pub(crate) depth: u64,
    pub(crate) ready: u64,
    pub(crate) rate_per_s: f64,
    pub(crate) next_due: Option<String>,
    pub(crate) last_answer: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Messages {
    pub(crate) messages: Vec<Message>,
    #[serde(default)]
    pub(crate) truncated: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    pub(crate) id: String,
    pub(crate) recipient: String,
    pub(crate) queue: String,
    pub(crate) num_attempts: u32,
    pub(crate) due: Option<String>,
    pub(crate) last_answer: Option<String>,
    pub(crate) blocked_by: Option<String>,
    #[serde(default)]
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) sender: String,
    pub(crate) created: Option<String>,
    pub(crate) expires: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) ready: bool,
    pub(crate) reason: Option<String>,
    pub(crate) version: String,
    pub(crate) hostname: String,
    pub(crate) node_id: String,
    pub(crate) started: String,
    pub(crate) uptime_s: u64,
    pub(crate) shards: u32,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) spool: Spool,
    pub(crate) events: Events,
    pub(crate) messages: u64,
    pub(crate) recipients: u64,
    pub(crate) connections_in: u64,
    pub(crate) connections_out: u64,
    pub(crate) received: u64,
    pub(crate) delivered: u64,
    pub(crate) deferred: u64,
    pub(crate) failed: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Listener {
    pub(crate) protocol: String,
    pub(crate) address: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Spool {
    pub(crate) path: String,
    pub(crate) durability: String,
    pub(crate) used_bytes: u64,
    pub(crate) max_bytes: u64,
    pub(crate) closed_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Events {
    pub(crate) path: String,
    pub(crate) blocked: Option<String>,
}

/// An entry of either list.
#[derive(Deserialize)]
pub(crate) struct Suspended {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) tenant: Option<String>,
    pub(crate) campaign: Option<String>,
    pub(crate) domain: Option<String>,
    pub(crate) egress_source: Option<String>,
    pub(crate) site: Option<String>,
    pub(crate) reason: String,
    /// What is left of it.
    pub(crate) duration: String,
    /// It is not suspended, but has these limits.
    pub(crate) limits: Option<serde_json::Value>,
}

impl Suspended {
    pub(crate) fn what(&self) -> String {
        let parts = [
            ("", &self.name),
            ("tenant ", &self.tenant),
            ("campaign ", &self.campaign),
            ("domain ", &self.domain),
            ("by ", &self.egress_source),
            ("at ", &self.site),
        ];
        let parts = parts.into_iter().filter_map(|(word, part)| Some(format!("{word}{}", part.as_ref()?)));
        let what = parts.collect::<Vec<_>>().join(", ");
        match &self.limits {
            Some(limits) => format!("{what}: not suspended, limited to {limits}"),
            None => what,
        }
    }
}

/// What a configuration has changed of the one before.
#[derive(Deserialize)]
pub(crate) struct Reloaded {
    pub(crate) added: Vec<String>,
    pub(crate) removed: Vec<String>,
    pub(crate) changed: Vec<String>,
    pub(crate) since: String,
}
