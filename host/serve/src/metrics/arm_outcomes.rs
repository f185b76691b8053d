//! What came of the rankings of the versions that share an expert's users, to compare the versions
//! while they answer.
//!
//! The joiner says with each outcome which version ranked the item, so that each daemon sees the
//! outcomes of all. Counting begins when the daemon starts, and anew when the shares of an expert
//! change: versions whose shares were others at other times differ by the times, too. Answers
//! of the FM in place of an expert that failed are of no arm.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use hypercast_core::clock::now_ms;
use hypercast_data::{dataset::Impression, ranked_place::RankedPlace, schema::Schema};
use hypercast_stream::registry::Shares;

use crate::{
    metrics::sequential::{OutcomeSums, SequentialDifference},
    threads::lock,
};

/// The outcomes by surface, task and version.
pub struct ArmOutcomes {
    surfaces: Mutex<BTreeMap<u16, SplitOutcomes>>,
    /// The time of the newest request, or of the start before there is one: impressions after it
    /// count.
    request_ms: AtomicI64,
}

/// The versions of an expert that share a surface's users, and their shares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrafficSplit<'a> {
    /// The expert's name.
    pub expert: &'a str,
    /// The shares by version.
    pub shares: &'a Shares,
}

/// An arm's outcomes for a task, beside those of the arm with the largest share.
#[derive(Debug, Clone, PartialEq)]
pub struct ComparedArm {
    /// The surface's index.
    pub surface: u16,
    /// The task's name.
    pub task: String,
    /// `NAME@VERSION`.
    pub arm: String,
    /// The share of the expert's users that it answers.
    pub share: f64,
    /// Shown items whose outcome is known.
    pub rows: u64,
    /// Their users, or groups of users if there are many.
    pub users: usize,
    /// The mean of their labels: of a binary task the rate.
    pub mean: Option<f64>,
    /// The arm that it is compared with; none for that one itself.
    pub against: Option<String>,
    /// How much more it has than that one; none as long as little is known.
    pub difference: Option<SequentialDifference>,
}

struct SplitOutcomes {
    expert: String,
    shares: Shares,
    /// Requests until then were answered under other shares, or before the daemon started.
    since_ms: i64,
    /// By task and version.
    sums: BTreeMap<String, BTreeMap<String, OutcomeSums>>,
}

impl Default for ArmOutcomes {
    fn default() -> Self {
        Self { surfaces: Mutex::default(), request_ms: AtomicI64::new(now_ms()) }
    }
}

impl ArmOutcomes {
    /// Notes the time of a request that is answered. A caller may send one that has not come, and
    /// then nothing would count until it has.
    pub fn answered(&self, time_ms: i64) {
        self.request_ms.store(time_ms.min(now_ms()), Ordering::Relaxed);
    }

    /// Counts an outcome of an item that was ranked, if versions share its surface now.
    pub fn outcome(
        &self,
        split: Option<TrafficSplit<'_>>,
        impression: &Impression,
        ranked: &RankedPlace,
        schema: &Schema,
    ) {
        let (surface, mut surfaces) = (impression.surface, lock(&self.surfaces));
        let Some(split) = split.filter(|split| split.shares.len() > 1) else {
            surfaces.remove(&surface);
            return;
        };
        let is_same =
            |of: &SplitOutcomes| TrafficSplit { expert: &of.expert, shares: &of.shares } == split;
        if !surfaces.get(&surface).is_some_and(is_same) {
            let begun = SplitOutcomes {
                expert: split.expert.to_owned(),
                shares: split.shares.clone(),
                since_ms: self.request_ms.load(Ordering::Relaxed),
                sums: BTreeMap::new(),
            };
            surfaces.insert(surface, begun);
        }
        let of = surfaces.get_mut(&surface).expect("it was put there");
        let version = ranked.arm.strip_prefix(&of.expert).and_then(|arm| arm.strip_prefix('@'));
        let version = version.filter(|version| of.shares.contains_key(*version));
        let Some(version) = version.filter(|_| impression.time_ms > of.since_ms) else { return };
        for (at, task) in schema.tasks.iter().enumerate() {
            if let Some(label) = schema.label(at, surface, &impression.outcome) {
                let sums = of.sums.entry(task.name.clone()).or_default();
                let sums = sums.entry(version.to_owned()).or_default();
                sums.push(impression.user, f64::from(label));
            }
        }
    }

