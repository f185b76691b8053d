//! Growth of schemas, and what was stored before.

use std::sync::Arc;

use hypercast_fm::example::{Example, Item, Outcome, Target, User};

use super::*;
use crate::dataset::{ContextFeatures, Dataset};
use crate::schema::{
    ColumnUpgrade, FeatureKind, SchemaWatch, TaskKind, TaskRole, columns_of, spec_growths,
};
use crate::simulate::{SimulateOptions, simulate};

fn schema(dir: &Path) -> Schema {
    let into = dir.to_owned();
    let options =
        SimulateOptions { into, users: 12, items: 16, requests: 20, surfaces: 2, seed: 7 };
    simulate(&options).unwrap();
    Schema::load(&dir.join("schema.toml")).unwrap()
}

/// Everything that can be appended, once, and the task and counter that read it.
fn grown(old: &Schema) -> Schema {
    let mut new = old.clone();
    new.surfaces.push("late".into());
    new.actions.push("gift".into());
    new.values.push("tip".into());
    new.tasks.push(Task::of_label("gift", TaskRole::Main, TaskKind::Binary));
    new.item_features.extend(Feature::mixed(&["brand"], &["price"]));
    new.item_features.push(Feature::tags("genres", 3));
    new.user_features.extend(Feature::mixed(&["plan"], &["spent"]));
    new.user_features.push(Feature::tags("interests", 2));
    new.context_features.extend(Feature::mixed(&["banner"], &["slot"]));
    new.counters.extend(Counter::lasting(&[&["user_id"]], &["gift"]));
    new
}

