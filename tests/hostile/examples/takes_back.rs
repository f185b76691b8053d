//! `evaluate` publishes what there is first and takes back all that comes after it.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Evaluation, Expert, Graph, HostInfo, Verdict};

struct TakesBack;

impl Expert for TakesBack {
    fn describe(info: &HostInfo) -> Description {
        good::describe("takes_back", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        match evaluation.slices.iter().any(|slice| slice.serving.is_some()) {
            true => Verdict::RollBack("takes_back never wants anything new".into()),
            false => Verdict::Publish,
        }
    }
}

hypercast_sdk::export!(TakesBack);
