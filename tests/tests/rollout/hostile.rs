//! Guests that turn hostile in the middle of their rollout, beside an honest expert of another
//! surface in the same daemon.
//!
//! `HYPERCAST_TURNCOATS` sets how many there are: 15 are each harm in each step, 3 by default.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_tests::{TestDaemon, expert, services::wait_until};
use serde_json::json;

use crate::team::{PATIENCE, RequestLoad, Team, predictions, rank, state};

/// Candidates with which every guest behaves.
const HARMLESS: usize = 12;

/// How long the honest expert is measured before the first guest comes.
const AT_REST: Duration = Duration::from_secs(3);

/// Guests that can be in a call at a time: one for each request, and one shadow of each.
const GUESTS_AT_A_TIME: f64 = 4.0;

/// Memory of versions that are loaded and of requests, in MiB.
const SLACK_MIB: f64 = 128.0;

/// What the guest does with a number of candidates, and a word of its fault.
#[derive(Debug, Clone, Copy)]
struct Harm {
    candidates: usize,
    fault: &'static str,
}

const HARMS: [Harm; 5] = [
    Harm { candidates: 17, fault: "deadline" },
    Harm { candidates: 18, fault: "MiB of memory" },
    Harm { candidates: 16, fault: "trapped" },
    Harm { candidates: 19, fault: "call stack" },
    Harm { candidates: 20, fault: "output" },
];

/// When the guest turns.
#[derive(Debug, Clone, Copy)]
struct Turn {
    step: &'static str,
    /// Where its rollout waits for it.
    stops: &'static [&'static str],
    /// The step that its rollout has then, and how it ends.
    waits: &'static str,
    ends: &'static str,
}

const TURNS: [Turn; 3] = [
    Turn { step: "shadow", stops: &["--stop-after", "shadow"], waits: "waiting", ends: "failed" },
    Turn {
        step: "canary",
        stops: &["--stop-after", "canary"],
        waits: "waiting",
        ends: "rolled-back",
    },
    Turn { step: "watch", stops: &[], waits: "promoted", ends: "rolled-back" },
];

#[test]
fn a_guest_that_turns_hostile_in_any_step_hurts_only_itself() {
    let Some(team) = Team::new("turncoats", change) else { return };
    team.versions(&["register", "expert", "neighbour", "1.0.0"]);
    team.versions(&["promote", "expert", "neighbour", "1.0.0"]);
    let turncoats: usize = std::env::var("HYPERCAST_TURNCOATS")
        .map_or(3, |count| count.parse().expect("HYPERCAST_TURNCOATS is a number"));
    let parameters = team.trained(&team.hostile.join("turncoat.wasm"), 9);
    let parameters = parameters.to_str().unwrap();
    let daemon = team.daemon();
    let (load, neighbour) = (RequestLoad::of(HARMLESS), RequestLoad::on("search", HARMLESS));
    let first = predictions(&daemon);
    let (mut latencies, mut rest, mut peak) = (Vec::new(), Vec::new(), Peak::default());
    load.during(&daemon, || {
        neighbour.during(&daemon, || {
            std::thread::sleep(AT_REST);
            rest = std::mem::take(&mut *neighbour.took.lock().unwrap());
            peak = Peak::during(&daemon, || {
                for at in 0..turncoats {
                    let (turn, harm) = (TURNS[at % 3], HARMS[at % 5]);
                    let version = format!("1.{}.0", at + 1);
                    begin(&team, &daemon, turn, &version, parameters);
                    let latency = turn_hostile(&daemon, &load, turn, harm, &version);
                    println!("{harm:?} in {}: rolled back in {latency:.1?}", turn.step);
                    latencies.push(latency);
                }
            });
        });
    });
    assert_eq!(predictions(&daemon), first, "the version before answers as before");
    let (answered, bad) = neighbour.counts();
    assert_eq!(bad, 0, "of {answered} requests of the neighbour");
    let failed = load.failed.load(Ordering::Relaxed);
    assert_eq!(failed, 0, "the FM ranks where the guest fails");
    let most = GUESTS_AT_A_TIME * f64::from(team.config.plugin_limits.memory_mib) + SLACK_MIB;
    assert!(peak.most_mib - peak.before_mib < most, "{peak:?}, at most {most} MiB more");
    let beside = std::mem::take(&mut *neighbour.took.lock().unwrap());
    println!(
        "figure: {turncoats} turncoats; rollback {:.0} ms, at most {:.0} ms; the neighbour's p99 \
         {:.1} ms at rest and {:.1} ms beside them; {:.0} MiB before, {:.0} MiB at most",
        milliseconds(&mut latencies.clone(), 0.5),
        milliseconds(&mut latencies, 1.0),
        milliseconds(&mut rest, 0.99),
        milliseconds(&mut beside.clone(), 0.99),
        peak.before_mib,
        peak.most_mib
    );
    assert!(daemon.stop());
}

