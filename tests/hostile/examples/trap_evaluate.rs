//! `evaluate` panics, which is a Wasm trap.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Evaluation, Expert, Graph, HostInfo, Verdict};

struct TrapEvaluate;

impl Expert for TrapEvaluate {
    fn describe(info: &HostInfo) -> Description {
        good::describe("trap_evaluate", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        panic!("as this guest is meant to, with {} slices", evaluation.slices.len())
    }
}

hypercast_sdk::export!(TrapEvaluate);
