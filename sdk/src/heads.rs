//! Computes one logit per task from the shared bottom (the multi-task objectives of paper section
//! 3.2) and calibrates it for each surface.
//!
//! Every last layer starts near zero, so training begins at the base rate instead of random odds,
//! or exactly at the FM's own prediction (`from_fm`). A calibration starts as the identity.

use crate::fusion::FmEmbedded;
use crate::graph::{Graph, Tensor};
use crate::layers::{Linear, Mlp};
use crate::losses;
use crate::raw::types::{Initialiser, TaskKind};

/// How much faster than other weights a head's bias learns. The bias of a task with one positive in
/// a hundred must move by 4.6 from its start at even odds. Adam moves it by about one learning rate
/// per step, which would take too many steps.
const BIAS_SPEED: f32 = 10.0;

/// How fast a head learns the scales and shifts of the FM's prediction, as a share of the rate of
/// tables: little is left to learn there.
const FM_CALIBRATION_RATE: f32 = 0.1;

/// How fast the user's level learns, as a share of the usual rate. It is linear in a few numbers
/// that rise and fall together, for which usual steps are too small.
const LEVEL_RATE: f32 = 10.0;

/// The weight of the level's loss. Its own steps do not depend on it; it is small, so that the
/// bound of a step's gradient is left to the tasks.
const LEVEL_LOSS: f32 = 0.001;

/// A small tower per task over a shared bottom, plus direct linear paths from first-order features
/// and from the FM's embedding, followed by a `PerSurface` calibration. Thanks to the direct paths
/// an expert is at least as good as a linear model.
///
/// The parameters of task `click` of the heads named `heads` are under `heads/click/`, so adding or
/// removing a task leaves the trained values of the others alone. Weights that read the FM's
/// embedding are separate, under `heads/click/fm/`: the axes of another FM's embedding mean
/// something else, so an expert that moves to another FM must train them from scratch. The same
/// goes for `heads/click/from_fm/`, how a head blends its prediction with the FM's (`from_fm`).
pub struct TaskHeads<'g> {
    name: String,
    tower: Vec<u32>,
    dropout: f32,
    per_surface: bool,
    direct: Option<Tensor<'g>>,
    fm: Option<FmEmbedded<'g>>,
    from_fm: bool,
    scores: bool,
}

