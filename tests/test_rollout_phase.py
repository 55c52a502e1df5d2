# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_rollout_phase.py
"""Whole runs, seen by what a step trains on: groups that carry signal, with all that belongs to them; baselines."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.batches import ROWS, write_dataset
from tests.pool import run_shared
from tests.rewards import weights_by_length
from tests.test_training_run import ROOT, arguments, lines_of
from verl.data.features import Featurizer
from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.step_record import StepRecord
from verl.utils.tokenizer import get_processor
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.hf_rollout import HFRollout

N = 4
"""Responses to a prompt."""
DRAW = 3
"""Prompts of a draw."""
STEP = 4
"""Prompts of a step."""
ANSWERS = "131 131 244 131 244 244 131 131".replace(" ", "")
"""Of the prompts in the file: responses to 1 and 3 are right or wrong by chance, 2 is always right, 4 is never."""
TWO_WORKERS = ["trainer.n_gpus_per_node=2", "algorithm.enable_token_weights=true"]


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight draws: of three prompts that are right for some responses, or of three that are always or never right."""
    return write_prompts(tmp_path_factory.mktemp("data"), ANSWERS)


def write_prompts(folder: Path, answers: str) -> list[str]:
    by_answer = {row["answer"]: row for row in ROWS}
    path = write_dataset(folder / "train.parquet", [by_answer[answer] for answer in answers])
    return [f"data.train_files={path}", f"data.val_files={path}"]


def filtered(model_path: str, data_files: list[str], output: Path, *overrides: str) -> list[str]:
    output.mkdir(exist_ok=True)
    return arguments(
        model_path,
        data_files,
        output,
        "data.shuffle=false",
        f"data.mini_rollout_batch_size={DRAW}",
        "algorithm.online_filtering=true",
        "algorithm.filter_key=accuracy",
        "algorithm.disable_kl=true",
        "worker.actor.clip_ratio_high=0.28",
        f"worker.reward.reward_function={ROOT}/tests/rewards.py:pass_or_fail",
        f"worker.reward.reward_function_kwargs={{folder: {output}}}",
        "trainer.val_before_train=false",
        "trainer.val_freq=-1",
        *overrides,
    )


@contextmanager
def kept_batches() -> Iterator[list[DataProto]]:
    """The batches that the actor is updated with, one a step."""
    batches: list[DataProto] = []
    update = RayDAPOTrainer._update_actor

    def keep(trainer: RayDAPOTrainer, batch: DataProto, record: StepRecord) -> None:
        batches.append(batch)
        update(trainer, batch, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayDAPOTrainer, "_update_actor", keep)
        yield batches


def scored_in(folder: Path, step: int) -> list[tuple[str, str, str, float]]:
    """What the reward function was asked in a step: uid, ground truth, response and accuracy, in order."""
    return [tuple(json.loads(line)) for line in (folder / f"scored_{step}.jsonl").read_text().splitlines()]


def informative_uids(scored: list[tuple[str, str, str, float]]) -> list[str]:
    right = Counter()
    for uid, _, _, accuracy in scored:
        right[uid] += accuracy
    return [uid for uid, count in right.items() if 0 < count < N]


@pytest.fixture(scope="module")
def filtered_run(
    tiny_model_path: str, data_files: list[str], tmp_path_factory: pytest.TempPathFactory, ray_cluster
) -> tuple[Path, list[DataProto]]:
    """The folder and the batches of three steps on two workers, with token weights for answer 1."""
    folder = tmp_path_factory.mktemp("filtered")
    with kept_batches() as batches:
        run_shared(load_config(filtered(tiny_model_path, data_files, folder, *TWO_WORKERS, "trainer.save_freq=1")))
    return folder, batches


def test_a_step_trains_on_whole_groups_that_carry_signal_the_first_that_were_drawn(filtered_run) -> None:
    """There are groups beyond the step's number, and draws without any group to keep, after which the run goes on."""
    folder, batches = filtered_run
    assert len(batches) == 3
    surplus = empty_draws = 0
    for step, batch in enumerate(batches, start=1):
        scored = scored_in(folder, step)
        informative = informative_uids(scored)
        groups = Counter(batch.non_tensor_batch["uid"].tolist())
        assert groups == dict.fromkeys(informative[:STEP], N)
        surplus += len(informative) - STEP
        draws = [scored[start : start + DRAW * N] for start in range(0, len(scored), DRAW * N)]
        empty_draws += sum(not informative_uids(draw) for draw in draws)
    assert surplus > 0 and empty_draws > 0


def test_every_sample_is_scored_once_and_the_metrics_tell_of_the_dropped_ones_too(filtered_run) -> None:
    folder, batches = filtered_run
    for step, record in enumerate(lines_of(folder / "experiment_log.jsonl")[: len(batches)], start=1):
        scored = scored_in(folder, step)
        times = Counter(uid for uid, *_ in scored)
        assert set(times.values()) == {N}
        assert record["filter"]["draws"] == len(times) / DRAW
        assert record["filter"]["kept_share"] == pytest.approx(len(informative_uids(scored)) / len(times))
        accuracy = sum(accuracy for *_, accuracy in scored) / len(scored)
        assert record["reward"]["accuracy"] == pytest.approx(accuracy)
        assert set(record["reward"]) == {"overall", "accuracy", "retried"}
        phases = {"gen", "reward", "old", "adv", "update_actor", "save_checkpoint", "step"}
        assert set(record["timing_s"]) == phases
        assert record["timing_s"]["gen"] > record["timing_s"]["reward"] > 0


