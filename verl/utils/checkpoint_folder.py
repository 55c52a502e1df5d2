# SPDX-License-Identifier: Apache-2.0
"""One checkpoint's folder: written under another name, listed in a manifest, named when it is whole, checked later.

A checkpoint is written as `global_step_<N>.unfinished` and gets its name when it is whole; one that it replaces is
`global_step_<N>.replaced` for the moment between. `manifest.json` lists its files with sizes and SHA-256 sums. Folders
without one, such as EasyR1's, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from verl.utils.writing import flush, flush_all, write_json

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
REPLACED = ".replaced"

logger = logging.getLogger(__name__)


# ---- writing ----


def unfinished_folder(folder: str) -> str:
    """Where the checkpoint of `folder` is written until it is whole. What an earlier attempt left there is removed."""
    unfinished = f"{folder}{UNFINISHED}"
    _remove(unfinished)
    os.makedirs(unfinished)
    return unfinished


def publish(folder: str) -> None:
    """Gives the checkpoint that was written to `unfinished_folder(folder)` its name, once its files are on disk.

    A checkpoint of that name is replaced. Whatever happens on the way, `settle_checkpoints` finds one of the two.
    """
    unfinished, replaced = f"{folder}{UNFINISHED}", f"{folder}{REPLACED}"
    flush_all(unfinished)
    _remove(replaced)
    if os.path.isdir(folder):
        os.rename(folder, replaced)
    os.rename(unfinished, folder)
    flush(os.path.dirname(folder))
    _remove(replaced)


def settle_checkpoints(root: str) -> None:
    """Puts right what a run that was killed while it saved has left under `root`.

    A checkpoint that was about to be replaced gets its name back; what is unfinished or was replaced is removed.
    """
    for path in sorted(Path(root).glob("global_step_*")):
        folder = path.with_suffix("")
        if path.suffix == REPLACED and not folder.exists():
            logger.warning("%s was being replaced when its run ended: it is %s again", path, folder)
            path.rename(folder)
        elif path.suffix in (UNFINISHED, REPLACED):
            _remove(path)


def _remove(path: str | os.PathLike[str]) -> None:
    """A folder with all in it, or the link to one; nothing where there is nothing."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.exists(path):
        shutil.rmtree(path)


# ---- the manifest ----


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint has to be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    model_only: bool
    """Whether it was saved without optimizers and schedules."""
    saved_at: str
    """UTC, as ISO 8601."""
    files: dict[str, FileRecord]
    """By path below the checkpoint's folder, with `/` between its parts."""

    def paths(self, folder: str | os.PathLike[str]) -> Iterator[tuple[Path, FileRecord]]:
        """The files in the order of their names."""
        for name in sorted(self.files):
            yield Path(folder, name), self.files[name]


def record_files(root: str | os.PathLike[str], *paths: str | os.PathLike[str]) -> dict[str, FileRecord]:
    """Flushes files, or all files of folders, and describes them; by their paths below `root`."""
    records = {}
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                flush(file)
                records[file.relative_to(root).as_posix()] = FileRecord(file.stat().st_size, _sha256(file))
    return records


def write_manifest(folder: str, step: int, model_only: bool, files: Mapping[str, FileRecord]) -> None:
    """Lists the files of a checkpoint; written last."""
    saved_at = datetime.now(UTC).isoformat(timespec="microseconds")
    write_json(os.path.join(folder, MANIFEST), asdict(Manifest(step, model_only, saved_at, dict(files))))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """What `write_manifest` wrote; None where the checkpoint has none, as EasyR1's.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder, MANIFEST)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        files = {
            name: FileRecord(int(record["bytes"]), str(record["sha256"])) for name, record in content["files"].items()
        }
        if outside := [name for name in files if name.startswith("/") or ".." in name.split("/")]:
            raise ValueError(f"it names {outside[0]}, outside of the checkpoint")
        return Manifest(int(content["step"]), bool(content["model_only"]), str(content["saved_at"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, not UTF-8, or of another shape
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


# ---- checking ----


def find_damage(folder: str | os.PathLike[str]) -> str | None:
    """The first file that the manifest lists and that is missing or of another size; None where all are there.

    Without a manifest nothing is known of the folder, and no damage either.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        return None
    for path, record in manifest.paths(folder):
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != record.bytes:
            return f"{path} has {size} bytes, but was saved with {record.bytes}: " + ("empty" if size == 0 else "cut")
    return None


def find_changes(folder: str | os.PathLike[str], part: int = 0, parts: int = 1) -> str | None:
    """The first file whose content is not the saved one; None where all are as they were, or there is no manifest.

    Args:
        part, parts: which share of the files to read, so that ranks check a checkpoint together.
    """
    manifest = read_manifest(folder)
    for path, record in list(manifest.paths(folder))[part::parts] if manifest is not None else ():
        if _sha256(path) != record.sha256:
            return f"{path} is not the file that was saved: its SHA-256 differs from the one in {MANIFEST}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
