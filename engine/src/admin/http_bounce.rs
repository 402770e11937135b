//! `bounce`, in KumoMTA's request and answer, and `release`: mail is ended by the operator, or what is held as in doubt
//! is tried again.
//!
//! Both act on what is queued now. KumoMTA's bounce goes on for a while, on what comes later; a request that asks for
//! that is refused, and so there is nothing to list or to cancel.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use postrider_spool::record::MessageId;
use serde::{Deserialize, Serialize};

use super::MailChoice;
use super::http_admin::{ApiError, Shared, in_time};
use super::http_suspend::{domain_of_mail, refuse_empty};
use crate::limits::SUSPENSION_REASON_OCTETS_MAX;
use crate::mail::json::Object;

/// `BounceV1Request`, and ours.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BounceRequest {
    campaign: Option<String>,
    tenant: Option<String>,
    domain: Option<String>,
    queue_names: Vec<String>,
    /// Ours: one message's id.
    message: Option<String>,
    /// Ours: only what is held as in doubt.
    held: bool,
    reason: Option<String>,
    routing_domain: Option<String>,
    suppress_logging: bool,
    duration: Option<String>,
    expires: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ReleaseRequest {
    campaign: Option<String>,
    tenant: Option<String>,
    domain: Option<String>,
    message: Option<String>,
    reason: Option<String>,
}

/// `BounceV1Response`.
#[derive(Debug, Serialize)]
pub(super) struct Bounced {
    id: String,
    bounced: BTreeMap<String, u64>,
    total_bounced: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Released {
    released: BTreeMap<String, u64>,
    total_released: u64,
}

pub(super) async fn bounce(
    State(service): Shared,
    request: Result<Json<Object<BounceRequest>>, JsonRejection>,
) -> Result<Json<Bounced>, ApiError> {
    let Json(Object(request)) = request?;
    let BounceRequest { campaign, tenant, domain, queue_names, message, held, reason, .. } = request;
    let refused = [
        ("routing_domain", request.routing_domain.is_some(), "no queue has one"),
        ("suppress_logging", request.suppress_logging, "every end has its event"),
        ("duration", request.duration.is_some(), "what is queued now is bounced, and nothing that comes later"),
        ("expires", request.expires.is_some(), "what is queued now is bounced, and nothing that comes later"),
    ];
    if let Some((key, _, why)) = refused.into_iter().find(|(_, is_given, _)| *is_given) {
        return Err(ApiError::bad_request(format!("{key}: {why}; leave it out")));
    }
    let choice = choose(campaign, tenant, domain, message)?;
    let choice = MailChoice { queues: queue_names, held, ..choice };
    if choice == MailChoice::default() {
        let text =
            "name a tenant, a campaign, a domain, queue_names or a message, or write held; without, all mail would end";
        return Err(ApiError::bad_request(text));
    }
    let (id, chosen) = in_time(service.backend.bounce(choice, checked(reason)?)).await?;
    Ok(Json(Bounced { id, total_bounced: chosen.total(), bounced: chosen.recipients }))
}

pub(super) async fn release(
    State(service): Shared,
    request: Result<Json<Object<ReleaseRequest>>, JsonRejection>,
) -> Result<Json<Released>, ApiError> {
    let Json(Object(request)) = request?;
    let ReleaseRequest { campaign, tenant, domain, message, reason } = request;
    let choice = choose(campaign, tenant, domain, message)?;
    let chosen = in_time(service.backend.release(choice, checked(reason)?)).await?;
    Ok(Json(Released { total_released: chosen.total(), released: chosen.recipients }))
}

fn choose(
    campaign: Option<String>,
    tenant: Option<String>,
    domain: Option<String>,
    message: Option<String>,
) -> Result<MailChoice, ApiError> {
    refuse_empty([("campaign", &campaign), ("tenant", &tenant), ("domain", &domain)])?;
    let parse = |text: String| -> Result<MessageId, ApiError> {
        text.parse().map_err(|error| ApiError::bad_request(format!("message: {text:?}: {error}")))
    };
    let message = message.map(parse).transpose()?;
    let domain = domain.as_deref().map(domain_of_mail).transpose()?;
    Ok(MailChoice { message, tenant, campaign, domain, ..MailChoice::default() })
}

/// One line; it stands in records and events, and in `blocked_by`.
pub(super) fn checked(reason: Option<String>) -> Result<String, ApiError> {
    let mut reason = reason
        .filter(|reason| !reason.trim().is_empty())
        .ok_or_else(|| ApiError::bad_request("reason: is missing; it stands where one sees what came of it"))?;
    reason.truncate(reason.floor_char_boundary(SUSPENSION_REASON_OCTETS_MAX));
    Ok(reason.replace(|c: char| c.is_control(), " "))
}
