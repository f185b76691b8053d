//! Table 3: the gain of an expert's tasks from an FM that was never trained on them.
//!
//! The FM learns all of the other surfaces. Of one surface it learns a fifth of the users, and only
//! one task, as an auxiliary one. The expert of that surface, on all of its data, is compared with
//! the same expert without TAE.

use hypercast_config::Config;
use hypercast_fm::{
    example::Example,
    inference::FmOutput,
    spec::{FmSpec, TaskLabel, TaskSpec},
};
use hypercast_train::fm::dataset_spec;
use serde_json::json;

use super::{ExperimentContext, ExperimentReport, report::arms_by_task, runner::ExperimentArm};
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::stream::UserSample,
};

const ARMS: [&str; 2] = ["baseline", "+TAE"];

/// The share of the surface's users whose rows the FM learns.
const SHARE: f64 = 0.2;

/// Chooses those users independently of the experiment's sample of users.
const SALT: u64 = 0x5EED_0020;

/// The surface, and the only task that the FM learns there.
struct UnseenCase {
    surface: u16,
    task: usize,
}

/// Runs it for every seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let case = case(context)?;
    let schema = &context.dataset.schema;
    let seen = schema.tasks[case.task].name.clone();
    let surface = schema.surfaces[usize::from(case.surface)].clone();
    let spec = masked(
        &dataset_spec(context.dataset)?,
        &case,
        schema.action(&schema.tasks[case.task].label),
    )?;
    let tallies = context.tallies(&ARMS, |config, tally| {
        context.times.time("fm", || embed(context, config, &spec, &case))?;
        let runner = context.runner(config, 0)?;
        for index in 0..ARMS.len() {
            let embedding = 0..config.fm.tae_width();
            let without_tae = index == 0;
            let arm = ExperimentArm { index, embedding, without_tae, with_fm_logits: false };
            runner.run(&arm, &[case.surface], tally)?;
        }
        Ok(())
    })?;
    let mut rows = context.rows(&tallies, Some(case.surface))?;
    for row in &mut rows {
        row.more.insert("withheld", (row.task != seen).into());
    }
    let table = arms_by_task(&rows, &surface)
        + &format!("{seen} was the FM's auxiliary task there; the others were withheld from it\n");
    let chosen = json!({ "surface": surface, "auxiliary_task": seen, "fm_share": SHARE });
    Ok(context.report(table, rows, Vec::new(), chosen))
}

fn case(context: &ExperimentContext<'_>) -> Result<UnseenCase> {
    let schema = &context.dataset.schema;
    let surface = context.surface()?;
    let valid: Vec<usize> =
        context.labels.tasks().filter(|&task| schema.task_valid(task, surface)).collect();
    let names = || valid.iter().map(|&task| &schema.tasks[task].name).collect::<Vec<_>>();
    let task = match &context.options.task {
        Some(name) => valid.iter().copied().find(|&task| schema.tasks[task].name == *name),
        None => valid.first().copied(),
    };
    match task {
        Some(task) if valid.len() > 1 => Ok(UnseenCase { surface, task }),
        _ => Err(Error::invalid(format!(
            "surface {:?} has the binary tasks {:?}; two are needed, and --task must be one of them",
            schema.surfaces[usize::from(surface)],
            names()
        ))),
    }
}

/// The FM's specification without the surface's tasks, except for the one as an auxiliary task.
fn masked(spec: &FmSpec, case: &UnseenCase, action: Option<usize>) -> Result<FmSpec> {
    let surface = usize::from(case.surface);
    let mut spec = spec.clone();
    for task in &mut spec.tasks {
        task.surfaces[surface] = false;
    }
    spec.tasks.retain(|task| task.surfaces.contains(&true));
    // Examples end with what the module reads all the same.
    if let Some(own) = spec.alignments.get_mut(&spec.surfaces[surface]) {
        own.tasks.clear();
    }
    if spec.main_tasks().is_empty() {
        return Err(Error::invalid(
            "the experiment needs a second surface with a main task for the FM to learn",
        ));
    }
    let mut surfaces = vec![false; spec.surfaces.len()];
    surfaces[surface] = true;
    let label = TaskLabel::Action(action.expect("a binary task has an action"));
    let name = format!("one task of {}", spec.surfaces[surface]);
    spec.tasks.push(TaskSpec {
        name,
        main: false,
        label,
        transform: Default::default(),
        surfaces,
        weight: 1.0,
    });
    spec.validate()?;
    Ok(spec)
}

/// Runs the FM, and logs only the surface's rows.
fn embed(
    context: &ExperimentContext<'_>,
    config: &Config,
    spec: &FmSpec,
    case: &UnseenCase,
) -> Result<()> {
    let mut trainer = context.fm(config, "fm", &config.fm, spec)?;
    let learned = UserSample { share: SHARE, salt: SALT };
    let learns =
        |example: &Example| example.surface != case.surface || learned.contains(example.user.id);
    let stream = context.stream(config, config.fm.max_history);
    stream.log("FM", &[config.fm.tae_width()], Some(case.surface), |part, _| {
        let tae = part.through(trainer.as_mut(), &learns)?.tae;
        Ok(vec![FmOutput { tae, ..FmOutput::default() }])
    })
}

#[cfg(test)]
mod tests {
    use hypercast_fm::alignment_spec::AlignmentSpec;

    use super::*;

    #[test]
    fn the_fm_keeps_one_auxiliary_task_of_the_surface() {
        let task = |name: &str, main, surfaces: [bool; 2]| TaskSpec {
            name: name.into(),
            main,
            label: TaskLabel::Action(0),
            transform: Default::default(),
            surfaces: surfaces.into(),
            weight: 1.0,
        };
        let module = AlignmentSpec {
            hidden: vec![8],
            features: Some(vec!["words".into()]),
            ids: Vec::new(),
            tasks: vec!["own".into()],
            training_only: Default::default(),
        };
        let spec = FmSpec {
            surfaces: vec!["a".into(), "b".into()],
            actions: 2,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            item_optional: Vec::new(),
            profile_ids: vec![],
            id_widths: Default::default(),
            features: 0,
            tasks: vec![
                task("click", true, [true, true]),
                task("own", false, [false, true]),
                task("other", false, [true, false]),
            ],
            content: 0,
            training_only: Default::default(),
            alignments: [("b".to_owned(), module.clone())].into(),
        };
        let masked = super::masked(&spec, &UnseenCase { surface: 1, task: 0 }, Some(0)).unwrap();
        let on_b: Vec<&TaskSpec> = masked.tasks.iter().filter(|task| task.surfaces[1]).collect();
        assert_eq!(on_b.len(), 1);
        assert!(!on_b[0].main && !on_b[0].surfaces[0]);
        let names: Vec<&str> = masked.tasks.iter().map(|task| task.name.as_str()).collect();
        assert_eq!(names, ["click", "other", "one task of b"]);
        let inputs_alone = AlignmentSpec { tasks: Vec::new(), ..module };
        assert_eq!(masked.alignments["b"], inputs_alone);
    }
}