    /// All arms of all surfaces that versions share. Each is compared with the one of the largest
    /// share, of equal ones the first by version.
    pub fn comparisons(&self) -> Vec<ComparedArm> {
        let surfaces = lock(&self.surfaces);
        let of_surface = |(&surface, of): (&u16, &SplitOutcomes)| -> Vec<ComparedArm> {
            let largest = of.shares.values().copied().fold(0.0, f64::max);
            let mut by_version = of.shares.iter();
            let reference = by_version.find(|(_, share)| **share == largest);
            let Some((reference, _)) = reference else { return Vec::new() };
            let label = |version: &str| format!("{}@{version}", of.expert);
            let of_task = |(task, sums): (&String, &BTreeMap<String, OutcomeSums>)| {
                let compared = of.shares.iter().map(|(version, &share)| {
                    let (own, other) = (sums.get(version), sums.get(reference));
                    let is_other = version != reference;
                    ComparedArm {
                        surface,
                        task: task.clone(),
                        arm: label(version),
                        share,
                        rows: own.map_or(0, OutcomeSums::rows),
                        users: own.map_or(0, OutcomeSums::users),
                        mean: own.and_then(OutcomeSums::mean),
                        against: is_other.then(|| label(reference)),
                        difference: own
                            .zip(other.filter(|_| is_other))
                            .and_then(|(a, b)| a.over(b)),
                    }
                });
                compared.collect::<Vec<_>>()
            };
            of.sums.iter().flat_map(of_task).collect()
        };
        surfaces.iter().flat_map(of_surface).collect()
    }
}

#[cfg(test)]
mod tests {
    use hypercast_data::dataset::ContextFeatures;
    use hypercast_fm::example::Outcome;

    use super::*;

    fn schema() -> Schema {
        toml::from_str(
            "surfaces = ['feed']\nactions = ['click']\n\
             tasks = [{ name = 'click', role = 'main', kind = 'binary', label = 'click' }]",
        )
        .unwrap()
    }

    fn shown(user: u64, time_ms: i64, clicked: bool) -> Impression {
        Impression {
            request: user,
            time_ms,
            outcome_ms: time_ms,
            user,
            item: 7,
            surface: 0,
            outcome: Outcome { actions: clicked.into(), known: 1, ..Outcome::UNKNOWN },
            context: ContextFeatures::default(),
            truth: Vec::new(),
            history_only: false,
        }
    }

    #[test]
    fn versions_that_share_users_are_compared_since_they_have_their_shares() {
        let (arms, schema) = (ArmOutcomes::default(), schema());
        let shares = |share: f64| {
            Shares::from(
                [("1.0.0", 1.0 - share), ("2.0.0", share)]
                    .map(|(version, share)| (version.to_owned(), share)),
            )
        };
        let count = |shares: &Shares, user: u64, time_ms, arm: &str| {
            let ranked = RankedPlace { position: 0, propensity: None, arm: arm.into() };
            let clicked = user.is_multiple_of(if arm == "feed@2.0.0" { 2 } else { 4 });
            let split = Some(TrafficSplit { expert: "feed", shares });
            arms.outcome(split, &shown(user, time_ms, clicked), &ranked, &schema);
        };
        arms.answered(1000);
        let few = shares(0.1);
        for user in 0..4000 {
            // Outcomes of requests that were answered before count for nothing.
            count(&few, user, if user < 1000 { 1000 } else { 1001 }, "feed@1.0.0");
            count(&few, user, 2000, "fm@1.0.0");
            count(&few, user, 2000, "feed@0.9.0");
        }
        (0..800).for_each(|user| count(&few, user * 11, 2000, "feed@2.0.0"));
        let found = arms.comparisons();
        let [first, second] = &found[..] else { panic!("{found:?}") };
        assert_eq!((&*first.arm, first.rows, first.mean), ("feed@1.0.0", 3000, Some(0.25)));
        assert_eq!((&first.against, first.difference), (&None, None));
        assert_eq!((&*second.arm, second.share, second.rows), ("feed@2.0.0", 0.1, 800));
        assert_eq!(second.against.as_deref(), Some("feed@1.0.0"));
        let difference = second.difference.unwrap();
        assert!((difference.difference - 0.25).abs() < 1e-9 && difference.low > 0.1);
        assert!(difference.p < 1e-6, "{difference:?}");
        // Other shares begin anew, and one version alone is compared with none.
        arms.answered(3000);
        count(&shares(0.5), 8, 3001, "feed@2.0.0");
        let found = arms.comparisons();
        assert_eq!(found.iter().map(|arm| arm.rows).collect::<Vec<_>>(), [0, 1]);
        let alone = Shares::from([("2.0.0".to_owned(), 1.0)]);
        count(&alone, 8, 3002, "feed@2.0.0");
        assert!(arms.comparisons().is_empty());
        // A request of a time that has not come silences nothing.
        arms.answered(i64::MAX);
        count(&few, 8, now_ms() + 1000, "feed@2.0.0");
        let found = arms.comparisons();
        assert_eq!(found.iter().map(|arm| arm.rows).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn what_was_answered_before_the_daemon_started_is_not_compared() {
        let (arms, schema) = (ArmOutcomes::default(), schema());
        let shares = Shares::from([("1.0.0", 0.5), ("2.0.0", 0.5)].map(|(v, s)| (v.into(), s)));
        let split = TrafficSplit { expert: "feed", shares: &shares };
        let ranked = RankedPlace { position: 0, propensity: None, arm: "feed@1.0.0".into() };
        arms.outcome(Some(split), &shown(8, now_ms() - 60_000, true), &ranked, &schema);
        assert!(arms.comparisons().is_empty());
        arms.outcome(Some(split), &shown(8, now_ms() + 60_000, true), &ranked, &schema);
        assert_eq!(arms.comparisons()[0].rows, 1);
    }
}
