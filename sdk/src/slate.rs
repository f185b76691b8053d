//! The candidates of a request on their way into a ranking: filters take some out, caps by key say
//! how many alike may stand near the top, and one rule orders what is left.
//!
//! An order without caps costs a sort. Caps, and rules that draw one place after the other, cost
//! time in proportion to the candidates times the places that are asked for.

use std::collections::BTreeMap;

use crate::rank::{Request, best_first};
use crate::raw::types::Ranked;

/// Candidates with their scores, until a rule orders them. [`Request::slate`] begins with all.
///
/// ```
/// use hypercast_sdk::{Cap, RankRequest, Request};
///
/// let request = RankRequest { candidates: vec![7, 8, 9, 10], limit: 3, ..RankRequest::default() };
/// let request = Request::new(request, vec![], vec![]);
/// let (scores, authors, stock) = ([0.9, 0.8, 0.7, 0.6], [1, 1, 2, 2], [3, 5, 0, 1]);
/// let slate = request
///     .slate(&scores)
///     .filter("sold out", |candidate| stock[candidate] > 0)
///     .cap(&authors, Cap { at_most: 1, first: 2 });
/// assert_eq!((slate.filtered()[0].name.as_str(), slate.filtered()[0].count), ("sold out", 1));
/// let order: Vec<u32> = slate.top().iter().map(|place| place.candidate).collect();
/// assert_eq!(order, [0, 3, 1]);
/// ```
#[derive(Debug, Clone)]
pub struct Slate<'a> {
    pub(crate) request: &'a Request,
    pub(crate) scores: &'a [f32],
    candidates: Vec<u32>,
    filtered: Vec<Filtered>,
    caps: Vec<KeyCap<'a>>,
}

/// Allows at most `at_most` candidates with the same key within the `first` places.
#[derive(Debug, Clone, Copy)]
pub struct Cap {
    /// The most candidates with the same key.
    pub at_most: usize,
    /// The number of places, from the first on, among which they count.
    pub first: usize,
}

/// What a filter took out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filtered {
    /// The filter's name.
    pub name: String,
    /// The number of candidates that it took out, of those that filters before it had left.
    pub count: usize,
}

#[derive(Debug, Clone)]
struct KeyCap<'a> {
    keys: &'a [u64],
    cap: Cap,
}

/// What a rule places next.
pub(crate) struct Placement {
    /// Its index among the choices.
    pub(crate) choice: usize,
    /// The probability of that, given the places before.
    pub(crate) propensity: Option<f32>,
}

impl Request {
    /// All candidates, with a score each, for filters, caps and a rule that orders them.
    pub fn slate<'a>(&'a self, scores: &'a [f32]) -> Slate<'a> {
        Slate {
            request: self,
            scores,
            candidates: (0..scores.len() as u32).collect(),
            filtered: Vec::new(),
            caps: Vec::new(),
        }
    }
}

impl<'a> Slate<'a> {
    /// Keeps the candidates, by index, that `keep` accepts. A rule must have one left: to the host
    /// an empty ranking is a fault, and the FM's ranking answers.
    #[must_use]
    pub fn filter(mut self, name: &str, mut keep: impl FnMut(usize) -> bool) -> Self {
        let before = self.candidates.len();
        self.candidates.retain(|&candidate| keep(candidate as usize));
        let count = before - self.candidates.len();
        self.filtered.push(Filtered { name: name.to_owned(), count });
        self
    }

    /// Delays candidates that would be one too many of their key (`keys` has one a candidate). If
    /// that applies to all that are left, the best of them is placed anyway, so the ranking is as
    /// long as without.
    #[must_use]
    pub fn cap(mut self, keys: &'a [u64], cap: Cap) -> Self {
        self.caps.push(KeyCap { keys, cap });
        self
    }

    /// What the filters took out, in their order; for a log line, say.
    pub fn filtered(&self) -> &[Filtered] {
        &self.filtered
    }

    /// The best candidates by score. Ties are broken by index.
    pub fn top(&self) -> Vec<Ranked> {
        self.in_order(self.by_score())
    }

    /// The candidates that are left, best first.
    pub(crate) fn by_score(&self) -> Vec<Ranked> {
        best_first(self.left().map(|at| Ranked::new(at, self.scores[at as usize])).collect())
    }

    /// The candidates that are left, in the order of the request.
    pub(crate) fn left(&self) -> impl Iterator<Item = u32> {
        self.candidates.iter().copied()
    }

    /// Whether caps cannot change who is first, or there are none and they change nothing.
    pub(crate) fn caps_leave(&self, place: usize) -> bool {
        let is_first = place == 0 && self.caps.iter().all(|own| own.cap.at_most > 0);
        self.caps.is_empty() || is_first
    }

    /// Places candidates in an order, except that caps delay some.
    pub(crate) fn in_order(&self, mut order: Vec<Ranked>) -> Vec<Ranked> {
        if self.caps.is_empty() {
            order.truncate(self.request.limit);
            return order;
        }
        self.place(order, |_, _, _| Placement { choice: 0, propensity: None })
    }

    /// Places one candidate after the other, up to the request's limit. `next` gets what was placed
    /// before, what is left, and which of those caps allow, by index.
    pub(crate) fn place(
        &self,
        mut left: Vec<Ranked>,
        mut next: impl FnMut(&[Ranked], &[Ranked], &[usize]) -> Placement,
    ) -> Vec<Ranked> {
        let limit = self.request.limit.min(left.len());
        let mut placed: Vec<Ranked> = Vec::with_capacity(limit);
        let mut counts = vec![BTreeMap::<u64, usize>::new(); self.caps.len()];
        let mut choices = Vec::with_capacity(left.len());
        while placed.len() < limit {
            let fits = |entry: &Ranked| {
                self.caps.iter().zip(&counts).all(|(KeyCap { keys, cap }, counts)| {
                    let key = keys.get(entry.candidate as usize);
                    let alike = key.and_then(|key| counts.get(key)).copied().unwrap_or(0);
                    placed.len() >= cap.first || key.is_none() || alike < cap.at_most
                })
            };
            choices.clear();
            choices.extend((0..left.len()).filter(|at| fits(&left[*at])));
            if choices.is_empty() {
                choices.extend(0..left.len());
            }
            let Placement { choice, propensity } = next(&placed, &left, &choices);
            let entry = Ranked { propensity, ..left.remove(choices[choice]) };
            for (KeyCap { keys, .. }, counts) in self.caps.iter().zip(&mut counts) {
                keys.get(entry.candidate as usize)
                    .into_iter()
                    .for_each(|&key| *counts.entry(key).or_default() += 1);
            }
            placed.push(entry);
        }
        placed
    }
}
