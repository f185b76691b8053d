//! `cargo xtask bench`: runs the benches in release, keeps their figures in one JSON file, and
//! writes the README's table from it. `figures.toml` says what each row shows.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    options::Options,
    process::{cargo, commit, now, repository_root, target},
};

/// The rows of the table and the parts that are run.
const TABLE: &str = include_str!("../figures.toml");

/// Where the figures are kept unless `--json` says otherwise.
const DEFAULT_JSON: &str = "tests/figures.json";

const README: &str = "README.md";
const BEGIN: &str = "<!-- figures:begin -->";
const END: &str = "<!-- figures:end -->";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// Cargo features of the build.
    features: Vec<String>,
    part: Vec<Part>,
    row: Vec<Row>,
}

/// A part of `hypercast-lab bench`, in the order in which they run.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    name: String,
    /// Passed to the bench.
    #[serde(default)]
    options: Vec<String>,
}

/// A row of the README's table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// The first column.
    what: String,
    part: String,
    /// The group that `--only` names, for the command that reproduces the row.
    only: Option<String>,
    /// Names of figures; `*` at the end stands for any ending.
    figures: Vec<String>,
    /// The rivals that are shown, by name; all if missing.
    rivals: Option<Vec<String>>,
}

/// All figures, as the JSON file has them.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Figures {
    parts: BTreeMap<String, Measured>,
}

/// A part's figures and what they are of.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measured {
    date: String,
    commit: String,
    #[serde(flatten)]
    report: Report,
}

/// What `hypercast-lab bench PART --json FILE` writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Report {
    machine: Value,
    results: Vec<Figure>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
    rival: Option<String>,
    rival_value: Option<f64>,
    /// How many times better ours is; below 1 the rival is.
    ratio: Option<f64>,
}

/// Runs the parts, or takes the figures `--from` a file, and writes the README's table. `false`
/// if a part failed; the figures of the others are kept.
pub fn run(options: Options) -> Result<bool> {
    let root = repository_root()?;
    let table: Table = toml::from_str(TABLE).context("tests/xtask/figures.toml")?;
    let (figures, passed) = match options.value("from") {
        Some(path) => (read(Path::new(path))?, true),
        None => measure(&root, &table, &options)?,
    };
    let path = root.join(README);
    let readme = std::fs::read_to_string(&path)?;
    let rendered = render(&table, &figures)?;
    std::fs::write(&path, replaced(&readme, &rendered)?)?;
    println!("{README}: {} rows", table.row.len());
    Ok(passed)
}

fn read(path: &Path) -> Result<Figures> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}: no figures", path.display()))
}

/// Builds and runs the parts. With `--parts` the file's figures of the others are kept.
fn measure(root: &Path, table: &Table, options: &Options) -> Result<(Figures, bool)> {
    let names: Vec<&str> = table.part.iter().map(|part| part.name.as_str()).collect();
    let chosen = options.choice("parts", &names)?;
    let json = options.value("json").map_or_else(|| root.join(DEFAULT_JSON), |path| path.into());
    let is_partial = chosen.len() < names.len();
    let mut figures = if is_partial && json.is_file() { read(&json)? } else { Figures::default() };

    let target = target(root);
    let components = target.join("hypercast");
    for folder in ["plugins", "hostile"].map(|folder| components.join(folder)) {
        let folder = folder.display();
        ensure!(Path::new(&folder.to_string()).is_dir(), "{folder} is missing; run `cargo verify`");
    }
    // With the daemon, whose processes the parts `serving` and `lifecycle` start.
    let build = ["build", "--release", "-p", "hypercast", "-p", "hypercast-lab", "--features"];
    let status = cargo().args(build).arg(table.features.join(",")).current_dir(root).status()?;
    ensure!(status.success(), "building hypercast and hypercast-lab failed");

    // Before the figures change the working tree.
    let commit = commit(root)?;
    let work = target.join("bench");
    std::fs::create_dir_all(&work)?;
    let mut passed = true;
    for part in table.part.iter().filter(|part| chosen.contains(&part.name.as_str())) {
        let out = work.join(format!("{}.json", part.name));
        println!("== {}", part.name);
        let status = Command::new(target.join("release/hypercast-lab"))
            .args(["bench", &part.name, "--json"])
            .arg(&out)
            .arg("--plugins")
            .arg(components.join("plugins"))
            .arg("--hostile")
            .arg(components.join("hostile"))
            .args(&part.options)
            .args(&options.rest)
            .current_dir(root)
            .status()
            .context("cannot run hypercast-lab")?;
        if !status.success() {
            eprintln!("bench {}: failed with {status}", part.name);
            passed = false;
            continue;
        }
        let report = serde_json::from_str(&std::fs::read_to_string(&out)?)
            .with_context(|| format!("{}: not a report", out.display()))?;
        let measured = Measured { date: now()?, commit: commit.clone(), report };
        figures.parts.insert(part.name.clone(), measured);
        std::fs::write(&json, serde_json::to_string_pretty(&figures)? + "\n")
            .with_context(|| format!("cannot write {}", json.display()))?;
    }
    Ok((figures, passed))
}

