# SPDX-License-Identifier: Apache-2.0
"""Applies the user's Python function to responses, and says which sample is to blame when that fails.

The function lives in any file, takes one dict a sample and returns one:

    REWARD_TYPE = "batch"  # a list of samples at a time; "sequential": one sample at a time

    def compute_score(reward_inputs: list[dict], **reward_function_kwargs) -> list[dict[str, float]]:
        return [{"overall": float(sample["response"] == sample["ground_truth"])} for sample in reward_inputs]

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from verl.utils.user_code import find_function, load_module
from verl.workers.reward.config import RewardConfig

KEY = "worker.reward.reward_function"

TOKEN_WEIGHTS = "token_weights"
"""The one key of a result that is no metric: a list of one weight per response token, or None."""

LARGEST_NUMBER = 1e15
"""Beyond it the variance of a batch of rewards may not fit into float32, in which advantages are computed."""

IF_SEQUENTIAL = 'If the function takes one sample at a time, put REWARD_TYPE = "sequential" in its file'


class TextDecoder(Protocol):
    """A tokenizer, or what of it decodes."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


class RewardFunction:
    """The function that `config.reward_function` names, and how it is applied to samples.

    Args:
        config: `reward_function` is `path.py:name`; `reward_function_kwargs` are handed to every call.
        decoder: turns the responses' token ids into text; None where nothing will be scored.
        prefix: what the chat template wrote of every answer before the policy went on (`prefilled_text`).

    Raises:
        ValueError: there is no such function, the keyword arguments do not fit it, or the module's `REWARD_TYPE` is
            neither `batch` nor `sequential`.
    """

    def __init__(self, config: RewardConfig, decoder: TextDecoder | None, prefix: str = "") -> None:
        if config.reward_function is None:
            raise ValueError(
                "worker.reward.reward_function is not set; name a function as path/to/file.py:function, "
                "e.g. examples/reward_function/math.py:compute_score"
            )
        self.config = config
        self.decoder = decoder
        self.prefix = prefix
        path, function_name = config.reward_function.rsplit(":", maxsplit=1)
        module = load_module(path, KEY)
        self._function = find_function(module, function_name, KEY)
        self._check_kwargs()
        self._text_of_token = cache(lambda token_id: decoder.decode([token_id], skip_special_tokens=False))
        self.reward_type = getattr(module, "REWARD_TYPE", "batch")
        if self.reward_type not in ("batch", "sequential"):
            raise ValueError(
                f"REWARD_TYPE = {self.reward_type!r} in {path} must be 'batch' (the function takes a list of samples) "
                "or 'sequential' (it takes one)"
            )

    def score(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The dict that each sample gets: its numbers as floats, and `token_weights` as it was returned.

        A sample has `response_ids` (one-dimensional, its tokens) and what else the function gets beside the response's
        texts and length: `ground_truth`, `prompt` (text), `uid` (the same for all responses to one prompt), `images`
        and `videos` (handles; `.load()` gives the PIL image, or an object with `frames` (T, H, W, 3)), `extra` (the
        dataset row's other columns), `step`, `split` (`train` or `val`). To these come `response` (text), `prefix`
        (what the chat template wrote before it, such as `<think>`), `response_length` (tokens) and `response_tokens`
        (the text of each token; a character that several tokens share shows as a replacement character in each).

        The function returns a dict of numbers a sample: `overall` is the reward; all become metrics, and those other
        than `overall` may be left out where they do not apply. One more key, `token_weights`, may hold a list of one
        weight per response token, or None.

        Raises:
            RuntimeError: the function raised; its own exception is the cause.
            ValueError: the wrong number of results, a result without `overall`, or a value that is not a finite
                number.
        """
        samples = [self._with_texts(sample) for sample in samples]
        return [
            {
                key: value if key == TOKEN_WEIGHTS else self._number(key, value, index, sample)
                for key, value in result.items()
            }
            for index, (sample, result) in enumerate(zip(samples, self._results_of(samples), strict=True))
        ]

    def _with_texts(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        ids = sample["response_ids"].tolist()
        return {
            "response": self.decoder.decode(ids, skip_special_tokens=self.config.skip_special_tokens),
            "prefix": self.prefix,
            "response_length": len(ids),
            "response_tokens": [self._text_of_token(token_id) for token_id in ids],
            **{key: value for key, value in sample.items() if key != "response_ids"},
        }

    def _results_of(self, samples: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
        """Calls the function, on copies lest it changes what later errors show, and checks for one dict a sample."""
        if self.reward_type == "sequential":
            results = [self._score_one(index, sample) for index, sample in enumerate(samples)]
        else:
            results = self._score_batch(samples)
        for index, (sample, result) in enumerate(zip(samples, results, strict=True)):
            if not isinstance(result, Mapping) or "overall" not in result:
                raise ValueError(
                    f"{self._function_label} returned {_shorten(result)} for {_describe(index, sample)}; "
                    "it must return a dict of numbers with the key 'overall', the reward"
                )
        return results

    def _score_one(self, index: int, sample: dict[str, Any]) -> Any:
        try:
            return self._function(dict(sample), **self.config.reward_function_kwargs)
        except Exception as error:
            raise self._raised(error, _describe(index, sample)) from error

    def _score_batch(self, samples: list[dict[str, Any]]) -> list[Any]:
        try:
            results = self._call(samples)
        except Exception as error:
            raise self._guilty(error, samples) from error
        if not isinstance(results, list):
            raise ValueError(
                f"{self._function_label} returned a {type(results).__name__} for a list of {len(samples)} samples; "
                f"it must return a list of one dict a sample. {IF_SEQUENTIAL}"
            )
        if len(results) != len(samples):
            last = min(len(results), len(samples)) - 1
            end = f"the last with a result is {_describe(last, samples[last])}" if results else "none has a result"
            raise ValueError(
                f"{self._function_label} returned {len(results)} results for {len(samples)} samples; {end}. "
                "It must return one dict a sample, in the same order"
            )
        return results

    def _call(self, samples: list[dict[str, Any]]) -> Any:
        """The results as a list, whatever they come in; what cannot be one result a sample comes as it is."""
        results = self._function([dict(sample) for sample in samples], **self.config.reward_function_kwargs)
        several = isinstance(results, Iterable) and not isinstance(results, (Mapping, str))
        return list(results) if several else results

    def _guilty(self, error: Exception, samples: list[dict[str, Any]]) -> RuntimeError:
        """The error with the sample it is for: a list says nothing of that, so it is halved until one is left.

        A call per sample would be simpler, and hours where a call asks a slow judge.
        """
        first, end = 0, len(samples)
        while end - first > 1:
            middle = (first + end) // 2
            for half in ((first, middle), (middle, end)):
                try:
                    self._call(samples[slice(*half)])
                except Exception as narrower:  # noqa: BLE001  the user's code raises anything
                    error = narrower
                    first, end = half
                    break
            else:
                break
        blame = _describe(first, samples[first])
        if end - first > 1:
            blame = f"samples {first} to {end - 1} together, though for neither half alone; the first is {blame}"
        return self._raised(error, f"{blame}. {IF_SEQUENTIAL}")

    def _number(self, key: str, value: Any, index: int, sample: dict[str, Any]) -> float:
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except OverflowError:  # an integer beyond any float
            number = math.inf
        except (TypeError, ValueError, RuntimeError):  # the last by tensors of several elements
            number = math.nan
        if not abs(number) <= LARGEST_NUMBER:
            raise ValueError(
                f"{self._function_label} returned {key!r}: {_shorten(value)} for {_describe(index, sample)}; "
                f"every value but {TOKEN_WEIGHTS!r} must be a number between -1e15 and 1e15"
            )
        return number

    def _raised(self, error: Exception, blame: str) -> RuntimeError:
        return RuntimeError(f"{self._function_label} raised {type(error).__name__}: {error} for {blame}")

    @property
    def _function_label(self) -> str:
        return f"the reward function {self.config.reward_function}"

    def _check_kwargs(self) -> None:
        kwargs = self.config.reward_function_kwargs
        signature = inspect.signature(self._function)
        try:
            signature.bind([], **kwargs)
        except TypeError as error:
            separate = any(name.startswith("ground_truth") for name in signature.parameters)
            remedy = '; read sample["response"] and sample["ground_truth"] of each dict instead' if separate else ""
            raise ValueError(
                f"{self._function_label} has the signature {signature}, which does not fit one positional argument "
                f"(a list of sample dicts, or one with REWARD_TYPE = 'sequential') and "
                f"worker.reward.reward_function_kwargs={kwargs}: {error}{remedy}"
            ) from error


def values_by_key(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every key of the samples' results with its values, one from each sample that has it.

    `token_weights` alone, where any sample has it, has one entry a sample, None for those without.
    """
    keys = dict.fromkeys(key for result in results for key in result)
    values = {key: [result[key] for result in results if key in result] for key in keys}
    if TOKEN_WEIGHTS in keys:
        values[TOKEN_WEIGHTS] = [result.get(TOKEN_WEIGHTS) for result in results]
    return values


def _describe(index: int, sample: dict[str, Any]) -> str:
    """A sample in an error: where it stands, and enough to recognise it by."""
    return (
        f"sample {index} (uid {sample['uid']}, ground_truth {_shorten(sample['ground_truth'])}, "
        f"response {_shorten(sample['response'])})"
    )


def _shorten(value: Any, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
