# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_rollout.py
"""What every rollout engine promises, on the whole way from the sharded policy's weights to a batch of responses."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_qwen import build_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    LlavaConfig,
    Qwen2VLImageProcessor,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests import vlm_zoo
from tests.batches import PROMPT_LENGTH, ROWS, make_prompts, prompts_of, random_image, uids_of
from tests.pool import new_processes
from tests.probe import RESPONSE_LENGTH, make_config, start_group
from tests.tiny import CORPUS, make_tiny_model
from verl.data.dataset import RLHFDataset
from verl.models.registry import MODEL_FAMILIES, ModelFamily
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.ray_cluster import WORKER_ENVIRONMENT
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.rollout.base import Sampling, engine_class, require_videos
from verl.workers.rollout.config import RolloutConfig

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
    reason="needs vLLM's CPU build; tests/test_gpu.py has a test of the other",
)
ENGINES = ["hf", pytest.param("vllm", marks=[pytest.mark.vllm, needs_vllm])]
TEMPERATURE = 0.7
GREEDY = Sampling(n=1, temperature=0.0, top_p=1.0, top_k=-1, ignore_eos=False)
RANDOM = Sampling(n=4, temperature=TEMPERATURE, top_p=1.0, top_k=-1, ignore_eos=False)
WEIGHT_OF_HEAD = "lm_head.weight"


def config_of(model_path: str, engine: str, *overrides: str):
    return make_config(
        model_path,
        "algorithm.disable_kl=true",
        f"worker.rollout.name={engine}",
        f"worker.rollout.temperature={TEMPERATURE}",
        "worker.rollout.tensor_parallel_size=1",
        "worker.rollout.disable_tqdm=true",
        *overrides,
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As instruct models do, it ships sampling settings of its own, which no rollout may heed.

    Its heads have 32 dimensions, the least that vLLM's attention on CPUs takes.
    """
    path = make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128)
    settings = Path(path) / "generation_config.json"
    shipped = json.loads(settings.read_text()) | dict(
        do_sample=True, repetition_penalty=1.5, top_k=3, top_p=0.5, temperature=0.1
    )
    settings.write_text(json.dumps(shipped))
    return path


@pytest.fixture(scope="module")
def prompts(model_path: str, ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """One image, two of different sizes, and twice none."""
    return make_prompts(model_path, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module", params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def workers(name: str, model_path: str, ray_cluster):
    """One worker with its engine; tests leave the policy's weights as they find them."""
    with new_processes(1, name) as processes:
        group = start_group(config_of(model_path, name), 1, processes)
        group.prepare_rollout_engine()
        yield group


@pytest.fixture
def restored(workers: WorkerGroup):
    """For tests that change the policy: gives it and the engine their weights back."""
    before = workers.weights()[0]
    yield workers
    for weight, value in before.items():
        workers.set_weight(weight, list(range(len(value))), value)
    workers.prepare_rollout_engine()


def generate(workers: WorkerGroup, prompts: DataProto, sampling: Sampling, *seed_parts: int) -> DataProto:
    request = DataProto(prompts.batch, prompts.non_tensor_batch, {"sampling": sampling, "seed_parts": seed_parts})
    return workers.generate_sequences(request)


def with_media(batch: DataProto, prompts: DataProto, n: int) -> DataProto:
    media = prompts.non_tensor_batch["multi_modal_data"].repeat(n)
    uids = uids_of(len(batch), n)
    return DataProto(batch.batch, {**batch.non_tensor_batch, "multi_modal_data": media, "uid": uids})


def assert_engine_and_trainer_agree(group: WorkerGroup, prompts: DataProto, tolerance: float) -> None:
    """On the log-probabilities of sampled responses, before and after an update."""
    for _ in range(2):
        group.prepare_rollout_engine()
        batch = with_media(generate(group, prompts, RANDOM, 0), prompts, RANDOM.n)
        of_trainer = group.compute_log_probs(batch).batch["old_log_probs"]
        distance = (batch.batch["rollout_log_probs"] - of_trainer)[batch.batch["response_mask"].bool()].abs()
        assert distance.max() < tolerance
        group.shift_weights(3)


def plain_greedy(model_path: str, weights: dict[str, torch.Tensor], prompts: DataProto) -> list[list[int]]:
    """transformers' own answer to each prompt alone, with a policy of these weights."""
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).eval()
    model.load_state_dict(weights)
    model.generation_config = type(model.generation_config)()
    processor = AutoProcessor.from_pretrained(model_path)
    answers = []
    for index in range(len(prompts)):
        row = prompts[index]
        ids = row.batch["input_ids"][row.batch["attention_mask"].bool()][None]
        images = [handle.load() for handle in row.non_tensor_batch["multi_modal_data"] or []]
        media = processor.image_processor(images, return_tensors="pt") if images else {}
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
            do_sample=False,
            max_new_tokens=RESPONSE_LENGTH,
            eos_token_id=processor.tokenizer.eos_token_id,
            suppress_tokens=[model.config.image_token_id, model.config.video_token_id],
            **media,
        )
        answers.append(answer[0, ids.shape[1] :].tolist())
    return answers


