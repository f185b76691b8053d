"""Makes the ensembles of trees of the tests of `cargo hypercast from-onnx`, and what they predict.

Needs onnx and onnxruntime. It writes `ensembles.onnx`, and `ensembles.json` with the predictions of
onnxruntime. The trees are random, and so are features and thresholds, which are multiples of 0.5:
many features are equal to a threshold. A classifier's label and dictionary hang beside what is
bound, as converters leave them.
"""

import json
import pathlib
import random

import numpy
import onnxruntime
from onnx import TensorProto, checker, helper, save

HERE = pathlib.Path(__file__).parent
ROWS = 64
FEATURES = 5
MODES = ["LEQ", "LT", "GTE", "GT", "EQ", "NEQ"]


class Ensemble:
    """The attributes of an ensemble, of which trees are added one by one."""

    def __init__(self, kind, ids, modes):
        self.kind, self.ids, self.modes = kind, ids, modes
        self.trees = 0
        names = ["featureids", "values", "modes", "treeids", "nodeids", "truenodeids",
                 "falsenodeids"]
        self.nodes = {f"nodes_{name}": [] for name in names}
        self.weights = {f"{kind}_{name}": [] for name in ["treeids", "nodeids", "ids", "weights"]}

    def tree(self, shape):
        """A tree of nested pairs; anything else is a leaf."""
        count = [0]

        def add(shape):
            node = count[0]
            count[0] += 1
            is_split = isinstance(shape, tuple)
            mode = "BRANCH_" + random.choice(self.modes) if is_split else "LEAF"
            at = len(self.nodes["nodes_modes"])
            # No tree reads feature 3.
            feature = random.choice([0, 1, 2, 4]) if is_split else 0
            threshold = random.randint(-3, 3) / 2 if is_split else 0.0
            values = [feature, threshold, mode, self.trees, node, 0, 0]
            for own, value in zip(self.nodes.values(), values):
                own.append(value)
            if is_split:
                self.nodes["nodes_truenodeids"][at] = add(shape[0])
                self.nodes["nodes_falsenodeids"][at] = add(shape[1])
            else:
                for target in self.ids:
                    leaf = [self.trees, node, target, random.uniform(-0.3, 0.3)]
                    for own, value in zip(self.weights.values(), leaf):
                        own.append(value)
            return node

        add(shape)
        self.trees += 1

    def node(self, outputs, **attributes):
        kind = {"target": "TreeEnsembleRegressor", "class": "TreeEnsembleClassifier"}[self.kind]
        return helper.make_node(kind, ["x"], outputs, name=outputs[-1] + "_trees",
                                domain="ai.onnx.ml", **self.nodes, **self.weights, **attributes)


def complete(depth):
    return (complete(depth - 1), complete(depth - 1)) if depth else None


def chain(length, is_first):
    if not length:
        return None
    rest = chain(length - 1, not is_first)
    return (rest, None) if is_first else (None, rest)


def grown(leaves):
    """A tree that splits a random leaf each time, as one without a limit of depth grows."""
    if leaves == 1:
        return None
    first = random.randint(1, leaves - 1)
    return (grown(first), grown(leaves - first))


def ensemble(kind, ids, modes):
    own = Ensemble(kind, ids, modes)
    for shape in [complete(3), complete(3), chain(9, True), None, chain(1, False), complete(2)]:
        own.tree(shape)
    for _ in range(6):
        own.tree(grown(15))
    return own


def main():
    random.seed(3)
    labels = {"classlabels_int64s": [0, 1]}
    nodes = [
        ensemble("target", [0, 1], MODES).node(
            ["values"], n_targets=2, aggregate_function="AVERAGE", base_values=[0.5, -1.0],
            post_transform="NONE"),
        # As LightGBM and XGBoost are converted: the weights are of one class.
        ensemble("class", [0], ["LEQ"]).node(
            ["first_label", "first"], post_transform="LOGISTIC", base_values=[0.25], **labels),
        ensemble("class", [1], ["LT"]).node(
            ["second_label", "second"], post_transform="LOGISTIC", **labels),
        # As the forests of scikit-learn are.
        ensemble("class", [0, 1], ["GT", "NEQ"]).node(
            ["both_label", "both"], post_transform="NONE", **labels),
        helper.make_node("Cast", ["first_label"], ["label"], to=TensorProto.INT64),
        helper.make_node("ZipMap", ["second"], ["dictionary"], domain="ai.onnx.ml",
                         classlabels_int64s=[0, 1]),
    ]
    tensor = helper.make_tensor_value_info
    outputs = [tensor(name, TensorProto.FLOAT, [None, 2])
               for name in ["values", "first", "second", "both"]]
    outputs.append(tensor("label", TensorProto.INT64, [None]))
    graph = helper.make_graph(nodes, "trees", [tensor("x", TensorProto.FLOAT, [None, FEATURES])],
                              outputs)
    opsets = [helper.make_opsetid("", 9), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    checker.check_model(model)
    save(model, HERE / "ensembles.onnx")
    x = numpy.array([[random.randint(-4, 4) / 2 for _ in range(FEATURES)] for _ in range(ROWS)],
                    numpy.float32)
    names = [output.name for output in outputs[:-1]]
    said = onnxruntime.InferenceSession(model.SerializeToString()).run(names, {"x": x})
    record = {
        "inputs": {"x": x.tolist()},
        "outputs": {name: value.tolist() for name, value in zip(names, said)},
    }
    (HERE / "ensembles.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
