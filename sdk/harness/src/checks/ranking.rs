//! Checks of rankings: distinct candidates with finite scores, for no candidate, one, and as many
//! as a request may have; and the same answer to the same request.

use super::CheckResult;
use crate::cases::Case;
use crate::contract::{Prediction, Ranked};
use crate::error::{Failure, FailureLocation};
use crate::harness::Harness;

const CHECK: &str = "ranking";
const FAULT: &str = "`rank` must answer every request, because an error degrades the answer; debug it with `Harness::native`";
const ORDER: &str = "return each candidate's index at most once, below the number of candidates, as `Request::top` does";
const SCORE: &str =
    "a score must be a finite number: look for 0/0 or a logarithm of 0 in the value model";
const ALL: &str =
    "rank every candidate up to the limit, or call `may_drop_candidates` if it filters on purpose";

const DETERMINISM: &str = "determinism";
const SAME: &str = "an answer may depend only on the arguments: keep no state, and do not rely on the iteration order of a hash map";

impl Harness {
    /// Checks that a ranking contains distinct candidates of the request with finite scores, and as
    /// many as requested (fewer, if the expert may drop candidates). Requests have 0, 1, several
    /// and the most candidates that a daemon accepts.
    ///
    /// # Errors
    /// The first ranking that is wrong.
    pub fn check_ranking(&self) -> CheckResult {
        let empty = self.world.request(77).candidates(0).serving().build();
        for case in self.cases().iter().chain(&self.largest()).chain([&empty]) {
            let all = case.candidates();
            let fault = |fault| Failure::new(CHECK, self.place(case), fault, FAULT);
            let predictions = self.predict(case).map_err(fault)?.for_rank().into_owned();
            for limit in [all, all / 2, 1.min(all)] {
                self.ranked(case, &predictions, limit)?;
            }
        }
        Ok(())
    }

    /// Checks that the same request gets the same predictions and ranking: again in the same
    /// instance, in a fresh one, and after reloading the expert.
    ///
    /// # Errors
    /// The first request that gets another answer.
    pub fn check_determinism(&self) -> CheckResult {
        let reloaded = self.reloaded().map_err(|error| {
            let seen = format!("reloading fails: {error}");
            Failure::new(DETERMINISM, FailureLocation::default(), seen, SAME)
        })?;
        for case in self.cases().iter().chain(&self.largest()) {
            let place = || self.place(case);
            let fault = |fault| Failure::new(DETERMINISM, place(), fault, FAULT);
            let predicted = |by: &Harness| {
                by.predict(case).map(|all| all.for_rank().into_owned()).map_err(fault)
            };
            let first = predicted(self)?;
            for (name, again) in
                [("a second time", predicted(self)?), ("after reloading", predicted(&reloaded)?)]
            {
                self.same_predictions(case, name, &first, &again)?;
            }
            let call = self.call(case, first, case.candidates());
            let [one, two] = self.code.rank_twice(&call).map_err(fault)?;
            for (name, other) in [
                ("twice in one instance", two),
                ("in a fresh instance", self.code.rank(&call).map_err(fault)?),
                ("after reloading", reloaded.code.rank(&call).map_err(fault)?),
            ] {
                if let Some(at) = differs(&one, &other) {
                    let seen = format!(
                        "{name}, place {at} of the ranking has {}, and had {}",
                        entry(&other, at),
                        entry(&one, at)
                    );
                    return Err(Failure::new(DETERMINISM, place(), seen, SAME));
                }
            }
        }
        Ok(())
    }

    fn same_predictions(
        &self,
        case: &Case,
        name: &str,
        first: &[Prediction],
        again: &[Prediction],
    ) -> CheckResult {
        for (one, two) in first.iter().zip(again) {
            let mut pairs = one.values.iter().zip(&two.values);
            if let Some(row) = pairs.position(|(a, b)| a.to_bits() != b.to_bits()) {
                let place = self.place(case).row(row).task(&one.task);
                let seen = format!(
                    "{name}, the prediction is {}, and was {}",
                    two.values[row], one.values[row]
                );
                return Err(Failure::new(DETERMINISM, place, seen, SAME));
            }
        }
        Ok(())
    }

    fn ranked(&self, case: &Case, predictions: &[Prediction], limit: usize) -> CheckResult {
        let place = || {
            let mut place = self.place(case);
            place.request = place.request.map(|request| format!("{request} with limit {limit}"));
            place
        };
        let call = self.call(case, predictions.to_vec(), limit);
        let fail = |place, seen: String, advice| Err(Failure::new(CHECK, place, seen, advice));
        let ranked = match self.code.rank(&call) {
            Ok(ranked) => ranked,
            Err(fault) => return fail(place(), fault, FAULT),
        };
        let mut seen = vec![false; case.candidates()];
        for entry in &ranked {
            let row = entry.candidate as usize;
            if seen.get(row).copied().unwrap_or(true) {
                let why = if row < seen.len() { "ranked twice" } else { "not a candidate" };
                return fail(place().row(row), why.into(), ORDER);
            }
            seen[row] = true;
            if !entry.score.is_finite() {
                return fail(place().row(row), format!("score {}", entry.score), SCORE);
            }
        }
        let short = ranked.len() < limit && (ranked.is_empty() || !self.drops);
        if ranked.len() > limit || short {
            return fail(place(), format!("{} candidates ranked", ranked.len()), ALL);
        }
        Ok(())
    }
}

fn differs(one: &[Ranked], other: &[Ranked]) -> Option<usize> {
    let same = |(a, b): (&Ranked, &Ranked)| {
        a.candidate == b.candidate && a.score.to_bits() == b.score.to_bits()
    };
    let at = one.iter().zip(other).position(|pair| !same(pair));
    at.or((one.len() != other.len()).then_some(one.len().min(other.len())))
}

fn entry(ranked: &[Ranked], at: usize) -> String {
    ranked.get(at).map_or("nothing".into(), |entry| {
        format!("candidate {} with score {}", entry.candidate, entry.score)
    })
}
