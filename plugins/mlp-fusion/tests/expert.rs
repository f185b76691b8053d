//! The expert passes every check, answers as before, and fits different schemas.

use hypercast_harness::standard_tests;
use hypercast_sdk::{HostInfo, SchemaTask, TaskKind, build};
use mlp_fusion::MlpFusion;

standard_tests!(MlpFusion);

fn schema(tae_dim: u32, features: &[&str], ids: &[&str]) -> HostInfo {
    let strings = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    let task = |name: &str, kind| SchemaTask {
        name: name.into(),
        kind,
        label: name.into(),
        surfaces: vec![],
    };
    HostInfo {
        tae_dim,
        surfaces: strings(&["feed"]),
        actions: strings(&["like", "click"]),
        values: strings(&["watch"]),
        tasks: vec![task("like", TaskKind::Binary), task("watch", TaskKind::Regression)],
        features: strings(features),
        ids: strings(ids),
        history_ids: strings(ids),
        ..HostInfo::default()
    }
}

#[test]
fn it_fits_schemas_with_and_without_fm_and_features() {
    for info in [
        schema(64, &["like_rate", "like_count"], &["user_id", "item_id", "surface", "tag"]),
        schema(64, &[], &["item_id"]),
        schema(0, &["like_rate"], &["user_id", "item_id"]),
    ] {
        let (description, network) = build::<MlpFusion>(&info).expect("a valid network");
        assert_eq!(network.outputs.len(), 2);
        assert_eq!(description.tasks.len(), 2);
        let columns = format!("{:?}", description.columns);
        assert!(!columns.contains("user_id"), "it does not embed users: {columns}");
        assert_eq!(columns.contains("\"tae\""), info.tae_dim > 0);
    }
}

#[test]
fn a_schema_without_any_input_is_refused_with_a_reason() {
    let error =
        build::<MlpFusion>(&schema(0, &[], &["user_id"])).expect_err("nothing to learn from");
    assert!(error.contains("no input"), "{error}");
}
