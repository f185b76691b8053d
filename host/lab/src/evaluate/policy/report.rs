//! The report of a policy's evaluation, and what it means in words.

use std::fmt;

use serde::Serialize;

use super::{
    PolicyOptions,
    estimators::{Estimator, OffPolicyEstimates, PolicyEstimate, WeightSummary},
    log::LeftOut,
};

/// The fewest rows of equal weight from which anything is concluded.
const FEWEST_ROWS: f64 = 100.0;

/// The fewest rewarded rows of equal weight, because without them there is little to count.
const FEWEST_REWARDS: f64 = 20.0;

/// How many standard errors the mean weight may be off 1; chance has it so once in a thousand logs.
const MEAN_ERRORS: f64 = 3.3;

/// The share of clipped rows from which on their bias is told, in per cent.
const MUCH_CLIPPED_PCT: f64 = 1.0;

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct PolicyReport {
    /// `uniform`, or the policy's files.
    pub policy: String,
    /// The task, action or value that was counted.
    pub reward: String,
    /// Rows that were left out because nobody knows their reward.
    pub without_reward: u64,
    /// Rows that were left out because nobody noted with which probability they were shown.
    pub without_propensity: u64,
    /// The largest weight that a row could have.
    pub clip: Option<f64>,
    /// What was estimated.
    #[serde(flatten)]
    pub estimates: OffPolicyEstimates,
    /// What that means.
    pub words: String,
    /// What to look at, or to try.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub advice: Vec<String>,
}

impl PolicyReport {
    /// The report on some estimates.
    pub fn new(
        options: &PolicyOptions,
        left_out: LeftOut,
        estimates: OffPolicyEstimates,
    ) -> PolicyReport {
        PolicyReport {
            policy: options.policy.name().to_owned(),
            reward: options.reward.clone(),
            without_reward: left_out.without_reward,
            without_propensity: left_out.without_propensity,
            clip: options.clip,
            words: words(&estimates),
            advice: advice(&estimates),
            estimates,
        }
    }
}

/// The estimate of an estimator, if there is one.
fn find(estimates: &OffPolicyEstimates, estimator: Estimator) -> Option<&PolicyEstimate> {
    estimates.estimates.iter().find(|of| of.estimator == estimator)
}

/// What the estimates mean.
fn words(estimates: &OffPolicyEstimates) -> String {
    let WeightSummary { effective_rows, effective_rewards, .. } = estimates.weights;
    if effective_rows < FEWEST_ROWS || effective_rewards < FEWEST_REWARDS {
        return format!(
            "too few to tell: weighted, the log is worth {effective_rows:.0} rows, and \
             {effective_rewards:.0} with a reward"
        );
    }
    let trusted = find(estimates, Estimator::DoublyRobust);
    let trusted = trusted.or_else(|| find(estimates, Estimator::Snips));
    let PolicyEstimate {
        estimator, value, bootstrap95, over_logged_pct, over_logged95_pct, ..
    } = trusted.expect("SNIPS is always there");
    let [low, high] = over_logged95_pct;
    let against = if *low > 0.0 {
        "better than"
    } else if *high < 0.0 {
        "WORSE than"
    } else {
        "level with"
    };
    format!(
        "the policy would earn {value:.4e} [{:.4e}, {:.4e}] a row ({}), {against} the log's own \
         ({over_logged_pct:+.1} % [{low:+.1}, {high:+.1}])",
        bootstrap95[0],
        bootstrap95[1],
        estimator.name()
    )
}

/// What is suspicious about them, or could be better.
fn advice(estimates: &OffPolicyEstimates) -> Vec<String> {
    let WeightSummary { mean, mean_error, clipped_pct, effective_rows, .. } = estimates.weights;
    let mut advice = Vec::new();
    if (mean - 1.0).abs() > MEAN_ERRORS * mean_error + 1e-3 {
        advice.push(format!(
            "the mean weight is {mean:.3}, where 1 is expected: the propensities are not those \
             with which items were shown, or the policy shows what the log never does"
        ));
    }
    if effective_rows < FEWEST_ROWS {
        advice.push(
            "the policy is far from the log's: collect more, explore more, or take a policy that \
             is nearer"
                .into(),
        );
    }
    if clipped_pct > MUCH_CLIPPED_PCT {
        advice.push(format!(
            "{clipped_pct:.1} % of the rows were clipped, which biases all but the direct method; \
             try a larger --clip"
        ));
    }
    let robust = find(estimates, Estimator::DoublyRobust);
    if let (Some(direct), Some(robust)) = (find(estimates, Estimator::DirectMethod), robust) {
        let [low, high] = robust.bootstrap95;
        if direct.value < low || direct.value > high {
            advice.push("the direct method is beyond chance off: its estimates are biased".into());
        }
    } else {
        advice.push("--estimates of rewards make the interval narrower (doubly robust)".into());
    }
    advice
}

impl fmt::Display for PolicyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OffPolicyEstimates { rows, requests, weights, estimates } = &self.estimates;
        writeln!(
            f,
            "{} on {rows} rows of {requests} requests, `{}` a row",
            self.policy, self.reward
        )?;
        if self.without_reward > 0 {
            writeln!(f, "{} rows without a known reward were left out", self.without_reward)?;
        }
        if self.without_propensity > 0 {
            writeln!(f, "{} rows without a propensity were left out", self.without_propensity)?;
        }
        writeln!(
            f,
            "{:<14} {:>11} {:>25} {:>25} {:>28}",
            "estimator", "value", "95 % normal", "95 % bootstrap", "over the log, %"
        )?;
        for of in estimates {
            let interval = |[low, high]: [f64; 2]| format!("[{low:.4e}, {high:.4e}]");
            let [low, high] = of.over_logged95_pct;
            let over = format!("{:+.1} [{low:+.1}, {high:+.1}]", of.over_logged_pct);
            writeln!(
                f,
                "{:<14} {:>11.4e} {:>25} {:>25} {over:>28}",
                of.estimator.name(),
                of.value,
                interval(of.normal95),
                interval(of.bootstrap95)
            )?;
        }
        let WeightSummary { mean, mean_error, largest, clipped_pct, .. } = weights;
        writeln!(
            f,
            "weights: mean {mean:.3} ± {mean_error:.3}, largest {largest:.1}, {clipped_pct:.2} % \
             clipped; worth {:.0} rows, {:.0} with a reward",
            weights.effective_rows, weights.effective_rewards
        )?;
        writeln!(f, "{}", self.words)?;
        for advice in &self.advice {
            writeln!(f, "  note: {advice}")?;
        }
        Ok(())
    }
}
