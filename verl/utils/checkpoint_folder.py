# SPDX-License-Identifier: Apache-2.0
"""Writes one checkpoint's folder under a temporary name, lists its files in a manifest, renames it, and checks it.

A checkpoint is written as `global_step_<N>.unfinished` and renamed when it is whole. A checkpoint that it replaces is
called `global_step_<N>.replaced` during the renaming. `manifest.json` lists the files with sizes and SHA-256 sums.
Folders without a manifest, such as EasyR1's, are accepted unchecked.
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
    """The temporary folder for the checkpoint `folder`. Removes the leftovers of an earlier attempt."""
    unfinished = f"{folder}{UNFINISHED}"
    _remove(unfinished)
    os.makedirs(unfinished)
    return unfinished


def publish(folder: str) -> None:
    """Renames `unfinished_folder(folder)` to `folder`, once its files are on disk.

    An existing checkpoint of that name is replaced. If this is interrupted, `settle_checkpoints` restores one of them.
    """
    unfinished, replaced = f"{folder}{UNFINISHED}", f"{folder}{REPLACED}"
    flush_all(unfinished)
    _remove(replaced)
    if os.path.isdir(folder):
        os.rename(folder, replaced)
    os.rename(unfinished, folder)
    flush(os.path.dirname(folder))
    remove_if_possible(replaced)


def remove_if_possible(folder: str | os.PathLike[str]) -> None:
    """Removes a folder that nothing needs any more. A failure is a warning: it is no reason to end a run.

    It fails for example where another program has a file of it open on NFS.
    """
    try:
        _remove(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def settle_checkpoints(root: str) -> None:
    """Cleans up under `root` after a run that was killed while saving.

    A checkpoint whose replacement was not finished gets its name back; unfinished and replaced ones are removed.
    """
    for path in sorted(Path(root).glob("global_step_*")):
        folder = path.with_suffix("")
        if path.suffix == REPLACED and not folder.exists():
            logger.warning("%s was being replaced when its run ended: it is %s again", path, folder)
            path.rename(folder)
        elif path.suffix in (UNFINISHED, REPLACED):
            remove_if_possible(path)


def _remove(path: str | os.PathLike[str]) -> None:
    """Removes a folder with its content, or a link to one; does nothing if there is none."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.exists(path):
        shutil.rmtree(path)


# ---- the manifest ----


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint's `manifest.json`."""

    step: int
    model_only: bool
    """Whether it was saved without optimizers and schedules."""
    saved_at: str
    """UTC, as ISO 8601."""
    files: dict[str, FileRecord]
    """Files by path below the checkpoint's folder, with `/` as separator."""

    def paths(self, folder: str | os.PathLike[str]) -> Iterator[tuple[Path, FileRecord]]:
        """The files in the order of their names."""
        for name in sorted(self.files):
            yield Path(folder, name), self.files[name]


def record_files(root: str | os.PathLike[str], *paths: str | os.PathLike[str]) -> dict[str, FileRecord]:
    """Flushes files, or all files of folders, and returns their records by path below `root`."""
    records = {}
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                flush(file)
                records[file.relative_to(root).as_posix()] = FileRecord(file.stat().st_size, _sha256(file))
    return records


def write_manifest(folder: str, step: int, model_only: bool, files: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of a checkpoint, as its last file."""
    saved_at = datetime.now(UTC).isoformat(timespec="microseconds")
    write_json(os.path.join(folder, MANIFEST), asdict(Manifest(step, model_only, saved_at, dict(files))))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a checkpoint; None if it has none, as EasyR1's.

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
    """Describes the first file of the manifest that is missing or has another size; None if all are there.

    None also without a manifest.
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
    """Describes the first file whose content has changed since it was saved; None if none has, or without a manifest.

    Args:
        part, parts: the share of the files to read, so that ranks divide the work.
    """
    manifest = read_manifest(folder)
    for path, record in list(manifest.paths(folder))[part::parts] if manifest is not None else ():
        if _sha256(path) != record.sha256:
            return f"{path} is not the file that was saved: its SHA-256 differs from the one in {MANIFEST}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
