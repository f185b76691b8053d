use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::request::api::RankRequest;
use crate::request::named_features::FeatureValue;
use hypercast_data::dataset::ContextFeatures;
use hypercast_data::dataset::ids::id_key;
use hypercast_data::schema::{
    BeyondRange, Feature, FeatureKind, IdKind, Schema, ValueRange, category_id,
};

fn converter() -> Converter {
    let schema = Schema {
        surfaces: vec!["feed".into()],
        actions: vec!["click".into(), "like".into()],
        values: vec!["watched".into()],
        tasks: vec![],
        item_features: vec![Feature::new("tag", FeatureKind::Categorical)],
        user_features: vec![Feature::new("age", FeatureKind::Dense)],
        context_features: vec![],
        counters: vec![],
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: vec![
            ValueRange { name: "watched".into(), low: 0.0, high: 2.0, ..Default::default() },
            ValueRange { name: "age".into(), low: 0.0, high: 120.0, beyond: BeyondRange::Refuse },
        ],
    };
    Converter::new(Arc::new(schema))
}

fn new_events(body: &str) -> RequestResult<Vec<NewEvent>> {
    let request: EventsRequest = serde_json::from_str(body).unwrap();
    converter().new_events(&request, 1000)
}

#[test]
fn events_of_a_stream_that_another_process_has_are_refused_with_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::without_folder();
    config.engine.dir = dir.path().to_path_buf();
    let intake = || {
        let engine = hypercast_stream::streams::open(&config.engine).unwrap();
        EventIntake::new(engine, converter(), CallerIds::default(), &config, Arc::default())
    };
    let body =
        r#"{"actions": [{"request": 7, "item": 1, "time_ms": 6, "actions": {"click": true}}]}"#;
    let request: EventsRequest = serde_json::from_str(body).unwrap();
    let (first, second) = (intake(), intake());
    assert_eq!(first.take(&request).unwrap().accepted, 1);
    let refusal = second.take(&request).unwrap_err();
    assert_eq!(refusal.code(), (502, "unreachable"));
    let (why, folder) = (refusal.to_string(), dir.path().join("events"));
    let holder = format!("{}: process {} writes", folder.display(), std::process::id());
    assert!(why.contains(&holder) && why.contains("engine.dir"), "{why}");
    drop(first);
    assert_eq!(second.take(&request).unwrap().repeated, 1);
}

#[test]
fn lists_become_records_in_the_order_they_are_joined() {
    let made = new_events(
            r#"{"actions": [{"request": 7, "item": 1, "time_ms": 6, "actions": {"like": true}, "complete": true}],
                "impressions": [{"request": 7, "user": 1, "item": 1, "surface": "feed", "time_ms": 5}],
                "events": [{"request": 8, "user": 1, "item": 1, "surface": "feed", "time_ms": 5, "actions": {"click": false}},
                           {"request": 8, "user": 1, "item": 2, "surface": "feed", "time_ms": 5},
                           {"request": 9, "user": 1, "item": 2, "surface": "feed", "time_ms": 5}],
                "items": [{"id": 3, "features": {"tag": "drama"}}], "clock_ms": 900}"#,
        )
        .unwrap();
    let [item, shown, first, second, action, tick] = &made[..] else { panic!("{made:?}") };
    assert!(matches!(&item.kind, EventKind::Item(item) if item.id == 3 && item.ids.len() == 1));
    assert!(matches!(&shown.kind, EventKind::Impression(shown) if shown.request == 7));
    let EventKind::CompleteRequest(rows) = &first.kind else { panic!("{first:?}") };
    assert_eq!(rows.len(), 2, "what one request showed is one record");
    assert_eq!((rows[0].outcome.known, rows[1].outcome.known), (1, 0));
    assert!(matches!(&second.kind, EventKind::CompleteRequest(rows) if rows[0].request == 9));
    let EventKind::Action(reaction) = &action.kind else { panic!("{action:?}") };
    assert_eq!((reaction.outcome.actions, reaction.outcome.known, reaction.complete), (2, 2, true));
    assert!(reaction.outcome.values[0].is_nan(), "what is not named is not known");
    assert!(matches!(tick.kind, EventKind::Tick { time_ms: 900 }));
}

