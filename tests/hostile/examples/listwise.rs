//! The network of `pointwise`, whose binary tasks also learn the order of each request's rows. This
//! is valid.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, TaskKind, losses};

struct Listwise;

impl Expert for Listwise {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe(env!("CARGO_CRATE_NAME"), info)
    }

    fn network(g: &Graph) {
        // Cross-entropy keeps the probabilities right, of which an order alone knows nothing.
        hypercast_hostile::ranking_network(g, |task, logit| {
            let is_binary = |kind| matches!(kind, TaskKind::Binary);
            if g.tasks().iter().any(|known| known.name == task && is_binary(known.kind)) {
                g.loss(task, losses::bce(task, logit) + losses::listwise_softmax(task, logit));
            }
        });
    }
}

hypercast_sdk::export!(Listwise);
