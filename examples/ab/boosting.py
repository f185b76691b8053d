"""Gradient boosting for the A/B test: trees on the columns of feature logs, as ONNX.

It reads what a run of `experiment ab` logged of the days before its test, of the tested surface. So
trees see the columns that the daemon will serve, and none of the FM. One LightGBM model per task;
`boosting.args` has the bindings of columns and tasks, one word a line, for `cargo hypercast
from-onnx`. examples/ab/README.md has the commands.
"""

import argparse
import pathlib
import tomllib

import lightgbm
import numpy
import onnx
import pandas
from onnx import TensorProto, helper

# Trees of the depth that an expert's network has room for.
PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "max_depth": 5,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbosity": -1,
}

# The tested surface, by its place in the schema.
TESTED = 0

# Columns of the logs that are no features.
OTHERS = ("request", "actions", "known", "truth", "user_id", "item_id", "surface")


def main():
    options = arguments()
    run = pathlib.Path(options.run)
    until_ms = int(tomllib.loads((run / "hypercast.toml").read_text())["timeline"]["until"])
    schema = tomllib.loads((run / "logs" / "schema.toml").read_text())
    rows = read_logs(run / "logs", until_ms)
    features = [name for name in rows if is_feature(rows, name)]
    tasks = [task["name"] for task in schema["tasks"] if task["kind"] == "binary"]
    nodes, shapes, tasks_args = [], [], []
    for task in tasks:
        known = rows[rows[f"mask:{task}"]]
        data = lightgbm.Dataset(known[features], known[f"label:{task}"])
        parameters = PARAMETERS | {"seed": options.seed}
        model = lightgbm.train(parameters, data, num_boost_round=options.trees)
        nodes.append(ensemble(model, task))
        shapes.append(helper.make_tensor_value_info(task, TensorProto.FLOAT, ["batch", 1]))
        tasks_args += ["--output", f"{task}=logit:{task}"]
        print(f"{task}: {model.num_trees()} trees of {len(known)} rows, {len(features)} columns")
    width = ["batch", len(features)]
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, width)
    graph = helper.make_graph(nodes, "boosting", [given], shapes)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), options.into)
    columns = ",".join(f"feature:{name}" for name in features)
    words = ["--input", f"features={columns}", *tasks_args]
    pathlib.Path(options.into).with_suffix(".args").write_text("\n".join(words) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a seed, such as target/hypercast/ab/seed-1")
    parser.add_argument("--trees", type=int, default=150, help="of a task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--into", default="boosting.onnx")
    return parser.parse_args()


def read_logs(logs, until_ms):
    """The rows of the tested surface before the test."""
    tables = []
    for file in sorted(logs.glob("examples-*.parquet")):
        requests = pandas.read_parquet(
            file.with_name(file.name.replace("examples", "requests")),
            columns=["surface", "time_ms", "correction", "targets"],
        )
        chosen = ~requests["correction"] & (requests["time_ms"] < until_ms)
        chosen &= requests["surface"] == TESTED
        # Rows stand in the order of their requests.
        tables.append(pandas.read_parquet(file)[numpy.repeat(chosen, requests["targets"]).array])
    return pandas.concat(tables, ignore_index=True)


def is_feature(rows, name):
    return name not in OTHERS and ":" not in name and rows[name].dtype == numpy.float32


def ensemble(model, task):
    """The trees of a model, whose sum is the logit."""
    nodes = {name: [] for name in ("treeids", "nodeids", "featureids", "values", "modes",
                                   "truenodeids", "falsenodeids")}
    leaves = {name: [] for name in ("treeids", "nodeids", "ids", "weights")}
    for number, tree in enumerate(model.dump_model()["tree_info"]):
        add_tree(tree["tree_structure"], number, nodes, leaves)
    attributes = {f"nodes_{name}": values for name, values in nodes.items()}
    attributes |= {f"target_{name}": values for name, values in leaves.items()}
    return helper.make_node(
        "TreeEnsembleRegressor", ["features"], [task], domain="ai.onnx.ml", n_targets=1,
        post_transform="NONE", **attributes,
    )


def add_tree(root, number, nodes, leaves):
    waiting, next_id = [(root, 0)], 1
    while waiting:
        node, own = waiting.pop()
        split = {"featureids": 0, "values": 0.0, "modes": "LEAF", "truenodeids": 0,
                 "falsenodeids": 0}
        if "leaf_value" in node:
            leaf = {"treeids": number, "nodeids": own, "ids": 0, "weights": node["leaf_value"]}
            for name, value in leaf.items():
                leaves[name].append(value)
        else:
            children = next_id, next_id + 1
            next_id += 2
            split = {"featureids": node["split_feature"], "values": below(node["threshold"]),
                     "modes": "BRANCH_LEQ", "truenodeids": children[0],
                     "falsenodeids": children[1]}
            waiting += [(node["left_child"], children[0]), (node["right_child"], children[1])]
        for name, value in {"treeids": number, "nodeids": own, **split}.items():
            nodes[name].append(value)


def below(threshold):
    """The largest number of 32 bits that is not above a threshold, which splits them as it does."""
    near = numpy.float32(threshold)
    return float(near if float(near) <= threshold else numpy.nextafter(near, numpy.float32("-inf")))


if __name__ == "__main__":
    main()
