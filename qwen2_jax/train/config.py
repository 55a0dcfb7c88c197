# SPDX-License-Identifier: Apache-2.0
"""Run configurations: frozen dataclasses that a file in configs/ fills in and command-line flags override.

A config file shows what differs from the defaults here. It ends in `config = Pretrain(...)`, `Sft(...)` or
`Upcycle(...)`, or in one of post_training_config.py's. config_file.py reads it.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from qwen2_jax import validate
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import REMAT_POLICIES
from qwen2_jax.model.lora import Lora
from qwen2_jax.observe import Logging
from qwen2_jax.train.optim.online_merging import OnlineMerging
from qwen2_jax.train.state.checkpoints import Checkpointing
from qwen2_jax.train.upcycle.upcycle import Upcycling

SCHEDULES = ("constant", "linear", "cosine", "wsd")
COMPUTE = ("bfloat16", "float32")
MAX_ROWS, MAX_STEPS = 1_000_000, 1_000_000_000  # hundreds of times what anybody trains; more is a mistake


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint to start from. Fields that are None keep the checkpoint's value."""

    checkpoint: str  # name, Hub id, Hugging Face folder or Orbax folder
    rope_theta: float | None = None  # a new rotary base, as in a long-context phase (1e4 -> 1e6 for Qwen2)
    max_position_embeddings: int | None = None  # a new context length
    adapter: str | None = None  # folder in PEFT's format with the adapters that `lora` trains on

    def __post_init__(self):
        validate.number(self, "start", ("rope_theta",), float, 1.0, none=True)
        validate.number(self, "start", ("max_position_embeddings",), int, 1, none=True)