/// The text with the lines between the two markers replaced.
fn replaced(readme: &str, rendered: &str) -> Result<String> {
    let marker = |marker: &str| {
        let mut found = readme.match_indices(marker);
        let at = found.next().map(|(at, _)| at);
        ensure!(found.next().is_none(), "{README} has `{marker}` twice");
        at.with_context(|| format!("{README} has no line `{marker}`"))
    };
    let (begin, end) = (marker(BEGIN)? + BEGIN.len(), marker(END)?);
    ensure!(begin <= end, "{README} has its markers of figures the wrong way round");
    Ok(format!("{}\n{rendered}{}", &readme[..begin], &readme[end..]))
}

/// The table, and below it the machine and what could not be measured.
///
/// # Errors
/// A name in `figures.toml` that a part which was measured does not have.
fn render(table: &Table, figures: &Figures) -> Result<String> {
    let mut text =
        String::from("| what | ours | rival | ratio | reproduce |\n|---|---|---|---|---|\n");
    let mut unknown = Vec::new();
    for row in &table.row {
        let cells = match figures.parts.get(&row.part) {
            Some(measured) => Cells::of(row, &measured.report, &mut unknown),
            None => Cells { ours: "not measured".to_owned(), ..Cells::default() },
        };
        let only = row.only.iter().map(|only| format!(" --only {only}")).collect::<String>();
        text += &format!(
            "| {} | {} | {} | {} | `bench {}{only}` |\n",
            row.what, cells.ours, cells.rivals, cells.ratios, row.part
        );
    }
    ensure!(
        unknown.is_empty(),
        "tests/xtask/figures.toml names figures that were not measured: {}",
        unknown.join("; ")
    );
    Ok(text + &caption(figures))
}

/// Where and when the figures were taken, a line for each machine and commit.
fn caption(figures: &Figures) -> String {
    let mut places: Vec<String> = Vec::new();
    let mut notes: Vec<&str> = Vec::new();
    for measured in figures.parts.values() {
        let machine = &measured.report.machine;
        let word = |key: &str| machine[key].as_str().unwrap_or("unknown").to_owned();
        let day = measured.date.get(..10).unwrap_or(&measured.date);
        let place = format!(
            "{}, {} threads, {}; commit {}, {day}.",
            word("cpu"),
            machine["threads"],
            word("instructions"),
            measured.commit
        );
        if !places.contains(&place) {
            places.push(place);
        }
        notes.extend(measured.report.notes.iter().map(String::as_str));
    }
    notes.dedup();
    let notes = notes.iter().map(|note| format!("- {note}\n")).collect::<String>();
    let heading = if notes.is_empty() { "" } else { "\nNot measured:\n\n" };
    format!("\n{}\n{heading}{notes}", places.join("\n"))
}

/// A row's cells but the first and the last.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cells {
    ours: String,
    rivals: String,
    ratios: String,
}

