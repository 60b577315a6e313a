#!/usr/bin/env bash
# Runs the steps of the Dockerfile beside it where there is no container engine: a clean environment and folder stand for
# the image, and the server runs as the image's user if we are root. Then asks what a client would.
#
#   bash container/try_without_engine.sh [PORT]
#
# What it cannot try: the base image, and steps that change a whole system (apt-get, useradd), which it names.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
port=${1:-8000}
root=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null || true; rm -rf "$root"' EXIT
chmod 755 "$root"

say() { printf '== %s\n' "$*"; }
fail() { printf 'failed: %s\n' "$*" >&2; exit 1; }
# The Dockerfile, one step a line, with this port and with the image's folders below $root.
steps() { sed -e :a -e '/\\$/N; s/\\\n *//; ta' "$repository/container/Dockerfile" | sed -e '/^ *#/d' -e '/^ *$/d' -e "s/8000/$port/g"; }
# An exec form, ["a", "b"], as lines.
words() { python3 -c 'import json, sys; print("\n".join(json.loads(sys.argv[1])))' "$1"; }

# ---------------------------------------------------------------- FROM: an interpreter that the image's user can run
wanted=$(steps | sed -n 's/^FROM python:\([0-9.]*\)-slim$/\1/p')
[ -n "$wanted" ] || fail "the Dockerfile's FROM is no python:X.Y-slim"
user=$(steps | sed -n 's/^USER //p')
as=()
if [ "$(id -u)" = 0 ] && command -v setpriv > /dev/null; then
    as=(setpriv "--reuid=$user" "--regid=$user" --clear-groups)
fi
for python in "/usr/bin/python$wanted" "$(command -v "python$wanted" || true)" /usr/bin/python3 "$(command -v python3)"; do
    "${as[@]}" "$python" -c 'import ensurepip, ssl' 2> /dev/null && break
done
"${as[@]}" "$python" -c 'import ensurepip, ssl' || fail "no Python with ssl and ensurepip that user $user can run"
"$python" -m venv "$root/venv"
say "$("$python" --version) in the place of python:$wanted-slim"

# Nothing of this shell but what its package client needs.
settings=("PATH=$root/venv/bin:/usr/bin:/bin" "HOME=$root/nobody" "TMPDIR=/tmp" "LANG=C.UTF-8")
while IFS= read -r line; do settings+=("$line"); done < <(env | grep -E '^(PIP_|SSL_CERT|REQUESTS_CA|https?_proxy=|no_proxy=)' || true)
folder=$root
command=() arguments=() health=()

# ---------------------------------------------------------------- the steps
while IFS= read -r line; do
    step=${line%% *} rest=${line#* }
    case $step in
        FROM | EXPOSE | USER) ;;
        ARG) name=${rest%%=*}; settings+=("$name=${!name:-$(eval "printf %s ${rest#*=}")}") ;;
        ENV) for one in $rest; do settings+=("$one"); done ;;
        WORKDIR) folder=$root$rest; mkdir -p "$folder" ;;
        COPY)
            read -ra paths <<< "$rest"
            to=${paths[-1]}
            for from in "${paths[@]:0:${#paths[@]}-1}"; do
                grep -qx "!$from" "$repository/.dockerignore" || fail ".dockerignore leaves out $from, which is copied"
                (cd "$repository" && cp -r "$from" "$folder/$to")
            done ;;
        RUN)
            case $rest in
                apt-get* | useradd*) say "left out: $rest" ;;
                *) say "$rest"; (cd "$folder" && env -i "${settings[@]}" sh -c "$rest" > "$root/log" 2>&1) || { tail -20 "$root/log" >&2; fail "$rest"; } ;;
            esac ;;
        HEALTHCHECK) mapfile -t health < <(words "${rest#*CMD }") ;;
        ENTRYPOINT) mapfile -t command < <(words "$rest") ;;
        CMD) mapfile -t arguments < <(words "$rest") ;;
        *) fail "a step that this script does not know: $line" ;;
    esac
done < <(steps)

# ---------------------------------------------------------------- a model at /model
say "a model, trained with what was installed"
(cd "$root" && env -i "${settings[@]}" python - << 'MODEL' > "$root/log" 2>&1) || { tail -20 "$root/log" >&2; fail "training"; }
import numpy as np
import pandas as pd

from dnr_recbole import Reranker

rng = np.random.default_rng(0)
request = np.repeat(np.arange(300), 10)
score = rng.random(3000).round(6)
log = pd.DataFrame({
    "request_id": request, "user_id": request % 40, "timestamp": request, "score": score,
    "item_id": np.concatenate([rng.permutation(60)[:10] for _ in range(300)]),
    "label": (rng.random(3000) < score / 2).astype(int),
})
Reranker("PRM", epochs=1, embedding_size=16, use_gpu=False, baselines=[]).fit(log).save("model")
MODEL
chmod -R a+rX,go-w "$root/model" "$root/venv" "$folder"

# ---------------------------------------------------------------- USER, ENTRYPOINT, CMD
[ "${#as[@]}" = 0 ] && say "as this user: only root can try the image's user $user" || say "as user $user"
run() { (cd "$folder" && exec env -i "${settings[@]}" "${as[@]}" "$@"); }
arguments=("${arguments[@]/#\/model/$root/model}")
run "${command[@]}" "${arguments[@]}" > "$root/said" 2>&1 &
server=$!
for _ in $(seq 60); do
    run "${health[@]}" 2> /dev/null && break
    kill -0 "$server" 2> /dev/null || { cat "$root/said" >&2; fail "the server ended"; }
    sleep 1
done
run "${health[@]}" || { cat "$root/said" >&2; fail "HEALTHCHECK"; }
say "HEALTHCHECK passes"
run python - "http://127.0.0.1:$port" << 'ASK' || fail "/rank"
import json
import sys
import urllib.request

body = {"requests": [{"user_id": 7, "k": 2, "items": [{"item_id": n, "score": n / 10} for n in range(5)]}]}
asked = urllib.request.Request(sys.argv[1] + "/rank", json.dumps(body).encode(), {"content-type": "application/json"})
answer = json.load(urllib.request.urlopen(asked, timeout=10))["answers"][0]
assert len(answer["items"]) == 2, answer
print("== /rank:", ", ".join(f"item {item['item_id']} {item['score']:.3f}" for item in answer["items"]))
ASK
kill -TERM "$server"
wait "$server" && code=0 || code=$?
server=
[ "$code" = 0 ] || [ "$code" = 143 ] || { cat "$root/said" >&2; fail "it ended with $code after SIGTERM"; }
say "ends after SIGTERM with $code; all steps pass"