impl<'g> TaskHeads<'g> {
    /// Heads with towers of one layer, 16 wide, calibrated for each surface.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            tower: vec![16],
            dropout: 0.0,
            per_surface: true,
            direct: None,
            fm: None,
            from_fm: false,
            scores: false,
        }
    }

    /// Adds a direct path from first-order features, `[rows, f]`.
    pub fn direct(self, features: Tensor<'g>) -> Self {
        Self { direct: Some(features), ..self }
    }

    /// Adds a direct path from the FM's whole normalised embedding.
    pub fn fm(self, fm: FmEmbedded<'g>) -> Self {
        Self { fm: Some(fm), ..self }
    }

    /// Starts each task that the FM predicts, too, at the FM's own prediction. The head still
    /// learns a whole prediction of its own, by cross-entropy or squared error whatever the task's
    /// loss is, and the share of it in the output, which is 0 at first. Two predictions that err
    /// differently are better together than either. The FM's is scaled and shifted for each
    /// surface. Rows without an embedding, which the module of `fm` tells, have no prediction of
    /// the FM either: they get the head's own. Other tasks are predicted as without this, and all
    /// of them where the host offers no predictions. Feature logs must hold the FM's predictions,
    /// which those of earlier hosts do not.
    pub fn from_fm(self) -> Self {
        Self { from_fm: true, ..self }
    }

    /// Gives each task a ranking score (`Graph::score`) beside its prediction: the output less the
    /// user's level at that moment, which is what the user's own running numbers
    /// (`HostInfo::user_activity`) explain of the output, in a linear model with a bias for each
    /// surface. The level is learned from the outputs and changes nothing of them.
    ///
    /// Candidates of one request have one level, so within a request the score orders as the
    /// prediction does. Over the requests of a user it orders better: a user's running rate is high
    /// just after what raised it, which is then no longer to come. A host that does not say which
    /// features these are gets no scores.
    pub fn ranking_scores(self) -> Self {
        Self { scores: true, ..self }
    }

    /// Sets the layer widths of each tower; an empty list makes the head linear.
    pub fn tower(self, widths: impl IntoIterator<Item = u32>) -> Self {
        Self { tower: widths.into_iter().collect(), ..self }
    }

    /// Sets the dropout rate after each layer of the towers; 0 by default.
    pub fn dropout(self, rate: f32) -> Self {
        Self { dropout: rate, ..self }
    }

    /// Removes the calibration per surface.
    pub fn one_for_all_surfaces(self) -> Self {
        Self { per_surface: false, ..self }
    }

    /// Sets the output of each of the graph's tasks from `bottom`, `[rows, k]`.
    pub fn apply(&self, g: &'g Graph, bottom: Tensor<'g>) {
        let logits: Vec<_> = g.tasks().iter().map(|task| self.logit(&task.name, bottom)).collect();
        let state: Vec<&str> = g.info().user_activity().filter(|_| self.scores).collect();
        let state = (!state.is_empty()).then(|| g.features(&state));
        for (task, logit) in g.tasks().iter().zip(logits) {
            g.output(&task.name, logit);
            if let Some(state) = state {
                let level = || g.scope(&task.name, || self.level(logit, state));
                g.score(&task.name, logit - g.scope(&self.name, level));
            }
        }
    }

    /// The part of a logit that is the user's level, `[rows, 1]`, from the user's running numbers.
    fn level(&self, logit: Tensor<'g>, state: Tensor<'g>) -> Tensor<'g> {
        let g = logit.graph();
        let build = || {
            let level = Linear::new("user", 1).no_bias().init(Initialiser::Zeros).apply(state);
            let of_surface = self.calibrated(g.parameter("bias", &[1], Initialiser::Zeros));
            let error = logit.stop_gradient() - level - of_surface;
            g.extra_loss(error * error * LEVEL_LOSS);
            level
        };
        g.rate_factor(LEVEL_RATE, || g.scope("level", build))
    }

    /// Returns the logit of one task (the standardised value, for a regression), `[rows, 1]`,
    /// without making it an output.
    pub fn logit(&self, task: &str, bottom: Tensor<'g>) -> Tensor<'g> {
        let g = bottom.graph();
        let build = || {
            let own = self.calibrated(self.learned(bottom));
            if self.from_fm && g.info().fm_logits().any(|known| known == task) {
                // Through an output in which it has no share it would learn nothing.
                g.extra_loss(own_loss(g, task, own));
                g.scope("from_fm", || self.blended(g, task, own))
            } else {
                own
            }
        };
        g.scope(&self.name, || g.scope(task, build))
    }

    /// The FM's prediction and `own`, which is nothing at first and everything where there is no
    /// embedding.
    fn blended(&self, g: &'g Graph, task: &str, own: Tensor<'g>) -> Tensor<'g> {
        let fm = g.rate_factor(FM_CALIBRATION_RATE, || self.calibrated(g.fm_logit(task)));
        let share = g.parameter("share", &[1], Initialiser::Zeros);
        let of_fm = 1.0 - share;
        let of_fm = self.fm.map_or(of_fm, |fm| fm.present * of_fm);
        of_fm * fm + (1.0 - of_fm) * own
    }

    /// The tower and the direct paths.
    fn learned(&self, bottom: Tensor<'g>) -> Tensor<'g> {
        let tower = Mlp::new("tower", self.tower.iter().copied()).dropout(self.dropout);
        let last = Linear::new("out", 1).no_bias().init(Initialiser::Normal(0.01));
        let deep = last.apply(tower.apply(bottom));
        let bias = bottom.graph().parameter("bias", &[1], Initialiser::Zeros);
        let deep = deep + bias * BIAS_SPEED;
        let path = |name: &str| Linear::new(name, 1).no_bias().init(Initialiser::Zeros);
        let logit = self.direct.map_or(deep, |input| deep + path("direct").apply(input));
        self.fm.map_or(logit, |fm| logit + path("fm").apply(fm.normalised))
    }

    fn calibrated(&self, logit: Tensor<'g>) -> Tensor<'g> {
        if self.per_surface { PerSurface::new("surface").apply(logit) } else { logit }
    }
}

/// What a head's own prediction is learned by, beside the task's loss; 0 outside of its rows.
fn own_loss<'g>(g: &'g Graph, task: &str, own: Tensor<'g>) -> Tensor<'g> {
    let known = g.tasks().iter().find(|known| known.name == task);
    let loss = if known.is_some_and(|known| known.kind == TaskKind::Regression) {
        let error = own - g.label(task);
        error * error
    } else {
        losses::bce(task, own)
    };
    loss * g.mask(task)
}

/// A scale and a bias for each surface, for an expert that serves several:
/// `x * scale[s] + bias[s]`, initially 1 and 0.
///
/// Both are tables indexed by surface. A step updates only the surfaces in its batch, and at the
/// learning rate of tables, so the calibration adapts faster than the network below it.
pub struct PerSurface {
    name: String,
}

impl PerSurface {
    /// A calibration whose parameters are under `name`.
    pub fn new(name: &str) -> Self {
        Self { name: name.into() }
    }

    /// Maps logits `[rows, d]` to `[rows, d]`. Returns `x` unchanged if the schema has no surfaces
    /// or no `surface` id. A surface added to the schema changes the shape of the tables, so a warm
    /// start then resets the calibration.
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
