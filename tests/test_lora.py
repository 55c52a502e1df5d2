# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_lora.py
"""Low-rank adapters: they start at zero, only they train, and the policy equals the model with merged weights."""

import json
from pathlib import Path

import model_merger
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import answer_at_random, make_prompts, response_logits, uids_of
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    ProbeWorker,
    make_config,
    start_alone,
    start_group,
    start_two,
    without_clock,
)
from tests.tiny import make_tiny_model, make_tiny_text_model
from tests.vlm_zoo import FAMILIES, make_model, model_inputs, write_prompts
from verl.models.loader import load_model
from verl.models.trainable import choose_trainable
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.actor.config import LoraConfig, ModelConfig
from verl.workers.fsdp2 import full_tensor
from verl.workers.rollout.base import Sampling

RANK, ALPHA = 4, 12
LORA = (f"worker.actor.model.lora.rank={RANK}", f"worker.actor.model.lora.alpha={ALPHA}")
TEXT_ONLY = "worker.actor.model.lora.exclude_modules=.*visual.*"
FROZEN = "worker.actor.model.freeze_vision_tower=true"
FAST = "worker.actor.optim.lr=1e-2"


@pytest.fixture(scope="module")
def prompts(tiny_model_path: str, ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    return make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def batch(prompts: DataProto) -> DataProto:
    """Eight rows: the first four with images, the last four text only, so one of two ranks has no image."""
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


def start_adapted(model_path: str, *overrides: str) -> ProbeWorker:
    """A worker whose adapters are no longer nothing."""
    worker = start_alone(make_config(model_path, *LORA, *overrides))
    worker.shift_weights(seed=0)
    return worker


def start_merged(model_path: str, adapted: ProbeWorker, *overrides: str) -> ProbeWorker:
    """A worker without adapters whose policy has the merged weights, and whose reference is a model of its own."""
    worker = start_alone(make_config(model_path, *overrides))
    set_model_state_dict(worker.actor.model, adapted.weights(), options=StateDictOptions(full_state_dict=True))
    return worker


def parameters_of(worker: ProbeWorker) -> dict[str, torch.Tensor]:
    return {name: full_tensor(value).detach().clone() for name, value in worker.actor.model.named_parameters()}


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


# What they are


def adapted_layers(model_path: str, freeze_vision_tower: bool = False, **lora) -> set[str]:
    """Names of the layers that got an adapter, without any wrapper's prefix."""
    config = ModelConfig(
        model_path=model_path, lora=LoraConfig(rank=RANK, **lora), freeze_vision_tower=freeze_vision_tower
    )
    model = load_model(config, torch.float32, torch.float32)
    choose_trainable(model, config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if is_adapter(name)}
    return {name.partition(".lora_")[0] for name in trainable}


def linear_layers(model_path: str) -> set[str]:
    model = AutoModelForImageTextToText.from_pretrained(model_path)
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_all_linear_is_every_linear_layer_of_both_towers_but_the_output_head(tiny_model_path: str) -> None:
    layers = adapted_layers(tiny_model_path, target_modules="all-linear")
    assert layers == linear_layers(tiny_model_path) - {"lm_head"}
    assert adapted_layers(tiny_model_path, target_modules=["all-linear"]) == layers
    assert "model.visual.merger.mlp.0" in layers and "model.language_model.layers.1.mlp.down_proj" in layers


def test_names_given_as_a_string_or_a_list_choose_the_layers_that_end_in_them(tiny_model_path: str) -> None:
    attention = [f"model.language_model.layers.{layer}.self_attn" for layer in (0, 1)]
    expected = {f"{module}.{name}" for module in attention for name in ("q_proj", "v_proj")}
    for names in ("q_proj, v_proj", ["q_proj", "v_proj"], ["self_attn.q_proj", "v_proj"]):
        assert adapted_layers(tiny_model_path, target_modules=names) == expected
    first = "model.language_model.layers.0.self_attn.q_proj"
    assert adapted_layers(tiny_model_path, target_modules=first) == {first}


def test_what_is_excluded_and_a_frozen_tower_get_none(tiny_model_path: str) -> None:
    language = {name for name in linear_layers(tiny_model_path) if "language_model" in name}
    assert adapted_layers(tiny_model_path, exclude_modules=".*visual.*") == language
    assert adapted_layers(tiny_model_path, freeze_vision_tower=True) == language
    both = adapted_layers(tiny_model_path, target_modules=["q_proj", "up_proj"], exclude_modules=".*(visual|mlp).*")
    assert both == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


def test_the_patch_embedding_is_no_linear_layer_though_it_shares_the_name_of_one(tiny_model_path: str) -> None:
    assert adapted_layers(tiny_model_path, target_modules="proj") == {"model.visual.blocks.0.attn.proj"}


def test_a_text_model_gets_them_with_the_exclusion_of_the_shipped_configuration(tmp_path: Path) -> None:
    layers = adapted_layers(make_tiny_text_model(tmp_path), exclude_modules=".*visual.*")
    assert len(layers) == 14 and "lm_head" not in layers


@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_every_adapter_of_every_family_gets_a_gradient_from_a_batch_with_images(family: str) -> None:
    """Of B, that is: A's is a multiple of B, which begins at zero."""
    kind = FAMILIES[family]
    model = make_model(kind.class_name, kind.config())
    prompts = write_prompts(kind, ["st4ttt", "sttt2t"])
    inputs = model_inputs(kind, prompts.input_ids, prompts.attention_mask, prompts.images)
    before = model(**inputs).logits
    choose_trainable(model, ModelConfig(lora=LoraConfig(rank=RANK)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = model.train()(**inputs, use_cache=False).logits
    assert torch.equal(logits, before)
    logits.log_softmax(-1)[..., 0].sum().backward()
    still = {name for name, value in model.named_parameters() if value.grad is None or (value.grad == 0).all()}
    assert still == {name for name, _ in model.named_parameters() if ".lora_B." not in name}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj", "q_prj"]},
            "target_modules names 'q_prj', but no linear layer .*down_proj, gate",
        ),
        ({"target_modules": "lm_head"}, "target_modules names 'lm_head', but no linear layer .* that can have an"),
        ({"exclude_modules": ".*"}, r"exclude_modules=\.\* leaves none of the layers"),
    ],
)
def test_targets_that_are_not_there_are_refused_with_those_that_are(
    settings: dict, message: str, tiny_model_path: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapted_layers(tiny_model_path, **settings)


def test_they_are_float32_over_a_base_in_the_precision_that_it_computes_in_unless_another_is_given(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """And they train: FSDP2 wants one precision in each group, of the parameters that do."""
    dtypes = {}
    for override in ("mp_param_dtype=bf16", "mp_param_dtype=fp32", "torch_dtype=bf16"):
        worker = start_alone(make_config(tiny_model_path, *LORA, f"worker.actor.fsdp.{override}"))
        parameters = worker.actor.model.named_parameters()
        pairs = {(is_adapter(name), parameter.dtype) for name, parameter in parameters}
        dtypes[override] = dict(pairs)
        assert len(pairs) == 2
        gradients, _ = worker.gradients(batch, "token")
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    assert [found[True] for found in dtypes.values()] == [torch.float32] * 3
    assert [found[False] for found in dtypes.values()] == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_begin_as_nothing_bit_for_bit(
    precision: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """In bf16 too, though the base under them rests in it and a whole model would rest in float32."""
    computed_in = f"worker.actor.fsdp.mp_param_dtype={precision}"
    plain, adapted = (start_alone(make_config(tiny_model_path, computed_in, *lora)) for lora in ((), LORA))
    expected, found = (worker.compute_log_probs(batch).batch["old_log_probs"] for worker in (plain, adapted))
    assert torch.equal(found, expected)
    rounded = torch.float32 if precision == "fp32" else torch.bfloat16
    for (name, value), (expected_name, whole) in zip(adapted.weights().items(), plain.weights().items(), strict=True):
        assert name == expected_name and torch.equal(value.to(rounded), whole.to(rounded))


# Training


def test_they_alone_move_and_have_a_state_in_the_optimizer(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """B moves in the first step; A, whose gradient is B's multiple, from the second on."""
    worker = start_alone(make_config(tiny_model_path, *LORA, FAST))
    before = parameters_of(worker)
    worker.update_actor(batch)
    worker.update_actor(batch)
    moved = {name for name, value in parameters_of(worker).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if is_adapter(name)}
    assert len(worker.actor.optimizer.state) == len(moved)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("kl_penalty", ["low_var_kl", "full"])
@pytest.mark.parametrize("full_shard", ["true", "false"])
def test_their_gradient_is_that_of_the_merged_weights_by_the_chain_rule(
    checkpointing: str, kl_penalty: str, full_shard: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """W' = W + s B A with s = alpha / rank: dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW'.

    The merged policy has no adapters and a reference of its own, so that with `full`, where the reference runs in the
    update, both have to agree on it too; and layers stay gathered after the reference's pass without `full_shard`.
    """
    overrides = (
        f"algorithm.kl_penalty={kl_penalty}",
        f"worker.actor.model.enable_gradient_checkpointing={checkpointing}",
        f"worker.actor.fsdp.enable_full_shard={full_shard}",
        "worker.actor.micro_batch_size_per_device_for_update=4",
    )
    adapted = start_adapted(tiny_model_path, *overrides)
    gradients, metrics = adapted.gradients(batch, "token")
    whole, expected_metrics = start_merged(tiny_model_path, adapted, *overrides).gradients(batch, "token")
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)
    assert metrics["actor/kl_loss"] > 0
    scale, parameters = ALPHA / RANK, parameters_of(adapted)
    assert gradients.keys() == {name for name in parameters if is_adapter(name)}
    for name in gradients:
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        of_layer = whole[name.replace(".lora_A.default", "")]
        expected = {
            name: scale * parameters[other].T @ of_layer,
            other: scale * of_layer @ parameters[name].T,
        }
        for part, value in expected.items():
            assert value.abs().max() > 0
            torch.testing.assert_close(gradients[part], value, atol=1e-4 * value.abs().max().item(), rtol=0)


def test_layers_without_any_adapter_below_them_still_pass_gradients_on(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Adapters in the last layer alone, and recomputed activations: no input of the layers before needs a gradient."""
    last = "worker.actor.model.lora.target_modules=model.language_model.layers.1.mlp.down_proj"
    on, off = (
        start_adapted(tiny_model_path, last, f"worker.actor.model.enable_gradient_checkpointing={switch}")
        for switch in ("true", "false")
    )
    (recomputed, _), (kept, _) = on.gradients(batch, "token"), off.gradients(batch, "token")
    assert len(kept) == 2
    for name, value in kept.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(recomputed[name], value)


# The reference


@pytest.mark.parametrize("full_shard", ["true", "false"])
def test_the_reference_stays_the_policy_of_the_beginning_exactly(
    full_shard: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    sharding = f"worker.actor.fsdp.enable_full_shard={full_shard}"
    worker = start_alone(make_config(tiny_model_path, *LORA, FAST, sharding))
    before = worker.compute_log_probs(batch).batch["old_log_probs"]
    for _ in range(2):
        worker.update_actor(batch)
        assert torch.equal(worker.compute_ref_log_probs(batch).batch["ref_log_probs"], before)
    assert (worker.compute_log_probs(batch).batch["old_log_probs"] - before).abs().max() > 0.01


def test_a_full_kl_is_that_from_a_reference_of_its_own(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    full = "algorithm.kl_penalty=full"
    adapted = start_adapted(tiny_model_path, full)
    kl = adapted.compute_ref_kl(batch).batch["ref_kl"]
    expected = start_merged(tiny_model_path, adapted, full).compute_ref_kl(batch).batch["ref_kl"]
    assert expected.max() > 1e-3
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-4)


def test_there_is_no_second_model(tiny_model_path: str, lone_process_group) -> None:
    worker = start_alone(make_config(tiny_model_path, *LORA))
    assert worker.ref_model is worker.actor.model


# What else sees the policy


def test_log_probs_and_recorded_attention_are_those_of_the_merged_weights(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    recording = ("worker.rollout.collect_attentions=true", "algorithm.enable_token_weights=true")
    adapted = start_adapted(tiny_model_path, *recording)
    merged = start_merged(tiny_model_path, adapted, *recording)
    found, expected = (worker.compute_log_probs(batch).batch for worker in (adapted, merged))
    start = start_alone(make_config(tiny_model_path, *LORA, *recording)).compute_log_probs(batch).batch
    for name in ("old_log_probs", "attention_mass"):
        assert (found[name] - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    assert torch.equal(found["attention_keys"], expected["attention_keys"])


@pytest.mark.parametrize("tied", [False, True])
def test_after_an_update_the_rollout_draws_from_the_trained_policy(
    tied: bool, tiny_model_path: str, prompts: DataProto, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    model_path = make_tiny_model(tmp_path, tie_word_embeddings=True) if tied else tiny_model_path
    worker = start_alone(make_config(model_path, *LORA, FAST, "worker.rollout.disable_tqdm=true"))
    worker.update_actor(batch)
    worker.update_actor(batch)
    worker.prepare_rollout_engine()
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=False)
    asked = DataProto(prompts.batch, prompts.non_tensor_batch, {"sampling": sampling, "seed_parts": (0,)})
    drawn = worker.generate_sequences(asked)
    drawn.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"].repeat(2)
    drawn.non_tensor_batch["uid"] = uids_of(len(drawn), 2)
    recomputed = worker.compute_log_probs(drawn).batch["old_log_probs"]
    torch.testing.assert_close(drawn.batch["rollout_log_probs"], recomputed, atol=2e-5, rtol=0)
    of_base = worker.compute_ref_log_probs(drawn).batch["ref_log_probs"]
    assert (of_base - recomputed).abs().max() > 0.01


# Checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["adamw", "adamw_bf16"])
def test_a_checkpoint_holds_the_adapters_alone_and_resumes_exactly(
    strategy: str, tied: bool, tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    model_path = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True) if tied else tiny_model_path
    config = make_config(model_path, *LORA, FAST, f"worker.actor.optim.strategy={strategy}")
    first = start_alone(config)
    first.update_actor(batch)
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    expected = without_clock(first.update_actor(batch))
    saved = torch.load(tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    assert saved.keys() == {name for name in parameters_of(first) if is_adapter(name)}
    second = start_alone(config)
    second.load_checkpoint(str(tmp_path), model_only=False)
    assert without_clock(second.update_actor(batch)) == expected
    after = parameters_of(first)
    assert all(torch.equal(value, after[name]) for name, value in parameters_of(second).items())


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_pefts_folder_gives_any_reader_the_trained_policy(
    targets: str, tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    worker = start_adapted(tiny_model_path, f"worker.actor.model.lora.target_modules=[{targets}]")
    worker.save_checkpoint(str(tmp_path), model_only=True)
    folder = tmp_path / "actor" / "lora_adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model_path
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    read, processor = PeftModel.from_pretrained(base, str(folder)), AutoProcessor.from_pretrained(tiny_model_path)
    log_probs = worker.compute_log_probs(batch).batch["old_log_probs"]
    for index in range(len(batch)):
        with torch.no_grad():
            logits = response_logits(read, processor, batch[index])
        chosen = batch.batch["responses"][index, : len(logits), None]
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(log_probs[index, : len(logits)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("saved_with", "resumed_with", "message"),
    [
        (
            LORA,
            (),
            "does not fit this run's model: .*resume with the original model_path, lora and freeze",
        ),
        ((), LORA, "does not fit this run's model"),
        (LORA, (*LORA, "worker.actor.model.lora.rank=8"), "does not fit this run's model"),
        (LORA, (*LORA, TEXT_ONLY), "does not fit this run's model: .*such as model.visual"),
        (LORA, (*LORA, FROZEN), "does not fit this run's model: .*such as model.visual"),
        (LORA, (*LORA, "worker.actor.model.lora.alpha=24"), "lora.alpha=24 would change the policy: .* with 12"),
    ],
)
def test_adapters_of_another_kind_are_not_resumed(
    saved_with: tuple, resumed_with: tuple, message: str, tiny_model_path: str, lone_process_group, tmp_path: Path
) -> None:
    start_alone(make_config(tiny_model_path, *saved_with)).save_checkpoint(str(tmp_path), model_only=True)
    worker = start_alone(make_config(tiny_model_path, *resumed_with))
    with pytest.raises(ValueError, match=message):
        worker.load_checkpoint(str(tmp_path), model_only=True)


def test_adapters_that_go_on_on_another_model_are_told_of(
    tiny_model_path: str, lone_process_group, tmp_path: Path, caplog
) -> None:
    start_alone(make_config(tiny_model_path, *LORA)).save_checkpoint(str(tmp_path / "saved"), model_only=True)
    other = make_tiny_model(tmp_path / "other", seed=1)
    start_alone(make_config(other, *LORA)).load_checkpoint(str(tmp_path / "saved"), model_only=True)
    assert f"were trained on {tiny_model_path} and go on on {other}" in caplog.text


# Two ranks


@pytest.fixture(scope="module")
def two_adapted(tiny_model_path: str, ray_cluster):
    """Two workers with adapters on the language model alone, which have been shifted away from nothing."""
    micro = "worker.actor.micro_batch_size_per_device_for_update=2"
    group = start_two(make_config(tiny_model_path, *LORA, TEXT_ONLY, FAST, micro))
    group.shift_weights(seed=0)
    yield group
    group.release()


@pytest.fixture
def alone(tiny_model_path: str, lone_process_group) -> ProbeWorker:
    """One worker like the two."""
    return start_adapted(tiny_model_path, TEXT_ONLY, FAST)


def test_two_ranks_give_gradients_log_probs_and_reference_of_one_though_the_second_has_no_image(
    batch: DataProto, two_adapted: WorkerGroup, alone: ProbeWorker
) -> None:
    gradients, metrics = alone.gradients(batch, "token")
    shared, shared_metrics = two_adapted.gradients(batch, "token")
    assert shared_metrics == pytest.approx(metrics, rel=1e-5)
    assert shared.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(shared[name], value, atol=1e-5 * value.abs().max().item(), rtol=0)
    for compute in ("compute_log_probs", "compute_ref_log_probs"):
        whole, parts = (getattr(workers, compute)(batch).batch for workers in (alone, two_adapted))
        for name in whole.keys():
            torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-5)


def test_two_ranks_stream_merge_save_and_resume_the_adapters_of_one(
    batch: DataProto, two_adapted: WorkerGroup, alone: ProbeWorker, tmp_path: Path
) -> None:
    merged = alone.weights()
    for weights in two_adapted.weights():
        assert weights.keys() == merged.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-5)
    alone.save_checkpoint(str(tmp_path / "one"), model_only=True)
    two_adapted.save_checkpoint(str(tmp_path / "two"), model_only=False)
    folders = [tmp_path / ranks / "actor" / "lora_adapter" for ranks in ("one", "two")]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    before = two_adapted.weights()[0]
    two_adapted.update_actor(batch)
    assert any(not torch.equal(value, before[name]) for name, value in two_adapted.weights()[0].items())
    two_adapted.load_checkpoint(str(tmp_path / "two"), model_only=False)
    for weights in two_adapted.weights():
        assert all(torch.equal(value, before[name]) for name, value in weights.items())


# All that ranks can do at once


def test_ranks_that_share_rows_and_repeat_a_model_that_one_reads_train_save_and_resume_the_adapters_of_one(
    batch: DataProto, ray_cluster, lone_process_group, tmp_path: Path
) -> None:
    """Two pairs of ranks; each pair holds the model once and every row once; embeddings tied, states in bf16."""
    model_path = make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    keys = (FAST, "worker.actor.optim.strategy=adamw_bf16")
    shared = ("worker.actor.fsdp.fsdp_size=2", "worker.actor.ulysses_size=2", "algorithm.kl_penalty=full")
    config = make_config(model_path, *LORA, *keys, *shared, "worker.actor.micro_batch_size_per_device_for_update=2")
    alone, ranks = start_adapted(model_path, *keys, "algorithm.kl_penalty=full"), start_group(config, 4)
    try:
        ranks.shift_weights(seed=0)
        gradients, metrics = alone.gradients(batch, "token")
        found, found_metrics = ranks.gradients(batch, "token")
        assert found_metrics == pytest.approx(metrics, rel=1e-4)
        assert found.keys() == gradients.keys()
        for name, value in gradients.items():
            torch.testing.assert_close(found[name], value, atol=2e-5 * value.abs().max().item(), rtol=0)
        for compute in ("compute_log_probs", "compute_ref_log_probs"):
            whole, parts = (getattr(workers, compute)(batch).batch for workers in (alone, ranks))
            for name in whole.keys():
                torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-5)

        ranks.update_actor(batch)
        ranks.save_checkpoint(str(tmp_path), model_only=False)
        merged, saved = model_merger.merge(tmp_path / "actor", torch.float32).state_dict(), ranks.weights()[3]
        assert merged.keys() == saved.keys()
        for name, value in saved.items():
            torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)
        expected, after = without_clock(ranks.update_actor(batch)), ranks.weights()[0]
        ranks.restart(config)
        ranks.load_checkpoint(str(tmp_path), model_only=False)
        assert without_clock(ranks.update_actor(batch)) == expected
        for weights in ranks.weights():
            assert all(torch.equal(value, after[name]) for name, value in weights.items())
    finally:
        ranks.release()
