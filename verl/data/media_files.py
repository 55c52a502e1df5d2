# SPDX-License-Identifier: Apache-2.0
"""Resolves the images and videos that a dataset names: files, below `data.image_dir` if set, or `data:` URIs.

Datasets may come from strangers, so a name can lead neither to the network nor to a pipe.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from urllib.parse import urlsplit
from urllib.request import url2pathname

from verl.config import cut

SCHEME = re.compile(r"(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def media_content(source: str | os.PathLike, folder: str | os.PathLike | None) -> bytes | str:
    """The path of the file that `source` names, or the content of a `data:` URI.

    Args:
        source: a path, a `file://` URI or a `data:` URI.
        folder: start of relative paths, which no path may leave, by `..`, as an absolute path or through a link
            (`data.image_dir`). None is the working directory, and allows any path.

    Raises:
        ValueError: it is another URI, leaves `folder`, or is no regular file.
        OSError: there is no such file.
    """
    if isinstance(source, str) and (scheme := SCHEME.match(source)):
        if scheme.group().lower() == "data:":
            return _content_of_uri(source)
        if scheme.group().lower() != "file://":
            raise ValueError(f"media are read from files, not fetched: download {source!r:.200} and give its path")
        source = url2pathname(urlsplit(source).path)
    path = os.path.join(folder or "", source)
    if folder:
        path, root = os.path.realpath(path), os.path.realpath(folder)
        if os.path.commonpath([path, root]) != root:
            raise ValueError(f"it is outside of data.image_dir: {cut(os.fspath(source), 60)!r} is {cut(path)}")
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{cut(os.fspath(source))!r} is {KINDS.get(kind, 'special')}, not a regular file")
    return path


def _content_of_uri(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"a data URI has to be base64, as in data:image/png;base64,..., not {uri!r:.80}")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the base64 of {uri!r:.80} is damaged: {error}") from error
