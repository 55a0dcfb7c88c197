# SPDX-License-Identifier: Apache-2.0
"""The sampling parameters of a request: their names, types, limits, defaults and flags, in one place and without jax.

A value comes from the caller, else from the checkpoint's generation_config.json, else from the defaults here. The
caller is a keyword of LM.generate, chat or stream, a line of an --input file, or a flag of infer.py, in this order.
"""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypedDict

from qwen2_jax.errors import UserError

MAX_EOS_IDS = 8  # the device compares each new token with a fixed number of ids
# What transformers uses for a checkpoint that says do_sample and leaves these out.
_TRANSFORMERS = {"temperature": 1.0, "top_k": 50}


class SamplingKwargs(TypedDict, total=False):
    """What LM.generate, chat and stream take as keywords, beside max_new_tokens. None: not given. See SamplingParams.

    seed: a sequence, one seed per prompt, is for LM.generate only.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None


def _setting(default: Any, allowed: str, valid: Callable[[Any], bool], help: str, metavar: str | None = None) -> Any:
    """A field that a caller may set. help, metavar: of its flag in infer.py."""
    return dataclasses.field(
        default=default, metadata={"allowed": allowed, "valid": valid, "help": help, "metavar": metavar}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one request, complete and valid.

    max_new_tokens: at least 1. temperature: 0 is greedy. top_p in (0, 1], top_k (0 is off), min_p in [0, 1],
    repetition_penalty above 0 (over prompt and answer): as transformers defines them. seed: 0 to 2^32 - 1; the same
    seed gives the same tokens whatever else is in the batch. stop: texts that end the answer and are not part of it.
    ignore_eos: do not end at an end-of-sequence token. eos_ids: tokens that end the answer and are its last token;
    at most MAX_EOS_IDS, and from the checkpoint only.

    Raises UserError that names the parameter, its value and what is allowed.
    """

    max_new_tokens: int = _setting(64, "at least 1", lambda x: x >= 1, "maximum number of tokens in an answer", "N")
    temperature: float = _setting(
        0.0,
        "0 (greedy) or above",
        lambda x: x >= 0,
        "0: always the most likely token; 1: the model's probabilities",
        "X",
    )
    top_p: float = _setting(
        1.0,
        "above 0 and at most 1",
        lambda x: 0 < x <= 1,
        "sample from the most likely tokens whose probabilities add up to P",
        "P",
    )
    top_k: int = _setting(0, "0 (off) or above", lambda x: x >= 0, "sample from the N most likely tokens (0: all)", "N")
    min_p: float = _setting(
        0.0,
        "from 0 (off) to 1",
        lambda x: 0 <= x <= 1,
        "sample from tokens that are at least P times as likely as the most likely one",
        "P",
    )
    repetition_penalty: float = _setting(
        1.0,
        "above 0 (1 is off)",
        lambda x: x > 0,
        "above 1: tokens of the prompt and the answer become less likely",
        "X",
    )
    seed: int = _setting(
        0, "from 0 to 4294967295", lambda x: 0 <= x < 2**32, "the same seed gives the same answer (default: 0)", "N"
    )
    stop: tuple[str, ...] = _setting(
        (),
        "a text or a list of texts, none of them empty",
        lambda texts: all(isinstance(text, str) and text for text in texts),
        "end the answer before this text; may be repeated",
        "TEXT",
    )
    ignore_eos: bool = _setting(False, "true or false", lambda x: True, "do not end at an end-of-sequence token")
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in SETTABLE:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        if len(self.eos_ids) > MAX_EOS_IDS:
            raise UserError(f"{len(self.eos_ids)} end-of-sequence ids; at most {MAX_EOS_IDS} are supported")

    @classmethod
    def resolve(
        cls,
        given: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        eos_ids: Sequence[int] = (),
        turn_end: int | None = None,
    ) -> Self:
        """The parameters of a request; what was not given (absent or None) is filled in as in transformers.

        generation_config: the checkpoint's file. Where its do_sample is false or absent, a request without a
        temperature is greedy. eos_ids: of config.json, used where generation_config names none. turn_end: one more
        id that ends the answer, of a chat template.
        """
        if unknown := given.keys() - SETTABLE.keys():
            raise UserError(f"unknown setting {', '.join(sorted(unknown))}; choose from {', '.join(SETTABLE)}")
        samples = bool(generation_config.get("do_sample"))
        stored = {name: generation_config.get(name) for name in _STORED}
        if samples:
            stored |= {name: value for name, value in _TRANSFORMERS.items() if stored[name] is None}
        else:
            del stored["temperature"]
        values = {name: value for source in (stored, given) for name, value in source.items() if value is not None}
        ends = stored_eos_ids(generation_config, eos_ids)
        if turn_end is not None and turn_end not in ends:
            ends = (*ends, turn_end)
        return cls(**values, eos_ids=ends)


_STORED = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SETTABLE = {field.name: field for field in dataclasses.fields(SamplingParams) if field.metadata}  # all but eos_ids


def checked(name: str, value: Any) -> Any:
    """The value of a parameter, converted to its type where that loses nothing: numpy's scalars, 1 for 1.0.

    Raises UserError that names the parameter, the value and what is allowed.
    """
    field = SETTABLE[name]
    kind: Any = type(field.default)
    converted = value
    if kind is tuple:
        if isinstance(value, str):
            converted = (value,)
        elif isinstance(value, Sequence):
            converted = tuple(value)
    elif kind is not bool and isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError, ValueError):  # infinite, not a number, or beyond the largest float
            converted = kind(value) if kind(value) == value else value
    finite = not isinstance(converted, float) or math.isfinite(converted)
    if type(converted) is kind and finite and field.metadata["valid"](converted):
        return converted
    raise UserError(f"{name}={value!r}; it must be {field.metadata['allowed']}")


def stored_eos_ids(generation_config: Mapping[str, Any], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The end-of-sequence ids of generation_config.json, or where it names none those of config.json, `eos_ids`."""
    stored = generation_config.get("eos_token_id")
    if stored is None:
        return tuple(eos_ids)
    return (stored,) if isinstance(stored, int) else tuple(stored)
