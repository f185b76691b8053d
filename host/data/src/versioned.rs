//! JSON that carries the version of its format, in a field `format` beside its own. What was
//! written before there was such a field is of version 1.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// The field of the version.
const FORMAT: &str = "format";

/// An object in JSON, with its format's version.
///
/// # Panics
/// The value is no struct or map, or cannot be serialised.
pub fn to_json(value: &impl Serialize, format: u32) -> Value {
    let mut object = serde_json::to_value(value).expect("plain data serialises");
    object[FORMAT] = json!(format);
    object
}

/// Reads an object of a version up to `newest`. Fields that earlier versions did not have need
/// defaults.
///
/// # Errors
/// A text with the reason: it is of a later version, or not such an object.
pub fn from_json<T: DeserializeOwned>(bytes: &[u8], newest: u32) -> Result<T, String> {
    let mut value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let format = value.as_object_mut().and_then(|object| object.remove(FORMAT));
    let format = format.map_or(Some(1), |format| format.as_u64());
    if format.is_none_or(|format| format > u64::from(newest)) {
        return Err(format!(
            "its format is not one of 1 to {newest}, which this version of hypercast reads; use the version that wrote it, or a later one"
        ));
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Kept {
        large: u64,
        by_number: BTreeMap<u32, f64>,
    }

    #[test]
    fn versions_up_to_the_newest_are_read_and_later_ones_refused() {
        let kept = Kept { large: u64::MAX, by_number: BTreeMap::from([(3, 0.1)]) };
        let before = serde_json::to_vec(&kept).unwrap();
        assert_eq!(from_json::<Kept>(&before, 1).unwrap(), kept);
        let bytes = to_json(&kept, 2).to_string().into_bytes();
        assert_eq!(from_json::<Kept>(&bytes, 2).unwrap(), kept);
        let error = from_json::<Kept>(&bytes, 1).unwrap_err();
        assert!(error.contains("not one of 1 to 1"), "{error}");
        assert!(from_json::<Kept>(b"[]", 1).is_err());
    }
}
