#!/usr/bin/env bash
# Makes the stored state of a release, tests/state/NAME, with that release's own binary:
#
#   HYPERCAST=path/to/hypercast PLUGIN=path/to/value-model.wasm tests/state/make.sh NAME
#
# PLUGIN is the component that the same release's `cargo hypercast build -p value-model --out FILE`
# wrote. README.md says what each folder is and which step below wrote it.
#
# The registry keeps absolute paths, so everything is made in /tmp/hypercast-state-NAME, and
# tests/tests/state.rs puts its copy there again.
set -euo pipefail

name=${1:?say which release: make.sh NAME}
HYPERCAST=$(realpath "${HYPERCAST:?the binary of that release}")
PLUGIN=$(realpath "${PLUGIN:?a component of that release}")
here=$(cd "$(dirname "$0")" && pwd)
work=/tmp/hypercast-state-$name
out=$here/$name
later=10 # bodies of events that the test sends

started=()
stop_all() { for pid in "${started[@]}"; do kill -9 "$pid" 2>/dev/null || true; done; }
trap stop_all EXIT

exec 9>"$work.lock" # no test may work there meanwhile
flock 9
rm -rf "$work"
mkdir -p "$work"
cd "$work"
said=$(mktemp -d)

# Runs a command of the release; what it prints is in $said/last.
run() {
    echo "+ hypercast $*" >&2
    "$HYPERCAST" "$@" >"$said/last" 2>&1 || { cat "$said/last" >&2; exit 1; }
}

# Starts the daemon; sets `url` and `daemon`.
serve() {
    : >"$said/serve"
    "$HYPERCAST" serve --listen 127.0.0.1:0 "$@" >"$said/serve" 2>"$said/serve.err" &
    daemon=$!
    started+=("$daemon")
    for _ in $(seq 600); do
        url=$(sed -n 's/^listening on //p' "$said/serve")
        [ -n "$url" ] && return
        sleep 0.1
    done
    cat "$said/serve.err" >&2
    exit 1
}

stop() { kill -TERM "$daemon"; wait "$daemon"; }

# Asks the daemon the questions of questions.jsonl, one answer a line.
answers() {
    while read -r body; do
        curl -sf "$url/v1/rank" -H 'content-type: application/json' -d "$body" ||
            { echo "no answer to $body" >&2; exit 1; }
        echo
    done <questions.jsonl
}

# Asks until all answers are by one version.
all_by() {
    for _ in $(seq 100); do
        answers >"$2"
        [ "$(grep -c "\"arm\":\"$1\"" "$2")" = "$(wc -l <questions.jsonl)" ] && return
        sleep 0.2
    done
    echo "$1 does not answer" >&2
    exit 1
}

# Sends lines FIRST to LAST of a file of events.
send() {
    sed -n "$2,$3p" "$1" | while read -r body; do
        curl -sS --fail-with-body "$url/v1/events" -H 'content-type: application/json' \
            -d "$body" >"$said/sent" || { cat "$said/sent" >&2; exit 1; }
    done
}

# Starts the joiner and waits until it has joined what there is; sets `joiner`.
join() {
    : >"$said/join"
    "$HYPERCAST" join --metrics 127.0.0.1:0 >"$said/join" 2>&1 &
    joiner=$!
    started+=("$joiner")
    settle
}

# Waits until the joiner has joined what there is, and the daemon has applied it.
settle() {
    for _ in $(seq 300); do
        address=$(sed -n 's/^metrics at //p' "$said/join")
        if [ -n "$address" ] && curl -sf "$address" | grep -q '{what="lag_events"} 0'; then
            sleep 2
            return
        fi
        sleep 0.1
    done
    cat "$said/join" >&2
    exit 1
}

cp "$PLUGIN" home.wasm
cp "$here/content.parquet" "$said/content.parquet"
cat >hypercast.toml <<TOML
[paths]
dataset = "data"
fm_work = "fm-work"
fm = "fm"
logs = "logs"
experts = "experts"
state = "state"

[server]
listen = "127.0.0.1:0"

[engine]
dir = "streams"
fsync = false

