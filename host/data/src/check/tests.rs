//! Data sets that are wrong in one way each, made of a small simulated one.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::*;
use crate::dataset::timeline::{Span, Timeline};
use crate::dataset::{Entities, ImpressionWriter, write_entities};
use crate::schema::{FeatureKind, Schema};
use crate::simulate::{SimulateOptions, simulate};
use hypercast_fm::example::{Item, User};

/// A data set that can be damaged.
#[derive(Clone)]
struct Parts {
    rows: Vec<Impression>,
    items: Vec<Item>,
    users: Vec<User>,
}

fn into(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("data")
}

/// 600 requests of six rows.
fn sound() -> &'static Parts {
    static SOUND: OnceLock<Parts> = OnceLock::new();
    SOUND.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let options = SimulateOptions {
            into: into(&dir),
            users: 50,
            items: 60,
            requests: 600,
            surfaces: 2,
            seed: 5,
        };
        simulate(&options).unwrap();
        let dataset = Dataset::open(&options.into).unwrap();
        let mut rows: Vec<Impression> =
            dataset.impressions().unwrap().map(Result::unwrap).collect();
        // The world may show an item twice in a request.
        rows.dedup_by_key(|row| (row.request, row.item));
        let mut items: Vec<Item> = dataset.items.values().map(|item| (**item).clone()).collect();
        items.sort_by_key(|item| item.id);
        let mut users: Vec<User> = dataset.users.values().map(|user| (**user).clone()).collect();
        users.sort_by_key(|user| user.id);
        Parts { rows, items, users }
    })
}

fn damaged(damage: impl FnOnce(&mut Parts)) -> (tempfile::TempDir, Dataset) {
    of_schema(&crate::simulate::schema(2), damage)
}

fn of_schema(schema: &Schema, damage: impl FnOnce(&mut Parts)) -> (tempfile::TempDir, Dataset) {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = sound().clone();
    damage(&mut parts);
    let entities = Entities { schema, items: &parts.items, item_names: &[], users: &parts.users };
    write_entities(&into(&dir), &entities).unwrap();
    let mut writer = ImpressionWriter::create(&into(&dir), schema);
    parts.rows.iter().for_each(|row| writer.write_in_any_order(row).unwrap());
    writer.finish().unwrap();
    let dataset = Dataset::open(&into(&dir)).unwrap();
    (dir, dataset)
}

fn report(damage: impl FnOnce(&mut Parts)) -> CheckReport {
    let (_dir, dataset) = damaged(damage);
    check(&dataset).unwrap()
}

/// The first finding of a kind, which has to be there, and be that bad.
fn found(kind: FindingKind, severity: Severity, damage: impl FnOnce(&mut Parts)) -> Finding {
    let report = report(damage);
    let finding = report.findings.iter().find(|finding| finding.kind == kind);
    let finding = finding.unwrap_or_else(|| panic!("no {kind:?}:\n{report}")).clone();
    assert_eq!(finding.severity, severity, "{report}");
    let is_told =
        finding.forced.is_some() || matches!(kind, FindingKind::Unsorted | FindingKind::Empty);
    assert_eq!(is_told, severity == Severity::Refused, "--force says what it does: {finding:?}");
    finding
}

/// Whether a finding of a kind says something.
fn says(kind: FindingKind, words: &str, damage: impl FnOnce(&mut Parts)) {
    let report = report(damage);
    let mut found = report.findings.iter().filter(|finding| finding.kind == kind);
    assert!(found.any(|finding| finding.what.contains(words)), "no {words:?}:\n{report}");
}

/// The row number of the first finding of a kind.
fn row_of(kind: FindingKind, severity: Severity, damage: impl FnOnce(&mut Parts)) -> u64 {
    found(kind, severity, damage).row.expect("a row")
}

fn click(row: &Impression) -> bool {
    row.outcome.actions & 1 == 1
}

use FindingKind as Kind;
use Severity::{Noted, Refused, Warned};

#[test]
fn a_sound_data_set_is_admitted_and_its_labels_are_counted() {
    let (_dir, dataset) = damaged(|_| ());
    let report = admit(&dataset, false).unwrap();
    assert!(!report.is_refused() && report.of(Warned).next().is_none(), "{report}");
    assert_eq!((report.requests, report.rows as usize), (600, sound().rows.len()));
    let click_rows = sound().rows.iter().filter(|row| row.surface == 0);
    let clicks = click_rows.clone().filter(|row| click(row)).count() as u64;
    let count = &report.labels[0];
    assert_eq!((&*count.surface, &*count.task), ("feed", "click"));
    assert_eq!((count.rows, count.positives), (click_rows.count() as u64, Some(clicks)));
    let back: CheckReport = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
    assert_eq!(back.findings, report.findings);
}

