//! The predictions of FMs, which may have other main tasks than the schema: those of another
//! process, or of before a task was added or removed.

use std::borrow::Cow;

use hypercast_fm::inference::FmOutput;
use hypercast_fm::spec::{FmSpec, TaskLabel, TaskSpec};

use super::{Schema, TaskKind};

/// The main tasks of a schema. Everything that reads an FM's predictions (experts and feature logs)
/// gets them through this, by name, so it can rely on one value a row and task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MainTasks {
    tasks: Vec<(String, TaskKind)>,
}

impl MainTasks {
    /// Those of a schema, in its order.
    pub fn new(schema: &Schema) -> MainTasks {
        let tasks = schema.main_tasks();
        MainTasks { tasks: tasks.map(|task| (task.name.clone(), task.kind)).collect() }
    }

    /// The number of them.
    pub fn count(&self) -> usize {
        self.tasks.len()
    }

    /// `[rows, main tasks]` of the schema, of what an FM of specification `fm` predicts: `[rows,
    /// main tasks]` of its own. A task that the FM lacks, or has of another kind, is NaN.
    pub fn predictions<'a>(&self, fm: &FmSpec, said: &'a [f32]) -> Cow<'a, [f32]> {
        self.by_name(fm.main_tasks(), said)
    }

    /// An FM's output with the predictions of the schema's main tasks.
    pub fn output(&self, fm: &FmSpec, output: FmOutput) -> FmOutput {
        let FmOutput { tae, main } = output;
        let aligned = match self.predictions(fm, &main) {
            Cow::Owned(aligned) => Some(aligned),
            Cow::Borrowed(_) => None,
        };
        FmOutput { tae, main: aligned.unwrap_or(main) }
    }

    fn by_name<'a>(&self, fm: &[TaskSpec], said: &'a [f32]) -> Cow<'a, [f32]> {
        let is = |(name, kind): &(String, TaskKind), own: &TaskSpec| {
            *name == own.name && *kind == kind_of(own.label)
        };
        let same = self.tasks.len() == fm.len();
        if same && self.tasks.iter().zip(fm).all(|(task, own)| is(task, own)) {
            return Cow::Borrowed(said);
        }
        let place = |task| fm.iter().position(|own| is(task, own));
        let places: Vec<Option<usize>> = self.tasks.iter().map(place).collect();
        let mut aligned = Vec::with_capacity(said.len() / fm.len().max(1) * places.len());
        for row in said.chunks_exact(fm.len().max(1)) {
            aligned.extend(places.iter().map(|at| at.map_or(f32::NAN, |at| row[at])));
        }
        Cow::Owned(aligned)
    }
}

fn kind_of(label: TaskLabel) -> TaskKind {
    match label {
        TaskLabel::Action(_) => TaskKind::Binary,
        TaskLabel::Value(_) => TaskKind::Regression,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::LabelTransform;

    #[test]
    fn predictions_of_another_fm_are_found_by_name() {
        let task = |name: &str, label| TaskSpec {
            name: name.into(),
            main: true,
            label,
            transform: LabelTransform::Identity,
            surfaces: vec![true],
            weight: 1.0,
        };
        let binary = |name: &str| (name.to_owned(), TaskKind::Binary);
        let tasks = MainTasks { tasks: vec![binary("click"), binary("like"), binary("seconds")] };
        let (click, like) = (TaskLabel::Action(0), TaskLabel::Action(1));
        let seconds = task("seconds", TaskLabel::Value(0));
        let other = [task("like", like), seconds, task("click", click)];
        let found = tasks.by_name(&other, &[0.1, 40.0, 0.2, 0.3, 50.0, 0.4]);
        let bits = |all: &[f32]| all.iter().map(|own| own.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&found), bits(&[0.2, 0.1, f32::NAN, 0.4, 0.3, f32::NAN]));
        assert!(tasks.by_name(&other, &[]).is_empty());

        let same =
            MainTasks { tasks: vec![binary("like"), ("seconds".into(), TaskKind::Regression)] };
        let found = same.by_name(&other[..2], &[0.1, 40.0]);
        assert!(matches!(found, Cow::Borrowed([0.1, 40.0])));
    }
}
