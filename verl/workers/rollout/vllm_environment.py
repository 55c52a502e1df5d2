# SPDX-License-Identifier: Apache-2.0
"""What vLLM finds when it is imported. Importing this module, before vLLM, sets variables and quiets what users cannot
act on; what such a message is good for is told here in its place."""

import logging
import os
import warnings
from pathlib import Path

logger = logging.getLogger(__name__)

NUMA_NODES = Path("/sys/devices/system/node")

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# A CPU worker keeps the one thread that it was given: bound to cores, several of them would share one.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# vLLM reads the level only once an engine starts, and warns before, such as of a Triton without a CPU back end.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
# vLLM looks at every name of every module, old ones included.
warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)


def tell_of_numa_nodes() -> None:
    """Warns on machines with several NUMA nodes, of which vLLM on a CPU takes one.

    vLLM's own warning comes on every machine and from C++, where `VARIABLES_ON_CPUS` keeps it quiet.
    """
    nodes = len(list(NUMA_NODES.glob("node[0-9]*")))
    if nodes > 1:
        logger.warning(
            "vLLM takes memory from one of this machine's %d NUMA nodes only; if that is too little, "
            "`numactl --cpunodebind` chooses another node",
            nodes,
        )
