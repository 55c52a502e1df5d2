# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_damaged_checkpoint.py
"""What is loaded is what was saved: a checkpoint that holds anything else is refused by file and part."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, ProbeWorker, make_config, start_alone
from verl.utils.checkpoint import step_folder
from verl.utils.checkpoint_folder import write_manifest

WEIGHT = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def worker(tiny_model_path: str, lone_process_group, tmp_path_factory: pytest.TempPathFactory) -> ProbeWorker:
    """With one step behind it."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    worker = start_alone(make_config(tiny_model_path, "algorithm.disable_kl=true"))
    worker.update_actor(answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH))
    return worker


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    state = torch.load(path, weights_only=False)
    changed = change(state)
    torch.save(state if changed is None else changed, path)


def drop(state: dict[str, Any], key: str) -> None:
    del state[key]


def with_nan(tensor: torch.Tensor) -> None:
    tensor.view(-1)[3] = float("nan")


CHANGES = {
    "a weight that is no number": (
        "model",
        lambda state: with_nan(state[WEIGHT]),
        rf"model_world_size_1_rank_0.pt has numbers that are not finite: 1 of \d+ in {WEIGHT}",
    ),
    "a weight that is missing": ("model", lambda state: drop(state, WEIGHT), f"does not fit .*{WEIGHT}"),
    "an optimizer without a state": ("optim", lambda state: {}, "optimizer state is empty, though .* at step 1"),
    "a parameter without a moment": (
        "optim",
        lambda state: drop(state["state"][WEIGHT], "exp_avg_sq"),
        f"optimizer state of {WEIGHT} has no exp_avg_sq",
    ),
    "a moment of another shape": (
        "optim",
        lambda state: state["state"][WEIGHT].update(exp_avg=torch.zeros(2, 3)),
        rf"exp_avg in the optimizer state of {WEIGHT} has the shape \(2, 3\), and the parameter",
    ),
    "a moment that is no number": (
        "optim",
        lambda state: with_nan(state["state"][WEIGHT]["exp_avg"]),
        f"optimizer state of {WEIGHT} has numbers that are not finite: 1 of",
    ),
    "an optimizer of another program": ("optim", lambda state: {"a": 1}, "optim.* holds no optimizer state"),
    "a schedule that stands at no step": (
        "extra_state",
        lambda state: state["lr_scheduler"].update(last_epoch=-3),
        "schedule stands at step -3",
    ),
    "no schedule": ("extra_state", lambda state: drop(state, "lr_scheduler"), "extra_state.* holds no schedule"),
    "random states of another kind": (
        "extra_state",
        lambda state: state["rng"].update(cpu=torch.zeros(3)),
        "RNG state must be a torch.ByteTensor|expected",
    ),
    "a list": ("optim", lambda state: [1], "holds no optimizer state"),
    "an optimizer in the place of a model": (
        "model",
        lambda state: {"state": {}, "param_groups": []},
        "model_world_size_1_rank_0.pt holds no weights",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_have_been_saved_is_refused_by_its_place(name: str, worker: ProbeWorker, tmp_path: Path) -> None:
    kind, change, told = CHANGES[name]
    folder = step_folder(str(tmp_path), 3)
    worker.save_checkpoint(folder, model_only=False)
    worker.load_checkpoint(folder, model_only=False)
    edit(Path(folder, "actor", f"{kind}_world_size_1_rank_0.pt"), change)
    with pytest.raises(ValueError, match=told) as refusal:
        worker.load_checkpoint(folder, model_only=False)
    assert os.path.join(folder, "actor") in str(refusal.value)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("kind", ["model", "optim", "extra_state"])
@pytest.mark.parametrize(
    ("content", "told"), [(None, "does not exist|no file of"), (b"", "is empty"), (b"PK\3\4 cut", "is cut short")]
)
def test_files_of_other_programs_that_cannot_be_read_are_named(
    content: bytes | None, told: str, kind: str, worker: ProbeWorker, tmp_path: Path
) -> None:
    """EasyR1's checkpoints have no manifest."""
    folder = step_folder(str(tmp_path), 3)
    worker.save_checkpoint(folder, model_only=False)
    path = Path(folder, "actor", f"{kind}_world_size_1_rank_0.pt")
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as refusal:
        worker.load_checkpoint(folder, model_only=False)
    assert "global_step_3 cannot be resumed; there is no whole checkpoint before it" in str(refusal.value)


def test_a_file_that_was_changed_since_it_was_saved_is_refused_before_it_is_loaded(
    worker: ProbeWorker, tmp_path: Path
) -> None:
    """One bit of a weight, which torch would read without a word."""
    folder = step_folder(str(tmp_path), 3)
    worker.save_checkpoint(folder, model_only=False)
    write_manifest(folder, 3, False, worker.saved_files(wait=True))
    worker.load_checkpoint(folder, model_only=False)
    path = Path(folder, "actor", "model_world_size_1_rank_0.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not the file that was saved: its SHA-256 differs"):
        worker.load_checkpoint(folder, model_only=False)


def test_weights_that_are_not_finite_are_not_saved(worker: ProbeWorker, tmp_path: Path) -> None:
    parameter = worker.actor.model.get_parameter(WEIGHT)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[0, 0] = float("inf")
    try:
        with pytest.raises(ValueError, match=f"numbers that are not finite: 1 of .* in {WEIGHT}"):
            worker.save_checkpoint(step_folder(str(tmp_path), 3), model_only=True)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_file_that_cannot_be_written_ends_the_save_with_its_path(
    in_background: bool, worker: ProbeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after the first file."""
    folder = step_folder(str(tmp_path), 3)
    target = Path(folder, "actor", "optim_world_size_1_rank_0.pt")
    mkdir = Path.mkdir

    def mkdir_with_a_full_file(path: Path, *args: Any, **options: Any) -> None:
        mkdir(path, *args, **options)
        if path == target.parent and not target.is_symlink():
            target.symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir_with_a_full_file)
    with pytest.raises(
        RuntimeError, match=rf"{target} could not be written \(.*; its file system has [\d.]+ GiB free"
    ):
        worker.save_checkpoint(folder, model_only=False, in_background=in_background)
        worker.saved_files(wait=True)


def test_what_is_written_in_the_background_is_what_the_model_was_when_it_was_copied(
    worker: ProbeWorker, tmp_path: Path
) -> None:
    at_once, later = (step_folder(str(tmp_path / name), 3) for name in ("at_once", "later"))
    worker.save_checkpoint(at_once, model_only=False)
    expected = worker.saved_files(wait=True)
    worker.writer.submit(os.read, *(gate := os.pipe())[:1], 1)  # holds the writer until the weights have changed
    worker.save_checkpoint(later, model_only=False, in_background=True)
    assert worker.saved_files(wait=False) is None
    worker.scale_weights(2.0)
    os.write(gate[1], b"x")
    files = worker.saved_files(wait=True)
    assert files == expected and len(files) > 3
    worker.scale_weights(0.5)
