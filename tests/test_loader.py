# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_loader.py
"""Draws cover each epoch once, never end, and go on after a checkpoint as if nothing had happened."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase

from tests.processes import are_gone
from verl.data.dataset import RLHFDataset
from verl.data.loader import BatchLoader, PromptLoader, ResumableSampler, create_dataloader
from verl.trainer.config import DataConfig
from verl.utils.tokenizer import get_processor

pytestmark = pytest.mark.usefixtures("private_cache")


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
    with pytest.raises(ValueError, match=r"shuffle=True, this run has False.*use the same data, data\.shuffle"):
        PromptLoader(make_set(10), 3, False, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="another program .it lacks epoch, num_rows.*delete it"):
        PromptLoader(make_set(10), 3, True, seed=1).load_state_dict({"_snapshot": {}})


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


def test_loader_processes_read_one_batch_ahead_in_pieces(make_set: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes and batches of 5 are pieces of 3 and 2. With one batch drawn, the next has been asked for and no
    row of the third: what a process holds is decoded media. The last batch is smaller."""
    asked: list[int] = []

    class WatchedSampler(SequentialSampler):
        def __iter__(self) -> Iterator[int]:
            for row in super().__iter__():
                asked.append(row)
                yield row

    monkeypatch.setattr("verl.data.loader.ROWS_WORTH_WORKERS", 1)
    monkeypatch.setattr("verl.data.loader.MAX_WORKERS", 2)
    rows = make_set(23)
    batches = iter(BatchLoader(rows, 5, WatchedSampler(rows), drop_last=False))
    first = next(batches)
    assert first["input_ids"].shape == (5, 32)
    assert first["prompt_text"].dtype == object
    assert len(asked) == 10
    read = [first["ground_truth"].tolist()] + [batch["ground_truth"].tolist() for batch in batches]
    assert read == [list(range(begin, min(begin + 5, 23))) for begin in range(0, 23, 5)]


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