#[test]
fn a_content_vector_has_unit_norm_and_the_width_of_the_data_set() {
    let told = |width: Option<usize>, list: &str, content: &str| {
        let features = if list == "items" { r#""tag": "a""# } else { r#""age": 3"# };
        let body = format!(
            r#"{{"{list}": [{{"id": 3, "features": {{{features}}}, "content": {content}}}]}}"#
        );
        let made =
            converter().with_content(width).new_events(&serde_json::from_str(&body).unwrap(), 1000);
        made.map(|mut made| match made.remove(0).kind {
            EventKind::Item(item) => item.content.to_vec(),
            other => panic!("{other:?}"),
        })
    };
    for width in [Some(2), None] {
        assert_eq!(told(width, "items", "[30, -40]").unwrap(), [0.6, -0.8]);
        assert_eq!(told(width, "items", "[0, 0.0]").unwrap(), [0.0, 0.0]);
        assert!(told(width, "items", "null").unwrap().is_empty());
    }
    for (refused, reason) in [
        (told(Some(2), "items", "[1]"), "items[0]: content: it has 1 numbers; the vectors of"),
        (told(Some(2), "items", "[]"), "data set have 2"),
        (told(None, "items", "[]"), "has 0 numbers, of 1 to 4096"),
        (told(Some(0), "items", "[1, 2]"), "the data set has no content vectors"),
        (told(Some(2), "users", "[1, 2]"), "users[0]: content: a user has no content vector"),
    ] {
        let refusal = refused.unwrap_err();
        assert_eq!(refusal.code().0, 400);
        assert!(refusal.to_string().contains(reason), "{refusal}");
    }
    let not_finite = r#"{"items": [{"id": 3, "features": {}, "content": [1e39, 0]}]}"#;
    let error = serde_json::from_str::<EventsRequest>(not_finite).unwrap_err().to_string();
    assert!(error.contains("out of range"), "{error}");
}

#[test]
fn after_a_growth_content_vectors_have_the_width_that_they_have_now() {
    let body = r#"{"items": [{"id": 3, "features": {"tag": "a"}, "content": [3, 4]}]}"#;
    let body = serde_json::from_str::<EventsRequest>(body).unwrap();
    let before = converter();
    assert!(before.new_events(&body, 1000).is_err(), "there were none");
    let after = before.under(before.schema.clone(), 2);
    assert_eq!(after.new_events(&body, 1000).unwrap().len(), 1);
}

#[test]
fn an_impression_without_a_request_has_one_of_its_own() {
    let body = r#"{"impressions": [{"user": 1, "item": 1, "surface": "feed", "time_ms": 5},
                                       {"id": 44, "user": 1, "item": 1, "surface": "feed", "time_ms": 5}]}"#;
    let requests: Vec<u64> = new_events(body)
        .unwrap()
        .iter()
        .map(|new_events| match &new_events.kind {
            EventKind::Impression(shown) => shown.request,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(requests[0] > 0 && requests[0] < MOST_ID && requests[1] == 44, "{requests:?}");
    assert_eq!(
        format!("{:?}", new_events(body).unwrap()),
        format!("{:?}", new_events(body).unwrap())
    );
}

#[test]
fn an_update_that_is_sent_again_has_the_same_id_if_the_caller_gave_one() {
    let id = |body: &str| {
        let record = new_events(body).unwrap().remove(0).record(1).unwrap();
        record.id
    };
    let of = |item: u64, update: &str| {
        format!(r#"{{"items": [{{"id": {item}{update}, "features": {{"tag": "a"}}}}]}}"#)
    };
    assert_eq!(id(&of(3, "")), 0, "taken whenever it comes");
    let first = id(&of(3, r#", "update": 1"#));
    assert!(first > 0 && first == id(&of(3, r#", "update": 1"#)));
    assert_ne!(first, id(&of(3, r#", "update": 2"#)));
    assert_ne!(first, id(&of(4, r#", "update": 1"#)), "of another item");
}

#[test]
fn numbers_beyond_their_ranges_are_clipped_or_refused_and_counted() {
    let metrics = Metrics::default();
    let converter = converter().counting_in(&metrics);
    let new_events = |body: &str| converter.new_events(&serde_json::from_str(body).unwrap(), 1000);
    let watched = |sent: &str| {
        let body = format!(
            r#"{{"actions": [{{"request": 7, "item": 1, "time_ms": 5, "values": {{"watched": {sent}}}}}]}}"#
        );
        new_events(&body).map(|made| match &made[0].kind {
            EventKind::Action(action) => action.outcome.values[0],
            other => panic!("{other:?}"),
        })
    };
    assert_eq!([watched("1.5").unwrap(), watched("2").unwrap()], [1.5, 2.0]);
    assert_eq!([watched("1e15").unwrap(), watched("-0.1").unwrap()], [2.0, 0.0]);
    let beyond_32_bits = r#"{"actions": [{"request": 7, "item": 1, "values": {"watched": 1e39}}]}"#;
    serde_json::from_str::<EventsRequest>(beyond_32_bits).unwrap_err();
    let aged = |age: &str| {
        new_events(&format!(r#"{{"users": [{{"id": 1, "features": {{"age": {age}}}}}]}}"#))
    };
    aged("120").unwrap();
    let why = aged("1e39").unwrap_err().to_string();
    assert!(why.contains("users[0]") && why.contains("32 bits"), "{why}");
    let why = aged("121").unwrap_err().to_string();
    assert!(why.contains("users[0]") && why.contains("send 0 to 120"), "{why}");
    let text = metrics.render(None);
    for count in [r#"{name="watched",outcome="clipped"} 2"#, r#"{name="age",outcome="refused"} 1"#]
    {
        assert!(text.contains(&format!("hypercast_beyond_range_total{count}")), "{text}");
    }
}

#[test]
fn a_feature_of_several_values_takes_a_list() {
    let mut schema = Schema::clone(&converter().schema);
    schema.item_features[0] = Feature::tags("tag", 3);
    schema.context_features = vec![Feature::tags("device", 2)];
    let metrics = Metrics::default();
    let converter = Converter::new(Arc::new(schema)).counting_in(&metrics);
    let tagged = |tags: &str| {
        let body = format!(r#"{{"items": [{{"id": 1, "features": {{"tag": {tags}}}}}]}}"#);
        let body = serde_json::from_str(&body).map_err(|error| error.to_string())?;
        let made = converter.new_events(&body, 1000).map_err(|refusal| refusal.to_string())?;
        let EventKind::Item(item) = &made[0].kind else { panic!("{made:?}") };
        Ok::<_, String>(item.ids.clone())
    };
    let drama = category_id("drama");
    let lists = [
        (r#"["drama", 7, "7", "drama"]"#, [drama, 7, 0]),
        (r#"[5, null, "", 6]"#, [5, 6, 0]),
        ("[]", [0; 3]),
        ("[1, 2, 3, 4]", [1, 2, 3]),
        ("[18446744073709551615]", [u64::MAX - 1, 0, 0]),
    ];
    for (tags, expected) in lists {
        assert_eq!(tagged(tags).unwrap(), expected, "{tags}");
    }
    let count = r#"hypercast_beyond_range_total{name="tag",outcome="cut"} 1"#;
    assert!(metrics.render(None).contains(count));
    for (tags, reason) in [
        (r#""drama""#, r#"feature "tag" is "drama"; it takes a list of ids or texts"#),
        ("[1.5]", r#"feature "tag" is 1.5; it takes ids or texts in its list"#),
        (
            "[[1]]",
            "invalid type: sequence, expected a number, a text or null in the list of a feature",
        ),
        ("[true]", "expected a number, a text or null in the list of a feature"),
        (&format!("[{}1]", "1, ".repeat(1024)), "the list of a feature has more than 1024 values"),
    ] {
        let why = tagged(tags).unwrap_err();
        assert!(why.contains(reason), "{tags}: {why}");
    }
    let why = new_events(r#"{"items": [{"id": 3, "features": {"tag": ["drama"]}}]}"#);
    let why = why.unwrap_err().to_string();
    assert!(why.contains(r#"items[0]: feature "tag" is a list of 1; it takes an id or a text"#));
    let context = BTreeMap::from([(
        "device".to_owned(),
        FeatureValue::List(vec![FeatureValue::Id(4), FeatureValue::Id(9)]),
    )]);
    let columns = converter.context_of(&context, ReadFor::Learning).unwrap();
    assert_eq!((&columns.ids[..], converter.named(&columns)), (&[4, 9][..], context));
}

#[test]
fn what_is_null_or_absent_is_missing() {
    let mut schema = Schema::clone(&converter().schema);
    let device = Feature::new("device", FeatureKind::Categorical);
    let battery = Feature::new("battery", FeatureKind::Dense);
    schema.context_features = vec![Feature { optional: true, ..battery }, device];
    let made = |optional: bool, body: &str| {
        let mut schema = schema.clone();
        schema.item_features[0].optional = optional;
        schema.user_features[0].optional = optional;
        let body = serde_json::from_str(body).unwrap();
        let made = Converter::new(Arc::new(schema)).new_events(&body, 1000);
        made.map(|mut made| made.remove(0).kind)
    };
    for age in ["", r#""age": null"#] {
        let body = format!(r#"{{"users": [{{"id": 1, "features": {{{age}}}}}]}}"#);
        let EventKind::User(user) = made(true, &body).unwrap() else { panic!("{body}") };
        assert!(user.dense[0].is_nan());
        let why = made(false, &body).unwrap_err().to_string();
        assert!(why.contains(r#"users[0]: feature "age" is missing"#), "{why}");
        assert!(why.contains("`optional = true`"), "{why}");
        let body = body.replace("users", "items").replace("age", "tag");
        let EventKind::Item(item) = made(true, &body).unwrap() else { panic!("{body}") };
        assert_eq!(item.ids, [0]);
        made(false, &body).unwrap_err();
    }
    let shown = |context: &str| {
        let body = format!(
            r#"{{"impressions": [{{"user": 1, "item": 1, "surface": "feed", "time_ms": 5{context}}}]}}"#
        );
        made(false, &body).map(|made| match made {
            EventKind::Impression(shown) => shown.context,
            other => panic!("{other:?}"),
        })
    };
    for context in ["", r#", "context": {"battery": null, "device": null}"#] {
        let context = shown(context).unwrap();
        assert!(context.dense[0].is_nan() && context.ids == [0], "{context:?}");
        // What is sent again is missing there, too.
        let converter = Converter::new(Arc::new(schema.clone()));
        let text = serde_json::to_string(&converter.named(&context)).unwrap();
        assert_eq!(text, r#"{"battery":null,"device":0}"#);
        let again =
            converter.context_of(&serde_json::from_str(&text).unwrap(), ReadFor::Learning).unwrap();
        assert!(again.dense[0].is_nan() && again.ids == [0], "{again:?}");
    }
    let why = shown(r#", "context": {"battery": "NaN"}"#).unwrap_err().to_string();
    assert!(why.contains("it takes a number"), "{why}");
}

#[test]
fn what_only_training_knows_is_taken_of_events_and_ignored_in_requests() {
    let mut schema = Schema::clone(&converter().schema);
    let own = |name, kind| Feature { training_only: true, ..Feature::new(name, kind) };
    schema.context_features = vec![
        own("position", FeatureKind::Dense),
        Feature::new("device", FeatureKind::Categorical),
        own("slot", FeatureKind::Categorical),
    ];
    let converter = Converter::new(Arc::new(schema));
    let shown = r#"{"impressions": [{"user": 1, "item": 1, "surface": "feed", "time_ms": 5,
            "context": {"position": 3, "slot": 7}}]}"#;
    let made = converter.new_events(&serde_json::from_str(shown).unwrap(), 1000).unwrap();
    let EventKind::Impression(shown) = &made[0].kind else { panic!("{made:?}") };
    assert_eq!((&*shown.context.dense, &*shown.context.ids), (&[3.0][..], &[0, 7][..]));
    // Nobody looks at what is sent, not even whether it is a number.
    let body = r#"{"user": 1, "surface": "feed", "context": {"position": "top", "device": 4},
            "candidates": [{"id": 1}, {"id": 2, "features": {"slot": 7, "device": 5}}]}"#;
    let request: RankRequest = serde_json::from_str(body).unwrap();
    let input = converter.request(&request, 9, 5, |_| None).unwrap();
    for (candidate, device) in input.candidates.iter().zip([4, 5]) {
        let ContextFeatures { ids, dense } = &*candidate.context;
        assert!(dense[0].is_nan() && *ids == [device, 0], "{candidate:?}");
    }
    assert_eq!(converter.ignored_features(&request), ["position", "slot"]);
    let without =
        RankRequest { context: Default::default(), candidates: Default::default(), ..request };
    assert!(converter.ignored_features(&without).is_empty());
}

#[test]
fn ids_have_the_form_that_the_schema_declares() {
    let mut schema = Schema::clone(&converter().schema);
    schema.ids.items = IdKind::String;
    let converter = Converter::new(Arc::new(schema));
    let new_events = |body: &str| converter.new_events(&serde_json::from_str(body).unwrap(), 1000);
    let shown = |user: &str, item: &str| {
        new_events(&format!(
            r#"{{"impressions": [{{"request": 7, "user": {user}, "item": {item}, "surface": "feed", "time_ms": 5}}]}}"#
        ))
    };
    let made = shown("9", r#""sku-1""#).unwrap();
    let EventKind::Impression(made) = &made[0].kind else { panic!("{made:?}") };
    assert_eq!((made.user, made.item), (9, id_key("sku-1").key));
    for (refused, place, declared) in [
        (shown("9", "1"), "impressions[0]: item: 1 is a number", r#"`ids.items = "string"`"#),
        (
            shown(r#""9""#, r#""sku-1""#),
            r#"impressions[0]: user: "9" is a string"#,
            r#"`ids.users = "integer"`: send a whole number"#,
        ),
        (
            new_events(r#"{"items": [{"id": 3, "features": {"tag": "a"}}]}"#),
            "items[0]: id: 3 is a number",
            "send the id in quotes",
        ),
        (
            new_events(r#"{"actions": [{"request": 7, "item": "b", "user": "u", "time_ms": 5}]}"#),
            "actions[0]: user: \"u\"",
            "integer",
        ),
    ] {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains(place) && why.contains(declared), "{why}");
    }
}

#[test]
fn mistakes_are_said_with_their_place() {
    let refused = |body: &str, place: &str, word: &str| {
        let why = new_events(body).unwrap_err().to_string();
        assert!(why.contains(place) && why.contains(word), "{why}");
    };
    let late = r#"{"actions": [{"request": 7, "item": 1, "time_ms": 5},{"request": 7, "item": 1, "time_ms": 1001}]}"#;
    refused(late, "actions[1]", "max_future_s");
    refused(r#"{"actions": [{"request": 0, "item": 1, "time_ms": 5}]}"#, "actions[0]", "request");
    refused(r#"{"clock_ms": 2000}"#, "clock_ms", "max_future_s");
    refused(r#"{"clock_ms": -9223372036854775808}"#, "clock_ms", "out of range");
    refused(r#"{"clock_ms": 1650844800}"#, "clock_ms", "looks like seconds");
    refused(r#"{"clock_ms": 1650844800000000}"#, "clock_ms", "looks like microseconds");
    let never = r#"{"events": [{"user": 1, "item": 1, "surface": "feed", "time_ms": 5, "outcome_ms": -9223372036854775808}]}"#;
    refused(never, "events[0]", "out of range");
    refused(r#"{"items": [{"id": 1, "features": {}}]}"#, "items[0]", "tag");
    refused(r#"{"users": [{"id": 1, "features": {"age": 3, "size": 4}}]}"#, "users[0]", "size");
    let bought = r#"{"events": [{"user": 1, "item": 1, "surface": "feed", "time_ms": 5, "actions": {"bought": true}}]}"#;
    refused(bought, "events[0]", "bought");
    assert!(check_request(Some(MOST_ID)).is_err() && check_request(Some(5)).is_ok());
}