[fm]
dim = 8
layers = 1
heads = 1
qk_dim = 4
v_dim = 4
embedding_dim = 4
max_history = 8
position_buckets = 8
time_buckets = 8
batch_requests = 8
warmup_steps = 5
average_decay = 0.9
serving_rows = "bf16"
save_every_requests = 20

[join]
in_daemon = false
tick_ms = 0
first_window_s = 60
save_every_events = 40

[publish]
every_s = 1

[fm_gate]
rows = 0

[logs]
skip_share = 0.2
rows_per_file = 200
history_len = 4

[expert_training]
epochs = 1
batch_rows = 128

[plugin_limits]
deadline_ms = 5000
slow_ms = 100000.0
compiled_mib = 0

[rollout]
trusted_keys = ["KEY"]
replay_requests = 20
shadow_requests = 10
canary_share = 0.5
canary_requests = 10
canary_s = 0
latency_slack_ms = 10000.0

[recorded]
share = 0.25

[[experts]]
name = "home"
plugin = "home.wasm"
surfaces = []
TOML

# The secret key goes with this folder of work: what is stored has the public one alone.
run plugin keygen "$said/team.key"
sed -i "s|\"KEY\"|\"$(cat "$said/team.key.pub")\"|" hypercast.toml
# What follows the streams has logs of its own: `train fm --resume` cuts those in `logs`.
sed 's|^logs = "logs"|logs = "logs-stream"|' hypercast.toml >stream.toml

python3 - "$later" <<'PYTHON'
import json, sys

later = int(sys.argv[1])
requests, users, items = 30 + later, 20, 20
start_ms = 1_704_067_200_000 + 4 * 86_400_000

def impressions(r):
    surface = ["feed", "search"][r % 2]
    return [
        {
            "request": 1000 + r, "user": r * 7 % users + 1, "item": (r * 5 + place * 3) % items + 1,
            "surface": surface, "time_ms": start_ms + r * 20_000,
            "context": {"device": r % 3, "position": place},
        }
        for place in range(4)
    ]

def changed_items(r):
    """An item of the data set with tags, and now and then another content vector."""
    if r == 0:
        return []
    item = {"id": r % 20 + 1, "update": r}
    item["features"] = {
        "topic": 1, "creator": 1, "length": 20.0, "labels": [r % 3 + 1, 7][: r % 3],
    }
    if r % 4 == 0:
        item["content"] = [((r * 5 + k * 3) % 11 - 5) / 5.0 for k in range(4)]
    return [item]

def actions(r, delay_ms, late):
    for place, shown in enumerate(impressions(r)):
        happened = {"click": (r * 3 + place * 5) % 4 == 0, "like": (r + place) % 9 == 0}
        if late:
            # Long after its window: a correction.
            names = {"like": True} if (r + place) % 7 == 0 else {}
        else:
            names = {name: True for name, did in happened.items() if did}
        if not names and place % 5:
            continue
        if late and not names:
            continue
        yield {
            "request": shown["request"], "item": shown["item"], "user": shown["user"],
            "time_ms": shown["time_ms"] + delay_ms, "actions": names,
            "complete": not late and place % 5 == 0,
        }

bodies = []
for r in range(requests):
    body = {"impressions": impressions(r), "actions": [], "items": changed_items(r)}
    if r >= 1:
        body["actions"] += actions(r - 1, 15_000, False)
    if r >= 18:
        body["actions"] += actions(r - 18, 350_000, True)
    bodies.append(body)
bodies[-1]["clock_ms"] = start_ms + 30 * 86_400_000
with open("events.jsonl", "w") as file:
    file.writelines(json.dumps(body) + "\n" for body in bodies[:30])
with open("events-later.jsonl", "w") as file:
    file.writelines(json.dumps(body) + "\n" for body in bodies[30:])
with open("questions.jsonl", "w") as file:
    for user in range(1, 5):
        for surface in ["feed", "search"]:
            candidates = [{"id": (user * 3 + at * 2) % items + 1} for at in range(6)]
            question = {
                "user": user, "surface": surface, "candidates": candidates,
                "time_ms": start_ms + 86_400_000, "explain": True,
            }
            file.write(json.dumps(question) + "\n")
