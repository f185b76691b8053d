//! Components of contract 2 answer as they did before there was contract 3, and what contract 3
//! added reaches those who ask for it.

use std::path::PathBuf;
use std::sync::Arc;

use hypercast_core::prerequisite::skip;
use hypercast_data::ranked_place::RankedPlace;
use hypercast_data::schema::Schema;
use hypercast_fm::example::{Example, Item};

use super::build::{Net, TAE_DIM, description, example, noise, schema, vectors};
use super::components::{components, engine, options};
use crate::batch::{ExpertColumns, GuestRequest};
use crate::graph::{ExpertGraph, GraphLimits};
use crate::wasm::contract::{
    self, ActionBatch, Column, Contract, Data, Decision, Evaluation, HostSchema, Initialiser,
    Outcome, Quality, Slice, TaskKind, TrainingStep, VectorWidths, Verdict,
};
use crate::*;

/// The component of a guest in `tests/hostile`.
pub(super) fn guest_file(name: &str) -> Option<PathBuf> {
    let file = format!("{name}.wasm");
    let found: Vec<PathBuf> = components("HYPERCAST_HOSTILE");
    let path = found.into_iter().find(|path| path.ends_with(&file));
    if path.is_none() {
        skip("contracts", &format!("`cargo verify` builds {file}"));
    }
    path
}

pub(super) fn guest(name: &str) -> Option<Arc<Blueprint>> {
    let path = guest_file(name)?;
    Some(Arc::new(Blueprint::load(engine(), &path, &schema(), &options()).unwrap()))
}

fn served(blueprint: Arc<Blueprint>) -> ServedExpert {
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let parameters = blueprint.init_parameters(normaliser, 7);
    ServedExpert::new(blueprint, parameters, Device::Cpu, BreakerConfig::default()).unwrap()
}

#[test]
fn a_guest_of_contract_2_predicts_and_ranks_as_before() {
    let (Some(earlier), Some(present)) = (guest("earlier_contract"), guest("plods")) else {
        return;
    };
    assert_eq!(earlier.plugin.contract(), Contract::Second);
    assert_eq!(present.plugin.contract(), Contract::Third);
    // The valid expert of the same crate: the same network, and so the same fresh parameters.
    assert_eq!(earlier.graph.hash, present.graph.hash);
    let contract = |of: &Blueprint| {
        let normaliser = Normaliser::identity(of.columns.feature_names());
        of.init_parameters(normaliser, 7).provenance.contract
    };
    assert_eq!([contract(&earlier), contract(&present)], ["2.0.0", "3.0.0"]);
    let (earlier, present) = (served(earlier), served(present));
    let example = example(3, 4, 6);
    let tae = noise(9, 6 * TAE_DIM);
    let predicted = |expert: &ServedExpert| expert.predict(&[&example], Tae::Rows(&tae)).unwrap();
    let predictions = predicted(&earlier);
    assert_eq!(format!("{predictions:?}"), format!("{:?}", predicted(&present)));
    let first = &predictions.tasks[0].values;
    let mut scores: Vec<(u32, f32)> = (0..6)
        .map(|row| {
            let target = &example.targets[row];
            let told = target.ids[1] as f32 / 100.0 + target.features[0] + tae[row * TAE_DIM];
            (row as u32, first[row] + told + (example.time_ms / 60_000) as f32)
        })
        .collect();
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    let ranked = earlier.rank(&example, Tae::Rows(&tae), &predictions, 4).unwrap();
    let ranked: Vec<(u32, f32)> = ranked.iter().map(|own| (own.candidate, own.score)).collect();
    assert_eq!(ranked, scores[..4]);
}

