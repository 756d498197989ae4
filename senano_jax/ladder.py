"""Ideas for fewer tokens, each as a difference from another system, and the system that they make together.

What has been measured of them is in docs/fewer_tokens.md.
"""

from senano_jax.config import Config, LayerSchedule, Stage, changed
from senano_jax.model.schedule import Weighted
from senano_jax.model.soft_cap import SoftCap
from senano_jax.optim.config import AdamRule, TailAverage
from senano_jax.record_systems import recurrent


def polar_express() -> Config:
    """The record with another orthogonalisation in Muon: Polar Express (Amsel et al., arXiv 2505.16932)."""
    return changed(recurrent(), {"optimizer.matrices.iteration": "polar-express"})


def batch_ramp() -> Config:
    """The record's tokens in a ramp of the batch, in thirds of the steps, as the speed record of modded-nanogpt has it.

    Its rates are 1, 2^0.6 and 3^0.5 at 131,072, 262,144 and 393,216 tokens; here they are relative to the last. The
    sequences are shorter than the record's, so that eight devices share every step.
    """
    return changed(
        recurrent(),
        {
            "steps": 2550,
            "seq_len": 16_384,
            "stages": (
                Stage(part=1, batch_tokens=131_072, rate=3**-0.5),
                Stage(part=1, batch_tokens=262_144, rate=2**0.6 * 3**-0.5),
                Stage(part=1),
            ),
        },
    )


def normuon() -> Config:
    """NorMuon (Li et al., arXiv 2510.05491) with the matrices and rates that modded-nanogpt gives it: queries and keys
    of two heads together, a lower rate, a fourfold one for the second projection of the MLP."""
    return changed(
        polar_express(),
        {
            "optimizer.matrices.rate": 0.023,
            "optimizer.matrices.neuron_b2": 0.9,
            "optimizer.matrices.query_key_columns": 256,
            "optimizer.matrices.down_rate": 4.0,
        },
    )


def cautious_decay() -> Config:
    """Weight decay of the matrices where the step shrinks a weight too (Chen et al., arXiv 2510.12402), as in
    modded-nanogpt."""
    return changed(normuon(), {"optimizer.matrices.decay": 1.2})


def rare_adam() -> Config:
    """Adam with float32 moments, at every second step on the sum of two gradients, as in modded-nanogpt."""
    groups = ("head", "embeddings", "scalars")
    state = {f"optimizer.{group}.state": "float32" for group in groups}
    return changed(cautious_decay(), state | {f"optimizer.{group}.every": 2 for group in groups})


def strict() -> Config:
    """The record with at most 162,000,000 parameters, read strictly: the last layer's MLP is narrower by 256 units."""
    return changed(recurrent(), {"model.mlp_widths": ((11, 2816),)})


def head_gate() -> Config:
    """A gate on what each attention head gives (modded-nanogpt of 2025-08), with weights of its own for each visit."""
    return changed(strict(), {"model.head_gate": True})


def exclusive() -> Config:
    """What a head gives loses a learned share along the token's own value (modded-nanogpt of 2026-05 has it by layer),
    by visit."""
    return changed(strict(), {"model.exclusive_attention": True})


def key_offset() -> Config:
    """Keys of the layers with the long window tell of the token before theirs (modded-nanogpt of 2025-12)."""
    return changed(strict(), {"model.key_offset": "long"})


def paired_heads() -> Config:
    """Heads of half of the layers with the short window attend in pairs, after modded-nanogpt of 2026-01."""
    return changed(strict(), {"model.paired_heads": (1, 5, 9)})


def weighted() -> Config:
    """No skip connections over depth: weights of the residual stream and of what is added to it, by application
    (modded-nanogpt of 2026-03 has them by layer), and less added by the layers of the loop (arXiv 2606.18524)."""
    return changed(strict(), {"model.trunk": Weighted()})


_QUERIES = AdamRule(rate=0.004, b1=0.9, b2=0.99, eps=1e-10)


def depth_attention() -> Config:
    """Layers choose what they read: the embedding, blocks of three layers before theirs, and what theirs has added so
    far, with weights that each token computes (Kimi team, arXiv 2603.15031), in the trunk of `weighted`."""
    return changed(weighted(), {"model.trunk.depth_block": 3, "optimizer.queries": _QUERIES})


def shifted_cap() -> Config:
    """The soft-cap of modded-nanogpt since 2025-10: logits 23 sigmoid((z + 5) / 7.5), not divided by the root of the
    width, and the head's learning rate divided by it instead."""
    cap = SoftCap(height=23.0, divisor=7.5, shift=5.0, by_width=False)
    return changed(strict(), {"model.cap": cap, "optimizer.head.rate": 0.008})


