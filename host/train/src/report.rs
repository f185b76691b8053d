//! Progressive metrics by surface and task, and how they are shown.

use hypercast_fm::{
    example::Example,
    metrics::{BinaryMetrics, MetricsWindow, ScoredPrediction},
    spec::{FmSpec, TaskLabel},
    trainer::StepOutput,
};
use serde::Serialize;

/// The name of the slice over all surfaces.
pub const ALL: &str = "all";

/// Rows kept a slice; a longer stream reports its newest part.
const KEEP: usize = 1 << 20;

/// Rows a task that a progress bar speaks of.
const RECENT: usize = 10_000;

/// Metrics of one surface and task.
#[derive(Debug, Clone, Serialize)]
pub struct ReportLine {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// Rows.
    pub n: usize,
    /// Normalised entropy.
    pub ne: Option<f64>,
    /// Area under the curve.
    pub auc: Option<f64>,
    /// AUC within users.
    pub gauc: Option<f64>,
    /// The NE of the true probabilities, where they are known.
    pub best_ne: Option<f64>,
}

impl ReportLine {
    /// A slice's metrics; one past the last surface stands for all.
    pub(super) fn of(
        surfaces: &[String],
        surface: usize,
        task: &str,
        summary: BinaryMetrics,
        best_ne: Option<f64>,
    ) -> ReportLine {
        let surface = surfaces.get(surface).map_or(ALL, String::as_str).to_owned();
        let BinaryMetrics { n, ne, auc, gauc, .. } = summary;
        ReportLine { surface, task: task.to_owned(), n, ne, auc, gauc, best_ne }
    }
}

/// Collects predictions of binary tasks as they are made.
#[derive(Debug)]
pub struct ProgressiveCollector {
    surfaces: Vec<String>,
    /// The binary tasks by name, with their place among all.
    tasks: Vec<(usize, String)>,
    /// What the model predicted, by surface and task; one past the last surface stands for all.
    pub(super) said: MetricsWindow<(usize, usize)>,
    /// The true probabilities, likewise.
    pub(super) truth: MetricsWindow<(usize, usize)>,
    /// The newest rows by task, for a progress bar.
    recent: MetricsWindow<usize>,
}

impl ProgressiveCollector {
    /// For an FM's tasks.
    pub fn new(spec: &FmSpec) -> Self {
        Self {
            surfaces: spec.surfaces.clone(),
            tasks: binary_tasks(spec),
            said: MetricsWindow::new(KEEP),
            truth: MetricsWindow::new(KEEP),
            recent: MetricsWindow::new(RECENT),
        }
    }

    /// Adds what was said of the targets of examples; `truth_order` maps all tasks to
    /// `Target::truth`.
    pub fn push(&mut self, examples: &[Example], said: &StepOutput, truth_order: &[usize]) {
        let targets = examples.iter().flat_map(|own| own.targets.iter().map(move |it| (own, it)));
        for (row, (example, target)) in targets.enumerate() {
            for &(task, _) in &self.tasks {
                let at = row * truth_order.len() + task;
                if !said.mask[at] || said.predictions[at].is_nan() {
                    continue;
                }
                let scored = |probability| ScoredPrediction {
                    user: example.user.id,
                    probability,
                    label: said.labels[at] > 0.5,
                };
                let truth = target.truth.get(truth_order[task]).copied().filter(|p| p.is_finite());
                self.recent.push(task, scored(said.predictions[at]));
                for surface in [usize::from(example.surface), self.surfaces.len()] {
                    self.said.push((surface, task), scored(said.predictions[at]));
                    if let Some(truth) = truth {
                        self.truth.push((surface, task), scored(truth));
                    }
                }
            }
        }
    }

    fn task_name(&self, task: usize) -> &str {
        self.tasks.iter().find(|(at, _)| *at == task).map_or("", |(_, name)| name)
    }

    /// The NE of each task over its newest rows, in words.
    pub fn recent(&self) -> String {
        let say = |(at, summary): (&usize, BinaryMetrics)| {
            format!("{} {}", self.task_name(*at), number(summary.ne))
        };
        format!("NE {}", self.recent.summaries().map(say).collect::<Vec<_>>().join(", "))
    }

    /// The metrics of every slice with rows; `all` comes last.
    pub fn lines(&self) -> Vec<ReportLine> {
        let line = |(slice, summary): (&(usize, usize), BinaryMetrics)| {
            let best_ne = self.truth.summary(slice).and_then(|best| best.ne);
            ReportLine::of(&self.surfaces, slice.0, self.task_name(slice.1), summary, best_ne)
        };
        self.said.summaries().map(line).collect()
    }
}

/// The binary tasks by name, with their place among all.
pub(super) fn binary_tasks(spec: &FmSpec) -> Vec<(usize, String)> {
    let tasks = spec.tasks.iter().enumerate();
    let binary = tasks.filter(|(_, task)| matches!(task.label, TaskLabel::Action(_)));
    binary.map(|(at, task)| (at, task.name.clone())).collect()
}

/// A table of lines for people.
pub fn table(lines: &[ReportLine]) -> String {
    let best = lines.iter().any(|line| line.best_ne.is_some());
    let mut text = format!(
        "{:<16} {:<18} {:>9} {:>8} {:>8} {:>8}",
        "surface", "task", "rows", "NE", "AUC", "GAUC"
    );
    text += if best { "  best NE\n" } else { "\n" };
    for line in lines {
        let [ne, auc, gauc] = [line.ne, line.auc, line.gauc].map(number);
        text += &format!(
            "{:<16} {:<18} {:>9} {ne:>8} {auc:>8} {gauc:>8}",
            line.surface, line.task, line.n
        );
        text += &if best { format!(" {:>8}\n", number(line.best_ne)) } else { "\n".into() };
    }
    text
}

/// Four decimals, or a dash for a metric that the rows cannot give.
pub fn number(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.4}"))
}
