//! A cell of any file, and what can be read from it: numbers, ids, texts, yes or no, and times.
//!
//! Formats say the same in different ways: 42 is a text in CSV, an integer in one Parquet file and
//! a float in another, where pandas made place for nulls. Here all of them are 42.

use std::borrow::Cow;

use chrono::{DateTime, NaiveDate, NaiveDateTime};
use hypercast_core::clock::likely_unit;
use hypercast_data::schema::is_missing_text;
use serde::{Deserialize, Serialize};

/// The largest whole number up to which a 64-bit float holds each.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The content of one cell.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Cell<'a> {
    /// Nothing: a null, an empty cell, a key that is not there.
    Missing,
    /// Yes or no.
    Bool(bool),
    /// A whole number; it holds all of 64 bits, signed or not.
    Integer(i128),
    /// A number that is finite or not.
    Number(f64),
    /// The same of 32 bits, which stands for the number that people would write for it: 0.1 and not
    /// 0.10000000149.
    Float(f32),
    /// A text that is not one of those which mean "missing".
    Text(Cow<'a, str>),
    /// A moment in milliseconds since 1970.
    TimeMs(i64),
    /// The elements of a list.
    List(Vec<Cell<'a>>),
    /// Something that no column is read from, in words.
    Other(&'static str),
    /// What could not be computed, and why.
    Wrong(String),
}

/// How the times of a column are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeUnit {
    /// A text such as `2026-11-29T10:00:00+01:00`, or a column of timestamps. Without a zone it is
    /// UTC.
    Iso,
    /// Seconds since 1970.
    S,
    /// Milliseconds since 1970.
    Ms,
    /// Microseconds since 1970.
    Us,
    /// Nanoseconds since 1970.
    Ns,
}

impl TimeUnit {
    /// The unit that a number of its size looks like.
    pub(crate) fn likely(number: f64) -> Option<TimeUnit> {
        match likely_unit(number as i64)? {
            "seconds" => Some(TimeUnit::S),
            "milliseconds" => Some(TimeUnit::Ms),
            "microseconds" => Some(TimeUnit::Us),
            _ => Some(TimeUnit::Ns),
        }
    }

    /// The unit in which a number is a time between 1990 and 2001. So are many other numbers of
    /// nine digits.
    pub(crate) fn of_the_nineties(number: f64) -> Option<TimeUnit> {
        const SECONDS: std::ops::Range<f64> = 631_152_000.0..1e9;
        let of =
            [(TimeUnit::S, 1.0), (TimeUnit::Ms, 1e3), (TimeUnit::Us, 1e6), (TimeUnit::Ns, 1e9)];
        of.into_iter().find(|(_, scale)| SECONDS.contains(&(number / scale))).map(|(unit, _)| unit)
    }

    /// Its name in a mapping.
    pub(crate) fn name(self) -> &'static str {
        match self {
            TimeUnit::Iso => "iso",
            TimeUnit::S => "s",
            TimeUnit::Ms => "ms",
            TimeUnit::Us => "us",
            TimeUnit::Ns => "ns",
        }
    }

    fn to_ms(self, number: f64) -> i64 {
        match self {
            TimeUnit::S => (number * 1e3).round() as i64,
            TimeUnit::Iso | TimeUnit::Ms => number as i64,
            TimeUnit::Us => (number / 1e3).floor() as i64,
            TimeUnit::Ns => (number / 1e6).floor() as i64,
        }
    }

    /// The same of a whole number: a float holds no nanoseconds since 1970.
    fn whole_to_ms(self, number: i128) -> i64 {
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        match self {
            TimeUnit::S => number.saturating_mul(1_000),
            TimeUnit::Iso | TimeUnit::Ms => number,
            TimeUnit::Us => number.div_euclid(1_000),
            TimeUnit::Ns => number.div_euclid(1_000_000),
        }
    }
}

/// What was read from a cell: `None` if it is missing, and why it cannot be read.
pub(crate) type CellResult<T> = std::result::Result<Option<T>, String>;

