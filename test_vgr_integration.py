# SPDX-License-Identifier: Apache-2.0
# python -m pytest test_vgr_integration.py
"""VGR token weights from end to end in about a minute, on a tiny random Qwen2.5-VL: `python3 test_vgr_integration.py`.

Five checks, each ticked as it passes; the same five run under pytest. The tests in `tests/` go deep, this file shows
that an installation works.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


@functools.cache
def answers() -> tuple:
    """A processor and model, two prompts with pictures of different sizes, and what generation gives for them."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tests.tiny import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder)
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    processor.tokenizer.padding_side = "left"
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in ("What is the sum of the digits?", "What is in the picture?")
    ]
    prompts = processor(
        text=[processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations],
        images=[Image.effect_noise(size, 90).convert("RGB") for size in ((56, 84), (112, 56))],
        padding=True,
        return_tensors="pt",
    )
    torch.manual_seed(0)
    generated = model.generate(
        **prompts, do_sample=True, max_new_tokens=8, output_attentions=True, return_dict_in_generate=True
    )
    return processor, model, prompts, generated


def test_imports() -> None:
    from verl.trainer.ray_trainer import RayDAPOTrainer
    from verl.utils import (
        build_token_vgr_weights_for_batch,
        compute_attention_metrics_for_batch,
        extract_vision_token_spans_qwen,
        get_qwen_special_token_ids,
    )

    for function in (
        build_token_vgr_weights_for_batch,
        compute_attention_metrics_for_batch,
        extract_vision_token_spans_qwen,
        get_qwen_special_token_ids,
        RayDAPOTrainer._maybe_compute_token_weights,
    ):
        assert callable(function) and function.__doc__


def test_configuration() -> None:
    from verl.trainer.config import AlgorithmConfig, load_config
    from verl.workers.rollout.config import RolloutConfig

    algorithm = AlgorithmConfig()
    assert algorithm.enable_token_weights is False
    assert algorithm.token_weight_clip == (0.2, 3.0)
    assert algorithm.token_weight_smooth_sigma == 0.0
    assert algorithm.token_weight_last_k_layers is None
    assert RolloutConfig().collect_attentions is False

    overridden = load_config(["algorithm.token_weight_clip=[0.1,5.0]", "worker.rollout.collect_attentions=true"])
    assert overridden.algorithm.token_weight_clip == (0.1, 5.0)
    assert overridden.worker.rollout.collect_attentions is True


def test_attention_metrics() -> None:
    from verl.utils import compute_attention_metrics_for_batch, extract_vision_token_spans_qwen

    processor, _, prompts, generated = answers()
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for input_ids in prompts["input_ids"]:
        ((start, end),) = extract_vision_token_spans_qwen(processor, input_ids)
        assert (input_ids[start + 1 : end - 1] == image_token).all()

    metrics = compute_attention_metrics_for_batch(
        generated.attentions, prompts["input_ids"], generated.sequences, processor
    )
    for text, vision in zip(metrics["text_mass"], metrics["vision_mass"], strict=True):
        assert text > 0 and vision > 0 and text + vision <= 1 + 1e-6


def test_token_weights() -> None:
    from verl.utils import build_token_vgr_weights_for_batch

    processor, _, prompts, generated = answers()
    weights, debug = build_token_vgr_weights_for_batch(
        generated.attentions, prompts["input_ids"], generated.sequences, processor
    )
    assert len(weights) == len(debug["vgr_token"]) == 2
    for of_sample, vgr in zip(weights, debug["vgr_token"], strict=True):
        assert len(of_sample) == len(vgr) > 1
        assert all(0.2 - 1e-6 <= weight <= 3.0 + 1e-6 for weight in of_sample)
        assert of_sample[vgr.index(max(vgr))] == min(of_sample)
        assert len(set(of_sample)) > 1


def test_one_weighted_update() -> None:
    """The whole trainer, one step on one worker, with weights and without: the two leave different models."""
    import torch

    from tests.batches import ROWS, write_dataset
    from tests.tiny import make_tiny_model
    from verl.trainer.config import load_config
    from verl.trainer.main import run

    models = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = make_tiny_model(Path(folder) / "model"), write_dataset(Path(folder) / "data.parquet", ROWS)
        for enabled in ("true", "false"):
            output = Path(folder) / enabled
            run(load_config(_arguments(model, data, output, f"algorithm.enable_token_weights={enabled}")))
            models.append(torch.load(output / "global_step_1" / "actor" / "model_world_size_1_rank_0.pt"))
            metrics = _metrics_of_first_step(output)
            assert metrics["vgr"]["mean"] > 0
            if enabled == "true":
                assert metrics["token_weights"]["weighted_rows"] == 0.5  # half of the rows have an image
                assert metrics["token_weights"]["std"] > 0
                assert math.isclose(metrics["token_weights"]["mean"], 1, abs_tol=0.2)
    weighted, unweighted = models
    assert any(not torch.equal(value, unweighted[name]) for name, value in weighted.items())


def _arguments(model: str, data: str, output: Path, *overrides: str) -> list[str]:
    return [
        f"data.train_files={data}",
        f"data.val_files={data}",
        "data.rollout_batch_size=4",
        "data.max_prompt_length=96",
        "data.max_response_length=8",
        "data.min_pixels=null",
        "data.filter_overlong_prompts_workers=1",
        "algorithm.disable_kl=true",
        f"worker.actor.model.model_path={model}",
        "worker.actor.global_batch_size=4",
        "worker.actor.optim.lr=1e-3",
        "worker.actor.fsdp.mp_param_dtype=fp32",
        "worker.rollout.name=hf",
        "worker.rollout.n=4",
        "worker.rollout.dtype=fp32",
        "worker.rollout.collect_attentions=true",
        "worker.rollout.disable_tqdm=true",
        f"worker.reward.reward_function={ROOT}/tests/rewards.py:compute_score",
        "trainer.logger=[file]",
        "trainer.n_gpus_per_node=1",
        "trainer.max_steps=1",
        "trainer.val_before_train=false",
        f"trainer.save_checkpoint_path={output}",
        *overrides,
    ]


def _metrics_of_first_step(output: Path) -> dict:
    records = [json.loads(line) for line in (output / "experiment_log.jsonl").read_text().splitlines()]
    return next(record for record in records if "actor" in record)


CHECKS = {
    "imports": test_imports,
    "configuration: fields, defaults, command line": test_configuration,
    "attention metrics from generate": test_attention_metrics,
    "token weights from attention": test_token_weights,
    "one weighted update, unlike the unweighted one": test_one_weighted_update,
}

if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars would tear the list of ticks apart
    for name, check in CHECKS.items():
        check()
        print(f"✓ {name}", flush=True)
