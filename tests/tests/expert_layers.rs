//! The SDK's expert layers in the host's executor: gradients against central differences, dropout
//! and noise in training but not in serving, and warm starts.

mod onnx_models;

use std::sync::Arc;

use hypercast_expert::batch::{ColumnData, ExpertBatch, TaskOutcomes};
use hypercast_expert::graph::{ExpertGraph, GraphLimits};
use hypercast_expert::oracle::{Comparison, Evaluation, compare, whole_gradients};
use hypercast_expert::params::{Provenance, hash_text};
use hypercast_expert::train::{OutputGradients, TaskTargets, compute};
use hypercast_expert::wasm::contract::{self, Column};
use hypercast_expert::{Device, Normaliser, Parameters, SavedParameters};
use hypercast_harness::convert;
use hypercast_sdk::{
    Cross, Description, Embedding, ExpertFusion, FmEmbedding, FmFusion, Hstu, Linear, PerSurface,
    RmsNorm, TaskHeads, TaskKind, Tensor, Trees, losses,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const TAE_DIM: usize = 4;
const SURFACES: [&str; 3] = ["feed", "reels", "stories"];

/// A network that the host has admitted, and the columns that it reads.
struct AdmittedNetwork {
    graph: Arc<ExpertGraph>,
    columns: Vec<Column>,
}

/// The network that `build` makes, with the named tasks.
fn network(tasks: &[&str], build: impl FnOnce(&hypercast_sdk::Graph)) -> AdmittedNetwork {
    let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    let info = contract::HostInfo {
        tae_dim: TAE_DIM as u32,
        surfaces: names(&SURFACES),
        actions: names(&["click", "like"]),
        values: Vec::new(),
        tasks: Vec::new(),
        features: names(&["rate", "count"]),
        ids: names(&["item_id", "surface"]),
        history_ids: names(&["item_id"]),
        columns: Vec::new(),
    };
    let describe = Description::new("layers", "1.0.0").history_len(4);
    let describe = tasks.iter().fold(describe, |d, task| d.task(task, TaskKind::Binary));
    let g = hypercast_sdk::Graph::new(convert::info(&info), &describe);
    build(&g);
    let finished = g.finish().expect("the network is valid");
    let description = contract::Description {
        name: "layers".into(),
        version: "1.0.0".into(),
        surfaces: Vec::new(),
        tasks: tasks
            .iter()
            .map(|task| contract::Task { name: task.to_string(), kind: contract::TaskKind::Binary })
            .collect(),
        columns: finished.columns.into_iter().map(convert::column).collect(),
        rank_columns: Vec::new(),
        training_columns: Vec::new(),
        history_len: 4,
        fm_version: "*".into(),
        limits: contract::Limits { deadline_ms: 0, memory_mib: 0 },
        patience: None,
    };
    let network = convert::network(finished.network);
    let host = contract::HostSchema::of_single_values(info);
    let graph = ExpertGraph::new(&description, &network, &host, &GraphLimits::default());
    let graph = Arc::new(graph.expect("the host admits the network"));
    AdmittedNetwork { graph, columns: description.columns }
}

impl AdmittedNetwork {
    fn parameters(&self) -> Parameters {
        let provenance = Provenance {
            plugin: "layers".into(),
            plugin_version: "1.0.0".into(),
            contract: contract::VERSION.into(),
            graph: hash_text(&self.graph),
            fm_version: String::new(),
            tae_dim: TAE_DIM,
            tasks: Vec::new(),
            trained_rows: 0,
            trained_until_ms: 0,
            normaliser: Normaliser::default(),
            labels: Default::default(),
        };
        Parameters::init(&self.graph, provenance, 3)
    }

    /// Random values, as after a training: initial values such as 0 could hide an error.
    fn random_parameters(&self) -> Parameters {
        let (mut parameters, mut rng) = (self.parameters(), SmallRng::seed_from_u64(4));
        for index in 0..self.graph.parameters.len() {
            for value in parameters.values_mut(index) {
                *value = rng.random_range(-0.8..0.8);
            }
        }
        parameters
    }

    /// A batch with the given numbers of history events and rows per request. Row r is on surface
    /// r mod 3.
    fn batch(&self, requests: &[(u32, u32)]) -> ExpertBatch {
        let offsets = |sizes: Vec<u32>| -> Arc<[u32]> {
            let ends = sizes.iter().scan(0, |end, size| {
                *end += size;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect()
        };
        let history_offsets = offsets(requests.iter().map(|(events, _)| *events).collect());
        let target_offsets = offsets(requests.iter().map(|(_, rows)| *rows).collect());
        let events = history_offsets[requests.len()].max(1) as usize;
        let rows = target_offsets[requests.len()] as usize;
        let mut rng = SmallRng::seed_from_u64(5);
        let mut values = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-1.5..1.5)).collect()
        };
        let is_feature = |column: &&Column| matches!(column, Column::Feature(_));
        let features = values(rows * self.columns.iter().filter(is_feature).count());
        let mut places = 0..;
        let mut noise = |count: usize| ColumnData::Numbers(values(count));
        let columns = self.columns.iter().map(|column| match column {
            Column::Tae => noise(rows * TAE_DIM),
            Column::FmLogit(_) => noise(rows),
            Column::RawFeature(_)
            | Column::Vector(_)
            | Column::Time
            | Column::Request
            | Column::RankedPosition
            | Column::RankedPropensity => unreachable!("none reads it"),
            Column::Feature(_) => ColumnData::Feature(places.next().expect("no end")),
            Column::Id(name) if name == "surface" => {
                ColumnData::Ids((0..rows as u64).map(|row| row % 3).collect())
            }
            Column::Id(_) => ColumnData::Ids((0..rows as u64).map(|row| row * 7 % 5).collect()),
            Column::HistoryId(_) => ColumnData::Ids((0..events as u64).collect()),
            Column::HistoryActions => noise(events * 2),
            Column::HistoryAge => {
                ColumnData::Numbers((0..events).map(|event| 21.5 - 6.0 * event as f32).collect())
            }
        });
        let columns = columns.collect();
        let outcomes = Vec::new();
        ExpertBatch { rows, history_offsets, target_offsets, columns, features, outcomes }
    }

    /// The outputs in serving, `[rows, tasks]`.
    fn serve(&self, parameters: &Parameters, batch: &ExpertBatch) -> Vec<f32> {
        compute(self.graph.clone(), Device::Cpu).expect("the CPU").forward(parameters, batch)
    }

    /// The outputs in training, `[rows, tasks]`.
    fn train(&self, parameters: &Parameters, batch: &ExpertBatch) -> Vec<f32> {
        let mut seen = Vec::new();
        let mut loss = |outputs: &[f32], _: &[f32]| {
            seen = outputs.to_vec();
            OutputGradients { tasks: vec![1.0; outputs.len()], losses: Vec::new() }
        };
        let mut rng = SmallRng::seed_from_u64(6);
        let compute = compute(self.graph.clone(), Device::Cpu).expect("the CPU");
        compute.gradients(parameters, batch, &mut rng, &mut loss);
        seen
    }

    /// Compares every gradient with central differences of the outputs.
    fn check_gradients(&self, name: &str, batch: &ExpertBatch) {
        let parameters = self.random_parameters();
        let compute = compute(self.graph.clone(), Device::Cpu).expect("the CPU");
        let mut rng = SmallRng::seed_from_u64(7);
        let outputs = batch.rows * self.graph.outputs.len();
        let seed: Vec<f32> = (0..outputs).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut loss =
            |_: &[f32], _: &[f32]| OutputGradients { tasks: seed.clone(), losses: vec![] };
        let gradients = compute.gradients(&parameters, batch, &mut rng, &mut loss);
        let value = |parameters: &Parameters| -> f64 {
            let outputs = compute.forward(parameters, batch);
            outputs.iter().zip(&seed).map(|(o, s)| f64::from(*o) * f64::from(*s)).sum()
        };
        for (index, spec) in self.graph.parameters.iter().enumerate() {
            let mut dense = vec![0.0; spec.len()];
            match (&gradients.values[index], &gradients.rows[index]) {
                (None, _) => {}
                (Some(gradient), None) => dense.copy_from_slice(gradient),
                (Some(gradient), Some(rows)) => {
                    for (row, part) in rows.iter().zip(gradient.chunks_exact(spec.shape[1])) {
                        dense[*row as usize * spec.shape[1]..][..spec.shape[1]]
                            .copy_from_slice(part);
                    }
                }
            }
            for (position, gradient) in dense.iter().enumerate() {
                let nudge = |by: f32| {
                    let mut parameters = parameters.clone();
                    parameters.values_mut(index)[position] += by;
                    value(&parameters)
                };
                let expected = (nudge(4e-3) - nudge(-4e-3)) / 8e-3;
                let error = (f64::from(*gradient) - expected).abs();
                let at = format!("{name}: gradient of {}[{position}]", spec.name);
                assert!(
                    error <= 5e-3 * expected.abs().max(1.0),
                    "{at} is {gradient}, not {expected}"
                );
            }
        }
    }
}