impl<'a> Cell<'a> {
    /// A text, or nothing if it stands for a missing cell.
    pub(crate) fn of_text(text: Cow<'a, str>) -> Cell<'a> {
        if is_missing_text(&text) { Cell::Missing } else { Cell::Text(text) }
    }

    /// A finite number. Yes is 1 and no is 0.
    pub(crate) fn number(&self) -> CellResult<f64> {
        let number = match self {
            Cell::Missing => return Ok(None),
            Cell::Bool(is_so) => f64::from(u8::from(*is_so)),
            // Of 128 bits it is slow.
            Cell::Integer(number) => i64::try_from(*number).map_or(*number as f64, |it| it as f64),
            Cell::Number(number) if number.is_nan() => return Ok(None),
            Cell::Number(number) => *number,
            Cell::Float(number) => return Cell::Number(shortest(*number)).number(),
            Cell::Text(text) => match text.trim().parse() {
                Ok(number) => number,
                Err(_) => {
                    let is_so = bool_of(text).ok_or_else(|| format!("`{text}` is not a number"))?;
                    f64::from(u8::from(is_so))
                }
            },
            _ => return Err(self.unlike("a number")),
        };
        if number.is_infinite() {
            return Err(format!("`{number}` is not finite"));
        }
        Ok(Some(number))
    }

    /// A finite number of 32 bits.
    pub(crate) fn float(&self) -> CellResult<f32> {
        if let Cell::Float(number) = self
            && number.is_finite()
        {
            return Ok(Some(*number));
        }
        let number = self.number()?.map(|number| number as f32);
        if number.is_some_and(f32::is_infinite) {
            return Err("it is beyond what 32 bits hold".to_owned());
        }
        Ok(number)
    }

    /// An id that is a whole number.
    pub(crate) fn integer_id(&self) -> CellResult<u64> {
        let wrong = |shown: &dyn std::fmt::Display| {
            Err(format!("`{shown}` is not a whole number from 0 on; set the ids to \"string\""))
        };
        match self {
            Cell::Missing => Ok(None),
            Cell::Integer(number) => {
                u64::try_from(*number).map_or_else(|_| wrong(number), |id| Ok(Some(id)))
            }
            Cell::Number(number) if number.is_nan() => Ok(None),
            Cell::Number(number) if number.fract() == 0.0 && (0.0..EXACT).contains(number) => {
                Ok(Some(*number as u64))
            }
            Cell::Number(number) => wrong(number),
            Cell::Float(number) => Cell::Number(shortest(*number)).integer_id(),
            Cell::Text(text) => {
                whole(text.trim()).parse().map_or_else(|_| wrong(text), |id| Ok(Some(id)))
            }
            _ => Err(self.unlike("an id")),
        }
    }

    /// A text as it stands, without white space around it.
    pub(crate) fn text(&self) -> CellResult<Cow<'_, str>> {
        Ok(Some(match self {
            Cell::Missing => return Ok(None),
            Cell::Bool(is_so) => Cow::Borrowed(if *is_so { "true" } else { "false" }),
            Cell::Integer(number) => number.to_string().into(),
            Cell::Number(number) if number.is_nan() => return Ok(None),
            Cell::Number(number) => number.to_string().into(),
            Cell::Float(number) if number.is_nan() => return Ok(None),
            Cell::Float(number) => number.to_string().into(),
            Cell::Text(text) => Cow::Borrowed(text.trim()),
            Cell::TimeMs(time_ms) => time_ms.to_string().into(),
            Cell::List(_) | Cell::Other(_) | Cell::Wrong(_) => return Err(self.unlike("a text")),
        }))
    }

