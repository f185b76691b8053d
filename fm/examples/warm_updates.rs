//! What updates cost a server's latency, with and without warm histories.
//!
//! Run it: `cargo run -p hypercast-fm --example warm_updates`

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hypercast_fm::{
    device::DeviceKind,
    example::{Event, Example, Item, Outcome, Target, User},
    inference::{self, FoundationModel, Serving},
    spec::{FmConfig, FmSpec, Label, TaskSpec},
    trainer,
    update::{Dense, Piece, Update},
};

/// Users, each with a history.
const USERS: u64 = 512;
/// Candidates a request.
const TARGETS: u64 = 100;
/// How long each way of serving is under load, in each round.
const LOAD: Duration = Duration::from_secs(4);
/// How often weights are published under load.
const EVERY: Duration = Duration::from_millis(500);
/// Rounds of lazy and warm, in turn.
const ROUNDS: usize = 5;
/// Between the starts of two requests.
const PACE: Duration = Duration::from_millis(12);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let config = FmConfig { max_history: 256, ..FmConfig::default() };
    let work = dir.path().join("work");
    let mut trainer = trainer::create(&work, &config, &spec(), DeviceKind::Cpu)?;
    trainer.step(&[&request(0, 64)])?;
    trainer.checkpoint(&dir.path().join("fm"), "1.0.0")?;
    let trained = trainer.trained("1.0.0")?;
    let piece = |Dense { name, shape, values }| Piece { name, shape, start: 0, values };
    let update = Update {
        whole: false,
        manifest: trained.manifest,
        pieces: trained.dense.into_iter().map(piece).collect(),
        ids: vec![],
        rows: vec![],
        removed: vec![],
    };
    for events in [64, 256] {
        for warm_histories in [0, 512] {
            let fm = serve(dir.path(), warm_histories)?;
            let mut took: Vec<f64> = (0..3).map(|_| one_update(&*fm, &update, events)).collect();
            let median = percentile(&mut took, 0.5);
            let tokens = fm.cache_counts().warmed_tokens / 3;
            println!(
                "update, {events} events, {warm_histories} warm: {median:.1} ms, {tokens} tokens"
            );
        }
    }
    for (users, events) in [(64, 64), (64, 256), (512, 64)] {
        let mut found = [[vec![], vec![]], [vec![], vec![]], [vec![], vec![]]];
        for _ in 0..ROUNDS {
            for (way, warm_histories) in [0, 512].into_iter().enumerate() {
                let fm = serve(dir.path(), warm_histories)?;
                let mut load = under_load(&*fm, &update, (users, events));
                let updates = load.1 as f64;
                found[0][way].push(percentile(&mut load.0, 0.5));
                found[1][way].push(percentile(&mut load.0, 0.99));
                found[2][way].push(updates);
            }
        }
        for (what, mut ways) in ["p50 ms", "p99 ms", "updates"].into_iter().zip(found) {
            let [lazy, warm] = ways.each_mut().map(|all| percentile(all, 0.5));
            println!(
                "{users} users of {events} events: {what} lazy {lazy:.2} warm {warm:.2}; {ways:.1?}"
            );
        }
    }
    Ok(())
}

fn serve(dir: &Path, warm_histories: usize) -> hypercast_fm::Result<Box<dyn FoundationModel>> {
    // So large that memory is not what bounds it.
    let serving = Serving { warm_histories, history_cache_bytes: 4 << 30, ..Serving::default() };
    inference::load_live(&dir.join("fm"), &dir.join("live"), serving)
}

fn one_update(fm: &dyn FoundationModel, update: &Update, events: i64) -> f64 {
    for user in 0..USERS {
        fm.infer(&[&request(user, events)]).expect("it fits");
    }
    let started = Instant::now();
    fm.update(update.clone()).expect("it fits");
    started.elapsed().as_secs_f64() * 1e3
}

/// Latencies in milliseconds, and how many updates there were.
fn under_load(
    fm: &dyn FoundationModel,
    update: &Update,
    (users, events): (u64, i64),
) -> (Vec<f64>, u64) {
    let requests: Vec<Example> = (0..users).map(|user| request(user, events)).collect();
    requests.iter().for_each(|request| _ = fm.infer(&[request]).expect("it fits"));
    let (stop, updates) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut took = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                fm.update(update.clone()).expect("it fits");
                updates.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(EVERY.saturating_sub(started.elapsed()));
            }
        });
        let started = Instant::now();
        let mut at = 0;
        while started.elapsed() < LOAD {
            let one = Instant::now();
            fm.infer(&[&requests[at * 31 % requests.len()]]).expect("it fits");
            took.push(one.elapsed().as_secs_f64() * 1e3);
            std::thread::sleep(PACE.saturating_sub(one.elapsed()));
            at += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    (took, updates.load(Ordering::Relaxed))
}

fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

fn spec() -> FmSpec {
    let click = TaskSpec {
        name: "click".into(),
        main: true,
        label: Label::Action(0),
        surfaces: vec![true],
        weight: 1.0,
    };
    FmSpec {
        surfaces: vec!["home".into()],
        actions: 1,
        values: 0,
        item_ids: 1,
        item_dense: 0,
        profile_ids: vec![],
        features: 1,
        tasks: vec![click],
        content: 0,
    }
}

fn request(user: u64, events: i64) -> Example {
    let item = |id: u64| Arc::new(Item { id, ids: vec![id % 50], ..Item::default() });
    let outcome = |id: u64| Outcome { actions: (id % 2) as u32, known: 1, values: [f32::NAN; 4] };
    let event = |at: i64| {
        let id = (user * 31 + at as u64 * 17) % 5000;
        Event { item: item(id), surface: 0, time_ms: at * 60_000, outcome: outcome(id) }
    };
    let target = |id: u64| Target {
        item: item(id),
        ids: vec![],
        features: vec![1.0],
        outcome: outcome(id),
        truth: vec![],
    };
    Example {
        request: user,
        user: Arc::new(User { id: user, ..User::default() }),
        surface: 0,
        time_ms: events * 60_000,
        history: (0..events).map(event).collect(),
        targets: (0..TARGETS).map(target).collect(),
    }
}
