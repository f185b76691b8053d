"""PyTorch on the CPU as a rival: the same work, eager and compiled.

The first line of standard input is {"threads", "cases"}. Every case is prepared in two variants,
"eager" and "compiled" (`torch.compile`, mode max-autotune), and the answer is one line of JSON:
{"torch", "cases": [{"compiled": whether it is, "note": what is to be said of it}]}. Then each line
"CASE VARIANT" runs that variant twice and prints the seconds of the second run, so that the caller
can take turns with its own work.

Cases by "kind":
  attention  HSTU attention over histories of "lengths", padded and masked as torch code must be;
             with "buckets" also the position and time biases; with "backward" also all gradients.
  step       one training step of the whole FM: predict with the averaged weights, then embeddings,
             candidate columns, layers with biases, head, loss, gradients, AdamW on the dense
             weights, Adagrad on the embedding rows that were met, and the moving average.
  expert     the network of an in-tree expert on "rows".
"""

import copy
import json
import os
import sys
import time

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F


def biases(position, times, tables):
    """[batch, 1, query, key]: a bias by distance and one by the logarithm of seconds."""
    by_position, by_time = tables
    distance = (position[:, None] - position[None, :]).clamp(0, len(by_position) - 1)
    seconds = (times[:, :, None] - times[:, None, :]).abs().clamp(min=1).float()
    bucket = seconds.log2().long().clamp(max=len(by_time) - 1)
    return (by_position[distance][None] + by_time[bucket])[:, None]


def attend(q, k, v, mask, norm, bias=None):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bhnm,bmhd->bnhd", F.silu(scores) / norm * mask, v)


def attention(case, compiled):
    lengths, heads, longest = case["lengths"], case["heads"], max(case["lengths"])
    batch = len(lengths)
    shape = lambda width: torch.randn(batch, longest, heads, width)
    tensors = [shape(case["qk"]), shape(case["qk"]), shape(case["v"])]
    inside = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    causal = torch.tril(torch.ones(longest, longest, dtype=torch.bool))
    mask = (causal[None] & inside[:, None, :] & inside[:, :, None])[:, None].float()
    position = torch.arange(longest)
    times = position[None, :].expand(batch, longest) * 1000
    tables = [torch.randn(size) * 0.02 for size in case["buckets"] or []]
    learned = tensors + tables
    for tensor in learned:
        tensor.requires_grad_(case["backward"])
    grad = torch.randn(batch, longest, heads, case["v"])

    def forward(q, k, v, *tables):
        bias = biases(position, times, tables) if tables else None
        return attend(q, k, v, mask, longest, bias)

    forward = compiled(forward)

    def run():
        out = forward(*learned)
        if case["backward"]:
            for tensor in learned:
                tensor.grad = None
            out.backward(grad)

    return run


