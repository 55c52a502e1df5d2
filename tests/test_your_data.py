# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_your_data.py
"""The page "Your own data in ten minutes" does what it says: its files make data and train."""

import runpy
from pathlib import Path

import pytest

from tests.documents import files_in
from tests.pool import run_shared
from verl.trainer.config import load_config
from verl.trainer.sinks import read_log

SMALL = [
    "data.rollout_batch_size=4",
    "data.max_prompt_length=192",
    "data.max_response_length=12",
    "data.filter_overlong_prompts_workers=1",
    "worker.actor.global_batch_size=2",
    "worker.actor.micro_batch_size_per_device_for_update=2",
    "worker.actor.micro_batch_size_per_device_for_experience=4",
    "worker.actor.fsdp.mp_param_dtype=fp32",
    "worker.rollout.name=hf",
    "worker.rollout.n=4",
    "worker.rollout.dtype=fp32",
    "worker.rollout.disable_tqdm=true",
    "trainer.n_gpus_per_node=1",
    "trainer.max_steps=2",
    "trainer.logger=[file]",
]
"""What the tiny model and a CPU need beside the page's own configuration."""


@pytest.fixture
def folder(tmp_path: Path, private_cache, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the page's files in it; the working folder."""
    for name, content in files_in("your_data.md").items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_files_make_data_and_train(folder: Path, tiny_model_path: str, ray_cluster) -> None:
    script = (folder / "make_shapes.py").read_text()
    assert "rows(640)" in script and "rows(64)" in script
    (folder / "make_shapes.py").write_text(script.replace("rows(640)", "rows(8)").replace("rows(64)", "rows(4)"))
    runpy.run_path("make_shapes.py")
    assert len((folder / "shapes.yaml").read_text().splitlines()) <= 20
    config = load_config(["config=shapes.yaml"])
    assert (config.trainer.max_steps, config.worker.rollout.n) == (40, 8)
    model = f"worker.actor.model.model_path={tiny_model_path}"
    run_shared(load_config(["config=shapes.yaml", *SMALL, model, "trainer.save_checkpoint_path=run"]))
    log = read_log(folder / "run")
    assert set(log) == {0, 1, 2}
    assert 0 <= log[2]["val/accuracy_reward"] <= 1
    assert log[1]["token_weights/weighted_rows"] == 1
    assert log[1]["vgr/mean"] > 0


def test_the_pages_reward_is_the_last_number(folder: Path) -> None:
    compute_score = runpy.run_path("shapes_reward.py")["compute_score"]
    samples = [{"response": response, "ground_truth": "3"} for response in ("2 squares, so 3", "3 of 4", "none", "13")]
    assert [result["overall"] for result in compute_score(samples)] == [1.0, 0.0, 0.0, 0.0]
