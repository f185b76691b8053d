//! The models of the experiment: a series of sizes that grow in width, and models that differ from
//! its middle in depth or history alone.

use hypercast_fm::spec::FmConfig;
use serde_json::{Value, json};

/// Sizes of the series.
const SIZES: usize = 5;

/// From one size to the next but one, width grows by this.
const WIDTH_STEP: f64 = 3.0;

/// What the other models have of the series' depth, and of its history.
const DEPTH_FACTORS: [f64; 2] = [0.5, 2.0];
const HISTORY_FACTORS: [f64; 2] = [0.25, 4.0];

/// Factors of the configuration's learning rate that are tried for each size. The first is taken if
/// they are alike.
pub const RATE_FACTORS: [f64; 3] = [1.0, 0.5, 2.0];

/// A model of the experiment.
#[derive(Debug, Clone, PartialEq)]
pub struct LadderModel {
    /// What it is for people: width, layers, history.
    pub name: String,
    /// The preset's FM at this size, with the preset's learning rates.
    pub fm: FmConfig,
    /// Whether it is one of the sizes that grow in width.
    pub in_series: bool,
}

impl LadderModel {
    fn new(base: &FmConfig, width: usize, layers: usize, history: usize) -> Self {
        let part = |size: usize| (size * width).div_ceil(base.dim).max(1);
        let fm = FmConfig {
            dim: width,
            layers,
            qk_dim: part(base.qk_dim),
            v_dim: part(base.v_dim),
            embedding_dim: part(base.embedding_dim),
            max_history: history,
            history_anchors: Some(0),
            tae_dim: base.tae_width(),
            ..base.clone()
        };
        let name = format!("d{width} l{layers} h{history}");
        Self { name, fm, in_series: false }
    }

    /// Its size as JSON.
    pub fn size(&self) -> Value {
        let FmConfig { dim, layers, max_history, embedding_dim, learning_rate, .. } = self.fm;
        json!({
            "model": self.name, "dim": dim, "layers": layers, "max_history": max_history,
            "embedding_dim": embedding_dim, "learning_rate": learning_rate,
            "in_series": self.in_series,
        })
    }
}

/// The models. `base` is the widest of the series, which comes first, smallest first.
pub fn ladder(base: &FmConfig) -> Vec<LadderModel> {
    let (layers, history) = (base.layers, base.max_history);
    let size = |size: usize| {
        let model = LadderModel::new(base, width_of(base, size), layers, history);
        LadderModel { in_series: true, ..model }
    };
    let mut all: Vec<LadderModel> = (0..SIZES).map(size).collect();
    let middle = width_of(base, SIZES / 2);
    let of = |count: usize, factor: f64| (count as f64 * factor).ceil().max(1.0) as usize;
    let depths =
        DEPTH_FACTORS.map(|factor| LadderModel::new(base, middle, of(layers, factor), history));
    let histories =
        HISTORY_FACTORS.map(|factor| LadderModel::new(base, middle, layers, of(history, factor)));
    all.extend(depths.into_iter().chain(histories));
    // In a small configuration two of them may be one.
    let mut names = Vec::new();
    all.retain(|model| {
        let is_new = !names.contains(&model.name);
        names.push(model.name.clone());
        is_new
    });
    all
}

/// Each size of the series at each of some learning rates.
pub fn trials(models: &[LadderModel]) -> Vec<LadderModel> {
    let of_size = |model: &LadderModel| {
        RATE_FACTORS.map(|factor| {
            let learning_rate = factor * model.fm.learning_rate;
            let fm = FmConfig { learning_rate, ..model.fm.clone() };
            LadderModel { fm, ..model.clone() }
        })
    };
    models.iter().filter(|model| model.in_series).flat_map(of_size).collect()
}

fn width_of(base: &FmConfig, size: usize) -> usize {
    let smaller = WIDTH_STEP.powf((SIZES - 1 - size) as f64 / 2.0);
    // Even, since the width of a head is a part of it.
    (2.0 * (base.dim as f64 / smaller / 2.0).round()).max(2.0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_grow_in_width_and_others_differ_in_depth_or_history() {
        let base =
            FmConfig { dim: 48, layers: 3, max_history: 16, tae_dim: 16, ..FmConfig::default() };
        let models = ladder(&base);
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        let series = ["d6 l3 h16", "d10 l3 h16", "d16 l3 h16", "d28 l3 h16", "d48 l3 h16"];
        assert_eq!(names[..SIZES], series);
        assert_eq!(names[SIZES..], ["d16 l2 h16", "d16 l6 h16", "d16 l3 h4", "d16 l3 h64"]);
        assert!(models.iter().enumerate().all(|(at, model)| model.in_series == (at < SIZES)));
        let largest = FmConfig { history_anchors: Some(0), tae_dim: 16, ..base.clone() };
        assert_eq!(models[SIZES - 1].fm, largest);
        for model in &models {
            model.fm.validate().unwrap();
            assert_eq!(model.fm.tae_width(), 16);
        }
        let trials = trials(&models);
        assert_eq!(trials.len(), SIZES * RATE_FACTORS.len());
        let largest = &trials[trials.len() - 1].fm;
        assert_eq!(largest.learning_rate, RATE_FACTORS[2] * base.learning_rate);
        let small = ladder(&FmConfig { dim: 4, layers: 1, max_history: 4, ..base });
        let mut names: Vec<&str> = small.iter().map(|model| model.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), small.len(), "no model is there twice");
    }
}
