//! Requests whose candidates come with their items' features: as a list of candidates, and as
//! columns.

use hypercast_core::quantile::quantile;
use hypercast_data::{
    dataset::Dataset,
    schema::{Feature, FeatureKind},
};
use hypercast_fm::example::Item;
use serde_json::{Map, Value, json};

use super::{
    BenchReport,
    load::OpenLoopClient,
    serving::{ServingFixture, bodies, rank_url},
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    processes::DaemonProcess,
};

/// Turns over all users, of which the first warms up.
const TURNS: usize = 4;

/// Adds the round trips of both forms to the report; the daemon is the fixture's.
pub(super) fn measure(
    fixture: &ServingFixture,
    daemon: &DaemonProcess,
    report: &mut BenchReport,
) -> Result<()> {
    let of = &fixture.of;
    let dataset = Dataset::open(&of.dataset)?;
    let broken = |error| Error::internal(format!("a body of the bench: {error}"));
    let (mut rows, mut columns) = (Vec::new(), Vec::new());
    for body in bodies(&of.dataset, of.surface, false)? {
        let mut body: Value = serde_json::from_str(&body).map_err(broken)?;
        let candidates = body["candidates"].as_array_mut().expect("a list of candidates");
        for candidate in &mut *candidates {
            let item = candidate["id"].as_u64().and_then(|id| dataset.items.get(&id));
            let item = item.expect("the bench ranks items of its data set");
            candidate["features"] = named(&dataset.schema.item_features, item).into();
        }
        let as_columns = columns_of(candidates);
        rows.push(body.to_string());
        body["candidates"] = as_columns;
        columns.push(body.to_string());
    }
    let bytes = [&rows, &columns].map(|all| all.iter().map(String::len).sum::<usize>() as f64);
    let users = rows.len();
    let clients = [rows, columns].map(|all| OpenLoopClient::cycle(rank_url(daemon), all));
    let mut times_ms = [Vec::new(), Vec::new()];
    for turn in 0..TURNS {
        for (client, times_ms) in clients.iter().zip(&mut times_ms) {
            let client = client.as_ref().map_err(|error| Error::internal(error.to_string()))?;
            let took_ms = client.one_by_one(users);
            if turn > 0 {
                times_ms.extend(took_ms);
            }
        }
    }
    let [rows_ms, columns_ms] = times_ms.map(|mut ms| quantile(&mut ms, 0.5));
    let (suffix, rival) = (of.suffix, "as a list");
    let name = format!("body of candidates with features, as columns{suffix}");
    let [rows, columns] = bytes.map(|bytes| bytes / users as f64 / 1e3);
    report.versus(name, columns, "kB", rival, rows);
    let name = format!("request of candidates with features, as columns, p50{suffix}");
    report.versus(name, columns_ms, "ms", rival, rows_ms);
    Ok(())
}

/// An item's features by name, but for those of several values.
fn named(features: &[Feature], item: &Item) -> Map<String, Value> {
    let (mut ids, mut dense) = (&item.ids[..], item.dense.iter());
    let mut named = Map::new();
    for feature in features {
        let value = match feature.kind {
            FeatureKind::Dense => json!(dense.next().filter(|number| number.is_finite())),
            FeatureKind::Categorical => {
                let own;
                (own, ids) = ids.split_at(feature.width());
                if own.len() > 1 {
                    continue;
                }
                json!(own[0])
            }
        };
        named.insert(feature.name.clone(), value);
    }
    named
}

/// The same candidates as columns.
fn columns_of(candidates: &[Value]) -> Value {
    let ids: Vec<&Value> = candidates.iter().map(|candidate| &candidate["id"]).collect();
    let mut features = Map::new();
    for candidate in candidates {
        for (name, value) in candidate["features"].as_object().into_iter().flatten() {
            let column = features.entry(name).or_insert_with(|| json!([]));
            column.as_array_mut().expect("a list").push(value.clone());
        }
    }
    json!({ "id": ids, "features": features })
}