def multi_token() -> Config:
    """Each token also predicts the second one ahead in the first two thirds of the run, and the third one in the first
    third, from the same logits and with falling weights, as in modded-nanogpt since 2025-12."""
    stages = (
        Stage(part=1, ahead=((1.0, 1.0), (0.5, 0.5), (0.25, 0.0))),
        Stage(part=1, ahead=((1.0, 1.0), (0.5, 0.0))),
        Stage(part=1),
    )
    return changed(strict(), {"stages": stages})


def tail_average() -> Config:
    """The weights of the end of the run are blended with their average, but for the embeddings: modded-nanogpt's slow
    track, result 46."""
    average = TailAverage(start=2400 / 2900, horizon=150 / 2900, share=0.6, groups=("matrices", "head", "scalars"))
    return changed(rare_adam(), {"optimizer.average": average})


def tied_recurrent() -> Config:
    """17 layers within 162,000,000 parameters: one table is embedding and head, the 13 layers in the middle are applied
    twice. 449.97M tokens, 65,536 a step; 379.98M with `--steps 5798`. Not verified on FineWeb."""
    return changed(
        recurrent(),
        {
            "model.tied": True,
            "model.layers": LayerSchedule(prelude=2, loop=13, visits=2, coda=2),
            "model.trunk": Weighted(),
            "model.cap": SoftCap(height=23.0, divisor=7.5, shift=5.0, by_width=False),
            "model.head_gate": True,
            "model.exclusive_attention": True,
            "model.key_offset": "long",
            "model.paired_heads": (1, 5, 9, 13),
            "optimizer.matrices": normuon().optimizer.matrices,
            "optimizer.matrices.rate": 0.012,
            "optimizer.matrices.decay": 1.2,
            "optimizer.head": AdamRule(rate=0.0057, b1=0.5, b2=0.95, eps=1e-10, every=2),
            "optimizer.scalars.rate": 0.0163,
            "optimizer.scalars.every": 2,
            "stages": multi_token().stages,
            "steps": 6866,
            "batch_tokens": 65_536,
            "seq_len": 8192,  # eight devices share a step
            "final_window_tokens": 5120,
            "val_every": 500,
        },
    )


def tied_recurrent_ramp() -> Config:
    """`tied_recurrent` with a ramp of the batch: a third of the tokens each at 32,768, 65,536 and 131,072 a step, with
    rates by the root of the batch, in sequences that eight devices can share. 449.84M tokens; 379.85M with
    `--steps 6762`. Not verified on FineWeb."""
    ahead = [stage.ahead for stage in multi_token().stages]
    return changed(
        tied_recurrent(),
        {
            "stages": (
                Stage(part=4, batch_tokens=32_768, seq_len=4096, rate=0.707, ahead=ahead[0]),
                Stage(part=2, ahead=ahead[1]),
                Stage(part=1, batch_tokens=131_072, seq_len=16_384, rate=1.414),
            ),
            "steps": 8008,
        },
    )


_WIDE = {
    "model.dim": 896,
    "model.num_heads": 7,
    "model.layers": LayerSchedule(prelude=2, loop=8, visits=3, coda=2),
    "model.paired_heads": (),  # seven heads make no pairs
    "optimizer.matrices.query_key_columns": 128,
}


def wide_recurrent() -> Config:
    """`tied_recurrent` with 12 layers of 896 channels in place of 17 of 768, the 8 in the middle applied three times,
    within 162,000,000 parameters. The same tokens. Not verified on FineWeb."""
    return changed(tied_recurrent(), _WIDE)


def wide_recurrent_ramp() -> Config:
    """`wide_recurrent` with the ramp of `tied_recurrent_ramp`. 449.84M tokens; 379.85M with `--steps 6762`. Not
    verified on FineWeb."""
    return changed(tied_recurrent_ramp(), _WIDE)


_ATTNRES = {"model.trunk.depth_block": 8, "optimizer.queries": _QUERIES}


def attnres_recurrent() -> Config:
    """`wide_recurrent` with attention over depth, named Attention Residuals by its authors; each visit of the loop is a
    block. Within 162,000,000 parameters. The same tokens. Not verified on FineWeb."""
    return changed(wide_recurrent(), _ATTNRES)


def attnres_recurrent_ramp() -> Config:
    """`attnres_recurrent` with the ramp of `tied_recurrent_ramp`. 449.84M tokens; 379.85M with `--steps 6762`. Not
    verified on FineWeb."""
    return changed(wide_recurrent_ramp(), _ATTNRES)


def difference_recurrent_ramp() -> Config:
    """`attnres_recurrent_ramp` with a second attention that is taken from the first in the loop's layers, for which all
    MLPs are narrower: the candidate for a whole run. Within 162,000,000 parameters. The same tokens. Not verified on
    FineWeb."""
    return changed(
        attnres_recurrent_ramp(),
        {
            "model.difference": tuple(range(2, 10)),
            "model.mlp_widths": tuple((layer, 3328) for layer in range(12)),
        },
    )
