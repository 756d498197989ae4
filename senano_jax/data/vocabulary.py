"""GPT-2's vocabulary, as far as models and shards need to know it."""

VOCAB_SIZE = 50257
END_OF_TEXT = 50256  # GPT-2's <|endoftext|>; stands in front of each document
