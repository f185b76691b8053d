//! Table 1: an expert without embedding, with the user embedding, with the TAE, with both, and with
//! the TAE and the FM's own predictions, at which it begins.
//!
//! Both embeddings come from one FM at one point of the stream, before it learns. The user
//! embedding is the wider one and is stale by hours, like an entry of a table of user embeddings
//! that is refreshed now and then. All arms are one plugin with different `tae` inputs.

use hypercast_config::Config;
use hypercast_fm::{example::Example, inference::FmOutput};
use hypercast_train::{fm::dataset_spec, report::ALL};
use serde_json::json;

use super::{ExperimentContext, ExperimentReport, report::arms_by_task, runner::ExperimentArm};
use crate::error::Result;

const ARMS: [&str; 5] = ["baseline", "+UE", "+TAE", "+UE+TAE", "+TAE+logits"];

/// Runs it for every seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let fm = &context.config.fm;
    let (ue, tae) = (fm.user_state_width(), fm.tae_width());
    let tallies = context.tallies(&ARMS, |config, tally| {
        context.times.time("fm", || embed(context, config))?;
        let runner = context.runner(config, 0)?;
        let of_tae = ue..ue + tae;
        let parts = [of_tae.clone(), 0..ue, of_tae.clone(), 0..ue + tae, of_tae];
        for (index, embedding) in parts.into_iter().enumerate() {
            let (without_tae, with_fm_logits) = (index == 0, index == 4);
            let arm = ExperimentArm { index, embedding, without_tae, with_fm_logits };
            runner.run(&arm, &runner.surfaces(), tally)?;
        }
        Ok(())
    })?;
    let rows = context.rows(&tallies, None)?;
    let chosen = json!({
        "stale_hours": context.options.stale_hours, "ue_width": ue, "tae_width": tae,
    });
    Ok(context.report(arms_by_task(&rows, ALL), rows, Vec::new(), chosen))
}

/// Runs the FM, and logs the concatenated user embedding and TAE of every target, with what the FM
/// predicts.
fn embed(context: &ExperimentContext<'_>, config: &Config) -> Result<()> {
    let spec = dataset_spec(context.dataset)?;
    let mut trainer = context.fm(config, "fm", &config.fm, &spec)?;
    let (ue, tae) = (config.fm.user_state_width(), config.fm.tae_width());
    // The user embedding lacks the newest events; a longer history makes up for them.
    let stream = context.stream(config, config.features.history_events.max(config.fm.max_history));
    let stale_ms = (context.options.stale_hours * 3.6e6) as i64;
    stream.log("FM", &[ue + tae], None, |part, is_logged| {
        let states = if is_logged {
            let core = part.core.examples(part.examples);
            let old: Vec<Example> = core.iter().map(|e| stale(e, stale_ms)).collect();
            trainer.user_states(&old.iter().collect::<Vec<_>>())?
        } else {
            Vec::new()
        };
        let output = part.through(trainer.as_mut(), &|_| true)?.served(&spec);
        let mut joined = Vec::new();
        let mut rows = output.tae.chunks_exact(tae);
        for (example, state) in part.examples.iter().zip(states.chunks_exact(ue)) {
            for own in rows.by_ref().take(example.targets.len()) {
                joined.extend_from_slice(state);
                joined.extend_from_slice(own);
            }
        }
        Ok(vec![FmOutput { tae: joined, ..output }])
    })
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
