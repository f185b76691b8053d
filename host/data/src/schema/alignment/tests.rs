//! What the FM's trainer is told and shown of surfaces' alignment modules.

use std::borrow::Cow;
use std::sync::Arc;

use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};
use hypercast_fm::spec::TaskLabel;

use super::*;
use crate::schema::growth::SchemaGrowth;
use crate::schema::owned::tests::{grown, world};
use crate::schema::{CoreColumns, Feature, FeatureKind, SchemaWatch, fm_spec, spec_growths};

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

/// With a module for the second surface that reads of the core and of its own.
fn aligned(schema: &Schema) -> Schema {
    let mut aligned = schema.clone();
    let own = SurfaceAlignment {
        hidden: vec![16, 8],
        features: Some(strings(&["item_age", "words", "user_cart_rate"])),
        ids: strings(&["intent", "topic"]),
        tasks: strings(&["cart", "basket"]),
    };
    aligned.alignment.insert(schema.surfaces[1].clone(), own);
    aligned
}

/// An example whose numbers are their places, and all of whose outcomes are known.
fn example(schema: &Schema, surface: u16) -> Example {
    let outcome = Outcome { actions: !0, known: !0, values: [0.5; MAX_VALUES] };
    let item = Arc::new(Item::default());
    Example {
        request: 1,
        user: Arc::new(User::default()),
        surface,
        time_ms: 0,
        history: vec![Event { item: item.clone(), surface, time_ms: 0, outcome }],
        targets: vec![Target {
            item,
            ids: (0..schema.id_columns().len() as u64).collect(),
            features: (0..schema.feature_columns().len()).map(|at| at as f32).collect(),
            outcome,
            truth: vec![],
        }],
    }
}

#[test]
fn the_trainer_alone_is_told_of_a_module_and_shown_what_it_reads() {
    let dir = tempfile::tempdir().unwrap();
    let old = world(dir.path());
    SchemaGrowth::apply(dir.path(), &grown(&old)).unwrap();
    let path = dir.path().join("schema.toml");
    let before = Schema::load(&path).unwrap();
    let watches = [SchemaWatch::new, SchemaWatch::of_fm_trainer]
        .map(|of| of(path.clone(), Arc::new(before.clone())));
    let have_grown = || watches.each_ref().map(SchemaWatch::has_grown);
    assert!(
        have_grown() == [false, false]
            && trainer_spec(&before).unwrap() == fm_spec(&before).unwrap()
    );
    let growth = SchemaGrowth::apply(dir.path(), &aligned(&before)).unwrap();
    assert_eq!(
        (&growth.realigned, growth.is_layout_same(), growth.is_empty()),
        (&vec![old.surfaces[1].clone()], true, false)
    );
    assert_eq!(have_grown(), [false, true], "the trainer alone takes it over");
    let new = Schema::load(&path).unwrap();
    assert_eq!(new, aligned(&before), "no other layout, which `earlier` would have");
    assert!(SchemaGrowth::between(&new, &new).unwrap().is_empty());

    let (core, spec) = (fm_spec(&old).unwrap(), trainer_spec(&new).unwrap());
    assert_eq!((fm_spec(&new).unwrap(), spec.served()), (core.clone(), core.clone()));
    assert_eq!((new.layout(), new.core().layout()), (before.layout(), old.layout()));
    let cart = spec.tasks.iter().find(|task| task.name == "cart").unwrap();
    let at = new.action("cart").unwrap();
    assert_eq!(
        (cart.label, cart.main, &*cart.surfaces),
        (TaskLabel::Action(at), false, &[false, true][..])
    );
    let growths = trainer_growths(&new).unwrap();
    assert!(growths.iter().all(|growth| growth.from == core && growth.to == spec));
    assert!(spec_growths(&new).unwrap().iter().all(|growth| growth.to == core));

    let [serving, trainer] = [CoreColumns::new(&new), CoreColumns::for_trainer(&new)];
    let other = example(&new, 0);
    let text = |shown: &dyn std::fmt::Debug| format!("{shown:?}");
    let same = text(&trainer.example(&other)) == text(&serving.example(&other));
    assert!(same, "of the other surface");
    let whole = example(&new, 1);
    let (served, shown) = (serving.example(&whole), trainer.example(&whole));
    assert_eq!(text(&shown.history), text(&served.history));
    for columns in [&serving, &trainer] {
        assert_eq!(text(&columns.into_core(whole.clone())), text(&columns.example(&whole)));
    }
    let columns = new.feature_columns();
    let place = |name: &str| columns.iter().position(|column| column == name).unwrap() as f32;
    let (target, of_core) = (&shown.targets[0], &served.targets[0]);
    let own = ["item_age", "words", "user_cart_rate"].map(place);
    assert_eq!(target.features, [&of_core.features[..], &own].concat());
    let fields = new.id_fields();
    let first =
        |name: &str| fields.iter().find(|field| field.name == name).unwrap().columns.start as u64;
    assert_eq!(target.ids, [&of_core.ids[..], &["intent", "topic"].map(first)].concat());
    let known =
        |outcome: &Outcome| (outcome.known >> at & 1, outcome.values[new.value("basket").unwrap()]);
    assert_eq!(known(&target.outcome), (1, 0.5));
    assert!(known(&of_core.outcome).0 == 0 && known(&of_core.outcome).1.is_nan());
    let stripped = &spec.served_example(&shown).targets[0];
    assert_eq!((&stripped.ids, &stripped.features), (&of_core.ids, &of_core.features));
}

