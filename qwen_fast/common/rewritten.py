"""Functions of diffusers with one thing in them replaced: their source is read, changed and compiled again."""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any


class Unknown(Exception):
    """A function that is not as it was read when this was written."""


def rewritten(
    original: types.FunctionType, rewrite: Callable[[ast.FunctionDef], None], names: Mapping[str, Any]
) -> types.FunctionType | None:
    """`original` without its decorators, as `rewrite` has changed its tree; None where it has no source, or is not as known.

    It runs in the namespace of its module, so that what somebody replaced there is what is called, and with its line numbers.

    Args:
        rewrite: changes the function's tree in place; raises `Unknown` where that is another one.
        names: objects that the changed tree refers to.
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(original))).body
        rewrite(function)
    except (OSError, TypeError, SyntaxError, ValueError, Unknown):
        return None
    function.decorator_list = []
    maker = ast.parse(f"def make({', '.join(names)}):\n    pass").body[0]
    maker.body = [function]
    module = ast.fix_missing_locations(ast.Module([maker], []))
    ast.increment_lineno(module, original.__code__.co_firstlineno - 1)
    made = compile(module, original.__code__.co_filename, "exec")
    outer = next(one for one in made.co_consts if isinstance(one, types.CodeType))
    code = next(one for one in outer.co_consts if isinstance(one, types.CodeType) and one.co_name == function.name)
    cells = tuple(types.CellType(names[name]) for name in code.co_freevars)
    found = types.FunctionType(code, original.__globals__, original.__name__, original.__defaults__, cells)
    found.__kwdefaults__ = original.__kwdefaults__
    return found


def text(node: ast.AST) -> str:
    """The source of a node, in the one spelling that `ast` gives."""
    return ast.unparse(node)
