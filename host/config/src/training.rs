//! What is trained, and from which data: the end of the past, the feature logs, and the training of
//! experts. The FM's own settings are `hypercast_fm::spec::FmConfig`.

use hypercast_data::logs::{LogOptions, TaeStorage};
use serde::{Deserialize, Serialize};

use crate::error::{CommonErrors as _, Error, Result};

/// The end of the part of the data set that is the past: `[timeline]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimelineSettings {
    /// Training uses events before this time, and `serve` starts from the state at this time: a
    /// date ("2022-04-29") or milliseconds since 1970. "" takes the whole data set.
    pub until: String,
    /// The offset of that date's time zone from UTC, in hours.
    pub utc_offset_h: i32,
}

impl TimelineSettings {
    /// `until` in milliseconds since the epoch; none for the whole data set.
    ///
    /// # Errors
    /// `until` is neither a date nor a number.
    pub fn until_ms(&self) -> Result<Option<i64>> {
        let given = Some(&self.until).filter(|until| !until.is_empty());
        given.map(|until| parse_time_ms(until, self.utc_offset_h)).transpose()
    }
}

/// Parses a date such as `2022-04-29`, which means its midnight, or milliseconds since 1970.
///
/// # Errors
/// The text is neither.
pub fn parse_time_ms(text: &str, utc_offset_h: i32) -> Result<i64> {
    if let Ok(ms) = text.parse::<i64>() {
        return Ok(ms);
    }
    let parts: Option<Vec<i64>> = text.split('-').map(|part| part.parse().ok()).collect();
    let neither = || {
        Error::invalid(format!(
            "{text:?} is neither a date like 2022-04-29 nor milliseconds since 1970"
        ))
    };
    let Some(&[year @ 1..=9999, month @ 1..=12, day]) = parts.as_deref() else {
        return Err(neither());
    };
    if !(1..=days_of(year, month)).contains(&day) {
        return Err(neither());
    }
    // Days since the epoch in the proleptic Gregorian calendar; years start in March.
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day
            - 1
            - 719_468;
    Ok(days * 86_400_000 - i64::from(utc_offset_h) * 3_600_000)
}

/// The number of days of a month (1 to 12).
fn days_of(year: i64, month: i64) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// The feature logs for expert training: `[logs]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Logs {
    /// The share of the training stream, from its start, that is not logged because the TAEs of an
    /// untrained FM are poor.
    pub skip_share: f64,
    /// Events of the same surface that are logged with a request, for the experts' short histories.
    pub history_len: usize,
    /// Rows in a file.
    pub rows_per_file: usize,
    /// Time after which the logging tier (`hypercast materialise --follow`) ends a file, in
    /// seconds. An expert that follows the logs waits that long. 0 ends files by rows alone.
    pub file_seconds: u64,
    /// How TAEs are stored: "f32", or "bf16" with about half the bytes.
    pub tae: TaeStorage,
}

impl Logs {
    /// The options of a log writer.
    pub fn options(&self) -> LogOptions {
        LogOptions {
            history_len: self.history_len,
            rows_per_file: self.rows_per_file,
            file_seconds: self.file_seconds,
            tae: self.tae,
        }
    }
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            skip_share: 0.3,
            history_len: 32,
            rows_per_file: 100_000,
            file_seconds: 60,
            tae: TaeStorage::F32,
        }
    }
}

/// The training of experts, from logs of the past and while they follow the stream:
/// `[expert_training]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpertTraining {
    /// Passes over the logs.
    pub epochs: usize,
    /// The most passes of an expert that ends them itself (`patience` in its description).
    pub max_epochs: usize,
    /// Rows in a batch, in whole requests.
    pub batch_rows: usize,
    /// AdamW's peak learning rate; it warms up and then falls to a tenth. An expert's `schedule`
    /// scales it.
    pub learning_rate: f64,
    /// The constant learning rate of an expert that follows the stream.
    pub online_learning_rate: f64,
    /// Rows in a batch of an expert that follows the stream, in whole requests.
    pub online_batch_rows: usize,
    /// Decay of the moving average of dense parameters, which predicts and serves. 0 turns it off.
    pub average_decay: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// Limit of the gradient norm.
    pub clip_norm: f64,
    /// Seed of initial values, dropout and order.
    pub seed: u64,
}

impl Default for ExpertTraining {
    fn default() -> Self {
        Self {
            epochs: 2,
            max_epochs: 20,
            batch_rows: 512,
            learning_rate: 2e-3,
            online_learning_rate: 5e-4,
            online_batch_rows: 128,
            average_decay: 0.99,
            weight_decay: 1e-4,
            clip_norm: 5.0,
            seed: 7,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read_by_the_given_clock() {
        assert_eq!(parse_time_ms("1970-01-01", 0).unwrap(), 0);
        assert_eq!(parse_time_ms("2022-04-29", 8).unwrap(), 1_651_161_600_000);
        assert_eq!(parse_time_ms("2000-02-29", 0).unwrap(), 951_782_400_000);
        assert_eq!(parse_time_ms("1651161600000", 8).unwrap(), 1_651_161_600_000);
        let no_days = ["2022-02-31", "2023-02-29", "1900-02-29", "2022-04-31", "2022-01-00"];
        for text in no_days.into_iter().chain(["99999999999999-01-01", "", "2022-02", "2022-2-x"]) {
            let error = parse_time_ms(text, 0).unwrap_err().to_string();
            assert!(error.contains("neither a date"), "{text}: {error}");
        }
        assert!(parse_time_ms("29 April", 0).is_err());
        assert!(parse_time_ms("2022-13-01", 0).is_err());
    }
}