/// An embedding module without dropout, so that training and serving agree.
fn embedding<'g>() -> FmEmbedding<'g> {
    FmEmbedding::new("fm", 3).row_dropout(0.0).value_dropout(0.0)
}

fn out<'g>(g: &'g hypercast_sdk::Graph, x: Tensor<'g>) {
    g.output("click", Linear::new("head", 1).apply(x));
}

/// Replaces the embedding of `row` by zeros, as the host does for a missing one.
fn without_embedding(network: &AdmittedNetwork, batch: &mut ExpertBatch, row: usize) {
    let tae = network.columns.iter().position(|column| matches!(column, Column::Tae));
    match &mut batch.columns[tae.expect("it reads the embedding")] {
        ColumnData::Numbers(values) => values[row * TAE_DIM..][..TAE_DIM].fill(0.0),
        ColumnData::Ids(_) | ColumnData::Feature(_) => unreachable!("the embedding is numbers"),
    }
}

/// Builds a network with the SDK, and converts it for the host.
type BuildNetwork = fn(&hypercast_sdk::Graph);

#[test]
fn gradients_are_central_differences() {
    let cases: [(&str, BuildNetwork); 10] = [
        ("embedding", |g| out(g, embedding().apply(g.tae()).values)),
        ("normalised embedding", |g| out(g, embedding().apply(g.tae()).normalised)),
        ("gated embedding by RMS", |g| out(g, embedding().rms().gated().apply(g.tae()).values)),
        ("fusion of both", |g| {
            let fm = embedding().apply(g.tae());
            let short = g.history_actions().pool_mean();
            out(g, FmFusion::new("fusion", 3).apply(fm, Some(short)));
        }),
        ("fusion of the embedding alone", |g| {
            out(g, FmFusion::new("fusion", 3).apply(embedding().apply(g.tae()), None));
        }),
        ("cross", |g| out(g, Cross::new("cross", 3).apply(g.tae()))),
        ("cross of low rank", |g| out(g, Cross::new("cross", 2).rank(2).apply(g.tae()))),
        ("expert fusion", |g| {
            let fusion = ExpertFusion::cross("expert", [5, 3], Cross::new("cross", 2).rank(2));
            out(g, fusion.apply(g.concat(&[g.tae(), g.features(&["rate", "count"])])));
        }),
        ("heads by surface with a direct embedding", |g| {
            let heads = TaskHeads::new("heads").tower([3]);
            heads.direct(g.feature("rate")).fm(embedding().apply(g.tae())).apply(g, g.tae());
        }),
        ("short-term HSTU", |g| {
            let items = Embedding::new("items", 5, 3);
            out(g, Hstu::new("short", 4).heads(2).layers(2).apply(g, &[("item_id", &items)]));
        }),
    ];
    for (name, build) in cases {
        let network = network(&["click"], build);
        let mut batch = network.batch(&[(2, 2), (0, 1), (3, 2)]);
        if name.contains("embedding") {
            without_embedding(&network, &mut batch, 1);
        }
        network.check_gradients(name, &batch);
        network.check_gradients(name, &network.batch(&[(0, 1)]));
    }
}

