//! The administrative HTTP service: who may ask what, and in which shape answers go out.
//!
//! Every answer is JSON but `/metrics`; every error is `{"error":{"code","message"}}`. Without configured tokens only
//! loopback peers are served, and only under a name that no web page can take over (DNS rebinding); with tokens every
//! peer needs one, loopback included. Liveness and readiness are told to anybody, their reasons are not.
//!
//! See also: `http_connection.rs` for bounds on connections, `openapi.json` for the calls.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest;
use axum::extract::connect_info::Connected;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{ConnectInfo, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, Version, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Extension, Json, Router};
use postrider_spool::record::MessageId;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{Semaphore, watch};

use super::http_connection::BoundedListener;
use super::http_crowd::Seat;
use super::metrics::Metrics;
use super::{Backend, MessageFilter, MessageRow, QueueReport, Reply, Status, TlsReportRow, Unavailable};
use super::{http_bounce, http_inspect, http_reload, http_suspend};
use crate::limits::{HTTP_BACKEND_TIMEOUT, HTTP_REQUESTS_MAX, HTTP_ROWS_DEFAULT, HTTP_ROWS_MAX};
use crate::mail::address::canonical_address;

/// Who may ask.
#[derive(Debug, Clone, Default)]
pub struct AdminOptions {
    /// Lower-case hexadecimal. Empty: loopback peers only, without a token.
    pub admin_token_sha256: Vec<String>,
}

/// Serves one listener until `shutdown` is ready and the requests then under way are answered. Needs a tokio runtime
/// with I/O and time.
pub async fn serve(
    listener: tokio::net::TcpListener,
    options: watch::Receiver<AdminOptions>,
    backend: Arc<dyn Backend>,
    metrics: Arc<Metrics>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let service = Arc::new(Service { options, backend, metrics, turns: Semaphore::new(HTTP_REQUESTS_MAX) });
    let app = router(service).into_make_service_with_connect_info::<Peer>();
    axum::serve(BoundedListener::new(listener), app).with_graceful_shutdown(shutdown).await
}

pub(super) struct Service {
    /// As they are now.
    options: watch::Receiver<AdminOptions>,
    pub(super) backend: Arc<dyn Backend>,
    metrics: Arc<Metrics>,
    /// Of requests that are served at a time.
    turns: Semaphore,
}

pub(super) type Shared = State<Arc<Service>>;

fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/api/admin/queues/v1", get(queues))
        .route("/api/admin/messages/v1", get(messages))
        .route("/api/admin/tls-report/v1", get(tls_report))
        .route("/api/admin/messages/v1/{id}", get(message))
        .route("/api/admin/status/v1", get(status))
        .route(
            "/api/admin/suspend-ready-q/v1",
            get(http_suspend::list_ready).post(http_suspend::suspend_ready).delete(http_suspend::resume),
        )
        .route(
            "/api/admin/suspend/v1",
            get(http_suspend::list).post(http_suspend::suspend).delete(http_suspend::resume),
        )
        .route("/api/admin/inspect-message/v1", get(http_inspect::inspect))
        .route("/api/admin/bounce/v1", post(http_bounce::bounce))
        .route("/api/admin/release/v1", post(http_bounce::release))
        .route("/api/admin/reload/v1", post(http_reload::reload))
        .route("/metrics", get(metrics_text))
        .route("/metrics.json", get(metrics_json))
        .route("/api/openapi.json", get(openapi))
        .route("/api/check-liveness/v1", get(liveness))
        .route("/api/check-readiness/v1", get(readiness))
        .fallback(no_such_call)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&service), admit))
        .with_state(service)
}

/// The client's address, and its connection's place among others.
#[derive(Debug, Clone)]
struct Peer {
    address: SocketAddr,
    seat: Option<Seat>,
}

impl Connected<IncomingStream<'_, BoundedListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, BoundedListener>) -> Self {
        Self { address: *stream.remote_addr(), seat: stream.io().seat() }
    }
}

/// An error as clients see it.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({ "error": { "code": self.code, "message": self.message } });
        let mut response = (self.status, Json(body)).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            // RFC 9110 §11.6.1: a 401 names the scheme.
            let challenge = header::HeaderValue::from_static("Bearer realm=\"postrider\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl From<Unavailable> for ApiError {
    fn from(Unavailable(reason): Unavailable) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", reason)
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let (status, code) = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            _ => (StatusCode::BAD_REQUEST, "bad_request"),
        };
        Self::new(status, code, rejection.body_text())
    }
}