class Layer(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        dim, self.heads, self.qk, self.v = case["dim"], case["heads"], case["qk"], case["v"]
        width = self.heads * self.v
        self.norm_in = torch.nn.LayerNorm(dim)
        self.uvqk = torch.nn.Linear(dim, 2 * self.heads * (self.qk + self.v))
        self.tables = torch.nn.ParameterList(torch.randn(size) * 0.02 for size in case["buckets"])
        self.norm_out = torch.nn.LayerNorm(width)
        self.output = torch.nn.Linear(width, dim, bias=False)

    def forward(self, x, mask, norm, position, times):
        batch, tokens, _ = x.shape
        qk, v = self.heads * self.qk, self.heads * self.v
        u, q, values, k = F.silu(self.uvqk(self.norm_in(x))).split([v, qk, v, qk], dim=-1)
        by_head = lambda part, width: part.view(batch, tokens, self.heads, width)
        bias = biases(position, times, list(self.tables))
        q, k, values = by_head(q, self.qk), by_head(k, self.qk), by_head(values, self.v)
        out = attend(q, k, values, mask, norm, bias)
        return x + self.output(self.norm_out(out.reshape(batch, tokens, v)) * u)


class Dense(torch.nn.Module):
    """The FM behind its embedding table, which stays outside because its gradient is sparse."""

    def __init__(self, case):
        super().__init__()
        dim, columns = case["dim"], case["columns"]
        self.hidden = torch.nn.Linear(case["fields"] * case["embedding_dim"], dim)
        self.token = torch.nn.Linear(dim, dim)
        self.outcome = torch.nn.Linear(case["outcomes"], dim, bias=False)
        self.candidate_hidden = torch.nn.Linear(columns, 2 * dim)
        self.candidate_output = torch.nn.Linear(2 * dim, dim)
        self.candidate_direct = torch.nn.Linear(columns, dim, bias=False)
        self.layers = torch.nn.ModuleList(Layer(case) for _ in range(case["layers"]))
        self.head_norm = torch.nn.LayerNorm(dim)
        self.head = torch.nn.Linear(dim, dim)
        self.out = torch.nn.Linear(dim, case["tasks"])
        self.direct = torch.nn.Linear(dim, case["tasks"], bias=False)

    def forward(self, embedded, columns, outcomes, mask, norm, position, times):
        tokens, targets = embedded.shape[1], columns.shape[1]
        x = self.token(F.silu(self.hidden(embedded)))
        x = x + F.pad(self.outcome(outcomes), (0, 0, 0, targets))
        candidate = self.candidate_output(F.silu(self.candidate_hidden(columns)))
        candidate = candidate + self.candidate_direct(columns)
        x = x + F.pad(candidate, (0, 0, tokens - targets, 0))
        for layer in self.layers:
            x = layer(x, mask, norm, position, times)
        x = self.head_norm(x[:, -targets:])
        return self.out(F.silu(self.head(x))) + self.direct(x)


def step(case, compiled):
    """Histories are padded at the front, so that a request's targets are its last tokens."""
    lengths, targets, longest = case["lengths"], case["targets"], max(case["lengths"])
    batch, tokens = len(lengths), longest + targets
    table = torch.nn.Embedding(case["keys"], case["embedding_dim"], sparse=True)
    dense = Dense(case)
    average = copy.deepcopy(dense).requires_grad_(False)
    learns, predicts = compiled(dense), compiled(average)
    sparse = torch.optim.Adagrad(table.parameters(), lr=0.03)
    parameters, averages = list(dense.parameters()), list(average.parameters())
    adam = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    keys = torch.randint(case["keys"], (batch, tokens, case["fields"]))
    columns = torch.randn(batch, targets, case["columns"])
    outcomes = torch.rand(batch, longest, case["outcomes"])
    labels = torch.randint(2, (batch, targets, case["tasks"])).float()
    place = torch.arange(tokens)
    position = place.clamp(max=longest)
    times = (position * 1000)[None, :].expand(batch, tokens)
    inside = place[None, :] >= (longest - torch.tensor(lengths))[:, None]
    is_target = place >= longest
    is_seen = place[None, :] <= place[:, None]
    is_seen &= ~is_target[None, :] | (place[None, :] == place[:, None])
    mask = (is_seen[None] & inside[:, None, :] & inside[:, :, None])[:, None].float()

    def run():
        embedded = table(keys).view(batch, tokens, -1)
        inputs = (columns, outcomes, mask, longest, position, times)
        with torch.no_grad():
            torch.sigmoid(predicts(embedded.detach(), *inputs))
        loss = F.binary_cross_entropy_with_logits(learns(embedded, *inputs), labels)
        adam.zero_grad(set_to_none=True)
        sparse.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        sparse.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1.0 - case["average_decay"])

    return run


