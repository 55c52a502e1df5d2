# SPDX-License-Identifier: Apache-2.0
"""This trainer's step, with shared prompts and with packed rows, beside the step of TRL's GRPOTrainer.

    python scripts/bench_against_trl.py                              # 1000 + 250 tokens, 8 responses a prompt: minutes
    python scripts/bench_against_trl.py --prompts 16 --prompt-length 64 --response-length 40 --micro-batch-size 32
    python scripts/bench_against_trl.py --model 512 --picture shared_prompts.png

All sides have the same model, prompts and lengths, and take turns. TRL runs in a virtual environment of its own
(`--venv`), which the script makes from the pins below where it is missing. All compute in fp32 on one CPU thread with
gradient checkpointing, generate all responses at once, and put as many rows through the model at once in the other
phases. Seconds are CPU seconds. Each ratio is the median over the turns, with the smallest and the largest.

- rollout: generation, every response of the full length.
- log-probs: of the responses before the update, without gradient. TRL leaves this pass out where a batch is used for
  one optimizer step only; it is then measured beside its step.
- update: forward, backward and optimizer step.
- all three: their sum.
- own step: what a side does in a step: for ours all three, for TRL its own step, with rewards and without log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process_memory import forget_peak, status_of_process

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl==1.16.0"
SHARED_PINS = ("torch", "torchvision", "transformers", "accelerate", "datasets", "pillow", "peft")
"""What TRL's environment takes in the releases of requirements.txt."""
SIDES = {"shared": [], "packed": ["worker.actor.share_prompts=false"], "TRL": None}
"""The sides, and the keys of our configuration that each of ours has; TRL comes last."""
PARTS = ("rollout", "log-probs", "update")
PHASES = (*PARTS, "all three", "own step")
MODELS: dict[str, dict[str, int]] = {
    "quickstart": dict(
        hidden_size=128, num_layers=3, num_heads=4, vision_hidden_size=64, vision_depth=2, vision_heads=4
    ),
    "512": dict(hidden_size=512, num_layers=4, num_heads=8, vision_hidden_size=128, vision_depth=2, vision_heads=4),
}

MEDIA_INPUTS = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")

Measured = dict[str, dict[str, float]]
"""`seconds` and `peak` (MiB) by phase."""


