# SPDX-License-Identifier: Apache-2.0
"""Record the scores that transformers gives with tiny random reward models; tests/model/test_reward.py reads them.

    torchenv/bin/python tests/golden/make_scores.py             # writes tests/golden/score_<head>/
    torchenv/bin/python tests/golden/make_scores.py --check     # makes them again and compares; writes nothing

In the environment that make.py describes, whose weights and folders these are. score_linear is transformers'
Qwen2ForSequenceClassification with one label. score_two_layers is a mixture of experts with the head of Qwen's own
reward models, Linear, ReLU, Linear, which transformers lacks and which stands here. golden.npz:
    tokens [3, 17], lengths [3]: right padded with -1
    scores [3]: at the last token of each, all three in one batch, padded on the right with `pad_token_id`
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make import DENSE, HERE, PROMPT_LENGTHS, SPARSE, V, compare, fill

PAD = V - 1
ONE = {"num_labels": 1, "pad_token_id": PAD}


class Qwen2MoeForRewardModel(transformers.Qwen2MoeForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        D = config.hidden_size
        self.score = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, 1))


MODELS = {
    "score_linear": (transformers.Qwen2ForSequenceClassification, transformers.Qwen2Config, DENSE | ONE),
    "score_two_layers": (Qwen2MoeForRewardModel, transformers.Qwen2MoeConfig, SPARSE | ONE),
}


def write_model(folder, name):
    kind, config, fields = MODELS[name]
    model = kind(config(**fields))
    fill(model, name, 1.0)
    model.to(torch.bfloat16).save_pretrained(folder)


def record(folder, name):
    model = MODELS[name][0].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(len(name))
    tokens = np.full((len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), -1, np.int32)
    for row, n in zip(tokens, PROMPT_LENGTHS, strict=True):
        row[:n] = rng.integers(1, PAD, n)
    ids, mask = torch.from_numpy(np.where(tokens < 0, PAD, tokens)).long(), torch.from_numpy(tokens >= 0).long()
    scores = model(ids, attention_mask=mask).logits[:, 0].numpy()
    print(f"{name}: {scores}")
    return {"tokens": tokens, "lengths": np.array(PROMPT_LENGTHS, np.int32), "scores": scores}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the recordings instead of writing them")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    faults = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary)
            write_model(made, name)
            golden = record(made, name)
            if args.check:
                faults += [f"{name}: {fault}" for fault in compare(made, HERE / name, golden)]
                continue
            np.savez_compressed(made / "golden.npz", **golden)
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(made, HERE / name, copy_function=shutil.copyfile)
            (HERE / name).chmod(0o755)  # the temporary folder was private
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
