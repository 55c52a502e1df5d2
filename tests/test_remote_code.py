# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_remote_code.py
"""Code that comes with a model runs only where its user says so, and the refusal names the key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_merger
import pytest
import torch

from tests.tiny import CORPUS, build_tokenizer
from verl.models.loader import load_model_config
from verl.utils.checkpoint import model_file
from verl.utils.remote_code import refused_remote_code
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.actor.config import ModelConfig

CODE = """
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

Path({touched!r}).touch()


class StrangeConfig(PretrainedConfig):
    model_type = "strange"


class StrangeProcessor(ProcessorMixin):
    pass


class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """The file that the model's code touches."""
    return tmp_path / "touched"


@pytest.fixture
def model(tmp_path: Path, touched: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a model whose config, tokenizer and processor are classes of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "huggingface"
    build_tokenizer(CORPUS).save_pretrained(folder)
    (folder / "strange.py").write_text(CODE.format(touched=str(touched)))
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"processor_class": "StrangeProcessor", "auto_map": {"AutoProcessor": "strange.StrangeProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "StrangeTokenizer",
        "auto_map": {"AutoTokenizer": [None, "strange.StrangeTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder)


def load_config_of(path: str, **settings: Any) -> object:
    return load_model_config(ModelConfig(path, **settings))


@pytest.mark.parametrize("load", [load_config_of, get_tokenizer, get_processor])
def test_a_models_code_does_not_run_unasked_and_the_refusal_names_the_key(
    load: Callable[..., object], model: str, touched: Path
) -> None:
    with pytest.raises(
        ValueError, match=f"^{model} comes with Python code .* set worker.actor.model.trust_remote_code"
    ):
        load(model)
    assert not touched.exists()


def test_a_models_code_runs_where_it_is_trusted(model: str, touched: Path) -> None:
    assert type(load_config_of(model, trust_remote_code=True)).__name__ == "StrangeConfig"
    assert touched.exists()


def test_the_merger_names_its_own_switch(model: str, touched: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / model_file(1, 0))
    with pytest.raises(ValueError, match="comes with Python code .* set --trust_remote_code$"):
        model_merger.main(model_merger.parse(["--local_dir", str(tmp_path)]))
    assert not touched.exists()


def test_other_errors_keep_their_words() -> None:
    with pytest.raises(ValueError, match="^something else$"), refused_remote_code("a/model"):
        raise ValueError("something else")