/// Whether the request showed that it may see everything.
#[derive(Debug, Clone, Copy)]
struct Authorised(bool);

async fn admit(
    State(service): Shared,
    ConnectInfo(Peer { address, seat }): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let permission = match host(&request) {
        Ok(host) => service.options.borrow().check(address, host, request.headers()),
        Err(malformed) => return malformed.into_response(),
    };
    let open_to_all = matches!(request.uri().path(), LIVENESS | READINESS);
    match permission {
        Err(refusal) if !open_to_all => refusal.into_response(),
        permission => {
            // Who is served keeps its connection, so there are only so many, and some are left for probes.
            let turn = service.turns.try_acquire();
            if turn.is_err() && !open_to_all {
                let message = "as many requests as may be are being served; try again";
                return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message).into_response();
            }
            if let Some(seat) = seat {
                seat.serve();
            }
            request.extensions_mut().insert(Authorised(permission.is_ok()));
            next.run(request).await
        }
    }
}

/// Which host is asked for. A program that speaks HTTP/1.0 need not say; it is no browser.
fn host(request: &Request) -> Result<&str, ApiError> {
    let mut fields = request.headers().get_all(header::HOST).iter();
    let field = fields.next();
    // RFC 9112 §3.2: a request of HTTP/1.1 has one, and none has several.
    if fields.next().is_some() || field.is_none() && request.version() == Version::HTTP_11 {
        return Err(ApiError::bad_request("a request has one Host field"));
    }
    let field = match field {
        Some(field) => field.to_str().map_err(|_| ApiError::bad_request("Host: is no name and no address"))?,
        None => "localhost",
    };
    // RFC 9112 §3.2.2: what the request line says counts, and not the field.
    Ok(request.uri().authority().map_or(field, |authority| authority.as_str()))
}

impl AdminOptions {
    fn check(&self, peer: SocketAddr, host: &str, headers: &HeaderMap) -> Result<(), ApiError> {
        if !self.admin_token_sha256.is_empty() {
            return self.check_token(headers);
        }
        let forbidden = |message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", message));
        if !peer.ip().to_canonical().is_loopback() {
            return forbidden("only loopback clients are served until the listener has admin_tokens");
        }
        if !names_this_machine(host) {
            return forbidden("without admin_tokens the Host must be localhost or an IP address");
        }
        Ok(())
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let unauthorised = |message| Err(ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message));
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        // RFC 9110 §11.1: the scheme's case does not matter.
        let Some((scheme, token)) = given.and_then(|given| given.split_once(' ')) else {
            return unauthorised("an admin token is needed: Authorization: Bearer TOKEN");
        };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return unauthorised("only Bearer tokens are taken");
        }
        let shown = hexadecimal(digest::digest(&digest::SHA256, token.trim().as_bytes()).as_ref());
        let fits = |known: &String| verify_slices_are_equal(known.as_bytes(), shown.as_bytes()).is_ok();
        if self.admin_token_sha256.iter().any(fits) { Ok(()) } else { unauthorised("this token is not known") }
    }
}

