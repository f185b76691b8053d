//! How long outcomes take: a histogram of observed delays for each surface and action, and the
//! window that follows from it.
//!
//! Buckets grow by a quarter of an octave, so a quantile is at most 25 % too long. Counts are
//! halved from time to time, so that windows follow changes.

use serde::{Deserialize, Serialize};

use hypercast_config::JoinSettings;

/// The number of delays from which on a quantile is used.
const MIN_DELAYS: u32 = 100;

/// The number of delays at which all counts are halved.
const MAX_COUNT: u32 = 20_000;

/// Four buckets an octave, up to 2^40 ms (35 years).
const BUCKETS: usize = 4 * 40;

/// The delays of every surface and action.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OutcomeDelays {
    surfaces: Vec<SurfaceDelays>,
}

/// How long an action took after its impression.
#[derive(Debug, Clone, Copy)]
pub(super) struct ActionDelay {
    /// The action's number.
    pub(super) action: usize,
    /// Whether it is of the core. One that belongs to a surface changes no other action's window.
    pub(super) is_core: bool,
    pub(super) delay_ms: i64,
}

/// The delays of a surface: of all its actions of the core together, and of each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct SurfaceDelays {
    all: DelayHistogram,
    actions: Vec<DelayHistogram>,
    /// The window of each action, in milliseconds.
    windows: Vec<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct DelayHistogram {
    /// Counts up to the largest used bucket.
    counts: Vec<u32>,
    total: u32,
}

/// The settings that determine windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct WindowBounds {
    quantile: f64,
    min_ms: i64,
    max_ms: i64,
    first_ms: i64,
}

impl WindowBounds {
    pub(super) fn of(settings: &JoinSettings) -> WindowBounds {
        let ms = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX / 4);
        WindowBounds {
            quantile: settings.quantile,
            min_ms: ms(settings.min_window_s),
            max_ms: ms(settings.max_window_s),
            first_ms: ms(settings.first_window_s),
        }
    }
}

impl OutcomeDelays {
    pub(super) fn new(surfaces: usize, actions: usize, bounds: &WindowBounds) -> OutcomeDelays {
        let surface = SurfaceDelays {
            all: DelayHistogram::default(),
            actions: vec![DelayHistogram::default(); actions],
            windows: vec![bounds.first_ms.clamp(bounds.min_ms, bounds.max_ms); actions],
        };
        OutcomeDelays { surfaces: vec![surface; surfaces] }
    }

    /// Records the delay of an action after its impression.
    pub(super) fn observe(&mut self, surface: u16, delay: ActionDelay, bounds: &WindowBounds) {
        let ActionDelay { action, is_core, delay_ms } = delay;
        let surface = &mut self.surfaces[usize::from(surface)];
        let own = &mut surface.actions[action];
        own.add(delay_ms);
        let mut total = own.total;
        if is_core {
            surface.all.add(delay_ms);
            total = surface.all.total;
        }
        // Often enough to follow changes, rarely enough to cost nothing.
        if total.is_multiple_of(16) || total == MIN_DELAYS {
            surface.update_windows(bounds);
        }
    }

    /// The number of surfaces, and of actions of each.
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.surfaces.len(), self.surfaces.first().map_or(0, |surface| surface.actions.len()))
    }

    /// The same with the surfaces and actions of `fresh` that it lacks.
    pub(super) fn grown(mut self, fresh: &OutcomeDelays) -> OutcomeDelays {
        for (own, fresh) in self.surfaces.iter_mut().zip(&fresh.surfaces) {
            own.actions.extend(fresh.actions.iter().skip(own.actions.len()).cloned());
            own.windows.extend(fresh.windows.iter().skip(own.windows.len()));
        }
        self.surfaces.extend(fresh.surfaces.iter().skip(self.surfaces.len()).cloned());
        self
    }

    pub(super) fn update_windows(&mut self, bounds: &WindowBounds) {
        self.surfaces.iter_mut().for_each(|surface| surface.update_windows(bounds));
    }

    /// The window in milliseconds for the slowest of some actions (one bit each) on a surface.
    pub(super) fn window_ms(&self, surface: u16, actions: u64) -> i64 {
        let windows = &self.surfaces[usize::from(surface)].windows;
        let waited = windows.iter().enumerate().filter(|(action, _)| actions >> action & 1 == 1);
        waited.map(|(_, &window)| window).max().unwrap_or(0)
    }
}

