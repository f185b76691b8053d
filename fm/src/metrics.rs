//! Metrics of predicted probabilities: NE (eq. 5), AUC and GAUC.
//!
//! They are computed from kept (user, prediction, label) rows, so every number
//! is exact; the keeper bounds how many rows it holds.

use std::collections::{BTreeMap, VecDeque};

/// One prediction and what came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Whose request it was.
    pub user: u64,
    /// The predicted probability.
    pub probability: f32,
    /// What happened.
    pub label: bool,
}

/// The metrics of some rows. A metric that the rows cannot give is none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Summary {
    /// Rows.
    pub n: usize,
    /// Share of positives.
    pub rate: f64,
    /// Normalised entropy (eq. 5): cross-entropy over that of the rows' own rate. None for one class only.
    pub ne: Option<f64>,
    /// Area under the ROC curve. None for one class only.
    pub auc: Option<f64>,
    /// AUC within a user, weighted by the user's positives, over users with both labels.
    pub gauc: Option<f64>,
}

/// Computes the metrics of `rows`.
pub fn summarise(rows: &[Scored]) -> Summary {
    let positives = rows.iter().filter(|row| row.label).count();
    let n = rows.len();
    let rate = positives as f64 / n.max(1) as f64;
    if positives == 0 || positives == n {
        return Summary { n, rate, ..Summary::default() };
    }
    let entropy: f64 =
        rows.iter().map(|row| cross_entropy(row.probability, row.label)).sum::<f64>() / n as f64;
    let base = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
    let mut pairs: Vec<(f32, bool)> = rows.iter().map(|row| (row.probability, row.label)).collect();
    Summary { n, rate, ne: Some(entropy / base), auc: auc(&mut pairs), gauc: gauc(rows) }
}

/// -ln of the probability given to what happened, with the probability kept off 0 and 1.
pub fn cross_entropy(probability: f32, label: bool) -> f64 {
    let p = f64::from(probability).clamp(1e-7, 1.0 - 1e-7);
    -if label { p.ln() } else { (1.0 - p).ln() }
}

/// Area under the ROC curve; ties count half. Sorts `pairs`.
fn auc(pairs: &mut [(f32, bool)]) -> Option<f64> {
    pairs.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let (mut negatives_below, mut positives, mut wins) = (0.0f64, 0.0f64, 0.0f64);
    for tied in pairs.chunk_by(|a, b| a.0 == b.0) {
        let up = tied.iter().filter(|(_, label)| *label).count() as f64;
        let down = tied.len() as f64 - up;
        wins += up * (negatives_below + down / 2.0);
        negatives_below += down;
        positives += up;
    }
    (positives > 0.0 && negatives_below > 0.0).then(|| wins / (positives * negatives_below))
}

fn gauc(rows: &[Scored]) -> Option<f64> {
    let mut sorted: Vec<Scored> = rows.to_vec();
    sorted.sort_unstable_by_key(|row| row.user);
    let (mut total, mut weight) = (0.0, 0.0);
    let mut pairs = Vec::new();
    for user in sorted.chunk_by(|a, b| a.user == b.user) {
        pairs.clear();
        pairs.extend(user.iter().map(|row| (row.probability, row.label)));
        if let Some(area) = auc(&mut pairs) {
            let positives = user.iter().filter(|row| row.label).count() as f64;
            total += area * positives;
            weight += positives;
        }
    }
    (weight > 0.0).then(|| total / weight)
}

/// Keeps the newest rows of each slice (for example a surface and task) and summarises them.
#[derive(Debug, Clone)]
pub struct Keeper<K> {
    slices: BTreeMap<K, VecDeque<Scored>>,
    most: usize,
}

impl<K: Ord + Clone> Keeper<K> {
    /// Keeps at most `most` rows a slice.
    pub fn new(most: usize) -> Self {
        Self { slices: BTreeMap::new(), most: most.max(1) }
    }

    /// Adds a row; beyond the limit the oldest of its slice goes.
    pub fn push(&mut self, slice: K, row: Scored) {
        let rows = self.slices.entry(slice).or_default();
        if rows.len() == self.most {
            rows.pop_front();
        }
        rows.push_back(row);
    }

    /// Every row kept, slice by slice, the oldest first.
    pub fn rows(&self) -> impl Iterator<Item = (&K, &Scored)> {
        self.slices.iter().flat_map(|(slice, rows)| rows.iter().map(move |row| (slice, row)))
    }

    /// The metrics of one slice, if it has rows.
    pub fn summary(&self, slice: &K) -> Option<Summary> {
        let rows: Vec<Scored> = self.slices.get(slice)?.iter().copied().collect();
        Some(summarise(&rows))
    }

    /// The metrics of every slice, in order.
    pub fn summaries(&self) -> impl Iterator<Item = (&K, Summary)> {
        self.slices.iter().map(|(slice, rows)| {
            let rows: Vec<Scored> = rows.iter().copied().collect();
            (slice, summarise(&rows))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[(u64, f32, bool)]) -> Vec<Scored> {
        values
            .iter()
            .map(|&(user, probability, label)| Scored { user, probability, label })
            .collect()
    }

    #[test]
    fn the_base_rate_has_an_ne_of_one() {
        let summary = summarise(&rows(&[
            (1, 0.25, true),
            (1, 0.25, false),
            (2, 0.25, false),
            (2, 0.25, false),
        ]));
        assert!((summary.ne.unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(summary.auc, Some(0.5));
        assert_eq!(summary.gauc, Some(0.5), "user 2 has one class and does not count");
    }

    #[test]
    fn auc_and_gauc_differ_where_users_do() {
        // Within each user the order is right; across users it is not.
        let summary =
            summarise(&rows(&[(1, 0.9, true), (1, 0.8, false), (2, 0.3, true), (2, 0.2, false)]));
        assert_eq!(summary.gauc, Some(1.0));
        assert_eq!(summary.auc, Some(0.75));
    }

    #[test]
    fn one_class_gives_no_metric() {
        let summary = summarise(&rows(&[(1, 0.9, true)]));
        assert_eq!((summary.n, summary.ne, summary.auc), (1, None, None));
        assert_eq!(summarise(&[]).n, 0);
    }

    #[test]
    fn the_keeper_is_bounded() {
        let mut keeper = Keeper::new(2);
        for i in 0..5 {
            keeper.push("a", Scored { user: i, probability: 0.5, label: i == 4 });
        }
        let all: Vec<_> = keeper.summaries().collect();
        assert_eq!(all[0].1.n, 2);
        assert_eq!(all[0].1.rate, 0.5);
    }
}
