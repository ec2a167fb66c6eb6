"""The commands that README, Makefile and CI name exist, and the legal files are there."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.repo.files import ROOT, repository_files

DOCUMENTS = [p for p in repository_files(".md") if p.parts[0] in ("README.md", "docs", "conf")]
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))


def commands(pattern: str) -> set[tuple[str, str]]:
    """Return (document, name) of each match of the pattern's group in the documents."""
    return {
        (str(path), name)
        for path in DOCUMENTS
        for name in re.findall(pattern, (ROOT / path).read_text())
    }


def test_make_has_the_targets_that_documents_name() -> None:
    named = commands(r"(?:`|^|\$ )make ([a-z][a-z0-9-]+)")
    missing = {pair for pair in named if pair[1] not in MAKE_TARGETS}
    assert not missing
    assert {"install", "demo", "test", "check", "test-unit", "test-hf457"} <= MAKE_TARGETS


def test_modules_that_documents_run_exist() -> None:
    named = commands(r"-m ((?:ring_train|data_pipeline)(?:\.\w+)+)")
    missing = {
        (document, module)
        for document, module in named
        if not module.endswith(".NAME")
        and not (ROOT / (module.replace(".", "/") + ".py")).is_file()
        and not (ROOT / module.replace(".", "/") / "__main__.py").is_file()
    }
    assert not missing


def test_files_that_documents_link_exist() -> None:
    missing = [
        f"{path}: {target}"
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / path).read_text())
        if "://" not in target and not (ROOT / path.parent / target).exists()
    ]
    assert not missing


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, "chmod +x .ci/run"
    assert "make test" in script.read_text()


@pytest.mark.parametrize(
    "target", ["install", "demo", "demo-sft", "test", "check", "test-hf457", "test-serving"]
)
def test_make_can_plan_each_target(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if target not in ("test-hf457", "test-serving"):
        assert "uv pip sync" in done.stdout, "each target installs first what is missing"


def test_licence_and_notice_are_there() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for source in ("Ling-V2", "Ring-V2.5", "flash-linear-attention", "megatron-core", "golden"):
        assert source in notice


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda p: p.name)
def test_requirements_are_pinned_and_hashed(path: Path) -> None:
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", re.sub(r"^#.*\n", "", path.read_text(), flags=re.M))
    for block in blocks:
        name = block.split()[0]
        assert re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[^\s]+$", name), f"{name} is not pinned"
        assert "--hash=sha256:" in block, f"{name} has no hash"


def test_the_project_pins_what_the_environment_pins() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    locked = (ROOT / "requirements/dev.txt").read_text()
    for name in ("torch", "triton", "megatron-core", "hydra-core", "omegaconf"):
        pin = re.search(rf'"({name}==[^"]+)"', project)
        assert pin, f"pyproject.toml does not pin {name}"
        assert f"\n{pin.group(1)} " in locked
