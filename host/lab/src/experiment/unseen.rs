//! Table 3: what an expert's tasks gain from an FM that was never trained on them.
//!
//! The FM learns other surfaces whole, but of one surface a fifth of the users,
//! and there one task alone, as an auxiliary one. The expert of that surface, on
//! all of its data, is compared with the same expert without TAE.

use hypercast_fm::{
    example::Example,
    spec::{FmSpec, Label, TaskSpec},
    trainer,
};
use serde_json::json;

use super::{
    Ground, Outcome,
    field::Arm,
    report::{Pair, arms_by_task},
    store_dir,
};
use crate::demo::Seconds;
use crate::error::{CommonErrors as _, Error, Result};
use crate::evaluate::stream::Users;
use hypercast_config::Config;
use hypercast_data::logs::LogReader;
use hypercast_train::fm::dataset_spec;

const ARMS: [&str; 2] = ["baseline", "+TAE"];

/// The share of the surface's users whose rows the FM learns.
const SHARE: f64 = 0.2;

/// Chooses those users independently of the users of the experiment.
const SALT: u64 = 0x5EED_0020;

/// The surface, and the task that the FM sees there.
struct Case {
    surface: u16,
    task: usize,
}

/// Runs it for every seed.
pub fn run(ground: &Ground<'_>, seconds: &mut Seconds) -> Result<Outcome> {
    let case = case(ground)?;
    let schema = &ground.dataset.schema;
    let seen = schema.tasks[case.task].name.clone();
    let surface = schema.surfaces[usize::from(case.surface)].clone();
    let spec = masked(
        &dataset_spec(ground.dataset)?,
        &case,
        schema.action(&schema.tasks[case.task].label),
    )?;
    let mut tallies = Vec::new();
    for &seed in &ground.options.seeds {
        let config = ground.seeded(seed);
        seconds.time("fm", || embed(ground, &config, &spec, &case))?;
        let log = LogReader::open(&config.paths.logs)?;
        let field = ground.field(&config, &log);
        let mut tally = ground.tally(&ARMS);
        for index in 0..ARMS.len() {
            let embedding = 0..config.fm.tae_width();
            let arm = Arm { index, embedding, without_tae: index == 0 };
            seconds.time("experts", || field.run(&arm, &[case.surface], &mut tally))?;
        }
        tallies.push(tally);
    }
    let found = ground.found(&tallies);
    let pairs = [0, 1].map(|arm| Pair { baseline: 0, arm });
    let mut rows = Vec::new();
    for cell in found.cells()?.into_iter().filter(|cell| cell.slice.0 == usize::from(case.surface))
    {
        let mut of_cell = seconds.time("bootstrap", || Ok(found.rows(&cell, &pairs)))?;
        let withheld = cell.slice.1 != case.task;
        of_cell.iter_mut().for_each(|row| {
            row.more.insert("withheld", withheld.into());
        });
        rows.extend(of_cell);
    }
    let table = arms_by_task(&rows, &surface)
        + &format!("{seen} was the FM's auxiliary task there; the others were withheld from it\n");
    let chosen = json!({ "surface": surface, "auxiliary_task": seen, "fm_share": SHARE });
    Ok(Outcome { name: "unseen", rows, models: Vec::new(), table, chosen })
}

fn case(ground: &Ground<'_>) -> Result<Case> {
    let schema = &ground.dataset.schema;
    let surface = ground.surface()?;
    let valid: Vec<usize> =
        ground.labels.tasks().filter(|&task| schema.task_valid(task, surface)).collect();
    let names = || valid.iter().map(|&task| &schema.tasks[task].name).collect::<Vec<_>>();
    let task = match &ground.options.task {
        Some(name) => valid.iter().copied().find(|&task| schema.tasks[task].name == *name),
        None => valid.first().copied(),
    };
    match task {
        Some(task) if valid.len() > 1 => Ok(Case { surface, task }),
        _ => Err(Error::invalid(format!(
            "surface {:?} has the binary tasks {:?}; two are needed, one of them --task",
            schema.surfaces[usize::from(surface)],
            names()
        ))),
    }
}

/// The FM's tasks without those of the surface, and the one as an auxiliary task of it.
fn masked(spec: &FmSpec, case: &Case, action: Option<usize>) -> Result<FmSpec> {
    let surface = usize::from(case.surface);
    let mut spec = spec.clone();
    for task in &mut spec.tasks {
        task.surfaces[surface] = false;
    }
    spec.tasks.retain(|task| task.surfaces.contains(&true));
    if spec.main_tasks().is_empty() {
        return Err(Error::invalid(
            "the experiment needs a second surface with a main task for the FM to learn",
        ));
    }
    let mut surfaces = vec![false; spec.surfaces.len()];
    surfaces[surface] = true;
    let label = Label::Action(action.expect("a binary task has an action"));
    let name = format!("one task of {}", spec.surfaces[surface]);
    spec.tasks.push(TaskSpec { name, main: false, label, surfaces, weight: 1.0 });
    spec.validate()?;
    Ok(spec)
}

/// The FM's pass; logs the surface's rows alone.
fn embed(ground: &Ground<'_>, config: &Config, spec: &FmSpec, case: &Case) -> Result<()> {
    let dir = store_dir(config, "fm")?;
    let mut trainer = trainer::create(&dir, &config.fm, spec, config.device)?;
    let mut log = ground.log(config, config.fm.tae_width())?;
    let stream = ground.stream(config, config.fm.max_history);
    let skip = stream.skip()?;
    let taught = Users { share: SHARE, salt: SALT };
    let learns =
        |example: &Example| example.surface != case.surface || taught.hold(example.user.id);
    stream.run("FM", |part| {
        let said = part.through(trainer.as_mut(), &learns)?;
        if part.history_only || part.seen < skip {
            return Ok(());
        }
        let own = |example: &Example| example.surface == case.surface;
        log.write_batch(part.examples, &said.tae, own)?;
        Ok(())
    })?;
    Ok(log.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fm_keeps_one_auxiliary_task_of_the_surface() {
        let task = |name: &str, main, surfaces: [bool; 2]| TaskSpec {
            name: name.into(),
            main,
            label: Label::Action(0),
            surfaces: surfaces.into(),
            weight: 1.0,
        };
        let spec = FmSpec {
            surfaces: vec!["a".into(), "b".into()],
            actions: 2,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            profile_ids: vec![],
            features: 0,
            tasks: vec![
                task("click", true, [true, true]),
                task("own", false, [false, true]),
                task("other", false, [true, false]),
            ],
            content: 0,
        };
        let masked = super::masked(&spec, &Case { surface: 1, task: 0 }, Some(0)).unwrap();
        let on_b: Vec<&TaskSpec> = masked.tasks.iter().filter(|task| task.surfaces[1]).collect();
        assert_eq!(on_b.len(), 1);
        assert!(!on_b[0].main && !on_b[0].surfaces[0]);
        let names: Vec<&str> = masked.tasks.iter().map(|task| task.name.as_str()).collect();
        assert_eq!(names, ["click", "other", "one task of b"]);
    }
}
