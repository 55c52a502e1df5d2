# SPDX-License-Identifier: Apache-2.0
"""Applies the user's Python function to responses, and names the sample that causes an error.

The function can be in any file. It takes one dict per sample and returns one:

    REWARD_TYPE = "batch"  # a list of samples at a time; "sequential": one sample at a time

    def compute_score(reward_inputs: list[dict], **reward_function_kwargs) -> list[dict[str, float]]:
        return [{"overall": float(sample["response"] == sample["ground_truth"])} for sample in reward_inputs]

With REWARD_TYPE = "proto" it takes the whole batch (`batch_function.py`).

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, Protocol

from verl.config import cut
from verl.utils.user_code import find_function, load_module
from verl.workers.reward.calls import CallFailed, Calls, Watch, unwatched
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.results import TOKEN_WEIGHTS, Scored, is_columns, rows_of, shorten, to_number

KEY = "worker.reward.reward_function"

REWARD_TYPES = {
    "batch": "a list of sample dicts",
    "sequential": "one sample dict",
    "proto": "the whole batch, a DataProto",
}
"""The function's argument, by the REWARD_TYPE in its file."""

OTHER_TYPES = (
    'If the function takes one sample at a time, put REWARD_TYPE = "sequential" in its file; if it takes the whole '
    'DataProto, REWARD_TYPE = "proto"'
)

NO_RESULTS = {"float", "int", "bool", "str", "None", "Tensor", "torch.Tensor", "np.ndarray", "numpy.ndarray"}
"""Annotations of results that are wrong for every kind of function."""


