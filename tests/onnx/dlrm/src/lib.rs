//! `dlrm`: the expert of surface `feed`, made from `dlrm.onnx` by `cargo hypercast
//! from-onnx`. From here on it is code like any other: change its rules, or its network.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request, TaskKind};

/// The surface that this expert serves.
const SURFACE: &str = "feed";

/// The model as an expert, with the rules of its surface.
pub struct Dlrm;

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

impl Expert for Dlrm {
    fn describe(_: &HostInfo) -> Description {
        Description::new("dlrm", env!("CARGO_PKG_VERSION"))
            .surfaces([SURFACE])
            .task("click", TaskKind::Binary)
    }

    // Features are read as they are, and outputs are the model's own: the host adds no base rate.
    fn network(g: &Graph) {
        let dense = g.raw_features(&["length", "battery", "price"]);
        let bottom_bottom_0_gemm = dense.matmul(parameter!(g, "bottom.0.weight", [3, 8]))
            + parameter!(g, "bottom.0.bias", [8]);
        let bottom_bottom_1_relu = bottom_bottom_0_gemm.relu();
        let bottom_bottom_2_gemm =
            bottom_bottom_1_relu.matmul(parameter!(g, "bottom.2.weight", [8, 4]))
                + parameter!(g, "bottom.2.bias", [4]);
        let bottom_bottom_3_relu = bottom_bottom_2_gemm.relu();
        let tables_0_gather = parameter!(g, "tables.0.weight", [40, 4]).gather(g.id("item_id"));
        let tables_1_gather = parameter!(g, "tables.1.weight", [12, 4]).gather(g.id("topic"));
        let tables_2_gather = parameter!(g, "tables.2.weight", [7, 4]).gather(g.id("device"));
        let concat = g.concat(&[
            bottom_bottom_3_relu,
            tables_0_gather,
            tables_1_gather,
            tables_2_gather,
        ]);
        let matmul = (concat.reshape(&[4, 1, 4]) * concat.reshape(&[1, 4, 4])).sum();
        let flatten = matmul.reshape(&[16]);
        let gather_2 = g.concat(&[
            flatten.slice(4, 5),
            flatten.slice(8, 10),
            flatten.slice(12, 15),
        ]);
        let concat_3 = g.concat(&[bottom_bottom_3_relu, gather_2]);
        let top_top_0_gemm = concat_3.matmul(parameter!(g, "top.0.weight", [10, 8]))
            + parameter!(g, "top.0.bias", [8]);
        let top_top_1_relu = top_top_0_gemm.relu();
        let top_top_2_gemm = top_top_1_relu.matmul(parameter!(g, "top.2.weight", [8, 1]))
            + parameter!(g, "top.2.bias", [1]);
        g.whole_output("click", top_top_2_gemm);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(&request.weighted_sum(value)))
    }
}

/// The value model: the worth of one unit of each prediction to this surface.
fn value(task: &str) -> f32 {
    match task {
        "click" => 1.0,
        _ => 0.0,
    }
}

hypercast_sdk::export!(Dlrm);
