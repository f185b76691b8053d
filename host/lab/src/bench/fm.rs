//! The FM's training step beside the same model in PyTorch, and its inference over cached histories
//! beside the same inference without a cache.

use std::{cell::Cell, sync::Arc};

use hypercast_fm::{
    device::DeviceKind,
    example::{Example, Item},
    inference::{self, FmServingOptions, FoundationModel},
    spec::FmConfig,
    trainer,
};
use serde_json::json;

use super::{
    BenchOptions, BenchReport,
    timing::{Contender, MS, Rival, Scale, timed},
    torch::Torch,
    workload::{self, RequestSize},
};
use crate::error::Result;

/// Adds the times of whole training steps with the default settings: 64 requests of 16 targets,
/// with histories of 65 to 128 events and with 128 events each.
pub fn step(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    const TARGETS: usize = 16;
    let (spec, items) = (workload::spec(), workload::items());
    let config = FmConfig { max_history: 128, ..FmConfig::default() };
    let jagged: Vec<usize> = (0..config.batch_requests).map(|at| 65 + at).collect();
    let batches = [("65-128", jagged), ("128", vec![128; config.batch_requests])];
    let cases = batches.each_ref().map(|(_, lengths)| {
        json!({
            "kind": "step", "lengths": lengths, "targets": TARGETS, "dim": config.dim,
            "embedding_dim": config.embedding_dim, "keys": workload::ITEMS,
            "fields": spec.token_fields(), "outcomes": spec.outcome_width(),
            "columns": workload::COLUMNS, "layers": config.layers, "heads": config.heads,
            "qk": config.qk_dim, "v": config.v_dim, "tasks": spec.tasks.len(),
            "buckets": [config.position_buckets, config.time_buckets],
            "average_decay": config.average_decay,
        })
    });
    let torch = Torch::start(options, report, &cases);
    for (case, (length, lengths)) in batches.iter().enumerate() {
        let size = |(user, &events)| RequestSize { user, events, candidates: TARGETS };
        let requests = (0..).zip(lengths).map(|request| workload::example(&items, size(request)));
        let examples: Vec<Example> = requests.collect();
        let examples: Vec<&Example> = examples.iter().collect();
        let dir = super::temporary()?;
        let mut trainer = trainer::create(dir.path(), &config, &spec, DeviceKind::Cpu)?;
        let ours = timed(|| Ok(trainer.step(&examples)?));
        let rivals = torch.iter().flat_map(|torch| torch.rivals(case)).collect();
        let name = format!("FM training step, B64 N{length} M16 d64, 2 layers");
        report.race(&name, MS, options.runs, ours, rivals)?;
    }
    Ok(())
}

/// Adds the times of candidates over a history of 1,024 events that is cached, and over one that is
/// not: four layers of d = 128, with the default biases and candidate columns.
pub fn history(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let items = workload::items();
    let config =
        FmConfig { dim: 128, layers: 4, heads: 4, max_history: 1024, ..FmConfig::default() };
    let fm = untrained(&config, &items)?;
    for candidates in [500, 32] {
        let size = RequestSize { user: 1, events: 1024, candidates };
        let request = workload::example(&items, size);
        let ours = timed(|| Ok(fm.cached.infer(&[&request])?));
        let run = timed(|| Ok(fm.uncached.infer(&[&request])?));
        let rivals = vec![Rival { name: "the history anew", run }];
        let name =
            format!("FM, {candidates} candidates over a kept history of 1024, 4 layers d128");
        report.race(&name, MS, options.runs, ours, rivals)?;
    }
    Ok(())
}

/// Adds the cost of a request in the logging tier, which embeds many requests at a time, beside the
/// same requests one at a time. Histories are new in every pass, so that neither side has them
/// cached.
pub fn logging(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    const REQUESTS: u64 = 64;
    const CANDIDATES: usize = 10;
    let items = workload::items();
    let config = FmConfig { max_history: 256, ..FmConfig::default() };
    let fm = untrained(&config, &items)?.cached;
    let user = Cell::new(1_000);
    // `timed` would run a pass twice, and find its histories in the cache.
    let contender = |requests_per_pass: usize| -> Contender<'_> {
        let (user, fm, items) = (&user, &fm, &items);
        Box::new(move |times_s| {
            let size = |user| RequestSize { user, events: 256, candidates: CANDIDATES };
            let users = user.get()..user.get() + REQUESTS;
            user.set(users.end);
            let requests: Vec<Example> =
                users.map(|user| workload::example(items, size(user))).collect();
            let requests: Vec<&Example> = requests.iter().collect();
            let start = std::time::Instant::now();
            for pass in requests.chunks(requests_per_pass) {
                fm.infer(pass)?;
            }
            times_s.push(start.elapsed().as_secs_f64());
            Ok(())
        })
    };
    let rivals = vec![Rival { name: "the same, one request at a time", run: contender(1) }];
    let name = format!("TAEs of {CANDIDATES} served items, with 64 requests at a time, a request");
    let each_us = |seconds: f64| seconds / REQUESTS as f64 * 1e6;
    report.race(
        &name,
        Scale { unit: "us", of_seconds: each_us },
        options.runs,
        contender(REQUESTS as usize),
        rivals,
    )?;
    Ok(())
}

/// One checkpoint, loaded twice.
struct LoadedFm {
    cached: Box<dyn FoundationModel>,
    uncached: Box<dyn FoundationModel>,
}

/// A model whose embedding rows exist; their values do not matter for its speed.
fn untrained(config: &FmConfig, items: &[Arc<Item>]) -> Result<LoadedFm> {
    let dir = super::temporary()?;
    let work = dir.path().join("work");
    let mut trainer = trainer::create(&work, config, &workload::spec(), DeviceKind::Cpu)?;
    for user in 1..4 {
        let size = RequestSize { user, events: config.max_history, candidates: 32 };
        trainer.step(&[&workload::example(items, size)])?;
    }
    let checkpoint = dir.path().join("fm");
    trainer.checkpoint(&checkpoint, "1.0.0")?;
    let load = |history_cache_bytes| {
        inference::load(
            &checkpoint,
            FmServingOptions { history_cache_bytes, ..FmServingOptions::default() },
        )
    };
    Ok(LoadedFm { cached: load(64 << 20)?, uncached: load(0)? })
}
