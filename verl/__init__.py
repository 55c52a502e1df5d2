# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning for vision-language models, on Ray, FSDP2 and transformers."""

__version__ = "0.1.0"
