"""Gradient boosting on hand-made counters: the rival that a team would use instead.

It reads a data set that `hypercast data import`, `import` or `simulate` wrote, so it sees the same
impressions, features and outcome times as the foundation model and the experts. `hypercast-lab
evaluate --boosting PYTHON` runs it and takes its predictions from the file that `--predictions`
names. By itself:

    pip install lightgbm pandas pyarrow
    hypercast import kuairand --from DIR --into DATA
    python host/lab/python/boosting.py DATA --test-from 2022-04-29 --utc-offset-h 8 --json OUT

Features of an impression: the surface, the hour, the item's and the user's own columns, and for
each action and each of the keys user, item, author, tag, user x surface, item x surface (as far as
the data set has them) how often its outcome is known and the smoothed rate of positives. A counter
is progressive: it holds only outcomes that were known before the impression was shown. With
`--schema`, keys are those of all counters in the data set's schema, and features of the context
count, too, so that it knows all that experts know but the embeddings.

Two models per task: `once`, trained on everything before the test, and `daily`, retrained before
each day of the test on everything before that day. Both predict the same test rows. NE is the log
loss over the entropy of the rows' own rate of positives; GAUC weights each user's AUC by the user's
positives. The number of trees is fixed, so the test rows choose nothing.
"""

import argparse
import datetime
import json
import pathlib
import tomllib

import lightgbm
import numpy
import pandas

DAY_MS = 86_400_000

# Few trees of moderate depth: four days of a small log overfit quickly.
PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.03,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbosity": -1,
}

# A rate with few observations is drawn towards the action's overall rate by this many of them.
PRIOR = 10.0

# A categorical feature of more different values is left to the counters.
MOST_CATEGORIES = 64

# What stands behind the last of an item's several values.
NO_VALUE = 0


def main():
    options = arguments()
    folder = pathlib.Path(options.data)
    schema = tomllib.loads((folder / "schema.toml").read_text())
    rows = pandas.read_parquet(folder / "impressions.parquet")
    rows = rows.sort_values("time_ms", kind="stable", ignore_index=True)
    offset_ms = round(options.utc_offset_h * 3_600_000)
    test_from_ms = parse_time(options.test_from, offset_ms)

    entities = {name: pandas.read_parquet(folder / f"{name}s.parquet") for name in ("user", "item")}
    rows = rows.merge(entities["item"], "left", left_on="item", right_on="id").drop(columns="id")
    rows = rows.merge(entities["user"], "left", left_on="user", right_on="id").drop(columns="id")
    shown = rows[~rows["history_only"]].reset_index(drop=True)
    features = make_features(schema, rows, shown, test_from_ms, offset_ms, options.schema)

    is_test = (shown["time_ms"] >= test_from_ms).to_numpy()
    day = ((shown["time_ms"] + offset_ms) // DAY_MS).to_numpy()
    report = {
        "data": str(folder),
        "test_from": options.test_from,
        "lightgbm": lightgbm.__version__,
        "trees": options.trees,
        "parameters": PARAMETERS,
        "tasks": {},
    }
    tables = []
    for number_of_task, task in enumerate(schema["tasks"]):
        if task["kind"] != "binary" or (options.task and task["name"] not in options.task):
            continue
        bit = schema["actions"].index(task["label"])
        known, label = outcome(shown, bit)
        if task["surfaces"]:
            valid = [schema["surfaces"].index(name) for name in task["surfaces"]]
            known &= shown["surface"].isin(valid).to_numpy()
        results = {}
        for mode in options.mode:
            predicted = numpy.full(len(shown), numpy.nan)
            days = numpy.unique(day[is_test]) if mode == "daily" else [None]
            for one in days:
                chosen = is_test if one is None else is_test & (day == one)
                before = ~is_test if one is None else ~is_test | (day < one)
                predicted[chosen] = fit_and_predict(
                    features, label, before & known, chosen, options
                )
            counted = is_test & known
            results[mode] = evaluate(shown, schema, predicted, label, counted)
            tables.append(
                pandas.DataFrame(
                    {
                        "user": shown["user"][counted].astype("uint64"),
                        "surface": shown["surface"][counted].astype("uint32"),
                        "time_ms": shown["time_ms"][counted],
                        "task": numpy.uint32(number_of_task),
                        "label": label[counted].astype("float32"),
                        "said": predicted[counted].astype("float32"),
                    }
                )
            )
            total = results[mode]["all"]
            print(
                f"{task['name']:<18} {mode:<6} n {total['n']:>7}  NE {number(total['ne'])}"
                f"  AUC {number(total['auc'])}  GAUC {number(total['gauc'])}",
                flush=True,
            )
        report["tasks"][task["name"]] = results
    if options.predictions:
        table = pandas.concat(tables)
        table.to_parquet(options.predictions, compression="zstd", index=False)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder that `hypercast import` or `hypercast simulate` wrote")
    parser.add_argument("--test-from", required=True, help="first day of the test, or milliseconds")
    parser.add_argument("--utc-offset-h", type=float, default=0, help="the data set's clock")
    parser.add_argument("--mode", nargs="+", choices=("once", "daily"), default=("once", "daily"))
    parser.add_argument("--task", nargs="+", help="these tasks only")
    parser.add_argument("--trees", type=int, default=250)
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schema", action="store_true", help="the schema's counters and context")
    parser.add_argument("--predictions", help="write those for the test to this Parquet file")
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_args()


def parse_time(text, offset_ms):
    if text.lstrip("-").isdigit():
        return int(text)
    day = datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.timezone.utc)
    return round(day.timestamp() * 1000) - offset_ms


