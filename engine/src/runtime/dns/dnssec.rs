//! DNSSEC: who is asked, whether an answer is proven, and what hosts' TLSA records say.
//!
//! `trust_ad` believes the AD bit of a resolver that validates (RFC 6840 §5.7), which the operator has to be able to
//! reach on a path that nobody tampers with. `validate` asks any resolver for signatures too, and has hickory follow
//! them from the trust anchor. Either way a forged answer comes as a failure, which bounces nothing.
//!
//! An answer counts as proven only as a whole, with all aliases on the way. That something is not there needs no proof
//! here: a forged denial would be a failure, and an unproven one leaves things as they are without DANE.

use std::net::IpAddr;
use std::sync::Arc;

use hickory_resolver::caching_client::CachingClient;
use hickory_resolver::config::{ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::xfer::RetryDnsHandle;
use hickory_resolver::proto::dnssec::{DnssecSummary, TrustAnchors};
use hickory_resolver::proto::op::{DnsRequestOptions, Query};
use hickory_resolver::proto::rr::rdata::CNAME;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, NameServerPool, PoolContext, TlsConfig, TokioResolver};

use super::{DEFER_TTL, Expiry, ResolverError, absence, absolute_name, text_of};
use crate::config::{DnsConfig, Dnssec};
use crate::deliver::dane::{HostDane, TlsaRecord};
use crate::limits::{DNS_ALIASES_MAX, DNS_CACHE_ANSWERS_MAX};

/// Asks name servers. Clones share the cache.
#[derive(Clone)]
pub(super) struct Names {
    resolver: TokioResolver,
    /// Asks for the AD bit; there with `trust_ad`.
    trusting: Option<CachingClient<RetryDnsHandle<NameServerPool<TokioRuntimeProvider>>>>,
    /// As it was at the start.
    hosts_file: Arc<Hosts>,
    dnssec: Dnssec,
    uses_dane: bool,
}

/// Where a host's TLSA records would be: the first of these names that has any (RFC 7672 §2.2.2, §2.2.3).
#[derive(Debug)]
pub(super) struct TlsaBases(Result<Vec<Name>, Arc<str>>);

impl Default for TlsaBases {
    fn default() -> Self {
        Self(Ok(Vec::new()))
    }
}

impl Names {
    pub(super) fn new(
        config: &DnsConfig,
        uses_dane: bool,
        servers: ResolverConfig,
        mut options: ResolverOpts,
    ) -> Result<Self, ResolverError> {
        // What an alias leads to is proven only with the alias itself.
        options.preserve_intermediates = true;
        let provider = TokioRuntimeProvider::default();
        let mut trusting = None;
        if config.dnssec == Dnssec::TrustAd {
            let context = Arc::new(PoolContext::new(options.clone(), TlsConfig::new()?));
            let pool = NameServerPool::from_config(servers.name_servers().to_vec(), context, provider.clone());
            let retrying = RetryDnsHandle::new(pool, options.attempts);
            trusting = Some(CachingClient::new(DNS_CACHE_ANSWERS_MAX, retrying, true));
        }
        let mut builder = TokioResolver::builder_with_config(servers, provider);
        if config.dnssec == Dnssec::Validate {
            options.validate = true;
            if let Some(anchor) = &config.trust_anchor {
                let anchor = anchor.parse::<TrustAnchors>().map_err(|error| ResolverError(error.to_string().into()))?;
                builder = builder.with_trust_anchor(Arc::new(anchor));
            }
        }
        let resolver = builder.with_options(options).build()?;
        // Without the file, nothing is in it (hosts(5)).
        let hosts_file = Arc::new(Hosts::from_system().unwrap_or_default());
        Ok(Self { resolver, trusting, hosts_file, dnssec: config.dnssec, uses_dane })
    }

    pub(super) fn uses_dane(&self) -> bool {
        self.uses_dane
    }

    pub(super) async fn lookup(&self, name: &Name, kind: RecordType) -> Result<Lookup, NetError> {
        match &self.trusting {
            Some(client) => {
                let mut options = DnsRequestOptions::default();
                // RFC 6840 §5.8: some resolvers tell only who asks with DO.
                options.edns_set_dnssec_ok = true;
                client.lookup(Query::query(name.clone(), kind), options).await
            }
            None => self.resolver.lookup(name.clone(), kind).await,
        }
    }

    pub(super) fn in_hosts_file(&self, name: &Name) -> Vec<IpAddr> {
        let of = |kind| self.hosts_file.lookup_static_host(&Query::query(name.clone(), kind));
        let found = [RecordType::A, RecordType::AAAA].into_iter().filter_map(of);
        found
            .flat_map(|lookup| lookup.answers().iter().filter_map(|it| it.data.ip_addr()).collect::<Vec<_>>())
            .collect()
    }