class TextDecoder(Protocol):
    """A tokenizer, or a part of it that decodes."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


def load_reward_function(
    config: RewardConfig, decoder: TextDecoder | None, prefix: str = "", watch: Watch = unwatched
) -> RewardFunction:
    """The function that `config.reward_function` names, ready to score.

    Args:
        config: `reward_function` is `path.py:name`; `reward_function_kwargs` are passed to every call.
        decoder: turns the responses' token ids into text; None if nothing will be scored.
        prefix: the beginning of every answer that the chat template writes (`prefilled_text`).
        watch: guards every call that has a time limit.

    Raises:
        ValueError: the function does not exist, does not take the keyword arguments, is annotated with wrong types,
            or the module's `REWARD_TYPE` is none of `REWARD_TYPES`.
    """
    if config.reward_function is None:
        raise ValueError(
            "worker.reward.reward_function is not set; name a function as path/to/file.py:function, "
            "e.g. examples/reward_function/math.py:compute_score"
        )
    path = config.reward_function.rpartition(":")[0]
    module = load_module(path, KEY)
    reward_type = getattr(module, "REWARD_TYPE", "batch")
    if reward_type not in REWARD_TYPES:
        meanings = "; ".join(f"{name!r}: it takes {argument}" for name, argument in REWARD_TYPES.items())
        raise ValueError(f"REWARD_TYPE = {reward_type!r} in {path} must be one of: {meanings}")
    if (reward_type == "proto") != config.takes_batch:
        raise ValueError(f'{path}: assign REWARD_TYPE = "proto" at the top level: it is read before the file runs')
    if reward_type != "proto":
        return SampleFunction(config, module, decoder, prefix, watch)
    from verl.workers.reward.batch_function import BatchFunction  # loads torch

    return BatchFunction(config, module, decoder, prefix, watch)


class RewardFunction(ABC):
    """Applies the user's function. `load_reward_function` creates it."""

    def __init__(
        self, config: RewardConfig, module: ModuleType, decoder: TextDecoder | None, prefix: str, watch: Watch
    ) -> None:
        self.config = config
        self.module = module
        self.reward_type = getattr(module, "REWARD_TYPE", "batch")
        self._decoder = decoder
        self._prefix = prefix
        self._function = find_function(module, config.reward_function.rpartition(":")[2], KEY)
        self._check_signature()
        self._text_of_token = cache(lambda token_id: decoder.decode([token_id], skip_special_tokens=False))
        function = partial(self._function, **config.reward_function_kwargs)
        self._calls = Calls(function, self._copy, config.timeout_s, config.max_concurrency, watch)

    @abstractmethod
    def score(self, inputs: Any) -> Scored:
        """Scores the samples of a batch.

        Raises:
            RuntimeError: the function failed or took too long, twice; its exception is the cause.
            ValueError: the function returned a wrong result; the message names the sample.
        """

    @abstractmethod
    def _copy(self, argument: Any) -> Any:
        """A copy of the argument of a call, which the function may change."""

    def _texts(self, token_ids: list[int]) -> dict[str, Any]:
        return {
            "response": self._decoder.decode(token_ids, skip_special_tokens=self.config.skip_special_tokens),
            "prefix": self._prefix,
            "response_length": len(token_ids),
            "response_tokens": [self._text_of_token(token_id) for token_id in token_ids],
        }

    def _checked(self, results: Sequence[Any], samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The results as one dict per sample, with numbers as floats."""
        checked = []
        for index, (sample, result) in enumerate(zip(samples, results, strict=True)):
            if not isinstance(result, Mapping) or "overall" not in result:
                raise ValueError(
                    f"{self._label} returned {shorten(result)} for {describe(index, sample)}; "
                    "it must return a dict of numbers with the key 'overall', the reward"
                )
            try:
                checked.append(
                    {key: value if key == TOKEN_WEIGHTS else to_number(key, value) for key, value in result.items()}
                )
            except ValueError as error:
                raise ValueError(
                    f"{self._label} {error} for {describe(index, sample)}; "
                    f"every value but {TOKEN_WEIGHTS!r} must be a number between -1e15 and 1e15"
                ) from None
        return checked

    def _raised(self, error: BaseException, blame: str, first: BaseException | None = None) -> str:
        """first: exception of an earlier call, added to the message if it differs."""
        text = f"{self._label} raised {_named(error)} for {blame}"
        is_other = first is not None and _named(first) != _named(error)
        return f"{text} (the first call raised {_named(first)})" if is_other else text

    def _failures(self, failures: Mapping[int, BaseException], blame: Callable[[int], str]) -> list[str]:
        return [
            f"{self._raised(error, blame(index))}; the second call succeeded, and its result is used"
            for index, error in failures.items()
        ]

    @property
    def _label(self) -> str:
        return f"the reward function {self.config.reward_function}"

    def _check_signature(self) -> None:
        kwargs = self.config.reward_function_kwargs
        signature = inspect.signature(self._function)
        try:
            signature.bind([], **kwargs)
        except TypeError as error:
            separate = any(name.startswith("ground_truth") for name in signature.parameters)
            remedy = '; read sample["response"] and sample["ground_truth"] of each dict instead' if separate else ""
            raise ValueError(
                f"{self._label} has the signature {signature}, which does not fit one positional argument "
                f"({REWARD_TYPES[self.reward_type]}) and "
                f"worker.reward.reward_function_kwargs={kwargs}: {error}{remedy}. {OTHER_TYPES}"
            ) from error
        taken = _name_of_type(next(iter(signature.parameters.values())).annotation)
        if taken.endswith("DataProto") and self.reward_type != "proto":
            raise ValueError(f'{self._label} takes a DataProto; put REWARD_TYPE = "proto" in its file')
        returned = _name_of_type(signature.return_annotation)
        if returned in NO_RESULTS:
            raise ValueError(
                f"{self._label} is annotated to return {returned}; {self._right_forms}, with the key 'overall'"
            )

    @property
    def _right_forms(self) -> str:
        return {
            "batch": "it must return a list of one dict a sample, or a dict of columns with one value a sample",
            "sequential": "it must return a dict",
            "proto": "it must return (rewards, columns), or a dict of columns with one value a sample",
        }[self.reward_type]


class SampleFunction(RewardFunction):
    """A function of one sample dict, or of a list of sample dicts."""

    def score(self, inputs: Sequence[Mapping[str, Any]]) -> Scored:
        """Scores samples, as `RewardFunction.score`.

        A sample has `response_ids` (one-dimensional, its tokens) and all inputs of the function except the response's
        texts and length: `ground_truth`, `prompt` (text), `uid` (the same for all responses to one prompt), `images`
        and `videos` (handles; `.load()` gives the PIL image, or an object with `frames` (T, H, W, 3)), `extra` (the
        dataset row's other columns), `step`, `split` (`train` or `val`). This class adds `response` (text), `prefix`
        (text that the chat template wrote before it, such as `<think>`), `response_length` (tokens) and
        `response_tokens` (the text of each token; a character that several tokens share shows as a replacement
        character in each).

        The function returns a dict of numbers per sample, or, given a list, a dict of columns. `overall` is the
        reward. All numbers become metrics; all but `overall` may be omitted for samples to which they do not apply.
        One more key, `token_weights`, may hold a list of one weight per response token, or None.
        """
        samples = [
            {
                **self._texts(sample["response_ids"].tolist()),
                **{key: value for key, value in sample.items() if key != "response_ids"},
            }
            for sample in inputs
        ]
        results, failures = (self._one_by_one if self.reward_type == "sequential" else self._all)(samples)
        return Scored(self._checked(results, samples), failures)

    def _copy(self, argument: Any) -> Any:
        return list(map(_copied, argument)) if self.reward_type == "batch" else _copied(argument)

    def _one_by_one(self, samples: list[dict[str, Any]]) -> tuple[list[Any], list[str]]:
        def blame(index: int | None) -> str:
            return f"one of {len(samples)} samples" if index is None else describe(index, samples[index])

        try:
            answers = self._calls.each(samples, blame)
        except CallFailed as failure:
            message = self._raised(failure.__cause__, blame(failure.index), failure.first)
            raise RuntimeError(message) from failure.__cause__
        return answers.results, self._failures(answers.failures, blame)

    def _all(self, samples: list[dict[str, Any]]) -> tuple[list[Any], list[str]]:
        all_samples = f"samples 0 to {len(samples) - 1}"

        def whole(_: int | None) -> str:
            return f"{all_samples}, starting with {describe(0, samples[0])}"

        try:
            answers = self._calls.each([samples], whole)
        except CallFailed as failure:
            raise self._blame_sample(failure, samples) from failure.__cause__
        failures = self._failures(answers.failures, lambda _: all_samples)
        return self._rows(answers.results[0], samples), failures

    def _rows(self, returned: Any, samples: list[dict[str, Any]]) -> list[Any]:
        """One result per sample, from a list or from columns."""
        if isinstance(returned, Mapping) and is_columns(returned):
            try:
                return rows_of(returned, len(samples))
            except ValueError as error:
                raise ValueError(f"{self._label} {error}. {self._right_forms}") from None
        if isinstance(returned, (Mapping, str)) or not isinstance(returned, Iterable):
            raise ValueError(
                f"{self._label} returned {type(returned).__name__} for a list of {len(samples)} samples; "
                f"{self._right_forms}. {OTHER_TYPES}"
            )
        results = list(returned)
        if len(results) != len(samples):
            last = min(len(results), len(samples)) - 1
            end = f"the last with a result is {describe(last, samples[last])}" if results else "none has a result"
            raise ValueError(
                f"{self._label} returned {len(results)} results for {len(samples)} samples; {end}. "
                f"In the samples' order, {self._right_forms}"
            )
        return results

    def _blame_sample(self, failure: CallFailed, samples: list[dict[str, Any]]) -> RuntimeError:
        """The error with the sample that causes it. The list is halved until one sample is left.

        One call per sample would be simpler, but could take hours with a slow judge.
        """
        error = failure.__cause__
        first, end = 0, len(samples)
        while end - first > 1 and not isinstance(error, TimeoutError):  # waiting for the limit again would not help
            middle = (first + end) // 2
            for half in ((first, middle), (middle, end)):
                try:
                    self._calls.once(samples[slice(*half)], partial("samples {} to {}".format, half[0], half[1] - 1))
                except CallFailed as narrower:
                    error = narrower.__cause__
                    first, end = half
                    break
            else:
                break
        blame = describe(first, samples[first])
        if end - first > 1:
            alone = "" if isinstance(error, TimeoutError) else ", though for neither half alone"
            blame = f"samples {first} to {end - 1} together{alone}; the first is {blame}"
        return RuntimeError(f"{self._raised(error, blame, failure.first)}. {OTHER_TYPES}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {cut(str(error), 300)}"


def describe(index: int, sample: Mapping[str, Any]) -> str:
    """Describes a sample in an error message: its index, and enough to recognise it."""
    return (
        f"sample {index} (uid {sample['uid']}, ground_truth {shorten(sample['ground_truth'])}, "
        f"response {shorten(sample['response'])})"
    )


def _copied(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with new lists and columns; media are shared."""
    lists = {key: list(value) for key, value in sample.items() if isinstance(value, list)}
    return {**sample, **lists, "extra": copy.deepcopy(sample.get("extra"))}


def _name_of_type(annotation: Any) -> str:
    """Name of an annotation: a text under `from __future__ import annotations`, otherwise a type."""
    if annotation is None:
        return "None"
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
