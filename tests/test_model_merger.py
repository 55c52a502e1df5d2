# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_model_merger.py
"""What the merger writes is what the model's own `save_pretrained` writes, however many ranks held the model."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import model_merger
import pytest
import torch
import transformers
from model_merger import assemble, main, parse, read_whole_tensors, save_pretrained_with_generation_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
)

from tests.probe import make_config, start_alone
from tests.test_safe_load import Attack
from tests.tiny import CORPUS, build_tokenizer, make_tiny_model
from tests.vlm_zoo import QWEN_MEDIA, TEXT_CONFIG, mrope
from verl.models.saved_files import with_legacy_rope
from verl.models.value_model import ValueModel
from verl.utils.checkpoint import model_file
from verl.workers.fsdp2 import build_mesh

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def qwen2(tied: bool) -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(**{**TEXT_CONFIG, "tie_word_embeddings": tied})


def qwen3_moe() -> transformers.PretrainedConfig:
    return transformers.Qwen3MoeConfig(**TEXT_CONFIG, **EXPERTS)


def qwen3_vl_moe() -> transformers.PretrainedConfig:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=14)
    return transformers.Qwen3VLMoeConfig(
        text_config={**TEXT_CONFIG, **EXPERTS, "rope_parameters": mrope(), "norm_topk_prob": True},
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_MEDIA,
    )


CONFIGS = {
    "text": lambda: qwen2(tied=False),
    "tied text": lambda: qwen2(tied=True),
    "text with experts": qwen3_moe,
    "image-text with experts": qwen3_vl_moe,
}
IMAGE_TEXT = ("image-text", "tied image-text", "image-text with experts")
KINDS = (*CONFIGS, *IMAGE_TEXT[:2])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of one of `KINDS`, as one is published, written once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            path = made[kind] = tmp_path_factory.mktemp("model")
            if kind in CONFIGS:
                torch.manual_seed(0)
                auto_class = AutoModelForImageTextToText if kind in IMAGE_TEXT else AutoModelForCausalLM
                auto_class.from_config(CONFIGS[kind](), dtype=torch.float32).save_pretrained(path)
            else:
                make_tiny_model(path, tie_word_embeddings=kind.startswith("tied"))
            load(path).save_pretrained(path)  # a config that was read has dtypes which a new one lacks
            if kind == "image-text with experts":
                turn_experts(path / "model.safetensors")
        return made[kind]

    return make


def turn_experts(path: Path) -> None:
    """From the way round that transformers holds and writes them to the one that is published, and that vLLM reads."""
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value.transpose(-1, -2).contiguous()
    save_file(tensors, path, {"format": "pt"})


def load(folder: Path, **options) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    is_image_text = type(config) in AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, **options)


def write_description(local_dir: Path, source: Path) -> Path:
    """`huggingface/` as a run leaves it: all of the model's folder but the weights."""
    target = local_dir / "huggingface"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    return target


