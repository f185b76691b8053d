//! Which parts of a data set are for training, test and report, by the data set's own clock.

use hypercast_config::{Config, parse_time_ms};
use hypercast_core::clock::format_time;
use hypercast_data::dataset::Dataset;

use super::setup::EvaluationSetup;
use crate::error::{CommonErrors as _, Error, Result};

/// Where the test and the report begin, and the extent of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestWindow {
    /// Time of the first request, milliseconds since the epoch like all times here.
    pub first_ms: i64,
    /// Time of the last request.
    pub last_ms: i64,
    /// The beginning of the test; earlier requests are for training.
    pub test_from_ms: i64,
    /// The beginning of the report.
    pub report_from_ms: i64,
    /// Hours by which the data set's clock is ahead of UTC.
    pub utc_offset_h: i32,
}

/// The times that the caller gives.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TestTimes {
    /// Where the test begins: a date or milliseconds [default: 2022-04-29 for kuairand, else the
    /// last tenth]
    #[arg(long, value_name = "TIME")]
    pub test_from: Option<String>,
    /// Where the report begins [default: where the test does]
    #[arg(long, value_name = "TIME")]
    pub report_from: Option<String>,
}

impl TestWindow {
    /// Checks the given times against the data.
    ///
    /// # Errors
    /// A time that cannot be read, or with no request before or after it.
    pub fn new(setup: &EvaluationSetup, config: &Config, dataset: &Dataset) -> Result<Self> {
        let times = &setup.times;
        let utc_offset_h = config.timeline.utc_offset_h;
        let (first_ms, last_ms) = extent(dataset)?;
        let (given, row) = (times.test_from.as_deref(), dataset.rows - dataset.rows / 10);
        let test_from_ms = setup.choice().test_from_ms(given, row, config, dataset)?;
        let report_from_ms = match times.report_from.as_deref() {
            Some(text) => parse_time_ms(text, utc_offset_h)?,
            None => test_from_ms,
        };
        let window = Self { first_ms, last_ms, test_from_ms, report_from_ms, utc_offset_h };
        window.check()?;
        Ok(window)
    }

    fn check(&self) -> Result<()> {
        let Self { first_ms, last_ms, test_from_ms, report_from_ms, .. } = *self;
        let say = |ms| self.format(ms);
        let holds = format!("the data has requests from {} to {}", say(first_ms), say(last_ms));
        let wrong = if test_from_ms <= first_ms {
            format!("--test-from {}: nothing to train on before it; {holds}", say(test_from_ms))
        } else if test_from_ms > last_ms {
            format!("--test-from {}: no request from there on; {holds}", say(test_from_ms))
        } else if report_from_ms < test_from_ms {
            let [report, test] = [report_from_ms, test_from_ms].map(say);
            format!("--report-from {report} is before --test-from {test}, where training ends")
        } else if report_from_ms > last_ms {
            format!("--report-from {}: no request from there on; {holds}", say(report_from_ms))
        } else {
            return Ok(());
        };
        Err(Error::invalid(wrong))
    }

    /// A time by the data set's clock, to the minute: `2022-04-29 08:30`.
    pub fn format(&self, ms: i64) -> String {
        format_time(ms, self.utc_offset_h)
    }
}

/// The times of the first and the last request.
fn extent(dataset: &Dataset) -> Result<(i64, i64)> {
    let (mut first, mut last) = (None, None);
    for impression in dataset.impressions()? {
        let impression = impression?;
        if !impression.history_only {
            first.get_or_insert(impression.time_ms);
            last = Some(impression.time_ms);
        }
    }
    first.zip(last).ok_or_else(|| Error::data(&dataset.dir, "the data set has no request"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(test_from_ms: i64, report_from_ms: i64) -> TestWindow {
        TestWindow { first_ms: 1000, last_ms: 9000, test_from_ms, report_from_ms, utc_offset_h: 8 }
    }

    #[test]
    fn a_moment_is_told_by_the_data_sets_clock_and_reads_back() {
        for text in ["1970-01-01", "2000-02-29", "2022-04-29", "2023-12-31", "1999-03-01"] {
            let ms = parse_time_ms(text, 8).unwrap();
            assert_eq!(window(0, 0).format(ms + 5 * 60_000), format!("{text} 00:05"));
        }
    }

    #[test]
    fn times_outside_the_data_are_refused_with_what_it_holds() {
        assert!(window(5000, 5000).check().is_ok());
        let cases = [
            ((1000, 5000), "before"),
            ((9001, 9001), "no request"),
            ((5000, 4000), "before"),
            ((5000, 9001), "no request"),
        ];
        for ((test, report), word) in cases {
            let message = window(test, report).check().unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("1970-01-01"), "{message}");
        }
    }
}
