# SPDX-License-Identifier: Apache-2.0
"""Loggers that need a library: tensorboard, wandb, swanlab, mlflow. Each library is imported when it is used."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from verl.trainer.sinks import Generation, Run, Sink, WrittenFile, weight_bounds

if TYPE_CHECKING:
    from verl.report.token_map import TokenMap

logger = logging.getLogger(__name__)

GENERATIONS, TOKEN_MAPS = "{}/generations", "{}/token_maps"
"""Names under which every logger shows the samples of a split, as texts and as token maps."""


class TensorboardSink(Sink):
    """Event files in `$TENSORBOARD_DIR/<project>/<experiment>`, with the configuration as hyper-parameters.

    Points after the step at which the run resumes belong to steps that are repeated: viewers drop them. A run that
    only validates repeats none.
    """

    LIBRARY = "tensorboard"

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run)
        folder = Path(os.environ.get("TENSORBOARD_DIR", "tensorboard_log")) / run.project_name / run.experiment_name
        self._folder = folder.absolute()
        if not (run.continues or run.only_validates) and any(folder.glob("events.out.tfevents.*")):
            logger.warning(
                "%s has the events of an earlier run, and tensorboard draws both as one; another "
                "trainer.experiment_name keeps them apart",
                self._folder,
            )
        first_repeated = run.resume_step + 1 if run.resume_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=None if run.only_validates else first_repeated)
        self._writer.add_hparams(hyper_parameters(run.config), metric_dict={}, run_name=".")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        # The text is shown as Markdown without HTML tags; what is set in like code keeps its <think> and its lines.
        blocks = [
            f"**sample {number}, score {sample.score:.3f}**\n\n{indent(sample.tagged(), '    ', lambda line: True)}"
            for number, sample in enumerate(samples, start=1)
        ]
        self._writer.add_text(GENERATIONS.format(split), "\n\n".join(blocks), step)
        self._writer.flush()

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        """One picture per sample: tensorboard cannot show HTML pages."""
        from verl.report.token_map_image import token_map_image

        for number, sample in enumerate(samples, start=1):
            picture = token_map_image(sample, weight_bounds(self.run))
            self._writer.add_image(f"{TOKEN_MAPS.format(split)}/{number}", picture, step, dataformats="HWC")
        self._writer.flush()

    def files(self) -> list[WrittenFile]:
        return [WrittenFile("tensorboard", self._folder)]

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A run of Weights & Biases, set up by its own `WANDB_*` variables; the x axis of every chart is `global_step`.

    wandb's own `Step` cannot go back. It equals the training step until a resumed run repeats steps that the server
    already knows. The server would drop these, so they become further rows, with the right `global_step`.
    """

    LIBRARY = "wandb"
    HAS_SERVER = True
    STEP = "global_step"

    @classmethod
    def account_problem(cls) -> str | None:
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or sys.stdin.isatty():  # where it asks
            return None
        import wandb

        if wandb.login(verify=False, prompt=False):
            return None
        return "has no key: `wandb login` keeps one, WANDB_API_KEY gives one, WANDB_MODE=offline does without"

    def __init__(self, run: Run) -> None:
        import wandb

        super().__init__(run)
        kept = run.kept_ids.get("wandb")
        self._table_of = wandb.Table
        self._html_of = wandb.Html
        self._rows: dict[str, list[list[Any]]] = {}  # by split
        self._wandb_run = wandb.init(
            project=run.project_name,
            name=run.experiment_name,
            config=run.config,
            id=kept,
            resume="allow" if kept else None,
            allow_val_change=True,
        )
        self._wandb_run.define_metric("*", step_metric=self.STEP)
        self.run_id = self._wandb_run.id
        self._step, self._row = -1, self._wandb_run.step - 1

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log_row(metrics, step)

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        """A table with a row for each validation, `step, input_1, output_1, label_1, score_1, input_2, ...`.

        Tables do not grow: each validation logs all rows since the start or the resume once more.
        """
        numbers = range(1, len(samples) + 1)
        columns = ["step", *(f"{field}_{number}" for number in numbers for field in Generation._fields)]
        rows = self._rows.setdefault(split, [])
        rows.append([step, *(value for sample in samples for value in sample)])
        self._log_row({GENERATIONS.format(split): self._table_of(columns=columns, data=rows)}, step)

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        page = self._html_of(token_page(samples, step, self.run), inject=False)
        self._log_row({TOKEN_MAPS.format(split): page}, step)

    def _log_row(self, values: Mapping[str, Any], step: int) -> None:
        if step != self._step:
            self._step, self._row = step, max(step, self._row + 1)
        self._wandb_run.log({**values, self.STEP: step}, step=self._row)

    def files(self) -> list[WrittenFile]:
        return [WrittenFile("wandb", Path(self._wandb_run.dir).parent)]

    def close(self, failed: bool) -> None:
        self._wandb_run.finish(exit_code=int(failed))


