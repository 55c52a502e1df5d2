# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_saved_files.py
"""Files beside the weights: the tokenizer's are the model's own, and older transformers find their rope fields."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, GenerationConfig, Qwen2Config

from verl.models.saved_files import GenerationSettings, OriginalFiles, add_legacy_rope, with_legacy_rope
from verl.utils.tokenizer import get_processor, get_tokenizer


@pytest.mark.parametrize(
    ("rope", "legacy"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
        (
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_rope_fields_by_hand_in_the_config_and_in_its_text_config(rope: dict, legacy: dict) -> None:
    config = {"rope_parameters": rope, "hidden_size": 8}
    assert with_legacy_rope(config) == {**legacy, **config}
    nested = {"text_config": config, "vision_config": {"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0}}}
    assert with_legacy_rope(nested) == {**nested, "text_config": {**legacy, **config}}
    assert with_legacy_rope({**config, "rope_theta": 7.0})["rope_theta"] == 7.0
    assert with_legacy_rope({"hidden_size": 8}) == {"hidden_size": 8}


def test_transformers_of_today_reads_the_same_config(tmp_path: Path, tiny_model_path: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 512}
    for name, config in (
        ("text", Qwen2Config(rope_parameters=rope)),
        ("vl", AutoConfig.from_pretrained(tiny_model_path)),
    ):
        config.save_pretrained(tmp_path / name)
        before = AutoConfig.from_pretrained(tmp_path / name).to_dict()
        add_legacy_rope(tmp_path / name)
        after = AutoConfig.from_pretrained(tmp_path / name)
        parts = [after.get_text_config().rope_parameters, before.get("text_config", before)["rope_parameters"]]
        assert parts[0] == parts[1]
        assert "rope_theta" in json.dumps(json.loads((tmp_path / name / "config.json").read_text()))


def test_a_generation_config_is_kept_also_where_transformers_refuses_to_save_it(tmp_path: Path) -> None:
    usual = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[1, 2])
    usual.save_pretrained(tmp_path / "usual")
    GenerationSettings(usual).save_pretrained(tmp_path / "kept")
    kept, written = (tmp_path / name / "generation_config.json" for name in ("kept", "usual"))
    assert kept.read_bytes() == written.read_bytes()
    refused = GenerationConfig(temperature=0.6, top_p=0.95)
    with pytest.raises(ValueError, match="invalid"):
        refused.save_pretrained(tmp_path / "refused")
    GenerationSettings(refused).save_pretrained(tmp_path / "kept")
    again = GenerationConfig.from_pretrained(tmp_path / "kept")
    assert (again.temperature, again.top_p) == (0.6, 0.95)


def test_a_checkpoint_keeps_the_models_own_tokenizer_files_byte_for_byte(tiny_model_path: str, tmp_path: Path) -> None:
    source = Path(tiny_model_path)
    OriginalFiles(tiny_model_path, get_processor(tiny_model_path)).save_pretrained(tmp_path / "kept")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} < set(kept)
    assert kept == {name: (source / name).read_bytes() for name in kept}
    assert not {"config.json", "model.safetensors"} & set(kept)

    (tmp_path / "empty").mkdir()
    OriginalFiles(str(tmp_path / "empty"), get_tokenizer(tiny_model_path)).save_pretrained(tmp_path / "written")
    assert get_tokenizer(str(tmp_path / "written")).get_vocab() == get_tokenizer(tiny_model_path).get_vocab()