impl SurfaceDelays {
    /// An action with few delays of its own has the window of its surface, and a surface with few
    /// delays has the first window.
    fn update_windows(&mut self, bounds: &WindowBounds) {
        let window = |histogram: &DelayHistogram| {
            (histogram.total >= MIN_DELAYS).then(|| histogram.quantile_ms(bounds.quantile))
        };
        let all = window(&self.all).unwrap_or(bounds.first_ms);
        for (action, window_ms) in self.actions.iter().zip(&mut self.windows) {
            *window_ms = window(action).unwrap_or(all).clamp(bounds.min_ms, bounds.max_ms);
        }
    }
}

impl DelayHistogram {
    fn add(&mut self, delay_ms: i64) {
        let bucket = bucket(delay_ms);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
        if self.total >= MAX_COUNT {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().sum();
        }
    }

    fn quantile_ms(&self, quantile: f64) -> i64 {
        let wanted = (quantile * f64::from(self.total)).ceil() as u32;
        let mut seen = 0;
        let reaches = |&count: &u32| {
            seen += count;
            seen >= wanted
        };
        let at = self.counts.iter().position(reaches).unwrap_or(self.counts.len());
        upper_ms(at)
    }
}

/// Integer arithmetic only, so that every machine computes the same buckets.
fn bucket(delay_ms: i64) -> usize {
    let delay = delay_ms.max(4) as u64;
    let octave = delay.ilog2();
    let quarter = (delay >> (octave - 2)) & 3;
    (4 * (octave as usize - 2) + quarter as usize).min(BUCKETS - 1)
}

/// The largest delay of a bucket.
fn upper_ms(bucket: usize) -> i64 {
    let (octave, quarter) = (bucket / 4, bucket % 4);
    ((5 + quarter as i64) << octave) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: WindowBounds =
        WindowBounds { quantile: 0.9, min_ms: 1000, max_ms: 3_600_000, first_ms: 600_000 };

    #[test]
    fn a_bucket_ends_at_most_a_quarter_above_what_is_in_it() {
        for delay in (1..100_000).chain([1 << 30, (1 << 39) + 7]) {
            let upper = upper_ms(bucket(delay));
            assert!(upper >= delay && upper <= (delay + delay / 4).max(4), "{delay}: {upper}");
        }
        assert_eq!(bucket(i64::MAX), BUCKETS - 1);
        assert_eq!(bucket(-5), bucket(0));
    }

    fn of_core(action: usize, delay_ms: i64) -> ActionDelay {
        ActionDelay { action, is_core: true, delay_ms }
    }

    #[test]
    fn windows_follow_delays_and_stay_in_bounds() {
        let mut delays = OutcomeDelays::new(2, 3, &BOUNDS);
        assert_eq!(delays.window_ms(0, 0b111), 600_000, "nothing was seen yet");
        for step in 0..1000 {
            delays.observe(0, of_core(0, 10_000 + step % 100), &BOUNDS);
        }
        let window = delays.window_ms(0, 0b001);
        assert!((10_000..=12_600).contains(&window), "{window}");
        assert_eq!(delays.window_ms(0, 0b100), window, "a rare action waits as its surface does");
        assert_eq!(delays.window_ms(1, 0b001), 600_000, "another surface has seen nothing");
        assert_eq!(delays.window_ms(0, 0), 0, "nothing to wait for");
        for _ in 0..200 {
            delays.observe(0, of_core(1, 60_000), &BOUNDS);
        }
        assert!(delays.window_ms(0, 0b011) >= 60_000, "the slowest decides");
        // Delays become ten times longer: what was before is forgotten.
        for _ in 0..60_000 {
            delays.observe(0, of_core(0, 100_000), &BOUNDS);
        }
        let window = delays.window_ms(0, 0b001);
        assert!((100_000..=126_000).contains(&window), "{window}");
        for _ in 0..60_000 {
            delays.observe(0, of_core(0, 1), &BOUNDS);
            delays.observe(0, of_core(1, i64::MAX), &BOUNDS);
        }
        assert_eq!(delays.window_ms(0, 0b001), BOUNDS.min_ms);
        assert_eq!(delays.window_ms(0, 0b010), BOUNDS.max_ms);
    }

    #[test]
    fn an_action_that_belongs_to_a_surface_changes_its_own_window_alone() {
        let mut delays = OutcomeDelays::new(1, 3, &BOUNDS);
        for step in 0..200 {
            delays.observe(0, of_core(0, 10_000), &BOUNDS);
            let own = ActionDelay { is_core: false, ..of_core(2, 1_000_000 + step) };
            delays.observe(0, own, &BOUNDS);
        }
        let [known, rare, own] = [0b001, 0b010, 0b100].map(|actions| delays.window_ms(0, actions));
        assert!(known < 13_000 && rare == known, "{known} {rare}");
        assert!(own >= 1_000_000, "{own}");
    }
}
