//! `suspend-ready-q` and `suspend`: what must not be sent for a while, in KumoMTA's requests and answers.
//!
//! A ready queue is a source and a site; its name is KumoMTA's, `ip-a->mx.example@smtp_client`, where `ip-a->*` is the
//! source everywhere. `suspend` is about tenants, campaigns and domains. The engine makes suspensions of its own, too;
//! those about a tenant or a campaign are listed by `suspend`, with the source and the site where they hold.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use serde::{Deserialize, Serialize};

use super::http_admin::{ApiError, Service, Shared, in_time};
use super::http_bounce::checked;
use super::{LimitsRow, SuspensionEnd, SuspensionRow, WallTime};
use crate::mail::address::read_domain;
use crate::mail::json::Object;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadyRequest {
    name: String,
    reason: String,
    #[serde(default)]
    duration: Option<String>,
    #[serde(default)]
    expires: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    #[serde(default)]
    campaign: Option<String>,
    #[serde(default)]
    tenant: Option<String>,
    #[serde(default)]
    domain: Option<String>,
    reason: String,
    #[serde(default)]
    duration: Option<String>,
    #[serde(default)]
    expires: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CancelRequest {
    id: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Suspended {
    id: String,
    /// Ours: it is in force, but may not be what was meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
}

/// `SuspendReadyQueueV1ListEntry`.
#[derive(Debug, Serialize)]
pub(super) struct ReadyEntry {
    id: String,
    name: String,
    reason: String,
    duration: String,
    expires: WallTime,
    /// Ours: it is not suspended, but has these limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsRow>,
}

/// `SuspendV1ListEntry`, and where it holds.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    id: String,
    campaign: Option<String>,
    tenant: Option<String>,
    domain: Option<String>,
    reason: String,
    duration: String,
    expires: WallTime,
    egress_source: Option<String>,
    site: Option<String>,
}

pub(super) async fn list_ready(State(service): Shared) -> Result<Json<Vec<ReadyEntry>>, ApiError> {
    let rows = in_time(service.backend.suspensions()).await?;
    let entry = |row: SuspensionRow| ReadyEntry {
        name: queue_name(&row),
        id: row.id,
        reason: row.reason,
        duration: duration_text(row.left),
        expires: row.until,
        limits: row.limits,
    };
    Ok(Json(rows.into_iter().filter(is_of_ready_queue).map(entry).collect()))
}

pub(super) async fn list(State(service): Shared) -> Result<Json<Vec<Entry>>, ApiError> {
    let rows = in_time(service.backend.suspensions()).await?;
    let entry = |row: SuspensionRow| Entry {
        id: row.id,
        campaign: row.campaign,
        tenant: row.tenant,
        domain: row.domain,
        reason: row.reason,
        duration: duration_text(row.left),
        expires: row.until,
        egress_source: row.egress_source,
        site: row.site,
    };
    Ok(Json(rows.into_iter().filter(|row| !is_of_ready_queue(row)).map(entry).collect()))
}

pub(super) async fn suspend_ready(
    State(service): Shared,
    request: Result<Json<Object<ReadyRequest>>, JsonRejection>,
) -> Result<Json<Suspended>, ApiError> {
    let Json(Object(request)) = request?;
    let (egress_source, site) = parse_queue_name(&request.name)
        .ok_or_else(|| ApiError::bad_request("name: write SOURCE->SITE@smtp_client, or SOURCE->* for all its sites"))?;
    let row = SuspensionRow { egress_source: Some(egress_source), site, ..SuspensionRow::default() };
    add(&service, row, request.reason, request.duration.as_deref(), request.expires.as_deref()).await
}

pub(super) async fn suspend(
    State(service): Shared,
    request: Result<Json<Object<Request>>, JsonRejection>,
) -> Result<Json<Suspended>, ApiError> {
    let Json(Object(request)) = request?;
    let Request { campaign, tenant, domain, reason, duration, expires } = request;
    if campaign.is_none() && tenant.is_none() && domain.is_none() {
        return Err(ApiError::bad_request("name a tenant, a campaign or a domain; without, all mail would stop"));
    }
    let named = [("campaign", &campaign), ("tenant", &tenant), ("domain", &domain)];
    refuse_empty(named)?;
    let domain = domain.as_deref().map(domain_of_mail).transpose()?;
    // Mail that waits may be of a tenant that a reload has taken away, so it is no error.
    let warning = tenant.as_ref().filter(|tenant| !service.backend.has_tenant(tenant)).map(|tenant| {
        format!("the configuration has no tenant {tenant:?}; only mail that was accepted for it before is stopped")
    });
    let row = SuspensionRow { campaign, tenant, domain, ..SuspensionRow::default() };
    let Json(made) = add(&service, row, reason, duration.as_deref(), expires.as_deref()).await?;
    Ok(Json(Suspended { warning, ..made }))
}

pub(super) async fn resume(
    State(service): Shared,
    request: Result<Json<Object<CancelRequest>>, JsonRejection>,
) -> Result<Json<Suspended>, ApiError> {
    let Json(Object(CancelRequest { id })) = request?;
    if in_time(service.backend.resume(id.clone())).await? {
        return Ok(Json(Suspended { id, warning: None }));
    }
    Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("no suspension {id} is in force")))
}

