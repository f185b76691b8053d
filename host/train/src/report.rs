//! Progressive metrics by surface and task, and how they are shown.

use hypercast_core::text_table::TextTable;
use hypercast_fm::{
    example::Example,
    metrics::{
        BinaryMetrics, MetricsWindow, RegressionMetrics, ScoredPrediction, ScoredValue, TaskMetrics,
    },
    spec::{FmSpec, TaskLabel, TaskSpec},
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
    /// What they are.
    #[serde(flatten)]
    pub metrics: ShownMetrics,
    /// The NE of the true probabilities, where they are known.
    pub best_ne: Option<f64>,
}

/// The metrics of a binary task or of a regression, as tables and JSON show them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct ShownMetrics {
    /// Rows.
    pub n: usize,
    /// Normalised entropy.
    pub ne: Option<f64>,
    /// Area under the curve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    /// AUC within users.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gauc: Option<f64>,
    /// The mean squared error of a regression, in the square of its label's unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mse: Option<f64>,
    /// That of predicting the rows' mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_mse: Option<f64>,
    /// The sum of a regression's predictions over that of its labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<f64>,
    /// Spearman's, of a regression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_correlation: Option<f64>,
}

impl From<TaskMetrics> for ShownMetrics {
    fn from(metrics: TaskMetrics) -> Self {
        let BinaryMetrics { n, ne, auc, gauc, .. } = metrics.binary();
        let RegressionMetrics { mse, base_mse, calibration, rank_correlation, .. } =
            metrics.regression();
        Self { n, ne, auc, gauc, mse, base_mse, calibration, rank_correlation }
    }
}

impl ShownMetrics {
    /// Says that the predictions are worse than no model at all.
    pub fn warning(&self) -> Option<String> {
        if let Some(ne) = self.ne.filter(|ne| *ne > 1.0) {
            return Some(format!("NE {ne:.4} is above 1: worse than always saying the base rate"));
        }
        let (mse, base) = self.mse.zip(self.base_mse).filter(|(mse, base)| mse > base)?;
        Some(format!("MSE {mse:.4} is above {base:.4}: worse than always saying the mean"))
    }
}

impl ReportLine {
    /// A slice's metrics; one past the last surface stands for all.
    pub(super) fn of(
        surfaces: &[String],
        surface: usize,
        task: &str,
        metrics: TaskMetrics,
        best_ne: Option<f64>,
    ) -> ReportLine {
        let surface = surfaces.get(surface).map_or(ALL, String::as_str).to_owned();
        ReportLine { surface, task: task.to_owned(), metrics: metrics.into(), best_ne }
    }
}

/// Collects predictions as they are made.
#[derive(Debug)]
pub struct ProgressiveCollector {
    surfaces: Vec<String>,
    /// By name.
    tasks: Vec<ReportedTask>,
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
            tasks: spec.tasks.iter().map(ReportedTask::of).collect(),
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
            for (task, ReportedTask { is_binary, .. }) in self.tasks.iter().enumerate() {
                let at = row * truth_order.len() + task;
                if !said.mask[at] || said.predictions[at].is_nan() {
                    continue;
                }
                let surfaces = [usize::from(example.surface), self.surfaces.len()];
                if !is_binary {
                    let (prediction, label) = (said.predictions[at], said.labels[at]);
                    let scored = ScoredValue { prediction, label };
                    for surface in surfaces {
                        self.said.push_value((surface, task), scored);
                    }
                    continue;
                }
                let scored = |probability| ScoredPrediction {
                    user: example.user.id,
                    probability,
                    label: said.labels[at] > 0.5,
                };
                let truth = target.truth.get(truth_order[task]).copied().filter(|p| p.is_finite());
                self.recent.push(task, scored(said.predictions[at]));
                for surface in surfaces {
                    self.said.push((surface, task), scored(said.predictions[at]));
                    if let Some(truth) = truth {
                        self.truth.push((surface, task), scored(truth));
                    }
                }
            }
        }
    }

    fn task_name(&self, task: usize) -> &str {
        self.tasks.get(task).map_or("", |task| &task.name)
    }

    /// The NE of each task over its newest rows, in words.
    pub fn recent(&self) -> String {
        let say = |(at, summary): (&usize, TaskMetrics)| {
            format!("{} {}", self.task_name(*at), number(summary.binary().ne))
        };
        format!("NE {}", self.recent.summaries().map(say).collect::<Vec<_>>().join(", "))
    }

    /// The metrics of every slice with rows; `all` comes last.
    pub fn lines(&self) -> Vec<ReportLine> {
        let line = |(slice, summary): (&(usize, usize), TaskMetrics)| {
            let best_ne = self.truth.summary(slice).and_then(|best| best.binary().ne);
            ReportLine::of(&self.surfaces, slice.0, self.task_name(slice.1), summary, best_ne)
        };
        self.said.summaries().map(line).collect()
    }
}

