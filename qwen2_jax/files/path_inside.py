# SPDX-License-Identifier: Apache-2.0
"""Turns an untrusted file name, read from a file, into a path inside a folder; all such names are checked here.

A checkpoint names files: in an index of weights, a record of their layout, a manifest. Joined to a folder unchecked, a
name such as ../../x or /etc/x reads or writes outside of it.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UserError

MAX_LENGTH = 255  # bytes of a file name, on all common file systems
_DRIVE = re.compile(r"[A-Za-z]:")  # of Windows, where joining C:x to a folder leaves the folder
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, halves of a surrogate pair


def path_inside(
    folder: Any,
    name: Any,
    where: str,
    rule: str,
    *,
    suffix: str = "",
    subfolders: Collection[str] = (),
    writing: bool = False,
    error: type[UserError] = CheckpointError,
) -> Any:
    """The path of the file `name` in `folder`.

    Args:
        folder: a Path, or an epath.Path for gs://.
        name: as it was read; anything but the plain name of a file is refused.
        where: what holds the name, for the message, such as the path of an index.
        rule: what is allowed, for the message.
        suffix: what the name must end with.
        subfolders: names of folders in `folder` that may stand in front of the name, followed by a slash.
        writing: the file is about to be created: symbolic links must not lead out of `folder` either. A file that is
            read may be a link, as those in the cache of the Hugging Face Hub are.
        error: the class to raise.

    Raises:
        CheckpointError (or `error`): the name is absolute or no string, has separators, .., a drive or NUL, lacks the
            suffix, or is longer than MAX_LENGTH; or a link leads elsewhere.
    """
    subfolder, _, plain = name.rpartition("/") if isinstance(name, str) else ("", "", "")
    if (
        not isinstance(name, str)
        or (subfolder and subfolder not in subfolders)
        or name.startswith("/")
        or not plain.endswith(suffix)
        or plain in ("", ".", "..", suffix)
        or "\\" in name
        or _NO_TEXT.search(name)
        or _DRIVE.match(plain)
        or len(plain.encode()) > MAX_LENGTH
    ):
        shown = repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
        raise error(f"{where} names {shown}; {rule}")
    path = folder / name
    if writing and isinstance(path, Path):
        if path.is_symlink() or not path.parent.resolve().is_relative_to(folder.resolve()):
            raise error(f"{where} names {name!r}, which is a symbolic link out of {folder}; {rule}")
    return path
