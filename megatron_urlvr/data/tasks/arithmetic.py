"""Arithmetic expressions: parsed through `ast`, evaluated exactly, brought into one form. Nothing is ever executed.

Only non-negative integers, `+ - * /` between two operands, signs before one, and parentheses are read. Length bounds
depth and work, so a hostile text costs no more than a harmless one.
"""

import ast
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 200
MAX_DIGITS = 9
"""Of one literal."""

_ALLOWED = re.compile(r"[0-9+\-*/() ]+")


@dataclass(frozen=True)
class Expression:
    """A parsed expression."""

    numbers: tuple[int, ...]
    """Its literals, without signs, sorted, each as often as it is used."""
    value: Fraction | None
    """None where it divides by zero."""
    canonical: str
    """The same for expressions that differ in spaces, needless parentheses and order of operands; itself parsable."""


def parse(text: str) -> Expression | None:
    """The expression `text` spells; None where it spells none."""
    text = text.strip()
    if len(text) > MAX_LENGTH or not _ALLOWED.fullmatch(text) or re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return None
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    canonical = _canonical(body)
    if canonical is None:
        return None
    numbers = tuple(sorted(_literal(node) for node in ast.walk(body) if isinstance(node, ast.Constant)))
    return Expression(numbers=numbers, value=_value(body), canonical=canonical)


def _canonical(body: ast.expr) -> str | None:
    """The text of a tree's form; None where it has none. A sign before a product is read as one of its first factor,
    which may be a sum: written again, each step moves it further in, until it stands before a number."""
    form, before = _form(body), None
    while form is not None and form.text != before:
        before = form.text
        form = _form(ast.parse(before, mode="eval").body)
    return before


def _literal(node: ast.Constant) -> int:
    assert isinstance(node.value, int)
    return node.value


def _value(node: ast.expr) -> Fraction | None:
    """Exact value of a tree that `_form` has accepted; None where it divides by zero."""
    if isinstance(node, ast.Constant):
        return Fraction(_literal(node))
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand)
        return -value if value is not None and isinstance(node.op, ast.USub) else value
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left / right if right else None


@dataclass(frozen=True)
class _Form:
    """An expression as a flat sum or product: operands that are kept and operands that are taken away."""

    operator: str
    """`+`, `*`, or empty for a number."""
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    negative: bool = False
    """The sign of a product or number; a sum has its own in its operands."""

    @property
    def unsigned(self) -> str:
        inverse = {"+": "-", "*": "/", "": ""}[self.operator]
        return self.operator.join(sorted(self.plus)) + "".join(inverse + part for part in sorted(self.minus))

    @property
    def text(self) -> str:
        return f"-{self.unsigned}" if self.negative else self.unsigned

    def negated(self) -> "_Form":
        if self.operator == "+":
            return _Form("+", self.minus, self.plus)
        return _Form(self.operator, self.plus, self.minus, not self.negative)


def _form(node: ast.expr) -> _Form | None:
    """The flat form of a tree; None if it holds anything but integers and the four operations."""
    if isinstance(node, ast.Constant):
        return _Form("", (str(node.value),), ()) if type(node.value) is int else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _form(node.operand)
        return operand.negated() if operand is not None and isinstance(node.op, ast.USub) else operand
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        return None
    left, right = _form(node.left), _form(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add | ast.Sub):
        plus, minus = _terms(left)
        added, removed = _terms(right.negated() if isinstance(node.op, ast.Sub) else right)
        return _Form("+", plus + added, minus + removed)
    plus, minus = _factors(left)
    added, removed = _factors(right)
    if isinstance(node.op, ast.Div):
        added, removed = removed, added
    return _Form("*", plus + added, minus + removed, left.negative != right.negative)


def _terms(form: _Form) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `form` contributes to a flat sum: its own terms if it is one, else itself on the side of its sign."""
    if form.operator == "+":
        return form.plus, form.minus
    return ((), (form.unsigned,)) if form.negative else ((form.unsigned,), ())


def _factors(form: _Form) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `form` contributes to a flat product, but for its sign: its own factors if it is one, else itself."""
    if form.operator == "*":
        return form.plus, form.minus
    return ((f"({form.text})" if form.operator == "+" else form.unsigned),), ()


def random_expression(
    numbers: Sequence[int],
    rng: random.Random,
    *,
    low: int,
    high: int,
    tries: int = 20,
    operations: str = "+-*/",
) -> tuple[str, int] | None:
    """An expression that uses each of `numbers` once, all partial results integers, its value within `low`..`high`.

    Two operands are joined by one of the `operations` that stay exact, until one is left. None after `tries` failures.
    """
    exact = operations.replace("/", "")
    for _ in range(tries):
        operands = [(number, str(number), 3) for number in numbers]
        while len(operands) > 1:
            rng.shuffle(operands)
            operands.append(_join(operands.pop(), operands.pop(), rng, operations, exact))
        value, text, _precedence = operands[0]
        if low <= value <= high:
            return text, value
    return None


def _join(
    a: tuple[int, str, int], b: tuple[int, str, int], rng: random.Random, operations: str, exact: str
) -> tuple[int, str, int]:
    """`a` and `b` under a random one of the `operations` that leaves an integer; `exact`: those that always do.

    Operands are (value, text, precedence): 1 for a sum, 2 for a product, 3 for a number.
    """
    (x, left, outer), (y, right, inner) = a, b
    possible = operations if y and x % y == 0 else exact
    operation = possible[int(rng.random() * len(possible))]
    if operation == "+":
        return x + y, f"{left}+{right}", 1
    if operation == "-":
        return x - y, f"{left}-{_bracket(right, inner <= 1)}", 1
    left = _bracket(left, outer == 1)
    if operation == "*":
        return x * y, f"{left}*{_bracket(right, inner == 1)}", 2
    return x // y, f"{left}/{_bracket(right, inner <= 2)}", 2


def _bracket(text: str, wanted: bool) -> str:
    return f"({text})" if wanted else text
