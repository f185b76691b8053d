//! Selects what a delta sends: the components that moved most per byte, within a budget, so that
//! none waits forever.
//!
//! A component is a block of a dense tensor or a row. Its movement is the root mean square of its
//! change divided by that of its tensor's values, so that tensors of different scales and
//! components of different sizes compare. A component that is left out is sent at the latest after
//! `starve_after` publications: the oldest go first, earliest deadline first, as many as are needed
//! for all to be in time. This holds if the budgets of that many publications add up to all
//! weights. [`super::published_state`] measures the movement.

/// A component that may be sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DeltaCandidate<T> {
    pub(super) component: T,
    /// Its encoded size before compression.
    pub(super) bytes: u64,
    /// How far it moved; see the module's documentation.
    pub(super) movement: f64,
    /// Publications without it since it moved.
    pub(super) waited: u32,
}

/// The limits of a delta.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeltaLimits {
    /// The budget in bytes. The first component is sent even if it is larger.
    pub(super) budget: u64,
    /// The most publications without a component that moved.
    pub(super) starve_after: u32,
}

/// The components that are sent, and those that wait.
pub(super) struct DeltaSelection<T> {
    pub(super) sent: Vec<DeltaCandidate<T>>,
    pub(super) left: Vec<DeltaCandidate<T>>,
}

/// Selects from `candidates` within `limits`.
pub(super) fn select<T>(
    mut candidates: Vec<DeltaCandidate<T>>,
    limits: DeltaLimits,
) -> DeltaSelection<T> {
    let remaining =
        |candidate: &DeltaCandidate<T>| limits.starve_after.saturating_sub(candidate.waited);
    candidates
        .sort_by(|a, b| remaining(a).cmp(&remaining(b)).then(b.movement.total_cmp(&a.movement)));
    let mut due = 0u64;
    let mut demand = 0u64;
    for candidate in &candidates {
        demand += candidate.bytes;
        let later = u64::from(remaining(candidate)).saturating_mul(limits.budget);
        due = due.max(demand.saturating_sub(later));
    }
    let mut selection = DeltaSelection { sent: Vec::new(), left: Vec::new() };
    let mut spent = 0;
    let mut send = |candidate: DeltaCandidate<T>, limit: u64, left: &mut Vec<DeltaCandidate<T>>| {
        let fits = spent + candidate.bytes <= limits.budget || selection.sent.is_empty();
        if spent < limit && fits {
            spent += candidate.bytes;
            selection.sent.push(candidate);
        } else {
            left.push(candidate);
        }
    };
    let mut rest = Vec::new();
    candidates.into_iter().for_each(|candidate| send(candidate, due, &mut rest));
    rest.sort_by(|a, b| b.movement.total_cmp(&a.movement));
    let mut left = Vec::new();
    rest.into_iter().for_each(|candidate| send(candidate, u64::MAX, &mut left));
    DeltaSelection { left, ..selection }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(component: usize, movement: f64, waited: u32) -> DeltaCandidate<usize> {
        DeltaCandidate { component, bytes: 10, movement, waited }
    }

    fn sent(candidates: Vec<DeltaCandidate<usize>>, limits: DeltaLimits) -> Vec<usize> {
        select(candidates, limits).sent.iter().map(|candidate| candidate.component).collect()
    }

    #[test]
    fn what_moved_most_goes_within_the_budget() {
        let limits = DeltaLimits { budget: 25, starve_after: 5 };
        let all = vec![candidate(0, 0.1, 0), candidate(1, 0.9, 0), candidate(2, 0.5, 0)];
        assert_eq!(sent(all, limits), [1, 2]);
        let large = DeltaCandidate { bytes: 100, ..candidate(7, 0.2, 0) };
        assert_eq!(sent(vec![large], limits), [7], "one goes even if it is larger");
    }

    #[test]
    fn what_waited_long_enough_goes_first() {
        let limits = DeltaLimits { budget: 20, starve_after: 3 };
        let all = vec![candidate(0, 0.9, 0), candidate(1, 0.8, 0), candidate(2, 0.001, 3)];
        assert_eq!(sent(all, limits), [2, 0]);
    }

    #[test]
    fn nothing_waits_longer_than_it_may_even_if_everything_always_moves() {
        let limits = DeltaLimits { budget: 30, starve_after: 4 };
        // Eight components, three a publication: all could be sent within three publications.
        let mut waited = [0; 8];
        for round in 0..60 {
            let movement = |what: usize| ((what * 7 + round) % 5 + what * 10) as f64;
            let all = (0..8).map(|what| candidate(what, movement(what), waited[what])).collect();
            let sent = sent(all, limits);
            assert_eq!(sent.len(), 3);
            for (what, waited) in waited.iter_mut().enumerate() {
                *waited = if sent.contains(&what) { 0 } else { *waited + 1 };
                assert!(*waited <= 4, "round {round}: {what} waits for {waited}");
            }
        }
    }
}