#[test]
fn rows_out_of_order_are_an_error_wherever_they_are_read() {
    let shuffle = |parts: &mut Parts| {
        let first_ms = parts.rows[0].time_ms;
        parts.rows[100].time_ms = first_ms - 1;
    };
    let (_dir, dataset) = damaged(shuffle);
    let said = dataset.impressions().unwrap().find_map(Result::err).unwrap().to_string();
    assert!(said.contains("row 101") && said.contains("sort the rows"), "{said}");
    let mut steps = Timeline::new(&dataset, Span::default()).unwrap();
    assert_eq!(steps.find_map(Result::err).unwrap().to_string(), said);
    let said = admit(&dataset, true).unwrap_err().to_string();
    assert!(said.contains("row 101") && said.contains("--force does not help"), "{said}");
    let finding = found(Kind::Unsorted, Refused, shuffle);
    assert_eq!((finding.row, finding.count), (Some(101), 1));
}

#[test]
fn what_is_refused_trains_only_by_force_and_each_finding_says_how() {
    let (_dir, dataset) = damaged(|parts| parts.rows[7].outcome_ms = parts.rows[7].time_ms - 1);
    let said = admit(&dataset, false).unwrap_err().to_string();
    assert!(said.contains("impressions.parquet, row 8, column `outcome_ms`"), "{said}");
    assert!(said.contains("hypercast data check") && said.contains("--force"), "{said}");
    assert!(admit(&dataset, true).unwrap().is_refused());
}

#[test]
fn requests_that_are_no_requests_are_found() {
    found(Kind::Empty, Refused, |parts| parts.rows.clear());
    let both_at_once = |parts: &mut Parts| {
        let (time_ms, late_ms) = (parts.rows[0].time_ms, parts.rows[40].outcome_ms);
        for row in &mut parts.rows[..20] {
            (row.time_ms, row.outcome_ms) = (time_ms, late_ms);
        }
    };
    let scattered = row_of(Kind::ScatteredRequest, Refused, |parts| {
        both_at_once(parts);
        let first = parts.rows.remove(0);
        parts.rows.insert(10, first);
    });
    assert_eq!(scattered, 11);
    assert_eq!(row_of(Kind::MixedRequest, Refused, |parts| parts.rows[1].user += 1), 2);
    let apart = |parts: &mut Parts| parts.rows[0].time_ms -= 5;
    assert_eq!(row_of(Kind::RepeatedRequest, Warned, apart), 2);
    let twice = |parts: &mut Parts| parts.rows[1].item = parts.rows[0].item;
    assert_eq!(row_of(Kind::RepeatedItem, Warned, twice), 2);
    let copied = row_of(Kind::RepeatedRow, Warned, |parts| {
        let copies = parts.rows[..6].iter().filter(|row| row.request == parts.rows[0].request);
        let copies: Vec<Impression> =
            copies.map(|row| Impression { request: 1 << 40, ..row.clone() }).collect();
        let at = copies.len();
        parts.rows.splice(at..at, copies);
    });
    assert!((3..=7).contains(&copied), "{copied}");
    let large = found(Kind::LargeRequest, Warned, |parts| {
        let (request, last_ms) = (parts.rows[0].request, parts.rows.last().unwrap().time_ms);
        let (user, surface) = (parts.rows[0].user, parts.rows[0].surface);
        for row in &mut parts.rows {
            (row.request, row.time_ms, row.user, row.surface) = (request, last_ms, user, surface);
        }
    });
    assert!(large.what.contains("fm.max_targets"), "{large}");
}

