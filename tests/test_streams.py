# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_streams.py
"""The table of streams against what a step does: one step of each kind, each phase given only what it reads."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.batches import answer_at_random, make_prompts, uids_of
from tests.pool import run_shared
from tests.probe import RESPONSE_LENGTH, WITH_CRITIC, make_config, start_alone
from tests.test_training_run import arguments
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig, load_config
from verl.trainer.metric_table import all_metrics, metric_of
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.sinks import read_log
from verl.trainer.step_record import StepRecord
from verl.trainer.streams import PHASES, PROMPT_STREAMS, STREAMS, prompt_streams_read_by, streams_of, streams_read_by
from verl.workers.rollout.base import Sampling

SURPRISE = f"{Path(__file__).parent}/signals.py:surprise"
COLLECT = "worker.rollout.collect_attentions=true"
KINDS = {
    "filtering": ["algorithm.online_filtering=true", "algorithm.filter_low=-1", "algorithm.filter_high=2"],
    "baselines": ["algorithm.adv_estimator=remax", "algorithm.disable_kl=true"],
    "critic": [*WITH_CRITIC, "worker.critic.micro_batch_size_per_device_for_update=2"],
    "kl in reward": ["algorithm.use_kl_loss=false"],
    "full kl in reward": ["algorithm.use_kl_loss=false", "algorithm.kl_penalty=full"],
    "vgr": [COLLECT, "algorithm.enable_token_weights=true", "worker.rollout.importance_cap=2.0"],
    "attention alone": [COLLECT],
    "signals": [
        "algorithm.enable_token_weights=true",
        "algorithm.token_weight_signal=entropy",
        "algorithm.token_weight_control=shuffled",
        "algorithm.token_signals_to_log=[image_kl,hidden_cosine]",
        COLLECT,
    ],
    "own signal": ["algorithm.enable_token_weights=true", f"algorithm.token_weight_signal={SURPRISE}"],
    "signals that weigh nothing": [f"algorithm.token_signals_to_log=[{SURPRISE},vgr,uniform]", COLLECT],
    "weights by nothing": ["algorithm.enable_token_weights=true"],
    "prompts not shared": ["worker.actor.share_prompts=false"],
    "report": [
        COLLECT,
        "algorithm.enable_token_weights=true",
        "trainer.report=true",
        "trainer.train_generations_to_log=3",
    ],
    "reward of the batch": [f"worker.reward.reward_function={Path(__file__).parent}/reward_of_batches.py:needs_all"],
    "reward of attention": [
        f"worker.reward.reward_function={Path(__file__).parent}/reward_of_attention.py:compute_reward",
        COLLECT,
    ],
}
WEIGHED = ("vgr", "report", "signals", "own signal")
"""The kinds whose tokens weigh more and less."""
REORDERS = "balance_across_ranks"
METRICS_OF_KINDS: dict[str, set[str]] = {}
"""What the run of each kind logged, as far as the kinds have run in this session."""


def keys_of(batch: DataProto) -> set[str]:
    return {*batch.batch.keys(), *batch.non_tensor_batch}


def shape_of(name: str, batch: DataProto, config: PPOConfig) -> str:
    """A stream's shape in the letters of the table."""
    if name in batch.non_tensor_batch:
        return "N"
    prompts, responses = config.data.max_prompt_length, config.data.max_response_length
    letters = {len(batch): "N", prompts: "P", responses: "R", prompts + responses: "S"}
    sizes = batch.batch[name].shape
    if name == "position_ids" and len(sizes) == 3:
        assert sizes[1] == 4
        sizes = (sizes[0], sizes[2])
    return " ".join(letters.get(size, str(size)) for size in sizes)