def write_checkpoint(local_dir: Path, source: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint of one rank, plain tensors."""
    write_description(local_dir, source)
    torch.save(dict(state), local_dir / model_file(1, 0))
    return local_dir


def write_shards(local_dir: Path, source: Path, mesh_shape: tuple[int, ...]) -> None:
    """The checkpoint of as many ranks as `mesh_shape` has places, in a process that has no process group.

    The ranks take turns in this one: sharding only cuts, so that the ranks need not talk.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    write_description(local_dir, source)
    world_size = math.prod(mesh_shape)
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        names = ("ddp", "fsdp")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        model = load(source, dtype=torch.float32)
        fully_shard(model, mesh=mesh)
        torch.save(model.state_dict(), local_dir / model_file(world_size, rank))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, since this one may be in a process group already."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def merge(local_dir: Path, *options: str) -> Path:
    main(parse(["--local_dir", str(local_dir), *options]))
    return local_dir / "huggingface"


def weights_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_folder(merged: Path, source: Path) -> None:
    """The same tensors under the same names, bit for bit, and the same JSON files."""
    expected, found = weights_on_disk(source), weights_on_disk(merged)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    for path in source.glob("*.json"):
        expected = json.loads(path.read_text())
        expected = with_legacy_rope(expected) if path.name == "config.json" else expected
        assert json.loads((merged / path.name).read_text()) == expected, path.name


@pytest.mark.parametrize(
    ("kind", "mesh_shape"),
    [
        ("image-text", (2,)),
        ("tied image-text", (3,)),
        ("text", (5,)),
        ("tied text", (2, 2)),
        ("text with experts", (3,)),
        ("image-text with experts", (2, 3)),
    ],
    ids=str,
)
def test_shards_merge_to_what_the_model_itself_writes(
    kind: str, mesh_shape: tuple[int, ...], folder_of, elsewhere: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """64 rows over three or five ranks are uneven, and of 4 experts two ranks get two each and the third none."""
    source = folder_of(kind)
    elsewhere.submit(write_shards, tmp_path, source, mesh_shape).result()
    merged = merge(tmp_path, "--dtype", "float32")
    assert_same_folder(merged, source)
    modes = {path.stat().st_mode & 0o777 for path in merged.iterdir()}
    assert modes == {(merged / "config.json").stat().st_mode & 0o777} != {0o600}
    with torch.no_grad():
        logits = [load(folder)(input_ids=IDS).logits for folder in (merged, source)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_tensors_merge_to_what_the_model_itself_writes(kind: str, folder_of, tmp_path: Path) -> None:
    source = folder_of(kind)
    original = load(source)
    write_checkpoint(tmp_path, source, original.state_dict())
    assert_same_folder(merge(tmp_path, "--dtype", "float32"), source)
    with torch.no_grad():
        ready_to_run = model_merger.merge(tmp_path, torch.float32)
        assert torch.equal(ready_to_run(input_ids=IDS).logits, original(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_published_checkpoints_merge_as_well(kind: str, folder_of, tmp_path: Path) -> None:
    """As EasyR1 saved them with an older transformers: experts one by one, or fused the other way round."""
    source = folder_of(kind)
    write_checkpoint(tmp_path, source, weights_on_disk(source))
    assert_same_folder(merge(tmp_path, "--dtype", "float32"), source)


def test_the_checkpoint_of_two_workers_merges_to_their_weights(two_ranks, tmp_path: Path) -> None:
    two_ranks.save_checkpoint(str(tmp_path), model_only=True)
    merged = load(merge(tmp_path / "actor", "--dtype", "float32")).state_dict()
    expected = two_ranks.weights()[0]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


def test_weights_are_bfloat16_unless_asked_otherwise(folder_of, tmp_path: Path) -> None:
    source = folder_of("image-text")
    write_checkpoint(tmp_path, source, load(source).state_dict())
    merged = merge(tmp_path)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    expected = weights_on_disk(source)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in weights_on_disk(merged).items())
    assert load(merged).dtype == torch.bfloat16


def test_a_second_merge_takes_the_place_of_the_first(folder_of, tmp_path: Path) -> None:
    source = folder_of("text")
    state = load(source).state_dict()
    write_checkpoint(tmp_path, source, state)
    merge(tmp_path, "--dtype", "float32")
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / model_file(1, 0))
    merged = weights_on_disk(merge(tmp_path, "--dtype", "float32"))
    assert all(torch.equal(value, state[name] + 1) for name, value in merged.items())


def test_generation_config_tokenizer_and_processor_stay(folder_of, tmp_path: Path) -> None:
    source = folder_of("image-text")
    write_checkpoint(tmp_path, source, load(source).state_dict())
    folder = tmp_path / "huggingface"
    generation = {"do_sample": True, "temperature": 0.3, "top_k": 7, "eos_token_id": [2, 3]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    merge(tmp_path)
    kept = json.loads((folder / "generation_config.json").read_text())
    assert {key: kept[key] for key in generation} == generation
    for name in before.keys() - {"config.json", "generation_config.json"}:
        assert (folder / name).read_bytes() == before[name]


def test_a_generation_config_that_transformers_would_not_save_is_kept(folder_of, tmp_path: Path) -> None:
    """A temperature without sampling, as published checkpoints have it; other arguments reach `save_pretrained`."""
    model = load(folder_of("text"))
    config = transformers.GenerationConfig(do_sample=False, temperature=0.3)
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)
    save_pretrained_with_generation_config(model, tmp_path, config, max_shard_size="100KB")
    assert transformers.GenerationConfig.from_pretrained(tmp_path).temperature == 0.3
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert model.generation_config is config
    save_pretrained_with_generation_config(load(folder_of("text")), tmp_path / "own", None)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "own").temperature is None


# ---- critics ----


def write_critic(local_dir: Path, source: Path) -> ValueModel:
    critic = ValueModel(load(source))
    torch.nn.init.normal_(critic.value_head.weight)
    torch.nn.init.normal_(critic.value_head.bias)
    torch.save(critic.state_dict(), local_dir / model_file(1, 0))
    critic.config.save_pretrained(local_dir / "huggingface")
    return critic


@pytest.mark.parametrize("kind", ["text", "tied text"])
def test_a_critic_becomes_a_token_classifier_whose_logits_are_its_values(kind: str, folder_of, tmp_path: Path) -> None:
    critic = write_critic(tmp_path, folder_of(kind)).eval()
    merged = AutoModelForTokenClassification.from_pretrained(merge(tmp_path, "--dtype", "float32"))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, critic(input_ids=IDS).logits)


def test_a_critic_of_easyr1_keeps_its_class(folder_of, tmp_path: Path) -> None:
    critic = AutoModelForTokenClassification.from_pretrained(folder_of("text"), num_labels=1)
    critic.save_pretrained(tmp_path / "source")
    write_checkpoint(tmp_path / "critic", tmp_path / "source", critic.state_dict())
    assert_same_folder(merge(tmp_path / "critic", "--dtype", "float32"), tmp_path / "source")


def test_a_critic_with_images_is_refused_but_can_be_read(folder_of, tmp_path: Path) -> None:
    critic = write_critic(tmp_path, folder_of("image-text"))
    with pytest.raises(ValueError, match=r"critic on a qwen2_5_vl model.*read_whole_tensors.*value_model.ValueModel"):
        merge(tmp_path)
    again = ValueModel(load(folder_of("image-text")))
    again.load_state_dict(dict(read_whole_tensors(tmp_path)))
    assert torch.equal(again.value_head.weight, critic.value_head.weight)


# ---- adapters ----


def write_adapted(local_dir: Path, source: Path) -> torch.nn.Module:
    """A random adapter of rank 2 and its folder as peft writes it; returns the adapted model."""
    write_description(local_dir, source)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    adapted = get_peft_model(load(source), config)
    adapted.save_pretrained(local_dir / "lora_adapter")
    return adapted


@pytest.mark.parametrize("kind", ["image-text", "tied text"])
@pytest.mark.parametrize("in_rank_files", ["whole model", "adapters"])
def test_an_adapter_is_merged_into_its_base(in_rank_files: str, kind: str, folder_of, tmp_path: Path) -> None:
    """EasyR1's rank files hold the adapted model whole. The update is alpha / r times B A: here 3 B A."""
    source = folder_of(kind)
    adapted = write_adapted(tmp_path, source)
    state = {
        name: value
        for name, value in adapted.state_dict().items()
        if in_rank_files == "whole model" or "lora_" in name
    }
    torch.save(state, tmp_path / model_file(1, 0))
    merged = merge(tmp_path, "--dtype", "float32")
    before, after = weights_on_disk(source), weights_on_disk(merged)
    adapter = load_file(tmp_path / "lora_adapter" / "adapter_model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    targets = [name for name in before if re.search(r"(q_proj|down_proj)\.weight$", name)]
    assert before.keys() == after.keys() and changed == set(targets)
    (a, b), (name,) = (
        [key for key in sorted(tensors) if "layers.1.self_attn.q_proj" in key] for tensors in (adapter, changed)
    )
    a, b = adapter[a], adapter[b]
    torch.testing.assert_close(after[name] - before[name], 3 * b @ a, atol=1e-6, rtol=0)
    with torch.no_grad():
        expected, logits = adapted.eval()(input_ids=IDS).logits, load(merged)(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_adapters_of_a_worker_merge_to_what_it_sends_its_rollouts(
    tied: bool, lone_process_group, tmp_path: Path
) -> None:
    """From files of adapters alone, on both towers, under the names that they have in the model itself."""
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    worker = start_alone(make_config(source, "worker.actor.model.lora.rank=4", "worker.actor.model.lora.alpha=12"))
    worker.shift_weights(seed=0)
    worker.save_checkpoint(str(tmp_path), model_only=True)
    merged = load(merge(tmp_path / "actor", "--dtype", "float32")).state_dict()
    expected, before = worker.weights(), load(Path(source)).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    changed = [name for name, value in merged.items() if (value - before[name]).abs().max() > 1e-3]
    assert {name.split(".")[1] for name in changed} == {"visual", "language_model"}


def test_base_and_adapter_are_rounded_to_bfloat16_once_as_a_sum(folder_of, tmp_path: Path) -> None:
    """The update is not rounded before: a step of training may be smaller than a step of bfloat16."""
    source = folder_of("text")
    write_adapted(tmp_path, source)
    merged, base = weights_on_disk(merge(tmp_path)), weights_on_disk(source)
    adapter = load_file(tmp_path / "lora_adapter" / "adapter_model.safetensors")
    for name, value in merged.items():
        expected = base[name].bfloat16().float()
        factors = [f"base_model.model.{name.removesuffix('weight')}lora_{factor}.weight" for factor in "BA"]
        if factors[0] in adapter:
            expected += 3 * (adapter[factors[0]] @ adapter[factors[1]])
        assert torch.equal(value, expected.bfloat16())


def test_a_base_that_moved_is_asked_for_and_given(folder_of, tmp_path: Path) -> None:
    moved, local_dir = tmp_path / "moved", tmp_path / "actor"
    shutil.copytree(folder_of("text"), tmp_path / "base")
    expected = write_adapted(local_dir, tmp_path / "base").merge_and_unload().state_dict()
    (tmp_path / "base").rename(moved)
    with pytest.raises(
        ValueError, match=r"base, the base model that .*adapter_config.json names, was not found; --base"
    ):
        merge(local_dir)
    with pytest.raises(ValueError, match=r"--base_model=.*nowhere was not found"):
        merge(local_dir, "--base_model", str(tmp_path / "nowhere"))
    merged = load(merge(local_dir, "--base_model", str(moved), "--dtype", "float32")).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


def test_an_adapter_with_other_weights_than_its_config_says_is_refused(folder_of, tmp_path: Path) -> None:
    write_adapted(tmp_path, folder_of("text"))
    path = tmp_path / "lora_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = min(tensors)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = tensors.pop(lost)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing .*layers.0.mlp.down_proj.lora_A.*unexpected .*up_proj.lora_A"):
        merge(tmp_path)


def test_adapters_without_their_folder_are_refused(folder_of, tmp_path: Path) -> None:
    adapted = write_adapted(tmp_path, folder_of("text"))
    shutil.rmtree(tmp_path / "lora_adapter")
    torch.save(adapted.state_dict(), tmp_path / model_file(1, 0))
    with pytest.raises(ValueError, match=r"holds adapters \(base_model.model.*lora_A.*not their folder lora_adapter/"):
        merge(tmp_path)


# ---- refusals ----


def test_the_output_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"huggingface is where the model is written; give the folder above it"):
        merge(tmp_path / "huggingface")


def test_a_folder_without_weights_points_to_those_below_that_have_some(folder_of, tmp_path: Path) -> None:
    write_description(tmp_path, folder_of("text"))
    with pytest.raises(ValueError, match=r"has no file model_world_size_<W>_rank_<r>.pt$"):
        merge(tmp_path)
    for name in ("actor", "critic"):
        write_checkpoint(tmp_path / name, folder_of("text"), {})
    with pytest.raises(ValueError, match=r"give one of the folders below it that have: actor, critic$"):
        merge(tmp_path)


def test_a_checkpoint_that_does_not_say_which_model_it_is_of_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / model_file(1, 0))
    with pytest.raises(ValueError, match=r"huggingface/config.json does not exist: it says which model"):
        merge(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([(3, 1)], r"lacks model_world_size_3_rank_0.pt, model_world_size_3_rank_2.pt: .*all 3 ranks"),
        ([(2, 0), (2, 1), (1, 0)], r"different numbers of ranks: of 2, and also model_world_size_1_rank_0.pt; move"),
    ],
)
def test_ranks_that_are_missing_or_of_another_run_are_named(files, message: str, folder_of, tmp_path: Path) -> None:
    write_description(tmp_path, folder_of("text"))
    for pair in files:
        torch.save({}, tmp_path / model_file(*pair))
    with pytest.raises(ValueError, match=message):
        merge(tmp_path)


