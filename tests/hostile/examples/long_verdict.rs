//! `evaluate` returns a reason of one mebibyte with control characters, which the host must shorten
//! and escape.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Evaluation, HostInfo, Verdict};

hostile_expert! {
    fn evaluate(_info: &HostInfo, _evaluation: &Evaluation) -> Verdict {
        Verdict::Hold("long_verdict\n\u{1b}[31m".repeat(1 << 16))
    }
}
