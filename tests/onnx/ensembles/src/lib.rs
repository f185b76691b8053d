//! `ensembles`: the expert of surface `feed`, made from `ensembles.onnx` by `cargo hypercast
//! from-onnx`. From here on it is code like any other: change its rules, or its network.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request, TaskKind};

/// The surface that this expert serves.
const SURFACE: &str = "feed";

/// The model as an expert, with the rules of its surface.
pub struct Ensembles;

/// A parameter that begins with the model's weights, which are in `weights/` as f32.
macro_rules! parameter {
    ($g:ident, $name:literal, $shape:expr) => {
        $g.parameter_from(
            $name,
            &$shape,
            include_bytes!(concat!("../weights/", $name, ".f32")),
        )
    };
}

impl Expert for Ensembles {
    fn describe(_: &HostInfo) -> Description {
        Description::new("ensembles", env!("CARGO_PKG_VERSION"))
            .surfaces([SURFACE])
            .task("watch", TaskKind::Regression)
            .task("dwell", TaskKind::Regression)
            .task("click", TaskKind::Binary)
            .task("like", TaskKind::Binary)
            .task("hide", TaskKind::Binary)
            .task("share", TaskKind::Binary)
    }

    // Features are read as they are, and outputs are the model's own: the host adds no base rate.
    fn network(g: &Graph) {
        let x = g.raw_features(&["length", "battery", "price", "age"]);
        let values_leaves = hypercast_sdk::Trees::new(
            "values_trees",
            include_bytes!("../weights/values_trees.f32"),
        )
        .apply(x);
        let values = values_leaves.matmul(parameter!(g, "values_trees.leaves", [188, 2]))
            + parameter!(g, "values_trees.base", [2]);
        let first_leaves =
            hypercast_sdk::Trees::new("first_trees", include_bytes!("../weights/first_trees.f32"))
                .apply(x);
        let first = first_leaves.matmul(parameter!(g, "first_trees.leaves", [190, 1]))
            + parameter!(g, "first_trees.base", [1]);
        let second_leaves = hypercast_sdk::Trees::new(
            "second_trees",
            include_bytes!("../weights/second_trees.f32"),
        )
        .apply(x);
        let second = second_leaves.matmul(parameter!(g, "second_trees.leaves", [192, 1]))
            + parameter!(g, "second_trees.base", [1]);
        let both_leaves =
            hypercast_sdk::Trees::new("both_trees", include_bytes!("../weights/both_trees.f32"))
                .apply(x);
        let both = both_leaves.matmul(parameter!(g, "both_trees.leaves", [188, 2]))
            + parameter!(g, "both_trees.base", [2]);
        let values_2 = values.slice(0, 1);
        let values_3 = values.slice(1, 2);
        let both_2 = both.slice(0, 1);
        let both_3 = both.slice(1, 2);
        g.whole_output("watch", values_2);
        g.whole_output("dwell", values_3);
        g.whole_output("click", first);
        g.whole_output("like", second);
        g.whole_output("hide", both_2);
        g.whole_output("share", both_3);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(&request.weighted_sum(value)))
    }
}

/// The value model: the worth of one unit of each prediction to this surface.
fn value(task: &str) -> f32 {
    match task {
        // In the unit of its label: weigh it.
        "watch" => 0.0,
        // In the unit of its label: weigh it.
        "dwell" => 0.0,
        "click" => 1.0,
        "like" => 1.0,
        "hide" => 1.0,
        "share" => 1.0,
        _ => 0.0,
    }
}

hypercast_sdk::export!(Ensembles);
