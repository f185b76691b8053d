//! Table 1: an expert without embedding, with the user embedding, with the TAE,
//! with both.
//!
//! Both embeddings come from one FM at one point of the stream, before it learns.
//! The user embedding is the wider one and is stale by hours: it is made from the
//! events up to then, as a table of user embeddings that is refreshed now and
//! then would hold. All arms are one plugin; its `tae` input is what differs.

use hypercast_fm::{example::Example, trainer};
use serde_json::json;

use super::{
    Ground, Outcome,
    field::Arm,
    report::{Pair, arms_by_task},
    store_dir,
};
use crate::demo::Seconds;
use crate::error::Result;
use hypercast_config::Config;
use hypercast_data::logs::LogReader;
use hypercast_train::{fm::dataset_spec, report::ALL};

const ARMS: [&str; 4] = ["baseline", "+UE", "+TAE", "+UE+TAE"];

/// Runs it for every seed.
pub fn run(ground: &Ground<'_>, seconds: &mut Seconds) -> Result<Outcome> {
    let mut tallies = Vec::new();
    let fm = &ground.config.fm;
    let (ue, tae) = (fm.user_state_width(), fm.tae_width());
    for &seed in &ground.options.seeds {
        let config = ground.seeded(seed);
        seconds.time("fm", || embed(ground, &config))?;
        let log = LogReader::open(&config.paths.logs)?;
        let field = ground.field(&config, &log);
        let mut tally = ground.tally(&ARMS);
        let parts = [ue..ue + tae, 0..ue, ue..ue + tae, 0..ue + tae];
        for (index, embedding) in parts.into_iter().enumerate() {
            let arm = Arm { index, embedding, without_tae: index == 0 };
            seconds.time("experts", || field.run(&arm, &field.surfaces(), &mut tally))?;
        }
        tallies.push(tally);
    }
    let found = ground.found(&tallies);
    let pairs: Vec<Pair> = (0..ARMS.len()).map(|arm| Pair { baseline: 0, arm }).collect();
    let mut rows = Vec::new();
    for cell in found.cells()? {
        rows.extend(seconds.time("bootstrap", || Ok(found.rows(&cell, &pairs)))?);
    }
    Ok(Outcome {
        name: "tae",
        table: arms_by_task(&rows, ALL),
        rows,
        models: Vec::new(),
        chosen: json!({ "stale_hours": ground.options.stale_hours, "ue_width": ue, "tae_width": tae }),
    })
}

/// The FM's pass: logs the user embedding and the TAE of every target, joined.
fn embed(ground: &Ground<'_>, config: &Config) -> Result<()> {
    let spec = dataset_spec(ground.dataset)?;
    let dir = store_dir(config, "fm")?;
    let mut trainer = trainer::create(&dir, &config.fm, &spec, config.device)?;
    let (ue, tae) = (config.fm.user_state_width(), config.fm.tae_width());
    let mut log = ground.log(config, ue + tae)?;
    // The newest events are cut off for the user embedding; a longer history makes up for them.
    let stream = ground.stream(config, config.features.history_events.max(config.fm.max_history));
    let skip = stream.skip()?;
    let stale_ms = (ground.options.stale_hours * 3.6e6) as i64;
    stream.run("FM", |part| {
        let logged = !part.history_only && part.seen >= skip;
        let states = match logged {
            true => {
                let old: Vec<Example> = part.examples.iter().map(|e| stale(e, stale_ms)).collect();
                trainer.user_states(&old.iter().collect::<Vec<_>>())?
            }
            false => Vec::new(),
        };
        let said = part.through(trainer.as_mut(), &|_| true)?;
        if !logged {
            return Ok(());
        }
        let mut joined = Vec::with_capacity(said.tae.len() / tae * (ue + tae));
        let mut rows = said.tae.chunks_exact(tae);
        for (example, state) in part.examples.iter().zip(states.chunks_exact(ue)) {
            for own in rows.by_ref().take(example.targets.len()) {
                joined.extend_from_slice(state);
                joined.extend_from_slice(own);
            }
        }
        log.write_batch(part.examples, &joined, |_| true)?;
        Ok(())
    })?;
    Ok(log.finish()?)
}

/// The request with its history as it was `stale_ms` before, and without targets.
pub(super) fn stale(example: &Example, stale_ms: i64) -> Example {
    let until_ms = example.time_ms - stale_ms;
    Example {
        request: example.request,
        user: example.user.clone(),
        surface: example.surface,
        time_ms: until_ms,
        history: example
            .history
            .iter()
            .filter(|event| event.time_ms <= until_ms)
            .cloned()
            .collect(),
        targets: Vec::new(),
    }
}