    /// A category: `42.0` is 42, and `True` is `true`, whatever file it stands in.
    pub(crate) fn category(&self) -> CellResult<Cow<'_, str>> {
        let text = self.text()?;
        Ok(text.map(|text| match text {
            Cow::Borrowed(text) if text.eq_ignore_ascii_case("true") => Cow::Borrowed("true"),
            Cow::Borrowed(text) if text.eq_ignore_ascii_case("false") => Cow::Borrowed("false"),
            Cow::Borrowed(text) => Cow::Borrowed(whole(text)),
            Cow::Owned(text) => Cow::Owned(text),
        }))
    }

    /// Yes or no: 1 and 0, true and false, yes and no or their first letters, in any case.
    pub(crate) fn flag(&self) -> CellResult<bool> {
        match self {
            Cell::Missing => Ok(None),
            Cell::Bool(is_so) => Ok(Some(*is_so)),
            Cell::Text(text) => bool_of(text.trim()).map(Some).ok_or_else(|| {
                format!("`{text}` is neither true nor false; use `at_least` or `one_of`")
            }),
            _ => match self.number()? {
                None => Ok(None),
                Some(0.0) => Ok(Some(false)),
                Some(1.0) => Ok(Some(true)),
                Some(number) => Err(format!("`{number}` is neither 0 nor 1; use `at_least`")),
            },
        }
    }

    /// A moment in milliseconds since 1970.
    pub(crate) fn time_ms(&self, unit: TimeUnit) -> CellResult<i64> {
        let time_ms = match (self, unit) {
            (Cell::Missing, _) => return Ok(None),
            (Cell::TimeMs(time_ms), TimeUnit::Iso) => *time_ms,
            (Cell::TimeMs(_), _) => {
                return Err("the column has timestamps; set its unit to \"iso\"".into());
            }
            (Cell::Text(text), TimeUnit::Iso) => {
                iso_ms(text.trim()).ok_or_else(|| match self.number() {
                    Ok(Some(number)) => wrong_unit(number, unit),
                    _ => format!("`{text}` is not a time as 2026-11-29T10:00:00+01:00"),
                })?
            }
            _ => {
                let Some(number) = self.number()? else { return Ok(None) };
                if TimeUnit::likely(number).is_some_and(|likely| likely != unit) {
                    return Err(wrong_unit(number, unit));
                }
                match self {
                    Cell::Integer(number) => unit.whole_to_ms(*number),
                    Cell::Text(text) => text
                        .trim()
                        .parse()
                        .map_or_else(|_| unit.to_ms(number), |number| unit.whole_to_ms(number)),
                    _ => unit.to_ms(number),
                }
            }
        };
        if time_ms < 0 {
            return Err(format!("{time_ms} ms is before 1970"));
        }
        Ok(Some(time_ms))
    }

    /// Whether it is a text with the time of a day and no zone, which counts as UTC.
    pub(crate) fn lacks_zone(&self) -> bool {
        let Cell::Text(text) = self else { return false };
        let of_day = text.trim().get("2026-11-29".len()..).unwrap_or_default();
        of_day.contains(':') && !of_day.contains(['Z', 'z', '+', '-']) && !of_day.ends_with("UTC")
    }

    /// The first element of a list, and of a text what comes before the `separator`.
    pub(crate) fn first(self, separator: Option<char>) -> Cell<'a> {
        match (self, separator) {
            (Cell::List(elements), _) => elements.into_iter().next().unwrap_or(Cell::Missing),
            (Cell::Text(text), Some(separator)) => {
                let end = text.find(separator).unwrap_or(text.len());
                Cell::of_text(match text {
                    Cow::Borrowed(text) => Cow::Borrowed(&text[..end]),
                    Cow::Owned(text) => Cow::Owned(text[..end].to_owned()),
                })
            }
            (cell, _) => cell,
        }
    }

    /// The elements of a list, and of a text the parts between `separator`s. Any other cell is one
    /// element, and a missing one none.
    pub(crate) fn elements(self, separator: Option<char>) -> Vec<Cell<'a>> {
        match (self, separator) {
            (Cell::Missing, _) => Vec::new(),
            (Cell::List(elements), _) => elements,
            (Cell::Text(Cow::Borrowed(text)), Some(separator)) => {
                text.split(separator).map(|part| Cell::of_text(part.into())).collect()
            }
            (Cell::Text(Cow::Owned(text)), Some(separator)) => {
                let part = |part: &str| Cell::of_text(part.to_owned().into());
                text.split(separator).map(part).collect()
            }
            (cell, _) => vec![cell],
        }
    }

    fn unlike(&self, wanted: &str) -> String {
        match self {
            Cell::List(_) => {
                format!(
                    "it is a list, not {wanted}; a feature may take `list = \"first\"`, or as \
                     many as its `max_values`"
                )
            }
            Cell::TimeMs(_) => format!("it is a timestamp, not {wanted}"),
            Cell::Other(what) => format!("it is {what}, not {wanted}"),
            Cell::Wrong(reason) => reason.clone(),
            _ => format!("it is not {wanted}"),
        }
    }
}

