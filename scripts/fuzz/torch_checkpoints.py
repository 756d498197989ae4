"""PyTorch's .pt files, some of which would execute code."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import torch

from fuzz.damage import NAMES, damaged
from senano_jax.interop.torch_checkpoint import read_torch_checkpoint

CANARY = "canary"  # the file in the folder of the sound ones that code makes when it is executed


class TorchCheckpoints:
    def __init__(self, seeds: Path):
        self._seeds, self._canary = seeds, seeds / CANARY
        weights = {f"blocks.{n}.weight": torch.randn(8, 8) for n in range(3)}
        torch.save({"model": weights, "step": 3}, seeds / "new.pt")
        torch.save({"embed": torch.randn(8, 8).bfloat16()}, seeds / "old.pt", _use_new_zipfile_serialization=False)

    def __call__(self, rng: random.Random, place: Path) -> str:
        content = (self._seeds / rng.choice(["new.pt", "old.pt"])).read_bytes()
        path = place / "a.pt"
        how = rng.choice(["bytes", "bytes", "code", "content", "bomb", "member", "name", "link"])
        if how == "bytes":
            path.write_bytes(damaged(rng, content))
        elif how == "code":
            trap = Trap(rng.choice(["open", "eval", "system"]), str(self._canary))
            if rng.random() < 0.3:
                path.write_bytes(pickle.dumps(trap, protocol=rng.choice([0, 2, 4])))
            else:
                content = rng.choice(
                    [trap, {"model": {"a": torch.zeros(2)}, "optimizer": trap}, {"model": trap}, {trap: 1}]
                )
                torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
        elif how == "content":
            torch.save({"model": rng.choice(odd_contents()), "step": 1}, path)
        elif how in ("bomb", "member"):
            with (
                zipfile.ZipFile(self._seeds / "new.pt") as old,
                zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
            ):
                chosen = rng.choice(old.namelist())
                for name in old.namelist():
                    data = old.read(name)
                    if name == chosen and how == "bomb":
                        data = bytes(1 << 26)
                    elif name == chosen:
                        name, data = rng.choice([f"../{name}", f"/{name}", name + "x"]), bytes(damaged(rng, data))
                    new.writestr(name, data)
        elif how == "link":
            path.symlink_to(rng.choice(["/dev/zero", "/proc/self/mem", "a.pt", "/", "/etc/passwd"]))
        read_torch_checkpoint(rng.choice(NAMES) if how == "name" else str(path))
        return how


class Trap:
    """Unpickled by a careless reader, it would make the canary file."""

    def __init__(self, how: str, canary: str):
        self.how, self.canary = how, canary

    def __reduce__(self):
        return {
            "open": (open, (self.canary, "w")),
            "eval": (eval, (f"open({self.canary!r}, 'w')",)),
            "system": (os.system, (f"touch {self.canary}",)),
        }[self.how]


def odd_contents() -> list:
    huge = torch.zeros(1)
    return [
        {"a": torch.nn.Parameter(torch.zeros(3))},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        {"a": huge.expand(1 << 40)},
        {"a": huge.bfloat16().expand(1 << 40)},
        {"a": torch.zeros(3, dtype=torch.complex64)},
        {"a": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        {"a": torch.zeros(3).int()},
        {("x",) * 3: torch.zeros(1)},
        {"x" * 100_000: 1},
        {"a\nb": 1},
        {"a": {"b": torch.zeros(1)}},
        {},
        [torch.zeros(1)],
        None,
    ]
