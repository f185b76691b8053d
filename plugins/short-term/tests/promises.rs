//! What every expert must keep, in the host's own runtime; and what this one answered before.

use hypercast_harness::schema::Schema;
use hypercast_harness::{Failure, Failures, Harness, World, component};
use short_term::ShortTerm;

#[test]
fn the_component_keeps_every_promise() -> Result<(), Failures> {
    Harness::of(component(env!("CARGO_PKG_NAME"))).check_all()
}

#[test]
fn so_does_the_trait_without_wasm() -> Result<(), Failures> {
    Harness::native::<ShortTerm>().check_all()
}

#[test]
fn it_answers_as_before() -> Result<(), Failure> {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.json");
    Harness::of(component(env!("CARGO_PKG_NAME"))).golden(golden)?;
    Harness::native::<ShortTerm>().golden(golden)
}

#[test]
fn one_tag_does_not_fill_the_feed_however_good_its_items_are() {
    let mut schema = Schema::clone(World::default().schema());
    let item = schema.item_features.iter_mut().find(|feature| feature.name == "topic");
    item.expect("the default world's items have a topic").name = "tag".into();
    schema.counters.clear();
    let tag = schema.id_columns().iter().position(|column| column == "tag").expect("named above");
    let harness = World::new(schema).component(&component(env!("CARGO_PKG_NAME"))).expect("loads");
    let mut case = harness.world().request(1).candidates(6).serving().build();
    let targets = case.example.targets.iter_mut().zip([1, 1, 1, 1, 2, 3]);
    targets.for_each(|(target, value)| target.ids[tag] = value);
    let click = vec![0.9, 0.8, 0.7, 0.6, 0.5, 0.4];
    let ranking = harness.rank_with(&case, &[("click", click)], 4).expect("ranked");
    assert_eq!(ranking.rows, [0, 1, 4, 5], "two of tag 1, then others");
}
