# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_preparation.py
"""What is refused in a second, before Ray and any model: columns, rows, the reward function's name, a logger's key."""

from pathlib import Path

import pytest
from datasets import Dataset

from verl.data.headers import check_headers
from verl.trainer.config import DataConfig
from verl.trainer.tracking import require_loggers
from verl.utils.user_code import find_function, load_module, require_defined

KEY = "worker.reward.reward_function"


def parquet(path: Path, num_rows: int, **columns: str) -> str:
    names = {"prompt": "What?", "answer": "7", **columns}
    Dataset.from_list([names] * num_rows).to_parquet(path)
    return str(path)


def config_of(train: str | list[str], val: str, **settings) -> DataConfig:
    return DataConfig(train_files=train, val_files=val, **{"rollout_batch_size": 4, **settings})


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    train, val = parquet(tmp_path / "train.parquet", 4), parquet(tmp_path / "val.parquet", 1)
    check_headers(config_of(train, val))
    with pytest.raises(ValueError, match=r"data.prompt_key=problem is no column of .*train.parquet'; it has prompt"):
        check_headers(config_of(train, val, prompt_key="problem"))
    other = parquet(tmp_path / "other.parquet", 1, solution="8")
    with pytest.raises(ValueError, match="data.answer_key=solution is no column of .*val.parquet"):
        check_headers(config_of([other] * 4, val, answer_key="solution"))


def test_fewer_rows_in_all_training_files_than_a_batch_are_refused(tmp_path: Path) -> None:
    train, val = parquet(tmp_path / "train.parquet", 3), parquet(tmp_path / "val.parquet", 1)
    check_headers(config_of([train, train], val))
    check_headers(config_of(train, val, mini_rollout_batch_size=2))
    with pytest.raises(ValueError, match="the training set has 3 prompts, fewer than the 4 of one batch"):
        check_headers(config_of(train, val))


def test_what_has_no_header_is_left_to_the_loader(tmp_path: Path) -> None:
    val = parquet(tmp_path / "val.parquet", 1)
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "lines.jsonl").write_text('{"question": 1}\n')
    for train in ("org/set@train", str(tmp_path / "broken.parquet"), str(tmp_path / "lines.jsonl"), str(tmp_path)):
        check_headers(config_of(train, val))


@pytest.mark.parametrize(
    "source",
    [
        "def main(x): ...",
        "async def main(x): ...",
        "main = lambda x: x",
        "class main: ...",
        "from somewhere import main",
        "from somewhere import score as main",
        "from somewhere import *",
        "try:\n    from fast import main\nexcept ImportError:\n    def main(x): ...",
        "if True:\n    first, main = 1, print",
        "globals()['ma' + 'in'] = print",
        "def __getattr__(name): ...",
    ],
)
def test_a_function_that_may_be_there_passes(source: str, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(source)
    require_defined(f"{tmp_path}/reward.py:main", KEY)


def test_a_function_that_cannot_be_there_is_refused_as_when_the_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "reward_of_others.py"
    path.write_text("import math\ndef compute_score(x):\n    def main(): ...\ndef _main(x): ...\n")
    with pytest.raises(ValueError) as early:
        require_defined(f"{path}:main", KEY)
    with pytest.raises(ValueError) as late:
        find_function(load_module(str(path), KEY), "main", KEY)
    assert str(early.value) == str(late.value)
    assert "has ['compute_score']; write" in str(early.value)


def test_a_file_that_is_no_python_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def main(:\n")
    with pytest.raises(ValueError, match=f"{KEY}=.*reward.py:main cannot be read as Python: .*line 1"):
        require_defined(f"{tmp_path}/reward.py:main", KEY)


def test_wandb_without_a_key_is_refused_and_offline_or_with_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        require_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(ValueError, match=r"trainer.logger=wandb has no key: `wandb login` .*WANDB_MODE=offline"):
        require_loggers(["wandb"])
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    require_loggers(["wandb"])
    wandb.teardown()
