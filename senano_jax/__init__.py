"""Sample-Efficient NanoGPT in JAX: a language model trained on as few FineWeb tokens as possible."""

import os
import sys

if any(name.startswith("JAX_") for name in os.environ):
    try:
        import jax  # noqa: F401
    except ValueError as error:  # a variable of JAX with a value that it does not know: no module could be imported
        print(f"error: {error}; mend or unset the variable", file=sys.stderr)
        sys.exit(2)
