//! Tests of the layers of the paper's section 3.2: shapes, parameter names, and error messages that
//! name the layer.

use hypercast_sdk::raw::types::Value;
use hypercast_sdk::{
    Cross, Description, ExpertFusion, FmEmbedding, FmFusion, Graph, HostInfo, Initialiser, Linear,
    PerSurface, RmsNorm, SchemaTask, TaskHeads, TaskKind, Trees,
};

fn info(surfaces: &[&str]) -> HostInfo {
    let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    let task = |name: &str| SchemaTask {
        name: name.into(),
        kind: TaskKind::Binary,
        label: name.into(),
        surfaces: Vec::new(),
    };
    HostInfo {
        tae_dim: 48,
        surfaces: names(surfaces),
        actions: names(&["click", "like"]),
        values: Vec::new(),
        tasks: vec![task("click"), task("like")],
        features: names(&["click_rate", "click_count"]),
        ids: names(&["item_id", "surface"]),
        history_ids: names(&["item_id"]),
        ..HostInfo::default()
    }
}

fn graph(info: &HostInfo) -> Graph {
    Graph::new(info.clone(), &Description::new("test", "1.0.0").all_tasks(info).history_len(16))
}

fn names(g: Graph) -> Vec<String> {
    let finished = g.finish().expect("the network is valid");
    finished.network.parameters.into_iter().map(|p| p.name).collect()
}

fn error_of(build: impl FnOnce(&Graph)) -> String {
    let g = graph(&info(&["feed", "reels"]));
    build(&g);
    g.finish().err().expect("the graph has a mistake")
}

#[test]
fn shapes_follow_the_widths() {
    let g = graph(&info(&["feed"]));
    let fm = FmEmbedding::new("fm", 12).rms().gated().noise(0.1).apply(g.tae());
    assert_eq!(fm.values.shape().to_string(), "[rows, 12]");
    assert_eq!(fm.present.shape().to_string(), "[rows, 1]");
    assert_eq!(fm.normalised.shape(), g.tae().shape());
    let short = g.history_actions().pool_mean();
    assert_eq!(FmFusion::new("with", 10).apply(fm, Some(short)).shape().to_string(), "[rows, 10]");
    assert_eq!(FmFusion::new("alone", 10).apply(fm, None).shape().to_string(), "[rows, 10]");
    let x = g.tae();
    assert_eq!(Cross::new("full", 3).apply(x).shape(), x.shape());
    assert_eq!(Cross::new("low", 3).rank(4).apply(x).shape(), x.shape());
    assert_eq!(RmsNorm::new("rms").apply(x).shape(), x.shape());
    assert_eq!(ExpertFusion::mlp("deep", [8, 4]).apply(x).shape().to_string(), "[rows, 4]");
    let parallel = ExpertFusion::cross("both", [8, 4], Cross::new("cross", 1));
    assert_eq!(parallel.apply(x).shape().to_string(), "[rows, 8]");
}

#[test]
fn a_layer_applied_twice_shares_its_parameters() {
    let g = graph(&info(&["feed"]));
    let (cross, fm) = (Cross::new("cross", 2).rank(4), FmEmbedding::new("fm", 8));
    let twice = cross.apply(g.tae()) + cross.apply(g.tae() * 2.0);
    let narrow = fm.apply(g.tae()).values + fm.apply(g.tae() * 2.0).values;
    TaskHeads::new("heads").apply(&g, g.concat(&[twice, narrow]));
    let names = names(g);
    let of = |layer: &str| names.iter().filter(|n| n.starts_with(layer)).count();
    assert_eq!((of("cross/"), of("fm/")), (6, 5), "{names:?}");
}

#[test]
fn each_task_has_parameters_under_its_own_name() {
    let g = graph(&info(&["feed", "reels"]));
    TaskHeads::new("heads").direct(g.features(&["click_rate"])).apply(&g, g.tae());
    let names = names(g);
    for task in ["click", "like"] {
        let own: Vec<_> = names
            .iter()
            .filter_map(|name| name.strip_prefix(&format!("heads/{task}/")))
            .filter(|name| !name.starts_with("tower/norm/"))
            .collect();
        assert_eq!(
            own,
            [
                "tower/linear_1/weight",
                "tower/linear_1/bias",
                "out/weight",
                "bias",
                "direct/weight",
                "surface/scale",
                "surface/bias",
            ]
        );
    }
}

#[test]
fn heads_can_be_linear_and_the_same_for_all_surfaces() {
    let g = graph(&info(&["feed", "reels"]));
    TaskHeads::new("heads").tower([]).one_for_all_surfaces().apply(&g, g.tae());
    assert_eq!(
        names(g),
        ["heads/click/out/weight", "heads/click/bias", "heads/like/out/weight", "heads/like/bias"]
    );
}

