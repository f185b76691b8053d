//! Contract 2: its bindings, generated from `sdk/wit/2.0.0/expert.wit`, and the only place that
//! knows what contract 3 changed.
//!
//! Parameters are lowered from borrowed values, so that what is large (predictions, columns and
//! labels) is copied into the guest and nowhere else.

use wasmtime::Store;
use wasmtime::component::Linker;

use super::contract::{self as host, Column};
use super::engine::HostState;

wasmtime::component::bindgen!({
    path: "wit/2.0.0",
    world: "expert",
    ownership: Borrowing { duplicate_if_necessary: true },
});

use self::hypercast::expert::types as wit;

type Called<T> = wasmtime::Result<T>;

/// How many actions contract 2 has bits for.
const ACTIONS: usize = u32::BITS as usize;

/// Lets a linker offer the types of contract 2. Their only function, `log`, is as in contract 3.
pub(super) fn add_types(linker: &mut Linker<HostState>) -> Called<()> {
    linker.instance(&format!("{}{}", host::TYPES_IMPORT, host::EARLIER_VERSION)).map(drop)
}

/// Leaves out of a schema what contract 2 cannot express: the actions beyond its bits with the
/// tasks on them, and vectors.
pub(super) fn limit(info: &mut host::HostInfo) {
    let hidden = info.actions.split_off(info.actions.len().min(ACTIONS));
    let is_binary = |task: &host::SchemaTask| matches!(task.kind, host::TaskKind::Binary);
    info.tasks.retain(|task| !(is_binary(task) && hidden.contains(&task.label)));
    info.columns.clear();
}

pub(super) fn describe(
    guest: &Expert,
    store: &mut Store<HostState>,
    info: &host::HostInfo,
) -> Called<host::Description> {
    let raw = with_info(info, |info| guest.call_describe(store, info))?;
    let columns = |raw: Vec<wit::ColumnResult>| raw.into_iter().map(column).collect();
    let task = |wit::Task { name, kind }| host::Task { name, kind: kind_of(kind) };
    let wit::Limits { deadline_ms, memory_mib } = raw.limits;
    Ok(host::Description {
        name: raw.name,
        version: raw.version,
        surfaces: raw.surfaces,
        tasks: raw.tasks.into_iter().map(task).collect(),
        columns: columns(raw.columns),
        rank_columns: columns(raw.rank_columns),
        training_columns: Vec::new(),
        history_len: raw.history_len,
        fm_version: raw.fm_version,
        limits: host::Limits { deadline_ms, memory_mib },
        patience: None,
    })
}

pub(super) fn network(
    guest: &Expert,
    store: &mut Store<HostState>,
    info: &host::HostInfo,
) -> Called<Result<host::Network, String>> {
    let raw = with_info(info, |info| guest.call_network(store, info))?;
    Ok(raw.map(|wit::Network { parameters, nodes, outputs, extra_loss }| host::Network {
        parameters: parameters.into_iter().map(parameter).collect(),
        nodes: nodes.into_iter().map(node).collect(),
        outputs: outputs
            .into_iter()
            .map(|wit::Output { task, node }| host::Output { task, node, options: Vec::new() })
            .collect(),
        extra_loss,
        options: Vec::new(),
    }))
}

pub(super) fn rank(
    guest: &Expert,
    store: &mut Store<HostState>,
    request: &host::RankRequest,
    predictions: &[host::Prediction],
    columns: &[host::NamedColumn],
) -> Called<Result<Vec<host::Ranked>, String>> {
    let request = wit::RankRequest {
        surface: &request.surface,
        user: request.user,
        time_ms: request.time_ms,
        candidates: &request.candidates,
        limit: request.limit,
    };
    let predictions: Vec<_> = predictions.iter().map(prediction).collect();
    let columns: Vec<_> = columns.iter().filter_map(named_column).collect();
    let ranked = guest.call_rank(store, request, &predictions, &columns)?;
    let place =
        |wit::Ranked { candidate, score }| host::Ranked { candidate, score, propensity: None };
    Ok(ranked.map(|ranked| ranked.into_iter().map(place).collect()))
}

pub(super) fn labels(
    guest: &Expert,
    store: &mut Store<HostState>,
    info: &host::HostInfo,
    batch: &host::ActionBatch,
) -> Called<Result<Vec<host::TaskLabels>, String>> {
    let labels =
        with_info(info, |info| with_batch(batch, |batch| guest.call_labels(store, info, batch)))?;
    let of_task = |wit::TaskLabels { task, labels, mask, weights }| host::TaskLabels {
        task,
        labels,
        mask,
        weights,
    };
    Ok(labels.map(|labels| labels.into_iter().map(of_task).collect()))
}

