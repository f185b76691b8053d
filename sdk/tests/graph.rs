//! The graph builder: shapes, names, and the mistakes it reports.

use std::collections::HashSet;

use hypercast_sdk::raw::types::{Attribute, Network, Value};
use hypercast_sdk::{
    Column, Description, Embedding, Finished, FmEmbedding, FmFusion, Graph, HostInfo, Hstu,
    Initialiser, LayerNorm, Linear, Mlp, OfferedColumn, SchemaTask, Squash, TaskHeads, TaskKind,
};

fn info() -> HostInfo {
    let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
    HostInfo {
        tae_dim: 48,
        surfaces: names(&["feed"]),
        actions: names(&["click", "like", "hide"]),
        values: Vec::new(),
        tasks: vec![SchemaTask {
            name: "click".into(),
            kind: TaskKind::Binary,
            label: "click".into(),
            surfaces: Vec::new(),
        }],
        features: names(&["click_rate", "click_count"]),
        ids: names(&["item_id", "tag", "hour"]),
        history_ids: names(&["item_id", "tag"]),
        ..HostInfo::default()
    }
}

fn graph() -> Graph {
    Graph::new(info(), &Description::new("test", "1.0.0").all_tasks(&info()).history_len(16))
}

fn error_of(build: impl FnOnce(&Graph)) -> String {
    let g = graph();
    build(&g);
    g.finish().err().expect("the graph has a mistake")
}

#[test]
fn shape_error_names_the_layer_and_both_shapes() {
    let error = error_of(|g| {
        g.scope("fusion", || {
            let layer = Linear::new("linear_1", 32);
            layer.apply(g.features(&["click_rate"]));
            // The same weights, on an input of another width.
            layer.apply(g.tae());
        });
    });
    assert!(error.starts_with("fusion/linear_1: MatMul of [rows, 48] with [1, 32]:"), "{error}");
}

#[test]
fn the_first_mistake_is_the_one_reported() {
    let error = error_of(|g| {
        let wrong = g.scope("first", || g.tae() + g.features(&["click_rate", "click_count"]));
        g.scope("second", || wrong.matmul(g.tae()));
    });
    assert!(error.starts_with("first: Add of [rows, 48] with [rows, 2]"), "{error}");
}

#[test]
fn rows_and_history_never_meet_but_by_pooling_or_attention() {
    let error = error_of(|g| {
        let _ = g.tae() + g.history_age();
    });
    assert!(error.contains("Add of [rows, 48] with [history, 1]"), "{error}");
    let g = graph();
    assert_eq!((g.tae() + g.history_age().pool_mean()).shape().to_string(), "[rows, 48]");
}

#[test]
fn a_symbolic_dimension_cannot_become_an_inner_one() {
    let error = error_of(|g| {
        let _ = g.tae() + g.parameter("p", &[2, 1, 1], Initialiser::Zeros);
    });
    assert!(error.contains("[rows, 48] with [2, 1, 1]"), "{error}");
}

#[test]
fn a_parameter_name_is_used_once() {
    let error = error_of(|g| {
        Linear::new("head", 1).apply(g.tae());
        Linear::new("head", 1).apply(g.tae());
    });
    assert!(error.contains("two parameters are called `head/weight`"), "{error}");
}

#[test]
fn an_unknown_column_says_what_there_is() {
    let error = error_of(|g| {
        g.feature("clicks");
    });
    let known = "no feature `clicks` for this expert; it has: click_rate, click_count";
    assert!(error.contains(known), "{error}");
}

#[test]
fn every_task_needs_its_output() {
    assert!(error_of(|_| ()).contains("task `click` has no output"));
    assert!(
        error_of(|g| g.output("click", g.tae()))
            .contains("must have shape [rows, 1], not [rows, 48]")
    );
    assert!(error_of(|g| g.output("share", g.feature("click_rate"))).contains("`share`"));
}

#[test]
fn building_never_panics_on_wrong_shapes() {
    for width in [0, 1, u32::MAX] {
        let error = error_of(|g| {
            let table = Embedding::new("item", width, width);
            let short =
                Hstu::new("short", width).heads(3).layers(2).apply(g, &[("item_id", &table)]);
            let x = Mlp::new("mlp", [width, 0]).apply(g.concat(&[short, g.tae()]));
            let _ = LayerNorm::new("norm")
                .apply(g.id("tag"))
                .softmax()
                .reshape(&[width])
                .transpose(&[1, 0]);
            g.output("click", x.slice(5, 3).sum());
        });
        assert!(!error.is_empty());
    }
}