PYTHON

# 1. A data set, its FM with a saved run, feature logs, an expert's parameters.
run simulate --into data --users 20 --items 20 --requests 60 --surfaces 2 --seed 5
cp "$said/content.parquet" data/content.parquet
# Its schema grows: tags of items, and a column that requests need not send.
cp data/schema.toml grown.toml
cat >>grown.toml <<TOML

[[item_features]]
name = "labels"
kind = "categorical"
max_values = 3

[[context_features]]
name = "position"
kind = "dense"
training_only = true
TOML
run schema apply grown.toml --data data
rm grown.toml
run train fm
grep '^logs:' "$said/last" | grep -o '([0-9]* rows)' >"$said/logged"
run train expert home
serve
answers >"$said/configured"
stop

# 2. A registry of versions whose weights are files.
rm -rf streams state
run versions register fm
run versions promote fm 1.0.0
run versions register expert home 1.0.0
run versions promote expert home 1.0.0

# 3. Events, joined, learned from and published: the trainers run to the end of what is there, then
# behind events as they come, so that deltas follow on snapshots, then to the end again. The joiner
# is killed, so that its saved state is behind its streams.
fm_trainer=(train fm --follow --version 2.0.0)
expert_trainer=(train expert home --follow --version 2.0.0 --fm 2.0.0 --config stream.toml)
logging_tier=(materialise --follow --until-end --config stream.toml)
serve
join
send events.jsonl 1 10
settle
run "${fm_trainer[@]}" --until-end
run versions promote fm 2.0.0
run "${logging_tier[@]}"
send events.jsonl 11 14
settle
run "${fm_trainer[@]}" --until-end
run "${logging_tier[@]}"
"$HYPERCAST" "${fm_trainer[@]}" >"$said/fm" 2>&1 &
fm=$!
"$HYPERCAST" "${expert_trainer[@]}" >"$said/expert" 2>&1 &
expert=$!
started+=("$fm" "$expert")
for first in 15 18 21 24; do
    send events.jsonl $first $((first + 2))
    settle
    run "${logging_tier[@]}"
done
sleep 2
kill -TERM "$fm" "$expert"
wait "$fm" "$expert"
send events.jsonl 27 30
settle
kill -9 "$joiner"
run "${fm_trainer[@]}" --until-end
run "${logging_tier[@]}"
run "${expert_trainer[@]}" --until-end
for trainer in fm expert; do
    grep -q '"all":false' "$said/$trainer" || { echo "no delta of the $trainer" >&2; exit 1; }
done

# 4. A signed push that comes to answer everybody, under requests that are recorded.
sed -e 's|^experts = "experts"|experts = "experts-other"|' -e '/^\[expert_training\]/a seed = 8' \
    hypercast.toml >other.toml
run train expert home --config other.toml
cp experts-other/home/parameters.safetensors "$said/"
rm -r experts-other other.toml
run plugin sign home.wasm --name home --version 1.1.0 --key "$said/team.key" \
    --parameters "$said/parameters.safetensors" --out push.sig
answers >/dev/null
(while answers >/dev/null; do sleep 0.1; done) 2>/dev/null &
load=$!
started+=("$load")
run plugin push home.wasm "$url" --signature push.sig --parameters "$said/parameters.safetensors"
kill "$load"
wait "$load" 2>/dev/null || true
answers >"$said/registered"
stop

# What is stored: no locks, no secret key.
find . \( -name lock -o -name owner -o -name '*.lock' \) -delete
"$HYPERCAST" versions list >"$said/versions"
rm -rf "$out"
mkdir "$out"
# Copies of the component are stored once. Nothing writes into one.
find . -name '*.wasm' ! -path ./home.wasm -exec cmp -s {} home.wasm \; -exec ln -f home.wasm {} \;
tar --sort=name --owner=0 --group=0 --numeric-owner -cf - . | gzip -9n >"$out/state.tar.gz"

