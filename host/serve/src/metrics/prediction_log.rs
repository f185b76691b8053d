//! Predictions of served requests until their outcomes are known. They give the NE of each version
//! on real traffic, whether it answered or was a shadow.
//!
//! Memory is bounded: the oldest requests are dropped. Outcomes come from the joiner's stream, one
//! per impression. Requests and readers of the quality take different locks, so that neither waits
//! for the other.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use hypercast_data::{
    dataset::Impression,
    schema::{Schema, TaskKind},
};

use hypercast_fm::metrics::ScoredValue;

use crate::{metrics::window::QualityWindow, threads::lock};

/// The most windows of surface, task and arm.
const WINDOWS: usize = 1024;

/// The predictions of one arm for one request.
#[derive(Debug, Clone)]
pub struct ArmPredictions {
    /// `NAME@VERSION`, or `fm@VERSION`.
    pub arm: String,
    /// By task, one value per item.
    pub tasks: BTreeMap<String, Vec<f32>>,
}

/// What a window of quality belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct QualityKey {
    /// The surface's index in the schema.
    pub surface: u16,
    /// The task's name.
    pub task: String,
    /// `NAME@VERSION`, or `fm@VERSION`.
    pub arm: String,
}

/// Predictions that wait for outcomes, and the quality of those whose outcomes are known.
pub struct PredictionLog {
    most: usize,
    waiting: Mutex<WaitingPredictions>,
    windows: Mutex<BTreeMap<QualityKey, QualityWindow>>,
    /// Outcomes that were compared, and those that were not.
    joined: AtomicU64,
    unknown: AtomicU64,
}

#[derive(Default)]
struct WaitingPredictions {
    order: VecDeque<u64>,
    requests: HashMap<u64, PredictedRequest>,
    values: usize,
}

#[derive(Default)]
struct PredictedRequest {
    items: Vec<u64>,
    /// Whether the outcome of each item was compared: a stream that was restored or written again
    /// brings it twice.
    compared: Vec<bool>,
    arms: Vec<ArmPredictions>,
}

/// A prediction whose outcome is known.
struct ComparedPrediction {
    key: QualityKey,
    kind: TaskKind,
    scored: ScoredValue,
}

