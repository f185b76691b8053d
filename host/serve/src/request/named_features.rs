//! Features as callers send them: by name, with the values that JSON has.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    marker::PhantomData,
};

use hypercast_data::schema::{category_id, is_missing_text};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

/// The greatest id of a category. The one above stands for what no caller can send (see
/// `hypercast_fm::training_only`), and counts as this one.
const MOST_ID: u64 = u64::MAX - 1;

/// The most values of a list that are read. A feature takes at most
/// [`hypercast_data::schema::MAX_TAGS`] of them.
const MAX_LISTED: usize = 1024;

/// Features by the names that the schema gives them.
pub type NamedFeatures = BTreeMap<String, FeatureValue>;

/// A feature's value in JSON: an id or number, the text of a category, or a list of categories.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum FeatureValue {
    /// An id, or a whole number.
    Id(u64),
    /// A number.
    Number(f64),
    /// A category's text; its id is the one that an import assigns.
    Text(String),
    /// The values of a feature that can have several.
    List(Vec<FeatureValue>),
    /// JSON's null: the value is missing, whatever is known otherwise.
    Missing,
}

impl FeatureValue {
    /// A number, or that it is missing.
    pub(crate) fn of_number(number: f32) -> Self {
        if number.is_finite() { Self::Number(number.into()) } else { Self::Missing }
    }

    /// The id of a category, 0 if it is missing; none if it is no category.
    pub(crate) fn category(&self) -> Option<u64> {
        match self {
            Self::Missing => Some(0),
            Self::Id(id) => Some((*id).min(MOST_ID)),
            Self::Text(text) if is_missing_text(text) => Some(0),
            Self::Text(text) => Some(category_id(text)),
            Self::Number(_) | Self::List(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for FeatureValue {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ValueVisitor { is_listed: false })
    }
}

/// Reads a value as it comes. What serde derives would hold a copy of all that a list contains, for
/// each list that it is in, so that a small body could take gigabytes.
#[derive(Clone, Copy)]
struct ValueVisitor {
    /// Whether it is in a list, so that it is none itself.
    is_listed: bool,
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = FeatureValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_listed {
            "a number, a text or null in the list of a feature"
        } else {
            "a number, a text, a list of these, or null as a feature"
        })
    }

    fn visit_u64<E>(self, id: u64) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Id(id))
    }

    fn visit_i64<E>(self, number: i64) -> Result<FeatureValue, E> {
        Ok(u64::try_from(number).map_or(FeatureValue::Number(number as f64), FeatureValue::Id))
    }

    fn visit_f64<E>(self, number: f64) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Text(text.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Missing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<FeatureValue, A::Error> {
        if self.is_listed {
            return Err(de::Error::invalid_type(de::Unexpected::Seq, &self));
        }
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(ValueVisitor { is_listed: true })? {
            if values.len() == MAX_LISTED {
                return Err(de::Error::custom(format!(
                    "the list of a feature has more than {MAX_LISTED} values"
                )));
            }
            values.push(value);
        }
        Ok(FeatureValue::List(values))
    }
}

impl<'de> DeserializeSeed<'de> for ValueVisitor {
    type Value = FeatureValue;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<FeatureValue, D::Error> {
        from.deserialize_any(self)
    }
}

/// Reads a map in which no key may stand twice. Otherwise the last one would count, silently.
pub(crate) fn unique_keys<'de, D, V>(from: D) -> Result<BTreeMap<String, V>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    struct UniqueKeys<V>(PhantomData<V>);

    impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueKeys<V> {
        type Value = BTreeMap<String, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of names")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut entries: M) -> Result<Self::Value, M::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = entries.next_entry::<String, V>()? {
                match map.entry(key) {
                    Entry::Vacant(place) => place.insert(value),
                    Entry::Occupied(place) => {
                        let why = format!("{:?} stands twice", place.key());
                        return Err(de::Error::custom(why));
                    }
                };
            }
            Ok(map)
        }
    }

    from.deserialize_map(UniqueKeys(PhantomData))
}