#[test]
fn all_layers_together_make_a_valid_network() {
    let g = graph();
    let item = Embedding::new("item", 100, 8);
    let short = Hstu::new("short", 16).heads(2).layers(2).apply(&g, &[("item_id", &item)]);
    assert_eq!(short.shape().to_string(), "[rows, 16]");
    let fm = FmEmbedding::new("fm", 12).apply(g.tae());
    let fused = FmFusion::new("fusion", 10).apply(fm, Some(short));
    let numeric = Squash::new("numeric").apply(g.features(&["click_rate", "click_count"]));
    let x = Mlp::new("mlp", [8, 4]).apply(g.concat(&[fused, numeric]));
    g.output("click", Linear::new("head", 1).apply(x));
    let finished = g.finish().expect("the network is valid");

    let names: HashSet<_> = finished.network.parameters.iter().map(|p| &p.name).collect();
    assert_eq!(names.len(), finished.network.parameters.len(), "parameter names are unique");
    for expected in [
        "item/table",
        "short/layer_2/kv/weight",
        "fm/bottleneck/bias",
        "fusion/interaction/linear_1/weight",
    ] {
        assert!(names.contains(&expected.to_string()), "{expected} among {names:?}");
    }
    for (index, node) in finished.network.nodes.iter().enumerate() {
        assert!(
            node.inputs.iter().all(|&i| (i as usize) < index),
            "node {index} reads earlier ones only"
        );
    }
    // tae, item_id, its history, actions, age, two features: each once, though some are read twice.
    assert_eq!(finished.columns.len(), 7);
    let count = |op: &str| finished.network.nodes.iter().filter(|n| n.op == op).count();
    assert_eq!((count("Input"), count("HstuAttention"), count("HstuHistory")), (7, 2, 1));
}

#[test]
fn scalars_broadcast_and_operators_keep_shapes() {
    let g = graph();
    let x = 1.0 - -(g.tae() * 0.5 + 2.0) / g.tae().sigmoid();
    assert_eq!(x.shape().to_string(), "[rows, 48]");
    assert_eq!(
        x.slice(4, 10).reshape(&[2, 3]).transpose(&[0, 2, 1]).shape().to_string(),
        "[rows, 3, 2]"
    );
    assert_eq!(g.concat(&[x.sum(), x.mean(), x.largest()]).shape().to_string(), "[rows, 3]");
    assert_eq!(g.id("tag").to_numbers().shape().to_string(), "[rows, 1]");
}

#[test]
fn a_vector_has_the_width_that_the_host_has() {
    let mut info = info();
    let describe = || Description::new("test", "1.0.0").task("click", TaskKind::Binary);
    let g = Graph::new(info.clone(), &describe());
    g.vector("content");
    let error = g.finish().err().expect("the host has none");
    assert!(error.contains("no vector `content`"), "{error}");
    info.columns.push(OfferedColumn { kind: "vector".into(), name: "content".into(), width: 32 });
    // What a later host offers is left out.
    info.columns.push(OfferedColumn { kind: "cube".into(), name: "content".into(), width: 5 });
    let g = Graph::new(info, &describe());
    let content = g.vector("content");
    assert_eq!(content.shape().to_string(), "[rows, 32]");
    g.output("click", Linear::new("head", 1).apply(content));
    assert_eq!(g.finish().expect("a network").columns, [Column::vector("content")]);
}

#[test]
fn heads_start_at_the_fm_where_it_predicts_the_task() {
    let mut info = info();
    let describe = || {
        let tasks = Description::new("test", "1.0.0").task("click", TaskKind::Binary);
        tasks.task("own", TaskKind::Binary)
    };
    let of_fm = |name: &str| OfferedColumn { kind: "fm-logit".into(), name: name.into(), width: 1 };
    info.columns.extend([of_fm("click"), of_fm("like")]);
    let g = Graph::new(info.clone(), &describe());
    TaskHeads::new("heads").one_for_all_surfaces().from_fm().apply(&g, g.tae());
    let Finished { network, columns } = g.finish().expect("a network");
    assert_eq!(columns, [Column::tae(), Column::fm_logit("click")]);
    let of = |network: &Network, name: &str| {
        let found = network.parameters.iter().find(|own| own.name == name);
        found.map(|own| matches!(own.init, Initialiser::Zeros))
    };
    // Nothing of its own is in the output at first, and it is learned all the same.
    assert_eq!(of(&network, "heads/click/from_fm/share"), Some(true));
    assert_eq!(of(&network, "heads/click/out/weight"), Some(false));
    assert_eq!(of(&network, "heads/own/from_fm/share"), None);
    assert!(network.extra_loss.is_some() && network.outputs[0].options.is_empty());
    let error = |info: HostInfo, task: &str| {
        let g = Graph::new(info, &describe());
        g.fm_logit(task);
        g.finish().err().expect("there is none")
    };
    let unknown = error(info.clone(), "own");
    assert!(unknown.contains("`own`") && unknown.contains("click, like"), "{unknown}");
    let alone = error(HostInfo { tae_dim: 0, ..info }, "click");
    assert!(alone.contains("the host has no FM"), "{alone}");
}