/// A network with two outputs: one value of the embedding, and whether there is an embedding.
fn embedding_outputs(row_dropout: f32, noise: f32) -> AdmittedNetwork {
    network(&["value", "present"], |g| {
        let fm = embedding().row_dropout(row_dropout).noise(noise).apply(g.tae());
        g.output("value", fm.values.slice(1, 2));
        g.output("present", fm.present);
    })
}

#[test]
fn a_missing_embedding_is_replaced_by_a_trained_vector_and_marked() {
    let network = embedding_outputs(0.0, 0.0);
    let parameters = network.random_parameters();
    let mut batch = network.batch(&[(0, 3)]);
    let before = network.serve(&parameters, &batch);
    without_embedding(&network, &mut batch, 1);
    let after = network.serve(&parameters, &batch);
    let missing = parameters.by_name("fm/missing").expect("the vector")[1];
    assert_eq!(after[2..4], [missing, 0.0]);
    assert_eq!(
        (before[0..2].to_vec(), before[4..6].to_vec()),
        (after[0..2].to_vec(), after[4..6].to_vec())
    );
    assert!([1, 3, 5].iter().all(|&at| before[at] == 1.0));
}

#[test]
fn training_drops_whole_embeddings_as_if_the_fm_were_down() {
    let network = embedding_outputs(0.2, 0.0);
    let parameters = network.random_parameters();
    let batch = network.batch(&[(0, 2000)]);
    let (served, trained) =
        (network.serve(&parameters, &batch), network.train(&parameters, &batch));
    let missing = parameters.by_name("fm/missing").expect("the vector")[1];
    let mut taken = 0;
    for (served, trained) in served.chunks(2).zip(trained.chunks(2)) {
        match trained[1] {
            0.0 => {
                taken += 1;
                assert_eq!(trained[0], missing);
            }
            // Kept embeddings are not scaled up, so they look the same in serving.
            _ => assert!((served[0] - trained[0]).abs() < 1e-5 && trained[1] == 1.0),
        }
    }
    assert!((320..480).contains(&taken), "{taken} of 2000 dropped at a rate of 0.2");
}

