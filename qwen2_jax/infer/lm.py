# SPDX-License-Identifier: Apache-2.0
"""A model with its tokenizer and generation defaults: what `qwen2_jax.load` returns.

Text enters and leaves here. Everything below (programs.py) works on token ids.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax import checkpoint, ops
from qwen2_jax.config.model_config import DTYPES, ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.detokenize import Answer, Generation, advance
from qwen2_jax.infer.engine import memory
from qwen2_jax.infer.engine.buckets import context_limit
from qwen2_jax.infer.engine.programs import STEPS, Generator, Progress, Request
from qwen2_jax.infer.engine.sampling_params import Settings
from qwen2_jax.infer.stream import Stream
from qwen2_jax.model import decoder, head_padding
from qwen2_jax.model.decoder import check_head
from qwen2_jax.model.rope import MODES, LongContext
from qwen2_jax.parallel import sharding
from qwen2_jax.tokenizer import IM_END, Tokenizer
from qwen2_jax.weights.int8 import quantize
from qwen2_jax.weights.params import Tree
from qwen2_jax.weights.weight import stored_forms

Messages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | Messages
Talk = Sequence[int] | Messages  # what a reward model scores
INT8 = "int8"  # besides the dtypes of arrays


class LM:
    """A language model ready to generate, or a reward model ready to score.

    config: ModelConfig. tokenizer: Tokenizer, or None where the checkpoint has none: token ids then still work.
    generation_config: the checkpoint's defaults for settings. generator: the layer below, for token ids.
    Calls raise UserError for anything the caller can mend.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        *,
        tokenizer: Tokenizer | None = None,
        generation_config: Mapping[str, Any] | None = None,
        dtype="bfloat16",
        unroll: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        long_context: LongContext = "auto",
        source: checkpoint.Source | None = None,
        max_rows: int | None = None,
        implementation: str | None = None,
    ):
        """params: nested dict of arrays of dtype `dtype` (model.init, model.split or checkpoint.load_params makes one);
        on a mesh that does not divide the heads it is emptied, see head_padding.py.

        source: the checkpoint whose tokenizer and other small files travel along in `save`. max_rows: most prompts in
        one batch. implementation: of the kernels, see ops.
        """
        if long_context not in MODES:
            raise UserError(f"long_context={long_context!r}; choose one of {', '.join(map(repr, MODES))}")
        self.config, self.tokenizer, self.long_context = config, tokenizer, long_context
        self.generation_config = dict(generation_config or {})
        self.source = source
        self.max_rows = max_rows or (8 if jax.default_backend() == "cpu" else 64)
        self._specs = decoder.declare(config, unroll=unroll)[1]
        self._heads = head_padding.spread(config, mesh)
        served = config
        if self._heads is not None and mesh is not None:
            served, params = self._heads.config, head_padding.place(params, self._specs, self._heads, mesh)
        self.generator = Generator(
            decoder.declare(served, dtype=jnp.dtype(dtype), unroll=unroll)[0],
            params,
            served,
            vocab_size=tokenizer.vocab_size if tokenizer else None,
            dtype=jnp.dtype(dtype),
            unroll=unroll,
            mesh=mesh,
            implementation=implementation,
        )

    @property
    def params(self) -> Tree:
        """The model's parameters: those that the generator holds, or a copy where it holds repeated heads."""
        served, wider = self.generator.params, self._heads
        return served if wider is None else jax.jit(lambda params: wider.narrow(params, self._specs))(served)

    @property
    def is_chat(self) -> bool:
        """Whether the checkpoint was tuned for chat: it has a template and ends its answers as the template does.

        Base checkpoints have a template too, but end at <|endoftext|>.
        """
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            return False
        turn_end = self.tokenizer.token_id(IM_END)
        ends = (*Settings.resolve({}, self.generation_config, self.config.eos_ids).eos_ids, self.tokenizer.eos_id)
        return turn_end is None or turn_end in ends

    def logits(self, ids) -> np.ndarray:
        """Next-token logits at every position, float32 [B, T, V], of int [B, T]. For small inputs: V is 152k."""
        check_head(self.config, scores=False)
        try:
            array = np.asarray(ids)
        except ValueError as error:  # ragged
            raise UserError("logits needs rows of equal length; call it once per length, or use logprobs") from error
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"logits needs integers of shape [B, T]; given shape {array.shape} of {array.dtype}")
        return self.generator.logits(array, self.long_context)

    def logprobs(self, ids) -> np.ndarray | list[np.ndarray]:
        """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [B, T-1]; any length, in bounded memory.

        ids: int [B, T], or a list of rows of different lengths, which gives a list of arrays [len - 1].
        """
        check_head(self.config, scores=False)
        rows = [self._ids(row) for row in _listed(ids, "logprobs")]
        found: list[np.ndarray] = []
        for start in range(0, len(rows), self.max_rows):
            found += self.generator.logprobs(rows[start : start + self.max_rows], self.long_context)
        return np.stack(found) if len({len(row) for row in rows}) == 1 else found

    @overload
    def score(self, talks: Messages) -> float: ...

    @overload
    def score(self, talks: Sequence[Talk]) -> np.ndarray: ...

    def score(self, talks: Messages | Sequence[Talk]) -> float | np.ndarray:
        """What a reward model thinks of a conversation, a float, or of each of several, float32 [n]: higher is better.

        talks: messages that end in an assistant's, a list of such, or rows of token ids. Any length, bounded memory.
        The score is that of the last token, for messages of the text that the chat template writes: in Qwen2's the
        newline behind <|im_end|>. Scores of answers to one prompt compare; their zero has no meaning.
        """
        check_head(self.config, scores=True)
        alone = _is_messages(talks)
        rows = [self._talk(talk) for talk in ([talks] if alone else _listed(talks, "score"))]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # a batch takes as long as its longest row
        scores = np.zeros(len(rows), np.float32)
        for start in range(0, len(order), self.max_rows):
            batch = order[start : start + self.max_rows]
            scores[batch] = self.generator.scores([rows[i] for i in batch], self.long_context)
        return float(scores[0]) if alone else scores

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Continues each prompt: text, or token ids.

        What is None comes from the checkpoint's generation_config.json as in transformers, else: 64 new tokens,
        temperature 0 (greedy), top_p 1, top_k 0 (off), min_p 0, repetition_penalty 1, seed 0. A temperature above 0
        samples. seed: one for every prompt (equal prompts get equal answers), or one per prompt; the same seed gives
        the same tokens whatever else is in the list. stop: the text ends before the first of these that appears.
        ignore_eos: do not end at an end-of-sequence token.
        A row ends at the context limit too. Generation.logprobs are of the model itself, before any of the settings.
        """
        given = _given(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, ignore_eos)
        prompts = _listed(prompts, "generate")
        return self.run([self.request(p, seed=s, **given) for p, s in zip(prompts, _seeds(seed, prompts), strict=True)])

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """The assistant's next message in a conversation: [{"role": "user", "content": "..."}, ...]. See `generate`."""
        given = _given(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, ignore_eos)
        if self.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer, so it cannot chat; call generate with token ids")
        self.tokenizer.render_chat(messages)  # its error for messages that are none
        return self.run([self.request(messages, seed=seed, **given)])[0]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Stream:
        """Like `generate` for one prompt (text, token ids or chat messages), yielding the text as it comes.

        The pieces add up to the text that `generate` returns. Nothing is computed before the first piece is asked for.
        """
        given = _given(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, ignore_eos)
        request = self.request(prompt, seed=seed, **given)
        return Stream(self.generator, self.tokenizer, request, long_context=self.long_context)

    def save(self, path: str | Path, format: str = "hf") -> None:
        """Writes a folder that `load` reads: "hf" (config.json, safetensors, tokenizer files) or "orbax"."""
        writers = {"hf": checkpoint.save_hf, "orbax": checkpoint.save_orbax}
        if format not in writers:
            raise UserError(f"format={format!r}; choose 'hf' or 'orbax'")
        if forms := stored_forms(self.params):
            raise UserError(
                f"weights loaded as {forms[0]} are rounded and cannot be saved; "
                "load with dtype='bfloat16' and save that"
            )
        writers[format](Path(path), self.config, self.params, tokenizer_files_from=self.source)

    def request(self, prompt: Prompt, **given: Any) -> Request:
        """A prompt and the settings given for it (None: not given), complete and checked."""
        check_head(self.config, scores=False)
        settings = Settings.resolve(given, self.generation_config, self.config.eos_ids)
        if settings.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer, and this checkpoint has none")
        if _is_messages(prompt):
            if self.tokenizer is None:
                raise UserError("this checkpoint has no tokenizer; give token ids instead of messages")
            ids = self.tokenizer.chat_ids(prompt)  # type: ignore[arg-type]  # a Mapping first means all are
            turn_end = self.tokenizer.token_id(IM_END)  # ends a turn even where the checkpoint does not list it
            if turn_end is not None and turn_end not in settings.eos_ids:
                settings = dataclasses.replace(settings, eos_ids=(*settings.eos_ids, turn_end))
        else:
            ids = self._ids(prompt)
        request = Request(tuple(ids), settings)
        self.generator.check(request, self.long_context)
        return request

    def run(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Generation]:
        """Answers requests, longest prompts first, in batches of at most max_rows; results in the order given."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        results: dict[int, Generation] = {}
        for start in range(0, len(order), self.max_rows):
            batch = order[start : start + self.max_rows]
            decoding = self.generator.start([requests[i] for i in batch], self.long_context, progress)
            answers = [Answer(self.tokenizer, request.settings) for request in decoding.requests]
            while True:
                advance(decoding, answers, STEPS)
                if all(answer.reason for answer in answers):
                    break
            results |= {i: answer.generation() for i, answer in zip(batch, answers, strict=True)}
        return [results[i] for i in range(len(requests))]

    def _talk(self, talk: Any) -> list[int]:
        """The token ids of a conversation to score."""
        if isinstance(talk, str | Mapping):
            raise UserError(f"score needs conversations, each a list of messages or of token ids; given {_short(talk)}")
        if not _is_messages(talk):
            return self._ids(talk)
        if self.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer; give token ids instead of messages")
        ids = self.tokenizer.chat_ids(talk, add_generation_prompt=False)
        if talk[-1]["role"] != "assistant":
            raise UserError(f"a conversation to score ends in an answer; the last role is {talk[-1]['role']!r}")
        return ids

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("this checkpoint has no tokenizer; give token ids instead of text")
            if not prompt:
                raise UserError("the prompt is empty; give at least one character")
            return self.tokenizer.encode(prompt)
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"a prompt must be text or a list of token ids, not empty; given {_short(prompt)}")
        return ids.tolist()


def load(
    name: str | Path | checkpoint.Source,
    dtype: str = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    long_context: LongContext = "auto",
    *,
    implementation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LM:
    """Loads a checkpoint: a preset's name, a Hub id, a local Hugging Face or Orbax folder, gs://..., or "demo".

    dtype: of the weights and the cache in memory, "bfloat16" or "float32" (or "float16"); "int8" rounds the weight
    matrices to int8 as they are loaded and keeps everything else in bfloat16. mesh: devices to spread the weights over
    (sharding.make_mesh). long_context: "auto" | "off" | "yarn" | "dca", see rope.choose.
    implementation: of the kernels, None for the best that serves, "xla", or by operation: "attention=cudnn,decode=xla".
    progress: called with (bytes loaded, bytes in all).
    Raises UserError when the checkpoint is unknown or damaged, or does not fit the devices (before reading it).
    """
    if dtype not in (*DTYPES, INT8):
        raise UserError(f"dtype={dtype!r}; choose one of {', '.join(map(repr, (*DTYPES, INT8)))}")
    if long_context not in MODES:
        raise UserError(f"long_context={long_context!r}; choose one of {', '.join(map(repr, MODES))}")
    ops.check_implementation(implementation)
    rounded, dtype = dtype == INT8, "bfloat16" if dtype == INT8 else dtype
    source = checkpoint.locate(name)
    config = checkpoint.read_config(source)
    devices = None if mesh is None else list(mesh.devices.flat)
    length = min(4096, context_limit(config, long_context))
    memory.check_load(config, rows=1, length=length, dtype=dtype, devices=devices)
    # One array per layer: a scan would copy each layer's weights out of a stack at every token (docs/decisions.md).
    params = checkpoint.load_params(
        source, config, dtype=jnp.dtype(dtype), unroll=True, mesh=mesh, rules=sharding.SERVING, progress=progress
    )
    if rounded:
        params = quantize(params, decoder.declare(config, unroll=True)[1])
    return LM(
        config,
        params,
        tokenizer=_tokenizer(source),
        generation_config=source.read_json("generation_config.json"),
        dtype=dtype,
        unroll=True,
        mesh=mesh,
        long_context=long_context,
        source=source,
        implementation=implementation,
    )


def _tokenizer(source: checkpoint.Source) -> Tokenizer | None:
    try:
        if isinstance(source.path, Path):
            return Tokenizer.from_folder(source.path)
        with tempfile.TemporaryDirectory() as folder:  # a bucket: the tokenizers library reads local files only
            for name in source.travellers():
                if "/" not in name:
                    (Path(folder) / name).write_bytes(source.read_bytes(name) or b"")
            return Tokenizer.from_folder(folder)
    except FileNotFoundError:
        return None


def _given(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, ignore_eos) -> dict[str, Any]:
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "ignore_eos": ignore_eos,
    }


def _is_messages(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def _listed(rows: Any, what: str) -> list:
    if isinstance(rows, str | Mapping) or not hasattr(rows, "__len__") or not len(rows):
        raise UserError(f"{what} needs a list, not empty, of prompts; given {_short(rows)}")
    if isinstance(rows[0], int | np.integer):
        raise UserError(
            f"{what} needs a list of prompts; for one prompt of token ids put it in a list: [[{rows[0]}, ...]]"
        )
    return list(rows)


def _seeds(seed: int | Sequence[int] | None, prompts: Sequence) -> list:
    if seed is None or isinstance(seed, int | np.integer):
        return [seed] * len(prompts)
    if len(seed) != len(prompts):
        raise UserError(f"{len(seed)} seeds for {len(prompts)} prompts; give one seed, or one per prompt")
    return [*seed]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
