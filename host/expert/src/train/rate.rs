//! The plugin's word on the learning rate of a step. A plugin that fails is not let into the numbers: the step is
//! taken at the host's own rate, and the fault is counted and told.

use crate::Blueprint;
use crate::wasm::contract::TrainingStep;

/// Faults in a row after which the plugin is asked no more: one that spins would cost its deadline at every step.
const GIVE_UP: u32 = 3;

/// Asks `schedule` before each step.
#[derive(Debug, Default)]
pub(super) struct Rate {
    faults: u64,
    in_a_row: u32,
    last: Option<String>,
}

impl Rate {
    /// The factor of this step's rates; 1 where the plugin fails.
    pub(super) fn factor(&mut self, blueprint: &Blueprint, step: TrainingStep) -> f32 {
        if self.in_a_row == GIVE_UP {
            return 1.0;
        }
        match blueprint.plugin.schedule(step) {
            Ok(factor) => {
                self.in_a_row = 0;
                factor
            }
            Err(fault) => {
                self.faults += 1;
                self.in_a_row += 1;
                let fault = fault.to_string();
                if self.in_a_row == GIVE_UP {
                    tracing::warn!(
                        "{fault}, {GIVE_UP} times in a row: training goes on without its schedule"
                    );
                } else if self.last.as_ref() != Some(&fault) {
                    tracing::warn!("{fault}: the step is taken at the host's own rate");
                }
                self.last = Some(fault);
                1.0
            }
        }
    }

    /// Calls that failed.
    pub(super) fn faults(&self) -> u64 {
        self.faults
    }

    /// How the last of them failed.
    pub(super) fn last_fault(&self) -> Option<&str> {
        self.last.as_deref()
    }
}
