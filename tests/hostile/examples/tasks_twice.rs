//! A description that names each task twice.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{self, types::Description};

struct TasksTwice;

impl Mutation for TasksTwice {
    const NAME: &'static str = "tasks_twice";

    fn describe(description: &mut Description) {
        description.tasks.extend(description.tasks.clone());
    }
}

type Component = Mutant<TasksTwice>;
raw::export_expert_world!(Component with_types_in raw);
