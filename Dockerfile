# SPDX-License-Identifier: Apache-2.0
# An environment for CUDA 13, without the code: that is mounted, so that a change needs no new image.
#   docker build --tag verl .
#   docker run --gpus all --ipc host --volume "$PWD:/workspace/verl" --interactive --tty verl bash scripts/gpu_check.sh
# --ipc host: NCCL, and processes that hand tensors to each other, need more shared memory than a container has.

# The compiler is for kernels that Triton and vLLM build while they run, and for FlashAttention.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# FlashAttention's release, such as 2.8.3, compiled here for hours; without it attention is PyTorch's SDPA.
ARG FLASH_ATTN=

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu keeps one version of a package for a release, so that a pin would break and not repeat a build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates git iproute2 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# In a virtual environment, where the scripts look for one.
ENV VERL_VENV=/opt/verl \
    PATH=/opt/verl/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv "$VERL_VENV"

WORKDIR /workspace/verl
COPY requirements.txt setup.py README.md ./
COPY verl/__init__.py verl/
# The pins of requirements.txt and vLLM at the release of setup.py, resolved together. The package itself is left to the
# folder that is mounted.
RUN pip install --requirement requirements.txt ".[vllm]" && pip uninstall --yes verl
RUN if [ -n "$FLASH_ATTN" ]; then \
        pip install "setuptools==80.9.0" "packaging==25.0" "ninja==1.13.0" \
        && pip install --no-build-isolation "flash-attn==$FLASH_ATTN"; \
    fi
ENV PYTHONPATH=/workspace/verl
CMD ["/bin/bash"]
