//! A small world that the tests of the FM share.

use std::sync::Arc;

use hypercast_fm::{
    example::{Event, Example, Item, Outcome, Target, User},
    spec::{FmConfig, FmSpec, Label, TaskSpec},
};

/// Two surfaces; `watch` is the first one's own.
pub fn spec() -> FmSpec {
    let task = |name: &str, main, label, surfaces: [bool; 2]| TaskSpec {
        name: name.into(),
        main,
        label,
        surfaces: surfaces.into(),
        weight: 1.0,
    };
    FmSpec {
        surfaces: vec!["home".into(), "shop".into()],
        actions: 1,
        values: 1,
        item_ids: 1,
        item_dense: 0,
        profile_ids: vec![],
        features: 1,
        tasks: vec![
            task("click", true, Label::Action(0), [true, true]),
            task("watch", false, Label::Value(0), [true, false]),
        ],
        content: 0,
    }
}

/// Small, and quick to learn.
pub fn config() -> FmConfig {
    FmConfig {
        dim: 16,
        heads: 2,
        qk_dim: 8,
        v_dim: 8,
        embedding_dim: 8,
        max_history: 16,
        warmup_steps: 1,
        learning_rate: 5e-3,
        sparse_learning_rate: 0.1,
        ..FmConfig::default()
    }
}

/// A user clicks items of the parity that the user's past clicks have.
pub fn example(request: u64, targets: &[u64]) -> Example {
    let likes = request % 2;
    let outcome = |id: u64| Outcome {
        actions: u32::from(id % 2 == likes),
        known: 1,
        values: [(id % 2) as f32, f32::NAN, f32::NAN, f32::NAN],
    };
    let item = |id: u64| Arc::new(Item { id, ids: vec![id % 7], ..Item::default() });
    let event = |i: u64| {
        let id = (request * 31 + i * 17) % 40;
        Event {
            item: item(id),
            surface: (i % 2) as u16,
            time_ms: i as i64 * 60_000,
            outcome: outcome(id),
        }
    };
    let target = |&id: &u64| Target {
        item: item(id),
        ids: vec![],
        features: vec![1.0],
        outcome: outcome(id),
        truth: vec![],
    };
    Example {
        request,
        user: Arc::new(User { id: request, ..User::default() }),
        surface: (request / 2 % 2) as u16,
        time_ms: 3_600_000,
        history: (0..request % 13).map(event).collect(),
        targets: targets.iter().map(target).collect(),
    }
}

/// Sixteen requests from number `from` on, three targets each.
pub fn batch(from: u64) -> Vec<Example> {
    (from..from + 16)
        .map(|r| example(r, &[(r * 7) % 40, (r * 13 + 1) % 40, (r * 3 + 2) % 40]))
        .collect()
}
