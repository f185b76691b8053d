//! Replays recorded requests: runs an expert on them and compares its rankings with another
//! expert's or with the recorded answers.
//!
//! Both experts get the same requests, features and embeddings as when they were served. Nothing is
//! learned.

use std::{collections::HashMap, time::Instant};

use hypercast_expert::{ExpertFault, FmRows, ServedExpert, Tae};

use crate::request_log::{
    RecordedRequest,
    report::{FaultSummary, ReplayReport, ReplayTimes},
};

/// An expert with its parameters.
#[derive(Clone, Copy)]
pub struct ReplayExpert<'a> {
    /// The expert.
    pub expert: &'a ServedExpert,
    /// Whether it runs without the TAE.
    pub without_tae: bool,
    /// Its name in the report.
    pub label: &'a str,
}

/// How a replay runs.
pub struct ReplaySettings<'a> {
    /// Length of the top lists that are compared.
    pub k: usize,
    /// Whether the first fault of the expert ends the replay.
    pub stop_at_fault: bool,
    /// Called before each request; true ends the replay.
    pub stop: &'a dyn Fn() -> bool,
}

/// Runs `own` on the requests, and compares it with `other`, or with the recorded answers if there
/// is none.
pub fn replay(
    requests: &[RecordedRequest],
    own: ReplayExpert<'_>,
    other: Option<ReplayExpert<'_>>,
    settings: &ReplaySettings<'_>,
) -> ReplayReport {
    let rank_other =
        other.map(|other| move |request: &_, times: &mut _| other.rank(request, times));
    let mut report = compare(
        requests,
        &|request, times| own.rank(request, times),
        rank_other.as_ref().map(|rank| rank as &Rank<'_>),
        settings,
    );
    report.of = own.label.to_owned();
    report.against = other.map_or("the recorded answers", |other| other.label).to_owned();
    report
}

/// Ranks a recorded request and adds the time it took, in microseconds.
type Rank<'a> = dyn Fn(&RecordedRequest, &mut Vec<f64>) -> Result<Vec<u64>, ExpertFault> + 'a;

fn compare(
    requests: &[RecordedRequest],
    own: &Rank<'_>,
    other: Option<&Rank<'_>>,
    settings: &ReplaySettings<'_>,
) -> ReplayReport {
    let mut sums = RankingSums::default();
    let mut report = ReplayReport { k: settings.k, ..ReplayReport::default() };
    let (mut times, mut times_against) = (Vec::new(), Vec::new());
    for request in requests {
        if (settings.stop)() {
            break;
        }
        report.requests += 1;
        let ranked = own(request, &mut times);
        let against = match other {
            Some(rank) => rank(request, &mut times_against),
            None => Ok(request.ranking.iter().map(|(item, _)| *item).collect()),
        };
        count(&mut report.faults, ranked.as_ref().err());
        count(&mut report.faults_against, against.as_ref().err());
        if ranked.is_err() && settings.stop_at_fault {
            break;
        }
        if other.is_none() && request.degraded {
            *report
                .left_out
                .entry("answered by the FM instead of the expert: not compared".into())
                .or_default() += 1;
            continue;
        }
        if let (Ok(ranked), Ok(against)) = (ranked, against) {
            sums.add(&ranked, &against, settings.k);
        }
    }
    report.compared = sums.compared;
    report.differing = sums.differing;
    let mean = |sum: f64, over: usize| (over > 0).then(|| sum / over as f64);
    report.top_1 = mean(sums.top_1, sums.compared);
    report.top_k = mean(sums.top_k, sums.compared);
    report.rank_correlation = mean(sums.correlation, sums.correlated);
    report.times = ReplayTimes::of(times);
    report.times_against = ReplayTimes::of(times_against);
    report
}

impl ReplayExpert<'_> {
    /// The items in the expert's order, as many as were answered.
    fn rank(
        &self,
        request: &RecordedRequest,
        times_us: &mut Vec<f64>,
    ) -> Result<Vec<u64>, ExpertFault> {
        let example = &request.example;
        let without = self.without_tae || request.tae.is_empty();
        let (tae, predictions) = (Tae::Rows(&request.tae), &request.predictions[..]);
        let fm = if without { FmRows::WITHOUT } else { FmRows { tae, predictions } };
        let limit = request.ranking.len().clamp(1, example.targets.len().max(1));
        let start = Instant::now();
        let ranked = self
            .expert
            .predict(&[example], fm)
            .and_then(|predictions| self.expert.rank(example, fm, &predictions, limit));
        times_us.push(start.elapsed().as_secs_f64() * 1e6);
        let item = |row: u32| example.targets[row as usize].item.id;
        let ranked = ranked?.iter().map(|place| item(place.candidate)).collect();
        // A daemon prepares between requests, too.
        self.expert.blueprint().plugin.prepare();
        Ok(ranked)
    }
}

