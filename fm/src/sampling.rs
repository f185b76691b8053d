//! Chooses which parts of an example a training step learns from.
//!
//! Two settings leave parts out. Stochastic length (arXiv 2402.17152, section 3.2) thins long
//! histories, because the cost of attention is quadratic in their length. Downsampling by surface
//! leaves out candidates without a positive action. Predictions and metrics always use whole
//! examples.

use crate::{
    example::{Event, Example},
    hash_rng::uniform,
    spec::{FmConfig, FmSpec},
    training_only::ReadFor,
};
use hypercast_core::hash::mix_parts;

/// The part of a history that the model reads: its newest events, from a start that rarely moves.
///
/// Every token has attended to all tokens before it, so a window that slid with every new event
/// would have to be encoded again each time. The window therefore starts at one of the `anchors`
/// oldest events that fit, chosen by a hash of the events: the choice depends only on the events
/// and holds for about `anchors / 2` new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryWindow {
    /// The maximum number of events.
    pub max_events: usize,
    /// The number of candidates for the first event; 0 or 1 takes the oldest that fits.
    pub anchors: usize,
}

impl HistoryWindow {
    /// The index of the first event that is read.
    pub fn first_index(self, history: &[Event]) -> usize {
        // A history of exactly the maximum may be the end of a longer one.
        let Some(oldest) = history.len().checked_sub(self.max_events) else { return 0 };
        let last = (oldest + self.anchors.max(1)).min(history.len());
        let rank = |event: &Event| mix_parts(&[event.time_ms as u64, event.item.id]);
        (oldest..last).min_by_key(|&at| (rank(&history[at]), at)).unwrap_or(oldest)
    }
}

/// The parts of an example that go into a batch.
#[derive(Debug, Clone)]
pub struct ExampleSelection<'a> {
    /// The example that the parts belong to.
    pub example: &'a Example,
    /// Indices of the selected history events, ascending.
    pub events: Vec<usize>,
    /// The selected targets, by ascending index.
    pub targets: Vec<WeightedTarget>,
    /// Whether the batch is to learn from, or to predict as serving does.
    pub reader: ReadFor,
}

/// A selected target and its weight in the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightedTarget {
    /// The target's index in its example.
    pub index: usize,
    /// The factor of its loss.
    pub weight: f32,
}

impl<'a> ExampleSelection<'a> {
    /// The events in the window and every target, with weights of 1, as serving reads them.
    pub fn whole(example: &'a Example, window: HistoryWindow) -> Self {
        let length = example.history.len();
        Self {
            example,
            events: (window.first_index(&example.history)..length).collect(),
            targets: unweighted(0..example.targets.len()),
            reader: ReadFor::Prediction,
        }
    }
}

/// Targets with weights of 1.
pub(crate) fn unweighted(indices: std::ops::Range<usize>) -> Vec<WeightedTarget> {
    indices.map(|index| WeightedTarget { index, weight: 1.0 }).collect()
}

/// Splits examples into parts of at most `requests` requests and about `bytes` of activations, so
/// that memory is bounded however long the histories are, and however large the alignment modules
/// of `spec`. A single example above `bytes` is a part of its own.
pub(crate) fn split_by_memory<'a, 'b>(
    examples: &'b [&'a Example],
    config: &FmConfig,
    spec: &FmSpec,
    requests: usize,
    bytes: usize,
) -> impl Iterator<Item = &'b [&'a Example]> + use<'a, 'b> {
    let (per_token, max_events) = (config.bytes_per_token(), config.max_history);
    let own =
        |name: &String| spec.alignments.get(name).map_or(0, |own| own.bytes_per_target(config));
    let by_surface: Vec<usize> = spec.surfaces.iter().map(own).collect();
    let size = move |example: &Example| {
        let (events, targets) = (example.history.len().min(max_events), example.targets.len());
        let own = by_surface.get(usize::from(example.surface)).copied().unwrap_or_default();
        events * per_token + targets * (per_token + own)
    };
    let mut rest = examples;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |example: &&&Example| {
            sum += size(example);
            sum <= bytes
        };
        let count = rest.iter().take(requests).take_while(fits).count();
        let (part, others) = rest.split_at(count.max(1).min(rest.len()));
        rest = others;
        (!part.is_empty()).then_some(part)
    })
}

