#!/usr/bin/env bash
# Checks and measures this repository on a CUDA machine without network.
#
#     benchmarks/device.sh OUT [--wheels=.whl] [--pieces=equality,contract,speed,runs,graphs,rows] [--device=cuda] [--quick]
#                              [--plans=results/plan_full.yaml] [--processes=12]
#
# The machine's python3 (or $PYTHON) brings torch, numpy and what else device_requirements.txt says; the wheels
# (benchmarks/fetch_wheels.sh) are unpacked beside it, nothing on the machine is changed. Each piece writes one JSON file into
# OUT and has a time limit; what has finished is not run again, and no failure stops the pieces behind it. A summary is
# printed last; `python benchmarks/device_report.py OUT` prints it again.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out= wheels=$root/.whl pieces=equality,contract,speed,runs,graphs,rows options=()
for argument in "$@"; do
    case $argument in
        --wheels=*) wheels=${argument#*=} ;;
        --pieces=*) pieces=${argument#*=} ;;
        --device=* | --quick | --plans=* | --processes=*) options+=("$argument") ;;
        -*) echo "error: unknown option $argument" >&2; exit 2 ;;
        *) out=$argument ;;
    esac
done
[ -n "$out" ] || { echo "error: say where the results go: benchmarks/device.sh OUT" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
python=${PYTHON:-python3}

if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d) && trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH=$root:$site
else
    echo "no wheels in $wheels: taking what python has" >&2
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore CUBLAS_WORKSPACE_CONFIG=:4096:8 TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=PASSIVE

# Seconds that a piece may take; equality comes first because it says in a minute what fails and how.
declare -A limit=([equality]=60 [contract]=200 [speed]=150 [runs]=150 [graphs]=90 [rows]=480)
for piece in ${pieces//,/ }; do
    echo "== $piece"
    [[ " ${options[*]-} " == *" --quick "* ]] && seconds=900 || seconds=${limit[$piece]:-480}
    timeout -k 10 "$seconds" "$python" "$here/device_pieces.py" "$piece" "$out" --seconds=$((seconds - 40)) \
        ${options[@]+"${options[@]}"} >>"$out/device.log" 2>&1
    code=$?
    tail -n 2 "$out/device.log"
    [ $code -eq 124 ] && echo "$piece: cut off after $seconds s; what it had is in $out/$piece.json"
done
rm -f "$out"/*.tmp
"$python" "$here/device_report.py" "$out"
