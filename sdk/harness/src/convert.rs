//! Conversions between the two sets of types generated from `expert.wit`: the SDK's, which a native
//! expert uses, and the host's.
//!
//! Each conversion names every field, so a field added to the contract is a compile error here.

use hypercast_expert::wasm::contract as host;
use hypercast_sdk::raw::types as sdk;

/// The SDK's form of the host's schema.
pub fn info(info: &host::HostInfo) -> sdk::HostInfo {
    let host::HostInfo {
        tae_dim,
        surfaces,
        actions,
        values,
        tasks,
        features,
        ids,
        history_ids,
        columns,
    } = info.clone();
    let task = |task: host::SchemaTask| {
        let host::SchemaTask { name, kind, label, surfaces } = task;
        let kind = match kind {
            host::TaskKind::Binary => sdk::TaskKind::Binary,
            host::TaskKind::Regression => sdk::TaskKind::Regression,
        };
        sdk::SchemaTask { name, kind, label, surfaces }
    };
    let tasks = tasks.into_iter().map(task).collect();
    let offered =
        |host::OfferedColumn { kind, name, width }| sdk::OfferedColumn { kind, name, width };
    let columns = columns.into_iter().map(offered).collect();
    sdk::HostInfo { tae_dim, surfaces, actions, values, tasks, features, ids, history_ids, columns }
}

/// The host's form of a description.
pub(crate) fn description(description: sdk::Description) -> Result<host::Description, String> {
    let sdk::Description {
        name,
        version,
        surfaces,
        tasks,
        columns,
        rank_columns,
        training_columns,
        history_len,
        fm_version,
        limits: sdk::Limits { deadline_ms, memory_mib },
        options,
    } = description;
    let task = |task: sdk::Task| {
        let kind = match task.kind {
            sdk::TaskKind::Binary => host::TaskKind::Binary,
            sdk::TaskKind::Regression => host::TaskKind::Regression,
        };
        host::Task { name: task.name, kind }
    };
    let columns_of = |own: Vec<sdk::Column>| own.into_iter().map(wire_column).collect();
    host::Description::read(host::WireDescription {
        name,
        version,
        surfaces,
        tasks: tasks.into_iter().map(task).collect(),
        columns: columns_of(columns),
        rank_columns: columns_of(rank_columns),
        training_columns: columns_of(training_columns),
        history_len,
        fm_version,
        limits: host::Limits { deadline_ms, memory_mib },
        options: options.into_iter().map(attribute).collect(),
    })
}

/// The host's form of a network.
pub fn network(network: sdk::Network) -> host::Network {
    let sdk::Network { parameters, nodes, outputs, extra_loss, options } = network;
    let parameter = |parameter: sdk::Parameter| {
        let sdk::Parameter { name, shape, init, options } = parameter;
        let options = options.into_iter().map(attribute).collect();
        let init = match init {
            sdk::Initialiser::Zeros => host::Initialiser::Zeros,
            sdk::Initialiser::Ones => host::Initialiser::Ones,
            sdk::Initialiser::Constant(value) => host::Initialiser::Constant(value),
            sdk::Initialiser::Normal(deviation) => host::Initialiser::Normal(deviation),
            sdk::Initialiser::XavierUniform => host::Initialiser::XavierUniform,
            sdk::Initialiser::KaimingUniform => host::Initialiser::KaimingUniform,
        };
        host::Parameter { name, shape, init, options }
    };
    let node = |node: sdk::Node| {
        let sdk::Node { op, inputs, attributes, layer } = node;
        let attributes = attributes.into_iter().map(attribute).collect();
        host::Node { op, inputs, attributes, layer }
    };
    let attributes = |of: Vec<sdk::Attribute>| of.into_iter().map(attribute).collect();
    let output = |sdk::Output { task, node, options }| host::Output {
        task,
        node,
        options: attributes(options),
    };
    let parameters = parameters.into_iter().map(parameter).collect();
    let nodes = nodes.into_iter().map(node).collect();
    let outputs = outputs.into_iter().map(output).collect();
    host::Network { parameters, nodes, outputs, extra_loss, options: attributes(options) }
}

pub(crate) fn rank_request(request: &host::RankRequest) -> sdk::RankRequest {
    let host::RankRequest { surface, user, time_ms, request, seed, candidates, limit } =
        request.clone();
    sdk::RankRequest { surface, user, time_ms, request, seed, candidates, limit }
}

pub(crate) fn predictions(predictions: &[host::Prediction]) -> Vec<sdk::Prediction> {
    let one = |host::Prediction { task, values }| sdk::Prediction { task, values };
    predictions.iter().cloned().map(one).collect()
}

