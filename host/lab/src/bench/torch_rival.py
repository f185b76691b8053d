"""Runs the benches' shapes in PyTorch, eagerly, on the CPU.

Reads {"threads", "runs", "cases"} from standard input; writes {"torch", "seconds"}: the median of each case.
Cases by "kind":
  attention  HSTU attention over histories of "lengths", padded and masked as eager code must; with "backward"
             also the gradients of q, k, v.
  step       one training step of the whole FM: embeddings, layers, head, loss, gradients, Adam on the dense
             weights and Adagrad on the embedding rows that were met.
  expert     the network of an in-tree expert on "rows".
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def attention_weights(q, k, mask, norm):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return F.silu(scores) / norm * mask


def attention(case):
    lengths = case["lengths"]
    heads, qk, v = case["heads"], case["qk"], case["v"]
    batch, longest = len(lengths), max(lengths)
    shape = lambda width: torch.randn(batch, longest, heads, width)
    tensors = [shape(qk), shape(qk), shape(v)]
    for tensor in tensors:
        tensor.requires_grad_(case["backward"])
    inside = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    causal = torch.tril(torch.ones(longest, longest, dtype=torch.bool))
    mask = (causal[None] & inside[:, None, :] & inside[:, :, None])[:, None].float()
    grad = torch.randn(batch, longest, heads, v)

    def run():
        q, k, values = tensors
        out = torch.einsum("bhnm,bmhd->bnhd", attention_weights(q, k, mask, longest), values)
        if case["backward"]:
            for tensor in tensors:
                tensor.grad = None
            out.backward(grad)

    return run


class Layer(torch.nn.Module):
    def __init__(self, dim, heads, qk, v):
        super().__init__()
        self.heads, self.qk, self.v = heads, qk, v
        self.norm_in = torch.nn.LayerNorm(dim)
        self.uvqk = torch.nn.Linear(dim, 2 * heads * (qk + v))
        self.norm_out = torch.nn.LayerNorm(heads * v)
        self.output = torch.nn.Linear(heads * v, dim, bias=False)

    def forward(self, x, mask, norm):
        batch, tokens, _ = x.shape
        qk, v = self.heads * self.qk, self.heads * self.v
        u, q, values, k = F.silu(self.uvqk(self.norm_in(x))).split([v, qk, v, qk], dim=-1)
        by_head = lambda part, width: part.view(batch, tokens, self.heads, width)
        weights = attention_weights(by_head(q, self.qk), by_head(k, self.qk), mask, norm)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, by_head(values, self.v))
        return x + self.output(self.norm_out(out.reshape(batch, tokens, v)) * u)


class Model(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        dim, embedding = case["dim"], case["embedding_dim"]
        self.table = torch.nn.Embedding(case["keys"], embedding, sparse=True)
        self.hidden = torch.nn.Linear(case["fields"] * embedding, dim)
        self.token = torch.nn.Linear(dim, dim)
        self.outcome = torch.nn.Linear(case["outcomes"], dim, bias=False)
        sizes = (dim, case["heads"], case["qk"], case["v"])
        self.layers = torch.nn.ModuleList(Layer(*sizes) for _ in range(case["layers"]))
        self.head_norm = torch.nn.LayerNorm(dim)
        self.head = torch.nn.Linear(dim, dim)
        self.out = torch.nn.Linear(dim, case["tasks"])
        self.direct = torch.nn.Linear(dim, case["tasks"], bias=False)

    def forward(self, keys, outcomes, mask, norm, targets):
        batch, tokens, _ = keys.shape
        x = self.token(F.silu(self.hidden(self.table(keys).view(batch, tokens, -1))))
        x = x + F.pad(self.outcome(outcomes), (0, 0, 0, tokens - outcomes.shape[1]))
        for layer in self.layers:
            x = layer(x, mask, norm)
        x = self.head_norm(x[:, -targets:])
        return self.out(F.silu(self.head(x))) + self.direct(x)


def step(case):
    """Histories are padded at the front, so that the targets are the last tokens of every request."""
    lengths, targets = case["lengths"], case["targets"]
    batch, longest = len(lengths), max(lengths)
    tokens = longest + targets
    model = Model(case)
    sparse = torch.optim.Adagrad(model.table.parameters(), lr=0.03)
    dense = [p for name, p in model.named_parameters() if not name.startswith("table")]
    adam = torch.optim.AdamW(dense, lr=1e-3)
    keys = torch.randint(case["keys"], (batch, tokens, case["fields"]))
    outcomes = torch.rand(batch, longest, case["outcomes"])
    labels = torch.randint(2, (batch, targets, case["tasks"])).float()
    place = torch.arange(tokens)
    first = longest - torch.tensor(lengths)
    inside = place[None, :] >= first[:, None]
    is_target = place >= longest
    sees = (place[None, :] <= place[:, None]) & (~is_target[None, :] | (place[None, :] == place[:, None]))
    mask = (sees[None] & inside[:, None, :] & inside[:, :, None])[:, None].float()

    def run():
        loss = F.binary_cross_entropy_with_logits(model(keys, outcomes, mask, longest, targets), labels)
        adam.zero_grad(set_to_none=True)
        sparse.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dense, 1.0)
        adam.step()
        sparse.step()

    return run


class Expert(torch.nn.Module):
    """The network of the plugin mlp-fusion, as a server runs it."""

    def __init__(self, case):
        super().__init__()
        tables, features, tae = case["tables"], case["features"], case["tae"]
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(rows, width) for rows, width in tables)
        self.scale, self.bias = torch.nn.Parameter(torch.ones(features)), torch.nn.Parameter(torch.zeros(features))
        self.norm, self.bottleneck = torch.nn.LayerNorm(tae), torch.nn.Linear(tae, 32)
        self.missing = torch.nn.Parameter(torch.zeros(32))
        self.long, self.gate, self.interaction = torch.nn.Linear(32, 32), torch.nn.Linear(33, 32), self.layer(32, 32)
        width = sum(width for _, width in tables) + features + 64
        self.bottom = torch.nn.Sequential(self.layer(width, 64), self.layer(64, 32))
        self.tasks = torch.nn.ModuleList()
        for _ in range(case["tasks"]):
            parts = [self.layer(32, 16), torch.nn.Linear(16, 1)]
            parts += [torch.nn.Linear(features, 1, bias=False), torch.nn.Linear(tae, 1, bias=False)]
            parts += [torch.nn.Embedding(case["surfaces"], 1), torch.nn.Embedding(case["surfaces"], 1)]
            self.tasks.append(torch.nn.ModuleList(parts))

    @staticmethod
    def layer(before, after):
        return torch.nn.Sequential(torch.nn.Linear(before, after), torch.nn.LayerNorm(after), torch.nn.SiLU())

    def forward(self, ids, numbers, tae, surface):
        embedded = [table(id) for table, id in zip(self.tables, ids)]
        squashed = (numbers.sign() * numbers.abs().log1p()) * self.scale + self.bias
        present = (tae.abs().sum(1, keepdim=True) > 0).float()
        normed = self.norm(tae)
        values = self.bottleneck(normed) * present + (1 - present) * self.missing
        long = self.long(values)
        fused = torch.sigmoid(self.gate(torch.cat([long, present], 1))) * long + self.interaction(long)
        bottom = self.bottom(torch.cat([*embedded, squashed, values, fused], 1))
        outputs = []
        for tower, out, direct, fm, scale, bias in self.tasks:
            logit = out(tower(bottom)) + direct(numbers) + fm(normed * present)
            outputs.append(torch.sigmoid(logit * scale(surface) + bias(surface)))
        return torch.cat(outputs, 1)


def expert(case):
    rows = case["rows"]
    network = Expert(case).eval()
    ids = [torch.randint(count, (rows,)) for count, _ in case["tables"]]
    numbers, tae = torch.randn(rows, case["features"]), torch.randn(rows, case["tae"])
    surface = torch.zeros(rows, dtype=torch.long)

    def run():
        with torch.inference_mode():
            return network(ids, numbers, tae, surface)

    return run


def main():
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    torch.manual_seed(1)
    makers = {"attention": attention, "step": step, "expert": expert}
    seconds = []
    for case in request["cases"]:
        run, took = makers[case["kind"]](case), []
        for turn in range(request["runs"] + 1):
            start = time.perf_counter()
            run()
            if turn:
                took.append(time.perf_counter() - start)
        seconds.append(statistics.median(took))
    json.dump({"torch": torch.__version__, "seconds": seconds}, sys.stdout)


main()
