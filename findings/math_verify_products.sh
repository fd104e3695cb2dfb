#!/usr/bin/env bash
# math-verify 0.8.0 (latex2sympy2_extended 1.10.2) adds two numbers that are multiplied by writing
# them side by side in brackets, and drops primes.
#
#   "2(3)" and "(2)(3)" are read as 5, "4(5)" as 9: the reader for mixed numbers (2 1/2) takes any
#   two numbers without a sign between them for one. So 6 is called a wrong answer to 2(3), and 5 a
#   right one. "2(3+4)" is 14, as it should be. "f'(x)" is equal to "f(x)".
#
# Seen: python 3.11, math-verify 0.8.0, latex2sympy2_extended 1.10.2, sympy 1.14.0:
#   2(3) = 5: True, 2(3) = 6: False, (2)(3) = 5: True, 4(5) = 20: False, 2(3+4) = 14: True,
#   f'(x) = f(x): True
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet math-verify==0.8.0 latex2sympy2_extended==1.10.2 \
  antlr4-python3-runtime==4.13.2 sympy==1.14.0
venv/bin/python - <<'PYTHON'
import sys
from math_verify import parse, verify

seen = {
    ("2(3)", "5"): True,
    ("2(3)", "6"): False,
    ("(2)(3)", "5"): True,
    ("4(5)", "20"): False,
    ("2(3+4)", "14"): True,
    ("f'(x)", "f(x)"): True,
}
found = {
    (gold, answer): verify(parse(f"${gold}$"), parse(f"${answer}$")) for gold, answer in seen
}
for (gold, answer), is_equal in found.items():
    print(f"{gold} = {answer}: {is_equal}")
sys.exit(found != seen)
PYTHON