def test_a_checkpoint_that_would_run_code_or_is_cut_short_is_refused_by_its_file(folder_of, tmp_path: Path) -> None:
    write_description(tmp_path, folder_of("text"))
    path, touched = tmp_path / model_file(1, 0), tmp_path / "touched"
    torch.save({"a": Attack(touched)}, path)
    with pytest.raises(ValueError, match=rf"^{path} would run code: it holds the pickled global posix.system"):
        merge(tmp_path)
    assert not touched.exists()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^{path} is cut short"):
        merge(tmp_path)


def test_ranks_that_hold_different_tensors_are_refused(folder_of, tmp_path: Path) -> None:
    write_description(tmp_path, folder_of("text"))
    torch.save({"a": torch.zeros(1)}, tmp_path / model_file(2, 0))
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / model_file(2, 1))
    with pytest.raises(ValueError, match=r"rank_0.pt and .*rank_1.pt are not of one checkpoint: only one .* has b"):
        merge(tmp_path)


@pytest.mark.parametrize("kind", ["text", "image-text"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("norm.weight", None, r"do not fit a Qwen2\w+: missing keys: [\w.]*norm.weight$"),
        ("norm.weight", "norm.scale", r"missing keys: [\w.]*norm.weight; unexpected keys: [\w.]*norm.scale$"),
        ("norm.weight", "norm.weight", r"mismatched keys: .*norm.weight"),
    ],
)
def test_weights_of_another_model_are_named(old, new, message: str, kind: str, folder_of, tmp_path: Path) -> None:
    """One tensor is gone, has another name, or has another shape."""
    state = load(folder_of(kind)).state_dict()
    (name,) = (name for name in state if re.fullmatch(r"(model|model\.language_model)\.norm\.weight", name))
    value = state.pop(name)
    if new is not None:
        state[name.replace(old, new)] = torch.zeros(3) if new == old else value
    write_checkpoint(tmp_path, folder_of(kind), state)
    with pytest.raises(ValueError, match=message):
        merge(tmp_path)


