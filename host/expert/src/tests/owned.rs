//! What belongs to one surface: its experts are told of it and read it, and for all others nothing
//! changes.

use std::sync::Arc;

use hypercast_data::schema::{
    Counter, Feature, FeatureKind, OwnedEntries, Schema, Task, TaskKind as SchemaTaskKind, TaskRole,
};
use hypercast_fm::example::Example;

use super::build::{TAE_DIM, description, example, noise, schema, vectors};
use super::components::{engine, options};
use crate::batch::{ExpertColumns, GuestRequest};
use crate::fm_rows::{FmRows, Tae};
use crate::normalise::Normaliser;
use crate::params::SavedParameters;
use crate::wasm::contract::{Column, HostSchema, TaskKind};
use crate::{Blueprint, BreakerConfig, Device, ServedExpert};

/// The schema with a surface that owns nothing yet.
fn before() -> Schema {
    let mut schema = schema();
    schema.surfaces[1] = "search".into();
    schema
}

/// What its team adds, and then the core: an action.
fn grown() -> Schema {
    let mut schema = before();
    schema.actions.extend(["cart".into(), "report".into()]);
    schema.values.push("basket".into());
    let cart = Task::of_label("cart", TaskRole::Auxiliary, SchemaTaskKind::Binary);
    schema.tasks.push(Task { surfaces: vec!["search".into()], ..cart });
    schema.context_features.push(Feature::new("words", FeatureKind::Dense));
    schema.context_features.push(Feature::tags("intents", 2));
    schema.counters.push(Counter {
        name: "user_cart".into(),
        key: vec!["user_id".into()],
        action: "cart".into(),
        half_life_days: 7.0,
    });
    let names = |all: &[&str]| all.iter().map(|name| name.to_string()).collect();
    let entries = OwnedEntries {
        actions: names(&["cart"]),
        values: names(&["basket"]),
        tasks: names(&["cart"]),
        context_features: names(&["words", "intents"]),
        counters: names(&["user_cart"]),
    };
    schema.owned.insert("search".into(), entries);
    schema.validate().unwrap();
    schema
}

/// A request under [`grown`], of the same user and items as under [`before`].
fn with_own(mut example: Example) -> Example {
    for target in &mut example.targets {
        target.features.splice(1..1, [target.item.id as f32 / 2.0, 0.25, 0.5]);
        target.ids.extend([7, 0]);
        target.outcome.actions |= 1 << 4 | 1 << 5;
        target.outcome.known |= 1 << 4 | 1 << 5;
        target.outcome.values[1] = 9.0;
    }
    for event in &mut example.history {
        event.outcome.actions |= 1 << 4;
    }
    example
}

#[test]
fn a_surface_is_told_of_its_own_and_others_of_the_core() {
    let schema = grown();
    let core = Schema { actions: [before().actions, vec!["report".into()]].concat(), ..before() };
    let info = |surface, schema: &Schema| HostSchema::on(surface, schema, vectors()).info;
    for surface in [None, Some("feed")] {
        let (found, expected) = (info(surface, &schema), info(None, &core));
        assert_eq!(format!("{found:?}"), format!("{expected:?}"));
    }
    let own = info(Some("search"), &schema);
    assert_eq!(own.actions, schema.actions);
    assert_eq!(own.values, ["seconds", "basket"]);
    assert_eq!(own.tasks.last().unwrap().name, "cart");
    assert_eq!((own.features, own.ids), (info(None, &core).features, info(None, &core).ids));
    let further = own.columns.iter().filter(|own| own.kind != "fm-logit");
    let (activity, further): (Vec<_>, Vec<_>) =
        further.partition(|own| own.kind == "user-activity");
    let columns: Vec<_> = further.iter().map(|own| (&*own.name, own.width)).collect();
    let expected = [("words", 1), ("user_cart_rate", 1), ("user_cart_count", 1), ("intents", 2)];
    assert_eq!(columns, expected);
    let activity: Vec<_> = activity.iter().map(|own| &*own.name).collect();
    // Not the surface's own `user_cart_rate`, which not every network reads.
    assert_eq!(activity, ["user_history_len", "seconds_since_last_event"]);
}

