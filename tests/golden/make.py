# SPDX-License-Identifier: Apache-2.0
"""Record what transformers computes for tiny random models of every variant; the tests read the recordings offline.

Run it only when a variant is added or changed. torch is needed here and nowhere else in the project, so it has an
environment of its own (Python 3.11; any CPU build of torch will do):

    python3.11 -m venv torchenv
    torchenv/bin/pip install "torch==2.13.*" "transformers==5.23.*"
    torchenv/bin/python tests/golden/make.py             # writes tests/golden/<variant>/
    torchenv/bin/python tests/golden/make.py --check     # makes everything again and compares; writes nothing
    torchenv/bin/python tests/golden/make.py --only moe yarn

Each folder is what `save_pretrained` writes (config.json, generation_config.json, safetensors) and a golden.npz. The
weights are rounded to the dtype of the file first and the model is loaded back from the folder before anything is
recorded, so file and numbers belong together. Everything is float32, eager attention, unless it says otherwise.

golden.npz, always:
    tokens [2, 40]; logits [2, 40, 160]; loss: mean cross-entropy of tokens[:, 1:] in nats
    prompts [3, 17], prompt_lengths [3]: right padded with -1; generated [3, 24]: greedy, the batch left padded as
        transformers wants it, and equal to every prompt alone (asserted here); generated_logprobs [3, 24]
    penalized [3, 24]: greedy with repetition_penalty 1.1, every prompt alone (padding would be penalised too)
MoE also: aux_transformers: as the installed transformers has it; aux_float32: from the definition, in float64;
    aux_double_softmax: what it is when the router's probabilities are taken for logits, an error that several versions
    of transformers had; loss_with_aux: loss + router_aux_loss_coef * aux as transformers trains; aux_row_0:
    aux_float32 over the first row only (the second row masked).
bf16: logits_bf16: the same weights run in bfloat16. large_logits: logits_float64: the same model in float64.

Tokens are drawn again until no greedy choice and no choice of experts is nearly a tie: a different order of summation
must not be able to change one.
"""

import argparse
import contextlib
import json
import shutil
import tempfile
import types
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.qwen2 import modeling_qwen2

HERE = Path(__file__).parent
V, ROWS, LENGTH, NEW = 160, 2, 40, 24
PROMPT_LENGTHS = (9, 17, 12)
PENALTY = 1.1
GREEDY_MARGIN = 5e-3  # between the best and the second logit
EXPERT_MARGIN = 1e-4  # between the last chosen and the first rejected probability

DENSE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 0,
}  # fmt: skip
SPARSE = DENSE | {
    "tie_word_embeddings": False, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24, "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
}  # fmt: skip


def yarn(**options):
    """theta is small so that 8 frequencies fall on both sides of the ramp; the recorded 40 tokens exceed 32."""
    kept = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": kept | options}


LONG = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}  # 16 numbers per head
WINDOW = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 7}

