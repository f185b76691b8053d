//! A guest of contract 2, written against its WIT as a component of before was built. It is not
//! hostile: the host must answer with it as it did before there was contract 3.
//!
//! Its network is that of the crate's valid expert. What else it returns tells what it was sent.

#![allow(missing_docs, clippy::too_many_arguments, reason = "generated bindings")]

wit_bindgen::generate!({ path: "../../sdk/wit/2.0.0", world: "expert" });

use hypercast::expert::types::{
    Attribute, Column, Data, Initialiser, Limits, Node, Output, Parameter, SchemaTask, Task, Value,
};

struct EarlierContract;

impl Guest for EarlierContract {
    fn describe(info: HostInfo) -> Description {
        let task = |own: &SchemaTask| Task { name: own.name.clone(), kind: own.kind };
        Description {
            name: "earlier_contract".into(),
            version: "1.0.0".into(),
            surfaces: Vec::new(),
            tasks: info.tasks.iter().map(task).collect(),
            columns: vec![Column::Tae],
            rank_columns: vec![
                Column::Tae,
                Column::Id("item_id".into()),
                Column::Feature(info.features[0].clone()),
            ],
            history_len: 0,
            fm_version: "*".into(),
            limits: Limits { deadline_ms: 0, memory_mib: 0 },
        }
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        let mut network = Network {
            parameters: Vec::new(),
            nodes: vec![node("Input", &[], Some(("column", 0)), "")],
            outputs: Vec::new(),
            extra_loss: None,
        };
        for (at, task) in (0..).zip(&info.tasks) {
            let (layer, first) = (&task.name, 1 + 4 * at);
            let mut parameter = |name: &str, shape: &[u32], init| {
                let name = format!("{layer}/{name}");
                network.parameters.push(Parameter { name, shape: shape.to_vec(), init });
            };
            parameter("weight", &[info.tae_dim, 1], Initialiser::XavierUniform);
            parameter("bias", &[1], Initialiser::Zeros);
            let index = i64::from(2 * at);
            network.nodes.extend([
                node("Parameter", &[], Some(("parameter", index)), layer),
                node("Parameter", &[], Some(("parameter", index + 1)), layer),
                node("MatMul", &[0, first], None, layer),
                node("Add", &[first + 2, first + 1], None, layer),
            ]);
            network.outputs.push(Output { task: layer.clone(), node: first + 3 });
        }
        Ok(network)
    }

    /// Scores the first task's prediction, plus a hundredth of the item's id, the feature, and the
    /// first number of the embedding, plus the time in minutes.
    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        let rows = request.candidates.len();
        let [tae, ids, feature] = &columns[..] else { return Err("three columns".into()) };
        let (Data::Numbers(tae), Data::Ids(ids), Data::Numbers(feature)) =
            (&tae.data, &ids.data, &feature.data)
        else {
            return Err("numbers, ids, numbers".into());
        };
        let score = |row: usize| {
            let told = ids[row] as f32 / 100.0 + feature[row] + tae[row * tae.len() / rows];
            predictions[0].values[row] + told + (request.time_ms / 60_000) as f32
        };
        let ranked = |row: usize| Ranked { candidate: row as u32, score: score(row) };
        let mut all: Vec<Ranked> = (0..rows).map(ranked).collect();
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(request.limit as usize);
        Ok(all)
    }

    /// Labels are the bits themselves, as far as f32 has them.
    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let labels = |task: &SchemaTask| TaskLabels {
            task: task.name.clone(),
            labels: batch.actions.iter().map(|bits| *bits as f32).collect(),
            mask: batch.known.iter().map(|known| u8::from(*known > 0)).collect(),
            weights: batch.values[0].values.clone(),
        };
        Ok(info.tasks.iter().map(labels).collect())
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        let share = |surface: &u32| (1 + surface) as f32 / (1 + info.surfaces.len()) as f32;
        batch.surface.iter().map(share).collect()
    }

    fn schedule(step: TrainingStep) -> f32 {
        let steps = (step.taken + step.planned + step.trained_rows) as f32;
        (steps / step.rows as f32 + step.learning_rate).min(1.0)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        let Evaluation { decision, slices } = evaluation;
        Verdict::Hold(format!("earlier_contract: {:?} {decision:?} {slices:?}", info.actions))
    }
}

fn node(op: &str, inputs: &[u32], attribute: Option<(&str, i64)>, layer: &str) -> Node {
    let attribute = attribute
        .map(|(name, value)| Attribute { name: name.into(), value: Value::Integer(value) });
    Node {
        op: op.into(),
        inputs: inputs.to_vec(),
        attributes: attribute.into_iter().collect(),
        layer: layer.into(),
    }
}

export!(EarlierContract);
