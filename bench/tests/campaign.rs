//! `campaign`, small: every figure is there, and the spool has each message, and the body once.

use postrider_bench::campaign::{CampaignOptions, campaign};
use postrider_bench::interrupt::Interrupt;
use postrider_bench::peers::Durability;

#[test]
fn a_campaign_is_measured() {
    let body_bytes = 200_000;
    let options = CampaignOptions {
        recipients: 300,
        body_bytes,
        shards: Some(2),
        durability: Durability::None,
        rounds: 1,
        spool_parent: None,
    };
    let report = campaign(&options, &Interrupt::default()).unwrap();
    let [round] = &report.rounds[..] else { panic!("{report:?}") };
    let figure = |name: &str| round.get(name).unwrap_or_else(|| panic!("{name} in {round:?}"));
    for name in ["accept_us", "per_second", "ed25519_per_second", "rsa_per_second", "rsa_signature_us"] {
        assert!(figure(name) > 0.0, "{name} in {round:?}");
    }
    // With a second copy of the body there would be 660 more for each.
    let (unsigned, header) = (figure("spool_bytes"), figure("header_bytes"));
    assert!((header + 100.0..header + 500.0).contains(&unsigned), "{round:?}");
    assert!(unsigned < figure("spool_ed25519_bytes"), "{round:?}");
    assert!(figure("spool_ed25519_bytes") < figure("spool_rsa_bytes"), "{round:?}");
    assert_eq!(report.to_json()["goals"]["accept_us"], 15);
}

#[test]
fn somebody_has_to_get_it() {
    let options = CampaignOptions {
        recipients: 0,
        body_bytes: 1_000,
        shards: None,
        durability: Durability::None,
        rounds: 1,
        spool_parent: None,
    };
    assert!(campaign(&options, &Interrupt::default()).unwrap_err().to_string().contains("recipient"));
}
