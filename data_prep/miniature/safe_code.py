"""Run a tiny function written by a policy. It cannot hang, raise into the caller or reach anything outside.

Only a small typed grammar is run; everything else is refused before it is compiled:

    def f(x):  or  def f(xs):             at most MAX_LENGTH characters, MAX_STATEMENTS statements
        x = number                        number: x, y, an int, -number, number + - * % number,
        ys = list                                 sum / max / min / len (list)
        return number                     list:   xs, ys, [number for x in list if number < number]

Numbers and lists are told apart by name, so a list can be neither repeated nor joined: lists stay as short
as the input. The bound on the length of the source bounds the size of the integers and the nesting of lists.
"""

import ast
import warnings
from collections.abc import Callable
from typing import Any

MAX_LENGTH = 120
MAX_STATEMENTS = 3
NUMBERS = ("x", "y")
LISTS = ("xs", "ys")
CALLS: dict[str, Callable[[Any], int]] = {"sum": sum, "max": max, "min": min, "len": len}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Mod)
COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


def parse(source: str) -> ast.Module | None:
    """The syntax tree of `source`; None where it is not Python or longer than MAX_LENGTH characters."""
    source = source.strip()
    if not source or len(source) > MAX_LENGTH:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd literals such as "\d"
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # also null bytes and deep nesting
        return None


def is_allowed(tree: ast.Module, argument: str) -> bool:
    """Whether `tree` is one function f(argument) within the grammar above."""
    match tree.body:
        case [ast.FunctionDef(name="f", args=args, body=[*lines, ast.Return(value)], decorator_list=[])]:
            # Compared as text: any default, annotation or second argument shows up in it.
            plain = ast.unparse(args) == argument and tree.body[0].returns is None
            short = len(lines) < MAX_STATEMENTS
            return plain and short and all(map(_is_assignment, lines)) and _is_number(value)
    return False


def _is_assignment(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(name)], value=value):
            return _is_number(value) if name in NUMBERS else name in LISTS and _is_list(value)
    return False


def _is_number(node: ast.AST | None) -> bool:
    match node:
        case ast.Name(name):
            return name in NUMBERS
        case ast.Constant(value):
            return type(value) is int  # True is an int too
        case ast.UnaryOp(ast.USub(), operand):
            return _is_number(operand)
        case ast.BinOp(left, operator, right):
            return isinstance(operator, OPERATORS) and _is_number(left) and _is_number(right)
        case ast.Call(ast.Name(name), [argument], []):
            return name in CALLS and _is_list(argument)
    return False


def _is_list(node: ast.AST) -> bool:
    match node:
        case ast.Name(name):
            return name in LISTS
        case ast.ListComp(element, [ast.comprehension(ast.Name(name), items, conditions, 0)]):
            inside = _is_number(element) and all(map(_is_condition, conditions))
            return name in NUMBERS and inside and _is_list(items)
    return False


def _is_condition(node: ast.AST) -> bool:
    match node:
        case ast.Compare(left, [operator], [right]):
            return isinstance(operator, COMPARISONS) and _is_number(left) and _is_number(right)
    return False


def run(tree: ast.Module, argument: str, inputs: list[Any]) -> list[int | None]:
    """The value of f for each input; None where f fails, and everywhere if `tree` is not allowed."""
    try:
        allowed = is_allowed(tree, argument)
    except RecursionError:  # the caller's own stack was nearly full
        allowed = False
    if not allowed:
        return [None] * len(inputs)
    names: dict[str, Any] = {"__builtins__": dict(CALLS)}
    exec(compile(tree, "<response>", "exec"), names)
    return [_value(names["f"], item) for item in inputs]


def _value(function: Callable[[Any], int], item: Any) -> int | None:
    try:
        return function(item)
    except Exception:  # whatever the policy's arithmetic does: unset names, empty max, division by zero
        return None