pub(crate) fn columns(columns: &[host::NamedColumn]) -> Vec<sdk::NamedColumn> {
    let one = |host::NamedColumn { column, data }| {
        let data = match data {
            host::Data::Numbers(values) => sdk::Data::Numbers(values),
            host::Data::Ids(values) => sdk::Data::Ids(values),
            host::Data::Integers(values) => sdk::Data::Integers(values),
        };
        let host::WireColumn { kind, name } = column;
        sdk::NamedColumn { column: sdk::Column { kind, name }, data }
    };
    columns.iter().cloned().map(one).collect()
}

pub(crate) fn ranked(ranked: Vec<sdk::Ranked>) -> Vec<host::Ranked> {
    let one = |sdk::Ranked { candidate, score, propensity }| host::Ranked {
        candidate,
        score,
        propensity,
    };
    ranked.into_iter().map(one).collect()
}

pub(crate) fn action_batch(batch: &host::ActionBatch) -> sdk::ActionBatch {
    let host::ActionBatch { surface, actions, known, values, columns: own } = batch.clone();
    let value = |host::Outcome { name, values }| sdk::Outcome { name, values };
    let values = values.into_iter().map(value).collect();
    sdk::ActionBatch { surface, actions, known, values, columns: columns(&own) }
}

pub(crate) fn labels(labels: Vec<sdk::TaskLabels>) -> Vec<host::TaskLabels> {
    let one = |sdk::TaskLabels { task, labels, mask, weights }| host::TaskLabels {
        task,
        labels,
        mask,
        weights,
    };
    labels.into_iter().map(one).collect()
}

pub(crate) fn step(step: host::TrainingStep) -> sdk::TrainingStep {
    let host::TrainingStep { taken, planned, trained_rows, rows, learning_rate } = step;
    sdk::TrainingStep { taken, planned, trained_rows, rows, learning_rate }
}

pub(crate) fn evaluation(evaluation: &host::Evaluation) -> sdk::Evaluation {
    let host::Evaluation { decision, slices } = evaluation.clone();
    let decision = match decision {
        host::Decision::Publication => sdk::Decision::Publication,
        host::Decision::Canary => sdk::Decision::Canary,
    };
    let quality = |host::Quality { ne, auc, gauc, calibration, mse }| sdk::Quality {
        ne,
        auc,
        gauc,
        calibration,
        mse,
    };
    let slice = |host::Slice { task, surface, examples, candidate, serving }| sdk::Slice {
        task,
        surface,
        examples,
        candidate: quality(candidate),
        serving: serving.map(quality),
    };
    sdk::Evaluation { decision, slices: slices.into_iter().map(slice).collect() }
}

pub(crate) fn evaluation_rows(rows: &host::EvaluationRows) -> sdk::EvaluationRows {
    let host::EvaluationRows { request, batch, tasks } = rows;
    let task = |host::ScoredTask { task, labels, mask, candidate, serving }| sdk::ScoredTask {
        task,
        labels,
        mask,
        candidate,
        serving,
    };
    let tasks = tasks.iter().cloned().map(task).collect();
    sdk::EvaluationRows { request: request.clone(), batch: action_batch(batch), tasks }
}

pub(crate) fn verdict(verdict: sdk::Verdict) -> host::Verdict {
    match verdict {
        sdk::Verdict::Publish => host::Verdict::Publish,
        sdk::Verdict::Hold(why) => host::Verdict::Hold(why),
        sdk::Verdict::RollBack(why) => host::Verdict::RollBack(why),
    }
}

fn attribute(attribute: sdk::Attribute) -> host::Attribute {
    let value = match attribute.value {
        sdk::Value::Integer(value) => host::Value::Integer(value),
        sdk::Value::Number(value) => host::Value::Number(value),
        sdk::Value::Integers(values) => host::Value::Integers(values),
        sdk::Value::Numbers(values) => host::Value::Numbers(values),
        sdk::Value::Text(text) => host::Value::Text(text),
        sdk::Value::Texts(texts) => host::Value::Texts(texts),
    };
    host::Attribute { name: attribute.name, value }
}

/// The host's form of a column.
///
/// # Panics
/// The SDK has a kind that the host lacks.
pub fn column(column: sdk::Column) -> host::Column {
    host::Column::read(wire_column(column)).expect("the host knows the SDK's kinds")
}

fn wire_column(sdk::Column { kind, name }: sdk::Column) -> host::WireColumn {
    host::WireColumn { kind, name }
}