#[test]
fn times_of_another_unit_or_year_are_found() {
    let scaled = |scale: fn(i64) -> i64| {
        move |parts: &mut Parts| {
            for row in &mut parts.rows {
                (row.time_ms, row.outcome_ms) = (scale(row.time_ms), scale(row.outcome_ms));
            }
        }
    };
    let seconds = found(Kind::TimeUnit, Refused, scaled(|ms| ms / 1000));
    assert!(seconds.what.contains("seconds") && seconds.row == Some(1), "{seconds}");
    let micros = found(Kind::TimeUnit, Refused, scaled(|ms| ms * 1000));
    assert!(micros.what.contains("microseconds"), "{micros}");
    // A clock of its own is possible; rows without a time among others are not.
    found(Kind::TimeRange, Warned, scaled(|ms| ms - sound().rows[0].time_ms));
    let missing = |parts: &mut Parts| parts.rows[0].time_ms = 0;
    assert_eq!(row_of(Kind::TimeRange, Refused, missing), 1);
    let far = |parts: &mut Parts| parts.rows.last_mut().unwrap().time_ms = 7_500_000_000_000;
    assert!(found(Kind::TimeRange, Refused, far).what.contains("2207"));
    let to_come = |parts: &mut Parts| parts.rows.last_mut().unwrap().time_ms = 4_000_000_000_000;
    assert!(found(Kind::FutureTime, Warned, to_come).what.contains("still to come, up to 2096"));
    let early = |parts: &mut Parts| parts.rows[7].outcome_ms = parts.rows[7].time_ms - 1;
    assert_eq!(row_of(Kind::EarlyOutcome, Refused, early), 8);
    found(Kind::InstantOutcome, Noted, |parts| {
        parts.rows.iter_mut().for_each(|row| row.outcome_ms = row.time_ms);
    });
}

#[test]
fn ids_without_features_and_features_without_ids_are_found() {
    let wrong = found(Kind::UnknownId, Refused, |parts| {
        parts.items.iter_mut().for_each(|item| item.id += 1_000_000);
    });
    assert_eq!((wrong.column.as_deref(), wrong.row), (Some("item"), Some(1)));
    let few = found(Kind::UnknownId, Warned, |parts| drop(parts.users.drain(..5)));
    assert_eq!(few.column.as_deref(), Some("user"));
    let unused = found(Kind::UnusedId, Noted, |parts| {
        let last = parts.items.last().unwrap().clone();
        parts.items.push(Item { id: last.id + 1, ..last });
    });
    assert_eq!(unused.file, "items.parquet");
    let twice = |parts: &mut Parts| parts.items.push(parts.items[0].clone());
    assert_eq!(row_of(Kind::RepeatedId, Warned, twice), 61);
    let infinite = |parts: &mut Parts| parts.items[3].dense[0] = f32::INFINITY;
    assert_eq!(found(Kind::NotFinite, Refused, infinite).column.as_deref(), Some("length"));
    let infinite = |parts: &mut Parts| parts.rows[3].context.dense[0] = f32::NEG_INFINITY;
    assert_eq!(row_of(Kind::NotFinite, Refused, infinite), 4);
}

#[test]
fn labels_that_teach_nothing_or_move_are_found() {
    let unknown = found(Kind::NoLabels, Warned, |parts| {
        parts.rows.iter_mut().for_each(|row| row.outcome.known &= !1);
    });
    assert!(unknown.what.contains("task click has no label"), "{unknown}");
    let never = found(Kind::OneClass, Warned, |parts| {
        parts.rows.iter_mut().for_each(|row| row.outcome.actions &= !2);
    });
    assert!(never.what.contains("task like has no positive"), "{never}");
    let never_there = found(Kind::OneClass, Noted, |parts| {
        let rows = parts.rows.iter_mut().filter(|row| row.surface == 1);
        rows.for_each(|row| row.outcome.actions &= !1);
    });
    assert!(never_there.what.contains("one class alone on search"), "{never_there}");
    let infinite = |parts: &mut Parts| parts.rows[3].outcome.values[0] = f32::INFINITY;
    assert_eq!(row_of(Kind::NotFinite, Refused, infinite), 4);
    let huge = |parts: &mut Parts| parts.rows[10].outcome.values[0] = 1e7;
    assert_eq!(row_of(Kind::HugeValue, Warned, huge), 11);
    let drift = found(Kind::LabelDrift, Warned, |parts| {
        let half = parts.rows.len() / 2;
        parts.rows[..half].iter_mut().for_each(|row| row.outcome.actions &= !1);
        parts.rows[..half].iter_mut().step_by(20).for_each(|row| row.outcome.actions |= 1);
    });
    assert!(drift.what.contains("the rate of task click is 0.05"), "{drift}");
}

