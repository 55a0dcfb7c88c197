# SPDX-License-Identifier: Apache-2.0
"""Trains what a configuration file describes: `python train.py configs/sft.py [--any.field value]`."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from qwen2_jax.errors import UserError
from qwen2_jax.parallel import hosts

USAGE = f"""usage: python train.py CONFIG.py [--any.field value]

  python train.py configs/finetune.py --data.sources chats.jsonl        # as the file says, on your own chats
  python train.py configs/finetune.py --optim.lr 1e-4 --epochs 5 --out runs/mine
  python train.py configs/dpo.py --data.sources pairs.jsonl             # from pairs of answers
  python train.py configs/grpo.py --data.sources prompts.jsonl --rewards rewards.py:mine    # from a reward function
  python train.py configs/finetune.py --dry-run                         # what would be done, and the first batch
  python train.py configs/pretrain_7b.py --plan v5e-64                  # does it fit, and how fast would it be: the
      step is compiled for a target machine, without the data; also v5p-256, 8xh100, 2x8xh200, ...
      --json: for programs; --search: which mesh, remat and accumulate are fastest among those that fit
  python train.py configs/finetune.py --help                            # every field with its value

{hosts.FLAGS}

The same command continues a run that was interrupted."""
GOES_ON = "The same command on all hosts continues from the last checkpoint"


def _plan(flags: list[str]) -> tuple[str | None, dict[str, bool], list[str]]:
    """(machine to plan for or None, options of the plan, flags for the configuration)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan")
    found, flags = parser.parse_known_args(flags)
    if found.plan is None:
        return None, {}, flags
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--search", action="store_true")
    how, flags = parser.parse_known_args(flags)
    return found.plan, {"as_json": how.json, "search": how.search}, flags


def _hosts(flags: list[str]) -> tuple[hosts.Flags, list[str]]:
    """(the flags for several hosts, the other flags)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    hosts.add_flags(parser)
    found, flags = parser.parse_known_args(flags)
    return hosts.flags_of(found), flags


def _what_continues(run: object) -> str:
    """After a Ctrl-C: what the same command does next. run: the configuration, or None before it was read."""
    from qwen2_jax.train.config import Run
    from qwen2_jax.train.state.checkpoints import saved_steps

    saved = saved_steps(run.out / "checkpoints") if isinstance(run, Run) else []
    if not saved:
        return "no checkpoint was written yet, so the same command starts from the beginning"
    again = "the same command" if run.resume else "the same command without --no-resume"
    return f"{again} continues after step {saved[-1]}, the last one that was saved"


def main(arguments: list[str]) -> int:
    """Runs or plans one configuration.

    0 = done, stopped by SIGTERM and saved, or a plan that fits; 1 = a plan does not fit; 2 = the user must change
    something. hosts.LOST: another process is gone, and the same command on all hosts continues.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        print(f"error: the first argument must be a config file, not {arguments[0]}\n{USAGE}", file=sys.stderr)
        return 2
    machine, how, flags = _plan(arguments[1:])
    if machine is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported: a plan needs no accelerator and takes none
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    launch, flags = _hosts(flags)
    run = None
    try:
        alone = machine is not None or not {"-h", "--help"}.isdisjoint(flags)
        with hosts.joined(None if alone else hosts.find(launch), goes_on=GOES_ON) as group:
            from qwen2_jax.train import config_file

            run = config_file.load(Path(arguments[0]), flags)
            if machine is not None:
                from qwen2_jax.plan import command

                return command.train(run, machine, Path(arguments[0]), **how)
            hosts.check(group, {"config": arguments[0], **dataclasses.asdict(run)})
            hosts.check_devices(group)
            from qwen2_jax.train import recipes  # imports for seconds: mistakes in a configuration are reported before

            recipes.run(run, group=group)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {_what_continues(run)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    hosts.leave(main(sys.argv[1:]))