pub(super) fn sample(
    guest: &Expert,
    store: &mut Store<HostState>,
    info: &host::HostInfo,
    batch: &host::ActionBatch,
) -> Called<Vec<f32>> {
    with_info(info, |info| with_batch(batch, |batch| guest.call_sample(store, info, batch)))
}

pub(super) fn schedule(
    guest: &Expert,
    store: &mut Store<HostState>,
    step: host::TrainingStep,
) -> Called<f32> {
    let host::TrainingStep { taken, planned, trained_rows, rows, learning_rate } = step;
    let step = wit::TrainingStep { taken, planned, trained_rows, rows, learning_rate };
    guest.call_schedule(store, step)
}

pub(super) fn evaluate(
    guest: &Expert,
    store: &mut Store<HostState>,
    info: &host::HostInfo,
    evaluation: &host::Evaluation,
) -> Called<host::Verdict> {
    let slices: Vec<_> = evaluation.slices.iter().map(slice).collect();
    let decision = match evaluation.decision {
        host::Decision::Publication => wit::Decision::Publication,
        host::Decision::Canary => wit::Decision::Canary,
    };
    let evaluation = wit::Evaluation { decision, slices: &slices };
    let verdict = with_info(info, |info| guest.call_evaluate(store, info, evaluation))?;
    Ok(match verdict {
        wit::Verdict::Publish => host::Verdict::Publish,
        wit::Verdict::Hold(why) => host::Verdict::Hold(why),
        wit::Verdict::RollBack(why) => host::Verdict::RollBack(why),
    })
}

/// Calls `call` with the schema as contract 2 has it. Its lists of texts are made anew, since they
/// are texts that are owned here.
fn with_info<T>(info: &host::HostInfo, call: impl FnOnce(wit::HostInfo) -> T) -> T {
    let task_surfaces: Vec<_> = info.tasks.iter().map(|task| texts(&task.surfaces)).collect();
    let tasks = info.tasks.iter().zip(&task_surfaces);
    let tasks: Vec<_> = tasks.map(|(task, surfaces)| schema_task(task, surfaces)).collect();
    call(wit::HostInfo {
        tae_dim: info.tae_dim,
        surfaces: &texts(&info.surfaces),
        actions: &texts(&info.actions),
        values: &texts(&info.values),
        tasks: &tasks,
        features: &texts(&info.features),
        ids: &texts(&info.ids),
        history_ids: &texts(&info.history_ids),
    })
}

/// Calls `call` with a batch whose bits are those of the actions that contract 2 has.
fn with_batch<T>(batch: &host::ActionBatch, call: impl FnOnce(wit::ActionBatch) -> T) -> T {
    let masks = |own: &[u64]| own.iter().map(|bits| *bits as u32).collect::<Vec<_>>();
    call(wit::ActionBatch {
        surface: &batch.surface,
        actions: &masks(&batch.actions),
        known: &masks(&batch.known),
        values: &batch.values.iter().map(outcome).collect::<Vec<_>>(),
    })
}

fn texts(own: &[String]) -> Vec<&str> {
    own.iter().map(String::as_str).collect()
}

fn schema_task<'a>(task: &'a host::SchemaTask, surfaces: &'a [&'a str]) -> wit::SchemaTask<'a> {
    let kind = match task.kind {
        host::TaskKind::Binary => wit::TaskKind::Binary,
        host::TaskKind::Regression => wit::TaskKind::Regression,
    };
    wit::SchemaTask { name: &task.name, kind, label: &task.label, surfaces }
}

fn prediction(own: &host::Prediction) -> wit::Prediction<'_> {
    wit::Prediction { task: &own.task, values: &own.values }
}

fn outcome(own: &host::Outcome) -> wit::Outcome<'_> {
    wit::Outcome { name: &own.name, values: &own.values }
}

fn slice(own: &host::Slice) -> wit::Slice<'_> {
    wit::Slice {
        task: &own.task,
        surface: own.surface.as_deref(),
        examples: own.examples,
        candidate: quality(own.candidate),
        serving: own.serving.map(quality),
    }
}

