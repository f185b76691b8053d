//! From the shared bottom to one logit a task (the multi-task objectives of paper
//! section 3.2), calibrated for each surface.
//!
//! Every last layer starts near zero: training begins at even odds and not at
//! random ones, and a calibration starts as the identity.

use crate::fusion::FmEmbedded;
use crate::graph::{Graph, Tensor};
use crate::layers::{Linear, Mlp};
use crate::raw::types::Initialiser;

/// How much faster than other weights a head's bias learns: a task of one positive in a hundred is a logit of 4.6
/// away from the even odds that it starts at, which Adam's steps of one learning rate each take long to walk.
const BIAS_SPEED: f32 = 10.0;

/// A small tower a task over a shared bottom, plus direct linear paths from first-order features and from the
/// FM's embedding, so that a linear model is the floor of the expert. Then a `PerSurface` calibration.
///
/// Task `click` of heads `heads` has its parameters under `heads/click/`, so tasks come and go without
/// touching each other's trained values. Those that read the FM's embedding are apart, under `heads/click/fm/`:
/// another FM's embedding has other axes, and an expert that moves to it begins them afresh.
pub struct TaskHeads<'g> {
    name: String,
    tower: Vec<u32>,
    dropout: f32,
    per_surface: bool,
    direct: Option<Tensor<'g>>,
    fm: Option<FmEmbedded<'g>>,
}

impl<'g> TaskHeads<'g> {
    /// Towers of one layer, 16 wide, calibrated for each surface.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            tower: vec![16],
            dropout: 0.0,
            per_surface: true,
            direct: None,
            fm: None,
        }
    }

    /// A direct path from first-order features `[rows, f]`.
    pub fn direct(self, features: Tensor<'g>) -> Self {
        Self { direct: Some(features), ..self }
    }

    /// A direct path from the FM's whole normalised embedding.
    pub fn fm(self, fm: FmEmbedded<'g>) -> Self {
        Self { fm: Some(fm), ..self }
    }

    /// The widths of each tower's layers; none makes it linear.
    pub fn tower(self, widths: impl IntoIterator<Item = u32>) -> Self {
        Self { tower: widths.into_iter().collect(), ..self }
    }

    /// Dropout after each layer of the towers; 0 unless set.
    pub fn dropout(self, rate: f32) -> Self {
        Self { dropout: rate, ..self }
    }

    /// Without the calibration.
    pub fn one_for_all_surfaces(self) -> Self {
        Self { per_surface: false, ..self }
    }

    /// `bottom` `[rows, k]` to an output of each of the graph's tasks.
    pub fn apply(&self, g: &'g Graph, bottom: Tensor<'g>) {
        for task in g.tasks() {
            g.output(&task.name, self.logit(&task.name, bottom));
        }
    }

    /// The logit (or value, of a regression) of one task, `[rows, 1]`, for an expert that goes on from there.
    pub fn logit(&self, task: &str, bottom: Tensor<'g>) -> Tensor<'g> {
        let g = bottom.graph();
        let build = || {
            let top = match self.tower.is_empty() {
                true => bottom,
                false => Mlp::new("tower", self.tower.iter().copied())
                    .dropout(self.dropout)
                    .apply(bottom),
            };
            let deep = Linear::new("out", 1).no_bias().init(Initialiser::Normal(0.01)).apply(top);
            let deep = deep + g.parameter("bias", &[1], Initialiser::Zeros) * BIAS_SPEED;
            let paths =
                [("direct", self.direct), ("fm", self.fm.map(|embedded| embedded.normalised))];
            let logit = paths.into_iter().fold(deep, |logit, (name, input)| match input {
                Some(input) => {
                    let linear = Linear::new(name, 1).no_bias().init(Initialiser::Zeros);
                    logit + linear.apply(input)
                }
                None => logit,
            });
            if self.per_surface { PerSurface::new("surface").apply(logit) } else { logit }
        };
        g.scope(&self.name, || g.scope(task, build))
    }
}

/// A scale and a bias for each surface, for an expert that serves several: `x * scale[s] + bias[s]`, at first 1 and 0.
///
/// They are tables by surface: a step touches those of the surfaces in its batch alone, at the tables'
/// learning rate, so that the calibration follows faster than the network below it.
pub struct PerSurface {
    name: String,
}

impl PerSurface {
    /// A calibration that is not shared between places.
    pub fn new(name: &str) -> Self {
        Self { name: name.into() }
    }

    /// Logits `[rows, d]` to `[rows, d]`; unchanged where the schema names no surfaces. A new surface at the end of
    /// the schema changes the tables' shape, so that a warm start begins the calibration afresh.
    pub fn apply<'g>(&self, x: Tensor<'g>) -> Tensor<'g> {
        let g = x.graph();
        let surfaces = g.info().surfaces.len() as u32;
        if surfaces == 0 || !g.info().ids.iter().any(|id| id == "surface") {
            return x;
        }
        g.scope(&self.name, || {
            let shape = [surfaces, x.shape().width().unwrap_or(1)];
            let surface = g.id("surface");
            let scale = g.parameter("scale", &shape, Initialiser::Ones).gather(surface);
            x * scale + g.parameter("bias", &shape, Initialiser::Zeros).gather(surface)
        })
    }
}