# name -> config. OPTIONS: file: dtype of the file, else bfloat16; old_names: config.json in the spelling of the Hub
# (rope_theta, rope_scaling); shards: several files and an index; scale_qk: factor on wq, wk and their biases.
VARIANTS = {
    "dense_tied": DENSE,
    "dense_untied": DENSE
    | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_hidden_layers": 3}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "heads_14_2": DENSE | {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2},
    "heads_28_4": DENSE | {"hidden_size": 112, "num_attention_heads": 28, "num_key_value_heads": 4},
    "mqa": DENSE | {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "mha": DENSE | {"num_key_value_heads": 4},
    "head_dim": DENSE | {"head_dim": 12},
    "sliding": DENSE | WINDOW | {"max_window_layers": 2},
    "rope_linear": DENSE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn": DENSE | LONG | yarn(),
    "yarn_attention_factor": DENSE | LONG | yarn(attention_factor=0.8, beta_fast=2.0, beta_slow=0.05, truncate=False),
    "yarn_mscale": DENSE | LONG | yarn(mscale=1.3, mscale_all_dim=0.4),
    "bf16": DENSE | {"hidden_size": 64, "num_hidden_layers": 3},
    "large_logits": DENSE | {"hidden_size": 64},
    "moe": SPARSE | {"num_hidden_layers": 3},
    "moe_norm_topk": SPARSE | {"norm_topk_prob": True, "num_experts": 5, "num_experts_per_tok": 3},
    "moe_step_2": SPARSE | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "moe_mlp_only": SPARSE | {"num_hidden_layers": 4, "mlp_only_layers": [2]},
    "moe_sliding": SPARSE | WINDOW | {"max_window_layers": 3},
    "moe_no_bias": SPARSE | {"qkv_bias": False},
    "moe_yarn": SPARSE | LONG | WINDOW | {"sliding_window": 20, "decoder_sparse_step": 2} | yarn(),
}
OPTIONS = {
    "dense_tied": {"old_names": True},
    "dense_untied": {"file": "float32", "shards": "50KB"},
    "heads_14_2": {"file": "float16", "old_names": True},
    "yarn": {"old_names": True},
    "yarn_mscale": {"old_names": True},
    "large_logits": {"scale_qk": 12.0},
    "moe": {"old_names": True},
    "moe_step_2": {"shards": "60KB"},
}


def is_moe(fields):
    return "num_experts" in fields


def fill(model, name, scale_qk):
    """Random weights that leave nothing at a neutral value: biases are not 0, norm weights not 1, logits not flat."""
    for path, p in sorted(model.named_parameters()):
        g = torch.Generator().manual_seed(zlib.crc32(f"{name}/{path}".encode()))
        x = torch.randn(p.shape, generator=g, dtype=torch.float32)
        if path.endswith("norm.weight"):
            x = 1.0 + 0.3 * x
        elif path.endswith("bias"):
            x = 0.4 * x
        elif "embed_tokens" in path or "lm_head" in path:
            x = x * 0.5 * (32 / p.shape[-1]) ** 0.5
        else:
            x = x * 0.4 * (32 / p.shape[-1]) ** 0.5
        if "q_proj" in path or "k_proj" in path:
            x = x * 0.5 * scale_qk  # attention that is sharp, but does not amplify the rounding of its inputs
        with torch.no_grad():
            p.copy_(x)


def hub_spelling(config):
    """config.json of transformers 5 in the words of the files on the Hub: rope_theta, rope_scaling, torch_dtype."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else dict(type=kind, **rope)
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types")
    return config


def write_model(folder, name, fields, options):
    kind = "Qwen2Moe" if is_moe(fields) else "Qwen2"
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    fill(model, name, options.get("scale_qk", 1.0))
    model.to(getattr(torch, options.get("file", "bfloat16"))).save_pretrained(
        folder, max_shard_size=options.get("shards", "1GB")
    )
    if options.get("old_names"):
        path = folder / "config.json"
        path.write_text(json.dumps(hub_spelling(json.loads(path.read_text())), indent=2) + "\n")


def read_model(folder, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.config._experts_implementation = "eager"  # the plain loop over experts
    assert model.dtype == dtype
    return model.eval()


def top_margin(x, k):
    """Smallest distance between the k-th and the (k+1)-th largest of the last axis."""
    s = torch.sort(x.float(), dim=-1, descending=True).values
    return (s[..., k - 1] - s[..., k]).min().item()


def greedy(model, prompts, **options):
    """Greedy tokens of a left-padded batch: (tokens [n, NEW], log-probabilities of them, smallest margin)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
        output_logits=True, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    tokens = out.sequences[:, width:]
    logprobs = torch.log_softmax(torch.stack(out.logits, 1).float(), -1)
    chosen = torch.gather(logprobs, -1, tokens[..., None])[..., 0]
    return tokens.numpy(), chosen.numpy(), top_margin(torch.stack(out.scores, 1), 1)


def generations(model, prompts):
    together, logprobs, margin = greedy(model, prompts)
    alone = np.concatenate([greedy(model, [p])[0] for p in prompts])
    penalized = [greedy(model, [p], repetition_penalty=PENALTY) for p in prompts]
    if (together != alone).any():
        margin = 0.0
    return {
        "generated": together.astype(np.int32),
        "generated_logprobs": logprobs,
        "penalized": np.concatenate([p[0] for p in penalized]).astype(np.int32),
    }, min(margin, *(p[2] for p in penalized))


def load_balancing(router_logits, k, mask=None, twice=False):
    """E * sum_e f_e P_e over all sparse layers at once, from the definition, in float64.

    f_e counts how often expert e is among the k chosen, per token (sums to k); P_e is its mean probability.
    """
    x = torch.cat([r if mask is None else r[mask] for r in router_logits]).double()
    p = torch.softmax(x, -1)
    chosen = torch.topk(p, k, dim=-1).indices
    f = torch.nn.functional.one_hot(chosen, p.shape[-1]).sum(1).double().mean(0)
    p = torch.softmax(p, -1) if twice else p
    return (p.shape[-1] * (f * p.mean(0)).sum()).item()


def router_record(model, ids, loss):
    k, coefficient = model.config.num_experts_per_tok, model.config.router_aux_loss_coef
    out = model(ids, labels=ids, output_router_logits=True)
    first_row = torch.arange(ROWS * LENGTH) < LENGTH
    record = {
        "aux_transformers": out.aux_loss.item(),
        "aux_float32": load_balancing(out.router_logits, k),
        "aux_double_softmax": load_balancing(out.router_logits, k, twice=True),
        "aux_row_0": load_balancing(out.router_logits, k, mask=first_row),
        "loss_with_aux": out.loss.item(),
    }
    assert abs(record["loss_with_aux"] - loss - coefficient * record["aux_transformers"]) < 1e-5
    margin = min(top_margin(torch.softmax(r.float(), -1), k) for r in out.router_logits)
    return {name: np.float64(x) for name, x in record.items()}, margin


class Float64(types.ModuleType):
    """torch, with float64 under the name float32: transformers' own casts to float32 become casts to float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def float64_arithmetic():
    def angles(self, x, position_ids):
        width = self.inv_freq.shape[0]
        inv_freq = self.config.rope_parameters["rope_theta"] ** (-torch.arange(width, dtype=torch.float64) / width)
        angle = position_ids[..., None].double() * torch.cat([inv_freq, inv_freq])
        return angle.cos(), angle.sin()

    rotary = modeling_qwen2.Qwen2RotaryEmbedding
    kept, modeling_qwen2.torch, rotary.forward = rotary.forward, Float64("torch64"), angles
    try:
        yield
    finally:
        modeling_qwen2.torch, rotary.forward = torch, kept


def record(folder, name, fields):
    """Everything in golden.npz, as numpy arrays, from the folder alone."""
    model = read_model(folder, torch.float32)
    for attempt in range(200):
        rng = np.random.default_rng([zlib.crc32(name.encode()), attempt])
        tokens = rng.integers(1, V, size=(ROWS, LENGTH), dtype=np.int32)
        prompts = [rng.integers(1, V, size=n).tolist() for n in PROMPT_LENGTHS]
        ids = torch.from_numpy(tokens).long()
        out = model(ids, labels=ids)
        router, expert_margin = router_record(model, ids, out.loss.item()) if is_moe(fields) else ({}, 1.0)
        if expert_margin < EXPERT_MARGIN:
            continue
        generated, greedy_margin = generations(model, prompts)
        if greedy_margin >= GREEDY_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no tokens without a near tie in 200 draws")
    padded = np.full((len(prompts), max(PROMPT_LENGTHS)), -1, np.int32)
    for row, p in zip(padded, prompts, strict=True):
        row[: len(p)] = p
    golden = {"tokens": tokens, "logits": out.logits.numpy(), "loss": np.float64(out.loss.item()), "prompts": padded}
    golden |= {"prompt_lengths": np.array(PROMPT_LENGTHS, np.int32)} | generated | router
    if name == "bf16":
        golden["logits_bf16"] = read_model(folder, torch.bfloat16)(ids).logits.float().numpy()
    if name == "large_logits":
        with float64_arithmetic():
            golden["logits_float64"] = read_model(folder, torch.float64)(ids).logits.numpy()
    spread = golden["logits"].std()
    print(f"{name:24} draw {attempt:3}  logits std {spread:.2f} max {np.abs(golden['logits']).max():.1f}", end="  ")
    print(f"loss {golden['loss']:.3f}  margins {greedy_margin:.1e} {expert_margin:.1e}")
    return golden


def compare(made, kept, golden):
    """Differences between a fresh folder and the recorded one, as sentences."""
    names = {p.name for p in made.iterdir()}
    if names | {"golden.npz"} != {p.name for p in kept.iterdir()}:
        yield f"files differ: {sorted(p.name for p in kept.iterdir())}"
    yield from (f"{n} differs" for n in sorted(names) if (made / n).read_bytes() != (kept / n).read_bytes())
    with np.load(kept / "golden.npz") as old:
        if set(old) != set(golden):
            yield f"arrays differ: {sorted(set(old) ^ set(golden))}"
        for key in sorted(set(old) & set(golden)):
            a, b = old[key], np.asarray(golden[key])
            if a.dtype.kind == "i":  # tokens are exact; another CPU may round sums differently
                if (a != b).any():
                    yield f"{key} differs"
            elif np.abs(a - b).max() > (0.5 if key == "logits_bf16" else 5e-5):
                yield f"{key} differs by {np.abs(a - b).max():.1e}"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the recordings instead of writing them")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    faults = []
    for name in args.only:
        fields = VARIANTS[name]
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary)
            write_model(made, name, fields, OPTIONS.get(name, {}))
            golden = record(made, name, fields)
            if args.check:
                faults += [f"{name}: {fault}" for fault in compare(made, HERE / name, golden)]
                continue
            np.savez_compressed(made / "golden.npz", **golden)
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(made, HERE / name)
            (HERE / name).chmod(0o755)  # the temporary folder was private
            for path in (HERE / name).iterdir():
                path.chmod(0o644)
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