def test_greedy_responses_are_those_of_plain_generate_on_each_prompt_alone_before_and_after_an_update(
    restored: WorkerGroup, model_path: str, prompts: DataProto
) -> None:
    """No row notices the others, no image is mixed up, and no trace of old weights is left in any cache."""
    answers = []
    for _ in range(3):
        responses = generate(restored, prompts, GREEDY, 0).batch["responses"]
        expected = plain_greedy(model_path, restored.weights()[0], prompts)
        for response, answer in zip(responses.tolist(), expected, strict=True):
            assert response[: len(answer)] == answer
        answers.append(expected)
        restored.shift_weights(len(answers))
        restored.prepare_rollout_engine()
    assert answers[0] != answers[1] != answers[2]


def test_the_engines_log_probs_are_those_that_the_trainer_finds(
    restored: WorkerGroup, prompts: DataProto, name: str, record_property
) -> None:
    """Sampled at a temperature below one, before and after an update; the largest and the mean distance are kept."""
    for _ in range(2):
        batch = with_media(generate(restored, prompts, replace(RANDOM, n=16), 3), prompts, 16)
        is_response = batch.batch["response_mask"].bool()
        of_engine = batch.batch["rollout_log_probs"]
        of_trainer = restored.compute_log_probs(batch).batch["old_log_probs"]
        distance = (of_engine - of_trainer)[is_response].abs()
        record_property("largest", distance.max().item())
        record_property("mean", distance.mean().item())
        assert distance.max() < 2e-5
        assert (of_engine[is_response] < -0.5).any() and (of_engine[~is_response] == 0).all()
        restored.shift_weights(7)
        restored.prepare_rollout_engine()


def test_the_batch_keeps_the_contract(workers: WorkerGroup, model_path: str, prompts: DataProto) -> None:
    """Responses of a prompt stand side by side, end with the first end of sequence and are padded on the right."""
    tokenizer = get_tokenizer(model_path)
    batch = generate(workers, prompts, replace(RANDOM, n=64), 0)
    tensors, num_rows = batch.batch, len(prompts) * 64
    assert len(batch) == num_rows
    assert torch.equal(tensors["prompts"], prompts.batch["input_ids"].repeat_interleave(64, dim=0))
    assert torch.equal(tensors["input_ids"], torch.cat([tensors["prompts"], tensors["responses"]], dim=1))
    assert torch.equal(tensors["attention_mask"][:, PROMPT_LENGTH:], tensors["response_mask"])
    assert tensors["responses"].shape == (num_rows, RESPONSE_LENGTH)
    assert tensors["responses"].dtype == tensors["response_mask"].dtype == torch.int64
    assert tensors["position_ids"].shape == (num_rows, 4, PROMPT_LENGTH + RESPONSE_LENGTH)
    assert (tensors["position_ids"].diff(dim=-1)[..., PROMPT_LENGTH - 1 :] == 1).all()
    assert tensors["rollout_log_probs"].dtype == torch.float32
    ended = 0
    for response, mask in zip(tensors["responses"].tolist(), tensors["response_mask"].tolist(), strict=True):
        end = response.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in response else None
        length = RESPONSE_LENGTH if end is None else end + 1
        assert mask == [1] * length + [0] * (RESPONSE_LENGTH - length)
        assert all(token == tokenizer.pad_token_id for token in response[length:])
        ended += end is not None
    assert 0 < ended < num_rows


