//! Hosts with addresses of both families or of one, and sources that reach one of them or both.

use std::net::{IpAddr, SocketAddr};

use postrider::config::Config;

use crate::dns::SMTP_PORT;
use crate::net::address_of;
use crate::peer::Host;
use crate::random::Random;
use crate::world::SITES;

/// Of every so manieth seed that has no rates.
const EVERY: u64 = 3;

/// Each site keeps a host that each pool reaches, over IPv4.
pub(crate) fn mix(seed: u64, config: &mut Config, hosts: &mut [Host]) {
    let mut random = Random::new(seed.rotate_left(40));
    if random.below(EVERY) > 0 {
        return;
    }
    let four = |source| Some(address_within(source, [0; 4].into()));
    let six = |source| Some(address_within(source, [0; 16].into()));
    let addresses = [four(0), [six(1), None][random.below(2) as usize], [four(2), None][random.below(2) as usize]];
    for (source, address) in config.egress_sources.iter_mut().zip(addresses) {
        source.source_address = address;
    }
    for host in hosts.iter_mut().filter(|host| host.site < SITES) {
        let SocketAddr::V4(address) = host.address else { continue };
        let place = u16::from(address.ip().octets()[3]);
        host.is_six_only = place == 2;
        let own = SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, host.site as u16, place], SMTP_PORT));
        host.six = (host.is_six_only || random.one_in(2)).then_some(own);
    }
}

/// What a source connects from to peers of this family.
fn address_within(source: usize, family: IpAddr) -> IpAddr {
    address_of(source, SocketAddr::new(family, SMTP_PORT)).ip()
}
