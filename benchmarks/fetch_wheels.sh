#!/usr/bin/env bash
# Wheels that device.sh installs on a CUDA machine without network: Linux x86-64, Python 3.12.
#
#     benchmarks/fetch_wheels.sh [FOLDER]        default: .whl
#
# Every package of device_requirements.txt in its exact version, and nothing that these would draw in.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$(dirname "$here")/.whl}
mkdir -p "$folder"
rm -f "$folder"/*.whl
platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
grep -Ev '^\s*(#|$)' "$here/device_requirements.txt" | while read -r requirement; do
    if ! "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$folder" "$requirement"; then
        # Only a source archive: pure Python is built here into a wheel for every machine.
        "${PYTHON:-python3}" -m pip wheel -q --no-deps -w "$folder" "$requirement"
    fi
done
if compgen -G "$folder/*-linux_*.whl" >/dev/null; then
    echo "error: built for this machine alone: $(cd "$folder" && echo *-linux_*.whl)" >&2
    exit 1
fi
echo "$(find "$folder" -type f -name '*.whl' | wc -l) wheels, $(du -sm "$folder" | cut -f1) MiB, in $folder"
