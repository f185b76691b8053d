//! Training labels: what is not known cannot be a label.

use super::Checked;
use crate::cases::Case;
use crate::contract::TaskLabels;
use crate::error::{Failure, Place};
use crate::harness::Harness;

const CHECK: &str = "labels";
const FAULT: &str =
    "`labels` and `sample` must answer every batch: an error stops the expert's training";
const UNKNOWN: &str = "set the mask to 0 where what the label is made of is not known (`batch.known`, NaN in `batch.values`)";
const NEVER: &str = "with every outcome known, some examples must count: look at the mask and at the surfaces of the task";
const SHAPE: &str = "one entry a task of the description, with a label and a mask an example, and a weight an example or none";

impl Harness {
    /// Labels and masks follow from known outcomes alone: nothing that is unknown changes them, a row of which nothing is
    /// known is in no sample space, and a log of which everything is known has examples of every task.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check_labels(&self) -> Checked {
        let log = self.world.log(60, &self.surfaces());
        let labels = self.labelled(&log)?;
        self.unknown_changes_nothing(&log, &labels)?;
        self.nothing_known_masks_all(&log)?;
        self.all_known_counts(log)
    }

    fn unknown_changes_nothing(&self, log: &[Case], labels: &[TaskLabels]) -> Checked {
        let mut flipped = log.to_vec();
        each_outcome(&mut flipped, |outcome| outcome.actions ^= !outcome.known);
        for (one, two) in labels.iter().zip(&self.labelled(&flipped)?) {
            for row in 0..one.mask.len() {
                let counts = one.mask[row] != 0;
                let differ = one.mask[row] != two.mask[row]
                    || counts && one.labels[row].to_bits() != two.labels[row].to_bits();
                if differ {
                    let seen = format!(
                        "label {} (mask {}) became {} (mask {}) when an action that is not known changed",
                        one.labels[row], one.mask[row], two.labels[row], two.mask[row]
                    );
                    return Err(failure(self.row(log, row).task(&one.task), seen, UNKNOWN));
                }
            }
        }
        Ok(())
    }

    fn nothing_known_masks_all(&self, log: &[Case]) -> Checked {
        let mut unknown = log.to_vec();
        each_outcome(&mut unknown, |outcome| *outcome = hypercast_fm::example::Outcome::UNKNOWN);
        for task in self.labelled(&unknown)? {
            if let Some(row) = task.mask.iter().position(|mask| *mask != 0) {
                let seen = format!("label {} although nothing is known of it", task.labels[row]);
                return Err(failure(self.row(log, row).task(&task.task), seen, UNKNOWN));
            }
        }
        Ok(())
    }

    fn all_known_counts(&self, mut log: Vec<Case>) -> Checked {
        let (actions, values) =
            (self.runtime.info().actions.len(), self.runtime.info().values.len());
        each_outcome(&mut log, |outcome| {
            outcome.known = (1u64 << actions).wrapping_sub(1) as u32;
            outcome.values[..values].iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.5);
        });
        for task in self.labelled(&log)? {
            if task.mask.iter().all(|mask| *mask == 0) {
                let seen = format!("none of {} examples counts", task.mask.len());
                return Err(failure(Place::default().task(&task.task), seen, NEVER));
            }
        }
        Ok(())
    }

    /// The labels of a log, of the right shape and with sane keep probabilities.
    fn labelled(&self, log: &[Case]) -> Result<Vec<TaskLabels>, Failure> {
        let rows: usize = log.iter().map(Case::candidates).sum();
        let fault = |fault| failure(Place::default(), fault, FAULT);
        let labels = self.labels(log).map_err(fault)?;
        for task in &self.description().tasks {
            let place = Place::default().task(&task.name);
            let found = labels.iter().filter(|entry| entry.task == task.name).collect::<Vec<_>>();
            let [entry] = found.as_slice() else {
                return Err(failure(place, format!("{} entries", found.len()), SHAPE));
            };
            let sizes = [entry.labels.len(), entry.mask.len()];
            if sizes != [rows; 2] || ![0, rows].contains(&entry.weights.len()) {
                let (sizes, weights) = (sizes, entry.weights.len());
                let seen =
                    format!("{sizes:?} labels and masks, {weights} weights for {rows} examples");
                return Err(failure(place, seen, SHAPE));
            }
            let weight = |row: usize| entry.weights.get(row).copied().unwrap_or(1.0);
            let valid = |row: &usize| {
                entry.labels[*row].is_finite() && weight(*row).is_finite() && weight(*row) >= 0.0
            };
            let bad = (0..rows).find(|row| entry.mask[*row] != 0 && !valid(row));
            if let Some(row) = bad {
                let seen = format!("label {} with weight {}", entry.labels[row], weight(row));
                return Err(failure(self.row(log, row).task(&task.name), seen, UNKNOWN));
            }
        }
        let keep = self.sample(log).map_err(fault)?;
        let bad = keep.iter().position(|keep| !(0.0..=1.0).contains(keep));
        match bad {
            Some(row) => {
                let seen = format!("keep probability {}", keep[row]);
                Err(failure(self.row(log, row), seen, "a probability is in 0..=1"))
            }
            None if ![0, rows].contains(&keep.len()) => {
                let seen = format!("{} keep probabilities for {rows} examples", keep.len());
                Err(failure(Place::default(), seen, SHAPE))
            }
            None => Ok(labels),
        }
    }

    /// Where a row of a log's batch comes from.
    fn row(&self, log: &[Case], mut row: usize) -> Place {
        for case in log {
            if row < case.candidates() {
                return self.place(case).row(row);
            }
            row -= case.candidates();
        }
        Place::default().row(row)
    }
}

fn each_outcome(log: &mut [Case], change: impl Fn(&mut hypercast_fm::example::Outcome)) {
    for case in log {
        case.example.targets.iter_mut().for_each(|target| change(&mut target.outcome));
    }
}

fn failure(place: Place, seen: String, advice: &'static str) -> Failure {
    Failure { check: CHECK, place, seen, advice }
}
