//! Test requests: generated as a whole, then changed as a test needs.

use serde_json::{Map, Value, json};

/// A request of a user, as in the body of a daemon's `POST /v1/rank`. Everything that a test does
/// not set is generated from the request's number.
#[derive(Debug, Clone)]
pub struct TestRequest {
    fields: Map<String, Value>,
    /// Features of all candidates, by name.
    context: Map<String, Value>,
    /// Of each candidate that is named: its id and features.
    items: Vec<(u64, Map<String, Value>)>,
}

impl TestRequest {
    /// A request with 20 candidates and 30 past events. Different numbers give different requests.
    pub fn new(number: u64) -> TestRequest {
        let fields = Map::from_iter([("request".into(), json!(number))]);
        TestRequest { fields, context: Map::new(), items: Vec::new() }
    }

    /// Sets the surface; the first one that the expert serves by default.
    pub fn surface(self, name: &str) -> TestRequest {
        self.with("surface", json!(name))
    }

    /// Sets the number of candidates.
    pub fn candidates(self, candidates: usize) -> TestRequest {
        TestRequest { items: Vec::new(), ..self }.with("candidates", json!(candidates))
    }

    /// Sets the candidates, in this order. An item's features follow from its id.
    pub fn items(self, ids: impl IntoIterator<Item = u64>) -> TestRequest {
        TestRequest { items: ids.into_iter().map(|id| (id, Map::new())).collect(), ..self }
    }

    /// Sets the user. A user's features follow from the id.
    pub fn user(self, id: u64) -> TestRequest {
        self.with("user", json!(id))
    }

    /// Sets the number of events in the history, over all surfaces.
    pub fn history(self, events: usize) -> TestRequest {
        self.with("history", json!(events))
    }

    /// Sets a feature or a counter's column of every candidate: a number, a category's text or id,
    /// a list of these, or null where it is missing.
    pub fn feature(mut self, name: &str, value: impl Into<Value>) -> TestRequest {
        self.context.insert(name.into(), value.into());
        self
    }

    /// Sets a feature of each candidate, in the order of [`TestRequest::items`].
    ///
    /// # Panics
    /// There are not as many values as items.
    #[track_caller]
    pub fn features<V: Into<Value>>(
        mut self,
        name: &str,
        values: impl IntoIterator<Item = V>,
    ) -> TestRequest {
        let values: Vec<Value> = values.into_iter().map(V::into).collect();
        assert_eq!(values.len(), self.items.len(), "`{name}` needs a value for each of `items`");
        for ((_, features), value) in self.items.iter_mut().zip(values) {
            features.insert(name.into(), value);
        }
        self
    }

    /// Sets the candidates' embeddings, one after the other.
    pub fn tae(self, values: &[f32]) -> TestRequest {
        self.with("tae", json!(values))
    }

    /// The request in JSON, for so many candidates back.
    pub(crate) fn value(&self, limit: Option<usize>) -> Value {
        let mut fields = self.fields.clone();
        if !self.items.is_empty() {
            let item = |(id, features): &(u64, Map<String, Value>)| json!({ "id": id, "features": features });
            fields.insert("candidates".into(), self.items.iter().map(item).collect());
        }
        fields.insert("context".into(), Value::Object(self.context.clone()));
        fields.insert("limit".into(), json!(limit));
        Value::Object(fields)
    }

    fn with(mut self, field: &str, value: Value) -> TestRequest {
        self.fields.insert(field.into(), value);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_the_body_of_a_rank_request() {
        let request = TestRequest::new(3).surface("feed").user(9).items([7, 8]);
        let request = request.feature("battery", 0.5).features("topic", ["news", "sport"]);
        let expected = json!({
            "request": 3, "surface": "feed", "user": 9, "limit": 1, "context": { "battery": 0.5 },
            "candidates": [
                { "id": 7, "features": { "topic": "news" } },
                { "id": 8, "features": { "topic": "sport" } },
            ],
        });
        assert_eq!(request.value(Some(1)), expected);
        assert_eq!(TestRequest::new(1).candidates(5).value(None)["candidates"], 5);
    }
}