    /// Whether an answer is proven, and the domain with what it is an alias of.
    pub(super) fn judge_mx(&self, asked: &Name, lookup: &Lookup) -> (bool, Vec<String>) {
        let secure = self.uses_dane && self.is_secure(asked, lookup);
        let mut names = vec![text_of(asked)];
        if secure && let Some(end) = expanded(asked, lookup).filter(|end| end != asked) {
            names.push(text_of(&end));
        }
        (secure, names)
    }

    /// Where the TLSA records of a host with these address records would be.
    pub(super) async fn tlsa_bases(&self, name: &Name, answers: impl Iterator<Item = &Lookup>) -> TlsaBases {
        if !self.uses_dane {
            return TlsaBases::default();
        }
        let mut aliased = false;
        for answer in answers {
            let Some(end) = expanded(name, answer) else { continue };
            if self.is_secure(name, answer) {
                // RFC 7672 §2.2.2: with an alias, what it leads to comes first, and then the host itself.
                let alias = (end != *name).then(|| name.clone());
                return TlsaBases(Ok(std::iter::once(end).chain(alias).collect()));
            }
            aliased |= end != *name;
        }
        if !aliased {
            return TlsaBases::default();
        }
        // RFC 7672 §2.2.2: an alias out of a signed zone into one that isn't leaves the host's own name.
        match self.lookup(name, RecordType::CNAME).await {
            Ok(alias) if self.is_secure(name, &alias) => TlsaBases(Ok(vec![name.clone()])),
            Ok(_) => TlsaBases::default(),
            Err(error) if absence(&error).is_some() => TlsaBases::default(),
            Err(error) => TlsaBases(Err(format!("CNAME lookup: {error}").into())),
        }
    }

    /// What a host's TLSA records require.
    pub(super) async fn lookup_dane(
        &self,
        expiry: &mut Expiry,
        bases: TlsaBases,
        port: u16,
        next_hop: &[String],
    ) -> HostDane {
        let unknown = |expiry: &mut Expiry, why: Arc<str>| {
            expiry.limit_to(DEFER_TTL);
            HostDane::Unknown(why)
        };
        let bases = match bases.0 {
            Ok(bases) => bases,
            Err(why) => return unknown(expiry, why),
        };
        for base in bases {
            let base = text_of(&base);
            // RFC 6698 §3. A name that is too long has no records.
            let Some(name) = absolute_name(&format!("_{port}._tcp.{base}")) else { continue };
            match self.lookup(&name, RecordType::TLSA).await {
                Ok(lookup) => {
                    expiry.limit_to_answer(&lookup);
                    // RFC 7672 §2.1.1: what nobody vouches for is as good as absent.
                    if let Some(owner) = expanded(&name, &lookup).filter(|_| self.is_secure(&name, &lookup)) {
                        let records = lookup.answers().iter().filter(|record| record.name == owner);
                        return HostDane::of_records(&base, next_hop, records.filter_map(|record| tlsa(&record.data)));
                    }
                }
                Err(error) => match absence(&error) {
                    Some(absence) => expiry.limit_to(absence.ttl),
                    None => return unknown(expiry, format!("TLSA lookup of {}: {error}", text_of(&name)).into()),
                },
            }
        }
        HostDane::Absent
    }

    /// Whether all of an answer is proven, with the aliases on the way.
    fn is_secure(&self, asked: &Name, lookup: &Lookup) -> bool {
        match self.dnssec {
            Dnssec::Off => false,
            // An answer that was put together of several has another question: the bit is that of the last one.
            Dnssec::TrustAd => lookup.message().metadata.authentic_data && lookup.query().name() == asked,
            Dnssec::Validate => DnssecSummary::from_records(lookup.answers().iter()) == DnssecSummary::Secure,
        }
    }
}

/// The name at the end of the aliases of an answer, where it has a record of the kind that was asked for.
fn expanded(asked: &Name, lookup: &Lookup) -> Option<Name> {
    let kind = lookup.query().query_type();
    let mut name = asked.clone();
    for _ in 0..DNS_ALIASES_MAX {
        let mut own = lookup.answers().iter().filter(|record| record.name == name);
        if own.clone().any(|record| record.record_type() == kind) {
            return Some(name);
        }
        name = own.find_map(|record| match &record.data {
            RData::CNAME(CNAME(target)) => Some(target.clone()),
            _ => None,
        })?;
    }
    None
}

fn tlsa(data: &RData) -> Option<TlsaRecord> {
    let RData::TLSA(tlsa) = data else { return None };
    Some(TlsaRecord {
        usage: tlsa.cert_usage.into(),
        selector: tlsa.selector.into(),
        matching: tlsa.matching.into(),
        data: tlsa.cert_data.clone(),
    })
}
