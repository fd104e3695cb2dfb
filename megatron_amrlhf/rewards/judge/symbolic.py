"""Whether two LaTeX expressions are equal: math-verify and numbers at points have to agree.

Expressions are read by math-verify's parser, which evaluates no Python. Before anything is
computed, the tree is walked: what could be large (towers of powers, factorials) is not read.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma "
    "tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp"
_COMMANDS = frozenset(f"frac sqrt pi cdot times {_GREEK} {_FUNCTIONS}".split())
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_WORD = re.compile(r"[A-Za-z]{2,}")
_ALLOWED = re.compile(r"[A-Za-z0-9\s.+\-*/^_(){}\[\]=|!\\]+")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
# Some read "2(3)" as a product and some as 2 + 3, and the parser as 5: it is not read here.
_SIDE_BY_SIDE = re.compile(r"\d\s+\d|\d\s*\(\s*\d+\s*\)|[)}]\s*\d|\d\s*\\frac\{\d+\}\{\d+\}")
_BASE = re.compile(r"\\log\s*_\s*(?:\{(\w+)\}|(\w))\s*(\w+)?")
_MIXED = re.compile(r"(?<![\w}.])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")
_NODES = (
    sympy.Add, sympy.Mul, sympy.Pow, sympy.Rational, sympy.Symbol, sympy.NumberSymbol,
    sympy.Abs, sympy.factorial, sympy.log, sympy.exp, sympy.core.function.AppliedUndef,
    sympy.functions.elementary.trigonometric.TrigonometricFunction,
    sympy.functions.elementary.trigonometric.InverseTrigonometricFunction,
    sympy.functions.elementary.hyperbolic.HyperbolicFunction,
)  # fmt: skip
MAX_LENGTH, MAX_DEPTH, MAX_NODES, MAX_NUMBER, MAX_POWER = 200, 8, 60, 10**30, 64
DIGITS, POINTS = 50, 3
_EQUAL = sympy.Rational(1, 10**30)
_AS_WRITTEN = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)


class UnreadError(Exception):
    """An expression that is not read; the text says why."""


class Expression:
    """A LaTeX expression, read but not evaluated.

    Args:
        latex: tidied, without an equals sign.

    Raises:
        UnreadError: it is no expression of known commands, or could be large.
    """

    def __init__(self, latex: str):
        self.latex = _checked(latex)
        try:
            self.tree = latex2sympy(
                self.latex, normalization_config=None, conversion_config=_AS_WRITTEN
            )
        except Exception as error:  # whatever the parser raises, it is not read
            raise UnreadError(f"no expression: {latex[:40]!r}") from error
        if not isinstance(self.tree, sympy.Expr):
            raise UnreadError(f"no expression: {latex[:40]!r}")
        _check_size(self.tree)
        self.number = self.tree.xreplace({sympy.Symbol("i"): sympy.I})  # which evaluates
        self.symbols = self.number.free_symbols

    def value(self, place: int = 0) -> sympy.Expr:
        """The number that it is at a point: each symbol has its own value there."""
        values = {symbol: _point(symbol.name, place) for symbol in self.symbols}
        return self.number.evalf(DIGITS, subs=values)

    def near(self, number: Fraction) -> bool:
        """Whether it is this number, to 30 digits."""
        exact = sympy.Rational(number.numerator, number.denominator)
        return not self.symbols and _is_near(self.value(), exact.evalf(DIGITS))

    def form(self) -> tuple:
        """What two spellings of one expression share, and a question and its answer do not.

        Sum or product, the terms of its sums, what stands under roots, and functions.
        """
        sums: Counter[int] = Counter()
        functions: Counter[type] = Counter()
        roots = set()
        for node in sympy.preorder_traversal(self.tree):
            if isinstance(node, sympy.Add):
                sums[len(node.args)] += 1
            elif isinstance(node, sympy.Pow) and node.exp.is_Rational and not node.exp.is_Integer:
                roots.add(node.base)
            elif isinstance(node, sympy.Function):
                functions[type(node)] += 1
        return isinstance(self.tree, sympy.Add), sums, roots, functions

    def leaves(self) -> int:
        """Numbers and symbols in it, without ones and the degrees of roots."""
        return _leaves(self.tree)


read_expression = lru_cache(maxsize=512)(Expression)  # a reference answer is read once a group


def _leaves(tree: sympy.Expr) -> int:
    if isinstance(tree, sympy.Rational):
        return (abs(tree.p) != 1) + (tree.q != 1)
    if isinstance(tree, sympy.Pow) and tree.exp.is_Rational and not tree.exp.is_Integer:
        return _leaves(tree.base)
    return sum(map(_leaves, tree.args)) if tree.args else 1


def _checked(latex: str) -> str:
    """The text for the parser: decimals and mixed numbers as fractions."""
    if len(latex) > MAX_LENGTH:
        raise UnreadError("an expression of more than 200 characters")
    depths = itertools.accumulate((c in "([{|") - (c in ")]}") for c in latex)
    if max(depths, default=0) > MAX_DEPTH:  # the parser's time grows with a power of it
        raise UnreadError("an expression of many brackets")
    commands = {name for name in _COMMAND.findall(latex)}
    words = set(_WORD.findall(_COMMAND.sub(" ", latex)))
    if commands - _COMMANDS or not _ALLOWED.fullmatch(latex) or any(len(w) > 3 for w in words):
        raise UnreadError(f"no expression: {latex[:40]!r}")
    latex = _DECIMAL.sub(lambda d: rf"\frac{{{int(d[1] + d[2])}}}{{{10 ** len(d[2])}}}", latex)
    latex = _MIXED.sub(_mixed, latex).replace("**", "^")
    latex = _BASE.sub(lambda b: rf"\log_{{{b[1] or b[2]}}}" + (f"({b[3]})" if b[3] else ""), latex)
    if _SIDE_BY_SIDE.search(re.sub(r"\\log_\{\w+\}", r"\\log", latex)):
        raise UnreadError(f"numbers side by side: {latex[:40]!r}")
    return latex


def _mixed(found: re.Match) -> str:
    whole, top, bottom = found.groups()
    is_mixed = int(top) < int(bottom)
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if is_mixed else found[0]


def _check_size(tree: sympy.Expr) -> None:
    for count, node in enumerate(sympy.preorder_traversal(tree)):
        if count > MAX_NODES or not isinstance(node, _NODES):
            raise UnreadError("an expression that is too large or has unknown parts")
        if isinstance(node, sympy.Rational) and max(abs(node.p), node.q) > MAX_NUMBER:
            raise UnreadError("a number that is too large")
        if isinstance(node, sympy.Pow) and not node.exp.free_symbols:
            if not (node.exp.is_Rational or _is_negated(node.exp)) or abs(node.exp) > MAX_POWER:
                if node.base is not sympy.E:
                    raise UnreadError("a power that is too large")
        if isinstance(node, sympy.factorial) and not (
            node.args[0].is_Integer and node.args[0] <= MAX_POWER or node.args[0].is_Symbol
        ):
            raise UnreadError("a factorial that is too large")


def _is_negated(tree: sympy.Expr) -> bool:
    return isinstance(tree, sympy.Mul) and all(arg.is_Rational for arg in tree.args)


def _point(name: str, place: int) -> sympy.Rational:
    """A symbol's value at a point, in (1, 2), of its name alone."""
    seed = sum((place + 3) * (k + 7) * ord(c) for k, c in enumerate(name)) * 7919 % 9973
    return 1 + sympy.Rational(seed + 11, 10007)


def _is_near(a: sympy.Expr, b: sympy.Expr) -> bool:
    if not (a.is_number and b.is_number) or a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan):
        raise UnreadError("an expression without a value")
    scale = abs(a) + abs(b)
    return bool(scale == 0) or bool(abs(a - b) <= _EQUAL * scale)


def same_value(one: Expression, other: Expression) -> bool | None:
    """Whether two expressions are equal; None where points say so and math-verify does not."""
    if one.symbols != other.symbols and one.symbols and other.symbols:
        return False
    if not all(_is_near(one.value(k), other.value(k)) for k in range(POINTS)):
        return False
    is_verified = verify(
        one.number,
        other.number,
        float_rounding=30,
        numeric_precision=DIGITS,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return True if is_verified else None