def test_a_base_for_a_checkpoint_without_adapters_is_refused(folder_of, tmp_path: Path) -> None:
    write_description(tmp_path, folder_of("text"))
    with pytest.raises(ValueError, match=r"--base_model=somewhere is for low-rank adapters, but .* no lora_adapter/"):
        merge(tmp_path, "--base_model", "somewhere")


def test_placements_that_cannot_be_put_together_are_refused(lone_process_group) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = build_mesh(torch.device("cpu"))
    pending = DTensor.from_local(torch.zeros(2), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"placement Partial.* is not known here, only Shard and Replicate"):
        assemble([pending])
    short = DTensor.from_local(torch.zeros(2), mesh, [Shard(0)], shape=torch.Size([3]), stride=(1,))
    with pytest.raises(ValueError, match=r"the shards make up \(2,\), but the tensor is \(3,\)"):
        assemble([short])


def test_public_needs_a_place_to_upload_to(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--local_dir", "actor", "--public"])
    assert "--hf_upload_path says where to" in capsys.readouterr().err


# ---- the command, and the hub ----


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/model_merger.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    """A server on this machine that answers an upload as the hub does; `asked` holds (method, path, body) of requests,
    `taken` the names that are repositories already, each with whether it is private."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            self.server.asked.append((self.command, path, body))
            url = f"http://{self.headers['Host']}"
            status, reply = 200, {}
            if path == "/api/repos/create":
                wanted = json.loads(body)
                name = "/".join(filter(None, (wanted.get("organization", "me"), wanted["name"])))
                status = 409 if name in self.server.taken else 200
                self.server.taken.setdefault(name, wanted.get("private") or wanted.get("visibility") == "private")
                reply = {"url": f"{url}/{name}"}
            elif path.endswith("/preupload/main"):
                files = [file["path"] for file in json.loads(body)["files"]]
                reply = {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            elif "/commit/" in path:
                reply = {"commitUrl": f"{url}/me/model/commit/1", "commitOid": "1", "success": True}
            elif path.startswith("/api/models/"):
                name = "/".join(path.split("/")[3:5])
                reply = {"id": name, "private": self.server.taken[name], "sha": "0", "siblings": [], "tags": []}
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keeps the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.taken = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def upload(hub: ThreadingHTTPServer, local_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    place = dict(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_TOKEN="hf_of_nobody", HF_HUB_OFFLINE="0")
    return command("--local_dir", str(local_dir), *arguments, **place, HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1")


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_is_private_unless_asked_and_holds_the_merged_files(
    public: bool, hub, folder_of, tmp_path: Path
) -> None:
    source = folder_of("text")
    write_checkpoint(tmp_path, source, load(source).state_dict())
    finished = upload(hub, tmp_path, "--hf_upload_path", "me/model", *(["--public"] if public else []))
    assert finished.returncode == 0, finished.stderr
    assert hub.taken == {"me/model": not public}
    assert finished.stdout.splitlines()[-1] == f"uploaded to http://127.0.0.1:{hub.server_port}/me/model"
    (commit,) = (body for _, path, body in hub.asked if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "huggingface").iterdir()}
    assert "model.safetensors" in files


def test_a_public_repository_is_not_written_to_unless_asked(hub, folder_of, tmp_path: Path) -> None:
    """And the command's errors are one line."""
    source = folder_of("text")
    write_checkpoint(tmp_path, source, load(source).state_dict())
    hub.taken["me/model"] = False
    finished = upload(hub, tmp_path, "--hf_upload_path", "me/model")
    assert finished.returncode == 1
    assert finished.stderr == (
        "error: --hf_upload_path=me/model is a public repository; name another, or allow it with --public\n"
    )
    assert not any("/commit/" in path for _, path, _ in hub.asked)


# ---- vLLM ----

VLLM_ANSWERS = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    for path in sys.argv[1:]:
        llm = LLM(
            path,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=2,
            kv_cache_memory_bytes=2**24,
            limit_mm_per_prompt={"image": 0, "video": 0},
        )
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8, 9]}], params, use_tqdm=False)
        print("answer", *output.outputs[0].token_ids)
        del llm  # its process group goes with it, and the next engine makes one
