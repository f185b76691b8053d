//! The result of a bench, for people and as JSON.

use std::fmt;

use hypercast_kernels::cpu::Isa;
use serde::Serialize;
use serde_json::{Value, json};

/// Units of which less is better.
const LESS_IS_BETTER: [&str; 6] = ["ns", "us", "ms", "s", "bytes", "MiB"];

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
#[derive(Debug, Clone, Default, Serialize)]
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

impl BenchReport {
    /// An empty report of a part on this machine.
    pub fn new(part: &str) -> Self {
        Self { part: part.to_owned(), machine: machine(), results: Vec::new(), notes: Vec::new() }
    }

    /// Adds a figure without a rival, and prints it at once, since a bench takes minutes.
    pub fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(BenchFigure { name: name.into(), value, unit, ..BenchFigure::default() });
    }

    /// Adds a figure beside a rival's value in the same unit. A figure whose rival failed on the
    /// way has no finite value and is left out.
    pub fn versus(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        rival: &str,
        theirs: f64,
    ) {
        let name = name.into();
        if !theirs.is_finite() {
            return self.note(format!("{name}: {rival} failed while it was measured"));
        }
        let is_less_better = LESS_IS_BETTER.contains(&unit);
        let ratio = Some(if is_less_better { theirs / value } else { value / theirs });
        let (rival, rival_value) = (Some(rival.to_owned()), Some(theirs));
        self.add(BenchFigure { id: String::new(), name, value, unit, rival, rival_value, ratio });
    }

    fn add(&mut self, mut figure: BenchFigure) {
        figure.id = format!("{}/{}", self.part, slug(&figure.name));
        eprintln!("{figure}");
        self.results.push(figure);
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
        report.versus("time", 2.0, "ms", "rival", 6.0);
        report.versus("speed", 2.0, "GFLOP/s", "rival", 6.0);
        report.figure("store: p50, alone", 2.0, "ms");
        report.versus("failed", 2.0, "ms", "rival", f64::NAN);
        let ratios: Vec<_> = report.results.iter().map(|figure| figure.ratio).collect();
        assert_eq!(ratios, [Some(3.0), Some(1.0 / 3.0), None]);
        assert_eq!(report.results[2].id, "store/store-p50-alone");
        assert!(report.notes[0].contains("failed"), "{:?}", report.notes);
    }
}