#[test]
fn a_part_of_a_network_learns_at_its_own_rate() {
    let g = graph();
    let frozen = g.rate_factor(0.0, || Linear::new("frozen", 4).apply(g.tae()));
    let slow = g.rate_factor(0.5, || {
        let half = Linear::new("half", 4).apply(frozen);
        g.rate_factor(0.5, || Linear::new("quarter", 4).apply(half))
    });
    g.output("click", Linear::new("head", 1).apply(slow));
    let network = g.finish().expect("a network").network;
    for parameter in &network.parameters {
        let factor = match parameter.options.as_slice() {
            [] => 1.0,
            [Attribute { name, value: Value::Number(factor) }] if name == "rate_factor" => *factor,
            other => panic!("{other:?}"),
        };
        let expected = match parameter.name.split('/').next() {
            Some("frozen") => 0.0,
            Some("half") => 0.5,
            Some("quarter") => 0.25,
            _ => 1.0,
        };
        assert_eq!(factor, expected, "{}", parameter.name);
    }
}

#[test]
fn a_network_from_elsewhere_says_what_it_begins_with_and_what_it_predicts() {
    let g = graph();
    let bytes = [0.5f32, -2.0].map(f32::to_le_bytes).concat();
    let weight = g.parameter_from("weight", &[2, 1], &bytes);
    let numbers = g.raw_features(&["click_rate", "click_count"]);
    g.whole_output("click", numbers.matmul(weight));
    let built = g.finish().expect("a network");
    assert_eq!(built.columns, ["click_rate", "click_count"].map(Column::raw_feature));
    let [Attribute { name, value: Value::Numbers(values) }] =
        &built.network.parameters[0].options[..]
    else {
        panic!("{:?}", built.network.parameters)
    };
    assert_eq!((name.as_str(), &values[..]), ("values", &[0.5, -2.0][..]));
    let [Attribute { name, value: Value::Text(base) }] = &built.network.outputs[0].options[..]
    else {
        panic!("{:?}", built.network.outputs)
    };
    assert_eq!((name.as_str(), base.as_str()), ("base", "none"));
    let error = error_of(|g| _ = g.parameter_from("weight", &[3, 1], &bytes));
    assert!(error.contains("`weight` of shape [3, 1] needs 12 bytes of values, not 8"), "{error}");
}

/// The option `score` of the first output; none without it.
fn score(network: &Network) -> Option<&Value> {
    let options = network.outputs[0].options.iter();
    options.filter(|option| option.name == "score").map(|option| &option.value).next()
}

#[test]
fn heads_score_by_the_output_less_the_users_level_where_the_host_says_what_it_is() {
    let built = |user_activity: &[&str]| {
        let offered = |name: &&str| OfferedColumn {
            kind: "user-activity".into(),
            name: name.to_string(),
            width: 1,
        };
        let info = HostInfo { columns: user_activity.iter().map(offered).collect(), ..info() };
        let g = Graph::new(info.clone(), &Description::new("test", "1.0.0").all_tasks(&info));
        g.extra_loss(g.feature("click_count"));
        TaskHeads::new("heads").ranking_scores().apply(&g, g.tae());
        g.finish().map(|finished| finished.network)
    };
    let level = "heads/click/level/user/weight";
    let names = |network: &Network| -> HashSet<String> {
        network.parameters.iter().map(|parameter| parameter.name.clone()).collect()
    };
    let without = built(&[]).unwrap();
    assert!(score(&without).is_none() && !names(&without).contains(level));
    let with = built(&["click_rate"]).unwrap();
    let Some(Value::Integer(node)) = score(&with) else { panic!("{:?}", with.outputs) };
    let node = &with.nodes[*node as usize];
    assert_eq!((node.op.as_str(), node.inputs[0]), ("Sub", with.outputs[0].node));
    assert!(names(&with).contains(level), "{:?}", names(&with));
    let extra = |network: &Network| {
        let node = network.extra_loss.expect("the plugin has one");
        network.nodes[node as usize].op.clone()
    };
    assert_eq!([extra(&without), extra(&with)], ["Input", "Add"], "both losses count");
    assert!(built(&["unknown"]).unwrap_err().contains("`unknown`"));
}

#[test]
fn a_score_is_one_number_a_row_of_a_task_once() {
    assert!(error_of(|g| g.score("like", g.feature("click_rate"))).contains("score of `like`"));
    assert!(error_of(|g| g.score("click", g.tae())).contains("must be [rows, 1]"));
    let twice = |g: &Graph| (0..2).for_each(|_| g.score("click", g.feature("click_rate")));
    assert!(error_of(twice).contains("two scores of task `click`"));
}
