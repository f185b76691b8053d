//! Clocks that are ahead or behind: of a caller, or of one of several ingest hosts. None closes a
//! window early, and all windows close in time.

use std::collections::BTreeMap;

use hypercast_config::JoinSettings;
use hypercast_data::dataset::Dataset;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::world::*;
use crate::events::{EventKind, EventRecord};
use crate::join::{JoinedRecord, Joiner, JoinerOutput, saved::SavedJoiner};

const WINDOW_MS: i64 = 10_000;

const TICK_MS: i64 = 1000;

/// True times of requests.
const REQUESTS_MS: std::ops::Range<i64> = 1_000_000..1_060_000;

/// Who ingests: a right clock, one an hour ahead, one four minutes behind. With one host its clock
/// is the only one, as in a directory.
const HOSTS_AHEAD_MS: [i64; 3] = [0, 3_600_000, -240_000];

/// An event in the order of true time.
struct Arrival {
    true_ms: i64,
    stored_ms: Option<i64>,
    event: EventRecord,
}

struct ClockWorld {
    rng: StdRng,
    hosts: usize,
    arrivals: Vec<Arrival>,
    /// True time of each request of a caller whose clock is not ahead.
    honest: BTreeMap<u64, i64>,
}

impl ClockWorld {
    /// Requests of right, slow and fast callers over random hosts. Each is clicked within its
    /// window.
    fn new(seed: u64, hosts: usize, requests: u64) -> ClockWorld {
        let rng = StdRng::seed_from_u64(seed);
        let mut world = ClockWorld { rng, hosts, arrivals: vec![], honest: BTreeMap::new() };
        for request in 1..=requests {
            let true_ms = world.rng.random_range(REQUESTS_MS);
            let ahead_ms = match world.rng.random_range(0..3) {
                0 => 0,
                1 => -world.rng.random_range(0..2000),
                _ => 290_000,
            };
            if ahead_ms <= 0 {
                world.honest.insert(request, true_ms);
            }
            let came_ms = true_ms + world.rng.random_range(0..1500);
            world.arrive(came_ms, shown(request, 1, 0, true_ms + ahead_ms).kind);
            let closed_ms = true_ms + ahead_ms.min(0) + WINDOW_MS;
            let clicked_ms = world.rng.random_range(true_ms..closed_ms);
            let came_ms = world.rng.random_range(clicked_ms.max(came_ms)..closed_ms);
            world.arrive(came_ms, acted(request, 1, clicked_ms + ahead_ms, CLICK, CLICK).kind);
        }
        world.tick();
        world.arrivals.sort_by_key(|arrival| arrival.true_ms);
        world
    }

    /// Ticks of all hosts until the last window is over. Those of wrong clocks pause now and then.
    fn tick(&mut self) {
        let end_ms = REQUESTS_MS.end + 400_000;
        for host in 0..self.hosts {
            let mut true_ms = REQUESTS_MS.start;
            while true_ms < end_ms {
                let paused = host > 0 && self.rng.random_bool(0.05);
                true_ms += if paused { 20_000 } else { TICK_MS };
                self.arrive_at(host, true_ms, |time_ms| EventKind::Tick { time_ms });
            }
        }
    }

    fn arrive(&mut self, true_ms: i64, kind: EventKind) {
        let host = self.rng.random_range(0..self.hosts);
        self.arrive_at(host, true_ms, |_| kind);
    }

    /// `kind` makes the event from the host's time.
    fn arrive_at(&mut self, host: usize, true_ms: i64, kind: impl FnOnce(i64) -> EventKind) {
        let ingested_ms = true_ms + HOSTS_AHEAD_MS[host];
        let stored_ms = (self.hosts > 1).then_some(true_ms);
        let event = EventRecord { ingested_ms, kind: kind(ingested_ms) };
        self.arrivals.push(Arrival { true_ms, stored_ms, event });
    }

    /// The true time at which each request was joined, if with its click.
    fn joined(&self, joiner: &mut Joiner) -> BTreeMap<u64, i64> {
        let mut joined = BTreeMap::new();
        for Arrival { true_ms, stored_ms, event } in &self.arrivals {
            let (mut event, mut made) = (event.clone(), JoinerOutput::default());
            if joiner.doubts_times() {
                event = event.bounded(*stored_ms);
            }
            joiner.take(event, &mut made);
            for record in made.joined {
                let JoinedRecord::Example(of) = record else { continue };
                if of.example.targets[0].outcome.actions == CLICK {
                    joined.insert(of.example.request, *true_ms);
                }
            }
        }
        joined
    }
}