"""


def make_servable(kind: str, path: Path) -> None:
    """A model with all that vLLM asks for. Heads have 32 dimensions, the least that it takes on a CPU."""
    if kind == "image-text":
        make_tiny_model(path, hidden_size=128)
        return
    tokenizer = build_tokenizer(CORPUS)
    config = CONFIGS[kind]()
    config.text_config.update(dict(head_dim=32, hidden_size=128, vocab_size=len(tokenizer)))
    config.vision_config.out_hidden_size = 128
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    for field in QWEN_MEDIA:
        name = field.removesuffix("_token_id").replace("image", "image_pad").replace("video", "video_pad")
        setattr(config, field, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen3VLVideoProcessor(), tokenizer.chat_template
    ).save_pretrained(path)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="it starts vLLM's CPU build; the folder is the same anywhere")
def test_vllm_answers_with_merged_models_as_transformers_does(elsewhere: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Greedily, in fp32: a dense model, and one with experts."""
    sources, merged = [], []
    for kind in ("image-text", "image-text with experts"):
        sources.append(tmp_path / kind / "model")
        local_dir = tmp_path / kind / "actor"
        make_servable(kind, sources[-1])
        elsewhere.submit(write_shards, local_dir, sources[-1], (3,)).result()
        merged.append(merge(local_dir, "--dtype", "float32"))
    script = tmp_path / "answer.py"
    script.write_text(VLLM_ANSWERS)
    in_one_process = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # another one would import it all again
    finished = subprocess.run(
        [sys.executable, script, *merged], env=in_one_process, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith("answer")]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1, attention_mask=torch.ones_like(IDS))
    for line, source in zip(lines, sources, strict=True):
        expected = load(source, dtype=torch.float32).generate(IDS, **options)[0, IDS.shape[1] :]
        assert [int(word) for word in line.split()[1:]] == expected.tolist()
