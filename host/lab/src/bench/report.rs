//! What a bench found, for people and as JSON.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The machine and the versions of everything that was measured.
    pub machine: Value,
    /// The figures, in the order in which they were taken.
    pub results: Vec<Figure>,
    /// What could not be measured, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One figure, and the rival's in the same run.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured, with its size.
    pub name: String,
    /// Ours.
    pub value: f64,
    /// Of both values.
    pub unit: &'static str,
    /// Who it is compared with; none where a figure stands alone.
    pub rival: Option<String>,
    /// The rival's.
    pub rival_value: Option<f64>,
    /// How many times better ours is, whatever the unit; below 1 the rival is better.
    pub ratio: Option<f64>,
}

/// A rival's figure.
#[derive(Debug, Clone)]
pub struct Rival {
    /// Who.
    pub name: String,
    /// Its figure, in the unit of ours.
    pub value: f64,
}

/// Units of which less is better.
const LESS_IS_BETTER: [&str; 4] = ["ms", "us", "s", "bytes"];

impl Report {
    /// Nothing measured yet.
    pub fn new(machine: Value) -> Self {
        Self { machine, results: Vec::new(), notes: Vec::new() }
    }

    /// Adds a figure, and tells it at once: a bench takes minutes.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        (value, unit): (f64, &'static str),
        rival: Option<Rival>,
    ) {
        let ratio = rival.as_ref().map(|rival| match LESS_IS_BETTER.contains(&unit) {
            true => rival.value / value,
            false => value / rival.value,
        });
        let figure = Figure {
            name: name.into(),
            value,
            unit,
            rival_value: rival.as_ref().map(|rival| rival.value),
            rival: rival.map(|rival| rival.name),
            ratio,
        };
        eprintln!("{figure}");
        self.results.push(figure);
    }

    /// Says what could not be measured.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("{note}");
        self.notes.push(note);
    }

    /// Records a version of something that was measured.
    pub fn version(&mut self, of: &str, version: &str) {
        self.machine["versions"][of] = version.into();
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<64} {:>10} {:<11}", self.name, short(self.value), self.unit)?;
        match (&self.rival, self.rival_value, self.ratio) {
            (Some(rival), Some(value), Some(ratio)) => {
                write!(f, " {:>10} {rival}, {ratio:.2}x", short(value))
            }
            _ => Ok(()),
        }
    }
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine)?;
        self.results.iter().try_for_each(|figure| writeln!(f, "{figure}"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "not measured: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_better_whatever_the_unit() {
        let mut report = Report::new(Value::Null);
        let rival = |value| Some(Rival { name: "rival".into(), value });
        report.add("time", (2.0, "ms"), rival(6.0));
        report.add("speed", (2.0, "GFLOP/s"), rival(6.0));
        report.add("alone", (2.0, "ms"), None);
        let ratios: Vec<_> = report.results.iter().map(|figure| figure.ratio).collect();
        assert_eq!(ratios, [Some(3.0), Some(1.0 / 3.0), None]);
    }
}
