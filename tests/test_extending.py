# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_extending.py
"""Every block of the page "Extending" works as it stands there."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AyaVisionConfig

from tests import vlm_zoo
from tests.batches import make_prompts
from tests.documents import files_in
from tests.pool import run_shared
from tests.probe import make_config, start_alone
from tests.test_training_run import arguments
from verl.models import registry
from verl.trainer.config import load_config
from verl.trainer.sinks import read_log
from verl.trainer.tracking import SINKS, Tracker
from verl.utils.lean_imports import import_object
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.config import ENGINES

FILES = files_in("extending.md")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the page's files in it; importable."""
    for name, content in FILES.items():
        if "/" not in name:
            (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_signal_a_loss_an_estimator_and_a_reward_of_ones_own_train_together(
    folder: Path, tiny_model_path: str, data_files: list[str], ray_cluster
) -> None:
    settings = [
        "algorithm.enable_token_weights=true",
        f"algorithm.token_weight_signal={folder}/my_signals.py:surprise",
        f"worker.actor.loss_type={folder}/my_losses.py:proximal",
        f"algorithm.adv_estimator={folder}/my_estimators.py:against_the_best",
        f"worker.reward.reward_function={folder}/my_rewards.py:compute_score",
        "algorithm.use_kl_loss=false",
        "algorithm.disable_kl=true",
        "trainer.val_before_train=false",
        "trainer.max_steps=1",
    ]
    run_shared(load_config(arguments(tiny_model_path, data_files, folder / "run", *settings)))
    (log,) = read_log(folder / "run").values()
    assert "actor/log_ratio" in log
    assert log["critic/advantages/max"] == 0
    assert log["token_weights/from_reward"] == 1
    assert 0 <= log["reward/accuracy"] <= 1


def test_the_pages_signal_weighs_where_the_reward_gives_no_weights(
    folder: Path, tiny_model_path: str, data_files: list[str], ray_cluster
) -> None:
    settings = [
        "algorithm.enable_token_weights=true",
        f"algorithm.token_weight_signal={folder}/my_signals.py:surprise",
        "trainer.val_before_train=false",
        "trainer.max_steps=1",
    ]
    run_shared(load_config(arguments(tiny_model_path, data_files, folder / "run", *settings)))
    (log,) = read_log(folder / "run").values()
    assert log["token_weights/std"] > 0
    assert log["token_weights/from_reward"] == 0


def test_the_pages_reward_weighs_digits(folder: Path) -> None:
    sample = {"response": "so 12", "response_tokens": ["so", " 1", "2"], "ground_truth": "12"}
    (result,) = import_object("my_rewards:compute_score")([sample])
    assert result == {"overall": 1.0, "accuracy": 1.0, "token_weights": [1.0, 2.0, 2.0]}


def test_a_family_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AyaVisionConfig(
        text_config={**vlm_zoo.TEXT_CONFIG, "model_type": "cohere2"},
        vision_config={**vlm_zoo.TILE, "patch_size": 4, "model_type": "siglip_vision_model"},
        image_token_index=vlm_zoo.IMAGE,
    )
    with pytest.raises(ValueError, match="aya_vision"):
        registry.family_of(config)
    monkeypatch.setattr(registry, "MODEL_FAMILIES", registry.MODEL_FAMILIES)  # puts it back after the test
    exec(FILES["verl/models/registry.py"], vars(registry))
    family = registry.family_of(config)
    assert registry.media_token_ids(config) == [vlm_zoo.IMAGE]
    model = AutoModelForImageTextToText.from_config(config)
    blank = family.blank_image(config)
    features = model.model.get_image_features(**blank).pooler_output
    num_tokens = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in features)
    grid = family.token_grid(config, blank, num_tokens, (16, 16))
    assert grid.rows * grid.columns == num_tokens


def test_a_logger_is_a_sink_and_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS, "csv", import_object("my_sinks:CsvSink"))
    with Tracker(["csv"], {}, "project", "experiment", folder / "run", 1, None, report=False) as tracker:
        tracker.log({"actor/lr": 0.5}, 1)
    assert (folder / "run" / "metrics.csv").read_text() == "actor/lr,1,0.5\n"


def test_an_engine_is_a_rollout_and_its_place(
    folder: Path, tiny_model_path: str, lone_process_group, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setitem(ENGINES, "hf", "my_engine:TimedRollout")  # under a name that the configuration accepts
    config = make_config(tiny_model_path)
    worker = start_alone(config)
    worker.prepare_rollout_engine()
    prompts = make_prompts(tiny_model_path, folder)
    prompts.meta_info = {"sampling": Sampling.for_training(config.worker.rollout), "seed_parts": (0,)}
    with caplog.at_level(logging.WARNING, logger="my_engine"):
        batch = worker.generate_sequences(prompts)
    num_tokens = int(batch.batch["response_mask"].sum())
    assert any(message.startswith(f"{num_tokens} tokens, ") for message in caplog.messages)
    assert torch.isfinite(batch.batch["rollout_log_probs"]).all()