/// Selects the parts of examples that training learns from.
#[derive(Debug, Clone)]
pub(crate) struct ExampleSampler {
    seed: u64,
    window: HistoryWindow,
    /// N^(α/2), to which longer histories are thinned; none without stochastic length.
    thinned_length: Option<usize>,
    alpha: f64,
    /// By surface: the probability of keeping a candidate without a positive action.
    keep_negative: Vec<f32>,
    /// By surface: whether learning reads columns that predicting does not.
    reads_more: Vec<bool>,
}

/// The kind of a random draw, so that draws of different kinds are independent.
#[derive(Debug, Clone, Copy)]
enum DrawKind {
    Whole,
    Event,
    Target,
}

impl ExampleSampler {
    /// A sampler with the settings of `config`.
    pub(crate) fn new(config: &FmConfig, spec: &FmSpec) -> Self {
        let keep = |name: &String| config.sample_negatives.get(name).copied().unwrap_or(1.0);
        let alpha = config.stochastic_length_alpha;
        let thinned = (config.max_history as f64).powf(alpha / 2.0).round() as usize;
        Self {
            seed: config.seed,
            window: config.history_window(),
            thinned_length: (alpha < 2.0).then_some(thinned.max(1)),
            alpha,
            keep_negative: spec.surfaces.iter().map(keep).collect(),
            reads_more: spec.surfaces.iter().map(|name| spec.has_training_only(name)).collect(),
        }
    }

    /// The parts of an example that step `step` learns from; `None` for all that serving reads.
    pub(crate) fn sample<'a>(
        &self,
        example: &'a Example,
        step: u64,
    ) -> Option<ExampleSelection<'a>> {
        let mut selected = ExampleSelection::whole(example, self.window);
        let site = DrawSite { seed: self.seed, step, request: example.request };
        let thinned = self.thin(&mut selected, site);
        let dropped = self.drop_negatives(&mut selected, site);
        selected.reader = ReadFor::Learning;
        let reads_more = self.reads_more[usize::from(example.surface)];
        (thinned || dropped || reads_more).then_some(selected)
    }

    /// A history of n > N^(α/2) events stays whole with probability N^α / n², which makes the
    /// expected cost of attention O(N^α); otherwise it is thinned to N^(α/2) events. Returns
    /// whether it was.
    fn thin(&self, selected: &mut ExampleSelection<'_>, site: DrawSite) -> bool {
        let (Some(count), n) = (self.thinned_length, selected.events.len()) else { return false };
        let whole = (self.window.max_events as f64).powf(self.alpha) / (n as f64 * n as f64);
        if n <= count || site.uniform(DrawKind::Whole, 0) < whole {
            return false;
        }
        let first = selected.events[0];
        let events = &selected.example.history[first..];
        selected.events = sample_recent(events, count, |at| site.uniform(DrawKind::Event, at))
            .into_iter()
            .map(|at| first + at)
            .collect();
        true
    }

    /// Leaves out candidates without a positive action. Returns whether weights or targets changed.
    fn drop_negatives(&self, selected: &mut ExampleSelection<'_>, site: DrawSite) -> bool {
        let surface = usize::from(selected.example.surface);
        let keep = self.keep_negative.get(surface).copied().unwrap_or(1.0);
        if keep >= 1.0 {
            return false;
        }
        let targets = &selected.example.targets;
        selected.targets = (0..targets.len())
            .filter_map(|index| {
                if targets[index].outcome.has_action() {
                    return Some(WeightedTarget { index, weight: 1.0 });
                }
                // The weight makes up for the dropped ones, so the mean prediction stays unbiased.
                (site.uniform(DrawKind::Target, index) < f64::from(keep))
                    .then_some(WeightedTarget { index, weight: 1.0 / keep })
            })
            .collect();
        selected.targets.iter().any(|target| target.weight != 1.0)
            || selected.targets.len() < targets.len()
    }
}

/// The step and request for which random choices are made.
#[derive(Debug, Clone, Copy)]
struct DrawSite {
    seed: u64,
    step: u64,
    request: u64,
}

impl DrawSite {
    fn uniform(self, draw: DrawKind, at: usize) -> f64 {
        uniform(&[mix_parts(&[self.seed, self.step, self.request]), draw as u64, at as u64])
    }
}

