//! Losses of a network's own, from the guest to the trained parameters.

use std::sync::Arc;

use hypercast_fm::metrics::{ScoredValue, ndcg};

use super::build::{TAE_DIM, example, noise, schema};
use super::components::{components, engine, options};
use crate::train::{BatchReport, OptimizerConfig};
use crate::{Blueprint, Chunk, Device, ExpertTrainer, FeatureStatistics, TrainerConfig};

#[test]
fn a_loss_of_lists_orders_each_request_and_cross_entropy_beside_it_keeps_the_rate() {
    let path =
        |name: &str| components("HYPERCAST_HOSTILE").into_iter().find(|path| path.ends_with(name));
    let Some(listwise) = path("listwise.wasm") else { return };
    let pointwise = path("pointwise.wasm").expect("it is built with the other");
    // Of each request the row with the largest first number is clicked.
    const ROWS: usize = 4;
    let tae = noise(4, 300 * ROWS * TAE_DIM);
    let first = |row: usize| tae[row * TAE_DIM];
    let requests = (0..300).map(|request| {
        let rows = request * ROWS..(request + 1) * ROWS;
        let best =
            rows.clone().reduce(|best, row| if first(row) > first(best) { row } else { best });
        let mut example = example(1 + request as u64, 1, ROWS);
        for (row, target) in rows.zip(&mut example.targets) {
            target.outcome.actions = u64::from(Some(row) == best);
        }
        example
    });
    let examples: Vec<_> = requests.collect();
    let chunk = Chunk { examples: &examples, tae: &tae, ..Chunk::default() };
    let trained = |path| {
        let blueprint = Arc::new(Blueprint::load(engine(), path, &schema(), &options()).unwrap());
        let mut statistics = FeatureStatistics::new(blueprint.columns.feature_names());
        examples.iter().for_each(|example| statistics.observe(example));
        let parameters = blueprint.init_parameters(statistics.finish(), 1);
        let optimizer = OptimizerConfig {
            learning_rate: 2e-2,
            table_learning_rate: 0.1,
            warmup_steps: 10,
            ..OptimizerConfig::default()
        };
        let config = TrainerConfig { optimizer, batch_rows: 64, ..TrainerConfig::default() };
        let mut trainer = ExpertTrainer::new(blueprint, parameters, config, Device::Cpu).unwrap();
        let mut first_loss = None;
        for _ in 0..10 {
            let report = |report: &BatchReport| {
                first_loss.get_or_insert(report.losses[0]);
            };
            assert!(trainer.train(chunk, report).unwrap().is_empty(), "no request is set aside");
        }
        let clicks = trainer.predict(chunk).unwrap().remove(0);
        let request = |(rows, example): (&[f32], &hypercast_fm::example::Example)| {
            let rows = rows.iter().zip(&example.targets);
            let row = |(&prediction, target): (&f32, &hypercast_fm::example::Target)| ScoredValue {
                prediction,
                label: target.outcome.actions as f32,
            };
            ndcg(&rows.map(row).collect::<Vec<_>>()).expect("one of its rows is clicked")
        };
        let order: f64 = clicks.chunks(ROWS).zip(&examples).map(request).sum();
        let rate = clicks.iter().sum::<f32>() / clicks.len() as f32;
        let first_loss = first_loss.expect("there was a step");
        (first_loss, order / examples.len() as f64, rate, trainer.mean_loss())
    };
    let (own, order, rate, own_usual) = trained(&listwise);
    let (host, .., host_usual) = trained(&pointwise);
    // Its own losses could be negative, so they say nothing of what is unusual.
    assert!(own_usual == 0.0 && host_usual > 0.0, "{own_usual} and {host_usual}");
    // Beside the cross-entropy, a quarter of the rows is a click among four.
    assert!((own - host - 4f64.ln() / 4.0).abs() < 0.05, "{own} and {host}");
    assert!(order > 0.95, "NDCG {order}");
    assert!((0.2..0.3).contains(&rate), "a quarter is clicked, {rate} predicted");
}
