# SPDX-License-Identifier: Apache-2.0
"""Make torchvision importable in the environment of the Python that runs this: `python scripts/mend_torchvision.py`.

The torchvision wheel on PyPI is linked against CUDA and cannot load its binary beside a CPU-only torch, though image
resizing does not need it. Where that is so, a small import hook is put into site-packages; elsewhere nothing is done.
Run it again after installing packages; it also takes away a hook that is no longer needed. It takes no arguments.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK_MODULE = "verl_torchvision_hook"
# torchaudio and torchcodec are not ours: vLLM's CPU build brings them, linked against CUDA as well.
OPTIONAL_PACKAGES = ("torchaudio", "torchcodec")


def import_error(module: str) -> str | None:
    """Say why `module` cannot be imported in a Python without our hook: the error's last line, None when it can."""
    code = (
        "import sys; "
        f"sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != {HOOK_MODULE!r}]; "
        f"sys.modules.pop({module!r}, None); import {module}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"Python ended with status {result.returncode}"])[-1]


def mend(site_packages: Path) -> str:
    """Write or remove the hook as this environment needs it and return one line saying what was found.

    Raises RuntimeError when torchvision is missing, or still does not import with the hook in place.
    """
    module_file, path_file = site_packages / f"{HOOK_MODULE}.py", site_packages / f"{HOOK_MODULE}.pth"
    error = import_error("torchvision")
    if error is not None and "No module named 'torchvision'" in error:
        raise RuntimeError(
            f"{sys.executable} has no torchvision; run `{sys.executable} -m pip install torchvision` first"
        )
    optional_errors = {name: import_error(name) for name in OPTIONAL_PACKAGES}
    hidden = [name for name, why in optional_errors.items() if why is not None and "No module named" not in why]
    if error is None and not hidden:
        module_file.unlink(missing_ok=True)
        path_file.unlink(missing_ok=True)
        return "torchvision imports as it is; nothing to mend"

    shutil.copyfile(Path(__file__).with_name("torchvision_hook.py"), module_file)
    path_file.write_text(f"import {HOOK_MODULE}; {HOOK_MODULE}.install(hide={hidden!r})\n")
    check = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if check.returncode != 0:
        raise RuntimeError(f"torchvision does not import even with the hook:\n{check.stderr}")
    hiding = f"; hidden, as broken as it was: {', '.join(hidden)}" if hidden else ""
    return f"torchvision mended (without the hook: {error}){hiding}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(mend(Path(sysconfig.get_paths()["purelib"])))