def test_scores_and_token_weights_stay_with_their_rows_from_the_draw_to_the_update(filtered_run, tokenizer) -> None:
    """Rows are filtered, joined from several draws, cut, and reordered for two workers.

    A score is accuracy - 2 + length / 100, where the length is the row's own and an odd sum of characters is right.
    Answers 1 have the reward function's weights, answers 3 weigh 1.
    """
    truths = set()
    for batch in filtered_run[1]:
        tensors = batch.batch
        for row, truth in enumerate(batch.non_tensor_batch["ground_truth"]):
            length, weights = int(tensors["response_mask"][row].sum()), tensors["token_weights"][row]
            ids = tensors["responses"][row, :length].tolist()
            score = sum(map(ord, tokenizer.decode(ids, skip_special_tokens=True))) % 2 - 2 + length / 100
            assert tensors["token_level_scores"][row].sum().item() == pytest.approx(score)
            assert tensors["token_level_scores"][row, length - 1].item() == pytest.approx(score)
            by_length = weights_by_length([tokenizer.decode([token]) for token in ids])
            expected = by_length if truth == "1" else [1.0] * length
            assert weights.tolist() == pytest.approx(expected + [0.0] * (len(weights) - length))
            truths.add(truth)
    assert truths == {"1", "3"}


def test_a_resumed_run_draws_and_learns_what_an_uninterrupted_one_does(
    filtered_run, tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """The steps take different numbers of draws, so that where the data stands does not follow from the step.

    Step 3 also goes over the end of the data.
    """
    whole, _ = filtered_run
    start = f"trainer.load_checkpoint_path={whole}/global_step_2"
    run_shared(load_config(filtered(tiny_model_path, data_files, tmp_path / "rest", *TWO_WORKERS, start)))
    logs = [lines_of(folder / "experiment_log.jsonl") for folder in (whole, tmp_path / "rest")]
    draws = [record["filter"]["draws"] for record in logs[0] if "filter" in record]
    assert draws[0] != draws[1]
    assert sum(draws[:2]) * DRAW < len(ANSWERS) < sum(draws) * DRAW
    asked = [[sample[1:] for sample in scored_in(folder, 3)] for folder in (whole, tmp_path / "rest")]
    assert asked[0] == asked[1]
    steps = [next(record for record in log if record["step"] == 3) for log in logs]
    for area in ("actor", "critic", "reward", "filter", "token_weights", "response_length"):
        assert steps[0][area] == steps[1][area]


def test_a_step_that_runs_out_of_draws_ends_the_run_with_the_counts(
    tiny_model_path: str, tmp_path: Path, ray_cluster
) -> None:
    """Two draws of three prompts that are always or never right: 2, 4 and 4, then 2, 2 and 4. The mean is 3 / 6."""
    data_files = write_prompts(tmp_path, "244224")
    args = filtered(tiny_model_path, data_files, tmp_path / "run", "trainer.max_try_make_batch=2")
    with pytest.raises(RuntimeError) as caught:
        run_shared(load_config(args))
    assert str(caught.value).startswith(
        "step 1 needs data.rollout_batch_size=4 groups with a mean accuracy between algorithm.filter_low=0.01 and "
        "filter_high=0.99, and has 0 after trainer.max_try_make_batch=2 draws of 3 prompts, 6 in all, whose mean is "
        "0.500; raise worker.rollout.n or trainer.max_try_make_batch"
    )


def test_remax_compares_each_response_with_the_policys_greedy_one(
    tiny_model_path: str, tokenizer, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """Two workers, rows reordered, groups filtered; the greedy responses come from a rollout of the test's own.

    They are asked for once, after the draws, for the kept prompts alone, and show in no metric.
    """
    args = filtered(tiny_model_path, data_files, tmp_path, *TWO_WORKERS, "algorithm.adv_estimator=remax")
    config = load_config([*args, "trainer.max_steps=1"])
    with kept_batches() as batches:
        run_shared(config)
    (batch,) = batches
    tensors, prompt_length = batch.batch, config.data.max_prompt_length
    prompts = DataProto.from_dict(
        {
            "input_ids": tensors["prompts"],
            "attention_mask": tensors["attention_mask"][:, :prompt_length],
            "position_ids": tensors["position_ids"][..., :prompt_length],
        },
        {"multi_modal_data": batch.non_tensor_batch["multi_modal_data"]},
    )
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    rollout_config, response_length = config.worker.rollout, config.data.max_response_length
    featurizer = Featurizer(get_processor(tiny_model_path))
    rollout = HFRollout(model, tokenizer, featurizer, rollout_config, response_length, torch.device("cpu"))
    greedy = rollout.generate(prompts, Sampling(1, temperature=0.0, top_p=1.0, top_k=-1, ignore_eos=False), seed=0)
    baselines = []
    for ids, mask in zip(greedy.batch["responses"], greedy.batch["response_mask"], strict=True):
        text = tokenizer.decode(ids[: mask.sum()], skip_special_tokens=True)
        baselines.append(sum(map(ord, text)) % 2 - 2 + mask.sum().item() / 100)
    assert len(set(baselines)) > 1
    assert tensors["reward_baselines"].dtype == torch.float32
    torch.testing.assert_close(tensors["reward_baselines"], torch.tensor(baselines))
    advantages = tensors["token_level_scores"].sum(-1) - tensors["reward_baselines"]
    torch.testing.assert_close(tensors["advantages"], advantages[:, None] * tensors["response_mask"])

    scored = scored_in(tmp_path, 1)
    sampled, asked_last = scored[:-STEP], scored[-STEP:]
    assert set(Counter(uid for uid, *_ in sampled).values()) == {N}
    assert {uid for uid, *_ in asked_last} == set(batch.non_tensor_batch["uid"])
    record = lines_of(tmp_path / "experiment_log.jsonl")[0]
    assert record["reward"]["accuracy"] == pytest.approx(sum(accuracy for *_, accuracy in sampled) / len(sampled))