/// Ascending indices of `count` of the events: the newest one, and others drawn without replacement
/// with a preference for recent ones. The paper's weight is 1 - f_i / Σ f with f_i the event's age;
/// the draw takes the largest u^(1 / weight) (Efraimidis and Spirakis 2006).
fn sample_recent(events: &[Event], count: usize, uniform: impl Fn(usize) -> f64) -> Vec<usize> {
    let newest_ms = events.last().map_or(0, |event| event.time_ms);
    let age = |event: &Event| newest_ms.saturating_sub(event.time_ms).max(0) as f64;
    let total: f64 = events.iter().map(age).sum();
    let mut ranked: Vec<(f64, usize)> = events[..events.len() - 1]
        .iter()
        .enumerate()
        .map(|(at, event)| {
            let weight = if total > 0.0 { 1.0 - age(event) / total } else { 1.0 };
            (uniform(at).ln() / weight.max(1e-12), at)
        })
        .collect();
    ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut chosen: Vec<usize> = ranked[..count - 1].iter().map(|&(_, at)| at).collect();
    chosen.push(events.len() - 1);
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::alignment_spec::{AlignmentId, AlignmentSpec};
    use crate::example::{Item, Outcome, Target, User};
    use crate::spec::{TaskLabel, TaskSpec};
    use crate::training_only::TrainingOnlyColumns;

    fn spec() -> FmSpec {
        FmSpec {
            surfaces: vec!["home".into(), "shop".into()],
            actions: 1,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            item_optional: Vec::new(),
            profile_ids: vec![],
            id_widths: Default::default(),
            features: 0,
            tasks: vec![TaskSpec {
                name: "click".into(),
                main: true,
                label: TaskLabel::Action(0),
                transform: Default::default(),
                surfaces: vec![true, true],
                weight: 1.0,
            }],
            content: 0,
            training_only: Default::default(),
            alignments: Default::default(),
        }
    }

    /// The second surface has a module of its own, with a column for training only.
    fn with_module() -> FmSpec {
        let own = AlignmentSpec {
            hidden: vec![512; 2],
            features: Some(vec!["position".into()]),
            ids: vec![AlignmentId { name: "tags".into(), columns: 3 }],
            tasks: vec![],
            training_only: TrainingOnlyColumns { numbers: vec![0], ..Default::default() },
        };
        FmSpec { alignments: [("shop".into(), own)].into(), ..spec() }
    }

    fn example(request: u64, history: usize) -> Example {
        let item = Arc::new(Item::default());
        let outcome = |actions| Outcome { actions, known: 1, ..Outcome::UNKNOWN };
        let event = |i: usize| Event {
            item: item.clone(),
            surface: 0,
            time_ms: i as i64 * 1000,
            outcome: outcome(0),
        };
        let target = |i: usize| Target {
            item: item.clone(),
            ids: vec![],
            features: vec![],
            outcome: outcome(u64::from(i.is_multiple_of(4))),
            truth: vec![],
        };
        Example {
            request,
            user: Arc::new(User::default()),
            surface: (request % 2) as u16,
            time_ms: 1_000_000,
            history: (0..history).map(event).collect(),
            targets: (0..8).map(target).collect(),
        }
    }

    #[test]
    fn long_histories_are_thinned_as_often_as_the_paper_says() {
        // N = 100 and α = 1.6: 40 events stay, and a history of 80 stays whole with 100^1.6 / 80².
        let config =
            FmConfig { max_history: 100, stochastic_length_alpha: 1.6, ..FmConfig::default() };
        let sampler = ExampleSampler::new(&config, &spec());
        let (mut whole, mut newer, mut chosen) = (0, 0, 0);
        let runs = 4000;
        for request in 0..runs {
            let example = example(request, 80);
            let Some(selected) = sampler.sample(&example, 3) else {
                whole += 1;
                continue;
            };
            assert_eq!(selected.events.len(), 40);
            assert!(selected.events.is_sorted_by(|a, b| a < b));
            assert_eq!(selected.events.last(), Some(&79), "the newest stays");
            assert_eq!(selected.targets.len(), 8);
            newer += selected.events.iter().filter(|&&at| at >= 40).count();
            chosen += selected.events.len();
            let again = sampler.sample(&example, 3).unwrap();
            assert_eq!(again.events, selected.events, "repeatable");
        }
        let share = f64::from(whole) / runs as f64;
        let expected = 100f64.powf(1.6) / 6400.0;
        assert!((share - expected).abs() < 0.035, "{share} {expected}");
        assert!(newer * 100 > chosen * 50, "recent events are likelier: {newer} of {chosen}");
        assert!(sampler.sample(&example(1, 40), 3).is_none(), "short ones stay whole");
        let first = example(5, 80);
        let of_step = |step| sampler.sample(&first, step).map(|selected| selected.events);
        assert!((0..9).any(|step| of_step(step) != of_step(step + 1)), "steps differ");
    }

    #[test]
    fn thinning_selects_only_from_the_history_window() {
        let config =
            FmConfig { max_history: 100, stochastic_length_alpha: 1.0, ..FmConfig::default() };
        let sampler = ExampleSampler::new(&config, &spec());
        let long = example(2, 300);
        let thinned = (0..50).filter_map(|step| sampler.sample(&long, step));
        let mut seen = 0;
        for selected in thinned {
            seen += 1;
            assert_eq!(selected.events.len(), 10);
            assert!(selected.events[0] >= 200 && selected.events[9] == 299);
        }
        assert!(seen > 40, "100^1 / 100² leaves few whole: {seen}");
    }

    #[test]
    fn negatives_are_dropped_on_their_surface_and_the_rest_is_reweighted() {
        let config = FmConfig {
            sample_negatives: [("shop".to_string(), 0.25)].into(),
            ..FmConfig::default()
        };
        let sampler = ExampleSampler::new(&config, &spec());
        assert!(sampler.sample(&example(2, 5), 0).is_none(), "home is not sampled");
        let (mut kept, mut weight) = (0, 0.0);
        for request in 0..2000 {
            let example = example(2 * request + 1, 5);
            let selected = sampler.sample(&example, 0).expect("six negatives hardly all stay");
            assert_eq!(selected.events.len(), 5);
            for &WeightedTarget { index: at, weight: w } in &selected.targets {
                assert_eq!(w, if at % 4 == 0 { 1.0 } else { 4.0 });
                kept += usize::from(at % 4 != 0);
                weight += if at % 4 != 0 { w } else { 0.0 };
            }
            let positives = selected.targets.iter().filter(|target| target.index % 4 == 0).count();
            assert_eq!(positives, 2, "positives always stay");
        }
        let share = kept as f64 / 12_000.0;
        assert!((share - 0.25).abs() < 0.02, "{share}");
        assert!((f64::from(weight) / 12_000.0 - 1.0).abs() < 0.08, "{weight}");
    }

    #[test]
    fn what_only_training_knows_is_a_sample_where_it_is_read() {
        let sampled = |spec: &FmSpec| {
            let sampler = ExampleSampler::new(&FmConfig::default(), spec);
            [0, 1].map(|surface| {
                sampler.sample(&example(surface, 5), 0).map(|selected| selected.reader)
            })
        };
        let learning = Some(ReadFor::Learning);
        assert_eq!(sampled(&spec()), [None, None]);
        assert_eq!(sampled(&with_module()), [None, learning], "a module's, on its surface");
        let training_only = TrainingOnlyColumns { numbers: vec![0], ..Default::default() };
        assert_eq!(sampled(&FmSpec { training_only, ..spec() }), [learning; 2], "the model's");
    }

    #[test]
    fn parts_are_bounded_by_requests_and_by_memory() {
        let config = FmConfig { max_history: 20, ..FmConfig::default() };
        let examples: Vec<Example> =
            [5, 5, 5, 30, 30, 0].into_iter().map(|history| example(1, history)).collect();
        let references: Vec<&Example> = examples.iter().collect();
        let sizes = |requests, tokens: usize| -> Vec<usize> {
            let bytes = tokens * config.bytes_per_token();
            split_by_memory(&references, &config, &spec(), requests, bytes)
                .map(<[_]>::len)
                .collect()
        };
        // With their 8 targets they are of 13, 13, 13, 28, 28 and 8 tokens.
        assert_eq!(sizes(4, 1000), [4, 2]);
        assert_eq!(sizes(4, 36), [2, 1, 1, 2]);
        assert_eq!(sizes(4, 1), [1; 6]);
        assert_eq!(split_by_memory(&[], &config, &spec(), 4, 1).count(), 0);

        let spec = with_module();
        let of_module = 16 * (2 * 512 + 1 + (1 + 3) * config.embedding_dim);
        let example = 13 * config.bytes_per_token() + 8 * of_module;
        let first = |bytes| split_by_memory(&references, &config, &spec, 4, bytes).next();
        assert_eq!(first(3 * example).map(<[_]>::len), Some(3));
        assert_eq!(first(3 * example - 1).map(<[_]>::len), Some(2));
    }
}
