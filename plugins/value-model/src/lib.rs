//! `value-model`: a team that says what a good example, a good step and a good model are.
//!
//! It shows every hook of training: `labels` make a task that the schema lacks, `sample` thins what the surface has
//! too much of, `schedule` brings training to rest, the extra loss says what no label can, `evaluate` decides what may
//! serve. Its network is plain; see `mlp-fusion` and `short-term` for more of one. It fits any data set with actions.

use hypercast_sdk::{
    ActionBatch, Description, Evaluation, Expert, ExpertFusion, FmEmbedding, Graph, HostInfo,
    Quality, Ranked, Request, SchemaTask, Squash, Task, TaskHeads, TaskKind, TaskLabels,
    TrainingStep, Verdict, evaluate, labels,
};

/// The team's own task: whether the user did anything at all that they would do again.
pub const ENGAGED: &str = "engaged";

/// Actions that say that an impression was a mistake.
const AGAINST: [&str; 4] = ["dislike", "hate", "hide", "report"];

/// The share of examples without any good action that is trained on: they are most, and much alike.
const KEPT: f32 = 0.5;

/// The expert.
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
            heads = heads.fm(fm);
        }
        if parts.is_empty() {
            g.fail("the schema has neither numeric features nor an FM");
            return;
        }
        let bottom = ExpertFusion::mlp("expert", [32]).apply(g.concat(&parts));
        let engaged = heads.logit(ENGAGED, bottom);
        g.output(ENGAGED, engaged);
        // Whoever likes something is engaged by it: the likelihood of a part above that of the whole is a loss.
        let mut broken = g.constant(0.0) * engaged;
        for task in g.info().tasks.iter() {
            let logit = heads.logit(&task.name, bottom);
            g.output(&task.name, logit);
            if is_for(task) {
                broken = broken + (logit - engaged).relu();
            }
        }
        g.extra_loss(broken * 0.1);
    }

    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let task = |own: &SchemaTask| Task { name: own.name.clone(), kind: own.kind };
        let tasks: Vec<Task> = info.tasks.iter().map(task).collect();
        let mut all = labels::from_schema(&tasks, info, batch)?;
        let good = good_actions(info);
        // By the good actions that are known: which those are depends on the surface, and not on what the user did.
        let rows = || batch.actions.iter().zip(&batch.known);
        let engaged = |(actions, known): (&u32, &u32)| u8::from(actions & known & good != 0);
        all.push(TaskLabels {
            task: ENGAGED.into(),
            labels: rows().map(engaged).map(f32::from).collect(),
            mask: batch.known.iter().map(|known| u8::from(known & good != 0)).collect(),
            weights: Vec::new(),
        });
        Ok(all)
    }

    fn sample(info: &HostInfo, batch: &ActionBatch) -> Vec<f32> {
        let good = good_actions(info);
        let keep = |actions: &u32| if actions & good != 0 { 1.0 } else { KEPT };
        batch.actions.iter().map(keep).collect()
    }

    /// The last fifth of the steps goes to rest; behind the stream the rate is the host's.
    fn schedule(step: &TrainingStep) -> f32 {
        if step.planned == 0 {
            return 1.0;
        }
        let left = 1.0 - step.taken as f32 / step.planned as f32;
        (5.0 * left).clamp(0.1, 1.0)
    }

    /// No task may be worse, and one that has run away is taken back.
    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        let engaged = evaluate::task(evaluation, ENGAGED).filter(|own| own.examples >= 1000);
        if let Some((engaged, serving)) = engaged.and_then(|own| Some((own, own.serving.as_ref()?)))
        {
            let (now, before) = (miscalibration(&engaged.candidate), miscalibration(serving));
            if now > 0.5 && now > 2.0 * before {
                let calibration = engaged.candidate.calibration.unwrap_or_default();
                return Verdict::RollBack(format!(
                    "it predicts {calibration:.2} times the engagement that there is, over {} examples",
                    engaged.examples
                ));
            }
        }
        evaluate::NoWorse { tolerance: 0.005, examples: 2000 }.judge(evaluation)
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let worth = |task: &str| match task {
            ENGAGED => 1.0,
            task if AGAINST.contains(&task) => -1.0,
            _ => 0.2,
        };
        Ok(request.top(&request.weighted_sum(worth)))
    }
}

/// The bits of the actions that speak for an impression.
fn good_actions(info: &HostInfo) -> u32 {
    let speaks_for = |(_, action): &(usize, &String)| !AGAINST.contains(&action.as_str());
    info.actions.iter().enumerate().filter(speaks_for).map(|(bit, _)| 1 << bit).sum()
}

/// Whether a task's positives are engaged users.
fn is_for(task: &SchemaTask) -> bool {
    task.kind == TaskKind::Binary && !AGAINST.contains(&task.label.as_str())
}

/// 0 where the predictions are right on average; 0.7 where they are twice, or half, of what comes.
fn miscalibration(quality: &Quality) -> f64 {
    quality.calibration.map_or(0.0, |calibration| calibration.ln().abs())
}

hypercast_sdk::export!(ValueModel);
