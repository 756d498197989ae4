"""The text that the `demo` preset trains on: README.md beside this file tells what it is."""

from pathlib import Path

TRAIN = str(Path(__file__).with_name("sample_train.bin"))
VAL = str(Path(__file__).with_name("sample_val.bin"))
PIECES = str(Path(__file__).with_name("pieces.json"))
