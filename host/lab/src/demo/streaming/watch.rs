//! What the daemon says of itself while the loop runs, from `GET /v1/live`, and
//! the line that is printed every few seconds.
//!
//! It measures nothing: NE and round trips are the caller's own.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::{drive::Sent, report::Quantiles, scores::Now};
use crate::evaluate::window;

/// What the daemon says.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Live {
    /// Publications applied, by model.
    pub publications: BTreeMap<String, u64>,
    /// Publications refused.
    pub refused_publications: u64,
    /// How old things were when they arrived, by what.
    pub freshness: BTreeMap<String, Quantiles>,
    /// Stages of a request.
    pub stages: BTreeMap<String, Quantiles>,
    /// Requests answered by the FM's own ranking.
    pub degraded: u64,
    /// Requests refused.
    pub refused: u64,
}

impl Live {
    /// Reads the page's numbers.
    pub fn read(live: &Value) -> Live {
        let rows = |name: &str| live[name].as_array().cloned().unwrap_or_default();
        let text = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let count = |row: &Value, name: &str| row[name].as_u64().unwrap_or(0);
        let models = || {
            let fms =
                rows("fms").into_iter().map(|row| (format!("fm@{}", text(&row, "version")), row));
            let named =
                |row: Value| (format!("{}@{}", text(&row, "name"), text(&row, "version")), row);
            fms.chain(rows("experts").into_iter().map(named)).collect::<Vec<_>>()
        };
        let quantiles = |row: &Value, unit: &str, scale: f64| {
            let at = |name: &str| row[format!("{name}_{unit}")].as_f64();
            at("p50")
                .zip(at("p99"))
                .map(|(p50, p99)| Quantiles { p50_ms: p50 * scale, p99_ms: p99 * scale })
        };
        let named = |list: &str, name: &str, unit: &str, scale: f64| {
            let rows = rows(list);
            let rows = rows.iter().map(|row| (text(row, name), quantiles(row, unit, scale)));
            rows.filter_map(|(name, quantiles)| Some((name, quantiles?))).collect()
        };
        Live {
            publications: models()
                .into_iter()
                .map(|(name, row)| (name, count(&row, "publications")))
                .collect(),
            refused_publications: models().iter().map(|(_, row)| count(row, "refused")).sum(),
            freshness: named("freshness", "what", "ms", 1.0),
            stages: named("latency", "stage", "us", 1e-3),
            degraded: count(&live["requests"], "degraded"),
            refused: count(&live["requests"], "refused"),
        }
    }

    /// Publications in all.
    pub fn applied(&self) -> u64 {
        self.publications.values().sum()
    }
}

/// What a line is made of.
pub struct Line<'a> {
    /// What was sent so far.
    pub sent: &'a Sent,
    /// How much of the replay is done.
    pub share: f64,
    /// What the daemon says.
    pub live: &'a Live,
    /// NE by task and arm.
    pub scores: &'a [Now],
    /// Hours ahead of UTC of the data set's clock.
    pub utc_offset_h: i32,
}

impl Line<'_> {
    /// The lines: how it goes, and a line a task with its arms.
    pub fn text(&self) -> String {
        let Line { sent, share, live, .. } = self;
        let recent = &sent.took_ms[sent.took_ms.len().saturating_sub(1000)..];
        let took = Quantiles::of(recent.to_vec());
        let fresh = match live.freshness.get("event to serving weights") {
            Some(fresh) => format!("{:.1} s p99 {:.1} s", fresh.p50_ms / 1e3, fresh.p99_ms / 1e3),
            None => "–".into(),
        };
        let mut text = format!(
            "{} ({:.0} %): {} requests, {} degraded, {} refused; p50 {:.1} ms p99 {:.1} ms; {} publications served; event to serving weights {fresh}",
            window::say(sent.event_ms, self.utc_offset_h),
            share * 100.0,
            sent.requests,
            sent.degraded,
            sent.refused,
            took.p50_ms,
            took.p99_ms,
            live.applied(),
        );
        if sent.behind.as_secs() > 0 {
            text += &format!("; {} s behind", sent.behind.as_secs());
        }
        let mut last = "";
        for now in self.scores {
            if now.task != last {
                text += &format!("\n    NE {:<12}", now.task);
                last = &now.task;
            }
            let number = |ne: Option<f64>| ne.map_or("–".into(), |ne| format!("{ne:.4}"));
            text += &format!(" {} {} (now {})", now.arm, number(now.all), number(now.window));
        }
        text
    }
}
