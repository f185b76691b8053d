//! The checks that every expert must pass. Each stops at its first failure and reports where it
//! happened, what was seen and what to do.

mod calibration;
mod hooks;
mod predictions;
mod ranking;

use crate::cases::Case;
use crate::error::{Failure, Failures};
use crate::harness::Harness;

/// The outcome of a check.
type CheckResult = Result<(), Failure>;

impl Harness {
    /// Runs all checks except `golden`.
    ///
    /// # Errors
    /// The first failure of each check that fails.
    pub fn check_all(&self) -> Result<(), Failures> {
        let checks = [
            Harness::check_predictions,
            Harness::check_ranking,
            Harness::check_determinism,
            Harness::check_unknown_features,
            Harness::check_labels,
            Harness::check_gates,
            Harness::check_calibration,
        ];
        let failures: Vec<Failure> = checks.iter().filter_map(|check| check(self).err()).collect();
        if failures.is_empty() { Ok(()) } else { Err(Failures(failures)) }
    }

    /// Requests of various sizes, on every surface that the expert serves.
    fn cases(&self) -> Vec<Case> {
        self.requests(0, 100, &[[1, 0], [1, 40], [2, 3], [20, 0], [20, 200], [100, 40]])
    }

    /// A request with as many candidates as a daemon accepts.
    fn largest(&self) -> Option<Case> {
        self.requests(9_999, 0, &[[self.world.max_candidates, 256]]).into_iter().next()
    }
}
