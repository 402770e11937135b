//! `reload`: the configuration is read anew and taken up, or all that is wrong with it is told.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Reloaded;
use super::http_admin::{ApiError, Shared};
use crate::engine::ReloadError;
use crate::limits::HTTP_RELOAD_TIMEOUT;

/// Asked twice, it changes nothing the second time.
pub(super) async fn reload(State(service): Shared) -> Result<Json<Reloaded>, ApiError> {
    let reload = tokio::spawn(async move { service.backend.reload().await });
    // What has begun goes on to its end, whoever waits for it.
    match tokio::time::timeout(HTTP_RELOAD_TIMEOUT, reload).await {
        Ok(Ok(answer)) => Ok(Json(answer??)),
        Ok(Err(_)) | Err(_) => {
            let text = format!(
                "it takes longer than {:?}: files are being read, or a shard has not answered; the log will tell",
                HTTP_RELOAD_TIMEOUT
            );
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", text))
        }
    }
}

impl From<ReloadError> for ApiError {
    fn from(error: ReloadError) -> Self {
        let (status, code) = match &error {
            ReloadError::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_configuration"),
            ReloadError::NeedsRestart(_) => (StatusCode::CONFLICT, "needs_restart"),
            ReloadError::NoSource => (StatusCode::CONFLICT, "no_configuration_file"),
            ReloadError::Ended => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        };
        Self::new(status, code, error.to_string())
    }
}
