//! The models of the experiment: a diagonal of sizes that grow in everything at once, and from its
//! middle, models that differ from it in width, depth or history alone.

use hypercast_fm::spec::FmConfig;
use serde_json::{Value, json};

/// Sizes on the diagonal.
pub const SIZES: usize = 5;

/// From one size to the next, width grows by the root of this and history by 2.
const WIDTH_STEP: f64 = 3.0;

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
    /// Whether it is one of the sizes that grow in everything.
    pub on_diagonal: bool,
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
        Self { name, fm, on_diagonal: false }
    }

    /// Its size as JSON.
    pub fn size(&self) -> Value {
        let FmConfig { dim, layers, max_history, embedding_dim, learning_rate, .. } = self.fm;
        json!({
            "model": self.name, "dim": dim, "layers": layers, "max_history": max_history,
            "embedding_dim": embedding_dim, "learning_rate": learning_rate,
            "on_diagonal": self.on_diagonal,
        })
    }
}

/// The models, of which `base` is the largest; those on the diagonal come first, smallest first.
pub fn ladder(base: &FmConfig) -> Vec<LadderModel> {
    let [width, layers, history] = [width_of, layers_of, history_of]
        .map(|of| (0..SIZES).map(|size| of(base, size)).collect::<Vec<usize>>());
    let of = |w: usize, l: usize, h: usize| LadderModel::new(base, width[w], layers[l], history[h]);
    let diagonal = (0..SIZES).map(|size| LadderModel { on_diagonal: true, ..of(size, size, size) });
    let mut all: Vec<LadderModel> = diagonal.collect();
    let (middle, last) = (SIZES / 2, SIZES - 1);
    for end in [0, last] {
        all.extend([of(end, middle, middle), of(middle, end, middle), of(middle, middle, end)]);
    }
    // In a small configuration two steps may be one size.
    let mut names = Vec::new();
    all.retain(|model| {
        let is_new = !names.contains(&model.name);
        names.push(model.name.clone());
        is_new
    });
    all
}

/// Each size at each of some learning rates. What is tried is the size itself: a rate that is best
/// for one layer and a short history is not for more of them.
pub fn trials(models: &[LadderModel]) -> Vec<LadderModel> {
    let of_size = |model: &LadderModel| {
        RATE_FACTORS.map(|factor| {
            let learning_rate = factor * model.fm.learning_rate;
            let fm = FmConfig { learning_rate, ..model.fm.clone() };
            LadderModel { fm, ..model.clone() }
        })
    };
    models.iter().filter(|model| model.on_diagonal).flat_map(of_size).collect()
}

fn width_of(base: &FmConfig, size: usize) -> usize {
    let smaller = WIDTH_STEP.powf((SIZES - 1 - size) as f64 / 2.0);
    // Even, since the width of a head is a part of it.
    (2.0 * (base.dim as f64 / smaller / 2.0).round()).max(2.0) as usize
}

fn layers_of(base: &FmConfig, size: usize) -> usize {
    (base.layers * (size + 1)).div_ceil(SIZES)
}

fn history_of(base: &FmConfig, size: usize) -> usize {
    (base.max_history >> (SIZES - 1 - size)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_grow_in_everything_and_others_in_one_thing() {
        let base =
            FmConfig { dim: 48, layers: 3, max_history: 128, tae_dim: 16, ..FmConfig::default() };
        let models = ladder(&base);
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        let diagonal = ["d6 l1 h8", "d10 l2 h16", "d16 l2 h32", "d28 l3 h64", "d48 l3 h128"];
        assert_eq!(names[..SIZES], diagonal);
        let others =
            ["d6 l2 h32", "d16 l1 h32", "d16 l2 h8", "d48 l2 h32", "d16 l3 h32", "d16 l2 h128"];
        assert_eq!(names[SIZES..], others);
        let largest = FmConfig { tae_dim: 16, ..base.clone() };
        assert_eq!(models[SIZES - 1].fm, largest);
        for model in &models {
            model.fm.validate().unwrap();
            assert_eq!(model.fm.tae_width(), 16);
        }
        let trials = trials(&models);
        assert_eq!(trials.len(), 5 * RATE_FACTORS.len());
        let largest = &trials[trials.len() - 1].fm;
        assert_eq!((largest.layers, largest.max_history), (3, 128));
        assert_eq!(largest.learning_rate, RATE_FACTORS[2] * base.learning_rate);
        let small = ladder(&FmConfig { dim: 4, layers: 1, max_history: 4, ..base });
        let mut names: Vec<&str> = small.iter().map(|model| model.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), small.len(), "no model is there twice");
    }
}