class SwanlabSink(Sink):
    """An experiment of SwanLab, set up by its own `SWANLAB_*` variables; its files are in `$SWANLAB_DIR`.

    Its metrics cannot go back: when a resumed run repeats a step, the server keeps the metrics of the first attempt.
    """

    LIBRARY = "swanlab"
    HAS_SERVER = True

    def __init__(self, run: Run) -> None:
        import swanlab

        super().__init__(run)
        kept = run.kept_ids.get("swanlab")
        self._folder = Path(os.environ.get("SWANLAB_DIR", "swanlab_log"))
        self._text_of, self._html_of = swanlab.Text, swanlab.Html
        self._swanlab_run = swanlab.init(
            project=run.project_name,
            name=run.experiment_name,
            config=run.config,
            log_dir=str(self._folder),
            id=kept,
            resume="allow" if kept else None,
        )
        self.run_id = self._swanlab_run.id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._swanlab_run.log(metrics, step)

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        texts = [
            self._text_of(sample.tagged(), caption=f"sample {number}, score {sample.score:.3f}")
            for number, sample in enumerate(samples, start=1)
        ]
        self._swanlab_run.log({GENERATIONS.format(split): texts}, step)

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        self._swanlab_run.log({TOKEN_MAPS.format(split): self._html_of(token_page(samples, step, self.run))}, step)

    def files(self) -> list[WrittenFile]:
        folders = self._folder.absolute().glob(f"run-*-{self.run_id}")
        return [WrittenFile("swanlab", folder) for folder in folders]

    def close(self, failed: bool) -> None:
        if failed:
            self._swanlab_run.finish("crashed", error="an exception ended the run")
        else:
            self._swanlab_run.finish()


class MlflowSink(Sink):
    """A run of MLflow at `$MLFLOW_TRACKING_URI`, else in `./mlflow.db`; the configuration is its parameters.

    The experiment is the project's name, unless `MLFLOW_EXPERIMENT_NAME` or `MLFLOW_EXPERIMENT_ID` says otherwise.
    Parameters cannot change: a resumed run keeps the parameters of its first start.
    """

    LIBRARY = "mlflow"
    HAS_SERVER = True

    def __init__(self, run: Run) -> None:
        import mlflow

        super().__init__(run)
        self._mlflow = mlflow
        kept = run.kept_ids.get("mlflow")
        experiment_id = None  # the one that the variables name
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            known = mlflow.get_experiment_by_name(run.project_name)
            experiment_id = known.experiment_id if known else mlflow.create_experiment(run.project_name)
        self.run_id = mlflow.start_run(kept, experiment_id, run.experiment_name).info.run_id
        if kept is None:
            mlflow.log_params({self._name(key): value for key, value in hyper_parameters(run.config).items()})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # From a thread of its own: a server that does not answer is asked again for minutes.
        values = {self._name(name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(values, step, synchronous=False, run_id=self.run_id)

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        """A text of each validation among the run's artifacts; mlflow's own tables take the text 7 for a number."""
        text = "\n\n".join(f"{sample.tagged()}\n[score] {sample.score}" for sample in samples)
        self._mlflow.log_text(text, f"{GENERATIONS.format(split)}/step_{step:06}.txt", self.run_id)

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        page = token_page(samples, step, self.run)
        self._mlflow.log_text(page, f"{TOKEN_MAPS.format(split)}/step_{step:06}.html", self.run_id)

    def files(self) -> list[WrittenFile]:
        """The database and the artifacts, where they are on this machine."""
        database = self._mlflow.get_tracking_uri().removeprefix("sqlite:///")
        artifacts = self._mlflow.get_artifact_uri().removeprefix("file://")
        return [WrittenFile("mlflow", Path(place)) for place in (database, artifacts) if "://" not in place]

    def close(self, failed: bool) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run("FAILED" if failed else "FINISHED")

    @staticmethod
    def _name(name: str) -> str:
        """`name` with only the characters that the server accepts."""
        return re.sub(r"[^\w/.\- ]", "_", name)


def token_page(samples: Sequence[TokenMap], step: int, run: Run) -> str:
    """A page with the samples of one step."""
    from verl.report.token_map import token_map_html

    return token_map_html(samples, f"{run.experiment_name}, step {step}", bounds=weight_bounds(run))


def hyper_parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """The configuration with dotted keys and values that are numbers or text; others become text."""
    flat: dict[str, bool | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= hyper_parameters(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat
