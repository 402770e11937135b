//! The name of a scheduled queue, in KumoMTA's form.

use std::fmt;

/// A tenant's campaign to one domain: `domain`, `tenant@domain`, `campaign:tenant@domain` or `campaign:@domain`.
#[derive(Debug, Clone, Copy)]
pub struct QueueName<'a> {
    /// Empty where there is none.
    pub campaign: &'a str,
    /// Empty where there is none.
    pub tenant: &'a str,
    pub domain: &'a str,
}

impl fmt::Display for QueueName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self { campaign: "", tenant: "", domain } => f.write_str(domain),
            Self { campaign: "", tenant, domain } => write!(f, "{tenant}@{domain}"),
            Self { campaign, tenant, domain } => write!(f, "{campaign}:{tenant}@{domain}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_names_have_kumomtas_form() {
        let name = |campaign, tenant| QueueName { campaign, tenant, domain: "example.net" }.to_string();
        assert_eq!(name("", ""), "example.net");
        assert_eq!(name("", "acme"), "acme@example.net");
        assert_eq!(name("spring", "acme"), "spring:acme@example.net");
        assert_eq!(name("spring", ""), "spring:@example.net");
    }
}
