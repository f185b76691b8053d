//! Makes a plan that breaks a promise as small as possible, so that a person can read its trace.

use crate::{plan::Plan, world::Simulation};

/// The smallest plan found that breaks the promise that `plan` breaks first; none if it breaks
/// none.
pub fn smallest(plan: &Plan) -> Option<Plan> {
    let oracle = first_broken(plan)?;
    let still_breaks = |plan: &Plan| first_broken(plan) == Some(oracle);
    let mut smallest = plan.clone();
    loop {
        let size = |plan: &Plan| plan.faults.len() + plan.requests.len() + plan.pushes.len();
        let before = size(&smallest);
        smallest = without(smallest, |plan| &mut plan.faults, &still_breaks);
        smallest = without(smallest, |plan| &mut plan.requests, &still_breaks);
        smallest = without(smallest, |plan| &mut plan.pushes, &still_breaks);
        if before == size(&smallest) {
            return Some(smallest);
        }
    }
}

fn first_broken(plan: &Plan) -> Option<&'static str> {
    let world = Simulation::run(plan, None, false);
    let ledger = world.ledger.borrow();
    ledger.violations.first().map(|violation| violation.oracle)
}

/// Removes parts of a list: first halves, then smaller parts, down to single entries.
fn without<T>(
    mut plan: Plan,
    list: impl Fn(&mut Plan) -> &mut Vec<T>,
    still_breaks: &impl Fn(&Plan) -> bool,
) -> Plan {
    let mut part = list(&mut plan).len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < list(&mut plan).len() {
            let mut smaller = plan.clone();
            let end = (at + part).min(list(&mut smaller).len());
            list(&mut smaller).drain(at..end);
            if still_breaks(&smaller) {
                plan = smaller;
            } else {
                at += part;
            }
        }
        part /= 2;
    }
    plan
}
