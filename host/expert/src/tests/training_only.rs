//! Columns for training only: an expert learns from them and never sees them when it predicts.

use std::sync::Arc;

use hypercast_core::hash::mix64;
use hypercast_data::schema::{Feature, FeatureKind, Schema};
use hypercast_fm::example::Example;

use super::build::{TAE_DIM, description, example, noise, vectors};
use super::components::{components, engine, options};
use crate::batch::{ColumnData, ExpertColumns};
use crate::normalise::Normaliser;
use crate::train::OptimizerConfig;
use crate::wasm::contract::{Column, TaskKind};
use crate::{
    Blueprint, Chunk, Device, ExpertTrainer, FeatureStatistics, LoadOptions, Tae, TrainerConfig,
};

/// The schema of other tests, with a position as a number and as a category.
fn schema() -> Schema {
    let own = |name, kind| Feature { training_only: true, ..Feature::new(name, kind) };
    let context_features =
        vec![own("position", FeatureKind::Dense), own("place", FeatureKind::Categorical)];
    Schema { context_features, ..super::build::schema() }
}

/// Requests whose targets' places are told by `place`.
fn requests(place: impl Fn(u64, usize) -> u64) -> Vec<Example> {
    let with_place = |request: u64| {
        let mut example = example(request, (request % 4) as usize, 3);
        for (at, target) in example.targets.iter_mut().enumerate() {
            let place = place(request, at);
            target.ids.push(place);
            target.features.insert(1, place as f32);
            target.features.push(0.0);
        }
        example
    };
    (0..200).map(with_place).collect()
}

#[test]
fn they_are_hidden_unless_a_batch_is_to_learn_from() {
    let schema = schema();
    let names = ["position", "position_missing"].map(String::from).map(Column::Feature);
    let id = Column::Id("place".into());
    let mut own = description(
        [&names[..], std::slice::from_ref(&id)].concat(),
        &[("click", TaskKind::Binary)],
    );
    own.rank_columns = vec![names[0].clone(), id];
    let columns = ExpertColumns::new(&own, &schema, vectors()).unwrap();
    let examples = requests(|_, at| 2 + at as u64);
    let normaliser = Normaliser::identity(&schema.feature_columns());
    let served = columns.batch(&examples, Tae::Without, &normaliser);
    assert!(served.numbers(0).iter().all(|&number| number == 0.0), "the mean");
    assert!(served.numbers(1).iter().all(|&missing| missing == 0.0), "and known");
    assert_eq!(served.columns[2], ColumnData::Ids(vec![u64::MAX; 600]), "as in no data");
    let ranked = columns.rank_columns(&examples[0], Tae::Without);
    assert!(format!("{ranked:?}").contains("[0.0, 0.0, 0.0]"), "{ranked:?}");
    let learned = columns.training_batch(&examples, Tae::Without, &normaliser);
    assert_eq!(learned.numbers(0)[..4], [2.0, 3.0, 4.0, 2.0]);
    assert_eq!(learned.columns[2], ColumnData::Ids([2, 3, 4].repeat(200)));
}

#[test]
fn an_expert_learns_from_them_and_predicts_without_them() {
    let Some(path) =
        components("HYPERCAST_PLUGINS").into_iter().find(|path| path.ends_with("mlp-fusion.wasm"))
    else {
        return;
    };
    let options = LoadOptions { without_fm_logits: true, ..options() };
    let blueprint = Arc::new(Blueprint::load(engine(), &path, &schema(), &options).unwrap());
    // Telling, or as in other requests.
    let telling =
        requests(|request, at| 1 + u64::from((request * 17 + at as u64).is_multiple_of(3)));
    let silent = requests(|request, at| 1 + mix64(request * 3 + at as u64) % 2);
    let tae = noise(4, 600 * TAE_DIM);
    let trained = |examples: &[Example]| {
        let chunk = Chunk { examples, tae: &tae, ..Chunk::default() };
        let mut statistics = FeatureStatistics::new(blueprint.columns.feature_names());
        examples.iter().for_each(|example| statistics.observe(example));
        let parameters = blueprint.init_parameters(statistics.finish(), 1);
        let optimizer = OptimizerConfig { learning_rate: 1e-2, ..OptimizerConfig::default() };
        let config = TrainerConfig { optimizer, batch_rows: 64, ..TrainerConfig::default() };
        let mut trainer =
            ExpertTrainer::new(blueprint.clone(), parameters, config, Device::Cpu).unwrap();
        trainer.train(chunk, |_| ()).unwrap();
        trainer
    };
    let [learned, other] = [&telling, &silent].map(|examples| trained(examples));
    let said = |trainer: &ExpertTrainer, examples: &[Example]| {
        trainer.predict(Chunk { examples, tae: &tae, ..Chunk::default() }).unwrap()
    };
    assert_eq!(said(&learned, &telling), said(&learned, &silent));
    assert_ne!(said(&learned, &telling), said(&other, &telling), "it has learned from them");
}
