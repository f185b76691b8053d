//! A joiner under a schema that grows while it runs.

use std::{sync::Arc, time::Duration};

use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_data::schema::{SchemaWatch, growth::SchemaGrowth};

use super::runner::{NoMetrics, append_events, config};
use super::world::{dataset, shown};
use crate::dead_letters;
use crate::join::Runner;
use crate::streams::MemoryEngine;

#[test]
fn a_joiner_leaves_events_of_a_schema_that_has_grown_to_the_one_that_takes_it_over() {
    let dir = tempfile::tempdir().unwrap();
    let (data, config) = (dataset(&dir.path().join("data")), config(dir.path()));
    let memory = Arc::new(MemoryEngine::default());
    let open = |data: &Dataset| {
        let watch = SchemaWatch::new(data.dir.join("schema.toml"), data.schema.clone());
        let stop = Shutdown::default().part(move || watch.has_grown());
        let (settings, metrics) = (config.joiner().unwrap(), Arc::new(NoMetrics));
        Runner::open(memory.clone(), &settings, data, metrics, stop).unwrap()
    };
    append_events(&memory, &[shown(1000, 1, 0, 1)]);
    let mut before = open(&data);
    while before.step(Duration::ZERO).unwrap() > 0 {}
    let mut grown = (*data.schema).clone();
    grown.surfaces.push("late".into());
    SchemaGrowth::apply(&data.dir, &grown).unwrap();
    append_events(&memory, &[shown(2000, 2, 2, 1)]);
    assert_eq!(before.step(Duration::ZERO).unwrap(), 0);
    before.run(|_| {}).unwrap();
    let mut after = open(&Dataset::open(&data.dir).unwrap());
    while after.step(Duration::ZERO).unwrap() > 0 {}
    assert_eq!(after.passed().events, 2);
    assert!(dead_letters::list(&*memory).unwrap().letters.is_empty());
}
