//! What goes into a delta: of what moved since it was last published, the most moved a byte, within a
//! budget; and nothing waits for ever.
//!
//! A component, a block of a dense tensor or a row, has a movement: the root mean square of its change over that of
//! its tensor's values, so that tensors of different scales and components of different sizes compare. One that is
//! left out waits, and is sent after `starve_after` publications at the latest: as many of the oldest go
//! first as must go now for all to be in time, earliest deadline first. That can be kept if the budget of so many
//! publications is all of the weights. How movement is measured, and what was published, is `mirror`'s business.

/// What may be sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate<T> {
    pub(super) what: T,
    /// As it is written, before compression.
    pub(super) bytes: u64,
    /// See the module.
    pub(super) movement: f64,
    /// Publications that went without it since it moved.
    pub(super) waited: u32,
}

/// What a delta may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes. One component goes even if it is larger.
    pub(super) budget: u64,
    /// Publications that may go without a component that moved.
    pub(super) starve_after: u32,
}

/// Those that are sent, and those that wait.
pub(super) struct Chosen<T> {
    pub(super) sent: Vec<Candidate<T>>,
    pub(super) left: Vec<Candidate<T>>,
}

/// Chooses.
pub(super) fn choose<T>(mut candidates: Vec<Candidate<T>>, limits: Limits) -> Chosen<T> {
    let remaining = |candidate: &Candidate<T>| limits.starve_after.saturating_sub(candidate.waited);
    candidates
        .sort_by(|a, b| remaining(a).cmp(&remaining(b)).then(b.movement.total_cmp(&a.movement)));
    let mut due = 0u64;
    let mut demand = 0u64;
    for candidate in &candidates {
        demand += candidate.bytes;
        let later = u64::from(remaining(candidate)).saturating_mul(limits.budget);
        due = due.max(demand.saturating_sub(later));
    }
    let mut chosen = Chosen { sent: Vec::new(), left: Vec::new() };
    let mut spent = 0;
    let mut rest = Vec::new();
    for candidate in candidates {
        let fits = spent + candidate.bytes <= limits.budget || chosen.sent.is_empty();
        if spent < due && fits {
            spent += candidate.bytes;
            chosen.sent.push(candidate);
        } else {
            rest.push(candidate);
        }
    }
    rest.sort_by(|a, b| b.movement.total_cmp(&a.movement));
    for candidate in rest {
        let fits = spent + candidate.bytes <= limits.budget || chosen.sent.is_empty();
        if fits {
            spent += candidate.bytes;
            chosen.sent.push(candidate);
        } else {
            chosen.left.push(candidate);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(what: usize, movement: f64, waited: u32) -> Candidate<usize> {
        Candidate { what, bytes: 10, movement, waited }
    }

    fn sent(candidates: Vec<Candidate<usize>>, limits: Limits) -> Vec<usize> {
        choose(candidates, limits).sent.iter().map(|candidate| candidate.what).collect()
    }

    #[test]
    fn what_moved_most_goes_within_the_budget() {
        let limits = Limits { budget: 25, starve_after: 5 };
        let all = vec![candidate(0, 0.1, 0), candidate(1, 0.9, 0), candidate(2, 0.5, 0)];
        assert_eq!(sent(all, limits), [1, 2]);
        let large = Candidate { bytes: 100, ..candidate(7, 0.2, 0) };
        assert_eq!(sent(vec![large], limits), [7], "one goes even if it is larger");
    }

    #[test]
    fn what_waited_long_enough_goes_first() {
        let limits = Limits { budget: 20, starve_after: 3 };
        let all = vec![candidate(0, 0.9, 0), candidate(1, 0.8, 0), candidate(2, 0.001, 3)];
        assert_eq!(sent(all, limits), [2, 0]);
    }

    #[test]
    fn nothing_waits_longer_than_it_may_even_if_everything_always_moves() {
        let limits = Limits { budget: 30, starve_after: 4 };
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