impl PredictionLog {
    /// Holds at most `most` predicted values, but at least one request.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            waiting: Mutex::default(),
            windows: Mutex::default(),
            joined: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        }
    }

    /// Adds an arm's predictions for the items of a request, in their order, beside those of other
    /// arms.
    ///
    /// # Panics
    /// If a task does not have one value per item.
    pub fn keep(&self, request: u64, items: &[u64], predicted: ArmPredictions) {
        let values = predicted.tasks.values().map(Vec::len).sum::<usize>();
        assert_eq!(values, items.len() * predicted.tasks.len(), "a value an item");
        let inner = &mut *lock(&self.waiting);
        let request = inner.requests.entry(request).or_insert_with(|| {
            inner.order.push_back(request);
            PredictedRequest {
                items: items.to_vec(),
                compared: vec![false; items.len()],
                arms: Vec::new(),
            }
        });
        // A caller may use an id again for other items; predictions for those do not belong here.
        if request.items != items || request.arms.iter().any(|arm| arm.arm == predicted.arm) {
            return;
        }
        request.arms.push(predicted);
        inner.values += values;
        while inner.values > self.most && inner.order.len() > 1 {
            let oldest = inner.order.pop_front().expect("there are two");
            let gone = inner.requests.remove(&oldest).unwrap_or_default();
            inner.values -=
                gone.arms.iter().flat_map(|arm| arm.tasks.values()).map(Vec::len).sum::<usize>();
        }
    }

    /// Compares an impression's outcome with the predictions for it.
    pub fn outcome(&self, impression: &Impression, schema: &Schema, now_ms: i64) {
        let Some(compared) = self.compare(impression, schema) else {
            self.unknown.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.joined.fetch_add(1, Ordering::Relaxed);
        let mut windows = lock(&self.windows);
        for ComparedPrediction { key, kind, scored } in compared {
            if !windows.contains_key(&key) && windows.len() == WINDOWS {
                let oldest = windows.iter().min_by_key(|(_, window)| window.newest_ms());
                let oldest = oldest.expect("there are many").0.clone();
                windows.remove(&oldest);
            }
            let window = windows.entry(key).or_default();
            match kind {
                TaskKind::Binary => window.push(now_ms, scored.prediction, scored.label == 1.0),
                TaskKind::Regression => window.push_value(now_ms, scored),
            }
        }
    }

    /// What was predicted of an impression, beside what is known of it; none for a request that was
    /// not served here, and for an outcome that comes again.
    fn compare(&self, impression: &Impression, schema: &Schema) -> Option<Vec<ComparedPrediction>> {
        // A joiner in another process may have taken over a schema that has grown before this one.
        schema.surfaces.get(usize::from(impression.surface))?;
        let mut waiting = lock(&self.waiting);
        let request = waiting.requests.get_mut(&impression.request)?;
        let row = request.items.iter().position(|item| *item == impression.item)?;
        if std::mem::replace(&mut request.compared[row], true) {
            return None;
        }
        let mut compared = Vec::new();
        for arm in &request.arms {
            for (task, values) in &arm.tasks {
                // A task of a plugin's own has no outcome in the schema.
                let Some(at) = schema.task(task) else { continue };
                let (surface, arm) = (impression.surface, arm.arm.clone());
                let Some(label) = schema.label(at, surface, &impression.outcome) else { continue };
                let key = QualityKey { surface, task: task.clone(), arm };
                let (kind, prediction) = (schema.tasks[at].kind, values[row]);
                let scored = ScoredValue { prediction, label };
                compared.push(ComparedPrediction { key, kind, scored });
            }
        }
        Some(compared)
    }

    /// Quality by surface, task and arm.
    pub fn windows(&self) -> BTreeMap<QualityKey, QualityWindow> {
        lock(&self.windows).clone()
    }

    /// Outcomes that were compared, and those that were not: their request was not served here or
    /// was dropped, or they came again.
    pub fn counts(&self) -> (u64, u64) {
        (self.joined.load(Ordering::Relaxed), self.unknown.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example::{MAX_VALUES, Outcome};

    use super::*;
    use hypercast_data::dataset::ContextFeatures;

    fn schema() -> Schema {
        toml::from_str(
            "surfaces = ['feed']\nactions = ['click', 'like']\n\
             tasks = [{ name = 'click', role = 'main', kind = 'binary', label = 'click' },\n\
                      { name = 'like', role = 'main', kind = 'binary', label = 'like' }]",
        )
        .unwrap()
    }

    /// An impression whose click is known and whose like is not.
    fn clicked(request: u64, item: u64, happened: bool) -> Impression {
        Impression {
            request,
            time_ms: 1,
            outcome_ms: 2,
            user: 3,
            item,
            surface: 0,
            outcome: Outcome {
                actions: u64::from(happened),
                known: 1,
                values: [f32::NAN; MAX_VALUES],
            },
            context: ContextFeatures::default(),
            truth: Vec::new(),
            history_only: false,
        }
    }

    fn predicted(arm: &str, values: &[f32]) -> ArmPredictions {
        let tasks = ["click", "like", "of the plugin's own"];
        let tasks = tasks.map(|task| (task.to_owned(), values.to_vec()));
        ArmPredictions { arm: arm.into(), tasks: tasks.into() }
    }

    #[test]
    fn outcomes_are_compared_with_what_each_arm_predicted_of_the_item() {
        let (served, schema) = (PredictionLog::new(1000), schema());
        for request in 1..=100 {
            served.keep(request, &[7, 8], predicted("a@1.0.0", &[0.9, 0.1]));
            served.keep(request, &[7, 8], predicted("a@2.0.0", &[0.1, 0.9]));
        }
        // Six values per arm and request: the oldest requests were dropped.
        for request in 1..=100 {
            served.outcome(&clicked(request, 7, true), &schema, 1000);
            served.outcome(&clicked(request, 8, false), &schema, 1000);
            served.outcome(&clicked(request, 9, true), &schema, 1000);
        }
        let (joined, unknown) = served.counts();
        assert_eq!(joined, 2 * (1000 / 12), "{joined}");
        assert_eq!(joined + unknown, 300);
        let windows = served.windows();
        let arms: Vec<(&str, &str)> =
            windows.keys().map(|key| (key.task.as_str(), key.arm.as_str())).collect();
        assert_eq!(arms, [("click", "a@1.0.0"), ("click", "a@2.0.0")], "what is known alone");
        let ne = |arm: &str| {
            let key = QualityKey { surface: 0, task: "click".into(), arm: arm.into() };
            windows[&key].quality().ne.unwrap()
        };
        assert!(ne("a@1.0.0") < 0.2 && ne("a@2.0.0") > 2.0);
    }

    #[test]
    fn a_request_does_not_wait_for_who_reads_the_quality() {
        let (served, schema) = (PredictionLog::new(1000), schema());
        served.keep(1, &[7], predicted("a@1.0.0", &[0.9]));
        let reading = lock(&served.windows);
        served.keep(2, &[7], predicted("a@1.0.0", &[0.9]));
        std::thread::scope(|scope| {
            // An outcome waits for the reader, and no request waits for the outcome.
            scope.spawn(|| served.outcome(&clicked(1, 7, true), &schema, 1000));
            while served.counts().0 == 0 {
                std::thread::yield_now();
            }
            served.keep(3, &[7], predicted("a@1.0.0", &[0.9]));
            drop(reading);
        });
        assert_eq!(served.windows().len(), 1);
    }

    #[test]
    fn an_outcome_of_a_surface_that_is_not_known_yet_is_compared_with_nothing() {
        let (served, schema) = (PredictionLog::new(1000), schema());
        served.keep(1, &[7], predicted("a@1.0.0", &[0.9]));
        let on = |surface| Impression { surface, ..clicked(1, 7, true) };
        served.outcome(&on(1), &schema, 1000);
        assert_eq!((served.counts(), served.windows().len()), ((0, 1), 0));
        served.outcome(&on(0), &schema, 1000);
        assert_eq!((served.counts(), served.windows().len()), ((1, 1), 1));
    }

    #[test]
    fn an_id_that_comes_again_with_other_items_is_not_compared_with_them() {
        let (served, schema) = (PredictionLog::new(1000), schema());
        served.keep(1, &[7], predicted("a@1.0.0", &[0.9]));
        served.keep(1, &[8], predicted("a@2.0.0", &[0.9]));
        served.outcome(&clicked(1, 8, true), &schema, 1000);
        assert_eq!(served.counts(), (0, 1));
    }
}
