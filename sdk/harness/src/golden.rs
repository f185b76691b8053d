//! Golden replay: compares an expert's answers to fixed requests with those in a committed file.
//!
//! It catches mistakes that no general check can find, such as a changed weight in the value model
//! or a layer that reads another column. Parameters are generated from a seed, so the file does not
//! depend on a training.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cases::Case;
use crate::error::{Failure, FailureLocation};
use crate::harness::Harness;

/// If this environment variable is `write`, golden files are rewritten.
const VARIABLE: &str = "HYPERCAST_GOLDEN";

const CHECK: &str = "golden replay";
const ADVICE: &str = "if the change is intended, rewrite the file with HYPERCAST_GOLDEN=write and commit it; else find what changed the expert";

/// The relative difference that is allowed, since machines differ in the last digits of sums.
const TOLERANCE: f32 = 1e-3;

/// The most differences that a failure lists. It only counts the others.
const MAX_LISTED: usize = 12;

/// The answer to one request.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct GoldenAnswer {
    request: String,
    /// Item ids, best first, with their scores.
    ranking: Vec<(u64, f32)>,
    /// By task: one value per candidate, in the order of the request.
    predictions: BTreeMap<String, Vec<f32>>,
}

impl Harness {
    /// Compares rankings and predictions for a fixed set of requests with those in `file`. If the
    /// environment variable `HYPERCAST_GOLDEN` is `write`, writes the file instead.
    ///
    /// # Errors
    /// The answers differ, the expert faults, or the file cannot be read or written.
    pub fn golden(&self, file: impl AsRef<Path>) -> Result<(), Failure> {
        let write = std::env::var(VARIABLE).is_ok_and(|value| value == "write");
        self.replay(file.as_ref(), write)
    }

    fn replay(&self, file: &Path, write: bool) -> Result<(), Failure> {
        let fail =
            |seen: String, advice| Failure::new(CHECK, FailureLocation::default(), seen, advice);
        let now = self.answers().map_err(|fault| fail(fault, "run `check_all` for details"))?;
        let shown = file.display();
        if write {
            let text = serde_json::to_string_pretty(&now).expect("answers are plain data");
            return std::fs::write(file, text + "\n").map_err(|error| {
                fail(format!("cannot write {shown}: {error}"), "create its folder")
            });
        }
        let text = std::fs::read_to_string(file)
            .map_err(|error| fail(format!("cannot read {shown}: {error}"), ADVICE))?;
        let before: Vec<GoldenAnswer> = serde_json::from_str(&text)
            .map_err(|error| fail(format!("{shown} is not a golden file: {error}"), ADVICE))?;
        let differences = differences(&before, &now);
        if differences.is_empty() {
            return Ok(());
        }
        let rest = differences.len().saturating_sub(MAX_LISTED);
        let mut seen = format!("{} differences from {shown}", differences.len());
        seen.extend(differences.iter().take(MAX_LISTED).map(|what| format!("\n  {what}")));
        if rest > 0 {
            seen.push_str(&format!("\n  and {rest} more"));
        }
        Err(fail(seen, ADVICE))
    }

    fn answers(&self) -> Result<Vec<GoldenAnswer>, String> {
        let cases = self.requests(500, 10, &[[5, 0], [8, 20]]);
        cases.iter().map(|case| self.answer(case)).collect()
    }

    fn answer(&self, case: &Case) -> Result<GoldenAnswer, String> {
        let place = self.place(case).to_string();
        let in_place = |fault: String| format!("{place}: {fault}");
        let predictions = self.predict(case).map_err(in_place)?;
        let ranking = self.rank(case, case.candidates()).map_err(in_place)?;
        Ok(GoldenAnswer {
            ranking: ranking.items.into_iter().zip(ranking.scores).collect(),
            predictions: predictions.tasks.into_iter().map(|p| (p.task, p.values)).collect(),
            request: place,
        })
    }
}

