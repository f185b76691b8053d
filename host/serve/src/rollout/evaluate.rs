//! Whether a version predicts well enough to answer more users: the plugin's own word on its quality on live traffic,
//! beside that of the version before.

use hypercast_expert::{
    ServedExpert,
    wasm::contract::{Decision, Evaluation, Slice, Verdict},
};

/// What is to become of a canary that measures so. A plugin that fails holds it.
pub(super) fn judge(expert: &ServedExpert, slices: Vec<Slice>) -> Verdict {
    let blueprint = expert.blueprint();
    let evaluation = Evaluation { decision: Decision::Canary, slices };
    let said = blueprint.plugin.evaluate(&blueprint.info, &evaluation);
    said.unwrap_or_else(|fault| Verdict::Hold(fault.to_string()))
}
