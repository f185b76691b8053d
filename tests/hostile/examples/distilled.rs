//! The network of `pointwise`, which learns the FM's predictions of its binary tasks as soft labels
//! beside the true ones, and reads them nowhere else. This is valid.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, TaskKind, losses};

struct Distilled;

impl Expert for Distilled {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe(env!("CARGO_CRATE_NAME"), info)
    }

    fn network(g: &Graph) {
        let is_taught = |task: &str| {
            let is_binary = |kind| matches!(kind, TaskKind::Binary);
            g.info().fm_logits().any(|known| known == task)
                && g.tasks().iter().any(|known| known.name == task && is_binary(known.kind))
        };
        hypercast_hostile::ranking_network(g, |task, logit| {
            if is_taught(task) {
                let teacher = g.fm_logit(task) + g.base_logit(task);
                g.loss(task, losses::bce(task, logit) + losses::distillation(task, logit, teacher));
            }
        });
    }
}

hypercast_sdk::export!(Distilled);
