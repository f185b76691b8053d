//! A world in which one of several topics tells the label: a network that looks all of them up
//! finds it.

use super::*;
use crate::train::{ExpertOptimizer, OptimizerConfig};
use hypercast_data::schema::fill_tags;
use hypercast_fm::{example::Example, metrics::LogLossSums};
use rand::Rng as _;

/// The topics of items, and the one that tells.
const TOPICS: u64 = 12;
const TELLING: u64 = 5;

/// A logit of the mean of the topics' embeddings, or of the first topic's.
fn lookup(has_all: bool) -> Case {
    case(|net, base| {
        let table = net.parameter("table", &[512, 8], Initialiser::Normal(0.1));
        let first = vec![int("axis", 1), int("start", 0), int("end", 1)];
        let ids = if has_all { base.topics } else { net.op("Slice", &[base.topics], first) };
        let topics = net.op("EmbeddingBag", &[table, ids], vec![]);
        let hidden = net.parameter("hidden", &[8, 8], Initialiser::XavierUniform);
        let hidden = net.op("MatMul", &[topics, hidden], vec![]);
        let bias = net.parameter("bias", &[8], Initialiser::Zeros);
        let hidden = net.op("Add", &[hidden, bias], vec![]);
        net.op("Silu", &[hidden], vec![])
    })
}

/// A request with none to three topics a target, and whether each is clicked.
fn made(random: &mut SmallRng) -> (Example, Vec<f32>) {
    let mut example = example(1, 1, 32);
    let mut labels = Vec::new();
    for target in &mut example.targets {
        let count = random.random_range(0..4);
        let topics: Vec<u64> = (0..count).map(|_| random.random_range(1..=TOPICS)).collect();
        fill_tags(&mut target.ids[5..8], topics.iter().copied());
        let chance = if topics.contains(&TELLING) { 0.9 } else { 0.1 };
        labels.push(f32::from(u8::from(random.random_bool(chance))));
    }
    (example, labels)
}

/// The NE of the second half of the steps, each predicted before it was learned.
fn ne(has_all: bool) -> f64 {
    let case = lookup(has_all);
    let compute = compute(case.graph.clone(), crate::Device::Cpu).unwrap();
    let config = OptimizerConfig {
        learning_rate: 1e-2,
        table_learning_rate: 0.1,
        warmup_steps: 10,
        ..OptimizerConfig::default()
    };
    let mut optimizer = ExpertOptimizer::new(&case.graph, config);
    let (schema, mut parameters) = (schema(), parameters(&case.graph));
    let columns = ExpertColumns::new(&case.description, &schema, vectors()).unwrap();
    let normaliser = Normaliser::identity(&schema.feature_columns());
    let mut random = SmallRng::seed_from_u64(3);
    let mut sums = LogLossSums::default();
    for step in 0..STEPS {
        let (example, labels) = made(&mut random);
        let batch = columns.batch(&[example], Tae::Without, &normaliser);
        let mut loss = |logits: &[f32], _: &[f32]| {
            let probability = |logit: &f32| 1.0 / (1.0 + (-logit).exp());
            let said: Vec<f32> = logits.iter().map(probability).collect();
            let rows = said.iter().zip(&labels);
            if 2 * step >= STEPS {
                rows.clone().for_each(|(&said, &label)| sums.push(said, label == 1.0));
            }
            let tasks = rows.map(|(said, label)| (said - label) / labels.len() as f32).collect();
            OutputGradients { tasks, losses: Vec::new() }
        };
        let gradients = compute.gradients(&parameters, &batch, &mut random.clone(), &mut loss);
        optimizer.step(&mut parameters, &gradients, &case.graph, 1.0);
    }
    sums.normalized_entropy().unwrap()
}

const STEPS: usize = 600;

#[test]
fn one_topic_of_several_tells_the_label() {
    let [first, all] = [false, true].map(ne);
    println!("NE with the first topic {first:.3}, with all {all:.3}");
    // The entropy that is left where the topic is known is 0.47 bits of 0.71.
    assert!(all < 0.78 && first > 0.82, "with the first topic {first:.3}, with all {all:.3}");
}
