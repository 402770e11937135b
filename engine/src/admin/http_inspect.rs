//! `inspect-message`, in KumoMTA's request and answer: what a queued message is, and what stands in it.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use postrider_spool::record::MessageId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::WallTime;
use super::http_admin::{ApiError, Shared, in_time};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InspectQuery {
    id: String,
    #[serde(default)]
    want_body: bool,
}

/// `InspectMessageV1Response`.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    id: String,
    message: Message,
}

/// `MessageInformation`.
#[derive(Debug, Serialize)]
struct Message {
    sender: String,
    recipient: OneOrMany,
    meta: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    due: WallTime,
    num_attempts: u32,
}

/// KumoMTA's way with a list: one stands by itself.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

pub(super) async fn inspect(
    State(service): Shared,
    query: Result<Query<InspectQuery>, QueryRejection>,
) -> Result<Json<Answer>, ApiError> {
    let InspectQuery { id, want_body } = query?.0;
    let parsed: MessageId = id.parse().map_err(|error| ApiError::bad_request(format!("id: {id:?}: {error}")))?;
    let Some(mut found) = in_time(service.backend.inspect(parsed, want_body)).await? else {
        let message = format!("no message {id} is in the spool; if it was, the event log has its outcome");
        return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message));
    };
    let recipient = match found.recipients.len() {
        1 => OneOrMany::One(found.recipients.swap_remove(0)),
        _ => OneOrMany::Many(found.recipients),
    };
    // Names that KumoMTA's policies use; there, meta is what a policy has set.
    let meta = json!({ "tenant": found.tenant, "campaign": found.campaign, "egress_pool": found.egress_pool });
    let data = found.data.map(|octets| String::from_utf8_lossy(&octets).into_owned());
    let message =
        Message { sender: found.sender, recipient, meta, data, due: found.due, num_attempts: found.num_attempts };
    Ok(Json(Answer { id, message }))
}
