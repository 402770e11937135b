//! Every configuration that README.md and the documents show passes `postrider check`.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test stops at the first surprise, and drives the world itself"
)]

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn its_configurations_pass_the_check() {
    let read = |name: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let documents = ["../README.md", "docs/events.md", "docs/moving.md"].map(read).concat();
    let examples: Vec<&str> =
        documents.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(examples.len() >= 7, "only {} examples were found", examples.len());
    let directory = tempfile::tempdir().unwrap();
    write_keys(directory.path());
    for example in examples {
        // The test may run on a tmpfs, where no spool belongs.
        let tolerant = match example.contains("[spool]\n") {
            true => example.replacen("[spool]\n", "[spool]\nallow_filesystem = true\n", 1),
            false => format!("{example}\n[spool]\nallow_filesystem = true\n"),
        };
        fs::write(directory.path().join("example.toml"), tolerant).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_postrider"))
            .args(["check", "--config", "example.toml"])
            .current_dir(directory.path())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{example}\n{errors}");
    }
}

/// What `check` says of a file with these two mistakes is what it says of such a file here.
#[test]
fn the_errors_that_it_shows_are_those_of_the_check() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let shown = readme.split("$ postrider check --config postrider.toml\n").nth(1).unwrap();
    let shown = shown.split("```").next().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let text = "colour = \"red\"\n\n\n\n\n[spool]\nallow_filesystem = true\n[retry]\n\
                max_age = \"5d\"\nretry_interval = \"20\"\n";
    fs::write(directory.path().join("postrider.toml"), text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_postrider"))
        .args(["check", "--config", "postrider.toml"])
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    // The second one's place in its line is another there.
    let without_place = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.splitn(4, ':').nth(3).unwrap_or(line).to_owned()).collect()
    };
    assert_eq!(without_place(&String::from_utf8(output.stderr).unwrap()), without_place(shown));
}

/// The files that the examples name.
fn write_keys(directory: &Path) {
    let write = |name: &str, text: String| fs::write(directory.join(name), text).unwrap();
    let certificate = rcgen::generate_simple_self_signed(["mta.example.com".to_owned()]).unwrap();
    write("mta.pem", certificate.cert.pem());
    write("mta.key", certificate.signing_key.serialize_pem());
    fs::create_dir(directory.join("keys")).unwrap();
    let key = |algorithm| rcgen::KeyPair::generate_for(algorithm).unwrap().serialize_pem();
    for name in ["acme.example-ed1", "example.com-ed1"] {
        write(&format!("keys/{name}.pem"), key(&rcgen::PKCS_ED25519));
    }
    write("keys/example.com-s1.pem", key(&rcgen::PKCS_RSA_SHA256));
}
