# SPDX-License-Identifier: Apache-2.0
"""A script for one test: a run of one step that says which packages each of its processes has loaded.

    python -m tests.modules_of_a_run key=value ...

prints the names of all top-level packages, for the command line once it is read, the trainer, a worker and the reward
function's process.
"""

import importlib
import json
import sys

from verl.trainer.config import load_config
from verl.trainer.main import TRAINER_MODULES, prepare, run
from verl.utils.lean_imports import import_modules


def packages(_: object = None) -> list[str]:
    return sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None})


if __name__ == "__main__":
    config = load_config(sys.argv[1:])
    prepare(config)
    loaded = {"command line": packages()}

    import_modules(TRAINER_MODULES)
    import ray

    trainer_class = importlib.import_module("verl.trainer.ray_trainer").RayDAPOTrainer
    update_actor = trainer_class._update_actor

    def look_around(trainer, batch, record) -> None:
        update_actor(trainer, batch, record)
        actors = {"worker": trainer.processes._actors[0], "reward": trainer.rewards._process._actor}
        loaded.update({name: ray.get(actor.__ray_call__.remote(packages)) for name, actor in actors.items()})
        loaded["trainer"] = packages()

    trainer_class._update_actor = look_around
    run(config)
    sys.stdout.write(json.dumps(loaded))
