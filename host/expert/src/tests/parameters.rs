//! Parameter files: round trip, warm start, and what is refused.

use std::path::Path;

use hypercast_fm::label_scale::LabelScale;

use super::build::{Net, description, parameters};
use crate::params::{Parameters, SavedParameters};
use crate::wasm::contract::{Column, Initialiser, TaskKind};

fn graph(hidden: u32, extra: bool) -> std::sync::Arc<crate::graph::ExpertGraph> {
    let description = description(vec![Column::Tae], &[("click", TaskKind::Binary)]);
    let mut net = Net::new();
    let tae = net.input(0);
    let first = net.parameter("first", &[4, hidden], Initialiser::XavierUniform);
    let last = net.parameter("last", &[hidden, 1], Initialiser::Normal(0.1));
    let x = net.op("MatMul", &[tae, first], vec![]);
    let mut x = net.op("MatMul", &[x, last], vec![]);
    if extra {
        let bias = net.parameter("bias", &[1], Initialiser::Constant(0.5));
        x = net.op("Add", &[x, bias], vec![]);
    }
    net.output("click", x);
    net.valid(&description)
}

#[test]
fn initial_values_depend_on_seed_and_name_alone() {
    let (plain, extended) = (parameters(&graph(8, false), 1), parameters(&graph(8, true), 1));
    assert_eq!(plain.by_name("first"), extended.by_name("first"));
    assert_ne!(plain.by_name("first"), parameters(&graph(8, false), 2).by_name("first"));
    let bound = (6.0f32 / 12.0).sqrt();
    let first = plain.by_name("first").unwrap();
    assert!(
        first.iter().all(|value| value.abs() <= bound)
            && first.iter().any(|value| value.abs() > bound / 2.0)
    );
    assert_eq!(extended.by_name("bias"), Some(&[0.5][..]));
}

#[test]
fn a_saved_file_comes_back_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("expert.safetensors");
    let graph = graph(8, true);
    let mut saved = parameters(&graph, 1);
    saved.provenance.trained_rows = 77;
    saved.save(&path).unwrap();
    let back = Parameters::restore(&graph, SavedParameters::read(&path).unwrap()).unwrap();
    assert_eq!(back.provenance, saved.provenance);
    for name in ["first", "last", "bias"] {
        assert_eq!(back.by_name(name), saved.by_name(name));
    }
}

#[test]
fn a_warm_start_keeps_what_has_the_same_name_and_shape() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("expert.safetensors");
    let old = parameters(&graph(8, false), 1);
    old.save(&path).unwrap();
    let saved = SavedParameters::read(&path).unwrap();
    let mut new = parameters(&graph(8, true), 9);
    let report = new.warm_start(&saved);
    assert_eq!(
        (report.kept, report.fresh),
        (vec!["first".to_owned(), "last".to_owned()], vec!["bias".to_owned()])
    );
    assert_eq!(new.by_name("first"), old.by_name("first"));
    let wider = graph(9, false);
    assert_eq!(parameters(&wider, 9).warm_start(&saved).fresh, ["first", "last"]);
    let refused = Parameters::restore(&wider, saved).unwrap_err().to_string();
    assert!(
        refused.contains("`first` has shape [4, 8]") && refused.contains("[4, 9]"),
        "{refused}"
    );
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("expert.safetensors");
    let refused = |path: &Path| SavedParameters::read(path).unwrap_err().to_string();
    let missing = refused(&path);
    assert!(
        missing.contains("expert.safetensors") && missing.contains("No such file"),
        "{missing}"
    );
    parameters(&graph(8, true), 1).save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (bytes, why) in [
        (&whole[..whole.len() - 3], "damaged"),
        (&flipped[..], "checksum"),
        (b"not one", "no safetensors"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let message = refused(&path);
        assert!(message.contains(why) && message.contains("expert.safetensors"), "{message}");
    }
    let from = br#""format":"1""#;
    let at = whole.windows(from.len()).position(|bytes| bytes == from).unwrap();
    let mut later = whole.clone();
    later[at + from.len() - 2] = b'2';
    std::fs::write(&path, later).unwrap();
    assert!(refused(&path).contains("it has format 2, this version reads 1"));
    let foreign =
        safetensors::serialize(Vec::<(&str, safetensors::tensor::TensorView)>::new(), None)
            .unwrap();
    std::fs::write(&path, foreign).unwrap();
    assert!(refused(&path).contains("not one of an expert's parameters"));
}

#[test]
fn a_warm_start_from_memory_takes_what_it_is_told_to() {
    let old = parameters(&graph(8, true), 1);
    let mut new = parameters(&graph(8, true), 2);
    let fresh = new.clone();
    let report = new.warm_start_from(&old, |name| name != "first");
    assert_eq!((report.kept.len(), report.fresh.as_slice()), (2, &["first".to_owned()][..]));
    assert_eq!(new.by_name("first"), fresh.by_name("first"));
    assert_eq!(new.by_name("last"), old.by_name("last"));
    let mut wider = parameters(&graph(9, false), 2);
    assert!(wider.warm_start_from(&old, |_| true).kept.is_empty(), "no shape is the same");
}

#[test]
fn a_task_that_is_new_begins_as_frequent_as_those_that_are_known() {
    let mut clicks = LabelScale::of_rate();
    (0..1000).for_each(|row| clicks.observe(f32::from(row % 10 == 0), 1.0));
    let mut old = parameters(&graph(8, true), 1);
    old.provenance.labels.insert("click".into(), clicks.clone());
    let mut new = parameters(&graph(8, true), 2);
    new.provenance.tasks.push("like".into());
    let fresh = ["click", "like"].map(|task| (task.to_owned(), LabelScale::of_rate()));
    new.provenance.labels.extend(fresh);
    new.warm_start_from(&old, |_| true);
    let labels = &new.provenance.labels;
    assert_eq!(labels["click"], clicks);
    assert_eq!(labels["like"].log_odds(), clicks.log_odds());
}
