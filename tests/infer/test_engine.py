# SPDX-License-Identifier: Apache-2.0
"""The engine with real models: its answers are the generator's, and the same whatever else runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from few import slow
from qwen2_jax.infer.engine.engine import Engine
from qwen2_jax.infer.engine.pages import RESERVED
from qwen2_jax.infer.engine.requests import Request
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.infer.engine.step_programs import StepPrograms, StepShapes
from qwen2_jax.model import decoder
from tiny import random_params

from .test_generate import VARIANTS, make, prompt

ROWS = 4
FEW = RESERVED + 6  # pages
ASKED = [  # tokens of the prompt, sampling parameters
    (1, {"max_new_tokens": 20}),
    (40, {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 1}),
    (100, {"max_new_tokens": 10, "temperature": 0.7, "repetition_penalty": 1.2}),
    (129, {"max_new_tokens": 16, "temperature": 1.0, "top_k": 5}),
    (300, {"max_new_tokens": 17}),
    (2, {"max_new_tokens": 50, "temperature": 0.5, "min_p": 0.1}),
]
SAMPLED = [  # by one program; the first two grow by a page
    (110, {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.9, "seed": 1}),
    (111, {"max_new_tokens": 40, "temperature": 0.7, "top_k": 5}),
    (129, {"max_new_tokens": 16, "temperature": 1.0, "min_p": 0.1}),
    (2, {"max_new_tokens": 50, "temperature": 0.5}),
]


def programs_of(generator, **options):
    shapes = StepShapes.of(ROWS, 512)
    options = {"dtype": generator.dtype, "unroll": generator.unroll, "implementation": None, **options}
    return StepPrograms(
        generator.graphdef, generator.config, shapes, vocab_size=generator.vocab_size, shardings=generator.shardings,
        **options,
    )  # fmt: skip


def answers(programs, params, requests, pages=FEW, mode="auto", **options):
    """(tokens, logprobs, finish_reason) of each request, and the engine after them."""
    engine = Engine(programs, params, pages, **options)
    numbers = [engine.add(request, mode) for request in requests]
    found = {number: ([], [], []) for number in numbers}
    for event in engine.run():
        for kept, new in zip(found[event.number], (event.tokens, event.logprobs, [event.finish_reason]), strict=True):
            kept.extend(new)
    assert engine.idle and engine.pages.available == engine.pages.usable == pages - RESERVED
    for _, _, reasons in found.values():
        assert reasons[-1] and not any(reasons[:-1])
    return [(tokens, logprobs, reasons[-1]) for tokens, logprobs, reasons in found.values()], engine


@pytest.mark.parametrize(("name", "given"), [("dense", SAMPLED), *slow(*((name, ASKED) for name in VARIANTS))])
def test_answers_are_the_generators(name, given):
    changes, unroll, mode = VARIANTS[name]
    generator = make(changes, unroll)
    requests = [generator.check(Request(prompt(n), SamplingParams(**options)), mode) for n, options in given]
    got, _ = answers(programs_of(generator), generator.params, requests, mode=mode)
    for one, want in zip(got, generator.run(requests, mode), strict=True):
        assert (one[0], one[2]) == (want[0], want[2])
        # float32 logits of a few units, by other products: their last bits differ
        np.testing.assert_allclose(one[1], want[1], rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def narrow():
    """A model in bfloat16, which is what deployed ones are computed in."""
    generator = make(unroll=True, dtype=jnp.bfloat16)
    generator.params = random_params(generator.config, unroll=True, dtype=jnp.bfloat16)
    generator.graphdef = decoder.declare(generator.config, dtype=jnp.bfloat16, unroll=True)[0]
    return generator, programs_of(generator)


def asked(generator, given=SAMPLED):
    return [generator.check(Request(prompt(n), SamplingParams(**options))) for n, options in given]


@pytest.mark.parametrize("given", [SAMPLED, *slow([*SAMPLED, *ASKED[:3]])], ids=["sampled", "all kinds"])
def test_an_answer_depends_on_nothing_else_that_runs(narrow, given, monkeypatch):
    """All bits: alone, with others, with its prompt found in the cache, and answered anew for lack of pages."""
    generator, programs = narrow
    requests = asked(generator, given)
    alone = [answers(programs, generator.params, [request])[0][0] for request in requests]
    assert answers(programs, generator.params, requests)[0] == alone
    monkeypatch.setattr("qwen2_jax.infer.engine.scheduler.FIRST_TOKENS", 1)
    again, engine = answers(programs, generator.params, [*requests, *requests])
    assert again == alone * 2 and engine.scheduler.found > 0 and engine.scheduler.preemptions > 0
    assert len(programs.programs) == len(set(programs.programs))
    answers(programs, generator.params, requests[::-1])
    before = len(programs.programs)
    answers(programs, generator.params, requests[1:] + requests[:1])
    assert len(programs.programs) == before, "it compiles once for each shape"


def test_what_was_given_up_is_heard_of_no_more(narrow):
    generator, programs = narrow
    engine = Engine(programs, generator.params, FEW)
    first, second = (engine.add(request) for request in asked(generator)[:2])
    alone = answers(programs, generator.params, asked(generator)[1:2])[0][0]
    events = engine.step() + engine.step()
    engine.abort(first)
    events += engine.run()
    assert [event.number for event in events if event.finish_reason] == [second]
    assert [token for event in events if event.number == second for token in event.tokens] == alone[0]
    assert engine.pages.available == engine.pages.usable


def test_numbers_that_are_not_finite_stay_with_their_request(narrow):
    """Its pages go to others, who must not see them."""
    generator, programs = narrow
    wrong = dict(generator.params, embed_VD=generator.params["embed_VD"].at[7].set(jnp.nan))
    good = [request for request in asked(generator) if 7 not in request.tokens]
    bad = generator.check(Request((7, 7, 7), SamplingParams(max_new_tokens=4, temperature=1.0)))
    assert good
    alone = [answers(programs, wrong, [request])[0][0] for request in good]
    got, _ = answers(programs, wrong, [bad, *good, bad, *good])
    assert [one[2] for one in got[:: len(good) + 1]] == ["not_finite"] * 2
    assert [one for one in got if one[2] != "not_finite"] == [one for one in alone if one[2] != "not_finite"] * 2
