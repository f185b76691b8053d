"""Makes content vectors of the shop's articles from their words, as a file or as events.

    python3 vectors.py --articles shop/articles.csv --into vectors.parquet    # pandas and pyarrow
    python3 vectors.py --articles new.csv --schema data/schema.toml           # Python alone

The file is for `hypercast data import --content vectors.parquet`. With `--schema` the script prints
a body of `POST /v1/events` for articles that came later: their features and vectors, which are used
from the next request on.

Each word of title, brand and tags falls on four numbers by its hash. So articles that share words
have vectors that are near each other, and a new word needs no training. Vectors of a language model
or of pictures say more, and are given to HyperCast in the same way.
"""

import argparse
import csv
import hashlib
import json
import math
import pathlib
import re
import tomllib


def vector(article, width):
    """The sum of the words' own vectors, with norm 1."""
    numbers = [0.0] * width
    text = " ".join(article[key] for key in ["title", "brand", "tags"])
    for word in re.findall(r"\w+", text.lower()):
        digest = hashlib.sha256(word.encode()).digest()
        for at in range(0, 12, 3):
            place = int.from_bytes(digest[at:at + 2], "big") % width
            numbers[place] += 1.0 if digest[at + 2] % 2 else -1.0
    norm = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return [round(number / norm, 6) for number in numbers]


def event(article, schema, width):
    """The article as an element of `items`."""
    def value(feature):
        cell = article[feature["name"]]
        if not cell:
            return None
        if feature["kind"] == "dense":
            return float(cell)
        return cell.split("|") if "max_values" in feature else cell

    features = {feature["name"]: value(feature) for feature in schema["item_features"]}
    return {"id": article["sku"], "features": features, "content": vector(article, width)}


def write_file(articles, path, width):
    import numpy
    import pandas

    def id_key(text):
        return max(1, int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))

    keys = pandas.Series([id_key(article["sku"]) for article in articles], dtype="uint64")
    vectors = [numpy.array(vector(article, width), "float32") for article in articles]
    table = pandas.DataFrame({"item": keys.astype("int64"), "vector": vectors})
    table.to_parquet(path, compression="zstd")
    print(f"{len(table)} vectors of {width} numbers in {path}")


def main():
    parser = argparse.ArgumentParser(description="Makes content vectors of a shop's articles.")
    parser.add_argument("--articles", type=pathlib.Path, required=True)
    parser.add_argument("--width", type=int, default=64)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--into", type=pathlib.Path, help="the Parquet file to write")
    wanted.add_argument("--schema", type=pathlib.Path, help="print events of this schema instead")
    options = parser.parse_args()
    with options.articles.open(newline="") as file:
        articles = list(csv.DictReader(file))
    if options.into:
        write_file(articles, options.into, options.width)
    else:
        schema = tomllib.loads(options.schema.read_text())
        print(json.dumps({"items": [event(own, schema, options.width) for own in articles]}))


if __name__ == "__main__":
    main()
