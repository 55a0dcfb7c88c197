# SPDX-License-Identifier: Apache-2.0
"""Names of implementations: which exist for each operation, and how `implementation` is parsed."""

from qwen2_jax.errors import UserError
from qwen2_jax.parallel import expert_exchange

try:
    from qwen2_jax.kernels import decode_attention, flash_attention, grouped_matmul
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"{missing}. The kernels live in the folder kernels/ and are installed as qwen2_jax.kernels: "
        "run `pip install -e .` in the clone"
    ) from missing

# By operation. Dual chunk attention refuses names that only ordinary attention has.
KERNELS = {
    "attention": (*flash_attention.IMPLEMENTATIONS, *flash_attention.ONLY_BY_NAME),
    "decode": (*decode_attention.IMPLEMENTATIONS,),
    "experts": (*grouped_matmul.IMPLEMENTATIONS, *grouped_matmul.ONLY_BY_NAME),
}
OPERATIONS = {**KERNELS, "exchange": expert_exchange.NAMES}


def check_implementation(spec: str | None) -> None:
    """Raises UserError where `spec` is not a valid `implementation`."""
    for operation, names in OPERATIONS.items():
        name = implementation_of(operation, spec)
        if name is not None and name not in names:
            raise UserError(f"implementation={spec!r}: {operation} has no {name!r}; choose from {', '.join(names)}")


def implementation_of(operation: str, spec: str | None) -> str | None:
    """The name in `spec` for one of OPERATIONS; None: not named."""
    if spec is None or "=" not in spec:
        return spec if operation in KERNELS else None  # one name for all operations means kernels only
    names = dict(part.partition("=")[::2] for part in spec.split(","))
    if not all(names.values()) or not set(names) <= set(OPERATIONS):
        allowed = ",".join(f"{name}=NAME" for name in OPERATIONS)
        raise UserError(f"implementation={spec!r}; give one name for all operations, or any of {allowed}")
    return names.get(operation)
