//! What a surface adds to its own part of a schema, and what the FM is shown of it.

use std::path::Path;

use hypercast_fm::example::{MAX_VALUES, Outcome};

use super::*;
use crate::dataset::{ContextFeatures, Dataset, Impression};
use crate::features::{CandidateInput, FeatureConfig, FeatureState, RequestInput};
use crate::schema::growth::{RefusedChange, SchemaGrowth};
use crate::schema::{Feature, FeatureKind, fm_spec, spec_growths};
use crate::simulate::{SimulateOptions, simulate};

pub(in crate::schema) fn world(dir: &Path) -> Schema {
    let into = dir.to_owned();
    let options =
        SimulateOptions { into, users: 12, items: 16, requests: 60, surfaces: 2, seed: 7 };
    simulate(&options).unwrap();
    Schema::load(&dir.join("schema.toml")).unwrap()
}

/// One of each kind for the second surface, and counters by keys of the core and of its own.
pub(in crate::schema) fn grown(old: &Schema) -> Schema {
    let mut new = old.clone();
    let surface = new.surfaces[1].clone();
    new.actions.push("cart".into());
    new.values.push("basket".into());
    let own = |label: &str, kind| Task {
        surfaces: vec![surface.clone()],
        ..Task::of_label(label, TaskRole::Auxiliary, kind)
    };
    new.tasks.extend([own("cart", TaskKind::Binary), own("basket", TaskKind::Regression)]);
    let words = Feature::new("words", FeatureKind::Dense);
    let words = Feature { optional: true, ..words };
    new.context_features.extend([words, Feature::new("intent", FeatureKind::Categorical)]);
    let counter = |name: &str, key: &str, action: &str| Counter {
        name: name.into(),
        key: vec![key.into()],
        action: action.into(),
        half_life_days: 0.0,
    };
    new.counters.extend([
        counter("user_cart", "user_id", "cart"),
        counter("user_own_click", "user_id", "click"),
        counter("intent_click", "intent", "click"),
    ]);
    let names = |all: &[&str]| all.iter().map(|name| name.to_string()).collect();
    let entries = OwnedEntries {
        actions: names(&["cart"]),
        values: names(&["basket"]),
        tasks: names(&["cart", "basket"]),
        context_features: names(&["words", "intent"]),
        counters: names(&["user_cart", "user_own_click", "intent_click"]),
    };
    new.owned.insert(surface, entries);
    new
}

fn applied(dir: &Path, new: &Schema) -> Schema {
    SchemaGrowth::apply(dir, new).unwrap();
    Schema::load(&dir.join("schema.toml")).unwrap()
}

#[test]
fn what_belongs_to_a_surface_leaves_the_fm_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let old = world(dir.path());
    assert!(!toml::to_string(&old).unwrap().contains("owned"), "as it was written before");
    let growth = SchemaGrowth::between(&old, &grown(&old)).unwrap();
    let owners: Vec<_> = growth.appended.iter().map(|entry| entry.owner.clone()).collect();
    assert_eq!((owners.len(), &owners[0]), (9, &Some(old.surfaces[1].clone())));
    let new = applied(dir.path(), &grown(&old));
    let spec = fm_spec(&old).unwrap();
    assert_eq!(fm_spec(&new).unwrap(), spec);
    let growths = spec_growths(&new).unwrap();
    assert!(growths.iter().all(|growth| growth.from == spec && growth.to == spec));
    assert_eq!(new.core().layout(), old.layout());
    let seen = new.seen_on(Some(&old.surfaces[1]));
    assert_eq!(seen.layout(), new.layout(), "it sees all");
    assert_eq!(new.seen_on(Some(&old.surfaces[0])).layout(), old.layout());

    // What the core gains later has places behind those of the surface's.
    let mut third = new.clone();
    third.actions.push("report".into());
    third.context_features.push(Feature::new("late", FeatureKind::Dense));
    let third = applied(dir.path(), &third);
    let later = fm_spec(&third).unwrap();
    assert_eq!((later.actions, later.features), (spec.actions + 2, spec.features + 1));
    let froms: Vec<_> = spec_growths(&third).unwrap().into_iter().map(|own| own.from).collect();
    assert_eq!(froms, [later, spec.clone(), spec]);
}

/// A feature state that takes the outcomes of `dataset`, each after `own` was added to it.
fn state(dataset: &Dataset, own: impl Fn(&mut Impression)) -> FeatureState {
    let config = FeatureConfig { prior_strength: 2.0, ..FeatureConfig::default() };
    let mut state = FeatureState::new(dataset, config);
    for impression in dataset.impressions().unwrap() {
        let mut impression = impression.unwrap();
        own(&mut impression);
        state.apply(&impression);
    }
    state
}

fn request(surface: u16, context: ContextFeatures) -> RequestInput {
    let context = Arc::new(context);
    let outcome = Outcome { actions: !0, known: !0, values: [0.5; MAX_VALUES] };
    let candidate = |item| CandidateInput {
        item,
        features: None,
        context: context.clone(),
        outcome,
        truth: Vec::new(),
    };
    let candidates = (1..9).map(candidate).collect();
    let (request, user, time_ms) = (1, 3, 1_800_000_000_000);
    RequestInput { request, user, user_features: None, surface, time_ms, candidates }
}

