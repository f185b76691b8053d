//! The FM's training step beside the same model in PyTorch, and its answers
//! over histories that are kept, beside the same answers over histories that are not.

use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    inference::{self, FoundationModel, Serving},
    spec::FmConfig,
    trainer,
};
use serde_json::json;

use super::{
    Options, Report, Rival,
    timing::{Contender, medians_s},
    torch,
    world::{self, Request},
};
use crate::error::{CommonErrors as _, Error, Result};

/// A whole training step: 64 requests of 64 to 128 events and 16 targets, d 64, two layers.
pub fn step(options: &Options, report: &mut Report) -> Result<()> {
    const TARGETS: usize = 16;
    let (spec, items) = (world::spec(), world::items());
    // Without a running average, what is predicted is what learns: one forward pass, as the rival has.
    let config = FmConfig { average_decay: 0.0, max_history: 128, ..FmConfig::default() };
    let lengths: Vec<usize> = (0..config.batch_requests).map(|at| 65 + at).collect();
    let examples: Vec<Example> = (0_u64..)
        .zip(&lengths)
        .map(|(user, &events)| {
            world::example(&items, Request { user, events, candidates: TARGETS })
        })
        .collect();
    let examples: Vec<&Example> = examples.iter().collect();
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let mut trainer = trainer::create(dir.path(), &config, &spec, DeviceKind::Cpu)?;
    let case = json!({
        "kind": "step", "lengths": lengths, "targets": TARGETS, "dim": config.dim,
        "embedding_dim": config.embedding_dim, "keys": world::ITEMS, "fields": spec.token_fields(),
        "outcomes": spec.outcome_width(), "layers": config.layers, "heads": config.heads,
        "qk": config.qk_dim, "v": config.v_dim, "tasks": spec.tasks.len(),
    });
    let mut failed = None;
    let ours = medians_s(
        options.runs,
        &mut [Box::new(|| failed = trainer.step(&examples).err().or(failed.take()))],
    )[0];
    if let Some(error) = failed {
        return Err(error.into());
    }
    let rival = match torch::run(&options.python, &[case], options.runs) {
        Ok(torch) => {
            Some(Rival { name: "the same model in PyTorch".into(), value: torch.seconds[0] * 1e3 })
        }
        Err(why) => {
            report.note(why);
            None
        }
    };
    report.add("FM training step, B64 N65-128 M16 d64, 2 layers", (ours * 1e3, "ms"), rival);
    Ok(())
}

/// 1,024 events, four layers of d = 128: candidates over a kept history, and over one that is not.
pub fn history(options: &Options, report: &mut Report) -> Result<()> {
    let items = world::items();
    let config = FmConfig {
        dim: 128,
        layers: 4,
        heads: 4,
        max_history: 1024,
        position_buckets: 0,
        time_buckets: 0,
        ..FmConfig::default()
    };
    let fm = untrained(&config, &items)?;
    for candidates in [500, 32] {
        let request = world::example(&items, Request { user: 1, events: 1024, candidates });
        let mut failed = None;
        let mut infer = |model: &dyn FoundationModel| {
            failed = model.infer(&[&request]).err().or(failed.take());
        };
        infer(&*fm.keeping);
        let took = {
            let infer = std::cell::RefCell::new(&mut infer);
            let mut contenders: [Contender<'_>; 2] = [
                Box::new(|| infer.borrow_mut()(&*fm.keeping)),
                Box::new(|| infer.borrow_mut()(&*fm.forgetting)),
            ];
            medians_s(options.runs, &mut contenders)
        };
        if let Some(error) = failed {
            return Err(error.into());
        }
        let rival = Rival { name: "the history anew".into(), value: took[1] * 1e3 };
        let name =
            format!("FM, {candidates} candidates over a kept history of 1024, 4 layers d128");
        report.add(name, (took[0] * 1e3, "ms"), Some(rival));
    }
    Ok(())
}

/// What a request costs the logging tier, which sees 10 served items of it and many requests at a time, beside the
/// serving tier, which sees its 200 candidates alone.
pub fn logging(options: &Options, report: &mut Report) -> Result<()> {
    const REQUESTS: u64 = 64;
    let items = world::items();
    let config = FmConfig { max_history: 256, ..FmConfig::default() };
    let fm = untrained(&config, &items)?.keeping;
    let requests = |candidates: usize| -> Vec<Example> {
        let request = |user| world::example(&items, Request { user, events: 256, candidates });
        (0..REQUESTS).map(request).collect()
    };
    let (served, all) = (requests(10), requests(200));
    let served: Vec<&Example> = served.iter().collect();
    fm.infer(&served)?;
    let failed = std::cell::Cell::new(None);
    let infer = |examples: &[&Example]| {
        if let Err(error) = fm.infer(examples) {
            failed.set(Some(error));
        }
    };
    let took = {
        let mut contenders: [Contender<'_>; 2] = [
            Box::new(|| infer(&served)),
            Box::new(|| all.iter().for_each(|request| infer(&[request]))),
        ];
        medians_s(options.runs, &mut contenders)
    };
    if let Some(error) = failed.take() {
        return Err(error.into());
    }
    let each_us = |seconds: f64| seconds / REQUESTS as f64 * 1e6;
    let rival = Rival { name: "200 candidates, alone".into(), value: each_us(took[1]) };
    let name = "TAEs of 10 served items, with 64 requests at a time, a request";
    report.add(name, (each_us(took[0]), "us"), Some(rival));
    Ok(())
}

/// One checkpoint, loaded twice.
struct Loaded {
    /// With a history cache.
    keeping: Box<dyn FoundationModel>,
    /// Without.
    forgetting: Box<dyn FoundationModel>,
}

/// A model whose embedding rows exist; what they hold does not matter for its speed.
fn untrained(
    config: &FmConfig,
    items: &[std::sync::Arc<hypercast_fm::example::Item>],
) -> Result<Loaded> {
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let mut trainer =
        trainer::create(&dir.path().join("work"), config, &world::spec(), DeviceKind::Cpu)?;
    for user in 1..4 {
        let example =
            world::example(items, Request { user, events: config.max_history, candidates: 32 });
        trainer.step(&[&example])?;
    }
    let checkpoint = dir.path().join("fm");
    trainer.checkpoint(&checkpoint, "1.0.0")?;
    let load = |history_cache_bytes| {
        inference::load(&checkpoint, Serving { history_cache_bytes, ..Serving::default() })
    };
    Ok(Loaded { keeping: load(64 << 20)?, forgetting: load(0)? })
}