#[test]
fn noise_is_added_in_training_only_and_has_mean_zero() {
    let (noisy, plain) = (embedding_outputs(0.0, 0.3), embedding_outputs(0.0, 0.0));
    let (parameters, batch) = (noisy.random_parameters(), noisy.batch(&[(0, 4000)]));
    let served = noisy.serve(&parameters, &batch);
    assert_eq!(served, plain.serve(&plain.random_parameters(), &batch));
    let trained = noisy.train(&parameters, &batch);
    let shifts: Vec<f64> =
        served.iter().zip(&trained).step_by(2).map(|(s, t)| f64::from(t - s)).collect();
    let mean = shifts.iter().sum::<f64>() / shifts.len() as f64;
    let deviation = (shifts.iter().map(|s| s * s).sum::<f64>() / shifts.len() as f64).sqrt();
    let weights = parameters.by_name("fm/bottleneck/weight").expect("the bottleneck");
    let column: f64 = weights.iter().skip(1).step_by(3).map(|w| f64::from(w * w)).sum();
    assert!((deviation / (0.3 * column.sqrt()) - 1.0).abs() < 0.1, "{deviation} {column}");
    assert!(mean.abs() < 4.0 * deviation / (shifts.len() as f64).sqrt(), "{mean}");
}

#[test]
fn a_cross_layer_computes_its_equation() {
    let network = network(&["a", "b"], |g| {
        let x = Cross::new("cross", 2).apply(g.features(&["rate", "count"]));
        g.output("a", x.slice(0, 1));
        g.output("b", x.slice(1, 2));
    });
    let (parameters, batch) = (network.random_parameters(), network.batch(&[(0, 3)]));
    let outputs = network.serve(&parameters, &batch);
    let of = |name: &str| parameters.by_name(name).expect("a parameter");
    let [rate, count] = [0, 1].map(|column| batch.numbers(column));
    for row in 0..3 {
        let x0 = [rate[row], count[row]];
        let mut x = x0;
        for layer in ["cross/layer_1/up", "cross/layer_2/up"] {
            let (w, b) = (of(&format!("{layer}/weight")), of(&format!("{layer}/bias")));
            let y = |k: usize| x0[k] * (x[0] * w[k] + x[1] * w[2 + k] + b[k]) + x[k];
            x = [y(0), y(1)];
        }
        for task in 0..2 {
            assert!((outputs[row * 2 + task] - x[task]).abs() < 1e-5);
        }
    }
}

