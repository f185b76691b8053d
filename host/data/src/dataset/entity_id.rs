//! The id of a user or an item as its caller has it: a whole number or a text.
//!
//! A text has its key with it, by which everything else knows the user or item, so it is hashed
//! once. Whether the schema says that ids are numbers or texts is for whoever takes one to check.

use std::fmt;
use std::sync::Arc;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ids::{IdKey, id_key};

/// The longest id that is a text, in bytes.
pub const MAX_ID_BYTES: usize = 256;

/// The id of a user or an item as its caller has it. In JSON, a number or a string.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EntityId {
    /// A whole number from 0 on.
    Integer(u64),
    /// A text.
    Text(Arc<TextId>),
}

/// An id that is a text, with its key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TextId {
    key: IdKey,
    text: Box<str>,
}

/// Whether a text can be an id.
///
/// # Errors
/// It is empty, has white space around it, or more than [`MAX_ID_BYTES`] bytes; in words for the
/// caller.
pub fn check_text_id(text: &str) -> std::result::Result<(), String> {
    // An import leaves out the white space, and must come to the same key.
    if text.is_empty() || text.trim().len() < text.len() {
        return Err(format!("{text:?} is no id: it is empty or has white space around it"));
    }
    if text.len() > MAX_ID_BYTES {
        let (start, len) = (text.chars().take(32).collect::<String>(), text.len());
        return Err(format!(
            "the id that begins with {start:?} has {len} bytes; ids have at most {MAX_ID_BYTES}"
        ));
    }
    Ok(())
}

impl TextId {
    /// Takes a text as an id.
    ///
    /// # Errors
    /// As [`check_text_id`].
    pub fn new(text: &str) -> std::result::Result<TextId, String> {
        check_text_id(text)?;
        Ok(TextId { key: id_key(text), text: text.into() })
    }

    /// An id with the key that a dictionary has stored for it.
    pub fn stored(key: IdKey, text: &str) -> TextId {
        TextId { key, text: text.into() }
    }

    /// What stands for it everywhere else.
    pub fn key(&self) -> IdKey {
        self.key
    }

    /// As the caller has it.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl EntityId {
    /// What stands for it in data sets, models and streams: the number itself, or the text's key.
    pub fn key(&self) -> u64 {
        match self {
            EntityId::Integer(id) => *id,
            EntityId::Text(id) => id.key.key,
        }
    }

    /// The text, if it is one.
    pub fn as_text(&self) -> Option<&TextId> {
        match self {
            EntityId::Integer(_) => None,
            EntityId::Text(id) => Some(id),
        }
    }
}

impl From<u64> for EntityId {
    fn from(id: u64) -> EntityId {
        EntityId::Integer(id)
    }
}

impl fmt::Display for EntityId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EntityId::Integer(id) => write!(f, "{id}"),
            EntityId::Text(id) => write!(f, "{:?}", id.text),
        }
    }
}

impl Serialize for EntityId {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            EntityId::Integer(id) => to.serialize_u64(*id),
            EntityId::Text(id) => to.serialize_str(&id.text),
        }
    }
}

impl<'de> Deserialize<'de> for EntityId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<EntityId, D::Error> {
        struct IdVisitor;

        impl Visitor<'_> for IdVisitor {
            type Value = EntityId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an id: a whole number from 0 to 2^64 - 1, or a string")
            }

            fn visit_u64<E>(self, id: u64) -> Result<EntityId, E> {
                Ok(EntityId::Integer(id))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<EntityId, E> {
                TextId::new(text).map(|id| EntityId::Text(Arc::new(id))).map_err(E::custom)
            }
        }

        from.deserialize_any(IdVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_in_json_what_their_callers_sent() {
        let read = serde_json::from_str::<EntityId>;
        for json in ["0", "18446744073709551615", "\"sku-1\"", "\"1\"", "\"a\\\"b\""] {
            assert_eq!(serde_json::to_string(&read(json).unwrap()).unwrap(), json);
        }
        assert_eq!(read("7").unwrap().key(), 7);
        assert_eq!(read("\"abc\"").unwrap().key(), 0xba78_16bf_8f01_cfea);
        assert_ne!(read("\"7\"").unwrap(), read("7").unwrap());
        assert_eq!(size_of::<EntityId>(), 16, "a body of numbers takes no more than that");
        let long = format!("\"{}\"", "x".repeat(MAX_ID_BYTES + 1));
        for (json, word) in [
            ("-1", "from 0"),
            ("1.5", "from 0"),
            ("null", "a string"),
            ("true", "a string"),
            ("\"\"", "empty"),
            ("\" a\"", "white space"),
            (long.as_str(), "at most 256"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