#[test]
fn outcomes_and_columns_are_those_that_the_expert_was_told_of() {
    let (schema, whole) = (grown(), with_own(example(3, 2, 2)));
    let normaliser = Normaliser::identity(&schema.feature_columns());
    let on = |surface: &str, columns: Vec<Column>| {
        let mut own = description(columns, &[("click", TaskKind::Binary)]);
        own.surfaces = vec![surface.into()];
        let host = HostSchema::on(Some(surface), &schema, vectors());
        (ExpertColumns::new(&own, &schema, vectors()).unwrap(), host.info)
    };
    let requests = [GuestRequest { example: &whole, fm: FmRows::WITHOUT, ranked: &[] }];

    let read = vec![Column::HistoryActions, Column::Feature("length".into())];
    let (feed, info) = on("feed", read.clone());
    let batch = feed.batch(&[&whole], Tae::Without, &normaliser);
    let narrow = Schema { actions: [before().actions, vec!["report".into()]].concat(), ..before() };
    let expected = ExpertColumns::new(&description(read, &[]), &narrow, vectors()).unwrap();
    let normaliser_before = Normaliser::identity(&narrow.feature_columns());
    let expected = expected.batch(&[example(3, 2, 2)], Tae::Without, &normaliser_before);
    assert_eq!((batch.numbers(0), batch.numbers(1)), (expected.numbers(0), expected.numbers(1)));
    let hooks = feed.hook_batch(&requests, &info);
    let bits = whole.targets[0].outcome.actions & 0b1111;
    // `report` is its fifth action, and `cart` none.
    assert_eq!((hooks.actions[0], hooks.known[0]), (bits | 1 << 4, 0b11111));
    assert_eq!((hooks.values.len(), &*hooks.values[0].name), (1, "seconds"));

    let own = vec![Column::Feature("words".into()), Column::Id("intents".into())];
    let (search, info) = on("search", own);
    let batch = search.batch(&[&whole], Tae::Without, &normaliser);
    let words = whole.targets.iter().map(|target| (target.item.id as f32 / 2.0).min(5.0));
    assert_eq!(*batch.numbers(0), words.collect::<Vec<_>>());
    let hooks = search.hook_batch(&requests, &info);
    assert_eq!(hooks.actions[0], whole.targets[0].outcome.actions);
    assert_eq!((&*hooks.values[1].name, hooks.values[1].values[0]), ("basket", 9.0));
}

#[test]
fn columns_of_a_surface_are_refused_to_experts_that_serve_others() {
    let schema = grown();
    let refused = |surfaces: &[&str], column: Column| {
        let mut own = description(vec![column], &[("click", TaskKind::Binary)]);
        own.surfaces = surfaces.iter().map(|name| name.to_string()).collect();
        own.check_owners(&schema)
    };
    let words = || Column::Feature("words".into());
    assert_eq!(refused(&["search"], words()), Ok(()));
    assert_eq!(refused(&[], Column::Feature("length".into())), Ok(()));
    for (surfaces, serves) in [
        (&[][..], "serves any surface"),
        (&["feed", "search"], "serves `feed`, `search`"),
        (&["feed"], "serves `feed`"),
    ] {
        for column in [words(), Column::RawFeature("words".into()), Column::Id("intents".into())] {
            let why = refused(surfaces, column.clone()).unwrap_err();
            let of = format!("it reads {}, which belongs to surface `search`", column.label());
            assert!(why.contains(&of) && why.contains(serves), "{why}");
            assert!(why.contains("name `search` alone, or leave the column out"), "{why}");
        }
    }
}

#[test]
fn other_experts_predict_to_the_bit_what_they_predicted() {
    let Some(plugins) = hypercast_core::prerequisite::plugins("owned columns") else { return };
    let path = plugins.join("mlp-fusion.wasm");
    let load =
        |schema: &Schema| Arc::new(Blueprint::load(engine(), &path, schema, &options()).unwrap());
    let mut core = before();
    core.actions.push("report".into());
    let was = load(&core);
    let normaliser = Normaliser::identity(&core.feature_columns());
    let parameters = was.init_parameters(normaliser, 3);
    let file = tempfile::tempdir().unwrap();
    let file = file.path().join("parameters.safetensors");
    parameters.save(&file).unwrap();
    let open = |blueprint: Arc<Blueprint>| {
        let saved = SavedParameters::read(&file).unwrap();
        ServedExpert::open(blueprint, saved, Device::Cpu, BreakerConfig::default()).unwrap()
    };
    let tae = noise(2, 3 * TAE_DIM);
    let plain = example(3, 2, 3);
    let expected = open(was).predict(&[&plain], Tae::Rows(&tae)).unwrap();
    let found = open(load(&grown())).predict(&[&with_own(plain)], Tae::Rows(&tae)).unwrap();
    assert_eq!(format!("{found:?}"), format!("{expected:?}"));
}

#[test]
fn the_expert_of_a_surface_has_its_tasks_and_columns() {
    let Some(path) = hypercast_core::prerequisite::hostile("owned columns", "search_team") else {
        return;
    };
    let load = |schema: &Schema| Blueprint::load(engine(), &path, schema, &options()).unwrap();
    let names = |blueprint: &Blueprint| -> Vec<String> {
        let columns = blueprint.description.columns.iter().map(Column::label);
        columns.chain(blueprint.description.tasks.iter().map(|task| task.name.clone())).collect()
    };
    let [was, is] = [before(), grown()].map(|schema| names(&load(&schema)));
    assert_eq!(was, ["tae", "click", "like"]);
    let own = ["tae", "feature `words`", "feature `user_cart_rate`", "feature `user_cart_count`"];
    assert_eq!(is, [&own[..], &["click", "like", "cart"]].concat());
}