#[test]
fn a_module_of_the_core_alone_needs_nothing_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut schema = world(dir.path());
    let surface = schema.surfaces[1].clone();
    let position = Feature::new("position", FeatureKind::Dense);
    schema.context_features.push(Feature { training_only: true, ..position });
    let text = format!("{}\n[alignment.{surface}]\n", toml::to_string(&schema).unwrap());
    let usual: Schema = toml::from_str(&text).unwrap();
    usual.validate().unwrap();
    assert_eq!(usual.alignment[&surface], SurfaceAlignment::default());
    let text = format!("{text}hidden = [64]\nfeatures = [\"battery\", \"position\"]\n");
    let own: Schema = toml::from_str(&text).unwrap();
    own.validate().unwrap();
    let spec = trainer_spec(&own).unwrap();
    let module = spec.alignment(1).unwrap();
    assert_eq!((&*module.hidden, &*module.training_only.numbers), (&[64][..], &[1][..]));
    let whole = example(&own, 1);
    let shown = CoreColumns::for_trainer(&own).example(&whole).into_owned();
    assert_eq!(shown.targets[0].features.len(), whole.targets[0].features.len() + 2);
    assert_eq!(format!("{:?}", spec.served_example(&shown)), format!("{whole:?}"));

    // Nothing belongs to a surface: examples of which nothing more is read are no copies.
    let is_shown_as_it_is = |schema: &Schema, surface| {
        let shown = CoreColumns::for_trainer(schema);
        let whole = example(schema, surface);
        matches!(shown.example(&whole), Cow::Borrowed(_))
    };
    let same = [(&own, 0), (&own, 1), (&usual, 0), (&usual, 1)]
        .map(|(schema, surface)| is_shown_as_it_is(schema, surface));
    assert_eq!(same, [true, false, true, true]);
}

#[test]
fn what_no_module_can_be_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = aligned(&grown(&world(dir.path())));
    good.validate().unwrap();
    let [first, second] = [0, 1].map(|at| good.surfaces[at].clone());
    let refused = |on: &str, change: &dyn Fn(&mut SurfaceAlignment)| {
        let mut schema = good.clone();
        let mut own = schema.alignment.remove(&second).unwrap();
        change(&mut own);
        schema.alignment.insert(on.into(), own);
        schema.validate().unwrap_err().to_string()
    };
    let why = refused("home", &|_| ());
    assert!(why.contains("alignment.home: no surface has this name"), "{why}");
    for hidden in [vec![], vec![0], vec![513], vec![8; 5]] {
        let why = refused(&second, &|own| own.hidden.clone_from(&hidden));
        assert!(why.contains("1 to 4 widths of 1 to 512"), "{why}");
    }
    let why = refused(&second, &|own| own.features = Some(strings(&["wordz"])));
    assert!(why.contains("no numeric column is called `wordz`; there are:"), "{why}");
    let why = refused(&second, &|own| own.ids = strings(&["words"]));
    assert!(why.contains("no categorical feature is called `words`"), "{why}");
    let why = refused(&second, &|own| own.ids = strings(&["topic", "topic"]));
    assert!(why.contains("categorical feature `topic` is named twice"), "{why}");
    let why = refused(&first, &|own| own.tasks.clear());
    let whose = format!("numeric column `words` belongs to surface `{second}`");
    assert!(why.contains(&whose), "{why}");
    let why = refused(&first, &|own| own.features = None);
    let whose = format!("categorical feature `intent` belongs to surface `{second}`");
    assert!(why.contains(&whose), "{why}");
    let plain = |own: &mut SurfaceAlignment| (own.features, own.ids) = (None, vec![]);
    let why = refused(&first, &plain);
    assert!(why.contains(&format!("task `cart` belongs to surface `{second}`")), "{why}");
    let why = refused(&second, &|own| own.tasks = strings(&["click"]));
    assert!(why.contains("task `click` is a main task"), "{why}");
    let why = refused(&second, &|own| own.tasks = strings(&["watch"]));
    assert!(why.contains("task `watch` belongs to all"), "{why}");
    let why = refused(&second, &|own| own.tasks = strings(&["buy"]));
    assert!(why.contains("no task is called `buy`"), "{why}");
    let mut nothing = good.clone();
    nothing.alignment.get_mut(&second).unwrap().tasks.clear();
    nothing.tasks.retain(|task| task.name != "watch");
    let why = nothing.validate().unwrap_err().to_string();
    assert!(why.contains("it has nothing to learn"), "{why}");
}
