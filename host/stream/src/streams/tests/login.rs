//! The ways to log in at a NATS server: passwords, nkeys, credentials, certificates.

use std::fs;

use data_encoding::BASE64URL_NOPAD;
use hypercast_config::{EngineSettings, RedactedUrl};
use nkeys::KeyPair;
use serde_json::{Value, json};

use super::super::*;
use super::nats_server::{NatsServer, TestCertificate, is_installed, write_secret};
use super::suite;

#[test]
fn an_nkey_logs_in() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pair = KeyPair::new_user();
    let more = format!("authorization {{ users: [ {{ nkey: {} }} ] }}\n", pair.public_key());
    let server = NatsServer::start(&dir.path().join("server"), &more);
    server.wait_until_healthy();
    let seed = write_secret(dir.path().join("seed"), &format!("{}\n", pair.seed().unwrap()));
    let settings = EngineSettings { nats_nkey: seed, ..server.settings() };
    suite::opened_again_it_continues(&|| open(&settings).unwrap());
    let other = KeyPair::new_user().seed().unwrap();
    let seed = write_secret(dir.path().join("other"), &other);
    let error = open(&EngineSettings { nats_nkey: seed, ..settings }).err().unwrap().to_string();
    assert!(error.contains("nats_nkey") && !error.contains(&other), "{error}");
}

/// Signs claims about `subject`, as `issuer`.
fn signed(issuer: &KeyPair, subject: &KeyPair, claims: Value) -> String {
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let (issued_by, sub) = (issuer.public_key(), subject.public_key());
    let token = json!({
        "jti": sub, "iat": 1, "iss": issued_by, "name": "test", "sub": sub, "nats": claims,
    });
    let parts = [header, token].map(|part| BASE64URL_NOPAD.encode(part.to_string().as_bytes()));
    let signed = parts.join(".");
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature))
}

/// A file of credentials, as the operators' tools write them.
fn credentials(account: &KeyPair, user: &KeyPair) -> String {
    let claims = json!({
        "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2,
    });
    let (token, seed) = (signed(account, user, claims), user.seed().unwrap());
    format!(
        "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
}

#[test]
fn credentials_log_in() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let operator = KeyPair::new_operator();
    let [account, system] = [KeyPair::new_account(), KeyPair::new_account()];
    let token = signed(&operator, &operator, json!({ "type": "operator", "version": 2 }));
    let mut preloaded = String::new();
    for (pair, storage) in [(&account, -1), (&system, 0)] {
        let limits = json!({
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1,
            "wildcards": true, "conn": -1, "leaf": -1,
            "mem_storage": storage, "disk_storage": storage, "streams": storage,
            "consumer": storage,
        });
        let claims = json!({ "limits": limits, "type": "account", "version": 2 });
        let token = signed(&operator, pair, claims);
        preloaded += &format!("  {}: {token}\n", pair.public_key());
    }
    let more = format!(
        "operator: {token}\nsystem_account: {}\nresolver: MEMORY\n\
         resolver_preload: {{\n{preloaded}}}\n",
        system.public_key()
    );
    let server = NatsServer::start(&dir.path().join("server"), &more);
    server.wait_until_healthy();
    let user = KeyPair::new_user();
    let file = write_secret(dir.path().join("user.creds"), &credentials(&account, &user));
    let settings = EngineSettings { nats_credentials: file, ..server.settings() };
    suite::opened_again_it_continues(&|| open(&settings).unwrap());
    // An account that the server does not know.
    let text = credentials(&KeyPair::new_account(), &user);
    let nats_credentials = write_secret(dir.path().join("other.creds"), &text);
    let error = open(&EngineSettings { nats_credentials, ..settings }).err().unwrap().to_string();
    let seed = user.seed().unwrap();
    assert!(error.contains("nats_credentials") && !error.contains(&seed), "{error}");
}

#[test]
fn a_certificate_of_the_client_is_shown() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tls = TestCertificate::make(dir.path());
    let more = format!("tls {{ {}, verify: true }}\n", tls.lines());
    let server = NatsServer::start(&dir.path().join("server"), &more);
    server.wait_until_healthy();
    let unknown = EngineSettings {
        nats_url: format!("tls://localhost:{}", server.port).into(),
        nats_ca: tls.certificate.clone(),
        ..server.settings()
    };
    let TestCertificate { certificate, key } = tls;
    let known = EngineSettings { nats_certificate: certificate, nats_key: key, ..unknown.clone() };
    suite::opened_again_it_continues(&|| open(&known).unwrap());
    let error = open(&unknown).err().unwrap().to_string();
    assert!(error.contains("engine.nats_certificate"), "{error}");
}

#[test]
fn a_wrong_password_and_an_unknown_authority_are_refused() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tls = TestCertificate::make(dir.path());
    let more = format!(
        "tls {{ {} }}\nauthorization {{ user: hypercast, password: geheim }}\n",
        tls.lines()
    );
    let server = NatsServer::start(&dir.path().join("server"), &more);
    server.wait_until_healthy();
    let right = EngineSettings {
        nats_url: format!("tls://hypercast:geheim@localhost:{}", server.port).into(),
        nats_ca: tls.certificate.clone(),
        ..server.settings()
    };
    open(&right).unwrap();
    let password = write_secret(dir.path().join("password"), "falsch");
    let nats_url = RedactedUrl::from(format!("tls://localhost:{}", server.port));
    let nats_user = "hypercast".to_owned();
    let wrong = EngineSettings { nats_url, nats_user, nats_password: password, ..right.clone() };
    let error = open(&wrong).err().unwrap().to_string();
    assert!(error.contains("engine.nats_user") && !error.contains("falsch"), "{error}");
    fs::create_dir(dir.path().join("other")).unwrap();
    let other = TestCertificate::make(&dir.path().join("other"));
    let error = open(&EngineSettings { nats_ca: other.certificate, ..right }).err().unwrap();
    let error = error.to_string();
    assert!(error.contains("engine.nats_ca") && !error.contains("geheim"), "{error}");
}
