//! `dcn`: the expert of surface `feed`, made from `dcn.onnx` by `cargo hypercast
//! from-onnx`. From here on it is code like any other: change its rules, or its network.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request, TaskKind};

/// The surface that this expert serves.
const SURFACE: &str = "feed";

/// The model as an expert, with the rules of its surface.
pub struct Dcn;

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

impl Expert for Dcn {
    fn describe(_: &HostInfo) -> Description {
        Description::new("dcn", env!("CARGO_PKG_VERSION"))
            .surfaces([SURFACE])
            .task("click", TaskKind::Binary)
            .task("watch", TaskKind::Regression)
    }

    // Features are read as they are, and outputs are the model's own: the host adds no base rate.
    fn network(g: &Graph) {
        let dense = g.raw_features(&["length", "battery"]);
        let getitem = dense * parameter!(g, "norm.weight", [2]) + parameter!(g, "norm.bias", [2]);
        let embedding = g.concat(&[
            parameter!(g, "embedding.weight.topic", [20, 3]).gather(g.id("topic")),
            parameter!(g, "embedding.weight.device", [5, 3]).gather(g.id("device")),
        ]);
        let cat = g.concat(&[getitem, embedding]);
        let linear = cat.matmul(parameter!(g, "cross.0.weight", [8, 8]))
            + parameter!(g, "cross.0.bias", [8]);
        let mul_5 = cat * linear;
        let add_1 = mul_5 + cat;
        let linear_1 = add_1.matmul(parameter!(g, "cross.1.weight", [8, 8]))
            + parameter!(g, "cross.1.bias", [8]);
        let mul_6 = cat * linear_1;
        let add_2 = mul_6 + add_1;
        let linear_2 =
            cat.matmul(parameter!(g, "deep.0.weight", [8, 8])) + parameter!(g, "deep.0.bias", [8]);
        let layer_norm = linear_2.layer_normalization_with(
            parameter!(g, "deep.1.weight", [8]),
            parameter!(g, "deep.1.bias", [8]),
            1e-5,
        );
        let gelu = layer_norm.gelu();
        let linear_3 =
            gelu.matmul(parameter!(g, "deep.4.weight", [8, 6])) + parameter!(g, "deep.4.bias", [6]);
        let leaky_relu = linear_3.relu() - (-linear_3).relu() * 0.01;
        let cat_1 = g.concat(&[add_2, leaky_relu]);
        let linear_4 =
            cat.matmul(parameter!(g, "gate.weight", [8, 2])) + parameter!(g, "gate.bias", [2]);
        let softmax = linear_4.softmax();
        let linear_5 =
            cat_1.matmul(parameter!(g, "click.weight", [14, 1])) + parameter!(g, "click.bias", [1]);
        let slice_2 = softmax.slice(0, 1);
        let click = linear_5 * slice_2;
        let linear_6 =
            cat_1.matmul(parameter!(g, "watch.weight", [14, 1])) + parameter!(g, "watch.bias", [1]);
        let slice_4 = softmax.slice(1, 2);
        let watch = linear_6 + slice_4;
        g.whole_output("click", click);
        g.whole_output("watch", watch);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(&request.weighted_sum(value)))
    }
}

/// The value model: the worth of one unit of each prediction to this surface.
fn value(task: &str) -> f32 {
    match task {
        "click" => 1.0,
        // In the unit of its label: weigh it.
        "watch" => 0.0,
        _ => 0.0,
    }
}

hypercast_sdk::export!(Dcn);
