# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_samples.py
"""The responses that a run shows: which they are, that their numbers are the run's, that showing changes nothing."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.batches import random_image
from tests.pool import run_shared
from tests.test_token_map import Page
from tests.test_training_run import arguments, lines_of, weights_at
from verl.protocol import DataProto
from verl.report.pictures import picture_uris
from verl.report.token_map import TokenMap, visible
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.samples import SampleLogger
from verl.trainer.sinks import Sink
from verl.trainer.token_weigher import TokenWeigher
from verl.trainer.tracking import SINKS
from verl.trainer.validator import ValidationResult
from verl.utils.attention_token_weights import token_weights_from_vgr
from verl.utils.response_span import response_token_ids

WEIGHTED = ["worker.rollout.collect_attentions=true", "algorithm.enable_token_weights=true"]
SHOWN = ["trainer.report=true", "trainer.val_generations_to_log=3", "trainer.train_generations_to_log=5"]
VARIED = ["trainer.val_freq=2", "trainer.max_steps=3", "worker.rollout.val_override_config={temperature: 0.5, n: 2}"]
PICTURES = [random_image((28, 28), 0), random_image((56, 28), 1)]


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


def test_numbers_of_a_sample_are_of_its_own_tokens_alone(tokenizer) -> None:
    batch = two_responses(tokenizer)
    heard = []
    sample_logger(heard, tokenizer).log_training(batch, step=1)
    ((samples, step, split),) = heard
    assert (step, split) == (1, "train")
    streams = batch.batch
    for row, (sample, length) in enumerate(zip(samples, (2, 4), strict=True)):
        assert "".join(sample.tokens) == tokenizer.decode(streams["responses"][row, :length])
        assert sample.weights == streams["token_weights"][row, :length].tolist()
        assert sample.vgr == pytest.approx(streams["attention_mass"][row, :length, 0].tolist(), rel=1e-3)
    assert [(one.prompt, one.answer, one.reward, one.advantage) for one in samples] == [
        ("?", "7", 0.5, 1.5),
        ("!", "8", 0.25, 3.0),
    ]
    assert [one.images for one in samples] == [picture_uris(PICTURES), []]


def test_held_out_samples_have_their_own_rewards_and_weights_of_the_next_step(tokenizer) -> None:
    """After step 3 the next is the last of the warm-up, three quarters of the way from 1; after step 4 it is over."""
    batch = two_responses(tokenizer)
    result = ValidationResult(0.375, {}, [0, 1], batch, [0.5, 0.25], [{"overall": 0.5}, {"overall": 0.25}], {})
    weigher, heard = TokenWeigher(load_config([*WEIGHTED, "algorithm.token_weight_warmup_steps=4"]), None), []
    for step in (3, 4):
        sample_logger(heard, tokenizer, weigher).log_validation(result, batch, step)
    assert [told[1:] for told in heard] == [(3, "val"), (4, "val")]
    for warm, full in zip(*(samples for samples, *_ in heard), strict=True):
        assert warm.weights == pytest.approx([1 + 0.75 * (weight - 1) for weight in full.weights])
        assert len(set(full.weights)) > 1
    assert [[sample.reward for sample in samples] for samples, *_ in heard] == [[0.5, 0.25]] * 2


def two_responses(tokenizer) -> DataProto:
    """Of two and of four tokens; padding has numbers too. VGR is the text's mass."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ids = torch.tensor([tokenizer.encode("a b c d e f")[:4], tokenizer.encode("f e d c b a")[:4]])
    text_mass = torch.tensor([[2.0, 3.0, 9.0, 9.0], [4.0, 5.0, 6.0, 7.0]])
    streams = {
        "responses": ids,
        "response_mask": mask,
        "token_level_scores": torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.25]]),
        "advantages": torch.tensor([[1.0, 2.0, 9.0, 9.0], [4.0, 4.0, 4.0, 0.0]]),
        "token_weights": torch.tensor([[0.5, 1.5, 9.0, 9.0], [0.25, 0.75, 1.25, 1.75]]),
        "attention_mass": torch.stack([text_mass, torch.ones(2, 4)], dim=-1),
        "attention_keys": torch.ones(2, 2, dtype=torch.int64),
    }
    texts = {"uid": ["one", "other"], "prompt_text": ["?", "!"], "ground_truth": ["7", "8"]}
    media = [SimpleNamespace(is_video=False, load=lambda picture=picture: picture) for picture in PICTURES]
    objects = {**texts, "multi_modal_data": [media, None], "attention_maps": [None, None]}
    return DataProto.from_dict(streams, {name: np.array(column, dtype=object) for name, column in objects.items()})


def sample_logger(heard: list, tokenizer, weigher: TokenWeigher | None = None) -> SampleLogger:
    """Of a weighted run of one step that shows two responses; what loggers hear of token maps goes into `heard`."""
    config = SimpleNamespace(
        trainer=SimpleNamespace(val_freq=1, train_generations_to_log=2, report=True),
        worker=SimpleNamespace(rollout=SimpleNamespace(collect_attentions=True)),
        algorithm=SimpleNamespace(enable_token_weights=True),
    )
    tracker = SimpleNamespace(log_generations=lambda *_: None, log_token_maps=lambda *told: heard.append(told))
    return SampleLogger(config, 1, tokenizer, None, weigher, tracker)


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