#[test]
fn a_guest_of_contract_2_gets_the_bits_and_figures_that_it_knows() {
    let Some(guest) = guest("earlier_contract") else { return };
    let Blueprint { plugin, description, info, .. } = &*guest;
    let batch = ActionBatch {
        surface: vec![0, 1],
        actions: vec![5 | 1 << 40, 1 << 33],
        known: vec![1 << 31, 1 << 32],
        values: vec![Outcome { name: "seconds".into(), values: vec![0.5, 2.0] }],
        columns: Vec::new(),
    };
    let labels = plugin.labels(description, info, &batch).unwrap();
    assert_eq!(labels[0].labels, [5.0, 0.0]);
    assert_eq!(labels[0].mask, [1, 0]);
    assert_eq!(labels[0].weights, [0.5, 2.0]);
    assert_eq!(plugin.sample(info, &batch).unwrap(), [1.0 / 3.0, 2.0 / 3.0]);
    let step =
        TrainingStep { taken: 1, planned: 2, trained_rows: 3, rows: 24, learning_rate: 0.25 };
    assert_eq!(plugin.schedule(step).unwrap(), 0.5);
    let quality = |ne| Quality { ne, auc: None, gauc: None, calibration: None, mse: None };
    let evaluation = Evaluation {
        decision: Decision::Canary,
        slices: vec![Slice {
            task: "like".into(),
            surface: Some("reels".into()),
            examples: 12,
            candidate: quality(Some(0.75)),
            serving: None,
        }],
    };
    let Verdict::Hold(told) = plugin.evaluate(info, &evaluation).unwrap() else { panic!("holds") };
    for part in ["hide", "Canary", "like", "reels", "12", "0.75"] {
        assert!(told.contains(part), "`{told}` lacks {part}");
    }
}

/// The schema with 40 actions.
fn wide_schema() -> Schema {
    let mut wide = schema();
    let last = wide.actions.len();
    wide.actions.extend((last..40).map(|at| format!("action{at}")));
    wide
}

#[test]
fn contract_2_is_told_of_no_more_actions_than_it_has_bits_for() {
    let Some(guest) = guest("earlier_contract") else { return };
    let mut wide = wide_schema();
    let (mut of_task, mut info) = (wide.tasks[0].clone(), HostSchema::new(&wide, vectors()).info);
    (of_task.name, of_task.label) = ("late".into(), "action39".into());
    wide.tasks.push(of_task);
    let before = info.clone();
    info = HostSchema::new(&wide, VectorWidths { content: 3, ..vectors() }).info;
    guest.plugin.limit(&mut info);
    assert_eq!(info.actions, before.actions[..32]);
    assert_eq!(info.tasks.len(), before.tasks.len(), "a task on a late action is left out");
    assert!(info.columns.is_empty(), "contract 2 has no vectors");
}

#[test]
fn a_history_has_the_actions_that_its_reader_was_told_of() {
    let wide = wide_schema();
    let own = description(vec![Column::HistoryActions], &[("click", TaskKind::Binary)]);
    let columns = ExpertColumns::as_of(&own, 32, &wide, vectors()).unwrap();
    assert_eq!(columns.network_value_bytes(0, &own.columns[0]), 32 * size_of::<f32>());
    let normaliser = Normaliser::identity(&wide.feature_columns());
    let mut example = example(1, 2, 1);
    for event in &mut example.history {
        event.outcome.actions = 1 | 1 << 31 | 1 << 35;
    }
    let batch = columns.batch(&[example], Tae::Without, &normaliser);
    let mut bits = [0f32; 32];
    (bits[0], bits[31]) = (1.0, 1.0);
    assert_eq!(batch.numbers(0)[..], [bits, bits].concat(), "of each of two events");
    // Nobody has a history: one event of zeros stands in its place.
    let batch = columns.batch(&[super::build::example(1, 0, 1)], Tae::Without, &normaliser);
    assert_eq!(batch.numbers(0)[..], [0f32; 32]);
}

/// An item with a content vector.
fn with_content(example: &mut Example, row: usize, content: &[f32]) {
    let item = &mut example.targets[row].item;
    *item = Arc::new(Item { content: content.into(), ..(**item).clone() });
}