fn differences(before: &[GoldenAnswer], now: &[GoldenAnswer]) -> Vec<String> {
    let mut found = Vec::new();
    if before.len() != now.len() {
        found.push(format!("{} requests, and the file has {}", now.len(), before.len()));
    }
    for (before, now) in before.iter().zip(now) {
        let request = &now.request;
        if before.request != *request {
            found.push(format!("{request}: the file has {}", before.request));
            continue;
        }
        let mut pairs = before.ranking.iter().zip(&now.ranking);
        // Candidates with equal scores may change places.
        let other =
            pairs.position(|(a, b)| !near(a.1, b.1) || (a.0 != b.0 && !tied(before, b.0, a.1)));
        let other = other.or((before.ranking.len() != now.ranking.len())
            .then(|| before.ranking.len().min(now.ranking.len())));
        if let Some(at) = other {
            let show = |answer: &GoldenAnswer| match answer.ranking.get(at) {
                Some((item, score)) => format!("item {item} ({score})"),
                None => "nothing".into(),
            };
            found.push(format!("{request}: place {at} has {}, had {}", show(now), show(before)));
        }
        for task in before.predictions.keys().filter(|t| !now.predictions.contains_key(*t)) {
            found.push(format!("{request}: task `{task}` is missing"));
        }
        for (task, values) in &now.predictions {
            let Some(old) = before.predictions.get(task) else {
                found.push(format!("{request}: task `{task}` is new"));
                continue;
            };
            for (row, (old, new)) in old.iter().zip(values).enumerate() {
                if !near(*old, *new) {
                    let change = new - old;
                    found.push(format!(
                        "{request}, row {row}, task `{task}`: {new}, was {old} ({change:+})"
                    ));
                }
            }
        }
    }
    found
}

fn near(a: f32, b: f32) -> bool {
    (a - b).abs() <= TOLERANCE * (1.0 + a.abs().max(b.abs()))
}

/// Whether the item now at a place had, before, about the same score as the item that was there.
fn tied(before: &GoldenAnswer, item_now: u64, score_before: f32) -> bool {
    before.ranking.iter().any(|(item, score)| *item == item_now && near(*score, score_before))
}

#[cfg(test)]
mod tests {
    use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear, Ranked, Request};

    use super::*;

    struct OldRule;
    struct NewRule;

    impl Expert for OldRule {
        fn describe(info: &HostInfo) -> Description {
            Description::new("golden", "1.0.0").all_tasks(info)
        }
        fn network(g: &Graph) {
            for task in g.tasks() {
                g.output(&task.name, Linear::new(&task.name, 1).apply(g.tae()));
            }
        }
    }

    impl Expert for NewRule {
        fn describe(info: &HostInfo) -> Description {
            OldRule::describe(info)
        }
        fn network(g: &Graph) {
            OldRule::network(g);
        }
        fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
            Ok(request.top(&request.weighted_sum(|task| if task == "like" { 9.0 } else { 1.0 })))
        }
    }

    #[test]
    fn a_changed_answer_is_reported_with_its_request() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("golden.json");
        let (before, after) = (Harness::native::<OldRule>(), Harness::native::<NewRule>());
        let missing = before.replay(&file, false).unwrap_err();
        assert!(missing.to_string().contains("HYPERCAST_GOLDEN=write"), "{missing}");
        before.replay(&file, true).unwrap();
        before.replay(&file, false).unwrap();
        let changed = after.replay(&file, false).unwrap_err().to_string();
        assert!(
            changed.contains("surface feed") && changed.contains("place 0 has item"),
            "{changed}"
        );
        assert!(!changed.contains("task `"), "the predictions did not change: {changed}");
        after.replay(&file, true).unwrap();
        after.replay(&file, false).unwrap();
    }

    #[test]
    fn the_last_digits_may_differ_and_tied_candidates_may_change_places() {
        let answer = |ranking: &[(u64, f32)], click: f32| GoldenAnswer {
            request: "request 1".into(),
            ranking: ranking.to_vec(),
            predictions: BTreeMap::from([("click".into(), vec![click])]),
        };
        let before = [answer(&[(1, 0.5), (2, 0.5), (3, 0.1)], 0.25)];
        let same = [answer(&[(2, 0.50001), (1, 0.5), (3, 0.1)], 0.25001)];
        assert_eq!(differences(&before, &same), Vec::<String>::new());
        let other = differences(&before, &[answer(&[(3, 0.5), (1, 0.5), (2, 0.1)], 0.5)]);
        assert_eq!(other.len(), 2, "{other:?}");
        assert!(
            other[0].contains("place 0") && other[1].contains("row 0, task `click`"),
            "{other:?}"
        );
        let shorter = differences(&before, &[answer(&[(1, 0.5), (2, 0.5)], 0.25)]);
        assert!(shorter[0].contains("place 2 has nothing"), "{shorter:?}");
    }
}