# 5. What this release makes of its state: expected.json.
restore() {
    find "$work" -mindepth 1 -delete
    tar -xzf "$out/state.tar.gz" -C "$work"
}
for version in 1.0.0 pushed; do
    parameters=experts/home/1.0.0/parameters.safetensors
    [ $version = pushed ] && parameters=$(ls experts/pushed/objects/*.safetensors)
    run plugin replay home.wasm --requests state/recorded --parameters "$parameters" --json
    cp "$said/last" "$said/replay-$version"
done
for fm in 1.0.0 2.0.0; do
    run train expert home --config stream.toml --fm $fm
    rows=$(grep -o '[0-9][0-9]* rows' "$said/last" | head -1)
    printf '%s\t%s\n' $fm "$rows" >>"$said/stream_rows"
done

# The pushed version is rolled back.
restore
serve
run plugin rollback home "$url"
all_by home@1.0.0 "$said/rolled_back"
stop

# The published version answers; the other events come, and are learned from.
restore
run versions promote expert home 2.0.0
serve
all_by home@2.0.0 "$said/published"
send events-later.jsonl 1 "$later"
join
sed -n '/^joining from/p' "$said/join" >"$said/joins_from"
curl -sf "$(sed -n 's/^metrics at //p' "$said/join")" | grep '^hypercast_joiner{' >"$said/joiner"
kill -TERM "$joiner"
wait "$joiner"
run "${fm_trainer[@]}" --until-end
grep '^learned from' "$said/last" >"$said/went_on"
run train fm --follow --version 3.0.0 --until-end
grep '^learned from' "$said/last" >"$said/learned"
run "${logging_tier[@]}"
run "${expert_trainer[@]}" --until-end
cp "$said/last" "$said/expert_went_on"
sleep 3 # the daemon takes up both publications
answers >"$said/followed"
stop
mkdir "$said/unpacked"
tar -xzf "$out/state.tar.gz" -C "$said/unpacked"
for store in fm/store fm-work/saved/trainer/store fm-work/follow/2.0.0/saved/trainer/store; do
    (cd "$said/unpacked" && "$HYPERCAST" store check "$store") >"$said/check"
    sed -n "s|^$store: |$store\t|p" "$said/check" >>"$said/stores"
done

python3 - "$said" "$out" <<'PYTHON'
import json, sys

said, out = sys.argv[1:]
read = lambda name: open(f"{said}/{name}").read()

def ranked(name):
    answers = []
    for line in read(name).splitlines():
        answer = json.loads(line)
        assert not answer["degraded"], answer
        answers.append({
            "arm": answer["expert"]["arm"], "fm_version": answer["fm_version"],
            "ranking": [{k: one[k] for k in ("id", "predictions")} for one in answer["ranking"]],
            "fm": answer["explain"]["fm"],
        })
    return answers

replays = {}
for version in ["1.0.0", "pushed"]:
    text = read(f"replay-{version}")
    replay = json.loads(text[text.index("{"):])
    names = ["requests", "compared", "left_out", "faults", "top_1", "top_k", "rank_correlation"]
    replays[version] = {name: replay[name] for name in names}
expected = {
    "configured": ranked("configured"), "registered": ranked("registered"),
    "rolled_back": ranked("rolled_back"), "published": ranked("published"),
    "followed": ranked("followed"),
    "joins_from": read("joins_from").strip(),
    "expert_went_on": {
        name: json.loads(read("expert_went_on").splitlines()[-1])[name]
        for name in ["sequence", "position"]
    },
"learned": read("learned").strip(),
    "went_on": read("went_on").strip(), "joiner": read("joiner").splitlines(),
    "versions": read("versions").splitlines(), "replays": replays,
    "logged": read("logged").strip(),
    "stores": [
        dict(zip(["dir", "said"], line.split("\t"))) for line in read("stores").splitlines()
    ],
    "stream_rows": dict(line.split("\t") for line in read("stream_rows").splitlines()),
}
with open(f"{out}/expected.json", "w") as file:
    json.dump(expected, file, indent=1)
    file.write("\n")
PYTHON
rm -rf "$said" "$work"
du -sh "$out"
