"""Arithmetic expressions: parsed through `ast`, evaluated exactly, brought into one form. Nothing is ever executed.

Only non-negative integers, `+ - * /` between two operands and parentheses are read. Length bounds depth and work, so a
hostile text costs no more than a harmless one.
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
    """Its literals, sorted, each as often as it is used."""
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
    form = _form(body)
    if form is None:
        return None
    numbers = tuple(sorted(_literal(node) for node in ast.walk(body) if isinstance(node, ast.Constant)))
    return Expression(numbers=numbers, value=_value(body), canonical=form.text)


def _literal(node: ast.Constant) -> int:
    assert isinstance(node.value, int)
    return node.value


def _value(node: ast.expr) -> Fraction | None:
    """Exact value of a tree that `_form` has accepted; None where it divides by zero."""
    if isinstance(node, ast.Constant):
        return Fraction(_literal(node))
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

    @property
    def text(self) -> str:
        inverse = {"+": "-", "*": "/", "": ""}[self.operator]
        return self.operator.join(sorted(self.plus)) + "".join(inverse + part for part in sorted(self.minus))


def _form(node: ast.expr) -> _Form | None:
    """The flat form of a tree; None if it holds anything but integers and the four operations."""
    if isinstance(node, ast.Constant):
        return _Form("", (str(node.value),), ()) if type(node.value) is int else None
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        return None
    left, right = _form(node.left), _form(node.right)
    if left is None or right is None:
        return None
    operator = "+" if isinstance(node.op, ast.Add | ast.Sub) else "*"
    plus, minus = _operands(left, operator)
    added, removed = _operands(right, operator)
    if isinstance(node.op, ast.Sub | ast.Div):
        added, removed = removed, added
    return _Form(operator, plus + added, minus + removed)


def _operands(form: _Form, operator: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `form` contributes to a flat sum or product: its own operands if it is one of the same kind."""
    if form.operator == operator:
        return form.plus, form.minus
    return ((f"({form.text})" if form.operator == "+" else form.text),), ()


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
