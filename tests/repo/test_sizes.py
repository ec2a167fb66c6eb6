"""Modules and functions stay small; what exceeds a limit is named here with its reason."""

import ast
from pathlib import Path

import pytest

from tests.repo.files import ROOT, repository_files

MODULE_SOFT, MODULE_HARD = 250, 400
FUNCTION_HARD = 60
MAX_PARAMETERS = 7

LONG_MODULES: dict[str, str] = {
    "tests/exports/mutants.py": "one table of faults",
    "ring_train/hf/modeling/modeling_bailing_moe_v2.py": "travels in exported folders as one file",
}
"""Path -> why it may exceed the hard limit (a table, a kernel, a file that must travel alone)."""
LONG_FUNCTIONS: dict[str, str] = {}
"""path:function -> why it may exceed the hard limit."""

MANY_PARAMETERS: dict[str, str] = {
    "ring_train/ops/lightning.py:lightning_attention": "the arguments of every such kernel (fla)",
}
"""path:function -> why a record would not make it clearer."""

MODULES = repository_files(".py")


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions of a module but kernels, which take no records and call little."""
    tree = ast.parse((ROOT / path).read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [function for function in found if not is_kernel(function)]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def num_lines(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_no_module_exceeds_the_hard_limit() -> None:
    sizes = {str(path): num_lines(path) for path in MODULES}
    too_long = {p: n for p, n in sizes.items() if n > MODULE_HARD and p not in LONG_MODULES}
    assert not too_long, f"split these, at most {MODULE_HARD} lines: {too_long}"


def test_most_modules_stay_below_the_soft_limit() -> None:
    sizes = {str(path): num_lines(path) for path in MODULES}
    above = {path: lines for path, lines in sizes.items() if lines > MODULE_SOFT}
    assert len(above) <= len(sizes) // 10, f"more than a tenth is above {MODULE_SOFT}: {above}"


def test_no_function_exceeds_the_hard_limit() -> None:
    too_long = {
        f"{path}:{function.name}": lines
        for path in MODULES
        for function in functions_of(path)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_HARD
        and f"{path}:{function.name}" not in LONG_FUNCTIONS
    }
    assert not too_long, f"split these, at most {FUNCTION_HARD} lines: {too_long}"


def test_no_function_has_too_many_parameters() -> None:
    too_many = {
        f"{path}:{function.name}": count
        for path in MODULES
        if "tests" not in path.parts and "modeling" not in path.parts
        for function in functions_of(path)
        if (count := num_parameters(function)) > MAX_PARAMETERS
        and f"{path}:{function.name}" not in MANY_PARAMETERS
    }
    assert not too_many, f"a record is missing, at most {MAX_PARAMETERS} parameters: {too_many}"


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the parameters a caller gives: neither self nor *args and **kwargs."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    return len([n for n in names if n not in ("self", "cls")]) + len(function.args.kwonlyargs)


@pytest.mark.parametrize("listed", [LONG_MODULES, LONG_FUNCTIONS, MANY_PARAMETERS])
def test_exceptions_name_files_that_exist(listed: dict[str, str]) -> None:
    gone = [key for key in listed if not (ROOT / key.split(":")[0]).is_file()]
    assert not gone, f"remove {gone} from the exceptions"
