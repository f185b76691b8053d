//! Which features follow what the request's user has done.

use super::Schema;

/// The built-in features of the user's own history.
const OF_HISTORY: [&str; 2] = ["user_history_len", "seconds_since_last_event"];

impl Schema {
    /// The columns of `feature_columns` that follow the user's own outcomes, whatever is shown and
    /// where: counters by the user alone, and the state of the history. They say the user's level,
    /// which cannot be compared over the user's requests: an outcome that is counted already is not
    /// among those to come.
    pub fn user_activity_columns(&self) -> Vec<String> {
        let of_user = self.counters.iter().filter(|counter| counter.key == ["user_id"]);
        let counters = of_user.flat_map(|counter| {
            self.counter_columns(counter).iter().map(|kind| format!("{}_{kind}", counter.name))
        });
        counters.chain(OF_HISTORY.map(String::from)).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::{schema::Counter, simulate};

    #[test]
    fn counters_by_the_user_alone_are_the_users_activity() {
        let mut schema = simulate::schema(1);
        let like = schema.counters.first().expect("it has counters").clone();
        let mut add = |name: &str, key: &[&str]| {
            let (name, key) = (name.to_owned(), key.iter().map(|part| part.to_string()).collect());
            schema.counters.push(Counter { name, key, half_life_days: 1.0, ..like.clone() });
        };
        add("recently", &["user_id"]);
        add("on_surface", &["user_id", "surface"]);
        add("of_item", &["item_id"]);
        let (activity, all) = (schema.user_activity_columns(), schema.feature_columns());
        let has = |name: &str| activity.iter().any(|column| column == name);
        assert!(activity.iter().all(|column| all.contains(column)), "{activity:?} of {all:?}");
        assert!(has("recently_rate") && has("recently_count") && has("user_history_len"));
        assert!(
            !has("on_surface_rate") && !has("of_item_rate") && !has("item_age"),
            "{activity:?}"
        );
    }
}
