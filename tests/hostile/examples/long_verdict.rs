//! `evaluate` gives a reason of a mebibyte with control characters, which the host must cut and escape.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Evaluation, Expert, Graph, HostInfo, Verdict};

struct LongVerdict;

impl Expert for LongVerdict {
    fn describe(info: &HostInfo) -> Description {
        good::describe("long_verdict", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn evaluate(_info: &HostInfo, _evaluation: &Evaluation) -> Verdict {
        Verdict::Hold("long_verdict\n\u{1b}[31m".repeat(1 << 16))
    }
}

hypercast_sdk::export!(LongVerdict);
