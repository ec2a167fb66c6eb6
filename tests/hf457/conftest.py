"""Options that add an exported folder to the golden ones; see test_exported_folder.py."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hf-dir", help="exported folder to check besides the golden ones")
    parser.addoption("--prompts", help="JSON {prompts: [[ids]]} that the trainer scored")
    parser.addoption("--scores", help="JSON {logprobs: [[...]]} that the trainer wrote for them")
