//! The result of a bench, for people and as JSON.

use std::fmt;

use hypercast_kernels::cpu::Isa;
use serde::Serialize;
use serde_json::{Value, json};

/// Units of which less is better.
const LESS_IS_BETTER: [&str; 5] = ["ms", "us", "s", "bytes", "MiB"];

/// The result of one part, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// The part's name on the command line.
    pub part: String,
    /// The machine, the build, and the versions of everything that was measured.
    pub machine: Value,
    /// In the order in which they were measured.
    pub results: Vec<BenchFigure>,
    /// What could not be measured, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One figure, and a rival's in the same run.
#[derive(Debug, Clone, Serialize)]
pub struct BenchFigure {
    /// Stable key: the part, and the name in lower case with dashes.
    pub id: String,
    /// What was measured, with its size.
    pub name: String,
    /// Our value.
    pub value: f64,
    /// Unit of both values.
    pub unit: &'static str,
    /// What ours is compared with, if anything.
    pub rival: Option<String>,
    /// The rival's value.
    pub rival_value: Option<f64>,
    /// How many times better ours is, whatever the unit; below 1 the rival is better.
    pub ratio: Option<f64>,
}

impl BenchFigure {
    /// A figure without a rival. Its id is complete once it is in a report.
    pub fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        let name = name.into();
        Self { id: slug(&name), name, value, unit, rival: None, rival_value: None, ratio: None }
    }

    /// The figure beside a rival's value in the same unit.
    pub fn versus(mut self, rival: impl Into<String>, value: f64) -> Self {
        let is_less_better = LESS_IS_BETTER.contains(&self.unit);
        self.ratio = Some(if is_less_better { value / self.value } else { self.value / value });
        self.rival = Some(rival.into());
        self.rival_value = Some(value);
        self
    }
}

impl BenchReport {
    /// An empty report of a part on this machine.
    pub fn new(part: &str) -> Self {
        Self { part: part.to_owned(), machine: machine(), results: Vec::new(), notes: Vec::new() }
    }

    /// Adds a figure and prints it at once, since a bench takes minutes. A figure whose rival
    /// failed on the way has no finite ratio and is left out.
    pub fn add(&mut self, mut figure: BenchFigure) {
        if figure.rival_value.is_some_and(|value| !value.is_finite()) {
            let rival = figure.rival.unwrap_or_default();
            return self.note(format!("{}: {rival} failed while it was measured", figure.name));
        }
        figure.id = format!("{}/{}", self.part, figure.id);
        eprintln!("{figure}");
        self.results.push(figure);
    }

    /// Adds a figure without a rival.
    pub fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(BenchFigure::new(name, value, unit));
    }

    /// Adds a figure beside a rival's value in the same unit.
    pub fn versus(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        rival: &str,
        theirs: f64,
    ) {
        self.add(BenchFigure::new(name, value, unit).versus(rival, theirs));
    }

    /// Records what could not be measured.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("{note}");
        self.notes.push(note);
    }

    /// Records the version of something that was measured.
    pub fn version(&mut self, of: &str, version: &str) {
        self.machine["versions"][of] = version.into();
    }
}

/// CPU, memory and build. Figures of a build with debug assertions are not comparable.
fn machine() -> Value {
    let line = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let found = text.lines().find(|line| line.starts_with(key)).map(str::to_owned);
        found.and_then(|line| line.split_once(':').map(|(_, value)| value.trim().to_owned()))
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    json!({
        "cpu": line("/proc/cpuinfo", "model name"),
        "threads": threads,
        "memory": line("/proc/meminfo", "MemTotal"),
        "instructions": format!("{:?}", Isa::best()),
        "os": std::env::consts::OS,
        "debug_assertions": cfg!(debug_assertions),
        // The workspace pins Burn to this version.
        "versions": { "hypercast": env!("CARGO_PKG_VERSION"), "burn": "0.21.0" },
    })
}

/// Lower case, with one dash for everything that is neither a letter nor a digit.
fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

impl fmt::Display for BenchFigure {
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

/// At least three significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

impl fmt::Display for BenchReport {
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
        let mut report = BenchReport::new("store");
        report.add(BenchFigure::new("time", 2.0, "ms").versus("rival", 6.0));
        report.add(BenchFigure::new("speed", 2.0, "GFLOP/s").versus("rival", 6.0));
        report.add(BenchFigure::new("store: p50, alone", 2.0, "ms"));
        report.add(BenchFigure::new("failed", 2.0, "ms").versus("rival", f64::NAN));
        let ratios: Vec<_> = report.results.iter().map(|figure| figure.ratio).collect();
        assert_eq!(ratios, [Some(3.0), Some(1.0 / 3.0), None]);
        assert_eq!(report.results[2].id, "store/store-p50-alone");
        assert!(report.notes[0].contains("failed"), "{:?}", report.notes);
    }
}
