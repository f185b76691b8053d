//! What callers can take of the daemon without asking for anything useful: connections and memory.
//!
//! `HYPERCAST_SLOW_CONNECTIONS` sets the number of connections (512 by default). Each needs a file
//! descriptor in this process and one in the daemon.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use hypercast_core::prerequisite::skip;
use hypercast_tests::{
    TestDaemon, binary, metric,
    secure::{HttpRequest, HttpResponse, ask},
    services::{free_port, wait_until},
    world,
};
use serde_json::json;

/// The memory for bodies, in MiB.
const BODIES_MIB: usize = 64;

/// What a connection may take, in KiB, as hypercast.toml says.
const CONNECTION_KIB: usize = 128;

/// What the allocator may keep of bodies that were given back, in MiB.
const ALLOCATOR_MIB: usize = 48;

/// The size of each body, in bytes.
const BODY_BYTES: usize = 4 << 20;

const PATIENCE: Duration = Duration::from_secs(120);

/// Sends all of the largest body but its last byte, as far as the daemon takes it.
fn almost_send(address: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let head =
        format!("POST /v1/events HTTP/1.1\r\nhost: here\r\ncontent-length: {BODY_BYTES}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    // A request that was refused may be closed while its body is sent.
    let _ = stream.write_all(&body[1..]);
    stream
}

#[test]
fn slow_connections_stay_below_the_stated_memory() {
    let Some(binary) = binary() else {
        return skip("connections", "`cargo verify` builds the binary that it needs");
    };
    let connections: usize = std::env::var("HYPERCAST_SLOW_CONNECTIONS")
        .map_or(512, |count| count.parse().expect("HYPERCAST_SLOW_CONNECTIONS is a number"));
    let dir = tempfile::tempdir().unwrap();
    let mut config = world(dir.path(), 50, 1);
    let probes = format!("http://127.0.0.1:{}", free_port());
    config.server.probe_listen = probes.trim_start_matches("http://").into();
    (config.server.max_connections, config.server.max_connections_per_peer) =
        (connections, connections);
    // No push may be larger, so that the budget is that of the key.
    (config.server.max_inflight_body_mib, config.rollout.max_push_mib) = (BODIES_MIB, 1);
    config.server.max_body_bytes = BODY_BYTES;
    // The bodies that have a place keep it through the test.
    config.server.deadline_ms = 600_000;
    config.write(&dir.path().join("hypercast.toml")).unwrap();
    let daemon = TestDaemon::start_with(&binary, dir.path(), &["--tier", "ingest"]);
    let probe = |route| -> HttpResponse {
        ask(&probes, None, HttpRequest { route, ..HttpRequest::default() }).unwrap()
    };
    let before_mib = daemon.memory_mib();
    let address = daemon.url().trim_start_matches("http://");
    let body = vec![b' '; BODY_BYTES];
    let mut open: Vec<TcpStream> = std::thread::scope(|scope| {
        let (share, body) = (connections / 16, &body);
        let send = move || (0..share).map(|_| almost_send(address, body)).collect::<Vec<_>>();
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(send)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });

    let taken_mib = daemon.memory_mib() - before_mib;
    let most_mib = BODIES_MIB + connections * CONNECTION_KIB / 1024 + ALLOCATOR_MIB;
    println!("{connections} connections: {taken_mib:.0} MiB of {most_mib} MiB");
    assert!(taken_mib < most_mib as f64, "{taken_mib} MiB, and {most_mib} are the bound");
    assert_eq!(probe("/healthz").status, 200);
    assert_eq!(probe("/readyz").body, "ready\n");
    let metrics = probe("/metrics").body;
    let held = metric(&metrics, "hypercast_inflight_body_bytes");
    assert!(held > BODIES_MIB << 19 && held <= BODIES_MIB << 20, "{held} bytes of bodies");

    // Those without a place were told so and when to come again; the others are still answered.
    let answers = open.iter_mut().rev().filter_map(|stream| {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut answer = vec![0; 4096];
        let size = stream.read(&mut answer).ok().filter(|size| *size > 0)?;
        Some(String::from_utf8_lossy(&answer[..size]).to_lowercase())
    });
    let refusal = answers.take(1).collect::<String>();
    for word in ["http/1.1 503", "retry-after", "max_inflight_body_mib"] {
        assert!(refusal.contains(word), "{refusal}");
    }
    drop(open);
    wait_until("the memory of bodies is given back", PATIENCE, || {
        metric(&probe("/metrics").body, "hypercast_inflight_body_bytes") == 0
    });
    let (status, answer) = daemon.post("/v1/events", &json!({ "events": [] }).to_string());
    assert_eq!((status, &answer["accepted"]), (200, &json!(0)), "{answer}");
}