def test_ignoring_end_of_sequence_fills_every_response(
    workers: WorkerGroup, model_path: str, prompts: DataProto
) -> None:
    tokenizer = get_tokenizer(model_path)
    batch = generate(workers, prompts, replace(RANDOM, n=64, ignore_eos=True), 0).batch
    assert (batch["response_mask"] == 1).all()
    tails = [
        response[response.index(tokenizer.eos_token_id) + 1 :]
        for response in batch["responses"].tolist()
        if tokenizer.eos_token_id in response[:-2]
    ]
    assert tails and all(set(tail) != {tokenizer.pad_token_id} for tail in tails)


def test_a_seed_repeats_and_another_seed_does_not_and_no_two_samples_share_their_draws(
    workers: WorkerGroup, prompts: DataProto
) -> None:
    """The last two prompts of four are one and the same: they too draw for themselves."""
    same = prompts[[0, 1, 2, 2]]
    first, again, other = (generate(workers, same, RANDOM, seed).batch["responses"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert len({tuple(row) for row in torch.cat([first, other]).tolist()}) == 2 * len(first)


def test_generating_leaves_the_global_random_state_alone(workers: WorkerGroup, prompts: DataProto) -> None:
    before = workers.random_state()[0]
    generate(workers, prompts, RANDOM, 0)
    assert torch.equal(before, workers.random_state()[0])


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_narrowed_to_one_token_is_greedy_and_certain(
    narrow: dict, workers: WorkerGroup, prompts: DataProto
) -> None:
    greedy = generate(workers, prompts, GREEDY, 0).batch["responses"]
    narrowed = generate(workers, prompts, replace(RANDOM, n=1, **narrow), 5).batch
    assert torch.equal(greedy, narrowed["responses"])
    assert (narrowed["rollout_log_probs"] == 0).all()


def test_all_tokens_can_be_sampled_when_nothing_limits_them(workers: WorkerGroup, prompts: DataProto) -> None:
    """A random model is close to uniform over its vocabulary: a limit of 50 candidates would show."""
    batch = generate(workers, prompts[[2]], replace(RANDOM, n=256), 0).batch
    assert len(set(batch["responses"][:, 0].tolist())) > 100


def test_placeholders_of_images_are_never_sampled(restored: WorkerGroup, model_path: str, prompts: DataProto) -> None:
    """Their logits are made the largest of all: without the ban every token would be one of them."""
    tokenizer = get_tokenizer(model_path)
    placeholders = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    weights = restored.weights()[0]
    favoured = tokenizer.convert_tokens_to_ids("a")
    restored.set_weight("model.language_model.norm.weight", list(range(128)), torch.full((128,), 5.0))
    restored.set_weight(WEIGHT_OF_HEAD, [favoured], 1.5 * weights[WEIGHT_OF_HEAD][favoured])
    restored.set_weight(WEIGHT_OF_HEAD, placeholders, 4 * weights[WEIGHT_OF_HEAD][favoured])
    restored.prepare_rollout_engine()
    responses = generate(restored, prompts, RANDOM, 0).batch["responses"]
    assert (responses == favoured).any()
    assert not torch.isin(responses, torch.tensor(placeholders)).any()


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("name", ["vllm"], indirect=True)
def test_engine_and_actor_see_the_same_pixels_and_count_the_same_image_tokens(
    name: str, workers: WorkerGroup, model_path: str, prompts: DataProto
) -> None:
    for index, num_images in enumerate([1, 2]):
        row = prompts[[index]]
        (of_engine,), (of_actor,) = workers.pixels_of_engine(row, GREEDY), workers.pixels_of_actor(row)
        assert of_engine.shape == of_actor.shape
        torch.testing.assert_close(of_engine, of_actor, atol=1e-6, rtol=0)
        placeholder = get_tokenizer(model_path).convert_tokens_to_ids("<|image_pad|>")
        raw, expanded = row.non_tensor_batch["raw_prompt_ids"][0], row.batch["input_ids"][0].tolist()
        assert raw.count(placeholder) == num_images
        assert expanded.count(placeholder) == len(of_actor) // 4  # two by two patches make a token


@pytest.mark.vllm
@needs_vllm
def test_two_workers_that_share_an_engine_get_the_answers_to_their_own_prompts(
    model_path: str, prompts: DataProto, ray_cluster
) -> None:
    """Tensor parallel over two: each answers half of the prompts, with half of the heads."""
    overrides = ("worker.rollout.tensor_parallel_size=2", "worker.actor.micro_batch_size_per_device_for_update=4")
    with new_processes(2, "vllm") as processes:
        group = start_group(config_of(model_path, "vllm", *overrides), 2, processes)
        for _ in range(2):
            group.prepare_rollout_engine()
            responses = generate(group, prompts, GREEDY, 0).batch["responses"]
            expected = plain_greedy(model_path, group.weights()[0], prompts)
            for response, answer in zip(responses.tolist(), expected, strict=True):
                assert response[: len(answer)] == answer
            group.shift_weights(1)
        twice = generate(group, prompts[[2, 2]], RANDOM, 0).batch["responses"].tolist()
        assert len({tuple(response) for response in twice}) == 2 * RANDOM.n


@pytest.mark.vllm
@needs_vllm
def test_a_text_model_whose_head_is_its_embeddings_takes_in_new_weights(ray_cluster, tmp_path: Path) -> None:
    """Gemma 2, for whose head vLLM has no weight by name, though the policy's stream has."""
    tokenizer = build_tokenizer(CORPUS)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    path = tmp_path / "model"
    Gemma2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    with new_processes(1, "vllm") as processes:
        group = start_group(config_of(str(path), "vllm"), 1, processes)
        prompts = make_prompts(str(path), tmp_path, [row for row in ROWS if not row["images"]])
        assert_engine_and_trainer_agree(group, prompts, 2e-5)


@pytest.mark.vllm
@needs_vllm
def test_the_stream_is_brought_to_the_form_of_checkpoints() -> None:
    """Two experts of 4 x 3 held as 3 x 4 are turned; a head that the engine ties to its embeddings is left out; the
    weights of a CLIP tower get the name that they have on disk."""
    from verl.workers.rollout.vllm_rollout import as_in_checkpoints

    experts, plain = torch.arange(24.0).view(2, 3, 4), torch.arange(12.0).view(3, 4)
    weights = {"layers.0.experts.down_proj": experts, "layers.0.gate.weight": plain, "lm_head.weight": plain}
    for has_head, names in ((True, list(weights)), (False, list(weights)[:2])):
        stream = dict(as_in_checkpoints(weights.items(), Qwen3VLMoeConfig(), has_head))
        assert list(stream) == names
        assert torch.equal(stream["layers.0.gate.weight"], plain)
        turned = stream["layers.0.experts.down_proj"]
        assert turned.shape == (2, 4, 3) and turned[1, 2, 0] == experts[1, 0, 2]
    of_tower = [("model.vision_tower.pre_layrnorm.weight", plain), ("model.language_model.norm.weight", plain)]
    assert [name for name, _ in as_in_checkpoints(of_tower, LlavaConfig(), True)] == [
        "model.vision_tower.vision_model.pre_layrnorm.weight",
        "model.language_model.norm.weight",
    ]


@pytest.mark.vllm
@needs_vllm
def test_experts_on_a_cpu_are_refused_before_the_engine_starts(tmp_path: Path) -> None:
    """vLLM's CPU build would answer with their first weights for ever."""
    Qwen3MoeConfig(num_experts=4).save_pretrained(tmp_path)
    config = config_of(str(tmp_path), "vllm")
    with pytest.raises(ValueError, match=r"worker.rollout.name=vllm would go on .* use worker.rollout.name=hf there"):
        engine_class("vllm").from_config(config, None, None, torch.device("cpu"))


@pytest.mark.vllm
@needs_vllm
def test_a_family_whose_images_see_forward_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"worker.rollout.name=vllm .* Gemma 3 .* use worker.rollout.name=hf"):
        engine_class("vllm").from_config(config_of(str(tmp_path), "vllm"), None, None, torch.device("cpu"))


@pytest.mark.parametrize("family", MODEL_FAMILIES, ids=lambda family: family.name)
def test_videos_are_refused_by_name_where_vllm_places_them_otherwise(family: ModelFamily) -> None:
    require_videos("hf", family)
    if family.vllm_reads_videos:
        require_videos("vllm", family)
        return
    with pytest.raises(
        ValueError, match=f"vllm reads .* family {family.name}; use worker.rollout.name=hf .* Qwen3-VL"
    ):
        require_videos("vllm", family)


@pytest.mark.vllm
@needs_vllm
def test_videos_read_the_same_in_vllm_and_in_the_trainer(ray_cluster, tmp_path: Path) -> None:
    """One, two of different lengths and shapes, one before an image, and none; before and after an update.

    The image processor normalises otherwise than the video processor, which vLLM by itself would not notice.
    """
    path = make_servable_qwen3_vl(tmp_path / "model")
    for name, (length, size) in {"a": (4, (56, 56)), "b": (8, (56, 28)), "c": (2, (84, 56))}.items():
        for index in range(length):
            random_image(size, seed=ord(name) * 100 + index).save(tmp_path / f"{name}{index}.png")
    a, b, c = ([f"{name}{index}.png" for index in range(length)] for name, length in (("a", 4), ("b", 8), ("c", 2)))
    rows = [
        {"prompt": "<video>What is in the picture?", "videos": [a], "images": []},
        {"prompt": "The <video>quick brown<video>fox", "videos": [b, c], "images": []},
        {"prompt": "<video>and<image>What?", "videos": [c], "images": ["a0.png"]},
        {"prompt": "Answer in one word.", "videos": [], "images": []},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "answer": "1"}) + "\n" for row in rows))
    options = dict(image_dir=str(tmp_path), max_prompt_length=PROMPT_LENGTH, video_fps=0.8)
    dataset = RLHFDataset(str(tmp_path / "rows.jsonl"), get_tokenizer(path), get_processor(path), **options)
    prompts = prompts_of(dataset)
    with new_processes(1, "vllm") as processes:
        group = start_group(config_of(path, "vllm"), 1, processes, with_videos=True)
        assert_engine_and_trainer_agree(group, prompts, 5e-5)


