//! A campaign: messages that share a body, each with header fields, return path and signature of its own.
//!
//! `cargo run --example campaign -- 127.0.0.1:2526` sends a thousand to an SMTP server there, such as `postbench sink`;
//! the spool is `campaign-data` in the current directory.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::net::SocketAddr;

use postrider::config::{DomainPattern, Route, RouteTarget};
use postrider::{CampaignMessage, Config, Engine, EventItem};

const CONTENT: &str = "From: Acme News <news@acme.example>\r\n\
                       Subject: What is new in November\r\n\
                       MIME-Version: 1.0\r\n\
                       Content-Type: text/plain; charset=utf-8\r\n\
                       List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n\
                       \r\n\
                       Hello, here are the news.\r\n";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let sink: SocketAddr =
        std::env::args().nth(1).ok_or("which SMTP server? write for example 127.0.0.1:2526")?.parse()?;

    let mut config = Config::new("mta.example.com");
    config.spool.path = "campaign-data".into();
    config.smtp_listeners.clear();
    config.http_listeners.clear();
    config.routes.push(Route::new(DomainPattern::Any, vec![RouteTarget::Address(sink)]));

    let engine = Engine::builder(config).start()?;
    let mut events = engine.events();
    let campaign = engine.campaign(CONTENT)?;
    let messages = (1..=1_000).map(|customer| CampaignMessage {
        reverse_path: format!("bounce+{customer}@acme.example"),
        recipients: vec![format!("customer{customer}@shop.test")],
        header: format!(
            "To: customer{customer}@shop.test\r\n\
             Message-ID: <november.{customer}@acme.example>\r\n\
             List-Unsubscribe: <https://acme.example/unsubscribe/{customer}>\r\n"
        )
        .into_bytes(),
        ..CampaignMessage::default()
    });
    let accepted = campaign.inject_all(messages).await;
    let mut waiting = accepted.iter().filter(|accepted| accepted.is_ok()).count();
    println!("{waiting} of {} are durable", accepted.len());
    // No more are to come, so the last one takes the body along.
    drop(campaign);

    while waiting > 0 {
        match events.next().await {
            Some(EventItem::Event(event)) if event.kind.is_final() => waiting -= 1,
            Some(EventItem::Event(_)) => {}
            Some(EventItem::Lagged(missed)) => println!("{missed} events were missed; the event log has them"),
            None => break,
        }
    }
    engine.shutdown()?;
    Ok(())
}
