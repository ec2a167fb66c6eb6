"""What no committed file may contain."""

import re

import pytest

from tests.repo.files import ROOT, text_files

OURS = "tests/repo/"
TASK_WORDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
WITH_ISSUE = re.compile(r"\b(TODO|FIXME)\b.*(#\d+|[<>=]=?\s*\d+\.\d+)")
MACHINE_PATHS = re.compile(r"(?<![\w.:/-])/(root|home|work|mnt|Users|usr/local|data|workspace)/\w")
INDEX_OPTIONS = re.compile(r"--(extra-)?index-url|--find-links|--trusted-host|file://(?!\{)")
URLS = re.compile(r"https?://([^/\s\"')>]+)")
ALLOWED_HOSTS = {
    "arxiv.org",
    "github.com",
    "huggingface.co",
    "www.apache.org",
    "keepachangelog.com",
    "localhost",
    "127.0.0.1",
}
SECRETS = re.compile(r"(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})")


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """Return 'path:line: text' of each match outside of this folder."""
    found = []
    for path in text_files():
        if str(path).startswith(OURS):
            continue
        lines = (ROOT / path).read_text().splitlines()
        found += [
            f"{path}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    return found


def test_text_is_ascii() -> None:
    other = [str(path) for path in text_files() if not (ROOT / path).read_bytes().isascii()]
    assert not other, f"ASCII only: {other}"


def test_lines_end_without_blanks_and_files_with_a_newline() -> None:
    wrong = []
    for path in text_files():
        text = (ROOT / path).read_text()
        if path.suffix in (".py", ".yaml", ".toml", ".md", "") and text:
            if re.search(r"[ \t]+$", text, re.MULTILINE) and path.name != "LICENSE":
                wrong.append(f"{path}: blanks at the end of a line")
            if not text.endswith("\n"):
                wrong.append(f"{path}: no newline at the end")
    assert not wrong


def test_a_task_left_open_names_its_issue() -> None:
    open_tasks = [line for line in lines_matching(TASK_WORDS) if not WITH_ISSUE.search(line)]
    assert not open_tasks


@pytest.mark.parametrize(
    ("pattern", "way_out"),
    [
        (MACHINE_PATHS, "use a path relative to the repository or an option"),
        (INDEX_OPTIONS, "where packages come from is a matter of the machine"),
        (SECRETS, "revoke it and take it out of the history"),
    ],
)
def test_nothing_tells_of_one_machine(pattern: re.Pattern[str], way_out: str) -> None:
    found = lines_matching(pattern)
    assert not found, f"{way_out}: {found}"


def test_links_lead_to_public_places() -> None:
    hosts = {
        host: str(path)
        for path in text_files()
        if not str(path).startswith(OURS)
        for host in URLS.findall((ROOT / path).read_text())
        if "$" not in host and "{" not in host and host.split(":")[0] not in ALLOWED_HOSTS
    }
    assert not hosts, f"add a host here only if any reader can reach it: {hosts}"


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (TASK_WORDS, "# TODO(#12): split", True),
        (WITH_ISSUE, "# TODO(#12): split", True),
        (WITH_ISSUE, "# TODO with megatron-core >= 0.20", True),
        (WITH_ISSUE, "# TODO: split", False),
        (MACHINE_PATHS, 'open("/home/me/x")', True),
        (MACHINE_PATHS, "runs/demo/data/x", False),
        (INDEX_OPTIONS, "--index-url x", True),
    ],
)
def test_the_patterns_find_what_they_should(
    pattern: re.Pattern[str], text: str, matches: bool
) -> None:
    assert bool(pattern.search(text)) is matches