fn column(raw: wit::ColumnResult) -> Column {
    match raw {
        wit::ColumnResult::Tae => Column::Tae,
        wit::ColumnResult::Feature(name) => Column::Feature(name),
        wit::ColumnResult::Id(name) => Column::Id(name),
        wit::ColumnResult::HistoryId(name) => Column::HistoryId(name),
        wit::ColumnResult::HistoryActions => Column::HistoryActions,
        wit::ColumnResult::HistoryAge => Column::HistoryAge,
    }
}

/// A column that `rank` reads; none of a kind that contract 2 lacks, which no description of it can
/// declare.
fn named_column(own: &host::NamedColumn) -> Option<wit::NamedColumn<'_>> {
    let name = &own.column.name;
    let column = match own.column.kind.as_str() {
        "tae" => wit::ColumnParam::Tae,
        "feature" => wit::ColumnParam::Feature(name),
        "id" => wit::ColumnParam::Id(name),
        _ => return None,
    };
    let data = match &own.data {
        host::Data::Numbers(values) => wit::Data::Numbers(values),
        host::Data::Ids(values) => wit::Data::Ids(values),
        host::Data::Integers(_) => return None,
    };
    Some(wit::NamedColumn { column, data })
}

fn parameter(wit::Parameter { name, shape, init }: wit::Parameter) -> host::Parameter {
    let init = match init {
        wit::Initialiser::Zeros => host::Initialiser::Zeros,
        wit::Initialiser::Ones => host::Initialiser::Ones,
        wit::Initialiser::Constant(value) => host::Initialiser::Constant(value),
        wit::Initialiser::Normal(deviation) => host::Initialiser::Normal(deviation),
        wit::Initialiser::XavierUniform => host::Initialiser::XavierUniform,
        wit::Initialiser::KaimingUniform => host::Initialiser::KaimingUniform,
    };
    host::Parameter { name, shape, init, options: Vec::new() }
}

fn node(wit::Node { op, inputs, attributes, layer }: wit::Node) -> host::Node {
    let attribute = |wit::Attribute { name, value }| {
        let value = match value {
            wit::Value::Integer(value) => host::Value::Integer(value),
            wit::Value::Number(value) => host::Value::Number(value),
            wit::Value::Integers(values) => host::Value::Integers(values),
            wit::Value::Text(text) => host::Value::Text(text),
        };
        host::Attribute { name, value }
    };
    host::Node { op, inputs, attributes: attributes.into_iter().map(attribute).collect(), layer }
}

fn kind_of(kind: wit::TaskKind) -> host::TaskKind {
    match kind {
        wit::TaskKind::Binary => host::TaskKind::Binary,
        wit::TaskKind::Regression => host::TaskKind::Regression,
    }
}

fn quality(own: host::Quality) -> wit::Quality {
    let host::Quality { ne, auc, gauc, calibration, mse } = own;
    wit::Quality { ne, auc, gauc, calibration, mse }
}

#[cfg(test)]
mod tests {
    use hypercast_data::schema::{Task, TaskKind};
    use hypercast_fm::example::MAX_ACTIONS;

    use super::*;
    use crate::tests::build::{example, schema, vectors};

    #[test]
    fn a_plugin_is_offered_the_actions_that_its_masks_have_bits_for() {
        let mut schema = schema();
        let more = (schema.actions.len()..MAX_ACTIONS).map(|at| format!("action{at}"));
        schema.actions.extend(more);
        let task = |label: &str, kind| Task {
            name: format!("{label}_task"),
            label: label.into(),
            kind,
            ..schema.tasks[0].clone()
        };
        schema.tasks = vec![
            task("action31", TaskKind::Binary),
            task("action32", TaskKind::Binary),
            task("seconds", TaskKind::Regression),
        ];
        let whole = host::HostSchema::new(&schema, vectors());
        let mut info = whole.info.clone();
        limit(&mut info);
        assert_eq!(info.actions, schema.actions[..ACTIONS]);
        let tasks: Vec<&str> = info.tasks.iter().map(|task| &*task.label).collect();
        assert_eq!(tasks, ["action31", "seconds"]);
        let mut example = example(1, 0, 2);
        example.targets[1].outcome.actions = 1 << 40 | 1 << 31 | 1;
        example.targets[1].outcome.known = u64::MAX;
        let batch = host::action_batch(std::iter::once(&example), &info, whole.outcomes());
        assert_eq!(batch.actions[1], 1 << 40 | 1 << 31 | 1);
        let masks = with_batch(&batch, |batch| (batch.actions[1], batch.known[1]));
        assert_eq!(masks, (1 << 31 | 1, u32::MAX));
    }
}
