//! Measures how weight updates affect the latency of inference, with and without cache warm-up.
//!
//! Run it: `cargo run -p hypercast-fm --example update_latency`

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
    inference::{self, FmServingOptions, FoundationModel},
    spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
    trainer,
    update::{TensorSlice, WeightTensor, WeightUpdate},
};

/// Users, each with a history.
const USERS: u64 = 512;
/// Candidates a request.
const TARGETS: u64 = 100;
/// How long each variant is under load in a round.
const LOAD: Duration = Duration::from_secs(4);
/// How often weights are published under load.
const EVERY: Duration = Duration::from_millis(500);
/// Rounds, in each of which both variants run.
const ROUNDS: usize = 5;
/// The time between the starts of two requests.
const PACE: Duration = Duration::from_millis(12);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let config = FmConfig { max_history: 256, ..FmConfig::default() };
    let work = dir.path().join("work");
    let mut trainer = trainer::create(&work, &config, &spec(), DeviceKind::Cpu)?;
    trainer.step(&[&request(0, 64)])?;
    trainer.checkpoint(&dir.path().join("fm"), "1.0.0")?;
    let trained = trainer.trained_weights("1.0.0")?;
    let whole_tensor =
        |WeightTensor { name, shape, values }| TensorSlice { name, shape, start: 0, values };
    let update = WeightUpdate {
        complete: false,
        manifest: trained.manifest,
        dense: trained.dense.into_iter().map(whole_tensor).collect(),
        row_ids: vec![],
        rows: vec![],
        removed_row_ids: vec![],
    };
    for events in [64, 256] {
        for warmup_histories in [0, 512] {
            let fm = serve(dir.path(), warmup_histories)?;
            let mut took_ms: Vec<f64> = (0..3).map(|_| one_update(&*fm, &update, events)).collect();
            let median = percentile(&mut took_ms, 0.5);
            let tokens = fm.cache_counts().warmup_tokens / 3;
            println!(
                "update, {events} events, {warmup_histories} histories encoded: {median:.1} ms, {tokens} tokens"
            );
        }
    }
    for (users, events) in [(64, 64), (64, 256), (512, 64)] {
        let mut found = [[vec![], vec![]], [vec![], vec![]], [vec![], vec![]]];
        for _ in 0..ROUNDS {
            for (way, warmup_histories) in [0, 512].into_iter().enumerate() {
                let fm = serve(dir.path(), warmup_histories)?;
                let mut load = under_load(&*fm, &update, users, events);
                found[0][way].push(percentile(&mut load.latencies_ms, 0.5));
                found[1][way].push(percentile(&mut load.latencies_ms, 0.99));
                found[2][way].push(load.updates as f64);
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

fn serve(dir: &Path, warmup_histories: usize) -> hypercast_fm::Result<Box<dyn FoundationModel>> {
    // A cache so large that its size is no limit.
    let serving = FmServingOptions {
        warmup_histories,
        history_cache_bytes: 4 << 30,
        ..FmServingOptions::default()
    };
    inference::load_updatable(&dir.join("fm"), &dir.join("live"), serving)
}

fn one_update(fm: &dyn FoundationModel, update: &WeightUpdate, events: i64) -> f64 {
    for user in 0..USERS {
        fm.infer(&[&request(user, events)]).expect("a valid request or update");
    }
    let started = Instant::now();
    fm.update(update.clone()).expect("a valid request or update");
    started.elapsed().as_secs_f64() * 1e3
}

struct LoadRun {
    latencies_ms: Vec<f64>,
    updates: u64,
}

/// Requests of `users` users at a steady pace, while updates are applied.
fn under_load(fm: &dyn FoundationModel, update: &WeightUpdate, users: u64, events: i64) -> LoadRun {
    let requests: Vec<Example> = (0..users).map(|user| request(user, events)).collect();
    requests
        .iter()
        .for_each(|request| _ = fm.infer(&[request]).expect("a valid request or update"));
    let (stop, updates) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut latencies_ms = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                fm.update(update.clone()).expect("a valid request or update");
                updates.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(EVERY.saturating_sub(started.elapsed()));
            }
        });
        let started = Instant::now();
        let mut at = 0;
        while started.elapsed() < LOAD {
            let one = Instant::now();
            fm.infer(&[&requests[at * 31 % requests.len()]]).expect("a valid request or update");
            latencies_ms.push(one.elapsed().as_secs_f64() * 1e3);
            std::thread::sleep(PACE.saturating_sub(one.elapsed()));
            at += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    LoadRun { latencies_ms, updates: updates.load(Ordering::Relaxed) }
}

fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

fn spec() -> FmSpec {
    let click = TaskSpec {
        name: "click".into(),
        main: true,
        label: TaskLabel::Action(0),
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
