//! An expert that begins at the FM's own predictions and mixes in its own. It weighs rows by
//! their place and by how active their users are, and holds what orders the requests of active
//! users worse than what serves. It is not hostile.

use std::ops::Range;

use hypercast_sdk::{
    ActionBatch, Description, Evaluation, EvaluationRows, Expert, FmEmbedding, Graph, HostInfo,
    Ranked, Request, TaskHeads, TaskWeights, Verdict, evaluate,
};

struct FmResidual;

/// ln(1 + events of the user).
const ACTIVITY: &str = "user_history_len";

impl Expert for FmResidual {
    fn describe(info: &HostInfo) -> Description {
        Description::new("fm_residual", "1.0.0")
            .all_tasks(info)
            .rank_fm_logit("click")
            .training_fm_logit("click")
            .training_request()
            .training_feature(ACTIVITY)
    }

    fn network(g: &Graph) {
        let features = g.features(&g.info().features);
        let fm = FmEmbedding::new("fm", 4).apply(g.tae());
        TaskHeads::new("heads").fm(fm).from_fm().apply(g, features);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(request.fm_logit("click")?))
    }

    /// What is far down was hardly looked at, and one user in need of many events is as many rows.
    fn weights(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskWeights>, String> {
        let (requests, activity) = (batch.requests()?, batch.feature(ACTIVITY)?);
        let first = |row: usize| requests.partition_point(|request| *request < requests[row]);
        let weight = |row: usize| {
            let place = (row - first(row)) as f32;
            1.0 / (2.0 + place).log2() / (1.0 + activity[row])
        };
        Ok(batch.weighted(Self::describe(info).tasks(), weight))
    }

    fn evaluate_rows(info: &HostInfo, evaluation: &Evaluation, rows: &EvaluationRows) -> Verdict {
        let of_active = || {
            let (activity, task) = (rows.batch.feature(ACTIVITY).ok()?, rows.task("click").ok()?);
            let is_active = |request: Range<usize>| activity[request.start] > 1.0;
            let ndcg = |scores: &[f32]| evaluate::ndcg(rows, task, scores, 5, is_active);
            let serving = task.serving.as_slice();
            let serving =
                if serving.is_empty() { rows.batch.fm_logit("click").ok()? } else { serving };
            Some((ndcg(&task.candidate)?, ndcg(serving)?))
        };
        match of_active() {
            Some((own, serving)) if own < serving - 0.01 => Verdict::Hold(format!(
                "NDCG of active users is {own:.3}, {serving:.3} for what serves, over {} requests",
                rows.requests().count()
            )),
            _ => Self::evaluate(info, evaluation),
        }
    }
}

hypercast_sdk::export!(FmResidual);
