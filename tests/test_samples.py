# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_samples.py
"""The responses that a run shows: which they are, that their numbers are the run's, that showing changes nothing."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.pool import run_shared
from tests.test_token_map import Page
from tests.test_training_run import arguments, lines_of, weights_at
from verl.protocol import DataProto
from verl.report.token_map import TokenMap, visible
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.samples import SampleLogger
from verl.trainer.sinks import Sink
from verl.trainer.tracking import SINKS
from verl.utils.attention_token_weights import token_weights_from_vgr
from verl.utils.response_span import response_token_ids

WEIGHTED = ["worker.rollout.collect_attentions=true", "algorithm.enable_token_weights=true"]
SHOWN = ["trainer.report=true", "trainer.val_generations_to_log=3", "trainer.train_generations_to_log=5"]
VARIED = ["trainer.val_freq=2", "trainer.max_steps=3", "worker.rollout.val_override_config={temperature: 0.5, n: 2}"]


def logger_of(count: int, val_freq: int = 2, last: int = 7) -> SampleLogger:
    trainer = SimpleNamespace(val_freq=val_freq, train_generations_to_log=count)
    return SampleLogger(SimpleNamespace(trainer=trainer), last, None, None, None, None)


def batch_of(num_prompts: int, responses: int) -> DataProto:
    uids = np.repeat([f"prompt {number}" for number in range(num_prompts)], responses).astype(object)
    return DataProto.from_dict({"rows": torch.arange(len(uids))}, {"uid": uids})


@pytest.mark.parametrize(("count", "most_of_a_prompt"), [(1, 1), (4, 1), (6, 2), (12, 3), (99, 3)])
def test_shown_responses_are_of_as_many_prompts_as_there_are(count: int, most_of_a_prompt: int) -> None:
    batch = batch_of(num_prompts=4, responses=3)
    chosen = logger_of(count).chosen(batch, step=2)
    of_prompts = Counter(batch.non_tensor_batch["uid"][chosen.numpy()])
    assert chosen.sum() == min(count, 12) and max(of_prompts.values()) == most_of_a_prompt
    assert len(of_prompts) == min(count, 4)


def test_responses_are_shown_at_the_steps_that_validate_and_at_the_last() -> None:
    batch = batch_of(4, 3)
    shown = [step for step in range(1, 8) if logger_of(2).chosen(batch, step).any()]
    assert shown == [2, 4, 6, 7]
    assert [step for step in range(1, 8) if logger_of(2, val_freq=-1).chosen(batch, step).any()] == [7]
    choices = [logger_of(2).chosen(batch, step) for step in (2, 2, 4, 6)]
    assert torch.equal(choices[0], choices[1]) and not all(torch.equal(choices[0], one) for one in choices[2:])


@pytest.fixture(scope="module")
def runs(tiny_model_path: str, data_files: list[str], tmp_path_factory, ray_cluster):
    """Folders of the same run without and with its samples, what loggers heard of these, and its batches."""

    class Listening(Sink):
        def log_token_maps(self, samples, step, split):
            heard[step, split] = samples

    heard: dict[tuple[int, str], list[TokenMap]] = {}
    batches: dict[int, DataProto] = {}
    log_samples = RayDAPOTrainer._log_samples

    def keep(trainer, batch, record):
        batches[record.step] = batch
        log_samples(trainer, batch, record)

    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "shown")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SINKS, "wandb", Listening)
        for folder, settings in zip(folders, ([], [*SHOWN, "trainer.logger=[file,wandb]"]), strict=True):
            patch.setattr(RayDAPOTrainer, "_log_samples", keep if settings else log_samples)
            given = arguments(tiny_model_path, data_files, folder, *WEIGHTED, *VARIED, *settings)
            run_shared(load_config(given))
    return SimpleNamespace(plain=folders[0], shown=folders[1], heard=heard, batches=batches)


def test_a_run_that_shows_its_samples_ends_with_the_weights_of_one_that_does_not(runs) -> None:
    plain, shown = (weights_at(folder, 3) for folder in (runs.plain, runs.shown))
    assert all(torch.equal(values, shown[name]) for name, values in plain.items())
    logs = [lines_of(folder / "experiment_log.jsonl") for folder in (runs.plain, runs.shown)]
    for one, other in zip(*logs, strict=True):
        measured = {"timing_s", "timing_per_token_ms", "perf"}
        assert {area: one[area] for area in one.keys() - measured} == {
            area: other[area] for area in other.keys() - measured
        }


def test_training_samples_have_the_numbers_of_their_rows(runs, tokenizer) -> None:
    assert [place for place in runs.heard if place[1] == "train"] == [(2, "train"), (3, "train")]
    for step in (2, 3):
        batch = runs.batches[step]
        rows = [row for row in range(len(batch)) if batch.non_tensor_batch["attention_maps"][row] is not None]
        samples = runs.heard[step, "train"]
        assert len(rows) == len(samples) == 5
        for row, sample in zip(rows, samples, strict=True):
            mask = batch.batch["response_mask"][row].bool()
            assert torch.equal(torch.tensor(sample.weights), batch.batch["token_weights"][row, mask])
            assert sample.reward == pytest.approx(batch.batch["token_level_scores"][row].sum().item())
            assert sample.advantage == pytest.approx(batch.batch["advantages"][row, mask].mean().item(), abs=1e-6)
            (ids,) = response_token_ids(batch.batch["responses"][[row]], batch.batch["response_mask"][[row]])
            assert "".join(sample.tokens) == tokenizer.decode(ids)
            looks = sum(one.values.sum(axis=(1, 2)) for one in sample.maps)
            vision = batch.batch["attention_mass"][row, mask, 1].numpy()
            assert looks == pytest.approx(vision, abs=1e-6) if sample.images else not vision.any()
    assert any(sample.images for sample in samples)


def test_held_out_samples_have_the_weights_that_their_vgr_gives(runs) -> None:
    assert [place for place in runs.heard if place[1] == "val"] == [(0, "val"), (2, "val"), (3, "val")]
    for step in (0, 2, 3):
        samples = runs.heard[step, "val"]
        assert len(samples) == 3 and all(sample.advantage is None for sample in samples)
        for sample in samples:
            assert len(sample.maps) == len(sample.images)
            if sample.images:
                mask = torch.ones(1, len(sample.vgr))
                (expected,) = token_weights_from_vgr(torch.tensor([sample.vgr]), mask).tolist()
            else:
                expected = [1.0] * len(sample.vgr)
            assert sample.weights == pytest.approx(expected, abs=1e-6)
    prompts = [[sample.prompt for sample in runs.heard[step, "val"]] for step in (0, 2, 3)]
    assert prompts[0] == prompts[1] == prompts[2]


def test_texts_and_page_are_in_the_runs_folder(runs) -> None:
    assert (runs.shown / "generations.log").read_text().count("[prompt]") == 3 * 3
    assert (runs.shown / "train_generations.log").read_text().count("[prompt]") == 2 * 5
    page = Page((runs.shown / "report.html").read_text())
    shown = [*runs.heard[3, "val"], *runs.heard[3, "train"]]
    assert page.responses == [visible("".join(sample.tokens)) for sample in shown]
    assert not (runs.plain / "report.html").exists() and not (runs.plain / "train_generations.log").exists()
