"""Sample-Efficient NanoGPT in JAX: a language model trained on as few FineWeb tokens as possible."""