class Watch:
    """Stands between `fit` and the phases; a phase is given the streams that the table says, and no other."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.needless: dict[str, list[str]] = {}

    def around(self, phase: str, method: Callable) -> Callable:
        def watched(trainer: RayDAPOTrainer, *args):
            self.seen.append(phase)
            if phase == "rollout":
                batch = method(trainer, *args)
                self.check_written(phase, set(), batch, trainer.config)
                return batch
            batch, *rest = args
            if not PHASES[phase](trainer.config):
                before = keys_of(batch)
                result = method(trainer, batch, *rest)
                assert keys_of(batch) == before, f"{phase} acts in a run in which the table says it does not"
                return result
            reads = streams_read_by(phase, trainer.config)
            self.check_needs(phase, method, trainer, batch, rest, reads)
            given = batch if phase == REORDERS else batch.select(*reads)
            before = keys_of(given)
            result = method(trainer, given, *rest)
            self.check_written(phase, before, given, trainer.config)
            if phase != REORDERS:
                batch.union(given)
            return batch if isinstance(result, DataProto) else result

        return watched

    def check_written(self, phase: str, before: set[str], batch: DataProto, config: PPOConfig) -> None:
        written = {stream.name: stream for stream in streams_of(config) if stream.writer == phase}
        assert keys_of(batch) - before == set(written), f"{phase} adds other streams than the table says"
        for name, stream in written.items():
            dtype = object if name in batch.non_tensor_batch else batch.batch[name].dtype
            assert (shape_of(name, batch, config), dtype) == (stream.shape, stream.dtype), name

    def check_needs(self, phase, method, trainer, batch, rest, reads) -> None:
        """Without any one of the streams that it is said to read, a phase cannot act."""
        tensors, objects = reads
        for name in (*tensors, *objects):
            less = batch.select([key for key in tensors if key != name], [key for key in objects if key != name])
            again = [copy.deepcopy(one) if isinstance(one, StepRecord) else one for one in rest]
            try:
                method(trainer, less, *again)
            except KeyError as error:
                assert name in str(error)
                continue
            self.needless.setdefault(phase, []).append(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_adds_and_reads_what_the_table_says(
    kind: str,
    tiny_model_path: str,
    data_files: list[str],
    tmp_path: Path,
    ray_cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch()
    for phase in PHASES:
        monkeypatch.setattr(RayDAPOTrainer, f"_{phase}", watch.around(phase, getattr(RayDAPOTrainer, f"_{phase}")))
    settings = [*KINDS[kind], "trainer.max_steps=1", "trainer.val_before_train=false", "trainer.save_freq=1"]
    settings.append("trainer.val_freq=1")
    config = load_config(arguments(tiny_model_path, data_files, tmp_path, *settings))
    run_shared(config)
    assert watch.seen == list(PHASES)
    assert watch.needless == {}
    (logged,) = read_log(tmp_path).values()
    if kind in WEIGHED:
        assert logged["token_weights/std"] > 0
    METRICS_OF_KINDS[kind] = set(logged)
    assert [name for name in logged if metric_of(name) is None] == []


def test_every_row_of_the_table_of_metrics_is_logged_by_a_kind_of_run() -> None:
    # The rows are collected by the runs above, which take minutes: a selection of them (`-k`) cannot tell.
    if set(METRICS_OF_KINDS) != set(KINDS):
        pytest.skip("not all kinds have run")
    met = {metric_of(name) for names in METRICS_OF_KINDS.values() for name in names}
    assert [metric.name for metric in all_metrics() if metric not in met and not metric.needs_gpu] == []


@pytest.mark.parametrize("kind", KINDS)
def test_workers_need_every_stream_that_they_are_sent(
    kind: str, tiny_model_path: str, tmp_path: Path, lone_process_group
) -> None:
    """A worker in this process, since one that fails elsewhere ends its group."""
    base = ["algorithm.use_kl_loss=true", "algorithm.kl_penalty=low_var_kl", "worker.rollout.n=2"]
    config = make_config(tiny_model_path, *base, *KINDS[kind])
    worker = start_alone(config)
    batch = answer_at_random(make_prompts(tiny_model_path, tmp_path), 2, RESPONSE_LENGTH)
    for stream in streams_of(config):
        if stream.shape == "N R" and stream.name not in batch.batch.keys():
            batch.batch[stream.name] = torch.rand(len(batch), RESPONSE_LENGTH) * batch.batch["response_mask"]
        if stream.name == "is_mapped":
            batch.batch[stream.name] = torch.ones(len(batch), dtype=torch.bool)
    for phase in ("compute_log_probs", "compute_values", "update_critic", "update_actor"):
        tensors, objects = streams_read_by(phase, config)
        for name in (*tensors, *objects):
            less = batch.select([key for key in tensors if key != name], [key for key in objects if key != name])
            if name == "is_mapped":  # it asks for more, and can be left out
                assert "attention_maps" not in worker.compute_log_probs(less).non_tensor_batch
                continue
            with pytest.raises(KeyError, match=name):
                getattr(worker, phase)(less)
        if tensors:
            getattr(worker, phase)(batch.select(tensors, objects))


def test_prompts_have_the_streams_of_their_table_and_engines_need_what_they_are_sent(
    tiny_model_path: str, tmp_path: Path, lone_process_group
) -> None:
    config = make_config(tiny_model_path)
    prompts = make_prompts(tiny_model_path, tmp_path)
    prompts.non_tensor_batch["uid"] = uids_of(len(prompts), 1)
    assert keys_of(prompts) == {stream.name for stream in PROMPT_STREAMS}
    for stream in PROMPT_STREAMS:
        is_object = stream.name in prompts.non_tensor_batch
        sizes = [len(prompts)] if is_object else prompts.batch[stream.name].shape
        letters = {len(prompts): "B", config.data.max_prompt_length: "P"}
        dtype = object if is_object else prompts.batch[stream.name].dtype
        # Four prompts, and four rows of position ids.
        shape = " ".join(letters[size] for size in (sizes[0], *sizes[1:][-1:]))
        assert (shape, dtype) == (stream.shape, stream.dtype), stream.name
    worker = start_alone(config)
    worker.prepare_rollout_engine()
    meta = {"sampling": Sampling.for_training(config.worker.rollout), "seed_parts": (0,)}
    tensors, objects = prompt_streams_read_by("generate", config)
    for name in (*tensors, *objects):
        less = prompts.select([key for key in tensors if key != name], [key for key in objects if key != name], [])
        less.meta_info = meta
        with pytest.raises(KeyError, match=name):
            worker.generate_sequences(less)
    given = prompts.select(tensors, objects, [])
    given.meta_info = meta
    rows = worker.generate_sequences(given)
    described = prompts.select(*prompt_streams_read_by("repeat", config), [])
    drawn = {stream.name for stream in streams_of(config) if stream.writer == "rollout"}
    assert keys_of(rows) | keys_of(described) == drawn


def test_every_row_of_the_table_is_met_by_a_kind_of_run(tmp_path: Path) -> None:
    base = ["algorithm.use_kl_loss=true", "algorithm.kl_penalty=low_var_kl"]
    met = {stream for settings in KINDS.values() for stream in streams_of(load_config([*base, *settings]))}
    assert met == set(STREAMS)


def test_a_run_has_a_stream_once_and_known_phases_write_and_read_it() -> None:
    base = ["algorithm.use_kl_loss=true", "algorithm.kl_penalty=low_var_kl"]
    for settings in ([], *KINDS.values()):
        names = [stream.name for stream in streams_of(load_config([*base, *settings]))]
        assert len(names) == len(set(names))
    for stream in STREAMS:
        order = list(PHASES)
        readers = {reader if isinstance(reader, str) else reader[0] for reader in stream.readers}
        assert {stream.writer, *readers} <= set(order)
        assert all(order.index(stream.writer) < order.index(reader) for reader in readers)
