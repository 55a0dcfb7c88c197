# SPDX-License-Identifier: Apache-2.0
"""Reads the sampling parameters of a checkpoint's generation_config.json, as transformers defines them; checked once.

A key is obeyed, refused with an error, or named as one that has no effect here. Keys: transformers'
GenerationConfig (docs: main_classes/text_generation).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from qwen2_jax import validate
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine.sampling_params import (
    MAX_EOS_IDS,
    MAX_INT,
    NO_CONSTRAINTS,
    SETTABLE,
    Constraints,
    SamplingParams,
    checked,
)

FILE = "generation_config.json"
_SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# The defaults of transformers for a checkpoint with do_sample and without these.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50}
_COUNTS = ("min_new_tokens", "min_length", "max_length", "no_repeat_ngram_size")
_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_READ = {*_SETTINGS, *_COUNTS, *_IDS, "do_sample", "bad_words_ids"}
# Keys that change no answer: bookkeeping, how transformers runs the model, what it returns, and settings of beams alone
# (num_beams is named where it is above 1).
_HARMLESS = frozenset(
    """
    pad_token_id bos_token_id decoder_start_token_id transformers_version early_stopping length_penalty low_memory
    use_cache cache_implementation cache_config return_legacy_cache prefill_chunk_size return_dict_in_generate
    output_attentions output_hidden_states output_scores output_logits renormalize_logits remove_invalid_values
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size compile_config
    disable_compile trust_remote_code
    """.split()  # noqa: SIM905
)
# The settings of keys without support here that switch them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "diversity_penalty": (0,),
    "penalty_alpha": (0,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,), "token_healing": (False,),
    "sequence_bias": ({}, []), "stop_strings": ([],), "force_words_ids": ([],), "generation_kwargs": ({},),
}  # fmt: skip
_MAX_BAD_WORDS, _MAX_BAD_WORD = 20_000, 64  # each is compared with the end of the text at every token


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """The sampling parameters of a generation_config.json, valid.

    settings: values of SamplingParams' fields. eos_ids: None where the file names none. ineffective: the keys, with
    their values as text, that change an answer in transformers (or are unknown there too) and have no effect here.
    """

    settings: Mapping[str, Any]
    eos_ids: tuple[int, ...] | None
    constraints: Constraints
    ineffective: tuple[str, ...]

    @classmethod
    def read(cls, generation_config: Mapping[str, Any], where: str = FILE) -> Self:
        """Raises UserError that names the file (`where`), the key, its value and what is allowed."""
        try:
            return cls._read({key: value for key, value in generation_config.items() if value is not None})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        samples = data.get("do_sample", False)
        if not isinstance(samples, bool):
            raise UserError(f"do_sample={validate.short(samples)}; it must be true or false")
        # Without do_sample transformers is greedy whatever the temperature.
        settings = {
            key: checked(key, data[key]) for key in _SETTINGS if key in data and (samples or key != "temperature")
        }
        if samples:
            settings = _SAMPLING_DEFAULTS | settings
        counts = {key: _count(key, data[key]) for key in _COUNTS if key in data}
        ids = {key: _ids(key, data[key]) for key in _IDS if key in data}
        forced = ids.get("forced_eos_token_id") or ()
        if len(forced) > MAX_EOS_IDS:
            raise UserError(f"forced_eos_token_id has {len(forced)} ids; at most {MAX_EOS_IDS} are supported")
        ends = ids.get("eos_token_id")
        constraints = Constraints(
            **counts,
            suppress_tokens=ids.get("suppress_tokens") or (),
            begin_suppress_tokens=ids.get("begin_suppress_tokens") or (),
            bad_words=_bad_words(data.get("bad_words_ids", []), ends or ()),
            forced_eos_ids=forced,
        )
        if both := set(forced) & set(constraints.suppress_tokens):
            raise UserError(f"forced_eos_token_id and suppress_tokens both name {min(both)}; leave it out of one")
        unread = {key: value for key, value in data.items() if key not in _READ | _HARMLESS and key[:1] != "_"}
        ineffective = [
            f"{validate.short(key)[1:-1]} = {validate.short(value)}"
            for key, value in sorted(unread.items())
            if not any(value == off for off in _OFF.get(key, ()))
        ]
        return cls(settings, ends, constraints, tuple(ineffective))

    @property
    def limits_length(self) -> bool:
        """Whether the file says how long an answer may be."""
        return "max_new_tokens" in self.settings or self.constraints.max_length > 0

    def ends(self, eos_ids: Sequence[int | None]) -> tuple[int, ...]:
        """The end-of-sequence ids, or where the file names none those of config.json, `eos_ids`."""
        if self.eos_ids is not None:
            return self.eos_ids
        return tuple(id for id in eos_ids if id is not None and id >= 0)

    def resolve(
        self, given: Mapping[str, Any], eos_ids: Sequence[int | None] = (), turn_end: int | None = None
    ) -> SamplingParams:
        """The parameters of a request; what was not given (absent or None) is filled in as in transformers.

        Where the file's do_sample is false or absent, a request without a temperature is greedy. max_new_tokens, given
        or of the file, overrides its max_length. eos_ids: of config.json. turn_end: one more id that ends the answer,
        of a chat template. Raises UserError that names the parameter.
        """
        if unknown := given.keys() - SETTABLE.keys():
            raise UserError(f"unknown setting {', '.join(sorted(unknown))}; choose from {', '.join(SETTABLE)}")
        values = {**self.settings, **{name: value for name, value in given.items() if value is not None}}
        constraints = self.constraints
        if "max_new_tokens" in values and constraints.max_length:
            constraints = dataclasses.replace(constraints, max_length=0)
        elif constraints.max_length:
            values["max_new_tokens"] = constraints.max_length  # less the prompt's, once it is known
        ends = self.ends(eos_ids)
        if turn_end is not None and turn_end not in ends:
            ends = (*ends, turn_end)
        return SamplingParams(**values, eos_ids=ends, constraints=constraints)


NOTHING_STORED = StoredParams({}, None, NO_CONSTRAINTS, ())


def _count(key: str, value: Any) -> int:
    least = 1 if key == "max_length" else 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value or value != value // 1:
        raise UserError(f"{key}={validate.short(value)}; it must be a whole number, {least} or above")
    return int(min(value, MAX_INT))


def _ids(key: str, value: Any) -> tuple[int, ...] | None:
    """Token ids: one or a list. None and negative numbers, which some files have for none, are left out.

    Returns None where nothing but nulls is given.
    """
    listed = [id for id in (value if isinstance(value, list | tuple) else [value]) if id is not None]
    if not all(type(id) is int and id <= MAX_INT for id in listed):
        raise UserError(f"{key}={validate.short(value)}; it must be a token id, a whole number, or a list of them")
    return tuple(dict.fromkeys(id for id in listed if id >= 0)) if listed else None


def _bad_words(value: Any, ends: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids. One that is an end-of-sequence id is left out, as in transformers."""
    fits = isinstance(value, list | tuple) and all(
        isinstance(word, list | tuple) and word and all(type(id) is int and 0 <= id <= MAX_INT for id in word)
        for word in value
    )
    if not fits:
        raise UserError(f"bad_words_ids={validate.short(value)}; it must be a list of lists of token ids, none empty")
    words = dict.fromkeys(tuple(word) for word in value if len(word) > 1 or word[0] not in ends)
    longest = max(map(len, words), default=0)
    if len(words) > _MAX_BAD_WORDS or longest > _MAX_BAD_WORD:
        raise UserError(
            f"bad_words_ids has {len(words)} sequences, the longest of {longest} ids; at most {_MAX_BAD_WORDS} "
            f"of {_MAX_BAD_WORD} are supported"
        )
    return tuple(words)