#[test]
fn each_surface_has_its_own_scale_and_bias() {
    let network = network(&["click"], |g| {
        g.output("click", PerSurface::new("surface").apply(g.feature("rate")));
    });
    let mut parameters = network.parameters();
    let batch = network.batch(&[(0, 5)]);
    let rates = network.serve(&parameters, &batch);
    assert_eq!(rates[..], batch.numbers(0)[..], "it starts as the identity");
    let index = |name: &str| network.graph.parameters.iter().position(|p| p.name == name);
    let (scale, bias) = (index("surface/scale").unwrap(), index("surface/bias").unwrap());
    assert!(network.graph.parameters[scale].table, "a step updates only the surfaces of its batch");
    parameters.values_mut(scale)[1] = 2.0;
    parameters.values_mut(bias)[1] = -0.5;
    let outputs = network.serve(&parameters, &batch);
    for (row, (rate, output)) in rates.iter().zip(&outputs).enumerate() {
        let expected = if row % 3 == 1 { rate * 2.0 - 0.5 } else { *rate };
        assert_eq!(*output, expected, "row {row}");
    }
}

#[test]
fn rms_norm_has_a_root_mean_square_of_one() {
    let network = network(&["click"], |g| {
        let y = RmsNorm::new("rms").apply(g.tae());
        g.output("click", (y * y).mean());
    });
    let squares = network.serve(&network.parameters(), &network.batch(&[(0, 4)]));
    assert!(squares.iter().all(|square| (square - 1.0).abs() < 1e-4), "{squares:?}");
}

/// A complete expert, as a plugin would build it.
fn expert<'g>(g: &'g hypercast_sdk::Graph, heads: TaskHeads<'g>) {
    let items = Embedding::new("items", 50, 4);
    let short = Hstu::new("short", 8).apply(g, &[("item_id", &items)]);
    let fm = FmEmbedding::new("fm", 8).apply(g.tae());
    let fused = FmFusion::new("fusion", 8).apply(fm, Some(short));
    let direct = g.concat(&[g.features(&["rate", "count"]), fm.values]);
    let all = g.concat(&[items.apply(g.id("item_id")), fused, direct]);
    let fusion = ExpertFusion::cross("expert", [16, 8], Cross::new("cross", 2).rank(4));
    heads.direct(direct).fm(fm).apply(g, fusion.apply(all));
}

#[test]
fn an_expert_starts_at_even_odds() {
    let network = network(&["click"], |g| expert(g, TaskHeads::new("heads")));
    let logits = network.serve(&network.parameters(), &network.batch(&[(3, 50), (0, 50)]));
    assert!(logits.iter().all(|logit| logit.abs() < 0.1), "{logits:?}");
}

#[test]
fn a_new_version_keeps_the_parameters_that_did_not_change() {
    let old = network(&["click", "like"], |g| expert(g, TaskHeads::new("heads")));
    let trained = old.random_parameters();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("old.safetensors");
    trained.save(&path).expect("saved");
    let saved = SavedParameters::read(&path).expect("read");

    // One task is removed and one added: the bottom and the remaining task keep their parameters.
    let new = network(&["like", "share"], |g| expert(g, TaskHeads::new("heads")));
    let mut parameters = new.parameters();
    let report = parameters.warm_start(&saved);
    assert!(report.fresh.iter().all(|name| name.starts_with("heads/share/")), "{report:?}");
    for name in ["fm/missing", "fusion/gate/weight", "expert/cross/layer_2/up/weight"] {
        assert_eq!(parameters.by_name(name), trained.by_name(name), "{name}");
    }
    let surface = "heads/like/surface/scale";
    assert_eq!(parameters.by_name(surface), trained.by_name(surface));

    // With wider towers, only the towers and the layers that read them are initialised again.
    let wider = network(&["click", "like"], |g| expert(g, TaskHeads::new("heads").tower([24])));
    let report = wider.parameters().warm_start(&saved);
    let in_head = |name: &String| name.contains("/tower/") || name.contains("/out/weight");
    assert!(!report.fresh.is_empty() && report.fresh.iter().all(in_head), "{report:?}");
}