def test_every_data_key_reaches_both_sets(
    tiny_model_path: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The 112 x 112 image is four times max_pixels, so it has 2 x 2 tokens of 28 x 28 pixels; videos are not asked for
    in their usual column. The second row of each file is longer than the limit.
    """
    (tmp_path / "media").mkdir()
    Image.new("RGB", (112, 112)).save(tmp_path / "media" / "a.png")
    (tmp_path / "f.jinja").write_text("{{ content }} Look!")
    for name in ("train", "val"):
        short = {"question": f"<image>{name}", "solution": name, "pictures": ["a.png"], "videos": ["v.mp4"]}
        rows = [short, {**short, "question": "<image>" + "long " * 100}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    config = DataConfig(
        train_files=str(tmp_path / "train.json"),
        val_files=str(tmp_path / "val.json"),
        prompt_key="question",
        answer_key="solution",
        image_key="pictures",
        video_key="films",
        image_dir=str(tmp_path / "media"),
        video_fps=1.0,
        max_prompt_length=60,
        rollout_batch_size=1,
        format_prompt=str(tmp_path / "f.jinja"),
        shuffle=False,
        min_pixels=28 * 28,
        max_pixels=56 * 56,
        filter_overlong_prompts_workers=1,
    )
    processor = get_processor(tiny_model_path)
    train, val = create_dataloader(config, tokenizer, processor)
    for dataset, name in ((train.dataset, "train"), (val.dataset, "val")):
        assert len(dataset) == 1
        assert dataset[0]["prompt_text"] == f"<image>{name} Look!"
        assert dataset[0]["ground_truth"] == name
        assert dataset[0]["input_ids"].tolist().count(processor.image_token_id) == 4
        assert dataset[0]["extra"] == {"videos": ["v.mp4"]}
        assert dataset.datasets[0].config.video_fps == 1.0

    enlarging = dataclasses.replace(config, min_pixels=140 * 140, max_pixels=None, max_prompt_length=100)
    image = create_dataloader(enlarging, tokenizer, processor)[0].dataset[0]["multi_modal_data"]["images"][0]
    assert image.size == (140, 140)


def test_a_long_prompt_is_refused_when_drawn_where_none_is_dropped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Cut short on the right, it would lose the turn in which the model is to answer."""
    config = data_config(tmp_path, filter_overlong_prompts=False)
    (tmp_path / "10.jsonl").write_text(json.dumps({"prompt": "long " * 100, "answer": 1}) * 4)
    train, _ = create_dataloader(config, tokenizer, None)
    with pytest.raises(ValueError, match=r"max_prompt_length=32; raise it, .* data\.filter_overlong_prompts=true"):
        train.draw()


def test_no_data_is_refused_by_the_key_that_should_name_it(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.val_files is empty"):
        create_dataloader(data_config(tmp_path, val_files=""), tokenizer, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position", -3), ("position", 11), ("position", 1.5), ("position", "3"), ("position", True), ("epoch", -1)],
)
def test_a_position_that_cannot_be_is_refused_by_its_value(name: str, value: Any, make_set: Callable) -> None:
    loader = PromptLoader(make_set(10), batch_size=3, shuffle=True, seed=1)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=f"{name}={value!r}, and it must be a whole number from 0"):
        loader.load_state_dict({**state, name: value})
    loader.load_state_dict({**state, "position": 10, "epoch": 4})


def test_processes_that_read_end_with_the_one_they_read_for(
    make_set: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, that one ends nobody itself."""
    monkeypatch.setattr("verl.data.loader.ROWS_WORTH_WORKERS", 1)
    loader = PromptLoader(make_set(40), batch_size=4, shuffle=False, seed=1)
    read_end, write_end = os.pipe()
    reader = os.fork()
    if reader == 0:
        loader.draw()
        children = [child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"]
        os.write(write_end, " ".join(map(str, children)).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(reader, 0)
    children = [int(pid) for pid in os.read(read_end, 1000).split()]
    assert children
    assert are_gone(children, 2)


STOPPED_READER = """
import atexit, time
atexit.register(lambda: print(time.monotonic() - begin))  # the first to register is the last to be called
import psutil, torch
from verl.data import loader
from verl.trainer.stop_request import StopRequest

class Rows:
    skipped = ()

    def __len__(self):
        return loader.ROWS_WORTH_WORKERS

    def __getitem__(self, row):
        return {"input_ids": torch.tensor([row])}

def begun():
    rows = Rows()
    order = loader.ResumableSampler(len(rows), shuffle=False, seed=0)
    return iter(loader.BatchLoader(rows, 4, order, drop_last=True))

def draw(count):
    return [next(batches)["input_ids"].flatten().tolist() for _ in range(count)]

loader.MAX_WORKERS = 2
stop_request = StopRequest(300)
stop_request.let_steps_finish()
with stop_request.listening():
    batches = begun()
    read = draw(2)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    while not stop_request:
        time.sleep(0.01)
    time.sleep(0.5)  # long enough for a process that ends to raise an error here
    read += draw(20)
    assert read == [list(range(start, start + 4)) for start in range(0, 88, 4)], read
begin = time.monotonic()
del batches
assert psutil.Process().children() == []
print(time.monotonic() - begin, flush=True)
batches = begun()
draw(1)
print(*(child.pid for child in psutil.Process().children()), flush=True)
begin = time.monotonic()
raise ValueError("open at the end")
"""
"""Reads, is signalled, reads on, closes its loader, and ends by an error with another one open."""


def test_signals_to_all_processes_end_none_that_reads_and_closing_ends_them_at_once() -> None:
    """They come from another process, to the group, as from `timeout` or a terminal. The driver alone answers.

    Seconds are those of a close that waits in vain for a process, which torch does for five.
    """
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED_READER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as reader:
        children = [int(pid) for pid in reader.stdout.readline().split()]
        for pid in children:
            os.kill(pid, signal.SIGINT)
        os.killpg(reader.pid, signal.SIGTERM)
        output, errors = reader.communicate(timeout=60)
    assert children
    assert [errors.count(text) for text in ("finishing the step", "ending at once", "Error")] == [1, 0, 1], errors
    assert errors.endswith("ValueError: open at the end\n")
    close_seconds, open_at_exit, exit_seconds = output.splitlines()
    assert float(close_seconds) < 3 and float(exit_seconds) < 3
    assert are_gone([int(pid) for pid in open_at_exit.split()], 0)
