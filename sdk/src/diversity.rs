//! Rankings whose items differ from each other, by a vector of each.

use crate::raw::types::Ranked;
use crate::slate::{Placement, Slate};

/// What is left of a candidate's vector, squared, below which those before it say all of it.
const SPANNED: f64 = 1e-6;

impl Slate<'_> {
    /// Maximal marginal relevance (Carbonell & Goldstein, 1998): each place goes to the candidate
    /// with the most `relevance * score - (1 - relevance) * s`, where `s` is the cosine between its
    /// vector and the nearest one of the places before. So 1 orders by score and 0 by difference
    /// alone; scores should be on the scale of cosines.
    ///
    /// `vectors` has a row for each candidate of the request. A row of zeros is like no other.
    pub fn mmr(&self, vectors: &[f32], relevance: f32) -> Vec<Ranked> {
        let vectors = UnitVectors::new(vectors, self.scores.len());
        let mut nearest = vec![f32::NEG_INFINITY; self.scores.len()];
        self.place(self.by_score(), |placed, left, choices| {
            if let Some(last) = placed.last() {
                for entry in left {
                    let cosine = vectors.cosine(entry.candidate, last.candidate) as f32;
                    let nearest = &mut nearest[entry.candidate as usize];
                    *nearest = nearest.max(cosine);
                }
            }
            let gain = |entry: &Ranked| {
                let nearest = nearest[entry.candidate as usize];
                let penalty = if placed.is_empty() { 0.0 } else { (1.0 - relevance) * nearest };
                f64::from(relevance * entry.score - penalty)
            };
            Placement { choice: most(left, choices, gain), propensity: None }
        })
    }

    /// A determinantal point process, ranked greedily (Chen, Zhang & Zhou, 2018): each place goes
    /// to the candidate that most increases `relevance * sum of scores + ln det S`, where `S` has
    /// the cosines between the vectors of all that is placed. A set of vectors in one plane counts
    /// as less than one in all directions, though no two of them are alike.
    ///
    /// `vectors` has a row for each candidate of the request; a row of zeros is like no other. Once
    /// the vectors that are placed span all others, the rest follows by score.
    pub fn dpp(&self, vectors: &[f32], relevance: f32) -> Vec<Ranked> {
        let vectors = UnitVectors::new(vectors, self.scores.len());
        // The rows of the Cholesky factor of S, and what is left of each squared diagonal.
        let mut factors: Vec<Vec<f64>> = vec![Vec::new(); self.scores.len()];
        let mut rests = vec![1.0_f64; self.scores.len()];
        self.place(self.by_score(), |placed, left, choices| {
            if let Some(last) = placed.last() {
                let at = last.candidate as usize;
                let (row, rest) = (std::mem::take(&mut factors[at]), rests[at]);
                for entry in left.iter().filter(|_| rest > SPANNED) {
                    let factor = &mut factors[entry.candidate as usize];
                    let known: f64 = row.iter().zip(&*factor).map(|(a, b)| a * b).sum();
                    let cosine = vectors.cosine(entry.candidate, last.candidate);
                    let own = (cosine - known) / rest.sqrt();
                    factor.push(own);
                    rests[entry.candidate as usize] -= own * own;
                }
            }
            let gain = |entry: &Ranked| {
                let rest = rests[entry.candidate as usize].max(SPANNED);
                f64::from(relevance * entry.score) + rest.ln()
            };
            Placement { choice: most(left, choices, gain), propensity: None }
        })
    }
}

/// The first choice with the most gain.
fn most(left: &[Ranked], choices: &[usize], gain: impl Fn(&Ranked) -> f64) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (choice, &at) in choices.iter().enumerate() {
        let gain = gain(&left[at]);
        if gain > best.1 {
            best = (choice, gain);
        }
    }
    best.0
}

/// Vectors of length 1, or of zeros.
struct UnitVectors {
    width: usize,
    values: Vec<f32>,
}

impl UnitVectors {
    fn new(vectors: &[f32], rows: usize) -> UnitVectors {
        let width = vectors.len() / rows.max(1);
        let mut values = vectors[..width * rows].to_vec();
        for row in values.chunks_exact_mut(width.max(1)) {
            let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
            let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
            row.iter_mut().for_each(|value| *value *= scale);
        }
        UnitVectors { width, values }
    }

    fn cosine(&self, left: u32, right: u32) -> f64 {
        let row = |at: u32| &self.values[at as usize * self.width..][..self.width];
        let products = row(left).iter().zip(row(right)).map(|(a, b)| a * b);
        f64::from(products.sum::<f32>())
    }
}
