//! The expert passes every check, answers as before, fits different schemas, and keeps a feed
//! diverse.

use hypercast_harness::schema::Schema;
use hypercast_harness::{World, component, standard_tests};
use hypercast_sdk::raw::types::{Column, Data, NamedColumn, RankRequest};
use hypercast_sdk::{Expert, HostInfo, Prediction, Request, SchemaTask, TaskKind, build};
use short_term::ShortTerm;

standard_tests!(ShortTerm);

fn schema(tae_dim: u32, ids: &[&str]) -> HostInfo {
    let strings = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    HostInfo {
        tae_dim,
        surfaces: strings(&["feed"]),
        actions: strings(&["like", "click"]),
        values: vec![],
        tasks: vec![SchemaTask {
            name: "like".into(),
            kind: TaskKind::Binary,
            label: "like".into(),
            surfaces: vec![],
        }],
        features: strings(&["like_rate"]),
        ids: strings(ids),
        history_ids: strings(&ids[1..]),
        ..HostInfo::default()
    }
}

#[test]
fn it_fits_schemas_with_and_without_fm_and_diversity_key() {
    for (info, key) in [
        (schema(64, &["user_id", "item_id", "surface", "author_id"]), Some("author_id")),
        (schema(64, &["user_id", "item_id", "genre"]), Some("genre")),
        (schema(0, &["user_id", "item_id"]), None),
    ] {
        let (description, network) = build::<ShortTerm>(&info).expect("a valid network");
        assert!(network.nodes.iter().any(|node| node.op == "HstuAttention"));
        assert!(
            !network.nodes.iter().any(|node| node.op == "HstuHistory"),
            "one layer needs no history output"
        );
        let keys: Vec<_> = description.rank_columns.iter().map(|c| format!("{c:?}")).collect();
        assert_eq!(keys.len(), usize::from(key.is_some()), "{keys:?}");
        assert!(key.is_none_or(|key| keys[0].contains(key)), "{keys:?}");
    }
}

#[test]
fn a_schema_without_history_ids_is_refused_with_a_reason() {
    let mut info = schema(64, &["user_id", "item_id"]);
    info.history_ids.clear();
    let error = build::<ShortTerm>(&info).expect_err("no history to read");
    assert!(error.contains("history"), "{error}");
}

#[test]
fn one_author_does_not_fill_the_feed() {
    let scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4];
    let request = RankRequest {
        surface: "feed".into(),
        user: 1,
        candidates: vec![10, 11, 12, 13, 14, 15],
        limit: 4,
        ..RankRequest::default()
    };
    let predictions = vec![Prediction { task: "like".into(), values: scores.to_vec() }];
    let authors =
        NamedColumn { column: Column::id("author_id"), data: Data::Ids(vec![1, 1, 1, 1, 2, 3]) };
    let ranked =
        ShortTerm::rank(&Request::new(request, predictions, vec![authors])).expect("ranked");
    let order: Vec<_> = ranked.iter().map(|r| r.candidate).collect();
    assert_eq!(order, [0, 1, 4, 5], "two of author 1, then others");
}

#[test]
fn one_tag_does_not_fill_the_feed_however_good_its_items_are() {
    let mut schema = Schema::clone(World::default().schema());
    let item = schema.item_features.iter_mut().find(|feature| feature.name == "topic");
    item.expect("the default world's items have a topic").name = "tag".into();
    schema.counters.clear();
    let tag = schema.id_columns().iter().position(|column| column == "tag").expect("renamed above");
    let harness = World::new(schema).component(&component(env!("CARGO_PKG_NAME"))).expect("loads");
    let mut case = harness.world().request(1).candidates(6).serving().build();
    let targets = case.example.targets.iter_mut().zip([1, 1, 1, 1, 2, 3]);
    targets.for_each(|(target, value)| target.ids[tag] = value);
    let click = vec![0.9, 0.8, 0.7, 0.6, 0.5, 0.4];
    let ranking = harness.rank_with(&case, &[("click", click)], 4).expect("ranked");
    assert_eq!(ranking.rows, [0, 1, 4, 5], "two of tag 1, then others");
}
