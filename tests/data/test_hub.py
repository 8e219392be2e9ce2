"""Which files of a repository belong to a configuration."""

import pytest

from doge_lm.data.hub import card_configs, choose_files
from doge_lm.errors import UserError

PATHS = [
    "README.md",
    "a/train-00001.parquet",
    "a/train-00000.parquet",
    "a/test-00000.parquet",
    "a/deep/train-00002.parquet",
    "b.jsonl",
    "ab/x.jsonl.zst",
]


@pytest.mark.parametrize(
    ("configs", "config", "expected"),
    [
        ({"a": ["a/train-*"]}, "a", ["a/train-00000.parquet", "a/train-00001.parquet"]),
        ({"a": ["a/**"]}, "a", [PATHS[4], PATHS[3], PATHS[2], PATHS[1]]),
        ({"a": ["**/train-0000[!0].parquet"]}, "a", ["a/deep/train-00002.parquet", "a/train-00001.parquet"]),
        ({"a": ["./ab/"]}, "a", ["ab/x.jsonl.zst"]),
        ({"a": ["b.jsonl", "a/train-0000?.parquet", "b.jsonl"]}, "a", ["b.jsonl", PATHS[2], PATHS[1]]),
        ({}, "a", [PATHS[4], PATHS[3], PATHS[2], PATHS[1]]),
        ({}, "none", []),
        ({"only": ["b.*"]}, None, ["b.jsonl"]),
        ({"one": ["b.*"], "default": ["ab/*"]}, None, ["ab/x.jsonl.zst"]),
        ({}, None, [PATHS[4], PATHS[3], PATHS[2], PATHS[1], "ab/x.jsonl.zst", "b.jsonl"]),
    ],
)
def test_the_files_of_a_configuration(configs: dict[str, list[str]], config: str | None, expected: list[str]) -> None:
    assert choose_files(PATHS, configs, config) == expected


def test_the_head_of_a_card() -> None:
    card = """---
license: odc-by
configs:
- config_name: a
  data_files:
  - split: train
    path: [a/train-*, b]
  - split: test
    path: a/test-*
- config_name: 7
  data_files: x/*
- config_name: listed
  data_files: [one, two]
- config_name: without
---
# Title
"""
    expected = {"a": ["a/train-*", "b"], "7": ["x/*"], "listed": ["one", "two"]}
    assert card_configs(card) == expected
    assert card_configs(card.replace("\n", "\r\n")) == expected
    assert card_configs("# no head") == {}
    assert card_configs("---\nno mapping\n---\n") == {}
    with pytest.raises(UserError, match=r"README\.md on the hub does not begin with valid YAML"):
        card_configs("---\na: [\n---\n")
