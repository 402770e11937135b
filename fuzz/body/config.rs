//! Any text as a configuration: it is a configuration that can be described and run, or errors that each say something.

use std::path::Path;

use postrider::accept::Policy;
use postrider::config::{self, Config};

pub(crate) fn run(octets: &[u8]) {
    let Ok(text) = std::str::from_utf8(octets) else { return };
    // Relative paths lead nowhere from there.
    match Config::from_toml(text, "fuzz.toml", Path::new("/proc/none")) {
        Ok(config) => {
            assert!(!config.egress_sources.is_empty());
            let sources = config.egress_sources.len();
            let pools = &config.egress_pools;
            assert!(pools.iter().any(|pool| pool.name == "default"));
            assert!(
                pools.iter().all(|pool| pool.sources.iter().all(|(source, weight)| *source < sources && *weight > 0))
            );
            assert!(config::describe(&config).ends_with('\n'));
            Policy::new(&config).expect("what passes the check can be run");
        }
        Err(errors) => {
            assert!(errors.len() > 0);
            for line in errors.to_string().lines() {
                let has_place = line.contains(": ") || line.starts_with("and ") && line.ends_with("more errors");
                assert!(has_place, "{line:?}");
                assert!(!line.contains(char::is_control), "{line:?}");
            }
        }
    }
}
