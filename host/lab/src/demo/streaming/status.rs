//! The daemon's own numbers from `GET /v1/live`, and the status that is printed every few seconds.
//! NE and round trips in it are measured by the demo as a client.

use std::collections::BTreeMap;

use hypercast_core::clock::format_time;
use serde::Serialize;
use serde_json::Value;

use super::load::LoadGenerator;
use crate::metrics::LatencyQuantiles;

/// The numbers of the live page.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LiveStatus {
    /// Publications applied, by model.
    pub publications: BTreeMap<String, u64>,
    /// Publications refused.
    pub refused_publications: u64,
    /// Age of events at each point of the loop.
    pub freshness: BTreeMap<String, LatencyQuantiles>,
    /// Stages of a request.
    pub stages: BTreeMap<String, LatencyQuantiles>,
    /// Requests answered by the FM's own ranking.
    pub degraded: u64,
    /// Requests refused.
    pub refused: u64,
}

impl LiveStatus {
    /// Reads the page's JSON; missing numbers are 0.
    pub fn read(live: &Value) -> LiveStatus {
        let rows = |name: &str| live[name].as_array().map(Vec::as_slice).unwrap_or_default();
        let text = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let count = |row: &Value, name: &str| row[name].as_u64().unwrap_or(0);
        let fms = rows("fms").iter().map(|row| (format!("fm@{}", text(row, "version")), row));
        let name = |row: &Value| format!("{}@{}", text(row, "name"), text(row, "version"));
        let experts = rows("experts").iter().map(|row| (name(row), row));
        let models: Vec<(String, &Value)> = fms.chain(experts).collect();
        let quantiles = |list: &str, name: &str, unit: &str, ms_per_unit: f64| {
            let of = |row: &Value| {
                let at = |share: &str| Some(row[format!("{share}_{unit}")].as_f64()? * ms_per_unit);
                let quantiles = LatencyQuantiles { p50_ms: at("p50")?, p99_ms: at("p99")? };
                Some((text(row, name), quantiles))
            };
            rows(list).iter().filter_map(of).collect()
        };
        LiveStatus {
            refused_publications: models.iter().map(|(_, row)| count(row, "refused")).sum(),
            publications: models
                .into_iter()
                .map(|(name, row)| (name, count(row, "publications")))
                .collect(),
            freshness: quantiles("freshness", "what", "ms", 1.0),
            stages: quantiles("latency", "stage", "us", 1e-3),
            degraded: count(&live["requests"], "degraded"),
            refused: count(&live["requests"], "refused"),
        }
    }

    fn applied_publications(&self) -> u64 {
        self.publications.values().sum()
    }
}

/// A line on the replay, and a line per task with its arms. The next line begins.
pub fn status_text(load: &mut LoadGenerator<'_>, live: &LiveStatus, utc_offset_h: i32) -> String {
    let (tasks, share, sent) = (load.scores.next_line(), load.share(), &load.sent);
    let recent = &sent.round_trips_ms[sent.round_trips_ms.len().saturating_sub(1000)..];
    let round_trip = LatencyQuantiles::of(recent.to_vec());
    let fresh = match live.freshness.get("event to serving weights") {
        Some(fresh) => format!("{:.1} s p99 {:.1} s", fresh.p50_ms / 1e3, fresh.p99_ms / 1e3),
        None => "–".into(),
    };
    let mut text = format!(
        "{} ({:.0} %): {} requests, {} degraded, {} refused; p50 {:.1} ms p99 {:.1} ms; \
             {} publications served; event to serving weights {fresh}",
        format_time(sent.event_ms, utc_offset_h),
        share * 100.0,
        sent.requests,
        sent.degraded,
        sent.refused,
        round_trip.p50_ms,
        round_trip.p99_ms,
        live.applied_publications(),
    );
    if sent.behind.as_secs() > 0 {
        text += &format!("; {} s behind", sent.behind.as_secs());
    }
    text + &tasks
}