fn one_window() -> JoinSettings {
    let window_s = WINDOW_MS as u64 / 1000;
    JoinSettings {
        min_window_s: window_s,
        first_window_s: window_s,
        max_window_s: window_s,
        ..settings()
    }
}

#[test]
fn a_wrong_clock_closes_no_window_early_and_keeps_none_open() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    for seed in 0..20 {
        for hosts in [1, 3] {
            let world = ClockWorld::new(seed, hosts, 200);
            let mut joiner = joiner(&data, one_window());
            let joined = world.joined(&mut joiner);
            assert_eq!(joined.len(), 200, "seed {seed}, {hosts} hosts: each with its click");
            for (request, true_ms) in &world.honest {
                let late_ms = joined[request] - true_ms - WINDOW_MS;
                let what = format!("seed {seed}, {hosts} hosts, request {request}");
                assert!((-2000..=TICK_MS + 100).contains(&late_ms), "{what}: {late_ms} ms late");
            }
            let mut believing = super::world::joiner(&data, one_window());
            believing.bounded_by_arrival = false;
            let joined = world.joined(&mut believing);
            let lost = world.honest.keys().filter(|request| !joined.contains_key(request));
            assert!(lost.count() > 0, "seed {seed}: without the bound some clicks come too late");
        }
    }
}

#[test]
fn a_time_that_a_caller_with_the_right_sets_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let mut joiner = joiner(&dataset(dir.path()), one_window());
    let at = |ingested_ms, kind| EventRecord { ingested_ms, kind };
    let events = [
        at(1000, shown(7, 1, 0, 1000).kind),
        at(2000, shown(8, 2, 0, 200_000).kind),
        at(2000, acted(8, 2, 100_000, CLICK, CLICK).kind),
    ];
    let mut made = JoinerOutput::default();
    events.into_iter().for_each(|event| joiner.take(event.bounded(Some(3000)), &mut made));
    assert_eq!((made.joined.len(), joiner.clock_ms), (0, 2000));
    let own = at(90_000, EventKind::Tick { time_ms: 90_000 }).bounded(Some(4000));
    joiner.take(own, &mut made);
    assert_eq!((made.joined.len(), joiner.clock_ms), (0, 4000), "a tick of a host that is ahead");
    let sent = at(4000, EventKind::Tick { time_ms: 90_000 }).bounded(Some(4000));
    joiner.take(sent, &mut made);
    assert_eq!((made.joined.len(), joiner.clock_ms), (2, 90_000));
    assert_eq!(
        made.joined[1].joined().unwrap().example.time_ms,
        3000,
        "shown when it came at the latest"
    );
    let any = JoinSettings { max_future_s: 0, ..one_window() };
    let mut joiner = super::world::joiner(&dataset(dir.path()), any);
    joiner.take(at(1000, shown(7, 1, 0, 9_000_000).kind), &mut made);
    assert_eq!(joiner.clock_ms, 9_000_000, "with max_future_s = 0 any time is");
}

/// A joiner from its encoded state without the last `cut` bytes.
fn loaded(joiner: &mut Joiner, data: &Dataset, cut: usize) -> Joiner {
    let mut bytes = Vec::new();
    let write = |saved: &SavedJoiner, _: &_| {
        bytes = postcard::to_allocvec(saved).unwrap();
        Ok(())
    };
    joiner.save(0, "", write).unwrap();
    let saved: SavedJoiner = postcard::from_bytes(&bytes[..bytes.len() - cut]).unwrap();
    Joiner::restore(blank_state(data), saved).unwrap().with_content(data.content)
}

#[test]
fn a_state_of_an_earlier_release_repeats_its_records_by_the_rules_of_then() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let mut joiner = joiner(&data, one_window());
    assert!(loaded(&mut joiner, &data, 0).bounded_by_arrival);
    let with_bounds = loaded(&mut joiner, &data, 1);
    assert!(with_bounds.bounded_by_arrival && !with_bounds.knows_outputs);
    let mut of_before = loaded(&mut joiner, &data, 2);
    let early = EventRecord { ingested_ms: 1000, kind: shown(8, 2, 0, 500_000).kind };
    let made = all(&mut of_before, &[shown(7, 1, 0, 1000), early]);
    assert_eq!(made.joined.len(), 1, "the fast clock closed the window then");
    assert!(!loaded(&mut of_before, &data, 0).bounded_by_arrival, "until all are repeated");
    of_before.set_options(of_before.options.clone());
    assert!(of_before.doubts_times());
}
