//! The promises of every engine, tested for each.

mod cluster;
mod directory;
mod follow;
pub(crate) mod holes;
mod login;
mod nats;
mod nats_server;
mod suite;

use super::*;

#[test]
fn names_that_differ_make_topics_that_differ() {
    let names = ["feed", "Feed", "fe-ed", "fe.ed", "fe_ed", "feéd"];
    let topics: std::collections::BTreeSet<Topic> =
        names.iter().map(|name| Topic::expert(name, "1")).collect();
    assert_eq!(topics.len(), names.len());
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    assert!(topics.iter().all(|topic| topic.name().chars().all(plain)), "{topics:?}");
    assert_eq!(Topic::fm("1.0.0").name(), "fm-1_0_0");
}

#[test]
fn memory_keeps_every_promise() {
    let engine = MemoryEngine::new(suite::REMEMBERED);
    suite::every_promise(&engine);
}