#[test]
fn the_fm_is_shown_what_it_was_shown_before_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let old = world(dir.path());
    let before = state(&Dataset::open(dir.path()).unwrap(), |_| ());
    let new = applied(dir.path(), &grown(&old));
    let dataset = Dataset::open(dir.path()).unwrap();
    let (cart, basket) = (new.action("cart").unwrap(), new.value("basket").unwrap());
    let after = state(&dataset, |impression| {
        impression.outcome.known |= 1 << cart;
        impression.outcome.actions |= (impression.item % 2) << cart;
        impression.outcome.values[basket] = 3.0;
        *impression.context.ids.last_mut().unwrap() = 1 + impression.item % 2;
        *impression.context.dense.last_mut().unwrap() = 0.5;
    });
    let core = CoreColumns::new(&new);
    let places = new.feature_columns();
    for surface in [0, 1] {
        let plain = before.fetch(&request(surface, ContextFeatures::default()), 50);
        let sent = ContextFeatures { ids: vec![0, 2], dense: vec![f32::NAN, 4.0] };
        let whole = after.fetch(&request(surface, sent), 50);
        let mut expected = plain.clone();
        for Target { outcome, .. } in &mut expected.targets {
            outcome.actions &= !(1 << cart);
            outcome.known &= !(1 << cart);
            outcome.values[basket] = f32::NAN;
        }
        assert_eq!(format!("{:?}", core.example(&whole)), format!("{expected:?}"));

        let column = |name: &str| {
            let at = places.iter().position(|column| column == name).unwrap();
            whole.targets.iter().map(|target| target.features[at]).collect::<Vec<_>>()
        };
        assert!(whole.history.iter().any(|event| event.outcome.known >> cart & 1 == 1));
        assert!(column("words").iter().all(|&words| words == 4.0));
        assert!(column("user_cart_count").iter().all(|&count| count > 0.0));
        // Of what was shown on the other surface, its intent is not known.
        let own = |own: &Impression| own.surface == 1 && own.item % 2 == 1;
        let shown = dataset.impressions().unwrap().filter(|row| own(row.as_ref().unwrap()));
        let counted = (shown.count() as f32).ln_1p();
        assert!(column("intent_click_count").iter().all(|&count| count == counted));
    }
    // A row of no layout is left for the model to refuse.
    let mut odd = after.fetch(&request(0, ContextFeatures::default()), 5);
    odd.targets[0].features.pop();
    let (shown, whole) = (&core.example(&odd).targets[0], &odd.targets[0]);
    assert_eq!((shown.ids.len(), shown.features.len()), (whole.ids.len(), whole.features.len()));
}

#[test]
fn contradictions_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = grown(&world(dir.path()));
    good.validate().unwrap();
    let [first, second] = [0, 1].map(|at| good.surfaces[at].clone());
    let refused = |change: &dyn Fn(&mut Schema, &mut OwnedEntries)| {
        let mut schema = good.clone();
        let mut entries = schema.owned.remove(&second).unwrap();
        change(&mut schema, &mut entries);
        schema.owned.insert(second.clone(), entries);
        schema.validate().unwrap_err().to_string()
    };
    let why = refused(&|_, own| _ = own.actions.insert("buy".into()));
    assert!(why.contains("no action is called `buy`; append it"), "{why}");
    let why = refused(&|schema, own| _ = schema.owned.insert("home".into(), own.clone()));
    assert!(why.contains("owned.home: no surface has this name"), "{why}");
    let why = refused(&|schema, own| {
        let actions = own.actions.clone();
        let other = OwnedEntries { actions, ..OwnedEntries::default() };
        schema.owned.insert(first.clone(), other);
    });
    assert!(why.contains(&format!("action `cart` belongs to `{first}`, too")), "{why}");
    let why = refused(&|_, own| _ = own.counters.remove("intent_click"));
    assert!(why.contains("counter `intent_click` reads context feature `intent`"), "{why}");
    let why = refused(&|_, own| _ = own.counters.remove("user_cart"));
    assert!(why.contains("counter `user_cart` reads action `cart`, which belongs"), "{why}");
    let why = refused(&|_, own| _ = own.tasks.remove("basket"));
    assert!(why.contains("task `basket` reads value `basket`, which belongs"), "{why}");
    let why = refused(&|schema, _| schema.tasks.last_mut().unwrap().surfaces.clear());
    let form = format!("give it `role = \"auxiliary\"` and `surfaces = [\"{second}\"]`");
    assert!(why.contains(&form), "{why}");
    let unknown = format!("[owned.{second}]\nitem_features = [\"topic\"]");
    let text = toml::to_string(&world(tempfile::tempdir().unwrap().path())).unwrap();
    let why = toml::from_str::<Schema>(&format!("{text}\n{unknown}")).unwrap_err().to_string();
    assert!(why.contains("item_features") && why.contains("context_features"), "{why}");
}

#[test]
fn what_belongs_to_a_surface_or_to_all_stays_so() {
    let dir = tempfile::tempdir().unwrap();
    let old = grown(&world(dir.path()));
    let refused = |change: &dyn Fn(&mut OwnedEntries)| {
        let mut new = old.clone();
        change(new.owned.get_mut(&old.surfaces[1]).unwrap());
        let refused = SchemaGrowth::between(&old, &new).unwrap_err();
        refused.iter().map(RefusedChange::to_string).collect::<Vec<_>>().join("\n")
    };
    let given = refused(&|own| _ = own.actions.remove("cart"));
    let whose = format!("action `cart` belonged to surface `{}`, and now to all", old.surfaces[1]);
    assert!(given.contains(&whose), "{given}");
    let taken = refused(&|own| _ = own.tasks.insert("click".into()));
    assert!(taken.contains("task `click` belonged to all, and now to surface"), "{taken}");
}
