//! What another policy would have earned, estimated from a log with propensities, before it is
//! shown to anybody.
//!
//! | module | content |
//! |---|---|
//! | [`estimators`] | the formulas, and nothing else |
//! | [`log`] | the rows of a data set or of feature logs, with rewards and propensities |
//! | [`target`] | the policy in question, and estimates of rewards |
//! | [`report`] | what it says to people |

pub mod estimators;
pub mod log;
pub mod report;
pub mod target;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use self::{
    estimators::{LoggedAction, OffPolicyEstimator},
    log::PolicyLog,
    report::PolicyReport,
    target::{PolicyChoice, RewardEstimates, TargetPolicy, number_of},
};
use crate::error::{CommonErrors as _, Error, Result};

/// Draws of the bootstrap.
const REPLICATES: usize = 1000;

/// Estimate from a log with propensities what another policy would have earned
#[derive(Debug, Clone, clap::Args)]
pub struct PolicyOptions {
    /// A data set, as `hypercast data import` makes it, or feature logs, as the logging tier
    /// (`hypercast materialise --follow`) writes them; those that are made of a data set do not say
    /// what was ranked where
    #[arg(long, value_name = "DIR", default_value = "data")]
    pub from: PathBuf,
    /// The policy: uniform (all items of the log alike), or a CSV, JSONL or Parquet file with the
    /// columns item and probability, and those that it depends on: request or context features, and
    /// of feature logs ranked:position or ranked:arm
    #[arg(long, value_name = "uniform|FILE")]
    pub policy: PolicyChoice,
    /// The task, action or value that counts as the reward
    #[arg(long, value_name = "NAME")]
    pub reward: String,
    /// The context feature with the probability with which the log's policy showed the item
    /// [default: propensity of a data set, and what daemons noted in feature logs]
    #[arg(long, value_name = "FEATURE")]
    pub propensity: Option<String>,
    /// Expected rewards for the direct method and doubly robust: a file as that of the policy, with
    /// the column estimate
    #[arg(long, value_name = "FILE")]
    pub estimates: Option<String>,
    /// Of feature logs, count rows at this place of the answer alone, 0 for the first. A softmax
    /// ranking has the probabilities of later places only given those before
    #[arg(long, value_name = "INDEX")]
    pub position: Option<u32>,
    /// Count this surface alone
    #[arg(long, value_name = "NAME")]
    pub surface: Option<String>,
    /// Count rows from this time on, a date or milliseconds: those that neither the policy nor the
    /// estimates learned from
    #[arg(long, value_name = "TIME")]
    pub test_from: Option<String>,
    /// Let no row count more often than this: less variance, and a bias
    #[arg(long, value_name = "WEIGHT")]
    pub clip: Option<f64>,
    /// Also write the result to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Estimates the value of a policy.
///
/// # Errors
/// Something in the files or options that is refused, in words, with its place.
pub fn run(options: &PolicyOptions) -> Result<PolicyReport> {
    if options.clip.is_some_and(|clip| clip.is_nan() || clip <= 0.0) {
        return Err(Error::invalid("--clip is a weight above 0"));
    }
    let log = PolicyLog::open(options)?;
    let schema = &log.schema;
    let policy = TargetPolicy::new(&options.policy, &log, schema)?;
    let model = options.estimates.as_ref().map(|files| RewardEstimates::read(files, schema));
    let mut model = model.transpose()?;
    if model.is_some() {
        policy.require_all_actions()?;
    }
    let mut estimator = OffPolicyEstimator::new(model.is_some(), options.clip);
    let left_out = log.for_each(|row| {
        let actions = policy.actions(&row)?;
        let modelled = model.as_mut().map(|model| model.expected(&row, actions)).transpose()?;
        estimator.push(&LoggedAction {
            request: row.impression.request,
            reward: row.reward,
            propensity: row.propensity,
            probability: number_of(actions, row.impression.item).unwrap_or(0.0),
            modelled,
        });
        Ok(())
    })?;
    let estimates = estimator.finish(REPLICATES).ok_or_else(|| {
        let reason = if left_out.without_propensity > 0 {
            format!(
                "none of {} rows with a known `{}` has a propensity: their daemon noted none, or \
                 their expert does not explore",
                left_out.without_propensity, options.reward
            )
        } else {
            format!("no row that counts has a known `{}`", options.reward)
        };
        Error::data(&log.path, reason)
    })?;
    Ok(PolicyReport::new(options, left_out, estimates))
}