/// Makes a loss of the output of `click`.
type BuildLoss = for<'g> fn(&'g hypercast_sdk::Graph, Tensor<'g>) -> Tensor<'g>;

/// The losses of the SDK. The teacher of the distillation is a feature.
const LOSSES: [(&str, BuildLoss); 8] = [
    ("cross-entropy", |_, x| losses::bce("click", x)),
    ("focal", |_, x| losses::focal("click", x, 2.0)),
    ("quantile", |_, x| losses::quantile("click", x, 0.8)),
    ("huber", |_, x| losses::huber("click", x, 0.4)),
    ("pairwise", |_, x| losses::pairwise_logistic("click", x)),
    ("listwise", |_, x| losses::listwise_softmax("click", x)),
    ("distillation", |g, x| losses::distillation("click", x, g.feature("rate"))),
    ("both", |_, x| losses::bce("click", x) + losses::listwise_softmax("click", x) * 0.5),
];

/// A linear output with a loss of its own, and a batch of three requests whose rows have `labels`.
/// Masked rows have labels and weights that must not count.
fn with_loss(build: BuildLoss, labels: &[f32], masked: &[usize]) -> (AdmittedNetwork, ExpertBatch) {
    let network = network(&["click"], |g| {
        let output = Linear::new("head", 1).apply(g.tae());
        g.output("click", output);
        g.loss("click", build(g, output));
    });
    let mut batch = network.batch(&[(0, 4), (0, 1), (0, 3)]);
    let rows = 0..batch.rows;
    let targets = TaskTargets {
        labels: labels.to_vec(),
        mask: rows.clone().map(|row| !masked.contains(&row)).collect(),
        weights: rows.map(|row| 0.5 + row as f32 / 4.0).collect(),
    };
    batch.outcomes = vec![TaskOutcomes { targets, base_logit: -1.5 }];
    (network, batch)
}

const LABELS: [f32; 8] = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0];

/// All parameters in f64, as the oracle takes them.
fn values(parameters: &Parameters, network: &AdmittedNetwork) -> Vec<Vec<f64>> {
    let of = |index| parameters.values(index).iter().map(|value| f64::from(*value)).collect();
    (0..network.graph.parameters.len()).map(of).collect()
}

/// The losses of rows, in f64.
fn losses_of(network: &AdmittedNetwork, values: &[Vec<f64>], batch: &ExpertBatch) -> Vec<f64> {
    let evaluation = Evaluation::new(&network.graph, values, batch, None);
    evaluation.losses().iter().map(|loss| loss.value).collect()
}

#[test]
fn gradients_of_losses_are_central_differences() {
    for (name, build) in LOSSES {
        let (network, batch) = with_loss(build, &LABELS, &[1, 6]);
        let parameters = network.random_parameters();
        let mut random = SmallRng::seed_from_u64(7);
        let seed: Vec<f32> = (0..batch.rows).map(|_| random.random_range(-1.0..1.0)).collect();
        let loss = OutputGradients { tasks: vec![0.0; batch.rows], losses: seed.clone() };
        let (graph, parameters, batch) = (&network.graph, &parameters, &batch);
        let compared = compare(&Comparison { graph, parameters, batch, loss: &loss, seed: 1 });
        assert_eq!(compared.unwrap_or_else(|error| panic!("{name}: {error}")).unknown, 0, "{name}");
        let compute = compute(graph.clone(), Device::Cpu).expect("the CPU");
        let found = compute.gradients(parameters, batch, &mut random, &mut |_, _| loss.clone());
        for (at, gradient) in whole_gradients(graph, &found)[0].iter().enumerate() {
            let value = |by: f64| -> f64 {
                let mut values = values(parameters, &network);
                values[0][at] += by;
                let losses = losses_of(&network, &values, batch);
                losses.iter().zip(&seed).map(|(loss, seed)| loss * f64::from(*seed)).sum()
            };
            let expected = (value(1e-5) - value(-1e-5)) / 2e-5;
            let error = (f64::from(*gradient) - expected).abs();
            assert!(error < 1e-4, "{name}: {gradient} of weight {at}, not {expected}");
        }
    }
}

