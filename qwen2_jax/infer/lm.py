# SPDX-License-Identifier: Apache-2.0
"""A model with its tokenizer and generation defaults: what `qwen2_jax.load` returns.

Prompts are tokenized and answers detokenized at this level; the engine below (programs.py) works on token ids.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax import checkpoint, ops, validate
from qwen2_jax.config.model_config import DTYPES, ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.detokenize import Generation, IncrementalDetokenizer, advance, not_finite
from qwen2_jax.infer.engine import memory
from qwen2_jax.infer.engine.buckets import context_limit
from qwen2_jax.infer.engine.decode_batch import STEPS
from qwen2_jax.infer.engine.generation_config import FILE, StoredParams
from qwen2_jax.infer.engine.programs import CheckedRequest, Generator, Progress, Request
from qwen2_jax.infer.engine.sampling_params import NOT_FINITE, SamplingKwargs
from qwen2_jax.infer.prompts import (
    Conversation,
    Messages,
    Prompt,
    Tools,
    is_messages,
    listed,
    one_seed_each,
    token_ids,
)
from qwen2_jax.infer.stream import Stream
from qwen2_jax.model import decoder, head_padding
from qwen2_jax.model.decoder import check_head
from qwen2_jax.model.kv_cache import CACHE_DTYPES
from qwen2_jax.model.rope import MODES, LongContext
from qwen2_jax.parallel import sharding
from qwen2_jax.tokenizer import IM_END, Tokenizer
from qwen2_jax.weights.forms import FORMS, array_dtype
from qwen2_jax.weights.params import Tree
from qwen2_jax.weights.weight import stored_forms


class LM:
    """A language model ready to generate, or a reward model ready to score.

    config: ModelConfig. tokenizer: Tokenizer, or None where the checkpoint has none: token ids then still work.
    generation_config: the checkpoint's generation_config.json. generator: the layer below, for token ids.
    Calls raise UserError for errors that the caller can fix.
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
        cache_dtype: str | None = None,
    ):
        """params: nested dict of arrays of dtype `dtype` (model.init, model.split or checkpoint.load_params makes one);
        on a mesh that does not divide the heads it is emptied, see head_padding.py.

        source: the checkpoint whose tokenizer and other small files `save` copies. max_rows: most prompts in one batch.
        implementation: of the kernels, see ops. cache_dtype: of keys and values, see load.
        """
        if long_context not in MODES:
            raise UserError(f"long_context={long_context!r}; choose one of {', '.join(map(repr, MODES))}")
        self.config, self.tokenizer, self.long_context = config, tokenizer, long_context
        self.generation_config = dict(generation_config or {})
        where = FILE if source is None else str(source.path / FILE)
        self.stored_params = StoredParams.read(self.generation_config, where)
        if ineffective := self.stored_params.ineffective:
            warnings.warn(f"{where} has settings without effect here: {', '.join(ineffective)}", stacklevel=2)
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
            dtype=jnp.dtype(cache_dtype or dtype),
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
        ends = self.stored_params.ends(self.config.eos_ids)
        return turn_end is None or turn_end in (*ends, self.tokenizer.eos_id)

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
        rows = [self._ids(row) for row in listed(ids, "logprobs")]
        found: list[np.ndarray] = []
        for start in range(0, len(rows), self.max_rows):
            found += self.generator.logprobs(rows[start : start + self.max_rows], self.long_context)
        return np.stack(found) if len({len(row) for row in rows}) == 1 else found

    @overload
    def score(self, conversations: Messages) -> float: ...

    @overload
    def score(self, conversations: Sequence[Conversation]) -> np.ndarray: ...

    def score(self, conversations: Messages | Sequence[Conversation]) -> float | np.ndarray:
        """A reward model's score of a conversation, a float, or of each of several, float32 [n]: higher is better.

        conversations: messages that end in an assistant's, a list of such, or rows of token ids. Any length, in bounded
        memory. The score is that of the last token: for messages, of the text that the chat template writes, in which
        Qwen2's has a newline after <|im_end|>. Compare scores of answers to one prompt; their zero has no meaning.
        """
        check_head(self.config, scores=True)
        single = is_messages(conversations)
        rows = [self._scored_ids(one) for one in ([conversations] if single else listed(conversations, "score"))]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # a batch takes as long as its longest row
        scores = np.zeros(len(rows), np.float32)
        for start in range(0, len(order), self.max_rows):
            batch = order[start : start + self.max_rows]
            scores[batch] = self.generator.scores([rows[i] for i in batch], self.long_context)
        return float(scores[0]) if single else scores

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        **sampling: Unpack[SamplingKwargs],
    ) -> list[Generation]:
        """Continues each prompt: text, or token ids.

        max_new_tokens: at most so many tokens per answer; fewer where the context limit is reached.
        temperature: 0 takes the most likely token; above 0 the answer is sampled.
        top_p, top_k, min_p: sample from the most likely tokens only, as in transformers (1, 0 and 0: off).
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely (1: off).
        seed: one for every prompt (equal prompts get equal answers), or a list with one per prompt. The random numbers
        depend on it alone; logits may differ in their last bits with what else is in the list (docs/inference.md).
        stop: a text or a list of texts; the answer ends before the first that appears.
        ignore_eos: do not end at an end-of-sequence token.

        Parameters not given (None) come from the checkpoint's generation_config.json as in transformers, else:
        max_new_tokens=64, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=0, stop=(),
        ignore_eos=False. Generation.logprobs do not depend on any of these: they are the model's own.
        """
        prompts = listed(prompts, "generate")
        seeds = one_seed_each(sampling.pop("seed", None), prompts)
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sampling}
        answers = self.run([self.request(p, seed=seed, **given) for p, seed in zip(prompts, seeds, strict=True)])
        broken = [number for number, answer in enumerate(answers, start=1) if answer.finish_reason == NOT_FINITE]
        if len(broken) == len(answers):
            raise UserError(not_finite(answers[0]))
        if broken:
            numbers = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
            warnings.warn(f"prompt {numbers} of {len(answers)}: {not_finite(answers[broken[0] - 1])}", stacklevel=2)
        return answers

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int | None = None,
        *,
        tools: Tools | None = None,
        **sampling: Unpack[SamplingKwargs],
    ) -> Generation:
        """The assistant's next message in a conversation: [{"role": "user", "content": "..."}, ...].

        tools: what the model may call, for the chat template (Tokenizer.render_chat); its calls are in the text.
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, ignore_eos: see `generate`.
        """
        given = {"max_new_tokens": max_new_tokens, **sampling}
        answer = self.run([self._request(messages, True, given, tools)])[0]
        if answer.finish_reason == NOT_FINITE:
            raise UserError(not_finite(answer))
        return answer

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        tools: Tools | None = None,
        **sampling: Unpack[SamplingKwargs],
    ) -> Stream:
        """Like `generate` for one prompt (text, token ids or chat messages), yielding the text piece by piece.

        The pieces add up to the text that `generate` returns. Nothing is computed before the first piece is asked for.
        tools: with messages only, as in `chat`.
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, ignore_eos: see `generate`.
        """
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sampling}
        request = self.request(prompt, tools, **given)
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

    def request(self, prompt: Prompt, tools: Tools | None = None, **given: Any) -> CheckedRequest:
        """A prompt with its sampling parameters (None: not given), complete and checked, for `run`.

        tools: with messages only, as in `chat`.
        """
        chat = is_messages(prompt)
        if tools is not None and not chat:
            raise UserError("tools belong to a conversation: give messages")
        return self._request(prompt, chat, given, tools)

    def run(self, requests: Sequence[CheckedRequest], progress: Progress | None = None) -> list[Generation]:
        """Answers requests, longest prompts first, in batches of at most max_rows; results in the order given."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        results: dict[int, Generation] = {}
        for start in range(0, len(order), self.max_rows):
            numbers = order[start : start + self.max_rows]
            batch = self.generator.start([requests[i] for i in numbers], self.long_context, progress)
            answers = [IncrementalDetokenizer(self.tokenizer, requests[i].sampling_params) for i in numbers]
            while True:
                advance(batch, answers, STEPS)
                if all(answer.reason for answer in answers):
                    break
            results |= {i: answer.generation() for i, answer in zip(numbers, answers, strict=True)}
        return [results[i] for i in range(len(requests))]

    def _request(self, prompt: Any, chat: bool, given: Mapping[str, Any], tools: Tools | None = None) -> CheckedRequest:
        check_head(self.config, scores=False)
        # <|im_end|> ends a message of a chat even where the checkpoint does not list it.
        turn_end = self.tokenizer.token_id(IM_END) if chat and self.tokenizer else None
        params = self.stored_params.resolve(given, self.config.eos_ids, turn_end)
        if params.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer, and this checkpoint has none")
        ids = self._needed_tokenizer("messages").chat_ids(prompt, tools=tools) if chat else self._ids(prompt)
        return self.generator.check(Request(tuple(ids), params), self.long_context)

    def _scored_ids(self, conversation: Any) -> list[int]:
        """The token ids of a conversation for `score`."""
        if isinstance(conversation, str | Mapping):
            raise UserError(
                "score needs conversations, each a list of messages or of token ids; given "
                f"{validate.short(conversation)}"
            )
        if not is_messages(conversation):
            return self._ids(conversation)
        ids = self._needed_tokenizer("messages").chat_ids(conversation, add_generation_prompt=False)
        if (role := conversation[-1]["role"]) != "assistant":
            raise UserError(f"a conversation to score ends in an answer; the last role is {role!r}")
        return ids

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._needed_tokenizer("text")
            if not prompt:
                raise UserError("the prompt is empty; give at least one character")
            return tokenizer.encode(prompt)
        return token_ids(prompt)

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"this checkpoint has no tokenizer; give token ids instead of {what}")
        return self.tokenizer


def load(
    name: str | Path | checkpoint.Source,
    dtype: str = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    long_context: LongContext = "auto",
    *,
    cache_dtype: str | None = None,
    implementation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LM:
    """Loads a checkpoint: a preset's name, a Hub id, a local Hugging Face or Orbax folder, gs://..., or "demo".

    dtype: of the weights and the cache in memory, "bfloat16" or "float32" (or "float16"). "int8" and "int4" round the
    weight matrices as they are loaded and keep everything else in bfloat16; "int4" keeps a quantised file as it is
    stored, with as many bits as it has. mesh: devices to spread the weights over
    (sharding.make_mesh). long_context: "auto" | "off" | "yarn" | "dca", see rope.choose.
    cache_dtype: of keys and values, by default that of the activations; "int8" rounds them, with a scale per token and
    head, to half the memory of bfloat16.
    implementation: of the kernels, None for the best that serves, "xla", or by operation: "attention=cudnn,decode=xla".
    progress: called with (bytes loaded, bytes in all).
    Raises UserError when the checkpoint is unknown or damaged, or does not fit the devices (before reading it).
    """
    if dtype not in (*DTYPES, *FORMS):
        raise UserError(f"dtype={dtype!r}; choose one of {', '.join(map(repr, (*DTYPES, *FORMS)))}")
    if long_context not in MODES:
        raise UserError(f"long_context={long_context!r}; choose one of {', '.join(map(repr, MODES))}")
    if cache_dtype not in (None, *CACHE_DTYPES):
        raise UserError(f"cache_dtype={cache_dtype!r}; choose one of {', '.join(map(repr, CACHE_DTYPES))}, or None")
    ops.check_implementation(implementation)
    source = checkpoint.locate(name)
    return load_source(
        source,
        checkpoint.read_config(source),
        dtype=dtype,
        mesh=mesh,
        long_context=long_context,
        cache_dtype=cache_dtype,
        implementation=implementation,
        progress=progress,
    )


def load_source(
    source: checkpoint.Source,
    config: ModelConfig,
    *,
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    long_context: LongContext,
    cache_dtype: str | None,
    implementation: str | None,
    progress: Callable[[int, int], None] | None,
) -> LM:
    """`load` for a checkpoint that has been located and whose config.json has been read."""
    devices = None if mesh is None else list(mesh.devices.flat)
    length = min(4096, context_limit(config, long_context))
    memory.check_load(config, rows=1, length=length, dtype=dtype, cache_dtype=cache_dtype, devices=devices)
    # One array per layer: a scan would copy each layer's weights out of a stack at every token (docs/decisions.md).
    params = checkpoint.load_params(
        source,
        config,
        dtype=dtype,
        unroll=True,
        mesh=mesh,
        rules=sharding.SERVING,
        progress=progress,
    )
    return LM(
        config,
        params,
        tokenizer=_tokenizer(source),
        generation_config=source.read_json("generation_config.json"),
        dtype=array_dtype(dtype),
        unroll=True,
        mesh=mesh,
        long_context=long_context,
        source=source,
        implementation=implementation,
        cache_dtype=cache_dtype,
    )


def _tokenizer(source: checkpoint.Source) -> Tokenizer | None:
    try:
        with source.folder_of_small_files() as folder:  # the tokenizers library reads local files only
            return Tokenizer.from_folder(folder)
    except FileNotFoundError:
        return None
