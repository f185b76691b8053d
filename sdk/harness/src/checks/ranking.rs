//! Rankings: distinct candidates with finite scores, for no candidate, one, and
//! as many as can be; and the same answer however often it is asked for.

use super::Checked;
use crate::cases::Case;
use crate::contract::{Prediction, Ranked};
use crate::error::{Failure, Place};
use crate::harness::Harness;

const CHECK: &str = "ranking";
const FAULT: &str = "`rank` must answer every request, an error is a degraded answer; run it with `Harness::native` in a debugger";
const ORDER: &str = "give each candidate's index at most once, below the number of candidates (`Request::top` does)";
const SCORE: &str =
    "a score must be a finite number: look for 0/0 or a logarithm of 0 in the value model";
const ALL: &str =
    "rank every candidate up to the limit, or say `may_drop_candidates` if it filters on purpose";

const DETERMINISM: &str = "determinism";
const SAME: &str = "an answer may depend on its arguments alone: keep no state, and order no result by a hash map's iteration";

impl Harness {
    /// A ranking holds distinct candidates of the request with finite scores, at most as many as were asked for, and all of
    /// them unless the expert may drop some: for 0, 1, several, and the most candidates that a daemon takes.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check_ranking(&self) -> Checked {
        let empty = self.world.request(77).candidates(0).serving().build();
        for case in self.cases().iter().chain(&self.largest()).chain([&empty]) {
            let all = case.candidates();
            let predictions = self.predict(case).map(|predictions| predictions.tasks);
            let predictions =
                predictions.map_err(|fault| failure(CHECK, self.place(case), fault, FAULT))?;
            for limit in [all, all / 2, 1.min(all)] {
                self.ranked(case, &predictions, limit)?;
            }
        }
        Ok(())
    }

    /// The same request has the same predictions and the same ranking: a second time in one instance, in a fresh instance,
    /// and from a component that was loaded anew.
    ///
    /// # Errors
    /// The first request that has not.
    pub fn check_determinism(&self) -> Checked {
        let anew = self.runtime.anew().map_err(|error| {
            failure(DETERMINISM, Place::default(), format!("loaded anew: {error}"), SAME)
        })?;
        for case in self.cases().iter().chain(&self.largest()) {
            let place = || self.place(case);
            let fault = |fault| failure(DETERMINISM, place(), fault, FAULT);
            let first = self.predict(case).map_err(fault)?.tasks;
            for (name, again) in [
                ("again", self.predict(case).map_err(fault)?.tasks),
                ("loaded anew", anew.predict(case).map_err(fault)?.tasks),
            ] {
                self.same_predictions(case, (&first, &again), name)?;
            }
            let call = self.call(case, first, case.candidates());
            let [one, two] = self.runtime.rank_twice(&call).map_err(fault)?;
            let fresh = self.runtime.rank(&call).map_err(fault)?;
            let loaded = anew.rank(&call).map_err(fault)?;
            let others = [
                ("twice in one instance", two),
                ("in a fresh instance", fresh),
                ("loaded anew", loaded),
            ];
            for (name, other) in others {
                if let Some(at) = differs(&one, &other) {
                    let seen = format!(
                        "{name}, place {at} of the ranking has {}, and had {}",
                        entry(&other, at),
                        entry(&one, at)
                    );
                    return Err(failure(DETERMINISM, place(), seen, SAME));
                }
            }
        }
        Ok(())
    }

    fn same_predictions(
        &self,
        case: &Case,
        (first, again): (&[Prediction], &[Prediction]),
        name: &str,
    ) -> Checked {
        for (one, two) in first.iter().zip(again) {
            let mut pairs = one.values.iter().zip(&two.values);
            if let Some(row) = pairs.position(|(a, b)| a.to_bits() != b.to_bits()) {
                let place = self.place(case).row(row).task(&one.task);
                let seen =
                    format!("{name}, it predicts {}, and did {}", two.values[row], one.values[row]);
                return Err(failure(DETERMINISM, place, seen, SAME));
            }
        }
        Ok(())
    }

    fn ranked(&self, case: &Case, predictions: &[Prediction], limit: usize) -> Checked {
        let place = || {
            let mut place = self.place(case);
            place.request = place.request.map(|request| format!("{request} with limit {limit}"));
            place
        };
        let call = self.call(case, predictions.to_vec(), limit);
        let ranked =
            self.runtime.rank(&call).map_err(|fault| failure(CHECK, place(), fault, FAULT))?;
        let mut seen = vec![false; case.candidates()];
        for entry in &ranked {
            let row = entry.candidate as usize;
            if seen.get(row).copied().unwrap_or(true) {
                let why = if row < seen.len() { "ranked twice" } else { "no candidate of it" };
                return Err(failure(CHECK, place().row(row), why.into(), ORDER));
            }
            seen[row] = true;
            if !entry.score.is_finite() {
                return Err(failure(
                    CHECK,
                    place().row(row),
                    format!("score {}", entry.score),
                    SCORE,
                ));
            }
        }
        let short = ranked.len() < limit && (ranked.is_empty() || !self.drops);
        if ranked.len() > limit || short {
            let seen = format!("{} candidates ranked", ranked.len());
            return Err(failure(CHECK, place(), seen, ALL));
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

fn failure(check: &'static str, place: Place, seen: String, advice: &'static str) -> Failure {
    Failure { check, place, seen, advice }
}
