# SPDX-License-Identifier: Apache-2.0
"""Run configurations of the stages after fine-tuning: reward models, DPO, and learning from sampled answers.

(Qwen2 report, arXiv:2407.10671, sec. 4.3; docs/post-training.md.)
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from qwen2_jax import validate
from qwen2_jax.data.spec import Data, PromptData
from qwen2_jax.errors import UserError
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train.config import MAX_ROWS, Mesh, Optim, Run
from qwen2_jax.train.objectives.dpo import Preference
from qwen2_jax.train.objectives.grpo import Policy
from qwen2_jax.train.online.episodes import MOST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Run):
    """A reward model from a chat model, by the Bradley-Terry loss over all pairs of ranked responses.

    Six responses to a prompt and one epoch are the Qwen2.5-Math report's (arXiv:2409.12122, eq. 1).
    """

    stage = "qwen2_jax.train.stages.reward:RewardStage"
    data: Data
    head: Literal["two_layers", "linear"] = (
        "two_layers"  # the score head on the last hidden state; Qwen's has two layers
    )
    margin: float = 0.0  # by which a better response should be ahead
    centring: float = 0.0  # coefficient of the squared sum of a pair's rewards, which keeps them around 0; usual: 0.01
    length: int = 8192  # tokens of a row, which holds all responses to a prompt, each with the prompt
    optim: Optim = Optim(lr=1e-5, schedule="cosine", warmup=100, decay=0.1)
    epochs: float | None = 1
    out: Path = Path("runs/reward")

    def __post_init__(self):
        _steps_replace_epochs(self)
        super().__post_init__()
        validate.choice("head", self.head, ("two_layers", "linear"))
        validate.number(self, "config", ("margin", "centring"), float, 0.0)
        _starts_from_a_checkpoint(self, "a reward model")
        if self.lora is not None:
            raise UserError("lora adapts existing layers, and a reward model's head is new: train it without lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Run):
    """Direct preference optimization on pairs. Numbers of the defaults: the Online Merging paper's script
    (arXiv:2405.17931), as the Qwen2 report gives none."""

    stage = "qwen2_jax.train.stages.dpo:DpoStage"
    data: Data
    preference: Preference = Preference()
    # cached: computed once for every row before the first step, and kept in the run's folder. live: at every step, from
    # weights that stay on the devices, for data that is gone through less than once.
    reference: Literal["cached", "live"] = "cached"
    length: int = 4096  # tokens of a row, which holds both responses of a pair, each with the prompt
    optim: Optim = Optim(lr=5e-7, schedule="cosine", warmup=100, decay=0.0, b2=0.999)
    epochs: float | None = 2
    out: Path = Path("runs/dpo")

    def __post_init__(self):
        _steps_replace_epochs(self)
        super().__post_init__()
        validate.choice("reference", self.reference, ("cached", "live"))
        _starts_from_a_checkpoint(self, "DPO")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an episode's answers are sampled. There is no top-p and the like: they would sample from another distribution
    than the one whose probabilities are trained."""

    samples: int = 8  # answers to a prompt
    max_new_tokens: int = 1024
    temperature: float = 1.0  # log-probabilities are of the logits divided by this, in sampling and in training
    rows: int = 64  # answers that are sampled at the same time; when one ends, the next prompt takes its row
    # Another mesh of the same devices: sampling reads all weights for every token, and fsdp would gather them each
    # time. An episode then begins with a copy of the weights. None: the mesh of training.
    mesh: Mesh | None = None

    def __post_init__(self):
        validate.number(self, "sampling", ("samples",), int, 2, most=MAX_ROWS)
        validate.number(self, "sampling", ("max_new_tokens", "rows"), int, 1, most=MAX_ROWS)
        validate.number(self, "sampling", ("temperature",), float, 0.0)
        if not self.temperature:
            raise UserError("sampling.temperature is 0, which draws the same answer every time; usual: 0.7 to 1.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A reward model that scores sampled answers."""

    checkpoint: str  # name, Hub id or folder: what a run of Reward made, or a Qwen2 reward model from the Hub
    weight: float = 1.0  # of its score in the sum with the reward functions
    # Below a verifier's verdict instead of beside it: sigmoid(score / 2) + (functions' sum - 1), as in Qwen2-Math. The
    # functions then give 1 for a right answer and 0 for a wrong one.
    shaped: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self):
        validate.number(self, "reward_model", ("weight",), float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online(Run):
    """The common fields of stages that sample their own answers. Use OnlineDpo or Grpo.

    An episode: `prompts` prompts are read, each is answered `sampling.samples` times by the current weights, the
    answers are rewarded, and `updates` steps, each on its share of the prompts, go over them `iterations` times.
    """

    data: PromptData
    rewards: tuple[RewardFunction, ...] = ()
    reward_model: RewardModel | None = None
    prompts: int  # of an episode
    sampling: Sampling = Sampling()
    updates: int = 1  # steps that an episode's prompts are divided among
    iterations: int = 1  # times that they are gone through
    # Of a step, at most; 0 makes room for the longest answers. Fewer rows are used where answers are short.
    rows: int = 0
    length: int = 0  # tokens of a row; 0: what the longest prompt and answer need
    order: Literal["shuffled", "variance"] = "shuffled"  # variance: prompts first whose rewards vary most (Qwen2.5)
    # Only prompts with such a mean reward: (0.25, 0.625) are 2 to 5 right answers of 8 (Qwen2-Math). Both this and
    # order "variance" have every prompt answered before the first step (prompt_selection.py).
    keep: tuple[float, float] | None = None
    # Compares sampler and trainer: a larger difference of log-probabilities than this prints a warning.
    # None: 1e-5 in float32, where only the order of sums differs; no bound in bfloat16, which rounds.
    bound: float | None = None

    filled_in: ClassVar[tuple[str, ...]] = ()  # fields that were 0

    def __post_init__(self):
        validate.number(self, "config", ("prompts", "updates", "iterations"), int, 1, most=MAX_ROWS)
        validate.number(self, "config", ("bound",), float, 0.0, none=True)
        self.check_data()
        given = self.rewards if isinstance(self.rewards, tuple | list) else [None]
        if not all(isinstance(reward, RewardFunction) for reward in given):
            raise UserError(
                f"rewards is {validate.short(self.rewards)}; it must be (RewardFunction(function=...),) of "
                "qwen2_jax.rewards: mind the comma"
            )
        object.__setattr__(self, "rewards", tuple(self.rewards))
        if not self.rewards and self.reward_model is None:
            raise UserError(
                "no reward for the answers: give a reward_model, or rewards=(RewardFunction(function=...),), mind the "
                "comma"
            )
        if self.reward_model is not None and self.reward_model.shaped and not self.rewards:
            raise UserError("reward_model.shaped orders answers with equal verdicts: give rewards that judge them")
        validate.choice("order", self.order, ("shuffled", "variance"))
        if self.keep is not None and not self.keep[0] <= self.keep[1]:
            raise UserError(f"keep={self.keep}: the first is the least mean reward, the second the largest")
        if self.prompts % self.updates:
            raise UserError(f"prompts={self.prompts} cannot be divided among updates={self.updates} equal steps")
        object.__setattr__(self, "filled_in", tuple(name for name in ("length", "rows") if not getattr(self, name)))
        if not self.length:
            object.__setattr__(self, "length", self.answers_per_group * self.longest)
        if not self.rows:
            object.__setattr__(self, "rows", -(-self.rows_needed // self.accumulate) * self.accumulate)
        super().__post_init__()
        _starts_from_a_checkpoint(self, "training on sampled answers")
        if self.epochs is not None:
            raise UserError("give steps, not epochs: an episode takes as many prompts as it needs")
        if self.length < self.answers_per_group * self.longest:
            raise UserError(
                f"length={self.length} has no room for {self.answers_per_group} x (data.max_tokens + "
                f"sampling.max_new_tokens) = {self.answers_per_group * self.longest} tokens: raise it, or lower those"
            )

    @property
    def longest(self) -> int:
        """Tokens that a prompt with its answer has at most."""
        return self.data.max_tokens + self.sampling.max_new_tokens

    @property
    def answers_per_group(self) -> int:
        """Answers that must lie in one row."""
        return 1

    @property
    def rows_needed(self) -> int:
        """Rows of a step whose answers are all as long as can be."""
        groups = self.prompts // self.updates * (1 if self.answers_per_group > 1 else self.sampling.samples)
        size = max(self.answers_per_group * self.longest, -(-self.length // MOST))
        return -(-groups // max(1, self.length // size))

    def fixed(self) -> dict[str, Any]:
        episode = {name: getattr(self, name) for name in ("prompts", "updates", "iterations")}
        # Which devices sample the answers changes none of them.
        sampling = {name: value for name, value in dataclasses.asdict(self.sampling).items() if name != "mesh"}
        return super().fixed() | episode | {"sampling": sampling}

    def unfilled(self) -> Self:
        """With 0 again where a number was filled in."""
        again = copy.copy(self)
        for name in self.filled_in:
            object.__setattr__(again, name, 0)
        return again

    @property
    def steps_per_episode(self) -> int:
        return self.updates * self.iterations


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDpo(Online):
    """The Qwen2 report's online stage: of the answers to a prompt the best and the worst become a pair for DPO."""

    stage = "qwen2_jax.train.stages.online_dpo:OnlineDpoStage"
    preference: Preference = Preference()
    optim: Optim = Optim(lr=5e-7, schedule="constant", warmup=10, decay=0.0, b2=0.999)
    out: Path = Path("runs/online-dpo")

    @property
    def answers_per_group(self) -> int:
        return 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(Online):
    """Group relative policy optimization (DeepSeekMath, arXiv:2402.03300; Qwen2-Math and Qwen2.5 are trained so)."""

    stage = "qwen2_jax.train.stages.grpo:GrpoStage"
    policy: Policy = Policy()
    mask_truncated: bool = False  # answers that reached sampling.max_new_tokens teach nothing
    optim: Optim = Optim(lr=1e-6, schedule="constant", warmup=10, decay=0.0, b2=0.999)
    out: Path = Path("runs/grpo")


def _steps_replace_epochs(run: Run) -> None:
    if run.steps is not None:
        object.__setattr__(run, "epochs", None)  # a default that steps replaces


def _starts_from_a_checkpoint(run: Run, what: str) -> None:
    if run.start is None:
        raise UserError(f"{what} starts from a checkpoint that was tuned for chat: give start instead of model")
