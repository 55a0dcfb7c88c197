# SPDX-License-Identifier: Apache-2.0
"""The sampling parameters of a request: their names, types, limits, defaults and flags, in one place and without jax.

A value comes from the caller, else from the checkpoint's generation_config.json (generation_config.py), else from the
defaults here. The caller is a keyword of LM.generate, chat or stream, a line of an --input file, or a flag of infer.py,
in this order.
"""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from qwen2_jax import validate
from qwen2_jax.errors import UserError

MAX_EOS_IDS = 8  # the device compares each new token with a fixed number of ids
MAX_INT = 2**31 - 1  # of the device's integers: token ids, and limits, where a larger one is the same as this
MAX_FLOAT = 3e38  # of the device's float32
NOT_FINITE = "not_finite"  # the finish_reason of a row whose next token has no finite log-probability


class SamplingKwargs(TypedDict, total=False):
    """The keywords of LM.generate, chat and stream, besides max_new_tokens. None: not given. See SamplingParams.

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
class Constraints:
    """Further constraints of a generation_config.json, as transformers defines them; from the checkpoint only.

    min_new_tokens: an answer does not end before it has so many; min_length: the same with the prompt's counted.
    max_length: most tokens of prompt and answer together; 0 is no limit. no_repeat_ngram_size: no so many tokens in a
    row occur twice in prompt and answer; 0 is off. suppress_tokens: ids that are never sampled. begin_suppress_tokens:
    ids that an answer does not begin with. bad_words: sequences of ids that an answer does not complete.
    forced_eos_ids: the last of max_new_tokens tokens is one of these.
    """

    min_new_tokens: int = 0
    min_length: int = 0
    max_length: int = 0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_eos_ids: tuple[int, ...] = ()

    @property
    def on_logits(self) -> bool:
        """Whether sampling has to heed any of them; max_length is part of a checked request's max_new_tokens."""
        return dataclasses.replace(self, max_length=0) != NO_CONSTRAINTS

    @property
    def on_history(self) -> bool:
        """Whether the tokens of the prompt and the answer so far are needed for it."""
        return self.no_repeat_ngram_size > 0 or any(len(word) > 1 for word in self.bad_words)


NO_CONSTRAINTS = Constraints()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one request, complete and valid.

    max_new_tokens: at least 1. temperature: 0 is greedy. top_p in (0, 1], top_k (0 is off), min_p in [0, 1],
    repetition_penalty above 0 (over prompt and answer): as transformers defines them. seed: 0 to 2^32 - 1; the noise of
    the n-th token depends on it and n alone. stop: texts that end the answer and are not part of it.
    ignore_eos: do not end at an end-of-sequence token. eos_ids: tokens that end the answer and are its last token;
    at most MAX_EOS_IDS. eos_ids and constraints come from the checkpoint only.

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
        "from 0.000001 to 1000000 (1 is off)",
        lambda x: 1e-6 <= x <= 1e6,
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
    constraints: Constraints = NO_CONSTRAINTS

    def __post_init__(self):
        for name in SETTABLE:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        object.__setattr__(self, "eos_ids", tuple(dict.fromkeys(self.eos_ids)))
        if len(self.eos_ids) > MAX_EOS_IDS:
            raise UserError(f"{len(self.eos_ids)} end-of-sequence ids; at most {MAX_EOS_IDS} are supported")


# The fields that callers may set: all but eos_ids and constraints.
SETTABLE = {field.name: field for field in dataclasses.fields(SamplingParams) if field.metadata}


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
    finite = not isinstance(converted, float) or (math.isfinite(converted) and abs(converted) <= MAX_FLOAT)
    if type(converted) is kind and finite and field.metadata["valid"](converted):
        return converted
    raise UserError(f"{name}={validate.short(value)}; it must be {field.metadata['allowed']}")


def finish_reason(params: SamplingParams, tokens: Sequence[int]) -> str:
    """Why a row of a checked request ended by itself.

    "stop": at an end-of-sequence id. "length": at max_new_tokens. NOT_FINITE: nothing else ends a row before that.
    """
    if bool(tokens) and not params.ignore_eos and tokens[-1] in params.eos_ids:
        return "stop"
    return "length" if len(tokens) >= params.max_new_tokens else NOT_FINITE
