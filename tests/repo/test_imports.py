"""Import rules that import-linter cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.files import ROOT, repository_files

PACKAGES = ("ring_train", "data_pipeline")
SOURCES = [p for p in repository_files(".py") if p.parts[0] in PACKAGES]


def imported_names(path: Path, *, top_level_only: bool = False) -> list[str]:
    """Return dotted names in the order of the file; `from a import b` gives a.b."""
    tree = ast.parse((ROOT / path).read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def is_megatron(name: str) -> bool:
    return name.partition(".")[0] == "megatron"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {parent for p in SOURCES for parent in p.parents if parent != Path(".")}
    missing = [str(f) for f in folders if not (ROOT / f / "__init__.py").is_file()]
    assert not missing, f"import-linter and setuptools do not see them: {missing}"


def test_megatron_is_imported_only_after_the_platform() -> None:
    """A module is safe if its package's __init__ imports the platform before the rest of us."""
    late = []
    for path in SOURCES:
        if path.parts[:2] == ("ring_train", "platform") or path == Path("ring_train/__init__.py"):
            continue
        if not any(is_megatron(name) for name in imported_names(path, top_level_only=True)):
            continue
        candidates = [path, *(parent / "__init__.py" for parent in path.parents[:-1])]
        if not any(platform_comes_first(c) for c in candidates if (ROOT / c).is_file()):
            late.append(str(path))
    assert not late, f"import ring_train.platform first in their package's __init__: {late}"


def platform_comes_first(path: Path) -> bool:
    """Return whether the file imports the platform before megatron or another package of ours."""
    for name in imported_names(path, top_level_only=True):
        if name.startswith("ring_train.platform"):
            return True
        if is_megatron(name) or name.startswith("ring_train."):
            return False
    return False


def test_megatron_training_is_not_a_library() -> None:
    bad = [
        f"{path}: {name}"
        for path in SOURCES
        for name in imported_names(path)
        if is_megatron(name) and not name.startswith("megatron.core")
    ]
    assert not bad, f"import megatron.core alone: {bad}"


def test_only_runtime_touches_parallel_state() -> None:
    touching = {
        str(path)
        for path in SOURCES
        for name in imported_names(path)
        if name.startswith("megatron.core.parallel_state") or name.endswith(".mpu")
    }
    assert touching <= {"ring_train/runtime/distributed.py"}


def test_fla_is_imported_in_one_file_at_most() -> None:
    using = {str(p) for p in SOURCES for n in imported_names(p) if n.partition(".")[0] == "fla"}
    assert len(using) <= 1, using


@pytest.mark.parametrize("module", ["ring_train.config", "ring_train.plan", "ring_train.errors"])
def test_plans_are_made_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