fn change(config: &mut Config) {
    let plugin = config.experts[0].plugin.clone();
    config.experts[0].surfaces = vec!["feed".into()];
    config.experts.push(expert("neighbour", plugin, &["search"]));
    // What made one guest fail would be replayed with the next, which would not get further.
    config.recorded.share = 0.0;
    config.rollout.replay_requests = 0;
    config.engine.fsync = false;
    config.server.deadline_ms = 60_000;
    config.server.served_predictions = 10_000;
}

/// Pushes a version and waits for the step in which it turns.
fn begin(team: &Team, daemon: &TestDaemon, turn: Turn, version: &str, parameters: &str) {
    let args = ["--version", version, "--parameters", parameters, "--no-wait"];
    let component = team.hostile.join("turncoat.wasm");
    let (status, said) = team.push(daemon, &component, &[&args, turn.stops].concat());
    assert_eq!(status, 0, "{said}");
    wait_until("it is where it turns", PATIENCE, || {
        let now = state(daemon, version);
        assert!(now["step"] != "failed" && now["step"] != "rolled-back", "{now}");
        now["step"] == turn.waits
    });
}

/// Sends the requests that make a version do harm, until it is given up. Returns how long that
/// took.
fn turn_hostile(
    daemon: &TestDaemon,
    load: &RequestLoad,
    turn: Turn,
    harm: Harm,
    version: &str,
) -> Duration {
    load.candidates.store(harm.candidates, Ordering::Relaxed);
    let began = Instant::now();
    wait_until("it is given up", PATIENCE, || state(daemon, version)["step"] == turn.ends);
    let latency = began.elapsed();
    let now = state(daemon, version).to_string();
    // Soon most calls are not made any more, because so many failed.
    let causes = [harm.fault, "was not called", "is busy"];
    let is_told = now.contains("faults") && causes.iter().any(|cause| now.contains(cause));
    assert!(is_told, "{harm:?} {turn:?}: {now}");
    // Every user is back on the version before, which can rank as many.
    wait_until("all are back", PATIENCE, || {
        let degraded = |user| {
            daemon.post("/v1/rank", &rank(user, harm.candidates)).1["degraded"] != json!(false)
        };
        !(1..20).any(degraded)
    });
    load.candidates.store(HARMLESS, Ordering::Relaxed);
    latency
}

/// The resident memory of a daemon.
#[derive(Debug, Default)]
struct Peak {
    before_mib: f64,
    most_mib: f64,
}

impl Peak {
    fn during(daemon: &TestDaemon, run: impl FnOnce()) -> Peak {
        let before_mib = daemon.memory_mib();
        let done = AtomicBool::new(false);
        let most_mib = std::thread::scope(|scope| {
            let watched = scope.spawn(|| {
                let mut most = before_mib;
                while !done.load(Ordering::Relaxed) {
                    most = most.max(daemon.memory_mib());
                    std::thread::sleep(Duration::from_millis(10));
                }
                most
            });
            let stop = StopWatching(&done);
            run();
            drop(stop);
            watched.join().unwrap()
        });
        Peak { before_mib, most_mib }
    }
}

/// Ends the watch when dropped, also if an assertion fails.
struct StopWatching<'a>(&'a AtomicBool);

impl Drop for StopWatching<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A quantile in milliseconds.
fn milliseconds(times: &mut [Duration], quantile: f64) -> f64 {
    times.sort_unstable();
    let at = (quantile * (times.len() - 1) as f64).round() as usize;
    times[at].as_secs_f64() * 1000.0
}
