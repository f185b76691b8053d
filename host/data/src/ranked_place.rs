//! Where a daemon ranked an item that was then shown.

use serde::{Deserialize, Serialize};

/// The place of an item in the answer from which it was shown, and how it came there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankedPlace {
    /// The index in the answer's ranking.
    pub position: u32,
    /// The probability that the rule gave for the item at this place, above 0 and at most 1; none
    /// where it gave none.
    pub propensity: Option<f32>,
    /// The version that ranked it: `NAME@VERSION` of an expert, or `fm@VERSION`.
    pub arm: String,
}