class Expert(torch.nn.Module):
    """The network of the plugin mlp-fusion, as a server runs it."""

    def __init__(self, case):
        super().__init__()
        features, tae = case["features"], case["tae"]
        tables = case["tables"]
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(rows, width) for rows, width in tables)
        self.scale = torch.nn.Parameter(torch.ones(features))
        self.bias = torch.nn.Parameter(torch.zeros(features))
        self.norm, self.bottleneck = torch.nn.LayerNorm(tae), torch.nn.Linear(tae, 32)
        self.missing = torch.nn.Parameter(torch.zeros(32))
        self.long, self.gate = torch.nn.Linear(32, 32), torch.nn.Linear(33, 32)
        self.interaction = self.layer(32, 32)
        width = sum(width for _, width in tables) + features + 64
        self.bottom = torch.nn.Sequential(self.layer(width, 64), self.layer(64, 32))
        self.tasks = torch.nn.ModuleList()
        for _ in range(case["tasks"]):
            direct = [torch.nn.Linear(size, 1, bias=False) for size in (features, tae)]
            by_surface = [torch.nn.Embedding(case["surfaces"], 1) for _ in range(2)]
            parts = [self.layer(32, 16), torch.nn.Linear(16, 1), *direct, *by_surface]
            self.tasks.append(torch.nn.ModuleList(parts))

    @staticmethod
    def layer(before, after):
        norm = torch.nn.LayerNorm(after)
        return torch.nn.Sequential(torch.nn.Linear(before, after), norm, torch.nn.SiLU())

    def forward(self, ids, numbers, tae, surface):
        embedded = [table(id) for table, id in zip(self.tables, ids)]
        squashed = (numbers.sign() * numbers.abs().log1p()) * self.scale + self.bias
        present = (tae.abs().sum(1, keepdim=True) > 0).float()
        normed = self.norm(tae)
        values = self.bottleneck(normed) * present + (1 - present) * self.missing
        long = self.long(values)
        gate = torch.sigmoid(self.gate(torch.cat([long, present], 1)))
        fused = gate * long + self.interaction(long)
        bottom = self.bottom(torch.cat([*embedded, squashed, values, fused], 1))
        outputs = []
        for tower, out, direct, fm, scale, bias in self.tasks:
            logit = out(tower(bottom)) + direct(numbers) + fm(normed * present)
            outputs.append(torch.sigmoid(logit * scale(surface) + bias(surface)))
        return torch.cat(outputs, 1)


def expert(case, compiled):
    rows = case["rows"]
    network = compiled(Expert(case).eval())
    ids = [torch.randint(count, (rows,)) for count, _ in case["tables"]]
    numbers, tae = torch.randn(rows, case["features"]), torch.randn(rows, case["tae"])
    surface = torch.zeros(rows, dtype=torch.long)

    def run():
        with torch.inference_mode():
            return network(ids, numbers, tae, surface)

    return run


def prepare(case):
    """The runs of a case by variant, and what is to be said of the compiled one."""
    make = {"attention": attention, "step": step, "expert": expert}[case["kind"]]
    runs, why, faults = {"eager": make(case, lambda work: work)}, None, []
    runs["eager"]()
    compile_ = lambda work: torch.compile(work, mode="max-autotune", dynamic=False)
    # Some releases write C++ for matrix products that no compiler takes. Then the rival is the code
    # compiled around the library's products.
    for backends in (inductor.max_autotune_gemm_backends, "ATEN"):
        try:
            with inductor.patch(max_autotune_gemm_backends=backends):
                compiled = make(case, compile_)
                # The first runs compile, the last one shows that nothing is compiled again.
                for _ in range(3):
                    compiled()
            runs["compiled"] = compiled
            if faults:
                why = f"with products of its own ({faults[0]}); the rival has the library's"
            break
        # torch.compile fails in many ways: no compiler, an unknown operator
        except Exception as error:
            faults.append((str(error).strip() or type(error).__name__).splitlines()[0])
    if "compiled" not in runs:
        why = f"{faults[0]}; eager only"
    return runs, why


def main():
    # Copies, because torch.compile closes descriptor 0 when it compiles something anew.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    request = json.loads(requests.readline())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(1)
    cases = [prepare(case) for case in request["cases"]]
    described = [{"compiled": "compiled" in runs, "note": why} for runs, why in cases]
    print(json.dumps({"torch": torch.__version__, "cases": described}), file=answers, flush=True)
    for line in requests:
        case, variant = line.split()
        run = cases[int(case)][0][variant]
        run()
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, file=answers, flush=True)


main()
