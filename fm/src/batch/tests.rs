//! What tokens, targets and their numbers become in a batch.

use std::sync::Arc;

use super::*;
use crate::example::User;
use crate::label_scale::LabelTransform;

fn spec() -> FmSpec {
    let task = |name: &str, main, label| TaskSpec {
        name: name.into(),
        main,
        label,
        transform: LabelTransform::Log,
        surfaces: vec![true, main],
        weight: 1.0,
    };
    FmSpec {
        surfaces: vec!["home".into(), "shop".into()],
        actions: 2,
        values: 1,
        item_ids: 1,
        item_dense: 0,
        item_optional: Vec::new(),
        features: 0,
        profile_ids: vec![],
        id_widths: Default::default(),
        tasks: vec![
            task("click", true, TaskLabel::Action(0)),
            task("watch", false, TaskLabel::Value(0)),
        ],
        content: 0,
        training_only: Default::default(),
        alignments: Default::default(),
    }
}

fn item(id: u64) -> Arc<Item> {
    Arc::new(Item { id, ids: vec![id % 3], ..Item::default() })
}

fn example(history: usize, targets: usize, surface: u16) -> Example {
    let mut outcome = Outcome { actions: 1, known: 3, ..Outcome::UNKNOWN };
    outcome.values[0] = 0.5;
    let event =
        |i: usize| Event { item: item(i as u64), surface: 0, time_ms: i as i64 * 1000, outcome };
    let target = |i: usize| Target {
        item: item(i as u64),
        ids: vec![],
        features: vec![],
        outcome,
        truth: vec![],
    };
    Example {
        request: 1,
        user: Arc::new(User::default()),
        surface,
        time_ms: 1_000_000,
        history: (0..history).map(event).collect(),
        targets: (0..targets).map(target).collect(),
    }
}

#[test]
fn a_batch_has_jagged_blocks_labels_and_masks() {
    let config = FmConfig { max_history: 3, ..FmConfig::default() };
    let batch_builder = BatchBuilder::new(&spec(), &config, RowKeys::Whole);
    let statistics = ColumnStatistics::new(&spec());
    let (a, b) = (example(5, 2, 0), example(1, 1, 1));
    let batch = batch_builder.build(&[&a, &b], &statistics).unwrap();
    assert_eq!(&*batch.history_offsets, &[0, 3, 4]);
    assert_eq!(&*batch.target_offsets, &[0, 2, 3]);
    assert_eq!(batch.times_s[0], 2, "the newest events are kept");
    assert_eq!(batch.labels, [1.0, 0.5, 1.0, 0.5, 1.0, 0.0]);
    assert_eq!(batch.mask, [true, true, true, true, true, false], "watch is not valid on shop");
    assert_eq!(batch.outcomes.len(), 4 * 6);
    assert_eq!(&batch.outcomes[..6], &[1.0, 0.0, 0.0, 1.0, 0.5, 1.0]);
    assert_eq!(batch.key_index.len(), 7 * 5);
    // Item 0 of a target is the same row as item 0 of a history, field by field.
    assert_eq!(batch.keys[batch.key_index[4 * 5] as usize], RowKeys::Whole.key(0, 0));
}

#[test]
fn an_optional_feature_of_an_item_has_a_number_that_says_whether_it_is_missing() {
    let spec = FmSpec { item_dense: 2, item_optional: vec![1], ..spec() };
    let mut example = example(0, 4, 0);
    let dense = [[1.0, 5.0], [3.0, f32::NAN], [f32::NAN, 7.0], [2.0, f32::NAN]];
    for (target, dense) in example.targets.iter_mut().zip(dense) {
        let item = Item { dense: dense.to_vec(), ..(*target.item).clone() };
        target.item = Arc::new(item);
    }
    let mut statistics = ColumnStatistics::new(&spec);
    statistics.observe(&example, &spec);
    let means: Vec<f64> = statistics.item_dense.moments().map(|column| column.mean).collect();
    assert_eq!(means, [1.5, 6.0, 0.5], "of what is known, if it is optional");
    let batch_builder = BatchBuilder::new(&spec, &FmConfig::default(), RowKeys::Whole);
    let batch = batch_builder.build(&[&example], &statistics).unwrap();
    assert!(batch.dense.iter().all(|number| number.is_finite()));
    let rows: Vec<&[f32]> = batch.dense.chunks(3).collect();
    assert_eq!(rows[1][1], 0.0, "the mean");
    assert!(rows[2][0] < 0.0, "0, which is below the mean");
    assert!(rows[1][2] == rows[3][2] && rows[1][2] > 0.0 && rows[0][2] < 0.0, "{rows:?}");
}

#[test]
fn an_example_of_another_schema_is_rejected_by_name() {
    let batch_builder = BatchBuilder::new(&spec(), &FmConfig::default(), RowKeys::Whole);
    let mut wrong = example(0, 1, 0);
    wrong.targets[0].item = Arc::new(Item { id: 9, ..Item::default() });
    let error =
        batch_builder.build(&[&wrong], &ColumnStatistics::new(&spec())).unwrap_err().to_string();
    assert!(error.contains("item 9") && error.contains("request 1"), "{error}");
}

#[test]
fn a_part_keeps_gaps_weights_and_content() {
    let mut spec = spec();
    spec.content = 2;
    let batch_builder = BatchBuilder::new(
        &spec,
        &FmConfig { max_history: 4, ..FmConfig::default() },
        RowKeys::Whole,
    );
    let statistics = ColumnStatistics::new(&spec);
    let mut example = example(6, 3, 0);
    let content: Arc<[f32]> = [0.6, 0.8].into();
    example.targets[2].item = Arc::new(Item { content, ..(*item(2)).clone() });
    let part = ExampleSelection {
        example: &example,
        events: vec![2, 5],
        targets: vec![WeightedTarget { index: 2, weight: 4.0 }],
        reader: ReadFor::Learning,
    };
    let batch = batch_builder.lay_out(&[part], &statistics);
    assert_eq!((&*batch.history_offsets, &*batch.target_offsets), (&[0, 2][..], &[0, 1][..]));
    assert_eq!(batch.weights, [4.0]);
    assert_eq!(batch.dense, [0.0, 0.0, 0.0, 0.0, 0.6, 0.8], "an item without content: zeros");
    let gap = |token: usize| batch.keys[batch.key_index[token * 5 + 4] as usize];
    assert_eq!(
        gap(0),
        RowKeys::Whole.key(4, 63),
        "the oldest event that is read has none before it"
    );
    assert_eq!(gap(1), RowKeys::Whole.key(4, 1), "a second, as if the event between were there");
    let whole = batch_builder.build(&[&example], &statistics).unwrap();
    assert_eq!((whole.history_tokens(), whole.weights), (4, vec![1.0; 3]));
    example.targets[2].item = Arc::new(Item { content: [1.0].into(), ..(*item(2)).clone() });
    let error = batch_builder.build(&[&example], &statistics).unwrap_err().to_string();
    assert!(error.contains("content vector of 1 numbers"), "{error}");
}