impl Cells {
    /// The figures of a row side by side, and that for each rival. Names without a figure are
    /// added to `unknown`.
    fn of(row: &Row, report: &Report, unknown: &mut Vec<String>) -> Self {
        let mut by_rival: Vec<(Option<&str>, Vec<&Figure>)> = Vec::new();
        for name in &row.figures {
            let found = report.results.iter().filter(|figure| is_match(name, &figure.name));
            let found: Vec<&Figure> = found.collect();
            if found.is_empty() {
                unknown.push(format!("{}: {name}", row.part));
            }
            let is_shown = |figure: &&&Figure| match (&row.rivals, &figure.rival) {
                (Some(rivals), Some(rival)) => rivals.contains(rival),
                _ => true,
            };
            let shown: Vec<&Figure> = found.iter().filter(is_shown).copied().collect();
            // A rival that is not installed leaves our own figure.
            let alone = found.first().filter(|_| shown.is_empty()).copied();
            for figure in shown.into_iter().chain(alone) {
                let rival = figure.rival.as_deref().filter(|_| alone.is_none());
                match by_rival.iter_mut().find(|(other, _)| *other == rival) {
                    Some((_, figures)) => figures.push(figure),
                    None => by_rival.push((rival, vec![figure])),
                }
            }
        }
        let mut cells: [Vec<String>; 3] = Default::default();
        for (rival, figures) in by_rival {
            // A unit that all share is written once, behind the last value.
            let is_shared = figures.iter().all(|figure| figure.unit == figures[0].unit);
            let (shared, own) = if is_shared { (&*figures[0].unit, false) } else { ("", true) };
            let ours = side_by_side(figures.iter().map(|figure| {
                let unit = if own { &*figure.unit } else { "" };
                format!("{} {unit}", short(figure.value)).trim_end().to_owned()
            }));
            cells[0].push(format!("{ours} {shared}").trim_end().to_owned());
            let Some(rival) = rival else { continue };
            let values = figures.iter().filter_map(|figure| figure.rival_value);
            cells[1].push(format!("{} {rival}", side_by_side(values.map(short))));
            let ratios = figures.iter().filter_map(|figure| figure.ratio);
            cells[2].push(side_by_side(ratios.map(|ratio| format!("{}x", short_ratio(ratio)))));
        }
        cells[0].dedup();
        let [ours, rivals, ratios] = cells.map(|parts| parts.join("; "));
        Self { ours, rivals, ratios }
    }
}

fn is_match(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

fn side_by_side(values: impl Iterator<Item = String>) -> String {
    values.collect::<Vec<_>>().join(" / ")
}

/// A value with three digits that count.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    grouped(&format!("{value:.digits$}"))
}

/// A ratio with two digits that count.
fn short_ratio(ratio: f64) -> String {
    let digits = match ratio {
        size if size >= 10.0 => 0,
        size if size >= 1.0 => 1,
        _ => 2,
    };
    format!("{ratio:.digits$}")
}