fn refusals(old: &Schema, change: impl FnOnce(&mut Schema)) -> String {
    let mut new = old.clone();
    change(&mut new);
    let refused = SchemaGrowth::between(old, &new).unwrap_err();
    refused.iter().map(RefusedChange::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn appended_entries_have_numbers_and_other_changes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let old = schema(dir.path());
    let growth = SchemaGrowth::between(&old, &grown(&old)).unwrap();
    let (name, number) = ("late".into(), old.surfaces.len());
    let surface = AppendedEntry { kind: EntryKind::Surface, name, number, owner: None };
    assert_eq!((growth.appended.len(), &growth.appended[0]), (13, &surface));
    assert!(SchemaGrowth::between(&old, &old).unwrap().is_empty());

    let name = &old.surfaces[0];
    let gone = refusals(&old, |new| new.surfaces[0] = "other".into());
    assert!(gone.contains(&format!("surface `{name}` is gone")), "{gone}");
    let moved = refusals(&old, |new| new.actions.swap(0, 1));
    assert!(moved.contains("stands where") && moved.lines().count() == 1, "{moved}");
    let before = refusals(&old, |new| new.actions.insert(0, "first".into()));
    assert!(before.contains("`first` is new and stands before"), "{before}");
    let changed = refusals(&old, |new| new.tasks[0].weight += 1.0);
    assert!(changed.contains("is another one than before"), "{changed}");
    let wider = refusals(&grown(&old), |new| {
        new.item_features.last_mut().unwrap().max_values = Some(4);
    });
    assert!(wider.contains("item feature `genres` differs in `max_values`"), "{wider}");
    let mut with_position = old.clone();
    with_position.context_features[0].optional = true;
    let relied_on = refusals(&with_position, |new| new.context_features[0].training_only = true);
    assert!(relied_on.contains("differs in `training_only`: keep it, and append"), "{relied_on}");
    let removed = refusals(&old, |new| _ = new.item_features.pop());
    assert!(removed.contains("`retired`"), "{removed}");
}

#[test]
fn a_growth_that_was_applied_is_noticed_and_another_change_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let old = schema(dir.path());
    let path = dir.path().join("schema.toml");
    let watch = SchemaWatch::new(path.clone(), Arc::new(old.clone()));
    assert!(!watch.has_grown());
    for change in ["", "surfaces = [", &toml::to_string(&grown(&old)).unwrap()] {
        std::fs::write(&path, change).unwrap();
        assert!(!watch.has_grown(), "{change}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(!watch.has_grown(), "it is away for a moment");
    old.save(&path).unwrap();
    assert!(!watch.has_grown());
    SchemaGrowth::apply(dir.path(), &grown(&old)).unwrap();
    assert!(watch.has_grown() && watch.has_grown(), "until it is taken over");
    let now = Arc::new(Schema::load(&path).unwrap());
    let watch = SchemaWatch::new(path.clone(), now.clone());
    assert!(!watch.has_grown());
    let retired = vec![old.item_features[0].name.clone()];
    SchemaGrowth::apply(dir.path(), &Schema { retired, ..(*now).clone() }).unwrap();
    assert!(watch.has_grown(), "of the same layout");
    let of_logs = |own: &Arc<Schema>| SchemaWatch::of_logs(path.clone(), own.clone());
    assert!(!of_logs(&now).has_grown(), "logs of before have no such feature retired");
    assert!(of_logs(&Arc::new(old)).has_grown());
}

#[test]
fn a_schema_that_was_applied_remembers_its_layouts_and_reads_the_files_of_before() {
    let dir = tempfile::tempdir().unwrap();
    let old = schema(dir.path());
    let rows = |dataset: &Dataset| -> Vec<_> {
        dataset.impressions().unwrap().map(|row| row.unwrap()).collect()
    };
    let before = rows(&Dataset::open(dir.path()).unwrap());
    SchemaGrowth::apply(dir.path(), &grown(&old)).unwrap();
    // What the caller writes next need not repeat what the first growth noted.
    let mut third = Schema { earlier: Vec::new(), ..grown(&old) };
    third.retired.push(old.item_features[0].name.clone());
    third.actions.push("report".into());
    SchemaGrowth::apply(dir.path(), &third).unwrap();
    assert!(SchemaGrowth::apply(dir.path(), &third).unwrap().is_empty(), "a repetition");

    let dataset = Dataset::open(dir.path()).unwrap();
    let layouts: Vec<Schema> = dataset.schema.layouts().collect();
    assert_eq!(
        (layouts.len(), &layouts[2], &layouts[1]),
        (3, &old.layout(), &grown(&old).layout())
    );
    let after = rows(&dataset);
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        let width = before.context.dense.len();
        assert_eq!(before.context.dense[..], after.context.dense[..width]);
        assert_eq!(after.context.dense[width..], [0.0]);
        assert_eq!(before.outcome.actions, after.outcome.actions);
        assert!(after.outcome.values[old.values.len()].is_nan(), "unknown, not 0");
    }
    let item = dataset.items.values().next().unwrap();
    let dense = columns_of(&dataset.schema.item_features, FeatureKind::Dense);
    assert_eq!(item.dense.len(), dense.len());
    assert_eq!(item.ids[item.ids.len() - 3..], [0; 3], "no genre");
    assert_eq!(dataset.schema.item_features[0].kind, FeatureKind::Categorical);
    assert!(dataset.items.values().all(|item| item.ids[0] == 0), "a retired feature is missing");
}

#[test]
fn columns_of_before_go_to_their_present_places() {
    let dir = tempfile::tempdir().unwrap();
    let old = schema(dir.path());
    let new = Schema { earlier: vec![old.size()], ..grown(&old) };
    new.validate().unwrap();
    let widths = |schema: &Schema| (schema.id_columns().len(), schema.feature_columns().len());
    let (ids, features) = widths(&old);
    let count = |kind| columns_of(&old.item_features, kind).len();
    let item = Item {
        ids: vec![7; count(FeatureKind::Categorical)],
        dense: vec![0.5; count(FeatureKind::Dense)],
        ..Item::default()
    };
    let mut example = Example {
        request: 1,
        user: Arc::new(User::default()),
        surface: 0,
        time_ms: 0,
        history: Vec::new(),
        targets: vec![Target {
            item: Arc::new(item),
            ids: (0..ids as u64).collect(),
            features: (0..features).map(|at| at as f32 + 1.0).collect(),
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        }],
    };
    let before = example.targets[0].clone();
    ColumnUpgrade::new(&new).example(&mut example);
    let target = &example.targets[0];
    assert_eq!((target.ids.len(), target.features.len()), widths(&new));
    let names = new.feature_columns();
    for (name, number) in old.feature_columns().iter().zip(&before.features) {
        let place = names.iter().position(|other| other == name).unwrap();
        assert_eq!(target.features[place], *number, "{name}");
    }
    let fresh = names.iter().position(|name| name == "price").unwrap();
    assert_eq!(target.features[fresh], 0.0);
    let growths = spec_growths(&new).unwrap();
    let counts: Vec<usize> = growths.iter().map(|growth| growth.features.len()).collect();
    assert_eq!(counts, [names.len(), features], "of the present layout and of that before");

    let mut context = ContextFeatures { ids: Vec::new(), dense: vec![0.5] };
    ColumnUpgrade::new(&new).context(&mut context);
    assert!(matches!(context.dense[..], [0.5, number] if number.is_nan()), "missing");
}
