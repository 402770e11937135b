//! One question to the engine, or one order.

use std::time::Duration;

use serde_json::Value;

use crate::failure::Failure;

/// Where the engine answers and as whom we ask.
pub(crate) struct Client {
    agent: ureq::Agent,
    /// Without a slash at its end.
    url: String,
    token: Option<String>,
}

impl Client {
    pub(crate) fn new(url: &str, token: Option<String>) -> Result<Self, Failure> {
        let url = url.trim_end_matches('/').to_owned();
        let host = url.strip_prefix("http://").ok_or_else(|| Failure::Url(url.clone()))?;
        if host.is_empty() || host.contains(['/', '?', '#', ' ']) {
            return Err(Failure::Url(url));
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            // The engine is asked directly, whatever proxies the shell has for the web.
            .proxy(None)
            .max_redirects(0)
            .user_agent(concat!("postctl/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: config.into(), url, token })
    }

    /// GETs `path`; each `query` value is percent-encoded.
    pub(crate) fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        for (name, value) in query {
            request = request.query(name, value);
        }
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        self.read(request.call())
    }

    /// POSTs JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let mut request = self.agent.post(format!("{}{path}", self.url)).header("Content-Type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        self.read(request.send(body.to_string()))
    }

    /// DELETEs what JSON names.
    pub(crate) fn delete(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let request = self.agent.delete(format!("{}{path}", self.url)).header("Content-Type", "application/json");
        let mut request = request.force_send_body();
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        self.read(request.send(body.to_string()))
    }

    fn read(&self, response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value, Failure> {
        let unreachable = |cause| Failure::Unreachable { url: self.url.clone(), cause };
        let mut response = response.map_err(unreachable)?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string().map_err(unreachable)?;
        let strange = || Failure::Strange { url: self.url.clone(), status };
        let body: Value = serde_json::from_str(&text).map_err(|_| strange())?;
        if status == 200 {
            return Ok(body);
        }
        let said = |key| body["error"][key].as_str().map(str::to_owned).ok_or_else(strange);
        Err(Failure::Refused { status, code: said("code")?, message: said("message")? })
    }

    pub(crate) fn strange(&self) -> Failure {
        Failure::Strange { url: self.url.clone(), status: 200 }
    }
}

/// The engine gives up its own questions after 5 s.
const PATIENCE: Duration = Duration::from_secs(20);
/// 10,000 rows, each with an answer of 4 KiB.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
