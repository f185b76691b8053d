//! What every expert must keep, whatever it is for. Each check stops at its first
//! failure and says where, what was seen, and what to do.

mod calibration;
mod gates;
mod labels;
mod predictions;
mod ranking;
mod unknown;

use crate::cases::Case;
use crate::error::{Failure, Failures};
use crate::harness::Harness;

/// A check's outcome.
type Checked = Result<(), Failure>;

impl Harness {
    /// All checks of this crate but `golden`.
    ///
    /// # Errors
    /// Every broken promise, with where and what to do.
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

    /// Requests of all sizes that a daemon lets in, on every surface that the expert serves.
    fn cases(&self) -> Vec<Case> {
        let names = &self.runtime.info().surfaces;
        let sizes = [(1, 0), (1, 40), (2, 3), (20, 0), (20, 200), (100, 40)];
        let of_surface = |surface: u16| {
            sizes.iter().zip(u64::from(surface) * 100..).map(
                move |(&(candidates, history), number)| {
                    let request = self.world.request(number).surface(&names[usize::from(surface)]);
                    request.candidates(candidates).history(history).serving().build()
                },
            )
        };
        self.surfaces().into_iter().flat_map(of_surface).collect()
    }

    /// The largest request that a daemon lets in.
    fn largest(&self) -> Option<Case> {
        let surface = *self.surfaces().first()?;
        let request = self.world.request(9_999);
        let request = request.surface(&self.runtime.info().surfaces[usize::from(surface)]);
        let candidates = self.world.max_candidates;
        Some(request.candidates(candidates).history(256).serving().build())
    }
}
