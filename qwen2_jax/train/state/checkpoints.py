# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: written atomically in the background, and verified when they are read.

    checkpoints/500/about/data.json    step, identity and settings of the run, extras, shapes and fingerprints of arrays
    checkpoints/500/state/             the arrays as Orbax stores them: each host writes what its devices hold

A folder gets its name, the step, when everything in it is on the disk. While it is written it is called
500.orbax-checkpoint-tmp, while it is removed 500.deleting; leftovers of a killed run under these names are removed.
A checkpoint that was found damaged is renamed to 500.damaged and kept.

The fingerprints (qwen2_jax/train/state/fingerprint.py) were computed from the arrays in memory, on the devices, and are
computed again from the arrays that were read back.
"""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.train.state.fingerprint import fingerprints, named
from qwen2_jax.train.state.orbax_files import Damaged, load, reason, start_saving
from qwen2_jax.train.state.resume_check import as_read, changed, describe, refused

VERSION, READ = 2, (1, 2)  # of about/data.json; 1 has no settings and does not say its version
UNWRITTEN, DELETING, DAMAGED, PROBE = ".orbax-checkpoint-tmp", ".deleting", ".damaged", ".probe"
CLOCK_STEPS = 10  # several hosts compare clocks every so many steps only, because all of them wait for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """When a run saves its state, and which checkpoints it keeps. The disk needs room for keep_last + 1."""

    every_steps: int | None = 500  # save whenever so many steps are done; None: never by steps
    every_minutes: float | None = 15.0  # save when the last one is older; None: never by time
    # Newest ones to keep; the others are removed when a new one is complete. 1: there is no fallback if that one is
    # damaged.
    keep_last: int = 2
    keep_every: int | None = None  # checkpoints of multiples of this step are never removed
    export_every: int | None = None  # steps between copies of the weights as Hugging Face folders, out/hf-STEP
    verify: bool = True  # fingerprint every array before saving and after restoring

    def __post_init__(self):
        validate.number(self, "checkpoints", ("every_steps", "keep_every", "export_every"), int, 1, none=True)
        validate.number(self, "checkpoints", ("every_minutes",), float, 0.0, none=True)
        validate.number(self, "checkpoints", ("keep_last",), int, 1)
        validate.number(self, "checkpoints", ("verify",), bool)


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, from the oldest."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal())


class Restored(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: Any
    extras: dict[str, Any]


class Checkpoints:
    """Saves and restores the state of one run. A context manager: leaving it waits for the last write.

    Where several processes train, all of them make every call, in the same order, on one shared folder.

    identity: JSON; what must be equal for a run to continue another, such as the model's config. meanings: what to say
    when a field of it differs whose values are digests. settings: all of the run's; those that differ from
    the checkpoint's are printed, and the run continues.
    """

    def __init__(
        self,
        folder: Path,
        config: Checkpointing,
        *,
        identity: dict[str, Any],
        console: Console,
        settings: Mapping[str, Any] | None = None,
        meanings: Mapping[str, str] | None = None,
    ):
        self.folder = Path(folder).absolute()  # Orbax sees nothing under a relative path
        self.config, self.identity, self.console = config, as_read(identity), console
        self.settings, self.meanings = as_read(settings), meanings or {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: concurrent.futures.Future[None] | None = None
        self._step: int | None = None  # of the last save or restore
        self._since = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():
                if left.name.endswith((UNWRITTEN, PROBE)):
                    shutil.rmtree(left)
                elif left.name.endswith(DELETING):
                    self._remove(left)
        _meet("checkpoints: swept")
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except OSError as why:
            if error is None:
                raise
            self._warn(str(why))  # the error that ended the run is the one to raise
        finally:
            self._pool.shutdown()

    def steps(self) -> list[int]:
        """The steps of the checkpoints here, from the oldest."""
        return saved_steps(self.folder)

    # ---- restoring

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is not damaged; None if there are no checkpoints.

        abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, which need not be those that were saved.
        Warns of damaged checkpoints, and falls back to older ones, and of settings that were changed. Raises UserError
        when all are damaged and when the newest belongs to another configuration: a run never starts over silently.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                about, state = self._read(step, abstract_state)
            except Damaged as why:
                damaged[step] = str(why)
                self._warn(f"checkpoint {self.folder / str(step)} is damaged: {why}")
                continue
            self._set_aside(damaged)
            if about.get("settings") and self.settings:
                for line in changed(about["settings"], self.settings):
                    self._warn(line)
            self._step, self._since = step, time.monotonic()
            return Restored(step, state, about["extras"])
        if not damaged:
            return None
        raise UserError(
            f"none of the checkpoints in {self.folder} can be read: "
            + "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            + ". Put back a copy, or start over with another --out or with --no-resume"
        )

    def _read(self, step: int, abstract_state: Any) -> tuple[dict[str, Any], Any]:
        about = _agreed(lambda: self._about(step))
        self._compare(step, about, named(abstract_state))
        state = _agreed(lambda: load(self.folder / str(step), abstract_state))
        if self.config.verify and about["fingerprints"] is not None:
            found = fingerprints(state)
            differ = [name for name, value in found.items() if about["fingerprints"][name] != value]
            if differ:
                more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
                raise Damaged(f"the contents of {differ[0]}{more} are not what was saved")
        return about, state

    def _about(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "about" / "data.json"
        try:
            record = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{path.relative_to(self.folder)} is missing") from None
        except PermissionError:
            raise  # not the checkpoint's fault
        except OSError as why:
            raise Damaged(f"{path.relative_to(self.folder)} cannot be read ({reason(why)})") from None
        except ValueError:
            raise Damaged(f"{path.relative_to(self.folder)} is not JSON") from None
        if not isinstance(record, dict) or record.get("crc32") != _crc32(record.get("about")):
            raise Damaged(f"{path.relative_to(self.folder)} was changed: its checksum is wrong")
        if (version := record["about"].get("version", 1)) not in READ:
            raise UserError(
                f"{self.folder / str(step)} was written by another version of this program: its format is {version}, "
                f"and this one reads {', '.join(map(str, READ))}. Continue the run with that version, or start over "
                "with another --out or with --no-resume"
            )
        if record["about"]["step"] != step:
            raise Damaged(f"it is the checkpoint of step {record['about']['step']}")
        return record["about"]

    def _compare(self, step: int, about: dict[str, Any], wanted: dict[str, Any]) -> None:
        differ = refused(about["identity"], self.identity, self.meanings)
        if not differ:  # a setting that is not part of the identity may have changed the arrays
            differ = refused(about["arrays"], {name: describe(leaf) for name, leaf in wanted.items()}, {})
        if differ:
            shown = "; ".join(differ[:8]) + (f"; and {len(differ) - 8} more" if len(differ) > 8 else "")
            raise UserError(
                f"{self.folder / str(step)} belongs to another configuration (checkpoint -> this run): {shown}. "
                "Give the same configuration to continue it, or another --out or --no-resume to start over"
            )

    def _set_aside(self, damaged: dict[int, str]) -> None:
        # Only now that an older one could be read: until then something else might have been at fault.
        if not damaged:
            return
        for step in damaged if jax.process_index() == 0 else ():
            path = self.folder / f"{step}{DAMAGED}"
            shutil.rmtree(path, ignore_errors=True)
            os.replace(self.folder / str(step), path)
        self._warn(f"moved aside: {', '.join(f'{step}{DAMAGED}' for step in damaged)}; they may be removed")
        _meet("checkpoints: set aside")

    def start_over(self, *along: Path) -> None:
        """For a run with resume=False: moves the folder with the checkpoints of an earlier run aside.

        along: other files of that run; they go into the folder.
        """
        if self.steps() and jax.process_index() == 0:
            names = (self.folder.with_name(f"{self.folder.name}.old{n or ''}") for n in range(10**6))
            free = next(path for path in names if not path.exists())
            os.replace(self.folder, free)
            self.folder.mkdir()
            for path in along:
                if path.exists():
                    os.replace(path, free / path.name)
            self.console.print(f"the earlier run's checkpoints are now in {free}", markup=False, soft_wrap=True)
        _meet("checkpoints: started over")

    # ---- saving

    def due(self, step: int) -> bool:
        """Whether to save now that `step` steps are done; the same on every host."""
        self._raise_if_failed()
        if step == self._step:
            return False
        if self.config.every_steps is not None and step % self.config.every_steps == 0:
            return True
        if self.config.every_minutes is None or (jax.process_count() > 1 and step % CLOCK_STEPS):
            return False
        late = time.monotonic() - self._since >= 60 * self.config.every_minutes
        if jax.process_count() > 1:
            late = bool(multihost_utils.broadcast_one_to_all(np.array(late)))
        return late

    def export_due(self, step: int) -> bool:
        """Whether the weights after `step` steps are also wanted as a Hugging Face folder."""
        return self.config.export_every is not None and step % self.config.export_every == 0

    def save(self, step: int, state: Any, extras: dict[str, Any] | None = None) -> None:
        """Starts saving; returns when the state was copied from the devices, whose buffers may then be donated.

        Waits for an earlier save first. A step that was just saved or restored is not saved again. If writing fails,
        the next call raises OSError.
        """
        self.wait()
        if step == self._step:
            return
        if (existing := self.steps()) and existing[-1] >= step:
            raise UserError(
                f"{self.folder} holds a checkpoint of step {existing[-1]}, made by another run; this one is at step "
                f"{step}. Move that folder away or choose another --out"
            )
        about = {
            "version": VERSION,
            "step": step,
            "identity": self.identity,
            "settings": self.settings,
            "extras": as_read(extras or {}),
            "arrays": {name: describe(leaf) for name, leaf in named(state).items()},
            "fingerprints": fingerprints(state) if self.config.verify else None,
        }
        record = {"about": about, "crc32": _crc32(about)}
        try:
            self._probe(step)
            response = start_saving(self.folder / str(step), state, record)
        except OSError as why:
            raise self._failure(step, why) from why
        self._step, self._since = step, time.monotonic()
        self._writing = self._pool.submit(self._complete, step, response)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises OSError if the last save failed."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError:
            self._step = None  # so that the step can be saved again
            raise

    def _raise_if_failed(self) -> None:
        if self._writing is not None and self._writing.done():
            self.wait()

    def _complete(self, step: int, response: Any) -> None:
        """In the background: waits until the checkpoint is complete, then removes those that are not to be kept."""
        try:
            response.result()
        except Exception as why:  # tensorstore raises ValueError, and Orbax more, for what the system refused
            raise self._failure(step, why) from why
        if jax.process_index() == 0:
            self._prune()

    def _probe(self, step: int) -> None:
        """Raises OSError if no folder can be made: Orbax would report it in another thread, and wait at the exit."""
        problem = None
        if jax.process_index() == 0:
            probe = self.folder / f"{step}{PROBE}"
            try:
                probe.mkdir()
                probe.rmdir()
            except OSError as why:
                problem = why
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(problem is not None)):
            problem = problem or OSError("the first process cannot make a folder there")
        if problem is not None:
            raise problem

    def _failure(self, step: int, why: Exception) -> OSError:
        try:  # before the room is made that was missing
            room = f"{shutil.disk_usage(self.folder).free / 1e9:.2f} GB were free there. "
        except OSError:  # the folder itself is gone
            room = ""
        if jax.process_index() == 0:  # on a full disk the next attempt needs the room
            shutil.rmtree(self.folder / f"{step}{UNWRITTEN}", ignore_errors=True)
        earlier = ", ".join(map(str, self.steps()))
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {reason(why)}. {room}"
            + (f"Intact: step {earlier}; the same command " if earlier else "There is no other one")
            + ("(without --no-resume) continues from there" if earlier else "")
        )

    def _prune(self) -> None:
        steps, every = self.steps(), self.config.keep_every
        for step in steps[: -self.config.keep_last]:
            if every is None or step % every:
                self._remove(self.folder / str(step))

    def _remove(self, path: Path) -> None:
        """Removes a checkpoint that is not needed. A failure does not end the run: the others are complete."""
        leaving = path.with_name(path.name.removesuffix(DELETING) + DELETING)
        try:
            os.replace(path, leaving)  # a kill half-way must not leave a checkpoint with holes
            shutil.rmtree(leaving)
        except OSError as why:
            self._warn(f"{path} is no longer needed and cannot be removed: {reason(why)}. It takes up room; remove it")

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def _crc32(about: Any) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _agreed(read: Callable[[], Any]) -> Any:
    """read(), unless it raises Damaged on any host: then on all, so that all fall back to the same checkpoint."""
    if jax.process_count() == 1:
        return read()
    value, problem = None, None
    try:
        value = read()
    except Damaged as why:
        problem = why
    if multihost_utils.process_allgather(np.array(problem is not None)).any():
        raise problem or Damaged("another host cannot read it")
    return value
