//! What becomes of a thread on which a guest runs on: it gives way to others, and where the call takes long, the plugin's
//! gate hears of it.
//!
//! A thread of a pool says how it gives way, by [`on_this_thread`], and is told once a call. Most calls end long before. When a call
//! must end is its deadline's to say, and whether its plugin is asked again the breaker's.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use super::gate::Gate;
use hypercast_core::clock::thread_time;

/// How much of the processor a call takes before its thread gives way: dozens of times what an ordinary `rank` does. That
/// costs as much as starting a thread.
const SHORT_MS: f64 = 2.0;

thread_local! {
    static GIVE_WAY: Cell<Option<fn()>> = const { Cell::new(None) };
}

/// Says what the calling thread does when a call on it does not end soon. Threads that never say do nothing.
pub fn on_this_thread(give_way: fn()) {
    GIVE_WAY.set(Some(give_way));
}

/// After how many milliseconds of the processor a call is long, and who hears of it.
pub(super) struct Watch {
    /// None for calls that no gate lets in.
    pub(super) gate: Option<Arc<Gate>>,
    pub(super) slow_ms: f64,
}

/// A call under way: what is left of it in ticks of the engine's epoch, and what was found of it. Dropping it ends it.
pub(super) struct Turn {
    ticks_left: u64,
    start: Duration,
    watch: Watch,
    gave_way: bool,
    long: bool,
}

impl Turn {
    /// A call that begins on this thread and may last `ticks`; with the ticks until [`Turn::next`] is to be asked.
    pub(super) fn begin(ticks: u64, watch: Watch) -> (Turn, u64) {
        // None takes more of the processor than has gone by.
        let first = ticks.min(SHORT_MS.min(watch.slow_ms).ceil() as u64).max(1);
        let ticks_left = ticks.saturating_sub(first);
        (Turn { ticks_left, start: thread_time(), watch, gave_way: false, long: false }, first)
    }

    /// The ticks until it is to be asked again; none where the call has had all of its time.
    pub(super) fn next(&mut self) -> Option<u64> {
        // By the processor's time: a call that waited for a busy machine is not long.
        let took_ms = thread_time().saturating_sub(self.start).as_secs_f64() * 1e3;
        if !self.gave_way && took_ms >= SHORT_MS {
            self.gave_way = true;
            if let Some(give_way) = GIVE_WAY.get() {
                give_way();
            }
        }
        if !self.long && took_ms >= self.watch.slow_ms {
            self.long = true;
            if let Some(gate) = &self.watch.gate {
                gate.grew_long();
            }
        }
        let told = self.gave_way && self.long;
        let step = if told { self.ticks_left } else { self.ticks_left.min(1) };
        self.ticks_left -= step;
        (step > 0).then_some(step)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let (true, Some(gate)) = (self.long, &self.watch.gate) {
            gate.long_ended();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gate::GateConfig;
    use super::*;

    thread_local! {
        static GAVE_WAY: Cell<u32> = const { Cell::new(0) };
    }

    fn busy(time_ms: u64) {
        let start = thread_time();
        while thread_time() - start < Duration::from_millis(time_ms) {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_long_call_gives_way_once_has_all_of_its_ticks_and_lets_no_other_in() {
        on_this_thread(|| GAVE_WAY.set(GAVE_WAY.get() + 1));
        let gate = Arc::new(Gate::default());
        let watch = || Watch { gate: Some(gate.clone()), slow_ms: 5.0 };
        let (mut turn, first) = Turn::begin(51, watch());
        assert_eq!((first, GAVE_WAY.get()), (2, 0));
        assert_eq!((turn.next(), GAVE_WAY.get()), (Some(1), 0), "it has hardly used the processor");
        busy(2);
        assert_eq!((turn.next(), GAVE_WAY.get()), (Some(1), 1));
        assert!(gate.enter(&GateConfig::default()).is_ok(), "it may end soon");
        busy(3);
        assert_eq!((turn.next(), GAVE_WAY.get()), (Some(47), 1));
        assert_eq!((turn.next(), GAVE_WAY.get()), (None, 1));
        assert!(gate.enter(&GateConfig::default()).is_err());
        drop(turn);
        assert!(gate.enter(&GateConfig::default()).is_ok());
        let (mut turn, first) = Turn::begin(2, watch());
        assert_eq!((turn.next(), first), (None, 2));
    }
}
