# SPDX-License-Identifier: Apache-2.0
"""What one request asks for: how many tokens, how they are drawn, where to stop. Checked here, without jax."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from qwen2_jax.errors import UserError

DEFAULT_NEW_TOKENS = 64
# What transformers uses for a checkpoint that says do_sample and leaves these out.
_TRANSFORMERS = {"temperature": 1.0, "top_k": 50}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one request, complete and valid.

    max_new_tokens: at least 1. temperature: 0 is greedy. top_p in (0, 1], top_k (0 is off), min_p in [0, 1],
    repetition_penalty above 0 (over prompt and answer): as transformers defines them. seed: 0 to 2^32 - 1; the same
    seed gives the same tokens whatever else is in the batch. stop: texts that end the answer and are not part of it.
    eos_ids: tokens that end the answer and are its last token. ignore_eos: go on past them.

    Raises UserError that names the setting, its value and what is allowed.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise UserError(f"stop={stop!r}; give a text or a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        self._check("max_new_tokens", int, "at least 1", lambda x: x >= 1)
        self._check("temperature", float, "0 (greedy) or above", lambda x: x >= 0)
        self._check("top_p", float, "above 0 and at most 1", lambda x: 0 < x <= 1)
        self._check("top_k", int, "0 (off) or above", lambda x: x >= 0)
        self._check("min_p", float, "from 0 (off) to 1", lambda x: 0 <= x <= 1)
        self._check("repetition_penalty", float, "above 0 (1 is off)", lambda x: x > 0)
        self._check("seed", int, "from 0 to 4294967295", lambda x: 0 <= x < 2**32)
        self._check("ignore_eos", bool, "true or false", lambda x: True)

    def _check(self, name: str, kind: type, allowed: str, holds) -> None:
        value: Any = getattr(self, name)
        if (
            kind is not bool
            and isinstance(value, numbers.Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ):
            if kind(value) == value:  # numpy's scalars, and 1 for 1.0
                value = kind(value)
                object.__setattr__(self, name, value)
        if type(value) is not kind or not math.isfinite(cast(float, value)) or not holds(value):
            raise UserError(f"{name}={value!r}; it must be {allowed}")

    @classmethod
    def resolve(cls, given: Mapping[str, Any], checkpoint: Mapping[str, Any], eos_ids: Sequence[int] = ()) -> Self:
        """Fills what was not given (absent or None) from a checkpoint's generation_config.json, as transformers does.

        do_sample false or absent means greedy, unless a temperature was given. eos_ids: those of config.json, used
        where generation_config.json names none.
        """
        unknown = given.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            known = ", ".join(field.name for field in dataclasses.fields(cls) if field.name != "eos_ids")
            raise UserError(f"unknown setting {', '.join(sorted(unknown))}; choose from {known}")
        values = {name: value for name, value in given.items() if value is not None}
        samples = bool(checkpoint.get("do_sample"))
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            stored = checkpoint.get(name)
            if stored is None and samples:
                stored = _TRANSFORMERS.get(name)
            if stored is not None and (name != "temperature" or samples):
                values.setdefault(name, stored)
        stored_eos = checkpoint.get("eos_token_id")
        if stored_eos is not None:
            eos_ids = [stored_eos] if isinstance(stored_eos, int) else stored_eos
        values.setdefault("eos_ids", tuple(eos_ids))
        return cls(**values)
