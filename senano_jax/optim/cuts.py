"""Which matrices a parameter holds."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.errors import UserError

Path = tuple  # of JAX dictionary keys


def name_of(path: Path) -> str:
    """Of a parameter, such as "down"; the kernel of a dense layer has that of the layer."""
    names = [part.key for part in path if part.key != "kernel"]
    return names[-1]


def cut(path: Path, parameter: Float[Array, "*stack in out"], columns: int | None) -> list[Array]:
    """The parameter as arrays of matrices [..., in, out]: itself or, for `qkv` [3, in, out] where `columns` is given,
    queries and keys in parts of so many columns [2, parts, in, columns], and the values [in, out].

    Raises UserError if they cannot be cut into such parts.
    """
    if columns is None or name_of(path) != "qkv":
        return [parameter]
    if parameter.ndim != 3:
        raise UserError(
            "--optimizer.matrices.query-key-columns is for models that keep queries, keys and values as matrices of "
            "their own, and GPT-2 does not; leave it out"
        )
    _, fan_in, fan_out = parameter.shape
    if fan_out % columns:
        raise UserError(
            f"--optimizer.matrices.query-key-columns is {columns}; it must divide the {fan_out} columns of queries and "
            "keys; choose the columns of one head, or of several"
        )
    parts = parameter[:2].reshape(2, fan_in, fan_out // columns, columns)
    return [jnp.swapaxes(parts, 1, 2), parameter[2]]


def joined(matrices: list[Array]) -> Float[Array, "*stack in out"]:
    """What `cut` took apart."""
    if len(matrices) == 1:
        return matrices[0]
    parts, values = matrices
    queries_and_keys = jnp.swapaxes(parts, 1, 2).reshape(2, *values.shape)
    return jnp.concatenate([queries_and_keys, values[None]])
