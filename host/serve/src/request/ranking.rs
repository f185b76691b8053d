//! The ranking of an answer: columns with a value a place, best first. In JSON it has the form that
//! the candidates of its request had.

use std::collections::BTreeMap;

use hypercast_data::dataset::entity_id::EntityId;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::request::candidates::BodyForm;

/// The places of an answer, best first.
///
/// In JSON `[{"id": 3, "score": 0.5, "predictions": {"click": 0.5}}, ...]`, or
/// `{"id": [3, ...], "score": [0.5, ...], "predictions": {"click": [0.5, ...]}}`.
#[derive(Debug, Clone, Default)]
pub struct RankedPlaces {
    /// The items, by the ids that the request gave them.
    pub ids: Vec<EntityId>,
    /// The values that the ranking is sorted by.
    pub scores: Vec<f32>,
    /// The probability with which the expert gives each place to its item, if it explores; with the
    /// SDK's softmax it is given the places before. One a place.
    pub propensities: Vec<Option<f32>>,
    /// A prediction a place for each task: a probability for a binary task, a value for a
    /// regression.
    pub predictions: BTreeMap<String, Vec<f32>>,
    /// The form in JSON.
    pub form: BodyForm,
}

impl RankedPlaces {
    /// The number of places.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// A place in JSON.
#[derive(Serialize)]
struct PlaceBody<'a> {
    id: &'a EntityId,
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    propensity: Option<f32>,
    predictions: PlacePredictions<'a>,
}

/// The predictions of a place, by task.
struct PlacePredictions<'a> {
    of: &'a BTreeMap<String, Vec<f32>>,
    place: usize,
}

impl Serialize for PlacePredictions<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.of.iter().map(|(task, values)| (task, values[self.place])))
    }
}

impl Serialize for RankedPlaces {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct PlacesBody<'a> {
            id: &'a [EntityId],
            score: &'a [f32],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            propensity: &'a [Option<f32>],
            predictions: &'a BTreeMap<String, Vec<f32>>,
        }
        let Self { ids, scores, propensities, predictions, form } = self;
        match form {
            BodyForm::Rows => to.collect_seq((0..ids.len()).map(|place| PlaceBody {
                id: &ids[place],
                score: scores[place],
                propensity: propensities[place],
                predictions: PlacePredictions { of: predictions, place },
            })),
            BodyForm::Columns => {
                let explores = propensities.iter().any(Option::is_some);
                let propensity = if explores { &propensities[..] } else { &[] };
                PlacesBody { id: ids, score: scores, propensity, predictions }.serialize(to)
            }
        }
    }
}

impl<'de> Deserialize<'de> for RankedPlaces {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Place {
            id: EntityId,
            score: f32,
            #[serde(default)]
            propensity: Option<f32>,
            predictions: BTreeMap<String, f32>,
        }
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a ranking: a list of places, or their columns")]
        enum Body {
            Places(Vec<Place>),
            Columns {
                id: Vec<EntityId>,
                score: Vec<f32>,
                #[serde(default)]
                propensity: Vec<Option<f32>>,
                predictions: BTreeMap<String, Vec<f32>>,
            },
        }
        let mut all = Self::default();
        match Body::deserialize(from)? {
            Body::Places(places) => {
                for Place { id, score, propensity, predictions } in places {
                    all.ids.push(id);
                    all.scores.push(score);
                    all.propensities.push(propensity);
                    for (task, value) in predictions {
                        all.predictions.entry(task).or_default().push(value);
                    }
                }
            }
            Body::Columns { id, score, mut propensity, predictions } => {
                if propensity.is_empty() {
                    propensity.resize(id.len(), None);
                }
                (all.ids, all.scores, all.propensities) = (id, score, propensity);
                (all.predictions, all.form) = (predictions, BodyForm::Columns);
            }
        }
        let places = all.len();
        let of_columns = all.predictions.values().map(Vec::len);
        let mut lengths = of_columns.chain([all.scores.len(), all.propensities.len()]);
        if lengths.any(|length| length != places) {
            let why = "a ranking whose columns, or whose places' tasks, differ in number";
            return Err(de::Error::custom(why));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ranking_is_written_as_its_request_was_and_read_from_either_form() {
        let rows = r#"[{"id":"b","score":0.5,"predictions":{"click":0.5,"watch":9.0}},{"id":"a","score":0.25,"propensity":0.125,"predictions":{"click":0.25,"watch":1.0}}]"#;
        let columns = r#"{"id":["b","a"],"score":[0.5,0.25],"propensity":[null,0.125],"predictions":{"click":[0.5,0.25],"watch":[9.0,1.0]}}"#;
        let read = |text: &str| serde_json::from_str::<RankedPlaces>(text).unwrap();
        for text in [rows, columns, "[]", r#"{"id":[7],"score":[1.0],"predictions":{}}"#] {
            assert_eq!(serde_json::to_string(&read(text)).unwrap(), text);
        }
        let of_columns = RankedPlaces { form: BodyForm::Columns, ..read(rows) };
        assert_eq!(serde_json::to_string(&of_columns).unwrap(), columns);
        assert_eq!((of_columns.len(), of_columns.is_empty()), (2, false));
        for text in [
            r#"{"id":[7],"score":[1.0,2.0],"predictions":{}}"#,
            r#"{"id":[7],"score":[1.0],"propensity":[0.5,0.5],"predictions":{}}"#,
            r#"[{"id":7,"score":1.0,"predictions":{"click":0.5}},{"id":8,"score":1.0,"predictions":{}}]"#,
        ] {
            let refused = serde_json::from_str::<RankedPlaces>(text).unwrap_err();
            assert!(refused.to_string().contains("differ in number"), "{refused}");
        }
    }
}