/// The number that people would write for a float.
fn shortest(number: f32) -> f64 {
    let exact = f64::from(number);
    // Printing it is slow, and nothing else than itself for whole numbers.
    if exact.fract() == 0.0 { exact } else { number.to_string().parse().unwrap_or(exact) }
}

fn wrong_unit(number: f64, unit: TimeUnit) -> String {
    let (shown, unit) = (number, unit.name());
    match TimeUnit::likely(number) {
        Some(likely) => format!(
            "`{shown}` looks like {}, not {unit}; set the unit to \"{}\"",
            likely.name(),
            likely.name()
        ),
        None => format!("`{shown}` is not a time in the unit {unit}"),
    }
}

/// A whole number without the `.0` that a float is written with; any other text as it is.
fn whole(text: &str) -> &str {
    let digits = text.strip_suffix(".0").filter(|digits| {
        let digits = digits.strip_prefix('-').unwrap_or(digits);
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    });
    digits.unwrap_or(text)
}

fn bool_of(text: &str) -> Option<bool> {
    let is = |words: [&str; 6]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is(["true", "1", "1.0", "yes", "t", "y"]) {
        return Some(true);
    }
    is(["false", "0", "0.0", "no", "f", "n"]).then_some(false)
}

/// Reads a date, or a date with a time and perhaps a zone; the last is UTC if it is missing.
fn iso_ms(text: &str) -> Option<i64> {
    const ZONED: [&str; 2] = ["%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f %#z"];
    const PLAIN: [&str; 4] =
        ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"];
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.timestamp_millis());
    }
    let zoned = ZONED.iter().find_map(|form| DateTime::parse_from_str(text, form).ok());
    if let Some(time) = zoned {
        return Some(time.timestamp_millis());
    }
    let text = text.strip_suffix(" UTC").unwrap_or(text);
    let plain = PLAIN.iter().find_map(|form| NaiveDateTime::parse_from_str(text, form).ok());
    let midnight = || NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0);
    plain.or_else(midnight).map(|time| time.and_utc().timestamp_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Cell<'_> {
        Cell::of_text(text.into())
    }

    #[test]
    fn a_number_is_the_same_in_every_file() {
        for cell in [text("42"), text(" 42.0 "), Cell::Integer(42), Cell::Number(42.0)] {
            assert_eq!(cell.number(), Ok(Some(42.0)));
            assert_eq!(cell.integer_id(), Ok(Some(42)), "{cell:?}");
            assert_eq!(cell.category().unwrap().unwrap(), "42", "{cell:?}");
        }
        assert_eq!(Cell::Integer(u64::MAX.into()).integer_id(), Ok(Some(u64::MAX)));
        assert_eq!(text("1.5").category().unwrap().unwrap(), "1.5");
        let tenth = Cell::Float(0.1);
        assert_eq!((tenth.number(), tenth.float()), (Ok(Some(0.1)), Ok(Some(0.1))));
        assert_eq!(tenth.category().unwrap().unwrap(), "0.1");
        assert_eq!(Cell::Float(42.0).integer_id(), Ok(Some(42)));
        assert!(Cell::Number(1e300).float().unwrap_err().contains("beyond what 32 bits hold"));
        for (cell, reason) in [
            (text("1.5").integer_id(), "set the ids to \"string\""),
            (Cell::Integer(-1).integer_id(), "`-1` is not a whole number"),
            (Cell::Number(1e17).integer_id(), "is not a whole number"),
        ] {
            assert!(cell.as_ref().unwrap_err().contains(reason), "{cell:?}");
        }
        assert!(Cell::Number(f64::INFINITY).number().unwrap_err().contains("not finite"));
        assert!(text("many").number().unwrap_err().contains("`many` is not a number"));
    }

    #[test]
    fn what_is_missing_is_missing_everywhere() {
        for cell in [
            text(""),
            text("NaN"),
            text("\\N"),
            Cell::Missing,
            Cell::Number(f64::NAN),
            Cell::Float(f32::NAN),
        ] {
            assert_eq!(cell.number(), Ok(None));
            assert_eq!(cell.text(), Ok(None));
            assert_eq!(cell.flag(), Ok(None));
            assert_eq!(cell.integer_id(), Ok(None));
        }
        assert_eq!(text("NA").text().unwrap().unwrap(), "NA");
    }

    #[test]
    fn a_list_has_the_same_elements_in_every_file() {
        let texts = |cell: Cell<'_>| -> Vec<String> {
            let elements = cell.elements(Some('|'));
            elements.iter().filter_map(|cell| Some(cell.category().unwrap()?.into())).collect()
        };
        let list = Cell::List(vec![text("a"), Cell::Missing, Cell::Integer(7)]);
        for cell in [list, text("a||7"), text(" a | 7.0 ")] {
            assert_eq!(texts(cell.clone()), ["a", "7"], "{cell:?}");
        }
        assert_eq!(texts(Cell::Integer(7)), ["7"], "any other cell is one element");
        assert_eq!(texts(Cell::Missing), [""; 0]);
        assert_eq!(text("a|b").elements(None), [text("a|b")], "if nobody says it is a list");
        assert_eq!(Cell::List(Vec::new()).first(None), Cell::Missing);
    }

    #[test]
    fn yes_and_no_have_many_forms() {
        for cell in [text("True"), text("1"), text("1.0"), Cell::Bool(true), Cell::Number(1.0)] {
            assert_eq!(cell.flag(), Ok(Some(true)), "{cell:?}");
        }
        assert_eq!(text("False").category().unwrap().unwrap(), "false");
        assert_eq!(Cell::Bool(false).category().unwrap().unwrap(), "false");
        assert!(Cell::Number(3.0).flag().unwrap_err().contains("at_least"));
        assert!(text("maybe").flag().unwrap_err().contains("one_of"));
    }

    #[test]
    fn times_have_zones_and_units() {
        let ms = 1_764_414_000_250;
        for iso in [
            "2025-11-29T11:00:00.250Z",
            "2025-11-29T12:00:00.250+01:00",
            "2025-11-29 12:00:00.250000+01:00",
            "2025-11-29T12:00:00.250+0100",
            "2025-11-29 11:00:00.250 UTC",
            "2025-11-29 11:00:00.250",
        ] {
            assert_eq!(text(iso).time_ms(TimeUnit::Iso), Ok(Some(ms)), "{iso}");
        }
        for (time, lacks) in [
            ("2025-11-29 11:00:00.250", true),
            ("2025-11-29T11:00", true),
            ("2025-11-29T11:00:00Z", false),
            ("2025-11-29 11:00:00 UTC", false),
            ("2025-11-29T12:00:00-0500", false),
            ("2025-11-29", false),
        ] {
            assert_eq!(text(time).lacks_zone(), lacks, "{time}");
        }
        assert_eq!(text("1970-01-02").time_ms(TimeUnit::Iso), Ok(Some(86_400_000)));
        assert_eq!(Cell::TimeMs(ms).time_ms(TimeUnit::Iso), Ok(Some(ms)));
        let integer = |number: i64| Cell::Integer(number.into());
        assert_eq!(integer(ms).time_ms(TimeUnit::Ms), Ok(Some(ms)));
        assert_eq!(integer(ms * 1000 + 999).time_ms(TimeUnit::Us), Ok(Some(ms)));
        assert_eq!(integer(ms * 1_000_000).time_ms(TimeUnit::Ns), Ok(Some(ms)));
        assert_eq!(text("1764414000.25").time_ms(TimeUnit::S), Ok(Some(ms)));
        for (cell, unit, reason) in [
            (integer(ms), TimeUnit::S, "looks like ms, not s; set the unit to \"ms\""),
            (integer(ms / 1000), TimeUnit::Ms, "looks like s, not ms"),
            (text("1764414000250"), TimeUnit::Iso, "looks like ms, not iso"),
            (text("29.11.2025"), TimeUnit::Iso, "is not a time as 2026-11-29T"),
            (Cell::TimeMs(ms), TimeUnit::Ms, "set its unit to \"iso\""),
            (integer(-5), TimeUnit::Ms, "before 1970"),
        ] {
            let error = cell.time_ms(unit).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
