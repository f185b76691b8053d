//! `value-model`: an expert that implements every training hook.
//!
//! - `labels` defines a task that the schema does not have.
//! - `sample` drops some of the frequent, similar examples.
//! - `schedule` lowers the learning rate at the end of a training.
//! - The extra loss in `network` expresses a relation between tasks.
//! - `evaluate` decides whether trained parameters may serve.
//!
//! Its network is simple; see `mlp-fusion` and `short-term` for larger ones. It fits any data set
//! with actions.

use hypercast_sdk::{
    ActionBatch, Description, Evaluation, Expert, ExpertFusion, FmEmbedding, Graph, HostInfo,
    Quality, Ranked, Request, SchemaTask, Squash, Task, TaskHeads, TaskKind, TaskLabels,
    TrainingStep, Verdict, evaluate, labels,
};

/// The expert's own task: whether the user took any positive action.
pub const ENGAGED: &str = "engaged";

/// Actions that show that an impression was a mistake.
const NEGATIVE_ACTIONS: [&str; 4] = ["dislike", "hate", "hide", "report"];

/// The share of examples without a positive action that training keeps. Most examples are like
/// that, and they differ little.
const KEPT: f32 = 0.5;

/// The expert; its tasks are those of the host's schema and [`ENGAGED`].
pub struct ValueModel;

impl Expert for ValueModel {
    fn describe(info: &HostInfo) -> Description {
        Description::new("value-model", env!("CARGO_PKG_VERSION"))
            .all_tasks(info)
            .task(ENGAGED, TaskKind::Binary)
    }

    fn network(g: &Graph) {
        let mut heads = TaskHeads::new("heads").tower([]);
        let mut parts = Vec::new();
        if !g.info().features.is_empty() {
            let numbers = g.features(&g.info().features);
            parts.push(Squash::new("numeric").apply(numbers));
            heads = heads.direct(numbers);
        }
        if g.info().tae_dim > 0 {
            let fm = FmEmbedding::new("fm", 32).apply(g.tae());
            parts.push(fm.values);
            heads = heads.fm(fm).from_fm();
        }
        if parts.is_empty() {
            g.fail("there is no input for this expert: neither numeric features in the schema nor an FM");
            return;
        }
        let bottom = ExpertFusion::mlp("expert", [32]).apply(g.concat(&parts));
        let engaged = heads.logit(ENGAGED, bottom);
        g.output(ENGAGED, engaged);
        // A user who takes a positive action is engaged. So predicting such an action as more
        // likely than engagement adds to the loss.
        let mut excess = g.constant(0.0) * engaged;
        for task in g.info().tasks.iter() {
            let logit = heads.logit(&task.name, bottom);
            g.output(&task.name, logit);
            if is_positive(task) {
                excess = excess + (logit - engaged).relu();
            }
        }
        g.extra_loss(excess * 0.1);
    }

    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let task = |own: &SchemaTask| Task { name: own.name.clone(), kind: own.kind };
        let tasks: Vec<Task> = info.tasks.iter().map(task).collect();
        let mut all = labels::from_schema(&tasks, info, batch)?;
        let positive = positive_actions(info);
        // Use the positive actions that are known. Which ones are depends on the surface, not on
        // what the user did, so the mask does not bias the labels.
        let rows = || batch.actions.iter().zip(&batch.known);
        let engaged = |(actions, known): (&u64, &u64)| u8::from(actions & known & positive != 0);
        all.push(TaskLabels {
            task: ENGAGED.into(),
            labels: rows().map(engaged).map(f32::from).collect(),
            mask: batch.known.iter().map(|known| u8::from(known & positive != 0)).collect(),
            weights: Vec::new(),
        });
        Ok(all)
    }

    fn sample(info: &HostInfo, batch: &ActionBatch) -> Vec<f32> {
        let positive = positive_actions(info);
        let keep = |actions: &u64| if actions & positive != 0 { 1.0 } else { KEPT };
        batch.actions.iter().map(keep).collect()
    }

    /// Lowers the learning rate over the last fifth of a training. On a stream, keeps the host's.
    fn schedule(step: &TrainingStep) -> f32 {
        if step.planned == 0 {
            return 1.0;
        }
        let left = 1.0 - step.taken as f32 / step.planned as f32;
        (5.0 * left).clamp(0.1, 1.0)
    }

    /// Rolls back if the predicted engagement is badly miscalibrated; else accepts parameters for
    /// which no task is worse.
    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        let engaged = evaluate::task(evaluation, ENGAGED).filter(|own| own.examples >= 1000);
        if let Some((engaged, serving)) = engaged.and_then(|own| Some((own, own.serving.as_ref()?)))
        {
            let (now, before) = (miscalibration(&engaged.candidate), miscalibration(serving));
            if now > 0.5 && now > 2.0 * before {
                let calibration = engaged.candidate.calibration.unwrap_or_default();
                return Verdict::RollBack(format!(
                    "it predicts {calibration:.2} times the observed engagement, over {} examples",
                    engaged.examples
                ));
            }
        }
        evaluate::NoWorse { tolerance: 0.005, examples: 2000 }.judge(evaluation)
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let worth = |task: &str| match task {
            ENGAGED => 1.0,
            task if NEGATIVE_ACTIONS.contains(&task) => -1.0,
            _ => 0.2,
        };
        Ok(request.top(&request.weighted_sum(worth)))
    }
}

/// The bits of the positive actions.
fn positive_actions(info: &HostInfo) -> u64 {
    let is_positive = |action: &String| !NEGATIVE_ACTIONS.contains(&action.as_str());
    let actions = info.actions.iter().enumerate();
    actions.filter(|(_, action)| is_positive(action)).map(|(bit, _)| 1 << bit).sum()
}

/// Whether the label of a task is a positive action.
fn is_positive(task: &SchemaTask) -> bool {
    task.kind == TaskKind::Binary && !NEGATIVE_ACTIONS.contains(&task.label.as_str())
}

/// 0 if the predictions are right on average; 0.7 if they are twice or half the outcomes.
fn miscalibration(quality: &Quality) -> f64 {
    quality.calibration.map_or(0.0, |calibration| calibration.ln().abs())
}

hypercast_sdk::export!(ValueModel);
