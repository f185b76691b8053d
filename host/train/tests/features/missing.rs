//! A feature whose absence tells the label: the FM learns from that if the schema says so, and
//! takes a missing number for a usual one otherwise.

use std::path::Path;

use hypercast_data::{
    dataset::{ContextFeatures, Dataset, Entities, Impression, write_dataset},
    schema::{Feature, FeatureKind, MISSING, Schema, Task, TaskKind, TaskRole},
};
use hypercast_fm::{
    example::{Item, Outcome},
    spec::FmConfig,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::small_fm;

const REQUESTS: u64 = 1200;

fn schema(item: Feature, context: Feature) -> Schema {
    Schema {
        surfaces: vec!["feed".into()],
        actions: vec!["click".into()],
        values: vec![],
        tasks: vec![Task::of_label("click", TaskRole::Main, TaskKind::Binary)],
        item_features: vec![item],
        user_features: vec![],
        context_features: vec![context],
        counters: vec![],
        ids: Default::default(),
        ranges: vec![],
        retired: vec![],
        owned: Default::default(),
        alignment: Default::default(),
        earlier: vec![],
    }
}

/// Two items a request, each shown once, so that its id tells nothing. Where `is_of_item`, the
/// price of an item that is clicked is mostly missing, else what its context says.
fn world(dir: &Path, is_of_item: bool, optional: bool) -> Dataset {
    let feature = |name, optional| Feature { optional, ..Feature::new(name, FeatureKind::Dense) };
    let schema = schema(
        feature("price", optional && is_of_item),
        feature("battery", optional && !is_of_item),
    );
    let mut random = StdRng::seed_from_u64(7);
    let (mut items, mut rows) = (Vec::new(), Vec::new());
    for id in 0..2 * REQUESTS {
        let clicked = random.random_bool(0.4);
        let is_missing = random.random_bool(if clicked { 0.9 } else { 0.1 });
        // Mostly 0, so that no network finds out by itself.
        let known = [-1.0, 1.0].get(random.random_range(0..20)).copied().unwrap_or(0.0);
        let telling = if is_missing { MISSING } else { known };
        let [price, battery] = if is_of_item { [telling, 1.0] } else { [1.0, telling] };
        items.push(Item { id, dense: vec![price], ..Item::default() });
        let time_ms = 1_764_000_000_000 + (id / 2) as i64 * 60_000;
        rows.push(Impression {
            request: id / 2 + 1,
            time_ms,
            outcome_ms: time_ms + 1,
            user: id / 2 % 50,
            item: id,
            surface: 0,
            outcome: Outcome { actions: clicked.into(), known: 1, ..Outcome::UNKNOWN },
            context: ContextFeatures { ids: vec![], dense: vec![battery] },
            truth: vec![],
            history_only: false,
        });
    }
    let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &[] };
    write_dataset(dir, &entities, &mut rows).unwrap();
    Dataset::open(dir).unwrap()
}

/// The NE of the second half of the requests, each predicted before it was learned.
fn ne(is_of_item: bool, optional: bool) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let dataset = world(&dir.path().join("data"), is_of_item, optional);
    // Without candidate columns, a target has what its item says and no more.
    let config = FmConfig { candidate_columns: !is_of_item, ..small_fm::config() };
    let mut trainer = small_fm::trainer(&dataset, &config, &dir.path().join("work"));
    small_fm::learn(&mut *trainer, &small_fm::examples(&dataset))
}

#[test]
fn the_fm_learns_from_absence_if_the_schema_says_so() {
    for is_of_item in [false, true] {
        let (without, with) = (ne(is_of_item, false), ne(is_of_item, true));
        println!("of items: {is_of_item}; NE {without:.3}, with `optional` {with:.3}");
        // The entropy that is left where absence is known is 0.47 bits of 0.97.
        assert!(with < 0.65 && without > 0.9, "{is_of_item}: {without:.3}, {with:.3}");
    }
}
