# SPDX-License-Identifier: Apache-2.0
"""Answers a file of prompts with several processes: each writes its share to a file of its own; process 0 joins them.

    answers.jsonl.part-0-of-2, answers.jsonl.part-1-of-2   while they work, next to the output, on a disk they share
    answers.jsonl                                          in the input's order, when all are done

An interrupted run resumes from the answers in any of these files, with any number of processes.
"""

import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli.batch import Lines, check_paths, read_answers
from qwen2_jax.parallel import hosts

LONG = 30 * 24 * 3600.0  # seconds to wait for the other processes, which end earlier if one of them is lost


class Share(Lines):
    """The lines that this process answers: every N-th line without an answer, N = number of processes.

    All processes make theirs at the same time, which is a barrier.

    Raises UserError or OSError as Lines does.
    """

    def __init__(self, source: Path, output: Path, group: hosts.Group):
        check_paths(source, output)
        self.joint, self.group = output, group
        output.with_name(self._part(group.process, group.processes)).touch()
        super().__init__(source, output.with_name(self._part(group.process, group.processes)))
        for path in self._files():
            self._read(path)
        for _ in super().todo():  # raises where an answer is to another line
            pass
        hosts.barrier("every process knows what is answered")

    def todo(self) -> Iterator[tuple[int, bytes]]:
        """As in Lines, of this process's share."""
        return itertools.islice(super().todo(), self.group.process, None, self.group.processes)

    def join(self, code: int) -> int:
        """Waits for all shares, which process 0 joins to one file. Returns the largest exit code of all shares.

        Raises UserError where process 0 does not see them.
        """
        self.group.at("waiting for the others' answers")
        hosts.barrier("all shares are answered", seconds=LONG)
        if self.group.first:
            self.group.at("joining the answers")
            wanted = [self._part(i, self.group.processes) for i in range(self.group.processes)]
            if absent := [name for name in wanted if not self.joint.with_name(name).exists()]:
                raise UserError(
                    f"process 0 does not see {', '.join(absent[:4])} beside {self.joint}: --output must lie on a disk "
                    "that all hosts share"
                )
            self._write_joint()
        others = hosts.differences("the answers are joined", {"exit code": str(code)})
        return max([code, *(int(value) for found in others for value, _ in found.values)])

    def _write_joint(self) -> None:
        files = self._files()
        answers: dict[int, tuple[Path, int, int]] = {}  # input line -> file, first byte, bytes
        for path in files:
            for first, size, number, _ in read_answers(path):
                answers.setdefault(number, (path, first, size))
        unfinished = self.joint.with_name(f"{self.joint.name}.unfinished")
        with unfinished.open("wb") as joint:
            for number in sorted(answers):
                path, first, size = answers[number]
                with path.open("rb") as file:
                    file.seek(first)
                    joint.write(file.read(size))
            joint.flush()
            os.fsync(joint.fileno())
        os.replace(unfinished, self.joint)
        for path in files:
            if path != self.joint:
                path.unlink()

    def _files(self) -> list[Path]:
        """The files with answers, of this and of earlier runs."""
        parts = sorted(self.joint.parent.glob(f"{glob.escape(self.joint.name)}.part-*-of-*"))
        return [self.joint, *parts] if self.joint.exists() else parts

    def _part(self, process: int, processes: int) -> str:
        return f"{self.joint.name}.part-{process}-of-{processes}"