def outcome(rows, bit):
    """Whether the outcome of an action is known, and whether it happened."""
    known = (rows["known"].to_numpy() >> bit & 1).astype(bool)
    return known, (rows["actions"].to_numpy() >> bit & 1).astype(bool)


def make_features(schema, rows, shown, test_from_ms, offset_ms, by_schema):
    columns = {
        "surface": shown["surface"].astype("category"),
        "hour": (shown["time_ms"] + offset_ms) // 3_600_000 % 24,
    }
    kinds = ["item_features", "user_features"] + ["context_features"] * by_schema
    for kind in kinds:
        for feature in schema.get(kind, []):
            # Serving does not know it, so a model may not be asked with it.
            if feature.get("training_only"):
                continue
            if "max_values" in feature:
                columns |= multi_hot(shown, feature)
                continue
            values = shown[feature["name"]]
            if feature["kind"] == "categorical":
                # A table of hundreds of authors is what the counters are for.
                if values.nunique() <= MOST_CATEGORIES:
                    columns[feature["name"]] = values.astype("category")
            else:
                columns[feature["name"]] = values
    keys = {"user": ["user"], "item": ["item"]}
    keys |= {name: [name] for name in ("author_id", "tag") if name in rows}
    if by_schema:
        short = {"user_id": "user", "item_id": "item"}
        for counter in schema.get("counters", []):
            key = [short.get(name, name) for name in counter["key"] if name != "hour"]
            keys["_".join(key)] = key
    keys |= {"user_surface": ["user", "surface"], "item_surface": ["item", "surface"]}
    for name, key in keys.items():
        codes = pandas.concat([rows[key], shown[key]]).groupby(key, dropna=False).ngroup()
        codes = codes.to_numpy()
        for bit, action in enumerate(schema["actions"]):
            known, happened = outcome(rows, bit)
            count, positives = counters(
                codes[: len(rows)][known],
                rows["outcome_ms"].to_numpy()[known],
                happened[known],
                codes[len(rows) :],
                shown["time_ms"].to_numpy(),
            )
            before = known & (rows["outcome_ms"].to_numpy() < test_from_ms)
            overall = happened[before].mean() if before.any() else 0.5
            rate = (positives + PRIOR * overall) / (count + PRIOR)
            columns[f"{name}_{action}_count"] = numpy.log1p(count)
            columns[f"{name}_{action}_rate"] = rate
    # LightGBM takes no name with a colon or a bracket, which a team's columns may have.
    return pandas.DataFrame(columns).set_axis([f"f{at}" for at in range(len(columns))], axis=1)


def multi_hot(shown, feature):
    """A column for each of the values of a feature that has several at once, if they are few."""
    name = feature["name"]
    places = shown[[f"{name}_{place + 1}" for place in range(feature["max_values"])]].to_numpy()
    different = numpy.unique(places[places != NO_VALUE])
    if len(different) > MOST_CATEGORIES:
        return {}
    return {f"{name}_is_{value}": (places == value).any(axis=1) for value in different}


def counters(codes, known_ms, happened, query_codes, query_ms):
    """Outcomes of the same code that were known before each query, and how many were positive."""
    first_ms = min(known_ms.min(), query_ms.min()) if len(known_ms) else query_ms.min()
    span = int(max(known_ms.max() if len(known_ms) else 0, query_ms.max()) - first_ms + 2)
    place = codes * span + (known_ms - first_ms)
    order = numpy.argsort(place, kind="stable")
    place, sums = place[order], numpy.concatenate([[0], numpy.cumsum(happened[order])])
    begin = numpy.searchsorted(place, query_codes * span, side="left")
    end = numpy.searchsorted(place, query_codes * span + (query_ms - first_ms), side="left")
    return end - begin, sums[end] - sums[begin]


def fit_and_predict(features, label, train, test, options):
    parameters = PARAMETERS | {"seed": options.seed, "num_threads": options.threads}
    data = lightgbm.Dataset(features[train], label[train])
    model = lightgbm.train(parameters, data, num_boost_round=options.trees)
    return model.predict(features[test])


def evaluate(shown, schema, predicted, label, counted):
    """Metrics over all surfaces and over each that has at least 500 rows."""
    users, surfaces = shown["user"].to_numpy(), shown["surface"].to_numpy()
    of = lambda rows: metrics(predicted[rows], label[rows], users[rows])
    results = {"all": of(counted)}
    for surface, name in enumerate(schema["surfaces"]):
        rows = counted & (surfaces == surface)
        if rows.sum() >= 500:
            results[name] = of(rows)
    return results


def metrics(predicted, label, users):
    p = numpy.clip(predicted, 1e-7, 1 - 1e-7)
    rate = label.mean()
    result = {"n": int(len(label)), "rate": float(rate), "ne": None, "auc": None, "gauc": None}
    if 0 < rate < 1:
        entropy = -(rate * numpy.log(rate) + (1 - rate) * numpy.log(1 - rate))
        result["ne"] = float(-numpy.log(numpy.where(label, p, 1 - p)).mean() / entropy)
        result["auc"] = auc(predicted, label)
        result["gauc"] = gauc(predicted, label, users)
    return result


def auc(predicted, label):
    """The share of pairs in the right order; a tie counts half."""
    ranks = pandas.Series(predicted).rank().to_numpy()
    positives = label.sum()
    wins = ranks[label].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(label) - positives)))


def gauc(predicted, label, users):
    total = weight = 0.0
    frame = pandas.DataFrame({"p": predicted, "y": label, "user": users})
    for _, rows in frame.groupby("user"):
        y = rows["y"].to_numpy()
        if y.any() and not y.all():
            total += auc(rows["p"].to_numpy(), y) * y.sum()
            weight += y.sum()
    return total / weight if weight else None


def number(value):
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
