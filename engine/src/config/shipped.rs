//! The providers that Postrider knows by itself: `rules/providers.toml`, compiled in and read as a configuration is.
//!
//! A configuration's own table of the same name stands over the shipped one: its settings are applied later, its rules
//! come first.

use std::path::Path;
use std::sync::LazyLock;

use super::document;
use super::error::{Place, Report};
use super::reader::Section;
use super::shaping::Base;
use super::{Provider, RetryConfig, shaping};

/// The file, as `postrider check --shipped-providers` prints it.
pub const SHIPPED_PROVIDERS: &str = include_str!("../../rules/providers.toml");

/// Compiling patterns takes a while, and they never change.
static PROVIDERS: LazyLock<Vec<Provider>> = LazyLock::new(read);

pub(super) fn providers() -> Vec<Provider> {
    PROVIDERS.clone()
}

/// The user's tables over the shipped ones; those in front win where both are as close to a domain.
pub(super) fn merge(own: Vec<(Provider, bool)>, mut shipped: Vec<Provider>) -> Vec<Provider> {
    let mut providers = Vec::new();
    for (mut provider, stands_on_shipped) in own {
        if let Some(place) = shipped.iter().position(|shipped| shipped.name == provider.name) {
            let base = shipped.remove(place);
            if stands_on_shipped {
                provider.layer.settings = base.layer.settings.followed_by(provider.layer.settings);
                if provider.matches.is_empty() {
                    provider.matches = base.matches;
                }
            }
        }
        providers.push(provider);
    }
    providers.extend(shipped);
    providers
}

fn read() -> Vec<Provider> {
    let mut report = Report::default();
    let file = report.add_file("rules/providers.toml", SHIPPED_PROVIDERS, Path::new("."));
    let table = document::parse(SHIPPED_PROVIDERS, file, &report).unwrap_or_default();
    // Its rules are so told from the user's.
    let root = Section::new("shipped", Place { file, offset: 0 }, &table, &report);
    let section = root.table("provider", "[provider]").expect("the file has providers");
    let retry = RetryConfig::default();
    let base = Base { sources: &[], retry: &retry };
    let own = shaping::read_provider_tables(&section, base, &[]);
    root.finish();
    report.into_result().expect("the shipped file is right, as a test says");
    own.into_iter().map(|(provider, _)| Provider { is_shipped: true, ..provider }).collect()
}

#[cfg(test)]
mod tests;