#[test]
fn surfaces_and_features_that_move_are_found() {
    let later = |first: bool| {
        move |parts: &mut Parts| {
            let half = parts.rows.len() / 2;
            let rows = if first { &mut parts.rows[..half] } else { &mut parts.rows[half..] };
            rows.iter_mut().for_each(|row| row.surface = 0);
        }
    };
    says(Kind::MovedSurface, "search appears only after 50 %", later(true));
    says(Kind::MovedSurface, "search vanishes after 50 %", later(false));
    says(Kind::MovedSurface, "surface search has", |parts| {
        let half = parts.rows.len() / 2;
        let rows = parts.rows[..half].iter_mut().filter(|row| !row.request.is_multiple_of(8));
        rows.for_each(|row| row.surface = 0);
    });
    found(Kind::MovedSurface, Noted, |parts| {
        parts.rows.iter_mut().for_each(|row| row.surface = 0);
    });
    let drift = found(Kind::FeatureDrift, Warned, |parts| {
        let half = parts.rows.len() / 2;
        parts.rows[half..].iter_mut().for_each(|row| row.context.dense[0] += 5.0);
    });
    assert_eq!(drift.column.as_deref(), Some("battery"));
    let never = |parts: &mut Parts| {
        parts.rows.iter_mut().for_each(|row| row.context.dense[0] = f32::NAN);
    };
    assert_eq!(found(Kind::MissingFeature, Warned, never).column.as_deref(), Some("battery"));
    let rarely = found(Kind::MissingFeature, Noted, |parts| {
        parts.rows.iter_mut().step_by(10).for_each(|row| row.context.dense[0] = f32::NAN);
    });
    assert!(rarely.what.starts_with("10.0 % of its cells") && rarely.row.is_none(), "{rarely}");
    let missing = found(Kind::FeatureDrift, Warned, |parts| {
        let half = parts.rows.len() / 2;
        parts.rows[half..].iter_mut().for_each(|row| row.context.ids[0] = 0);
    });
    assert!(missing.what.contains("100.0 % in the second"), "{missing}");
}

#[test]
fn a_position_that_requests_would_have_to_send_is_warned_of() {
    let mut schema = crate::simulate::schema(2);
    let renamed = |schema: &mut Schema, name: &str| {
        schema.context_features.iter_mut().for_each(|feature| match feature.kind {
            FeatureKind::Dense => feature.name = name.into(),
            FeatureKind::Categorical => {}
        });
        schema.ranges.clear();
    };
    let positions = |schema: &Schema| -> Vec<Finding> {
        let (_dir, dataset) = of_schema(schema, |_| ());
        let findings = check(&dataset).unwrap().findings;
        findings.into_iter().filter(|finding| finding.kind == Kind::SentPosition).collect()
    };
    for name in ["list_position", "pos", "ad_slot"] {
        renamed(&mut schema, name);
        let found = positions(&schema);
        assert_eq!((found.len(), found[0].severity), (1, Warned), "{found:?}");
        assert_eq!(found[0].column.as_deref(), Some(name));
        assert!(found[0].advice.contains("with `training_only = true` in schema.toml"));
    }
    for name in ["time_slot", "posts"] {
        renamed(&mut schema, name);
        assert_eq!(positions(&schema), [], "{name}");
    }
    renamed(&mut schema, "rank");
    schema.context_features.iter_mut().for_each(|feature| feature.training_only = true);
    assert_eq!(positions(&schema), []);
}

#[test]
fn a_feature_that_gives_a_label_away_is_refused() {
    let leak = |damage: fn(&mut Impression)| {
        let finding = found(Kind::Leak, Refused, |parts| parts.rows.iter_mut().for_each(damage));
        (finding.column.clone().unwrap(), finding.what)
    };
    // Known only where it was clicked, whatever its number.
    let (column, what) = leak(|row| {
        let sign = if row.item.is_multiple_of(2) { 1.0 } else { -1.0 };
        row.context.dense[0] = if click(row) { sign * (1 + row.item) as f32 } else { 0.0 };
    });
    assert!(column == "battery" && what.contains("label of task click with an AUC of"), "{what}");
    let (column, _) = leak(|row| row.context.ids[0] = if click(row) { 3 } else { 4 });
    assert_eq!(column, "device");
    says(Kind::Leak, "task watch with a correlation of ranks of", |parts| {
        parts.rows.iter_mut().for_each(|row| row.context.dense[0] = 3.0 - row.outcome.values[0]);
    });
    // An id of every row tells nothing of others.
    let unique = report(|parts| {
        for (at, row) in parts.rows.iter_mut().enumerate() {
            row.context.ids[0] = 1000 + at as u64;
        }
    });
    assert!(!unique.is_refused(), "{unique}");
}