#[derive(Default)]
struct RankingSums {
    compared: usize,
    differing: usize,
    top_1: f64,
    top_k: f64,
    correlation: f64,
    correlated: usize,
}

impl RankingSums {
    fn add(&mut self, own: &[u64], other: &[u64], k: usize) {
        self.compared += 1;
        self.differing += usize::from(own != other);
        self.top_1 += f64::from(u8::from(own.first() == other.first()));
        let top = |list: &[u64]| list[..k.min(list.len())].to_vec();
        let (own_top, other_top) = (top(own), top(other));
        let common = own_top.iter().filter(|item| other_top.contains(item)).count();
        self.top_k += common as f64 / own_top.len().max(other_top.len()).max(1) as f64;
        if let Some(rho) = spearman(own, other) {
            self.correlation += rho;
            self.correlated += 1;
        }
    }
}

/// Spearman's rank correlation over the items that both have; none for fewer than two.
fn spearman(own: &[u64], other: &[u64]) -> Option<f64> {
    let places: HashMap<u64, usize> =
        other.iter().enumerate().map(|(at, item)| (*item, at)).collect();
    let theirs: Vec<usize> = own.iter().filter_map(|item| places.get(item).copied()).collect();
    let n = theirs.len() as f64;
    if theirs.len() < 2 {
        return None;
    }
    let mut sorted: Vec<(usize, usize)> = theirs.iter().copied().zip(0..).collect();
    sorted.sort_unstable();
    let squares: f64 = sorted
        .iter()
        .enumerate()
        .map(|(rank, (_, own_rank))| (rank as f64 - *own_rank as f64).powi(2))
        .sum();
    Some(1.0 - 6.0 * squares / (n * (n * n - 1.0)))
}

fn count(
    faults: &mut std::collections::BTreeMap<String, FaultSummary>,
    fault: Option<&ExpertFault>,
) {
    if let Some(fault) = fault {
        let of_cause = faults.entry(fault.cause.label().to_owned()).or_default();
        if of_cause.count == 0 {
            of_cause.first = fault.to_string();
        }
        of_cause.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use hypercast_expert::{Fault, wasm::Call};

    use super::*;

    #[test]
    fn the_first_fault_ends_a_replay_that_is_to_stop_there() {
        let requests: Vec<_> = (0..5).map(super::super::reader::tests::recorded).collect();
        let faulty = |request: &RecordedRequest, _: &mut Vec<f64>| match request.example.request {
            1 => Err(ExpertFault {
                plugin: "p".into(),
                call: Call::Rank,
                cause: Fault::BadOutput("nothing".into()),
                trace: Vec::new(),
            }),
            _ => Ok(vec![7]),
        };
        for (stop_at_fault, run) in [(true, 2), (false, 5)] {
            let settings = ReplaySettings { k: 1, stop_at_fault, stop: &|| false };
            let report = compare(&requests, &faulty, None, &settings);
            let faults: usize = report.faults.values().map(|faults| faults.count).sum();
            assert_eq!((report.requests, faults), (run, 1));
        }
        let stopped = ReplaySettings { k: 1, stop_at_fault: true, stop: &|| true };
        assert_eq!(compare(&requests, &faulty, None, &stopped).requests, 0);
    }

    #[test]
    fn rankings_are_compared_by_place() {
        assert_eq!(spearman(&[1, 2, 3, 4], &[1, 2, 3, 4]), Some(1.0));
        assert_eq!(spearman(&[1, 2, 3, 4], &[4, 3, 2, 1]), Some(-1.0));
        // 9 and 8 are in one list only.
        assert_eq!(spearman(&[1, 9, 2, 3], &[1, 2, 8, 3]), Some(1.0));
        assert_eq!(spearman(&[1], &[1]), None);
        let mut sums = RankingSums::default();
        sums.add(&[1, 2, 3], &[1, 3, 2], 2);
        sums.add(&[1, 2, 3], &[1, 2, 3], 2);
        assert_eq!((sums.compared, sums.differing), (2, 1));
        assert_eq!((sums.top_1, sums.top_k), (2.0, 1.5));
        assert!((sums.correlation - 1.5).abs() < 1e-12, "{}", sums.correlation);
    }
}