#[test]
fn losses_are_those_of_their_definitions() {
    let of = |wanted: &str| {
        let (_, build) = LOSSES.iter().find(|(name, _)| *name == wanted).expect("it is listed");
        let (network, batch) = with_loss(*build, &LABELS, &[1, 6]);
        let parameters = network.random_parameters();
        let outputs = network.serve(&parameters, &batch);
        let outputs: Vec<f64> = outputs.iter().map(|output| f64::from(*output)).collect();
        (losses_of(&network, &values(&parameters, &network), &batch), outputs)
    };
    let near = |found: f64, expected: f64| {
        assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
    };
    let log_loss = |logit: f64| (1.0 + logit.exp()).ln();
    let (found, x) = of("cross-entropy");
    near(found[0], log_loss(1.5 - x[0]));
    near(found[2], log_loss(x[2] - 1.5));
    let (found, x) = of("focal");
    let missed = 1.0 / (1.0 + (x[3] - 1.5).exp());
    near(found[3], missed * missed * -(1.0 - missed).ln());
    let (found, x) = of("quantile");
    near(found[0], (0.8 * (1.0 - x[0])).max(-0.2 * (1.0 - x[0])));
    let (found, x) = of("huber");
    let error = (1.0 - x[4]).abs();
    near(found[4], if error < 0.4 { error * error / 2.0 } else { 0.4 * (error - 0.2) });
    // Of the first request rows 0, 2 and 3 count, of which 2 has the lower label.
    let (found, x) = of("pairwise");
    near(found[0], log_loss(x[2] - x[0]));
    near(found[3], log_loss(x[2] - x[3]));
    [2, 4, 5, 7].iter().for_each(|row| near(found[*row], 0.0));
    let (found, x) = of("listwise");
    let share = x[0].exp() / [x[0], x[2], x[3]].iter().map(|x| x.exp()).sum::<f64>();
    near(found[0], -share.ln());
    near(found[4], 0.0);
    let (found, _) = of("distillation");
    assert!(found.iter().all(|loss| *loss > 0.0), "{found:?}");
}

#[test]
fn rows_that_do_not_count_change_no_loss_of_others() {
    for (name, build) in LOSSES {
        let mut other = LABELS;
        (other[1], other[6]) = (17.0, f32::NAN);
        let [one, two] = [LABELS, other].map(|labels| {
            let (network, mut batch) = with_loss(build, &labels, &[1, 6]);
            // Their scores do not count either.
            let ColumnData::Numbers(tae) = &mut batch.columns[0] else { panic!("the embedding") };
            [1, 6].iter().for_each(|row| tae[row * TAE_DIM..][..TAE_DIM].fill(labels[1]));
            losses_of(&network, &values(&network.random_parameters(), &network), &batch)
        });
        for row in [0, 2, 3, 4, 5, 7] {
            assert!((one[row] - two[row]).abs() < 1e-9, "{name}, row {row}: {one:?}, {two:?}");
        }
    }
}

/// `cargo hypercast from-onnx` refuses larger ones.
#[test]
fn the_largest_ensembles_of_trees_are_admitted() {
    // Of depth 6; a comparison takes 8 values of a candidate, and 12 where any asks for equality.
    for (trees, is_equality) in [(496, 0.0), (330, 1.0)] {
        let comparison: [f32; 4] = [1.0, 0.5, 1.0, is_equality];
        let comparisons = comparison.map(|value| vec![value; 63 * trees]).concat();
        let file = [vec![1.0, trees as f32, 0.0, 6.0], comparisons].concat();
        let file: Vec<u8> = file.into_iter().flat_map(f32::to_le_bytes).collect();
        let ensemble = network(&["click"], |g| {
            let leaves = Trees::new("trees", &file).apply(g.raw_features(&["rate"]));
            g.output("click", leaves.sum());
        });
        assert_eq!(ensemble.columns.len(), 1);
    }
}