def measured(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """CPU seconds and MiB on top of what was held before, and what `run` returned."""
    forget_peak()
    before, start = status_of_process("VmRSS"), time.process_time()
    result = run()
    return {"seconds": time.process_time() - start, "peak": status_of_process("VmHWM") - before}, result


def together(result: Measured) -> dict[str, float]:
    """All parts of a step."""
    parts = [result[name] for name in PARTS]
    return {"seconds": sum(part["seconds"] for part in parts), "peak": max(part["peak"] for part in parts)}


# ---- our side ----


def run_ours(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from bench_rollout import make_prompts
    from bench_train import config_of, rows_of

    from verl.algorithms.policy_loss import POLICY_LOSSES
    from verl.utils.batch_plan import BatchPlan
    from verl.workers.fsdp_workers import FSDPWorker
    from verl.workers.rollout.base import Sampling

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    at_once = arguments.prompts * arguments.n * (arguments.prompt_length + arguments.response_length)
    keys = [f"worker.rollout.max_num_batched_tokens={at_once}", *SIDES[arguments.side]]
    config = config_of(arguments, arguments.model_path, keys)
    worker = FSDPWorker(
        config,
        BatchPlan.from_config(config, 1),
        POLICY_LOSSES[config.worker.actor.loss_type],
        signal_streams=(),
        training_steps=10,
        rank=0,
        world_size=1,
        local_rank=0,
        device="cpu",
    )
    worker.init_model()
    prompts = make_prompts(arguments.model_path, arguments.prompts, arguments.prompt_length, fills=True)
    inputs = prompts.select(
        ["input_ids", "attention_mask", "position_ids"], ["raw_prompt_ids", "multi_modal_data"], []
    )
    rows = rows_of(prompts, arguments)
    sampling = Sampling(n=arguments.n, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=True)
    say({"prompt_tokens": int(prompts.batch["attention_mask"].sum())})
    for turn in turns():
        inputs.meta_info = {"sampling": sampling, "seed_parts": (0, turn)}

        def roll_out() -> None:
            worker.prepare_rollout_engine()
            worker.generate_sequences(inputs)
            worker.release_rollout_engine()

        result: Measured = {}
        result["rollout"], _ = measured(roll_out)
        result["log-probs"], _ = measured(lambda: worker.compute_log_probs(rows))
        result["update"], _ = measured(lambda: worker.update_actor(rows))
        result["own step"] = result["all three"] = together(result)
        say(result)


# ---- TRL's side: its environment has nothing of ours ----


def run_trl(arguments: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)

    class TimedTrainer(GRPOTrainer):
        """Measures the parts of each step; an update is what a step does beside preparing its inputs."""

        def begin_step(self) -> None:
            self.step_start = time.process_time()
            self.prepare_seconds, self.update_peak, self.held = 0.0, 0.0, float("inf")

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            if self.prepare_seconds:
                self.note_update_peak()
            start = time.process_time()
            inputs = super()._prepare_inputs(generation_batch)
            self.prepare_seconds += time.process_time() - start
            forget_peak()
            self.held = min(self.held, status_of_process("VmRSS"))
            return inputs

        def _generate_single_turn(self, *args: Any, **keywords: Any) -> Any:
            self.rollout, result = measured(lambda: super(TimedTrainer, self)._generate_single_turn(*args, **keywords))
            return result

        def note_update_peak(self) -> None:
            self.update_peak = max(self.update_peak, status_of_process("VmHWM") - self.held)

        def end_step(self) -> Measured:
            seconds = time.process_time() - self.step_start
            self.note_update_peak()
            update = {"seconds": seconds - self.prepare_seconds, "peak": self.update_peak}
            step = {"seconds": seconds, "peak": max(self.rollout["peak"], self.update_peak)}
            log_probs, _ = measured(self.compute_log_probs)
            result = {"rollout": self.rollout, "log-probs": log_probs, "update": update}
            return {**result, "all three": together(result), "own step": step}

        @torch.no_grad()
        def compute_log_probs(self) -> None:
            self.model.eval()
            for batch in self._buffered_inputs:
                self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                    torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                    batch["completion_ids"].shape[1],
                    **{name: batch[name] for name in MEDIA_INPUTS if name in batch},
                )
            self.model.train()

    class Turns(TrainerCallback):
        """Has the training loop wait for its turn before each step."""

        turns = turns()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if next(self.turns, None) is None:
                sys.exit()
            trainer.begin_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say(trainer.end_step())

    rows = []
    for row in json.loads(Path(arguments.rows).read_text()):
        text = {"type": "text", "text": row["prompt"].removeprefix("<image>")}
        message = {"role": "user", "content": [{"type": "image"}, text]}
        rows.append({"prompt": [message], "image": Image.open(row["images"][0]).convert("RGB")})
    processor = AutoProcessor.from_pretrained(arguments.model_path)
    settings = GRPOConfig(
        output_dir=arguments.folder,
        per_device_train_batch_size=arguments.micro_batch_size,
        gradient_accumulation_steps=arguments.prompts * arguments.n // arguments.micro_batch_size,
        num_generations=arguments.n,
        max_completion_length=arguments.response_length,
        generation_kwargs={"min_new_tokens": arguments.response_length},
        beta=0.0,
        max_steps=10**6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = TimedTrainer(
        AutoModelForImageTextToText.from_pretrained(arguments.model_path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float(index % 2) for index in range(len(completions))],
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[Turns()],
    )
    texts = [processor.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    lengths = [processor(text=[text], images=[row["image"]]) for text, row in zip(texts, rows, strict=True)]
    say({"prompt_tokens": sum(len(inputs["input_ids"][0]) for inputs in lengths)})
    trainer.train()


# ---- both sides in turns ----

_answers = None
"""Where a side writes its results; its standard output belongs to the libraries."""


def turns() -> Any:
    """The numbers of the turns, each when its line has come in."""
    for turn, _ in enumerate(sys.stdin):
        yield turn


def say(result: dict[str, Any]) -> None:
    print(json.dumps(result), file=_answers, flush=True)


class Side:
    """A process that makes a step whenever it is asked for one."""

    def __init__(self, python: str, name: str, arguments: argparse.Namespace) -> None:
        command = [python, __file__, "--side", name, *sys.argv[1:]]
        command += ["--model-path", arguments.model_path, "--rows", arguments.rows, "--folder", arguments.folder]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.prompt_tokens = self._read()["prompt_tokens"]

    def step(self) -> Measured:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.name} ended with status {self.process.wait()}")
        return json.loads(line)


def make_venv(folder: Path) -> str:
    """The Python of an environment with TRL; makes it where it is not there."""
    python = folder / "bin" / "python"
    stamp, pins = folder / "trl.txt", TRL + "\n" + (ROOT / "requirements.txt").read_text()
    if stamp.exists() and stamp.read_text() == pins:
        return str(python)
    if folder.exists() and not stamp.exists():
        raise SystemExit(f"--venv {folder} exists, and this script did not make it; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stamp.touch()  # so that what is half made may be removed
    subprocess.run([os.environ.get("PYTHON", "python3"), "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", ROOT / "requirements.txt", *SHARED_PINS, TRL], check=True)
    subprocess.run([python, ROOT / "scripts" / "mend_torchvision.py"], check=True)
    stamp.write_text(pins)
    return str(python)


def compare(arguments: argparse.Namespace) -> None:
    from bench_rollout import make_rows

    from tests.tiny import make_tiny_model
    from verl.utils.tokenizer import get_tokenizer

    pythons = dict.fromkeys(SIDES, sys.executable) | {"TRL": make_venv(arguments.venv)}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = folder
        arguments.model_path = make_tiny_model(f"{folder}/model", **MODELS[arguments.model])
        tokenizer = get_tokenizer(arguments.model_path)
        rows = make_rows(folder, tokenizer, arguments.prompts, arguments.prompt_length, fills=True)
        arguments.rows = f"{folder}/rows.json"
        Path(arguments.rows).write_text(json.dumps(rows))
        sides = [Side(pythons[name], name, arguments) for name in SIDES]
        (prompt_tokens,) = {side.prompt_tokens for side in sides}  # all read the same prompts
        results = []
        for turn in range(arguments.repeats + 1):
            first = turn % len(sides)  # whoever comes after the slowest finds the caches coldest
            results.append({side.name: side.step() for side in sides[first:] + sides[:first]})
        del results[0]  # which warmed up
        for side in sides:
            side.stop()

    num_rows = arguments.prompts * arguments.n
    prompt_length = round(prompt_tokens / arguments.prompts)
    print(
        f"model {arguments.model}, {arguments.prompts} prompts of {prompt_length} tokens, {arguments.n} responses of "
        f"{arguments.response_length}, {arguments.micro_batch_size} rows at once, {arguments.repeats} turns; {TRL}\n"
    )
    others = [name for name in SIDES if name != "shared"]
    columns = [f"{name}, tokens/s" for name in SIDES] + [f"shared against {name}" for name in others]
    print(f"| {' | '.join(['', *columns, *(f'{name}, MiB' for name in SIDES)])} |")
    print(f"|{'---|' * (2 * len(SIDES) + len(others) + 1)}")
    for phase in PHASES:
        tokens = num_rows * arguments.response_length + (phase != "rollout") * prompt_tokens * arguments.n
        speeds = [f"{tokens / statistics.median(seconds_of(results, name, phase)):.0f}" for name in SIDES]
        ratios = [spread(ratios_of(results, "shared", name, phase)) for name in others]
        peaks = [f"{max(turn[name][phase]['peak'] for turn in results):.0f}" for name in SIDES]
        print(f"| {' | '.join([phase, *speeds, *ratios, *peaks])} |")
    if arguments.picture:
        shape = (prompt_length, arguments.response_length, arguments.n)
        draw(results, shape, arguments.picture)


def seconds_of(results: list[dict[str, Measured]], name: str, phase: str) -> list[float]:
    return [turn[name][phase]["seconds"] for turn in results]


def ratios_of(results: list[dict[str, Measured]], name: str, other: str, phase: str) -> list[float]:
    """How many times as fast `name` is as `other`, by turn."""
    pairs = zip(seconds_of(results, name, phase), seconds_of(results, other, phase), strict=True)
    return [of_other / of_name for of_name, of_other in pairs]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(results: list[dict[str, Measured]], shape: tuple[int, int, int], path: str) -> None:
    """The tokens that one prompt's responses take through the model, and the speed of each phase against TRL."""
    from matplotlib.figure import Figure

    prompt, response, n = shape
    colors = {"prompt": "#0072B2", "response": "#E69F00"}  # of Okabe and Ito, told apart by the colour-blind
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot, which would look for a display
    rows, speeds = figure.subplots(1, 2, width_ratios=(3, 2))
    pieces = {"packed": ["prompt", "response"] * n, "shared": ["prompt"] + ["response"] * n}
    for place, kinds in enumerate(pieces.values()):
        left = 0
        for kind in kinds:
            width = {"prompt": prompt, "response": response}[kind]
            rows.barh(place, width, left=left, color=colors[kind], edgecolor="white", height=0.5)
            left += width
        rows.text(left, place + 0.3, f"{left:,} tokens", ha="right", va="bottom")
    rows.set(yticks=range(len(pieces)), yticklabels=pieces, xlabel="tokens of one row", ylim=(-0.5, 2.1))
    handles = [rows.barh(0, 0, color=color) for color in colors.values()]
    rows.legend(handles, [f"prompt, {prompt}", f"response, {response}"], ncols=2, frameon=False, loc="upper right")
    rows.set_title(f"{n} responses to one prompt")

    width = 0.8 / len(SIDES)
    for place, (name, hatch) in enumerate(zip(SIDES, ("", "//", ".."), strict=True)):
        ratios = [statistics.median(ratios_of(results, name, "TRL", phase)) for phase in PHASES]
        positions = [index + (place - 1) * width for index in range(len(PHASES))]
        bars = speeds.bar(positions, ratios, width, label=name, hatch=hatch, edgecolor="white")
        speeds.bar_label(bars, fmt="%.1f", fontsize=8)
    speeds.set(xticks=range(len(PHASES)), xticklabels=PHASES, ylabel="times as fast as TRL")
    speeds.legend(frameon=False)
    for axes in (rows, speeds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    global _answers
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--n", type=int, default=8, help="responses a prompt")
    parser.add_argument("--prompt-length", type=int, default=1000)
    parser.add_argument("--response-length", type=int, default=250)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="responses that go through the model at once")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--picture", help="file of a picture of the layouts and the speeds")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-trl")
    for name in ("--side", "--model-path", "--rows", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prompts * arguments.n % arguments.micro_batch_size:
        parser.error("--micro-batch-size has to divide the responses, --prompts times --n")
    if arguments.side is None:
        compare(arguments)
        return
    # What both configurations are made from (`config_of`, `rows_of`).
    arguments.device, arguments.engine, arguments.workers, arguments.fill = "cpu", "hf", 1, True
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (run_trl if arguments.side == "TRL" else run_ours)(arguments)


if __name__ == "__main__":
    main()