/// Commas between thousands, where there are more than four digits.
fn grouped(number: &str) -> String {
    let digits = number.strip_prefix('-').unwrap_or(number);
    if digits.len() < 5 || digits.contains('.') {
        return number.to_owned();
    }
    let mut text = number[..number.len() - digits.len()].to_owned();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &str, value: f64, rival: Option<(&str, f64)>) -> Figure {
        Figure {
            name: name.to_owned(),
            value,
            unit: "ms".to_owned(),
            rival: rival.map(|(name, _)| name.to_owned()),
            rival_value: rival.map(|(_, value)| value),
            ratio: rival.map(|(_, theirs)| theirs / value),
        }
    }

    fn row(figures: &[&str]) -> Row {
        Row {
            what: "a request".to_owned(),
            part: "serving".to_owned(),
            only: Some("load".to_owned()),
            figures: figures.iter().map(|name| name.to_string()).collect(),
            rivals: None,
        }
    }

    fn cells(row: &Row, results: Vec<Figure>) -> [String; 3] {
        let report = Report { machine: Value::Null, results, notes: Vec::new() };
        let mut unknown = Vec::new();
        let cells = Cells::of(row, &report, &mut unknown);
        assert_eq!(unknown, [""; 0]);
        [cells.ours, cells.rivals, cells.ratios]
    }

    #[test]
    fn figures_of_a_row_and_rivals_of_a_figure_are_side_by_side() {
        let torch = |name, value| figure(name, value, Some(("PyTorch", 30.0)));
        let of_two =
            cells(&row(&["p50", "p99*"]), vec![torch("p50", 10.0), torch("p99 (1)", 20.0)]);
        assert_eq!(of_two, ["10.0 / 20.0 ms", "30.0 / 30.0 PyTorch", "3.0x / 1.5x"]);
        let both = vec![torch("p50", 10.0), figure("p50", 10.0, Some(("Burn", 5.0)))];
        let of_both = cells(&row(&["p50"]), both.clone());
        assert_eq!(of_both, ["10.0 ms", "30.0 PyTorch; 5.00 Burn", "3.0x; 0.50x"]);
        let one = Row { rivals: Some(vec!["Burn".to_owned()]), ..row(&["p50"]) };
        assert_eq!(cells(&one, both), ["10.0 ms", "5.00 Burn", "0.50x"]);
        let missing = Row { rivals: Some(vec!["redb".to_owned()]), ..row(&["p50"]) };
        assert_eq!(cells(&missing, vec![torch("p50", 10.0)]), ["10.0 ms", "", ""]);
        assert_eq!(cells(&row(&["p50"]), vec![figure("p50", 0.5, None)]), ["0.500 ms", "", ""]);
    }

    fn measured(results: Vec<Figure>) -> Figures {
        let machine = serde_json::json!({"cpu": "A", "threads": 2, "instructions": "Avx512"});
        let report = Report { machine, results, notes: vec!["NATS: not in PATH".to_owned()] };
        let date = "2025-12-01T10:00:00Z".to_owned();
        let measured = Measured { date, commit: "abc".to_owned(), report };
        Figures { parts: [("serving".to_owned(), measured)].into() }
    }

    #[test]
    fn the_readme_gets_a_table_with_the_machine() {
        let other = Row { part: "store".to_owned(), only: None, ..row(&["x"]) };
        let table =
            Table { features: Vec::new(), part: Vec::new(), row: vec![row(&["p50"]), other] };
        let figures = measured(vec![figure("p50", 19_968.0, None)]);
        let text = render(&table, &figures).unwrap();
        let readme = format!("# A\n\n{BEGIN}\nold\n{END}\n\nB\n");
        let expected = format!(
            "# A\n\n{BEGIN}\n| what | ours | rival | ratio | reproduce |\n|---|---|---|---|---|\n\
             | a request | 19,968 ms |  |  | `bench serving --only load` |\n\
             | a request | not measured |  |  | `bench store` |\n\n\
             A, 2 threads, Avx512; commit abc, 2025-12-01.\n\nNot measured:\n\n- NATS: not in PATH\n{END}\n\nB\n"
        );
        let written = replaced(&readme, &text).unwrap();
        assert_eq!(written, expected);
        assert_eq!(replaced(&written, &text).unwrap(), expected, "writing twice changes nothing");
        assert!(replaced("# A\n", &text).is_err());
        let renamed = measured(vec![figure("median", 1.0, None)]);
        let error = render(&table, &renamed).unwrap_err().to_string();
        assert!(error.contains("serving: p50"), "{error}");
    }

    #[test]
    fn the_table_of_figures_is_read_and_its_rows_are_of_parts_that_run() {
        let table: Table = toml::from_str(TABLE).unwrap();
        for row in &table.row {
            assert!(table.part.iter().any(|part| part.name == row.part), "{}", row.what);
        }
    }

    #[test]
    fn a_report_of_the_lab_is_read_and_kept() {
        let text = r#"{"machine": {"cpu": "A"}, "results": [{"name": "a", "value": 1.5, "unit": "ms",
            "rival": "b", "rival_value": 3.0, "ratio": 2.0}, {"name": "c", "value": 1.0, "unit": "",
            "rival": null, "rival_value": null, "ratio": null}]}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        let date = "2025-12-01T10:00:00Z".to_owned();
        let measured = Measured { date, commit: "abc".to_owned(), report };
        let figures = Figures { parts: [("kernels".to_owned(), measured)].into() };
        let kept = serde_json::to_value(&figures).unwrap();
        assert_eq!(kept["parts"]["kernels"]["results"][0]["ratio"], 2.0);
        let again: Figures = serde_json::from_value(kept).unwrap();
        assert_eq!(again.parts["kernels"].report.results.len(), 2);
    }

    #[test]
    fn numbers_have_the_digits_that_count() {
        assert_eq!(short(0.1234), "0.123");
        assert_eq!(short(1.39), "1.39");
        assert_eq!(short(16.94), "16.9");
        assert_eq!(short(847.9), "848");
        assert_eq!(short(1_163_683.0), "1,163,683");
        assert_eq!(short(0.0), "0");
        assert_eq!((short_ratio(15.9).as_str(), short_ratio(0.584).as_str()), ("16", "0.58"));
    }
}
