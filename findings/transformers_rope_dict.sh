#!/usr/bin/env bash
# transformers 5.24.0: a configuration writes rope_theta into the caller's dict of rope parameters,
# and the next configuration that is made with this dict takes it from there.
#
#   The dict is kept, not copied. So of two configurations with one dict and with rope_theta 10000
#   and 1000000 both have 10000: the keyword that is given is not read where the dict has the key,
#   which it has since the first call. A change of one configuration's rope_parameters changes the
#   other. It is the same with rope_scaling, the key of transformers 4 (whose config.json has
#   rope_theta beside it, as here; transformers 5 reads both).
#
# Expected: each configuration has the rope_theta that it was given, as with a copy of the dict.
#
# Seen: python 3.11, transformers 5.24.0:
#   rope_parameters: rope_theta 10000.0 and 1000000.0 became 10000.0 and 10000.0
#   rope_scaling: rope_theta 10000.0 and 1000000.0 became 10000.0 and 10000.0
#   a copy each: rope_theta 10000.0 and 1000000.0 became 10000.0 and 1000000.0
#   the dict is now {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 10000.0}
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet transformers==5.24.0
venv/bin/python - <<'PYTHON' 2>stderr || { cat stderr >&2; exit 1; }
import sys

from transformers import LlamaConfig


def thetas(key, given):
    dicts = [given, given]
    if key == "a copy each":
        key, dicts = "rope_parameters", [dict(given), dict(given)]
    short, long = (
        LlamaConfig(rope_theta=theta, **{key: rope})
        for theta, rope in zip((10000.0, 1000000.0), dicts, strict=True)
    )
    return short.rope_parameters["rope_theta"], long.rope_parameters["rope_theta"]


seen = {
    "rope_parameters": (10000.0, 10000.0),
    "rope_scaling": (10000.0, 10000.0),
    "a copy each": (10000.0, 1000000.0),
}
given = {key: {"rope_type": "linear", "factor": 2.0} for key in seen}
found = {key: thetas(key, given[key]) for key in seen}
for key, (first, second) in found.items():
    print(f"{key}: rope_theta 10000.0 and 1000000.0 became {first} and {second}")
print(f"the dict is now {given['rope_parameters']}")
sys.exit(found != seen or given["rope_parameters"].get("rope_theta") != 10000.0)
PYTHON
