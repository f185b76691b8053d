"""Compares `hypercast-lab evaluate policy` with Open Bandit's own package on the package's samples.

For each campaign two policies are evaluated, each on the log of the other: Bernoulli Thompson
sampling, as the shop ran it, and uniform random. Both programs get the same probabilities and the
same estimates of rewards, those of a logistic regression. It fails if an estimate differs in the
fourth digit. `run.sh` calls it.
"""

import argparse
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import types

import numpy
import pandas
from sklearn.linear_model import LogisticRegression

CAMPAIGNS = {"all": 80, "men": 34, "women": 46}
POSITIONS = 3
CONTEXT = [f"user_feature_{number}" for number in range(4)]
TOLERANCE = 5e-5


def stub(name):
    """A module of which each name is a class that does nothing."""
    module = types.ModuleType(name)
    module.__getattr__ = lambda _: type("Stub", (), {})
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


# The package imports these for what is not used here: learning policies, and plots.
for needless in ["torch", "torch.nn", "torch.optim", "torch.utils", "torch.utils.data"]:
    stub(needless)
for needless in ["torch.nn.functional", "matplotlib", "matplotlib.pyplot", "seaborn"]:
    stub(needless)

import obp.dataset  # noqa: E402
from obp.ope.estimators import (  # noqa: E402
    DirectMethod,
    DoublyRobust,
    InverseProbabilityWeighting,
    SelfNormalizedInverseProbabilityWeighting,
)
from obp.policy.contextfree import BernoulliTS  # noqa: E402

SAMPLES = pathlib.Path(obp.dataset.__file__).parent / "obd"
ESTIMATORS = {
    "direct-method": DirectMethod(),
    "ips": InverseProbabilityWeighting(),
    "snips": SelfNormalizedInverseProbabilityWeighting(),
    "doubly-robust": DoublyRobust(),
}


def action_distribution(policy, campaign):
    """The probability of each item at each position."""
    items = CAMPAIGNS[campaign]
    if policy == "random":
        return numpy.full((items, POSITIONS), 1 / items)
    sampling = BernoulliTS(
        n_actions=items,
        len_list=POSITIONS,
        is_zozotown_prior=True,
        campaign=campaign,
        random_state=12345,
    )
    return sampling.compute_batch_action_dist(n_sim=100_000)[0]


def estimate_rewards(log, contexts, items):
    """What a logistic regression expects of each item at each position in each context."""
    categories = [sorted(contexts[name].unique()) for name in CONTEXT]
    categories += [range(items), range(1, POSITIONS + 1)]

    def one_hot(table):
        columns = [table[name] for name in [*CONTEXT, "item_id", "position"]]
        hot = [
            numpy.eye(len(known))[pandas.Categorical(column, known).codes]
            for column, known in zip(columns, categories)
        ]
        return numpy.hstack(hot)

    model = LogisticRegression(C=10.0, max_iter=1000).fit(one_hot(log), log["click"])
    shown = itertools.product(range(items), range(1, POSITIONS + 1))
    every = contexts.merge(pandas.DataFrame(shown, columns=["item_id", "position"]), how="cross")
    every["estimate"] = model.predict_proba(one_hot(every))[:, 1]
    return every


def estimates_of_obp(log, contexts, distribution, rewards):
    """The package's estimates; rewards are by context, item and position, in this order."""
    items = distribution.shape[0]
    by_context = rewards["estimate"].to_numpy().reshape(len(contexts), items, POSITIONS)
    place = contexts.reset_index().set_index(CONTEXT)["index"]
    rows = place.loc[pandas.MultiIndex.from_frame(log[CONTEXT])].to_numpy()
    inputs = {
        "reward": log["click"].to_numpy(),
        "action": log["item_id"].to_numpy(),
        "pscore": log["propensity_score"].to_numpy(),
        "position": log["position"].to_numpy() - 1,
        "action_dist": numpy.tile(distribution, (len(log), 1, 1)),
        "estimated_rewards_by_reg_model": by_context[rows],
    }
    by_model = ("estimated_rewards_by_reg_model",)
    without_model = {name: of for name, of in inputs.items() if name not in by_model}
    without_weights = {name: of for name, of in inputs.items() if name != "pscore"}
    needed = {"direct-method": without_weights, "doubly-robust": inputs}
    return {
        name: float(estimator.estimate_policy_value(**needed.get(name, without_model)))
        for name, estimator in ESTIMATORS.items()
    }


def estimates_of_hypercast(programs, folder, distribution, rewards):
    """Ours, by the files that any team would write."""
    policy = pandas.DataFrame(distribution, columns=range(1, POSITIONS + 1))
    policy = policy.rename_axis("item").reset_index()
    policy = policy.melt("item", var_name="position", value_name="probability")
    policy.to_csv(folder / "policy.csv", index=False)
    rewards.rename(columns={"item_id": "item"}).to_parquet(folder / "estimates.parquet")
    mapping = ["--mapping", folder / "mapping.toml", "--into", folder / "data"]
    subprocess.run([programs / "hypercast", "data", "import", *mapping], check=True)
    subprocess.run(
        [
            *[programs / "hypercast-lab", "evaluate", "policy", "--from", folder / "data"],
            *["--reward", "click", "--policy", folder / "policy.csv"],
            *["--estimates", folder / "estimates.parquet", "--json", folder / "report.json"],
        ],
        check=True,
    )
    report = json.loads((folder / "report.json").read_text())
    return {of["estimator"]: of["value"] for of in report["estimates"]}


def compare(programs, folder, campaign, logged, policy):
    """Whether both say the same of a policy on a log."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = SAMPLES / logged / campaign / f"{campaign}.csv"
    shutil.copy(source, folder / "log.csv")
    shutil.copy(pathlib.Path(__file__).parent / "mapping.toml", folder)
    log = pandas.read_csv(source, index_col=0)
    contexts = log[CONTEXT].drop_duplicates(ignore_index=True)
    distribution = action_distribution(policy, campaign)
    rewards = estimate_rewards(log, contexts, CAMPAIGNS[campaign])
    theirs = estimates_of_obp(log, contexts, distribution, rewards)
    ours = estimates_of_hypercast(programs, folder, distribution, rewards)
    worst = max(abs(ours[name] / value - 1) for name, value in theirs.items())
    values = ", ".join(f"{name} {ours[name]:.6f} = {of:.6f}" for name, of in theirs.items())
    print(f"figure: {campaign}, {policy} on the log of {logged}: {values}; apart {worst:.1e}")
    return worst <= TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=pathlib.Path, required=True)
    parser.add_argument("--into", type=pathlib.Path, required=True)
    options = parser.parse_args()
    pairs = [("random", "bts"), ("bts", "random")]
    equal = [
        compare(options.programs, options.into / f"{campaign}-{logged}", campaign, logged, policy)
        for campaign, (logged, policy) in itertools.product(CAMPAIGNS, pairs)
    ]
    if not all(equal):
        sys.exit("estimates differ in the fourth digit from those of obp 0.4.1")
    print(f"{len(equal)} logs: all estimates equal those of obp 0.4.1 to the fourth digit")


if __name__ == "__main__":
    main()
