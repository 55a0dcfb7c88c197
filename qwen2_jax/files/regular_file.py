# SPDX-License-Identifier: Apache-2.0
"""Whether a file is there that can be read. A broken link, a folder or a pipe in its place is an error.

A checkpoint whose tokenizer_config.json is a link into a cache that was emptied is not one without settings.
"""

import os
import stat
from pathlib import Path
from typing import Any

from ..errors import UserError


def is_regular_file(path: Any, error: type[UserError] = UserError) -> bool:
    """Whether `path` is a file, or a link to one; False where nothing of this name is there.

    path: a Path, or an epath.Path for gs://. Raises `error` for anything else of this name.
    """
    if not isinstance(path, Path):
        return path.is_file()
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise error(f"{path} is a link to {os.readlink(path)}, which is not there; fetch the file again") from None
        return False
    except OSError as why:
        raise error(f"{path} cannot be read: {why.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise error(f"{path} is {what} instead of a file; remove it")
    return True