#[test]
fn a_content_vector_reaches_network_rule_and_hooks() {
    let vectors = VectorWidths { content: 3, ..vectors() };
    let content = Column::Vector("content".into());
    let mut own = description(
        vec![content.clone(), Column::Feature("length".into())],
        &[("click", TaskKind::Binary)],
    );
    own.rank_columns = vec![content.clone()];
    own.training_columns = vec![
        content,
        Column::Time,
        Column::Request,
        Column::Id("user_id".into()),
        Column::Tae,
        Column::RankedPosition,
        Column::RankedPropensity,
    ];
    let columns = ExpertColumns::new(&own, &schema(), vectors).unwrap();
    let mut examples = [example(1, 0, 2), example(2, 0, 1)];
    with_content(&mut examples[0], 1, &[0.0, 0.6, 0.8]);
    // Of another width, as logs of before can have.
    with_content(&mut examples[1], 0, &[1.0]);
    let expected = [0.0, 0.0, 0.0, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0];
    let normaliser = Normaliser::identity(&schema().feature_columns());
    let batch = columns.batch(&examples, Tae::Without, &normaliser);
    assert_eq!(*batch.numbers(0), expected);
    let ranked = columns.rank_columns(&examples[0], Tae::Without);
    assert!(matches!(&ranked[0].data, Data::Numbers(numbers) if numbers[..] == expected[..6]));
    let tae = noise(2, 2 * TAE_DIM);
    let place =
        |position, propensity| Some(RankedPlace { position, propensity, arm: "feed@1.0.0".into() });
    let ranked = [place(0, None), place(7, Some(0.25))];
    let requests = [
        GuestRequest { example: &examples[0], fm: Tae::Rows(&tae).into(), ranked: &ranked },
        GuestRequest { example: &examples[1], fm: FmRows::WITHOUT, ranked: &[] },
    ];
    let host = HostSchema::new(&schema(), vectors);
    let batch = columns.hook_batch(&requests, &host.info);
    let data: Vec<&Data> = batch.columns.iter().map(|own| &own.data).collect();
    let [
        Data::Numbers(vectors),
        Data::Integers(times),
        Data::Integers(requests),
        Data::Ids(users),
        Data::Numbers(taes),
        Data::Numbers(positions),
        Data::Numbers(propensities),
    ] = data[..]
    else {
        panic!("{data:?}")
    };
    assert_eq!(vectors[..], expected);
    assert_eq!((times[..].to_vec(), &requests[..]), (vec![1_000_000; 3], &[0, 0, 1][..]));
    assert_eq!(users[..], [1, 1, 2]);
    assert_eq!(taes[..], [&tae[..], &[0.0; TAE_DIM]].concat());
    // Unknown is not 0, which is the first place.
    assert_eq!(format!("{positions:?}"), "[0.0, 7.0, NaN]");
    assert_eq!(format!("{propensities:?}"), "[NaN, 0.25, NaN]");
    // The graph knows the width.
    let mut net = Net::new();
    let vector = net.input(0);
    let weight = net.parameter("w", &[3, 1], Initialiser::Ones);
    let out = net.op("MatMul", &[vector, weight], vec![]);
    net.output("click", out);
    ExpertGraph::new(&own, &net.network, &host, &GraphLimits::default()).unwrap();
    let without = ExpertColumns::new(&own, &schema(), super::build::vectors()).unwrap_err();
    let said = without.to_string();
    assert!(said.contains("vector `content`") && said.contains("it has none"), "{said}");
}

#[test]
fn a_request_has_one_seed_wherever_it_is_ranked() {
    let info = HostSchema::new(&schema(), vectors()).info;
    let request = |id| contract::rank_request(&example(id, 1, 3), &info, 3);
    // A recorded request is ranked again with it by later releases.
    assert_eq!((request(5).request, request(5).seed), (5, 0x849c_9f3d_506c_97b7));
    assert_ne!(request(5).seed, request(6).seed);
}
