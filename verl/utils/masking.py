# SPDX-License-Identifier: Apache-2.0
"""Removes secrets from logs: values of keys that are named like secrets, and secrets in URLs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

SECRET_WORDS = frozenset(
    "secret secrets password passwords passwd passphrase pwd credential credentials authorization auth bearer cookie "
    "apikey apikeys".split()
)

AMBIGUOUS_WORDS = frozenset(("key", "keys", "token"))
"""Words that mark a secret unless a harmless word is beside them: `api_key`, but not `prompt_key`; `hf_token`, but not
`eos_token` or `token_weight_clip`."""

HARMLESS_NEIGHBOURS = frozenset(
    "prompt question answer response output input image video audio text message label column row filter sort group "
    "score reward metric eos bos pad unk sep cls mask stop start end first last next special per weight weights "
    "signal signals id ids level type count limit budget length penalty".split()
)

USER_OF_URL = re.compile(r"(?<=://)[^/?#\s]*(?=@)")
PARAMETER_OF_URL = re.compile(r"(?<=[?&])([^=&#\s]+)=([^&#\s]+)")


def is_secret(name: str) -> bool:
    """Whether the value of a key with this name is likely a secret. Plurals such as `max_tokens` are not."""
    words = [word.lower() for word in WORD.findall(name)]
    if SECRET_WORDS & set(words):
        return True
    return any(
        word in AMBIGUOUS_WORDS and not HARMLESS_NEIGHBOURS & set(words[max(place - 1, 0) : place + 2])
        for place, word in enumerate(words)
    )


def masked(value: Any) -> Any:
    """A copy of plain dicts and lists with `MASK` in place of secrets.

    The whole value of a key that is named like a secret is masked, unless it is null or a switch. In all texts, the
    user, the password and secret parameters of URLs are masked.
    """
    if isinstance(value, Mapping):
        return {key: MASK if _hides(key, item) else masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    if isinstance(value, str) and "://" in value:
        return PARAMETER_OF_URL.sub(_masked_parameter, USER_OF_URL.sub(MASK, value))
    return value


def _hides(key: Any, item: Any) -> bool:
    return item is not None and not isinstance(item, bool) and is_secret(str(key))


def _masked_parameter(match: re.Match[str]) -> str:
    name, content = match.groups()
    return f"{name}={MASK if is_secret(name) else content}"
