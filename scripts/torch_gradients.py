"""Gradients of the PyTorch project's model; run by compare_gradients.py, with a Python that has PyTorch and NumPy.

    python torch_gradients.py FOLDER MODE

FOLDER holds model.py, the model of the PyTorch file, and given.npz: `tokens` [sequences, T + 1], `window_blocks`, and
the weights as `weights/<name>`. MODE is float32, eager or compiled; the latter two have the embedding, and with it all
activations, in bfloat16. The gradients of the loss summed over all sequences go to FOLDER/MODE.npz, float32, with
`loss`, the mean over tokens. Without a GPU attention is dense, with the same mask.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 128
END_OF_TEXT = 50256


def attend_densely(q, k, v, *, block_mask, scale, **options):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask, scale=scale)


def dense_masks(tokens, window_blocks):
    """Masks of the long and the short window, [1, 1, T, T]."""
    document, i = (tokens == END_OF_TEXT).cumsum(0), torch.arange(len(tokens))
    visible = (i[:, None] >= i) & (document[:, None] == document)
    distance = i[:, None] // BLOCK - i // BLOCK
    return tuple((visible & (distance < max(1, w)))[None, None] for w in (window_blocks, window_blocks // 2))


def main(folder: Path, mode: str) -> None:
    """Reads and writes what the module's docstring names."""
    sys.path.insert(0, str(folder))
    import model as program

    given = np.load(folder / "given.npz")
    tokens, window_blocks = torch.from_numpy(given["tokens"].astype(np.int64)), int(given["window_blocks"])
    weights = {name.removeprefix("weights/"): given[name] for name in given.files if name.startswith("weights/")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (vocab_size, dim), length = weights["embed.weight"].shape, tokens.shape[1] - 1
    model = program.GPT(vocab_size, 12, dim // 128, dim, length)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    model.to(device)
    if mode == "float32":
        torch.set_float32_matmul_precision("highest")  # an environment variable can ask for TF32
    else:
        model.embed.bfloat16()
    if device == "cpu":
        program.flex_attention = attend_densely
        model.create_blockmasks = lambda *_: (model.long_mask, model.short_mask)
    elif mode != "compiled":
        program.flex_attention = torch.compile(program.flex_attention)  # else it makes the whole matrix of scores
    apply = torch.compile(model, dynamic=False) if mode == "compiled" else model
    window, losses = torch.tensor(window_blocks, dtype=torch.int32, device=device), []
    for sequence in tokens.to(device):
        inputs, targets = sequence[:-1].to(torch.int32), sequence[1:]
        if device == "cpu":  # buffers are inputs of the compiled program; constants in it would go stale
            for name, mask in zip(("long_mask", "short_mask"), dense_masks(inputs, window_blocks)):
                model.register_buffer(name, mask, persistent=False)
        loss = apply(inputs, targets, window)
        loss.backward()
        losses.append(loss.item() / length)
    gradients = {name: parameter.grad.float().cpu().numpy() for name, parameter in model.named_parameters()}
    np.savez(folder / f"{mode}.npz", loss=np.mean(losses), **gradients)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