def _is_decay(name: str, value: float) -> None:
    if not value < 1:
        raise UserError(f"{name} is {value}; a decay is below 1, such as 0.999")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the matrices inside layers (Jordan et al. 2024); everything else stays on AdamW.

    Deviation: the update's singular values are 1 for every shape, not sqrt(max(1, outputs / inputs)).
    """

    lr: float = 0.02
    momentum: float = 0.95

    def __post_init__(self):
        validate.number(self, "muon", ("lr", "momentum"), float, 0.0)
        _is_decay("muon.momentum", self.momentum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning rate. Decay touches matrices only, never norms and biases."""

    lr: float  # at its peak
    schedule: str = "cosine"  # "constant", "linear", "cosine", or "wsd": warm-up, stable, then linear decay
    warmup: int = 0  # steps of linear warm-up from 0
    final: float = 0.1  # final learning rate, as a share of its peak
    fall: float = 0.2  # share of the steps over which "wsd" decays
    algorithm: Literal["adamw", "adafactor"] = "adamw"  # adafactor keeps factored second moments: less memory
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0  # global gradient norm
    muon: Muon | None = None
    merging: OnlineMerging | None = None  # merges each update with what an earlier stage had learned

    def __post_init__(self):
        validate.number(self, "optim", ("lr", "fall", "final", "b1", "b2", "eps", "decay", "clip"), float, 0.0)
        validate.number(self, "optim", ("warmup",), int, 0)
        for name in ("b1", "b2"):
            _is_decay(f"optim.{name}", getattr(self, name))
        validate.choice("optim.schedule", self.schedule, SCHEDULES)
        if self.muon is not None and self.algorithm != "adamw":
            raise UserError("optim.muon goes together with algorithm 'adamw' only, which serves what Muon does not")
        if self.merging is not None and (self.algorithm != "adamw" or self.muon is not None):
            raise UserError("optim.merging merges Adam's updates: it goes with algorithm 'adamw' and without muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Steps that are not applied: a loss or gradient that is not finite, and losses far above the recent ones."""

    spike: float | None = None  # standard deviations above the recent mean from which a loss is a spike; None: never
    patience: int = 10  # skipped steps in a row after which the run stops with an error

    def __post_init__(self):
        validate.number(self, "guard", ("spike",), float, 0.0, none=True)
        validate.number(self, "guard", ("patience",), int, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """Losses of a sparse model's router, averaged over its layers and tokens."""

    load_balancing: float | None = None  # coefficient; None: the model config's router_aux_loss_coef
    router_z: float = 0.0  # coefficient of the squared log-sum-exp (Zoph et al. 2022 use 1e-3)

    def __post_init__(self):
        validate.number(self, "moe", ("load_balancing",), float, 0.0, none=True)
        validate.number(self, "moe", ("router_z",), float, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the device mesh's axes; their product is the number of devices. -1: the remaining devices.

    The order is that of sharding.AXES: the first go across slices or nodes, the last are neighbours.
    """

    replica: int = 1  # copies of the model in other slices or groups of nodes, each with its rows of the batch
    data: int = 1  # copies of the model, each with its rows of the batch
    fsdp: int = -1  # parts of parameters and optimizer state, each with its rows of the batch
    expert: int = 1  # parts of the experts, each with its rows of the batch
    context: int = 1  # parts of each row's tokens
    tensor: int = 1  # parts of heads, feed-forward width and vocabulary

    def __post_init__(self):
        validate.number(self, "mesh", [f.name for f in dataclasses.fields(self)], int, -1)
        if list(dataclasses.astuple(self)).count(-1) > 1 or 0 in dataclasses.astuple(self):
            raise UserError(f"{self}: at most one axis may be -1 (the remaining devices), and none 0")

    def sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the axes for a number of devices. Raises UserError if the sizes do not divide it."""
        sizes = dataclasses.asdict(self)
        known = 1
        for size in sizes.values():
            known *= max(size, 1)
        if devices % known:
            raise UserError(
                f"{self} is for a multiple of {known} devices, and {devices} are here: the sizes' product must be "
                f"{devices}, with -1 for the remaining devices"
            )
        return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss and accuracy while training, per source."""

    sources: tuple[Source, ...] = ()
    every: int = 250  # steps; the end of the run is always one
    first: bool = False  # also before the first step
    batches: int = 8  # of each source, at most

    def __post_init__(self):
        validate.number(self, "evaluation", ("every", "batches"), int, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The fields that all stages of training share. Use Pretrain, Sft, or one of post_training_config.py's.

    A dataclass derived from this names its stage: what starts, feeds and evaluates its runs (stage.py).
    """

    stage: ClassVar[str | type | None] = None  # a class derived from stage.Stage, or "module:class" to import it late
    answers: ClassVar[bool] = True  # whether the result is a chat model, whose texts end as its template ends answers

    data: Data | PromptData
    rows: int  # of one step's batch, over all devices and micro-batches
    length: int  # tokens of a row
    optim: Optim
    model: ModelConfig | None = None  # trained from random weights; give this or `start`
    start: Start | None = None
    tokenizer: str | None = None  # checkpoint or folder that has one; None: that of `start`
    steps: int | None = None  # give this or `epochs`
    epochs: float | None = None  # passes over the data
    accumulate: int = 1  # micro-batches that a step's rows are cut into, to save memory
    dtype: str = "bfloat16"  # of activations and the weights in a step (master weights: float32); with lora: the base's
    remat: str | None = "full"  # activations recomputed in the backward pass: "full", "dots" (fewer), None (none)
    long_context: Literal["off", "yarn", "dca"] = "off"  # rotary positions to train with
    z_loss: float = 0.0  # keeps the logits' scale from drifting; PaLM uses 1e-4
    moe: Moe = Moe()
    lora: Lora | None = None  # trains adapters; the weights stay as they are
    lora_base: Literal["bfloat16", "float32", "int8", "int4"] = "bfloat16"  # dtype of the weights under the adapters
    ema: float | None = None  # decay of an average of the weights, which is evaluated and exported; less at the start
    guard: Guard = Guard()
    mesh: Mesh = Mesh()
    export_dtype: str = "bfloat16"  # of the result's weights
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpointing = Checkpointing()
    log: Logging = Logging()
    implementation: str | None = (
        None  # of the kernels: "xla", "attention=splash", ...; None: the first that supports the inputs
    )
    seed: int = 0
    out: Path = Path("runs/run")  # run folder: checkpoints, metrics, plots; out/hf is the result
    resume: bool = True  # continue the run found in `out`; False starts over
    dry_run: bool = False  # print what would be done, and the first batch; train nothing

    def fixed(self) -> dict[str, Any]:
        """The settings that a continued run may not change: they decide its arrays or the order of its data."""
        return {name: getattr(self, name) for name in ("lora", "rows", "length", "seed")} | {
            "ema": self.ema is not None
        }

    def unfilled(self) -> Self:
        """This without values that were derived from others, so that flags may change those others."""
        return self

    def check_data(self) -> None:
        """Raises UserError if `data` is not of the type that the run takes."""
        wanted: Any = next(field.type for field in dataclasses.fields(self) if field.name == "data")
        if not isinstance(self.data, wanted):
            example = "PromptData(sources=(PATH,))" if wanted is PromptData else "Data(sources=(Source(path=PATH),))"
            raise UserError(f"data is {validate.short(self.data)}; {type(self).__name__} takes {example}")

    def __post_init__(self):
        self.check_data()
        validate.number(self, "config", ("rows", "accumulate"), int, 1, most=MAX_ROWS)
        validate.number(self, "config", ("length",), int, 2)
        validate.number(self, "config", ("steps",), int, 1, none=True, most=MAX_STEPS)
        validate.number(self, "config", ("epochs", "z_loss"), float, 0.0, none=True)
        validate.number(self, "config", ("ema",), float, 0.0, none=True)
        validate.number(self, "config", ("seed",), int, 0)
        validate.choice("dtype", self.dtype, COMPUTE)
        validate.choice("export_dtype", self.export_dtype, COMPUTE)
        validate.choice("remat", self.remat, (None, *REMAT_POLICIES))
        if (self.model is None) == (self.start is None):
            raise UserError("give either model (random weights) or start (a checkpoint to start from)")
        if self.start is None and self.tokenizer is None:
            raise UserError("a model from random weights needs a tokenizer: give tokenizer, a checkpoint or folder")
        if (self.steps is None) == (self.epochs is None) or self.epochs == 0:
            raise UserError(f"give either steps or epochs above 0, not steps={self.steps} and epochs={self.epochs}")
        if self.rows % self.accumulate:
            raise UserError(f"rows={self.rows} cannot be cut into accumulate={self.accumulate} equal micro-batches")
        if self.ema is not None:
            _is_decay("ema", self.ema)
        if self.optim.merging is not None and (self.start is None or self.lora is not None):
            raise UserError(
                "optim.merging pulls all weights of a checkpoint towards it: give start instead of model, and no lora"
            )
        if self.lora is not None and self.start is None:
            raise UserError("lora trains adapters of a checkpoint: give start instead of model")
        base = "bfloat16" if self.lora_base in ("int8", "int4") else self.lora_base
        if self.lora is not None and self.dtype != base:
            raise UserError(
                f"dtype is {self.dtype!r}; with lora_base {self.lora_base!r} activations are {base}: give that dtype, "
                "or another lora_base"
            )
        if self.lora is None and self.start is not None and self.start.adapter is not None:
            raise UserError("start.adapter goes together with lora, whose rank and targets must be the adapter's")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Next-token training on all tokens, from random weights or from a checkpoint (continued, long context)."""

    stage = "qwen2_jax.train.stages.pretrain:PretrainStage"
    answers = False
    data: Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(Run):
    """Supervised fine-tuning on chats; the defaults are the Qwen2 report's (arXiv:2407.10671, sec. 4.2)."""

    stage = "qwen2_jax.train.stages.sft:SftStage"
    data: Data
    length: int = 32768
    optim: Optim = Optim(lr=7e-6, schedule="linear", warmup=20, final=0.1, decay=0.1, clip=1.0)
    epochs: float | None = 2
    out: Path = Path("runs/sft")

    def __post_init__(self):
        if self.steps is not None:
            object.__setattr__(self, "epochs", None)  # a default that steps replaces
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Makes a mixture of experts out of a dense checkpoint (Qwen2 report, sec. 2.2.2). Nothing is trained."""

    checkpoint: str  # name, Hub id or folder of the dense model
    experts: Upcycling
    out: Path = Path("runs/upcycle")  # run folder; out/hf is the result

    resume: bool = True  # False replaces a result that is there already
    dry_run: bool = False  # print what would be done

    def unfilled(self) -> Self:
        """This: no number is computed from others."""
        return self
