//! An engine inside another program: no HTTP, no configuration file.
//!
//! Hands one message over and waits for its final event. `cargo run --example embed -- 127.0.0.1:2526` delivers to an
//! SMTP server there, such as `postbench sink`; the spool is `embed-data` in the current directory.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::net::SocketAddr;

use postrider::config::{DomainPattern, Route, RouteTarget};
use postrider::{Config, Engine, EventItem, Message};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let sink: SocketAddr =
        std::env::args().nth(1).ok_or("which SMTP server? write for example 127.0.0.1:2526")?.parse()?;

    let mut config = Config::new("mta.example.com");
    config.spool.path = "embed-data".into();
    config.smtp_listeners.clear();
    config.http_listeners.clear();
    // Without a route, mail goes to the MX hosts of its recipients' domains.
    let to = vec![RouteTarget::Address(sink)];
    config.routes.push(Route::new(DomainPattern::Any, to));

    let engine = Engine::builder(config).start()?;
    let mut events = engine.events();
    let message = Message {
        reverse_path: "news@acme.example".to_owned(),
        recipients: vec!["ada@shop.test".to_owned()],
        content: b"From: news@acme.example\r\nTo: ada@shop.test\r\nSubject: Hello\r\n\r\nHello Ada\r\n".to_vec(),
        ..Message::default()
    };
    let accepted = engine.inject(message).await?;
    println!("{} is durable", accepted.id);

    while let Some(item) = events.next().await {
        match item {
            EventItem::Event(event) => {
                println!("{}", event.to_json());
                if event.message == accepted.id && event.kind.is_final() {
                    break;
                }
            }
            EventItem::Lagged(missed) => println!("{missed} events were missed; the event log has them"),
        }
    }
    engine.shutdown()?;
    Ok(())
}
