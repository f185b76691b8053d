//! `mixed`: the expert of surface `feed`, made from `mixed.onnx` by `cargo hypercast
//! from-onnx`. From here on it is code like any other: change its rules, or its network.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request, TaskKind};

/// The surface that this expert serves.
const SURFACE: &str = "feed";

/// The model as an expert, with the rules of its surface.
pub struct Mixed;

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

impl Expert for Mixed {
    fn describe(_: &HostInfo) -> Description {
        Description::new("mixed", env!("CARGO_PKG_VERSION"))
            .surfaces([SURFACE])
            .task("click", TaskKind::Binary)
            .task("buy", TaskKind::Binary)
    }

    // Features are read as they are, and outputs are the model's own: the host adds no base rate.
    fn network(g: &Graph) {
        let x = g.raw_features(&["length", "battery", "price"]);
        let age = g.raw_features(&["age"]);
        let embedding = parameter!(g, "table.weight", [9, 6]).gather(g.id("item_id"));
        let view = embedding.reshape(&[2, 3]);
        let softmax = view.transpose(&[0, 2, 1]).softmax().transpose(&[0, 2, 1]);
        let mul_3 = softmax * view;
        let sum_1 = mul_3.transpose(&[0, 2, 1]).sum().reshape(&[3]);
        let amax = view.transpose(&[0, 2, 1]).largest().reshape(&[3]);
        let mean = embedding.mean();
        let add = amax + mean;
        let gt = x.greater(g.constant(0.2));
        let val_18 = x.relu() + ((-(-x).relu()).exp() - 1.0);
        let hardswish = x * (x * 0.16666667 + 0.5).clip(0.0, 1.0);
        let x_where = gt * val_18 + (1.0 - gt) * hardswish;
        let clamp = x.clip(-0.5, 0.7);
        let mul_4 = x_where * clamp;
        let tmp = x.softplus();
        let tmp_1 = x.greater(g.constant(20.0));
        let softplus = tmp_1 * x + (1.0 - tmp_1) * tmp;
        let abs_1 = x.abs();
        let add_1 = abs_1 + 1.0;
        let sqrt = add_1.sqrt();
        let div = softplus / sqrt;
        let minimum = x.min(sum_1);
        let sub = div - minimum;
        let prelu = sum_1.relu() - (-sum_1).relu() * parameter!(g, "val_25", [1, 3]).reshape(&[3]);
        let add_2 = mul_4 + prelu;
        let tanh = add.tanh();
        let pow_1 = tanh * tanh;
        let add_3 = add_2 + pow_1;
        let add_4 = add_3 + sub;
        let split_with_sizes_split_0 = embedding.slice(0, 2);
        let split_with_sizes_split_0_2 = embedding.slice(2, 6);
        let matmul = view.matmul(parameter!(g, "right", [3, 2]));
        let view_1 = matmul.reshape(&[4]);
        let matmul_1 = view
            .transpose(&[0, 2, 1])
            .matmul(parameter!(g, "left", [2, 4]))
            .transpose(&[0, 2, 1]);
        let view_2 = matmul_1.reshape(&[12]);
        let gelu =
            (((view_2 * view_2 * 0.044715 + 1.0) * view_2 * 0.7978845).tanh() + 1.0) * view_2 * 0.5;
        let slice_2 = g.concat(&[
            split_with_sizes_split_0_2.slice(0, 1),
            split_with_sizes_split_0_2.slice(2, 3),
        ]);
        let mul_13 = split_with_sizes_split_0 * slice_2;
        let val_78 = g.concat(&[
            embedding.slice(5, 6),
            embedding.slice(0, 1),
            embedding.slice(3, 4),
        ]);
        let pow_2 = x * x * x;
        let abs_2 = pow_2.abs();
        let neg = -abs_2;
        let exp = neg.exp();
        let mul_14 = x * x;
        let add_5 = mul_14 + 1.0;
        let log = add_5.log();
        let hardsigmoid = (x * 0.16666667 + 0.5).clip(0.0, 1.0);
        let slice_5 = split_with_sizes_split_0_2.slice(2, 4);
        let maximum = split_with_sizes_split_0.max(slice_5);
        let gt_1 = embedding.greater(g.constant(0.0));
        let slice_7 = gt_1.slice(0, 1);
        let mul_15 = slice_7 * age;
        let mul_16 = mul_15 * 0.1;
        let cat = g.concat(&[
            add_4,
            view_1,
            gelu,
            mul_13,
            val_78,
            exp,
            log,
            hardsigmoid,
            maximum,
            mul_16,
        ]);
        let linear =
            cat.matmul(parameter!(g, "click.weight", [36, 1])) + parameter!(g, "click.bias", [1]);
        let sigmoid = linear.sigmoid();
        let linear_1 =
            cat.matmul(parameter!(g, "buy.weight", [36, 1])) + parameter!(g, "buy.bias", [1]);
        let sigmoid_1 = linear_1.sigmoid();
        let mul_17 = sigmoid * sigmoid_1;
        let buy_logit = mul_17.log() - (1.0 - mul_17).log();
        g.whole_output("click", linear);
        g.whole_output("buy", buy_logit);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(&request.weighted_sum(value)))
    }
}

/// The value model: the worth of one unit of each prediction to this surface.
fn value(task: &str) -> f32 {
    match task {
        "click" => 1.0,
        "buy" => 1.0,
        _ => 0.0,
    }
}

hypercast_sdk::export!(Mixed);
