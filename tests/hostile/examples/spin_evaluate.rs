//! `evaluate` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Evaluation, Expert, Graph, HostInfo, Verdict};

struct SpinEvaluate;

impl Expert for SpinEvaluate {
    fn describe(info: &HostInfo) -> Description {
        good::describe("spin_evaluate", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn evaluate(_info: &HostInfo, _evaluation: &Evaluation) -> Verdict {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(SpinEvaluate);
