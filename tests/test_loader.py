# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_loader.py
"""Draws cover each epoch once, never end, and go on after a checkpoint as if nothing had happened."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from verl.data.dataset import RLHFDataset
from verl.data.loader import PromptLoader, ResumableSampler, create_dataloader
from verl.trainer.config import DataConfig
from verl.utils.tokenizer import get_processor, get_tokenizer


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` converts out of the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: str) -> PreTrainedTokenizerBase:
    return get_tokenizer(tiny_model_path)


@pytest.fixture
def make_set(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[[int], RLHFDataset]:
    """`make_set(n)` is a set of n text rows whose answers are 0 to n - 1."""
    return lambda num_rows: RLHFDataset(write_rows(tmp_path, num_rows), tokenizer, None, max_prompt_length=32)


def write_rows(folder: Path, num_rows: int) -> str:
    path = folder / f"{num_rows}.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "answer": index}) + "\n" for index in range(num_rows)))
    return str(path)


def draw(loader: PromptLoader, times: int) -> list[list[int]]:
    """The answers of the next `times` draws, which say the rows."""
    return [loader.draw()["ground_truth"].tolist() for _ in range(times)]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_an_epoch_draws_no_row_twice_and_the_next_one_begins_by_itself(make_set: Callable) -> None:
    """10 rows in batches of 3: three draws an epoch, one row left out of each."""
    loader = PromptLoader(make_set(10), batch_size=3, shuffle=True, seed=1)
    assert loader.prompts_per_epoch == 9
    epochs = [flat(draw(loader, 3)) for _ in range(4)]
    for rows in epochs:
        assert len(set(rows)) == 9
    assert len({tuple(rows) for rows in epochs}) == 4
    assert set(flat(epochs)) == set(range(10))


def test_without_shuffling_rows_come_in_the_order_of_the_file(make_set: Callable) -> None:
    loader = PromptLoader(make_set(5), batch_size=2, shuffle=False, seed=1)
    assert draw(loader, 3) == [[0, 1], [2, 3], [0, 1]]


def test_the_seed_decides_the_order(make_set: Callable) -> None:
    rows = make_set(20)
    orders = [flat(draw(PromptLoader(rows, 5, True, seed), 4)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_epochs_of_one_seed_are_not_those_of_another_shifted() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ResumableSampler(20, shuffle=True, seed=seed)
        sampler.epoch = epoch
        return list(sampler)

    assert order(1, 2) != order(2, 1)
    assert order(0, 1) != order(1, 0)


@pytest.mark.parametrize("drawn", range(8))
def test_a_restored_loader_goes_on_where_the_saved_one_stood(drawn: int, make_set: Callable) -> None:
    """At the start, within an epoch, at its very end, and in the third epoch: 3 draws an epoch."""
    rows = make_set(10)
    loader = PromptLoader(rows, 3, True, seed=1)
    draw(loader, drawn)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = draw(loader, 7)

    fresh = PromptLoader(rows, 3, True, seed=1)
    draw(fresh, 2)  # what it did before must not matter
    fresh.load_state_dict(state)
    assert draw(fresh, 7) == expected


def test_a_state_of_other_data_is_refused(make_set: Callable) -> None:
    state = PromptLoader(make_set(10), 3, True, seed=1).state_dict()
    with pytest.raises(ValueError, match=r"num_rows=10, this run has 11.*delete the checkpoint's dataloader\.pt"):
        PromptLoader(make_set(11), 3, True, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=1, this run has 2"):
        PromptLoader(make_set(10), 3, True, seed=2).load_state_dict(state)


def test_loader_processes_change_neither_the_order_nor_the_saved_place(
    make_set: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes read ahead; a state that counted what they read would skip rows."""
    rows = make_set(24)
    plain = PromptLoader(rows, 3, True, seed=1)
    monkeypatch.setattr("verl.data.loader.ROWS_WORTH_WORKERS", 1)
    monkeypatch.setattr("verl.data.loader.MAX_WORKERS", 2)
    with_workers = PromptLoader(rows, 3, True, seed=1)
    assert draw(with_workers, 3) == draw(plain, 3)
    assert with_workers.state_dict() == plain.state_dict()
    assert draw(with_workers, 7) == draw(plain, 7)


def test_a_set_smaller_than_a_batch_is_refused_with_both_numbers(make_set: Callable) -> None:
    with pytest.raises(ValueError, match="has 3 prompts, fewer than the 4 of one batch"):
        PromptLoader(make_set(3), 4, True, seed=1)


def data_config(folder: Path, **options: Any) -> DataConfig:
    """10 training rows and 5 held-out ones, 4 a step."""
    config = DataConfig(train_files=write_rows(folder, 10), val_files=write_rows(folder, 5), rollout_batch_size=4)
    return dataclasses.replace(config, max_prompt_length=32, **options)


@pytest.mark.parametrize(
    ("options", "train_batch", "val_batches"),
    [
        (dict(), 4, [[0, 1, 2, 3, 4]]),
        (dict(mini_rollout_batch_size=2), 2, [[0, 1, 2, 3, 4]]),
        (dict(val_batch_size=2), 4, [[0, 1], [2, 3], [4]]),
    ],
)
def test_batches_follow_the_config_and_no_held_out_row_is_lost(
    options: dict[str, int],
    train_batch: int,
    val_batches: list[list[int]],
    tiny_model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    config = data_config(tmp_path, **options)
    train, val = create_dataloader(config, tokenizer, get_processor(tiny_model_path))
    batch = train.draw()
    assert batch["input_ids"].shape == (train_batch, 32)
    assert batch["position_ids"].shape == (train_batch, 4, 32)
    for _ in range(2):  # validation reads the set again and again
        assert [batch["ground_truth"].tolist() for batch in val] == val_batches


def test_no_data_is_refused_by_the_key_that_should_name_it(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.val_files is empty"):
        create_dataloader(data_config(tmp_path, val_files=""), tokenizer, None)
