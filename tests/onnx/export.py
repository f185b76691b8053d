"""Exports the models of the tests of `cargo hypercast from-onnx`, and what they predict.

Needs torch, onnxscript and onnxruntime. It writes into the folder that it is in: `dlrm.onnx` by
PyTorch's older exporter, which traces, the others by the newer one; and a `.json` beside each
with the predictions of onnxruntime, which are PyTorch's to 1e-6. Weights are random: learning
changes no shape.
"""

import json
import pathlib

import numpy
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

HERE = pathlib.Path(__file__).parent
ROWS = 6


class Dlrm(nn.Module):
    """Embeddings and a bottom MLP, their pairwise dot products, and a top MLP (Naumov, 2019)."""

    def __init__(self, dense, tables, dim):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(dense, 8), nn.ReLU(), nn.Linear(8, dim), nn.ReLU())
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for rows in tables)
        fields = 1 + len(tables)
        self.pairs = [(i, j) for i in range(fields) for j in range(i)]
        self.top = nn.Sequential(nn.Linear(dim + len(self.pairs), 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense, item, topic, device):
        x = self.bottom(dense)
        rows = [table(ids) for table, ids in zip(self.tables, (item, topic, device))]
        fields = torch.stack([x] + rows, dim=1)
        products = torch.bmm(fields, fields.transpose(1, 2))
        first = torch.tensor([i for i, _ in self.pairs])
        second = torch.tensor([j for _, j in self.pairs])
        joined = torch.cat([x, products[:, first, second]], dim=1)
        return torch.sigmoid(self.top(joined)).squeeze(1)


class Dcn(nn.Module):
    """A cross network beside an MLP (DCN-v2, arXiv 2008.13535), with a gate and two heads.

    All ids are looked up in one table, each with its own offset.
    """

    def __init__(self, dense, tables, dim):
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, tables[0]]))
        self.embedding = nn.Embedding(sum(tables), dim)
        width = dense + len(tables) * dim
        self.norm = nn.BatchNorm1d(dense)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.deep = nn.Sequential(
            nn.Linear(width, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.1),
            nn.Linear(8, 6), nn.LeakyReLU(),
        )
        self.gate = nn.Linear(width, 2)
        self.click = nn.Linear(width + 6, 1)
        self.watch = nn.Linear(width + 6, 1)

    def forward(self, dense, ids):
        x0 = torch.cat([self.norm(dense), self.embedding(ids + self.offsets).flatten(1)], dim=1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        joined = torch.cat([x, self.deep(x0)], dim=1)
        gate = torch.softmax(self.gate(x0), dim=-1)
        return self.click(joined) * gate[:, :1], self.watch(joined) + gate[:, 1:]


class Mixed(nn.Module):
    """Operators that the other models lack, and probabilities of which one is a product."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding(rows, 6)
        self.right = nn.Parameter(torch.randn(3, 2))
        self.left = nn.Parameter(torch.randn(4, 2))
        self.prelu = nn.PReLU(3)
        self.click = nn.Linear(36, 1)
        self.buy = nn.Linear(36, 1)

    def forward(self, x, age, item):
        row = self.table(item)
        parts = row.reshape(-1, 2, 3)
        pooled = (torch.softmax(parts, dim=1) * parts).sum(dim=1)
        largest = parts.amax(dim=1) + parts.mean(dim=(1, 2)).unsqueeze(1)
        chosen = torch.where(x > 0.2, F.elu(x), F.hardswish(x)) * torch.clamp(x, -0.5, 0.7)
        rest = F.softplus(x) / (1 + x.abs()).sqrt() - torch.minimum(x, pooled)
        hidden = chosen + self.prelu(pooled) + torch.tanh(largest) ** 2 + rest
        first, second = torch.split(row, [2, 4], dim=1)
        joined = torch.cat([
            hidden,
            torch.matmul(parts, self.right).flatten(1),
            F.gelu(torch.matmul(self.left, parts).flatten(1), approximate="tanh"),
            first * second[:, ::2],
            row[:, [5, 0, 3]],
            torch.exp(-x.pow(3).abs()),
            torch.log(1 + x * x),
            F.hardsigmoid(x),
            torch.maximum(first, second[:, 2:]),
            (row > 0).float()[:, :1] * age.float().unsqueeze(1) * 0.1,
        ], dim=1)
        click, buy = torch.sigmoid(self.click(joined)), torch.sigmoid(self.buy(joined))
        return torch.cat([click, click * buy], dim=1)


def export(name, model, inputs, outputs, is_new):
    """Writes the model and its predictions of `inputs`."""
    model.eval()
    file = HERE / f"{name}.onnx"
    options = {"input_names": list(inputs), "output_names": outputs, "opset_version": 20}
    if is_new:
        shapes = tuple({0: "batch"} for _ in inputs)
        options |= {"dynamo": True, "dynamic_shapes": shapes, "external_data": False}
    else:
        axes = {value: {0: "batch"} for value in [*inputs, *outputs]}
        options |= {"dynamo": False, "dynamic_axes": axes}
    torch.onnx.export(model, tuple(inputs.values()), str(file), **options)
    exported = onnx.load(file)
    for node in exported.graph.node:
        del node.metadata_props[:]  # Where in PyTorch's code each node comes from.
    onnx.save(exported, file)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    said = onnxruntime.InferenceSession(str(file)).run(outputs, arrays)
    of_torch = model(*inputs.values())
    of_torch = of_torch if isinstance(of_torch, tuple) else (of_torch,)
    for mine, other in zip(said, of_torch):
        numpy.testing.assert_allclose(mine, other.detach().numpy(), atol=1e-6)
    record = {
        "inputs": {key: value.tolist() for key, value in arrays.items()},
        "outputs": {key: value.tolist() for key, value in zip(outputs, said)},
    }
    lines = json.dumps(record, indent=1)
    (HERE / f"{name}.json").write_text(lines + "\n")


def ids(count, *tables):
    return [torch.randint(0, rows, (count,)) for rows in tables]


def main():
    torch.manual_seed(7)
    item, topic, device = ids(ROWS, 40, 12, 7)
    inputs = {"dense": torch.randn(ROWS, 3), "item": item, "topic": topic, "device": device}
    export("dlrm", Dlrm(3, (40, 12, 7), 4), inputs, ["click"], is_new=False)
    model = Dcn(2, (20, 5), 3)
    for _ in range(3):  # So that the normalisation has statistics.
        model(torch.randn(32, 2) * 3 + 1, torch.stack(ids(32, 20, 5), dim=1))
    inputs = {"dense": torch.randn(ROWS, 2) * 3 + 1, "ids": torch.stack(ids(ROWS, 20, 5), dim=1)}
    export("dcn", model, inputs, ["click", "watch"], is_new=True)
    inputs = {"x": torch.randn(ROWS, 3), "age": ids(ROWS, 60)[0], "item": ids(ROWS, 9)[0]}
    export("mixed", Mixed(9), inputs, ["both"], is_new=True)


if __name__ == "__main__":
    main()