/// A script whose variable is not set means nothing by it, least of all the mail that has no tenant.
pub(super) fn refuse_empty<const N: usize>(named: [(&str, &Option<String>); N]) -> Result<(), ApiError> {
    match named.into_iter().find(|(_, name)| name.as_deref() == Some("")) {
        Some((key, _)) => Err(ApiError::bad_request(format!("{key}: is empty; name one, or leave it out"))),
        None => Ok(()),
    }
}

/// Who believes that mail has stopped must not have named what no mail is for.
pub(super) fn domain_of_mail(text: &str) -> Result<String, ApiError> {
    let example = "write it as it stands in addresses, for example \"example.net\"";
    read_domain(text).ok_or_else(|| ApiError::bad_request(format!("domain: {text:?} is no domain; {example}")))
}

async fn add(
    service: &Service,
    mut row: SuspensionRow,
    reason: String,
    duration: Option<&str>,
    expires: Option<&str>,
) -> Result<Json<Suspended>, ApiError> {
    let end = match expires {
        Some(expires) => {
            let time: Timestamp = expires.parse().map_err(|_| {
                let example = "write for example \"2026-12-01T00:00:00Z\"";
                ApiError::bad_request(format!("expires: {expires:?} is no time; {example}"))
            })?;
            SuspensionEnd::At(WallTime(u64::try_from(time.as_millisecond()).unwrap_or_default()))
        }
        None => SuspensionEnd::After(parse_duration(duration.unwrap_or(DURATION_DEFAULT))?),
    };
    row.reason = checked(Some(reason))?;
    match in_time(service.backend.suspend(row, end)).await? {
        Ok(id) => Ok(Json(Suspended { id, warning: None })),
        Err(wrong) => Err(ApiError::bad_request(wrong)),
    }
}

fn is_of_ready_queue(row: &SuspensionRow) -> bool {
    row.tenant.is_none() && row.campaign.is_none() && row.domain.is_none()
}

fn queue_name(row: &SuspensionRow) -> String {
    let part = |part: &Option<String>| part.clone().unwrap_or_else(|| "*".to_owned());
    format!("{}->{}@smtp_client", part(&row.egress_source), part(&row.site))
}

/// Source, and site unless it is all of them.
fn parse_queue_name(name: &str) -> Option<(String, Option<String>)> {
    let (source, site) = name.split_once("->")?;
    let site = site.strip_suffix("@smtp_client").unwrap_or(site);
    if source.is_empty() || site.is_empty() {
        return None;
    }
    Some((source.to_owned(), (site != "*").then(|| site.to_owned())))
}

/// `5m`, `1h 30m`, `2 hours`, `7d`; a day has 24 hours.
fn parse_duration(text: &str) -> Result<Duration, ApiError> {
    let wrong = || ApiError::bad_request(format!("duration: {text:?} is none; write for example \"5m\" or \"1h 30m\""));
    let span: Span = text.parse().map_err(|_| wrong())?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    duration.try_into().map_err(|_| wrong())
}

/// In whole seconds.
fn duration_text(duration: Duration) -> String {
    let seconds = duration.as_millis().div_ceil(1_000);
    format!("{:#}", SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX)))
}

/// KumoMTA's.
const DURATION_DEFAULT: &str = "5m";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_names_read_back() {
        let name = |source: &str, site: Option<&str>| {
            let (egress_source, site) = (Some(source.to_owned()), site.map(str::to_owned));
            queue_name(&SuspensionRow { egress_source, site, ..SuspensionRow::default() })
        };
        assert_eq!(name("ip-a", Some("google")), "ip-a->google@smtp_client");
        assert_eq!(name("ip-a", None), "ip-a->*@smtp_client");
        for (source, site) in [("ip-a", Some("google")), ("ip-a", None), ("ip-a", Some("mx1.a.example,mx2.a.example"))]
        {
            let parsed = parse_queue_name(&name(source, site)).unwrap();
            assert_eq!((parsed.0.as_str(), parsed.1.as_deref()), (source, site));
        }
        assert_eq!(parse_queue_name("ip-a->google").unwrap().1.as_deref(), Some("google"));
        for bad in ["", "ip-a", "->google", "ip-a->", "ip-a->@smtp_client"] {
            assert_eq!(parse_queue_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations_are_kumomtas() {
        for (text, seconds) in
            [("5m", 300), ("1h 30m", 5_400), ("2 hours", 7_200), ("90s", 90), ("7d", 604_800), ("1day 2h", 93_600)]
        {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_secs(seconds));
        }
        for bad in ["", "5", "soon", "-5m"] {
            parse_duration(bad).unwrap_err();
        }
        assert_eq!(duration_text(Duration::from_secs(5_400)), "1h 30m");
        assert_eq!(duration_text(Duration::from_millis(1)), "1s");
    }
}
