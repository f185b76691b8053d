//! The expert of one surface, which reads the features and learns the tasks that belong to it. It
//! is not hostile.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct SearchTeam;

impl Expert for SearchTeam {
    fn describe(info: &HostInfo) -> Description {
        Description::new("search_team", "1.0.0").surfaces(["search"]).all_tasks(info)
    }

    fn network(g: &Graph) {
        let own: Vec<&str> = g.info().own_features().collect();
        let mut parts = vec![g.tae()];
        parts.extend((!own.is_empty()).then(|| g.features(&own)));
        let all = g.concat(&parts);
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(all));
        }
    }
}

hypercast_sdk::export!(SearchTeam);
