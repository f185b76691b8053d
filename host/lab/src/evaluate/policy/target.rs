//! The policy in question, and what a model expects of rewards: by situation and item.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    convert::Infallible,
    str::FromStr,
};

use hypercast_data::schema::Schema;
use hypercast_import::action_table::{ActionNumber, ActionTable};

use super::{
    estimators::ModelledReward,
    log::{PolicyLog, RewardedRow},
};
use crate::error::{CommonErrors as _, Error, Result};

/// How far a sum of probabilities may be from 1, because of rounding.
const SUM_TOLERANCE: f64 = 1e-3;

/// The policy to evaluate, as it is named.
#[derive(Debug, Clone)]
pub enum PolicyChoice {
    /// Every item that the log shows, with the same probability.
    Uniform,
    /// The probabilities of a file, or of several whose names fit a pattern.
    Files(String),
}

impl FromStr for PolicyChoice {
    type Err = Infallible;

    fn from_str(name: &str) -> std::result::Result<PolicyChoice, Infallible> {
        Ok(if name == "uniform" { PolicyChoice::Uniform } else { PolicyChoice::Files(name.into()) })
    }
}

impl PolicyChoice {
    /// Its name in the report.
    pub fn name(&self) -> &str {
        match self {
            PolicyChoice::Uniform => "uniform",
            PolicyChoice::Files(pattern) => pattern,
        }
    }
}

/// What the policy in question does in each situation.
#[derive(Debug)]
pub enum TargetPolicy {
    /// The same everywhere.
    Everywhere(Vec<ActionNumber>),
    /// What files say.
    Table {
        /// Where they are.
        pattern: String,
        /// What they say.
        table: ActionTable,
    },
}

impl TargetPolicy {
    /// The chosen policy.
    ///
    /// # Errors
    /// Its file or the log cannot be read, or the probabilities of a situation are more than 1.
    pub fn new(choice: &PolicyChoice, log: &PolicyLog, schema: &Schema) -> Result<TargetPolicy> {
        match choice {
            PolicyChoice::Uniform => uniform(log),
            PolicyChoice::Files(pattern) => {
                let table = ActionTable::read(pattern, "probability", 0.0..=1.0, schema)?;
                let policy = TargetPolicy::Table { pattern: pattern.clone(), table };
                if policy.sums().any(|sum| sum > 1.0 + SUM_TOLERANCE) {
                    let reason = "the probabilities of a situation are more than 1 together; they \
                                  are those of showing an item at its position, so add `position` \
                                  or what tells the situations apart";
                    return Err(Error::data(pattern, reason));
                }
                Ok(policy)
            }
        }
    }

    /// Its probabilities in the situation of a row.
    ///
    /// # Errors
    /// The file does not have the situation.
    pub fn actions(&self, row: &RewardedRow<'_>) -> Result<&[ActionNumber]> {
        match self {
            TargetPolicy::Everywhere(actions) => Ok(actions),
            TargetPolicy::Table { pattern, table } => of_table(table, pattern, row),
        }
    }

    /// Refuses a policy of which some probabilities are not told, because what models expect of it
    /// is then not known.
    ///
    /// # Errors
    /// The probabilities of some situation are less than 1.
    pub fn require_all_actions(&self) -> Result<()> {
        let TargetPolicy::Table { pattern, .. } = self else { return Ok(()) };
        if self.sums().all(|sum| sum >= 1.0 - SUM_TOLERANCE) {
            return Ok(());
        }
        let reason = "the probabilities of a situation are less than 1 together; --estimates needs \
                      those of all items that the policy shows, IPS and SNIPS alone do not";
        Err(Error::data(pattern, reason))
    }

    /// The sum of probabilities of each situation.
    fn sums(&self) -> impl Iterator<Item = f64> {
        let table = match self {
            TargetPolicy::Everywhere(_) => None,
            TargetPolicy::Table { table, .. } => Some(table),
        };
        let situations = table.into_iter().flat_map(ActionTable::situations);
        situations.map(|actions| actions.iter().map(|action| action.number).sum())
    }
}

/// All items that the log shows, with the same probability.
fn uniform(log: &PolicyLog) -> Result<TargetPolicy> {
    let mut items = HashSet::new();
    log.for_each(|row| {
        items.insert(row.impression.item);
        Ok(())
    })?;
    let number = 1.0 / items.len() as f64;
    let items = items.into_iter().collect::<BTreeSet<u64>>().into_iter();
    Ok(TargetPolicy::Everywhere(items.map(|item| ActionNumber { item, number }).collect()))
}

/// What a model expects of rewards, from a file.
#[derive(Debug)]
pub struct RewardEstimates {
    pattern: String,
    table: ActionTable,
    /// What is expected of the policy, by the places of a situation's estimates and of its actions.
    /// Many rows have one situation, and a uniform policy has all items in each.
    policy_means: HashMap<[usize; 2], f64>,
}

impl RewardEstimates {
    /// Reads the files that the pattern names.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn read(pattern: &str, schema: &Schema) -> Result<RewardEstimates> {
        let table = ActionTable::read(pattern, "estimate", f64::MIN..=f64::MAX, schema)?;
        let policy_means = HashMap::new();
        Ok(RewardEstimates { pattern: pattern.to_owned(), table, policy_means })
    }

    /// What is expected of a row's item, and of a policy that does `actions` in its situation. They
    /// stay where they are from call to call.
    ///
    /// # Errors
    /// Something that is needed has no estimate.
    pub fn expected(
        &mut self,
        row: &RewardedRow<'_>,
        actions: &[ActionNumber],
    ) -> Result<ModelledReward> {
        let estimates = of_table(&self.table, &self.pattern, row)?;
        let of = |item: u64| {
            number_of(estimates, item).ok_or_else(|| {
                let reason = format!(
                    "it has no estimate of the item {item} in the situation of row {} of the log \
                     (request {}); it needs one of the item that was shown, and of all that the \
                     policy shows",
                    row.number, row.impression.request
                );
                Error::data(&self.pattern, reason)
            })
        };
        let situation = [estimates.as_ptr().addr(), actions.as_ptr().addr()];
        let policy = if let Some(mean) = self.policy_means.get(&situation) {
            *mean
        } else {
            let shown = actions.iter().filter(|action| action.number > 0.0);
            let mean =
                shown.map(|action| Ok(action.number * of(action.item)?)).sum::<Result<_>>()?;
            self.policy_means.insert(situation, mean);
            mean
        };
        Ok(ModelledReward { shown: of(row.impression.item)?, policy })
    }
}

/// The number of an item among those of a situation.
pub fn number_of(actions: &[ActionNumber], item: u64) -> Option<f64> {
    let at = actions.binary_search_by_key(&item, |action| action.item).ok()?;
    Some(actions[at].number)
}

/// The numbers of a row's situation.
fn of_table<'a>(
    table: &'a ActionTable,
    pattern: &str,
    row: &RewardedRow<'_>,
) -> Result<&'a [ActionNumber]> {
    table.of(row.impression).ok_or_else(|| {
        let reason = format!(
            "it does not have the situation of row {} of the log (request {}), by {}; it needs all \
             that the log has, or --surface",
            row.number,
            row.impression.request,
            table.key()
        );
        Error::data(pattern, reason)
    })
}