#[test]
fn last_layers_start_at_or_near_zero() {
    let g = graph(&info(&["feed", "reels"]));
    TaskHeads::new("heads").direct(g.features(&["click_rate"])).apply(&g, g.tae());
    for parameter in g.finish().expect("valid").network.parameters {
        let start = parameter.init;
        match parameter.name.rsplit_once('/').expect("a layer and a name") {
            (layer, "weight") if layer.ends_with("out") => {
                assert!(matches!(start, Initialiser::Normal(deviation) if deviation < 0.05))
            }
            (layer, "weight") if layer.ends_with("direct") => {
                assert!(matches!(start, Initialiser::Zeros))
            }
            (_, "bias") => assert!(matches!(start, Initialiser::Zeros)),
            (_, "scale") => assert!(matches!(start, Initialiser::Ones)),
            (_, _) => assert!(matches!(start, Initialiser::XavierUniform)),
        }
    }
}

#[test]
fn a_schema_without_surfaces_has_no_calibration() {
    let mut nowhere = info(&[]);
    for _ in 0..2 {
        let g = graph(&nowhere);
        let x = g.feature("click_rate");
        PerSurface::new("surface").apply(x);
        let layers = Linear::new("head", 1);
        g.output("click", layers.apply(x));
        g.output("like", layers.apply(x));
        assert_eq!(names(g), ["head/weight", "head/bias"]);
        // The second time: a schema with surfaces but without the `surface` id.
        nowhere = HostInfo { ids: vec!["item_id".into()], ..info(&["feed", "reels"]) };
    }
}

#[test]
fn mistakes_name_the_layer() {
    let error = error_of(|g| {
        FmEmbedding::new("fm", 8).row_dropout(1.0).apply(g.tae());
    });
    assert!(error.starts_with("fm: Dropout at rate 1"), "{error}");
    let error = error_of(|g| {
        FmEmbedding::new("fm", 0).apply(g.tae());
    });
    assert!(error.starts_with("fm/bottleneck: parameter `fm/bottleneck/weight`"), "{error}");
    let error = error_of(|g| {
        let fm = FmEmbedding::new("fm", 8).apply(g.tae());
        FmFusion::new("fusion", 8).apply(fm, Some(g.history_age()));
    });
    assert!(error.starts_with("fusion: "), "{error}");
    assert!(error.contains("[history, 8]"), "{error}");
    let error = error_of(|g| {
        Cross::new("cross", 2).rank(0).apply(g.tae());
    });
    assert!(error.starts_with("cross/layer_1/down: parameter"), "{error}");
    let error = error_of(|g| {
        let fusion = ExpertFusion::cross("expert", [8], Cross::new("cross", 2));
        fusion.apply(g.id("item_id"));
    });
    assert!(error.starts_with("expert/deep/linear_1: MatMul of ids"), "{error}");
    let error = error_of(|g| {
        TaskHeads::new("heads").direct(g.history_age()).apply(g, g.tae());
    });
    assert!(error.starts_with("heads/click: Add of [rows, 1] with [history, 1]"), "{error}");
}

/// The file of a tree that asks whether what it `reads` is above 0.5, and how many `kinds` of parts
/// it says that it has.
fn stump(kinds: f32, reads: f32) -> Vec<u8> {
    let file = [kinds, 1.0, 0.0, 1.0, reads, 0.5, 1.0, 0.0];
    file.iter().flat_map(|value: &f32| value.to_le_bytes()).collect()
}

#[test]
fn what_trees_compare_never_learns() {
    let g = graph(&info(&["feed", "reels"]));
    let leaves = Trees::new("trees", &stump(1.0, -2.0)).apply(g.tae());
    assert_eq!(leaves.shape().to_string(), "[rows, 2]");
    g.tasks()
        .iter()
        .for_each(|task| g.output(&task.name, Linear::new(&task.name, 1).apply(leaves)));
    let parameters = g.finish().unwrap().network.parameters;
    let frozen: Vec<_> = parameters
        .iter()
        .filter(|own| own.options.iter().any(|option| option.name == "rate_factor"))
        .map(|own| own.name.as_str())
        .collect();
    assert_eq!(frozen, ["trees/selection", "trees/thresholds", "trees/wanted"]);
    // It reads the negative of feature 1.
    let Value::Numbers(selection) = &parameters[0].options[0].value else { panic!("values") };
    assert!(selection.iter().enumerate().all(|(at, own)| *own == if at == 1 { -1.0 } else { 0.0 }));
}

#[test]
fn files_that_are_no_trees_are_refused() {
    let whole = stump(1.0, 1.0);
    for file in [&whole[..whole.len() - 4], &whole[..5], &[], &stump(2.0, 1.0), &stump(0.0, 1.0)] {
        let error = error_of(|g| {
            Trees::new("trees", file).apply(g.tae());
        });
        assert!(error.contains("trees: its file is no ensemble of trees"), "{error}");
    }
    let error = error_of(|g| {
        Trees::new("trees", &stump(1.0, 49.0)).apply(g.tae());
    });
    assert!(error.contains("beyond the 48 given"), "{error}");
}