@pytest.mark.vllm
@needs_vllm
def test_gpus_that_do_not_see_each_other_add_up_over_nccl_alone() -> None:
    """By vLLM's own names: a switch that it does not know would be no switch."""
    from vllm import envs
    from vllm.config import CompilationConfig

    from verl.workers.rollout.vllm_rollout import _all_reduce_options

    options = _all_reduce_options(tensor_parallel_size=2)
    assert options["disable_custom_all_reduce"]
    assert CompilationConfig(**options["compilation_config"]).pass_config.fuse_allreduce_rms is False
    switches = {name: value for name, value in WORKER_ENVIRONMENT.items() if name.startswith("VLLM_ALLREDUCE")}
    assert switches == {"VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    assert switches.keys() <= envs.environment_variables.keys()


def make_servable_qwen3_vl(path: Path) -> str:
    """A random Qwen3-VL with heads of 32 dimensions."""
    tokenizer = build_tokenizer(CORPUS)
    config = vlm_zoo.qwen3_vl()
    config.text_config.update(dict(head_dim=32, hidden_size=128, vocab_size=len(tokenizer)))
    config.vision_config.out_hidden_size = 128
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    for holder in (config, config.text_config):
        holder.pad_token_id, holder.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    for field in vlm_zoo.QWEN_MEDIA:
        name = field.removesuffix("_token_id").replace("image", "image_pad").replace("video", "video_pad")
        setattr(config, field, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        vlm_zoo.sharpen(model)
    model.save_pretrained(path)
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(), tokenizer.chat_template
    ).save_pretrained(path)
    return str(path)


def test_validation_settings_override_those_of_training() -> None:
    config = RolloutConfig(name="hf", n=8, temperature=1.0, val_override_config={"temperature": 0.6, "top_p": 0.95})
    assert Sampling.for_validation(config) == Sampling(1, 0.6, 0.95, -1, False)
    assert Sampling.for_training(config).n == 8
