//! Changed components, and bytes that never were one: loads them, builds the network and ranks.
//!
//! The components are in the folders `HYPERCAST_PLUGINS` and `HYPERCAST_HOSTILE`. If these are not
//! set, the target only loads the bytes themselves.

use std::path::PathBuf;
use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use hypercast_expert::graph::{ExpertGraph, GraphLimits};
use hypercast_expert::wasm::contract::{
    Column, Data, Description, NamedColumn, Prediction, RankRequest,
};
use hypercast_expert::{Engine, EngineConfig, Limits, Plugin};

use crate::edit;
use crate::world;

/// The size limit of components: larger ones would take too long to compile.
const MOST_BYTES: usize = 192 << 10;

const CANDIDATES: u64 = 5;

/// Builds a component from the bytes, loads it and calls its functions as far as they succeed.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let (engine, seeds) = setting();
    let bytes = if seeds.is_empty() || u.ratio(1, 16)? {
        let mut bytes = [&b"\0asm\x0d\0\x01\0"[..], u.bytes(u.len())?].concat();
        bytes.truncate(MOST_BYTES);
        bytes
    } else {
        let mut bytes = u.choose(seeds)?.clone();
        edit::edits(u, &mut bytes, 4)?;
        bytes
    };
    let limits = Limits {
        deadline_ms: 20,
        deadline_max_ms: 20,
        hook_deadline_ms: 50,
        memory_mib: 8,
        memory_max_mib: 8,
        output_bytes: 1 << 20,
        component_bytes: 2 * MOST_BYTES,
        ..Limits::default()
    };
    if let Ok(plugin) = Plugin::from_bytes(engine, "fuzz", &bytes, &limits) {
        call_all(plugin);
    }
    Ok(())
}

fn call_all(mut plugin: Plugin) {
    let host = world::host();
    let info = host.info.clone();
    let Ok(description) = plugin.describe(&info) else { return };
    if let Ok(network) = plugin.network(&info) {
        let limits = GraphLimits { parameters: 1 << 20, ..GraphLimits::default() };
        let _ = ExpertGraph::new(&description, &network, &host, &limits);
    }
    let request = RankRequest {
        surface: "feed".into(),
        user: 7,
        time_ms: 1_000_000,
        request: 3,
        seed: 5,
        candidates: (0..CANDIDATES).collect(),
        limit: CANDIDATES as u32,
    };
    let ranked = plugin.rank(&request, &predictions(&description), &columns(&description));
    for ranked in ranked.into_iter().flatten() {
        assert!(u64::from(ranked.candidate) < CANDIDATES && ranked.score.is_finite());
    }
}

fn predictions(description: &Description) -> Vec<Prediction> {
    let values = vec![0.5; CANDIDATES as usize];
    let tasks = description.tasks.iter();
    tasks.map(|task| Prediction { task: task.name.clone(), values: values.clone() }).collect()
}

fn columns(description: &Description) -> Vec<NamedColumn> {
    let rows = CANDIDATES as usize;
    let data = |column: &Column| match column {
        Column::Tae => Data::Numbers(vec![0.1; rows * world::VECTORS.tae]),
        Column::Vector(_) => Data::Numbers(vec![0.1; rows * world::VECTORS.content]),
        Column::Id(_) => Data::Ids((0..CANDIDATES).collect()),
        _ => Data::Numbers(vec![0.1; rows]),
    };
    let columns = description.rank_columns.iter();
    columns.map(|column| NamedColumn { column: column.wire(), data: data(column) }).collect()
}

fn setting() -> &'static (Engine, Vec<Vec<u8>>) {
    static SETTING: OnceLock<(Engine, Vec<Vec<u8>>)> = OnceLock::new();
    SETTING.get_or_init(|| {
        let config = EngineConfig { instances: 8, memory_mib: 8, ..EngineConfig::default() };
        let engine = Engine::new(config).expect("an engine");
        let folders = ["HYPERCAST_PLUGINS", "HYPERCAST_HOSTILE"];
        let mut files: Vec<PathBuf> = folders
            .iter()
            .filter_map(std::env::var_os)
            .flat_map(|folder| std::fs::read_dir(folder).expect("a readable folder"))
            .map(|entry| entry.expect("a readable folder").path())
            .collect();
        // Sort, so that the same bytes select the same component on every machine.
        files.sort();
        if files.is_empty() {
            eprintln!("component: set HYPERCAST_PLUGINS to the folder of components to change");
        }
        let seeds = files.iter().map(|file| std::fs::read(file).expect("a readable component"));
        (engine, seeds.filter(|bytes| bytes.len() <= MOST_BYTES).collect())
    })
}