/// A page of another site can make a browser on this machine ask us, but not under these names.
fn names_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A slow shard must not hold connections for ever.
pub(super) async fn in_time<T>(reply: Reply<'_, T>) -> Result<T, ApiError> {
    match tokio::time::timeout(HTTP_BACKEND_TIMEOUT, reply).await {
        Ok(answer) => answer.map_err(ApiError::from),
        Err(_) => Err(Unavailable("the engine did not answer in time".into()).into()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QueuesQuery {
    limit: Option<usize>,
}

async fn queues(
    State(service): Shared,
    query: Result<Query<QueuesQuery>, QueryRejection>,
) -> Result<Json<QueueReport>, ApiError> {
    let limit = rows(query?.0.limit.or(Some(HTTP_ROWS_MAX)))?;
    let mut report = in_time(service.backend.queues(limit)).await?;
    report.queues.truncate(limit);
    Ok(Json(report))
}

#[derive(Serialize)]
struct TlsReportAnswer {
    policies: Vec<TlsReportRow>,
}

async fn tls_report(State(service): Shared) -> Result<Json<TlsReportAnswer>, ApiError> {
    Ok(Json(TlsReportAnswer { policies: in_time(service.backend.tls_report()).await? }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MessagesQuery {
    recipient: Option<String>,
    tenant: Option<String>,
    message_id: Option<String>,
    limit: Option<usize>,
}

#[derive(Serialize)]
struct MessagesAnswer {
    messages: Vec<MessageRow>,
    /// There are more than these.
    truncated: bool,
}

async fn messages(
    State(service): Shared,
    query: Result<Query<MessagesQuery>, QueryRejection>,
) -> Result<Json<MessagesAnswer>, ApiError> {
    let MessagesQuery { recipient, tenant, message_id, limit } = query?.0;
    let recipient = recipient.as_deref().map(canonical_address);
    let message_id = message_id.map(|id| id.trim().trim_start_matches('<').trim_end_matches('>').to_owned());
    let filter = MessageFilter { id: None, recipient, tenant, message_id, limit: rows(limit)? };
    Ok(Json(find(&service, filter).await?))
}

async fn message(
    State(service): Shared,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<MessagesAnswer>, ApiError> {
    let Path(id) = id?;
    let parsed: MessageId = id.parse().map_err(|error| ApiError::bad_request(format!("{id:?}: {error}")))?;
    let filter = MessageFilter { id: Some(parsed), limit: HTTP_ROWS_MAX, ..MessageFilter::default() };
    let answer = find(&service, filter).await?;
    if answer.messages.is_empty() {
        let message = format!("no message {id} is in the spool; if it was, the event log has its outcome");
        return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message));
    }
    Ok(Json(answer))
}

async fn find(service: &Service, mut filter: MessageFilter) -> Result<MessagesAnswer, ApiError> {
    let limit = filter.limit;
    // One more, to know whether there are more.
    filter.limit += 1;
    let mut messages = in_time(service.backend.messages(filter)).await?;
    let truncated = messages.len() > limit;
    messages.truncate(limit);
    Ok(MessagesAnswer { messages, truncated })
}

fn rows(limit: Option<usize>) -> Result<usize, ApiError> {
    match limit.unwrap_or(HTTP_ROWS_DEFAULT) {
        limit @ 1..=HTTP_ROWS_MAX => Ok(limit),
        _ => Err(ApiError::bad_request(format!("limit: a number from 1 to {HTTP_ROWS_MAX}"))),
    }
}

#[derive(Serialize)]
struct StatusAnswer {
    live: bool,
    ready: bool,
    /// Why not, where it is not.
    reason: Option<String>,
    #[serde(flatten)]
    status: Status,
}

async fn status(State(service): Shared) -> Result<Json<StatusAnswer>, ApiError> {
    let status = in_time(service.backend.status()).await?;
    let (live, ready) = (service.backend.liveness(), service.backend.readiness());
    let (is_live, is_ready) = (live.is_ok(), ready.is_ok());
    Ok(Json(StatusAnswer { live: is_live, ready: is_ready, reason: live.err().or(ready.err()), status }))
}

async fn liveness(State(service): Shared, Extension(authorised): Extension<Authorised>) -> Result<Response, ApiError> {
    health(service.backend.liveness(), authorised, json!({ "live": true }), "not_live")
}

async fn readiness(State(service): Shared, Extension(authorised): Extension<Authorised>) -> Result<Response, ApiError> {
    health(service.backend.readiness(), authorised, json!({ "ready": true }), "not_ready")
}

fn health(
    state: Result<(), String>,
    Authorised(authorised): Authorised,
    good: serde_json::Value,
    code: &'static str,
) -> Result<Response, ApiError> {
    match state {
        Ok(()) => Ok(Json(good).into_response()),
        Err(reason) => {
            let message = if authorised { reason } else { "ask with an admin token for the reason".into() };
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, message))
        }
    }
}

async fn metrics_text(State(service): Shared) -> Response {
    let text = service.metrics.prometheus_text();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn metrics_json(State(service): Shared) -> Json<serde_json::Value> {
    Json(service.metrics.json())
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn no_such_call(request: Request) -> ApiError {
    let message = format!("there is no {}; GET /api/openapi.json lists what there is", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not possible for {}", request.method(), request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

const OPENAPI: &str = include_str!("openapi.json");
const LIVENESS: &str = "/api/check-liveness/v1";
const READINESS: &str = "/api/check-readiness/v1";

#[cfg(test)]
mod tests;
