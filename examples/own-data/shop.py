"""Makes the files that a shop might export: a log of what was shown, its articles, its customers.

    python3 shop.py --into shop                # CSV; needs Python alone
    python3 shop.py --into shop --parquet      # the log as Parquet instead; needs pandas and pyarrow

The log has three placements, ids that are texts, times in ISO 8601, a position, a revenue that is
0 for most rows, and gaps as real exports have. What customers do follows their taste for
categories and brands, the price, the position and the placement, so that a model has something to
learn. The same arguments make the same files.
"""

import argparse
import csv
import datetime
import json
import math
import pathlib
import random
import uuid

CATEGORIES = ["shoes", "shirts", "jackets", "bags", "sport", "home", "books", "toys"]
TAGS = ["new", "sale", "organic", "vegan", "premium", "outlet", "local", "gift"]
COUNTRIES = ["DE", "FR", "IT", "PL", "US"]
# The share of requests, and how much likelier a click is there, as a log odds.
PLACEMENTS = {"home": (0.5, -0.6), "search": (0.3, 0.5), "product": (0.2, 0.0)}
SHOWN = 8
BEGIN = datetime.datetime(2026, 3, 1, tzinfo=datetime.timezone.utc)
DAYS = 28


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def make_articles(rng, count):
    articles = []
    for number in range(count):
        category = rng.choice(CATEGORIES)
        articles.append({
            "sku": f"SKU-{number:05}",
            "title": f"{category} no. {number}",
            "category": category,
            "brand": f"brand-{rng.randrange(40)}",
            "price": round(math.exp(rng.gauss(3.2, 0.8)), 2),
            "tags": "|".join(sorted(rng.sample(TAGS, rng.randrange(4)))),
            "quality": rng.gauss(0, 0.5),
        })
    return articles


def make_customers(rng, count):
    customers = []
    for _ in range(count):
        customers.append({
            "user_id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            "country": rng.choice(COUNTRIES),
            # Some never told it.
            "age": rng.randrange(18, 80) if rng.random() < 0.7 else None,
            "taste": {category: rng.gauss(0, 1.3) for category in CATEGORIES},
            "brands": {f"brand-{brand}": rng.gauss(0, 0.6) for brand in range(40)},
            "thrift": rng.gauss(0.3, 0.3),
            "activity": rng.expovariate(1),
        })
    return customers


def shown_rows(rng, request, when, customer, placement, articles):
    """The rows of one request, with what the customer did."""
    liked = max(CATEGORIES, key=lambda category: customer["taste"][category])
    device = rng.choice(["phone", "phone", "desktop", ""])
    shown = rng.sample(articles, 3 * SHOWN)
    if placement == "search":
        # Rather what was searched for.
        shown.sort(key=lambda article: article["category"] != liked)
    for position, article in enumerate(shown[:SHOWN]):
        affinity = customer["taste"][article["category"]] + customer["brands"][article["brand"]]
        price = math.log(article["price"]) - 3.2
        log_odds = -2.6 + PLACEMENTS[placement][1] + affinity + article["quality"] - 0.12 * position
        clicked = rng.random() < sigmoid(log_odds - customer["thrift"] * price)
        carted = clicked and rng.random() < sigmoid(-1.0 + 0.4 * affinity - 0.5 * price)
        bought = carted and rng.random() < 0.6
        yield {
            "page_view": request,
            "shown_at": when.isoformat(timespec="milliseconds"),
            "user_id": customer["user_id"],
            "sku": article["sku"],
            "placement": placement,
            "position": position,
            "device": device,
            "clicked": int(clicked),
            "added_to_cart": int(carted),
            "purchased": int(bought),
            "revenue": round(article["price"] * rng.choice([1, 1, 1, 2]), 2) if bought else 0.0,
        }


def make_log(rng, customers, articles, requests):
    """All rows, in the order of their times."""
    seconds = sorted(rng.uniform(0, DAYS * 86400) for _ in range(requests))
    weights = [customer["activity"] for customer in customers]
    who = rng.choices(customers, weights, k=requests)
    shares = [share for share, _ in PLACEMENTS.values()]
    where = rng.choices(list(PLACEMENTS), shares, k=requests)
    for number, (second, customer, placement) in enumerate(zip(seconds, who, where)):
        when = BEGIN + datetime.timedelta(seconds=second)
        yield from shown_rows(rng, f"pv-{number:07}", when, customer, placement, articles)


def write_csv(path, rows, columns):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description="Makes the files of a shop.")
    parser.add_argument("--into", type=pathlib.Path, required=True)
    parser.add_argument("--requests", type=int, default=20_000, help="each shows 8 articles")
    parser.add_argument("--customers", type=int, default=1_500)
    parser.add_argument("--articles", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parquet", action="store_true", help="write the log as Parquet")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    articles = make_articles(rng, options.articles)
    customers = make_customers(rng, options.customers)
    rows = list(make_log(rng, customers, articles, options.requests))
    options.into.mkdir(parents=True, exist_ok=True)
    write_csv(options.into / "articles.csv", articles,
              ["sku", "title", "category", "brand", "price", "tags"])
    with (options.into / "customers.jsonl").open("w") as file:
        for customer in customers:
            known = {key: customer[key] for key in ["user_id", "country", "age"]}
            file.write(json.dumps(known) + "\n")
    if options.parquet:
        import pandas

        pandas.DataFrame(rows).to_parquet(options.into / "log.parquet")
    else:
        # Two files, as exports by the week are.
        half = len(rows) // 2
        write_csv(options.into / "log-1.csv", rows[:half], rows[0])
        write_csv(options.into / "log-2.csv", rows[half:], rows[0])
    clicks, revenue = sum(row["clicked"] for row in rows), sum(row["revenue"] for row in rows)
    print(f"{len(rows)} rows, {clicks} clicks, a revenue of {revenue:.0f}, in {options.into}")


if __name__ == "__main__":
    main()
