import json
from pathlib import Path
from typing import Any

import pytest

from ring_train.errors import UserError
from ring_train.jobs.prompt_file import read_prompts

VOCAB_SIZE = 10


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"prompts": 5}, "5 is no list of prompts"),
        ({"prompts": []}, "an empty one"),
        ({"prompts": "12"}, "is no list of prompts"),
        ({"prompts": [5]}, "5 is no list of at least two token ids"),
        ({"prompts": [[1]]}, "at least two"),
        ({"prompts": [[1, "2"]]}, "at least two token ids"),
        ({"prompts": [[1, True]]}, "at least two token ids"),
        ({"prompts": [[1, 2], [3, 10]]}, "token id 10 is outside vocab_size=10"),
        ({"prompts": [[-1, 2]]}, "token id -1 is outside"),
        ([1], "give a JSON file"),
        ({}, "give a JSON file"),
    ],
)
def test_what_is_no_file_of_prompts_is_named(content: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=match):
        read_prompts(path, VOCAB_SIZE)


def test_prompts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": [[0, 9]]}))
    assert read_prompts(path, VOCAB_SIZE) == [[0, 9]]
    with pytest.raises(UserError, match="give a JSON file"):
        read_prompts(tmp_path, VOCAB_SIZE)