/// A task that is reported.
#[derive(Debug)]
struct ReportedTask {
    name: String,
    is_binary: bool,
}

impl ReportedTask {
    fn of(task: &TaskSpec) -> Self {
        let is_binary = matches!(task.label, TaskLabel::Action(_));
        Self { name: task.name.clone(), is_binary }
    }
}

/// A table of lines for people.
pub fn table(lines: &[ReportLine]) -> String {
    let is_best_known = lines.iter().any(|line| line.best_ne.is_some());
    let head = ["surface", "task", "rows", "NE", "AUC", "GAUC", "best NE"];
    let columns = head.len() - usize::from(!is_best_known);
    let mut table = TextTable::new(2, head.into_iter().take(columns));
    for line in lines.iter().filter(|line| line.metrics.mse.is_none()) {
        let ShownMetrics { n, ne, auc, gauc, .. } = line.metrics;
        let [ne, auc, gauc, best] = [ne, auc, gauc, line.best_ne].map(number);
        let cells = [line.surface.clone(), line.task.clone(), n.to_string(), ne, auc, gauc, best];
        table.line(cells.into_iter().take(columns));
    }
    let named = |line: &ReportLine| NamedMetrics {
        names: vec![line.surface.clone(), line.task.clone()],
        metrics: line.metrics,
        is_base: false,
    };
    let named: Vec<NamedMetrics> = lines.iter().map(named).collect();
    table.to_string() + &regressions_and_warnings(&["surface", "task"], &named)
}

/// The metrics of a line of a table, with what names the line.
#[derive(Debug)]
pub struct NamedMetrics {
    /// What stands in the columns of names.
    pub names: Vec<String>,
    /// What is measured.
    pub metrics: ShownMetrics,
    /// Whether it is no model but what models are compared with.
    pub is_base: bool,
}

/// What follows a table of binary tasks: one of regressions, if there are any, and a line for each
/// task that is predicted worse than without a model. `head` is over the names.
pub fn regressions_and_warnings(head: &[&str], lines: &[NamedMetrics]) -> String {
    let metrics = ["rows", "MSE", "of mean", "calibration", "rank"];
    let mut table = TextTable::new(head.len(), head.iter().copied().chain(metrics));
    for NamedMetrics { names, metrics, .. } in lines {
        let ShownMetrics { n, mse: Some(mse), base_mse, calibration, rank_correlation, .. } =
            *metrics
        else {
            continue;
        };
        let numbers = [Some(mse), base_mse, calibration, rank_correlation].map(number);
        table.line(names.iter().cloned().chain([n.to_string()]).chain(numbers));
    }
    let mut text = if table.is_empty() { String::new() } else { format!("\n{table}") };
    for NamedMetrics { names, metrics, .. } in lines.iter().filter(|line| !line.is_base) {
        if let Some(warning) = metrics.warning() {
            text += &format!("warning: {}: {warning}\n", names.join(" "));
        }
    }
    text
}

/// Four decimals, or a dash for a metric that the rows cannot give.
pub fn number(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.4}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_fm::metrics::{binary_metrics, regression_metrics};

    #[test]
    fn tables_show_regressions_and_warn_of_what_is_worse_than_no_model() {
        let names = ["feed".to_owned()];
        let scored = |probability, label| ScoredPrediction { user: 1, probability, label };
        let bad = binary_metrics(&[scored(0.9, false), scored(0.1, true)]);
        let value = |prediction, label| ScoredValue { prediction, label };
        let good = regression_metrics(&[value(1.0, 0.0), value(3.0, 4.0)]);
        let lines = [
            ReportLine::of(&names, 0, "click", TaskMetrics::Binary(bad), None),
            ReportLine::of(&names, 1, "revenue", TaskMetrics::Regression(good), None),
        ];
        let text = table(&lines);
        let warnings: Vec<&str> = text.lines().filter(|line| line.contains("warning")).collect();
        assert!(warnings[0].starts_with("warning: feed click: NE 3.3219 is above 1"), "{text}");
        assert_eq!(warnings.len(), 1, "{text}");
        assert!(text.contains("1.0000   4.0000       1.0000  1.0000\n"), "{text}");
        let json = serde_json::to_value(&lines).unwrap();
        assert_eq!((&json[0]["n"], &json[0].get("mse")), (&2.into(), &None));
        assert_eq!(json[1]["base_mse"], 4.0);
    }
}
