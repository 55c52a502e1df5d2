# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_masking.py
"""Secrets are taken out of a configuration by their names, and nothing else is."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from verl.trainer.config import PPOConfig, load_config
from verl.utils.masking import MASK, is_secret, masked

SECRETS = (
    "key token secret password api_key api_keys openaiApiKey OPENAI_API_KEY x-api-key hf_token accessToken "
    "db_password client_secret credentials Authorization judge_key token_of_judge private_key_path basic_auth"
)
HARMLESS = (
    "prompt_key answer_key filter_key image_key max_tokens max_new_tokens num_tokens token_weight_clip eos_token "
    "enable_token_weights token_signals_to_log pad_token_id token_budget tokenizer_path monkey keyboard author "
    "stop_token"
)


@pytest.mark.parametrize(("names", "expected"), [(SECRETS, True), (HARMLESS, False)], ids=["secrets", "harmless"])
def test_names_tell_secrets_apart(names: str, expected: bool) -> None:
    assert [name for name in names.split() if is_secret(name) != expected] == []


def names_of(section: type) -> Iterator[str]:
    hints = get_type_hints(section)
    for field in fields(section):
        yield field.name
        if is_dataclass(hints[field.name]):
            yield from names_of(hints[field.name])


def test_no_key_of_the_configuration_itself_is_taken_for_a_secret() -> None:
    names = set(names_of(PPOConfig))
    assert {"prompt_key", "filter_key", "token_weight_clip", "reward_function_kwargs"} <= names
    assert {name for name in names if is_secret(name)} == set()
    config = load_config([]).to_dict()
    assert json.dumps(masked(config)) == json.dumps(config)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"api_key": "abc", "n": 3}, {"api_key": MASK, "n": 3}),
        ({"password": 12345, "token": None, "auth": True}, {"password": MASK, "token": None, "auth": True}),
        ({"credentials": {"user": "a"}, "keys": ["a", "b"]}, {"credentials": MASK, "keys": MASK}),
        ({"judges": [{"token": "a", "name": "b"}]}, {"judges": [{"token": MASK, "name": "b"}]}),
        ("https://bob:pw@host:80/v1", f"https://{MASK}@host:80/v1"),
        ("redis://:p@ss@host/0", f"redis://{MASK}@host/0"),
        ("http://host/v1?api_key=abc&model=m#key=1", f"http://host/v1?api_key={MASK}&model=m#key=1"),
        ("http://host/path@at?q=a@b", "http://host/path@at?q=a@b"),
        ("me@example.org", "me@example.org"),
        ("ask a://b and https://u:p@c twice https://v@d", f"ask a://b and https://{MASK}@c twice https://{MASK}@d"),
    ],
)
def test_secrets_are_masked_wherever_they_stand(given: Any, expected: Any) -> None:
    assert masked(given) == expected
