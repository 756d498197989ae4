"""The profile command on a tiny model, and each of its instruments against something counted by hand."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_gpt2, tiny_model

from senano_jax.attention import END_OF_TEXT
from senano_jax.config import LayerSchedule
from senano_jax.data import sample
from senano_jax.data.shards import open_shard, write_shard
from senano_jax.errors import UserError
from senano_jax.presets import preset
from senano_jax.profile import main
from senano_jax.profiling import kernels
from senano_jax.profiling.compilation import compile_program, executed_work, planned_memory
from senano_jax.profiling.flops import (
    attention_flops_per_pair,
    matrix_flops_per_token,
    peak_flops,
    step_flops,
    visible_pairs,
)
from senano_jax.profiling.hlo import Instruction, module_of, pass_of, read_instructions
from senano_jax.profiling.kernels import Event, busy_fraction, group_of, kernel_times, read_events, time_by
from senano_jax.profiling.timing import Spread
from senano_jax.profiling.tokens import MEAN_DOCUMENT, open_feed, synthetic_sequences
from senano_jax.training.state import abstract_params

TINY_DEMO = [
    *("demo", "--devices", "1", "--model.dim", "32", "--seq-len", "256", "--batch-tokens", "512"),
    *("--final-window-tokens", "256", "--data.val-seq-len", "256", "--data.val-tokens", "512"),
    *("--profile-steps", "3", "--warmup", "1", "--compilation-cache", "None"),
]


# The command


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Output and JSON of the command on a tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    flags = [
        "--sweep",
        "1",
        "--evaluation",
        "--trace-dir",
        str(folder / "trace"),
        "--json",
        str(folder / "profile.json"),
    ]
    command = [sys.executable, "-m", "senano_jax.profile", *TINY_DEMO, *flags]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("trace/**/*.xplane.pb"))
    return done.stdout, json.loads((folder / "profile.json").read_text())["report"]


def test_the_report_has_every_section(profiled):
    output, _ = profiled
    for text in ("Compilation", "Arithmetic", "Memory", "back to back", "By window", "Evaluation", "Kernels by module"):
        assert text in output
    assert "\x1b" not in output  # no colours where there is no terminal


def test_compilation_and_memory_are_filled_in(profiled):
    _, report = profiled
    compilation = report["compilation"]
    assert min(compilation[phase] for phase in ("trace_s", "lower_s", "compile_s")) > 0
    assert compilation["cache"] == "off"
    assert report["executed"]["flops"] > 0 and report["executed"]["bytes"] > 0
    memory = report["memory"]
    assert memory["arguments"] > memory["aliased"] > 0.9 * memory["outputs"]  # the donated state
    assert memory["temporaries"] > 0


def test_speed_follows_from_the_median_step(profiled):
    _, report = profiled
    speed = report["speed"]
    assert (speed["window_blocks"], speed["step_ms"]["n"], report["token_source"]) == (2, 3, "the bundled sample")
    assert speed["tokens_per_s"] == pytest.approx(512 / speed["step_ms"]["median"] * 1000)
    assert report["peak_flops"] is None and speed["mfu"] is None  # nobody knows a CPU's
    assert [swept["window_blocks"] for swept in report["sweep"]] == [1]
    assert report["sweep"][0]["flops"]["attention"] < speed["flops"]["attention"]
    assert report["evaluation"]["tokens"] == 512 and report["evaluation"]["tokens_per_s"] > 0


def test_kernels_of_the_cpu_are_traced_back_to_modules(profiled):
    _, report = profiled
    times = report["kernels"]["times"]
    assert 0 < report["kernels"]["busy"] <= 1
    assert times["attributed"] > 0.8
    assert {"attention", "mlp", "head + loss", "optimiser"} <= {kernel["module"] for kernel in times["kernels"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window-blocks", "0"], "--window-blocks is 0"),
        (["--profile-steps", "0"], "--profile-steps is 0"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--json", "/nowhere/profile.json"], "no folder /nowhere"),
        (["--json", "/tmp"], "is a folder"),
        (["--trace-dir", sample.TRAIN], "is a file"),
        (["--seq-len", "100"], "not a multiple of 128"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        main([*TINY_DEMO, *flags])


# Tokens


def small(**changes):
    return dataclasses.replace(preset("demo"), batch_tokens=1024, seq_len=512, **changes)


def with_shards(config, pattern):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train_files=pattern))


def test_shards_are_read_again_when_they_run_out(tmp_path):
    tokens = np.arange(2100) % 1000
    write_shard(tmp_path / "a.bin", tokens)
    feed = open_feed(with_shards(small(), str(tmp_path / "*.bin")), shards_required=True)
    batches = [next(feed.batches) for _ in range(3)]
    assert feed.description.endswith("*.bin") and batches[0].shape == (2, 513)
    np.testing.assert_array_equal(batches[0].ravel()[:513], tokens[:513])
    np.testing.assert_array_equal(batches[2], batches[0])
    feed.batches.close()


def test_missing_shards_give_way_to_the_sample_and_then_to_synthetic_documents():
    config = with_shards(small(), "/nowhere/*.bin")
    feed = open_feed(config, shards_required=False)
    assert feed.description == "the bundled sample"
    feed.batches.close()
    longer = dataclasses.replace(config, batch_tokens=512 * (1 + len(open_shard(sample.TRAIN)) // 512))
    feed = open_feed(longer, shards_required=False)
    assert "synthetic" in feed.description
    assert next(feed.batches).shape == (longer.batch_sequences, 513)


def test_shards_asked_for_must_be_there_and_hold_a_step(tmp_path):
    with pytest.raises(UserError, match="no shard matches"):
        open_feed(with_shards(small(), "/nowhere/*.bin"), shards_required=True)
    write_shard(tmp_path / "a.bin", np.zeros(900, int))
    with pytest.raises(UserError, match="less than one step of 1,024 tokens"):
        open_feed(with_shards(small(), str(tmp_path / "a.bin")), shards_required=True)


def test_synthetic_documents_have_the_stated_mean_length():
    tokens = synthetic_sequences(8, 100_000, 50_257)
    assert tokens.size / (tokens == END_OF_TEXT).sum() == pytest.approx(MEAN_DOCUMENT, rel=0.2)
    assert tokens.min() >= 0 and tokens.max() == END_OF_TEXT


# Arithmetic


def dot_flops(jaxpr, turns: int = 1) -> int:
    """FLOPs of all dot_general equations, those of a scan once a turn."""
    total = 0
    for equation in jaxpr.eqns:
        inner_turns = turns * equation.params.get("length", 1) if equation.primitive.name == "scan" else turns
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * turns * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += dot_flops(inner, inner_turns)
    return total


DENSE = {"attention": "dense", "mlp_expansion": 3}


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(**DENSE, layers=LayerSchedule(1, 2, 2, 1)),
        tiny_model(**DENSE, layers=LayerSchedule(2, 2, 4, 2)),
        tiny_model(**DENSE, layers=LayerSchedule(3, 0, 0, 3)),
        tiny_model(**DENSE, layers=LayerSchedule(2, 0, 0, 2, no_attention=(2,)), value_embeddings=1),
        tiny_gpt2(**DENSE),
    ],
)
def test_forward_flops_are_those_of_the_products_in_the_program(model):
    """Dense attention computes every pair, so that its products can be counted too."""
    B, T = 2, 256
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(params, tokens):
        return model.apply({"params": params}, tokens, tokens, 2)

    counted = dot_flops(jax.make_jaxpr(forward)(abstract_params(model), tokens).jaxpr)
    c = model.config
    every_pair = len(c.attention_windows) * attention_flops_per_pair(c) * B * T * T
    assert counted == matrix_flops_per_token(c) * B * T + every_pair


def test_visible_pairs_are_those_of_the_rule_stated_pair_by_pair():
    tokens = np.ones((2, 640), np.int32)
    tokens[0, [5, 200, 201, 500]] = END_OF_TEXT
    tokens[1, 130] = END_OF_TEXT
    for window in (0, 1, 3):
        expected = 0
        for row in tokens:
            document = np.cumsum(row == END_OF_TEXT)
            q, k = np.meshgrid(np.arange(640), np.arange(640), indexing="ij")
            near = q // 128 - k // 128 < max(window, 1)
            expected += int(((k <= q) & near & (document[q] == document[k])).sum())
        assert visible_pairs(tokens, window) == expected


def test_a_step_counts_both_windows_and_three_passes():
    tokens = synthetic_sequences(2, 1024, 512)
    flops = step_flops(TINY, tokens, 4)
    assert flops.matrix_products == 3 * 2048 * matrix_flops_per_token(TINY)
    pairs = 3 * visible_pairs(tokens, 4) + 3 * visible_pairs(tokens, 2)  # six positions, every other one long
    assert flops.attention == 3 * attention_flops_per_pair(TINY) * pairs
    assert flops.total == 3 * step_flops(TINY, tokens, 4, training=False).total


def test_the_windows_of_other_systems_are_counted_as_they_are():
    """Value embeddings: three long windows, of layers 0, 4 and 11, and eight short ones. GPT-2: in every layer half of
    all pairs, documents or not."""
    tokens = synthetic_sequences(2, 1024, 50_257)
    long, short = visible_pairs(tokens, 4), visible_pairs(tokens, 2)
    model = preset("value-embeddings").model
    assert step_flops(model, tokens, 4, training=False).attention == 4 * 768 * (3 * long + 8 * short)
    causal = 12 * 2 * 1024 * 1025 // 2
    assert step_flops(preset("llmc").model, tokens, 8, training=False).attention == 4 * 768 * causal


def test_the_record_takes_one_and_a_half_gigaflop_a_token():
    assert 3 * matrix_flops_per_token(preset("recurrent").model) == pytest.approx(1.51e9, rel=0.005)


def test_peaks_are_known_by_device_and_only_in_bfloat16():
    assert peak_flops("NVIDIA H200", "bfloat16") == peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA H200", "float32") is None and peak_flops("cpu", "bfloat16") is None


def test_a_second_compilation_is_a_hit_of_the_persistent_cache(tmp_path):
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    x = jnp.ones((64, 32))
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
        programs = [compile_program(jax.jit(lambda x: (x.T @ x).sum()), x) for _ in range(2)]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    assert [program.compilation.cache for program in programs] == ["miss", "hit"]
    assert float(programs[1].run(x)) == 64 * 32 * 32
    assert executed_work(programs[0].run).flops >= 2 * 64 * 32 * 32
    assert planned_memory(programs[0].run).arguments == 64 * 32 * 4


def test_a_spread_is_that_of_its_sample():
    assert Spread.of(range(11)) == Spread(median=5, min=0, p10=1, p90=9, max=10, n=11, times=tuple(range(11)))


# Kernels

STEP = "jit(step)/while/body/closed_call"
HLO = f"""HloModule jit_step, is_scheduled=true

%fused_mlp (p: bf16[8]) -> bf16[8] {{
  %p = bf16[8]{{0}} parameter(0)
  %a.1 = bf16[8]{{0}} multiply(%p, %p), metadata={{op_name="{STEP}/jvp(Gpt)/Gpt.features/layer_3/mlp/square"}}
  ROOT %a.2 = bf16[8]{{0}} add(%a.1, %p), metadata={{op_name="{STEP}/jvp(Gpt)/Gpt.features/layer_3/mlp/square"}}
}}

ENTRY %main (p0: bf16[8]) -> (bf16[8], s32[]) {{
  %loop_multiply_fusion.7 = bf16[8]{{0}} fusion(%p0), kind=kLoop, calls=%fused_mlp
  %loop.3 = (s32[], bf16[8]{{0}}) while(%t), condition=%c, body=%b, metadata={{op_name="{STEP}/while"}}
  %cublas-gemm.5 = (bf16[8]{{0}}, s8[4]{{0}}) custom-call(%p0, %p0), custom_call_target="__cublas$gemm",\
 metadata={{op_name="{STEP}/transpose(jvp(Gpt))/Gpt.features/loop/layer_5/attention/dot_general" stack_frame_id=9}}
  %input_reduce_fusion = f32[] fusion(%p0), kind=kInput, calls=%r, metadata={{op_name="{STEP}/jvp(Gpt)/while/body/exp"}}
  ROOT %copy.1 = (bf16[8]{{0}}, s32[]) tuple(%p0, %p0), metadata={{op_name="jit(step)/optimizer/mul"}}
}}
"""


def test_instructions_are_read_with_their_scopes():
    instructions = read_instructions(HLO)
    assert {name: instruction.opcode for name, instruction in instructions.items()} == {
        "p": "parameter",
        "a_1": "multiply",
        "a_2": "add",
        "loop_multiply_fusion_7": "fusion",
        "loop_3": "while",
        "cublas_gemm_5": "custom-call",
        "input_reduce_fusion": "fusion",
        "copy_1": "tuple",
    }
    # The fusion has no scope of its own and takes that of what is in it.
    assert module_of(instructions["loop_multiply_fusion_7"].op_name) == "mlp"
    gemm = instructions["cublas_gemm_5"].op_name
    assert (module_of(gemm), pass_of(gemm)) == ("attention", "backward")
    head = instructions["input_reduce_fusion"].op_name
    assert (module_of(head), pass_of(head)) == ("head + loss", "")


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("jit(step)/optimizer/mul", "optimiser"),
        ("jit(step)/reduce/psum", "gradient reduction"),
        (f"{STEP}/jvp(Gpt)/Gpt.features/while/body/closed_call/loop/layer_4/mul", "residual stream, skips, norms"),
        (f"{STEP}/jvp(Gpt)/Gpt.features/cos", "embedding, rotary tables, intervals"),
        (f"{STEP}/jvp(Gpt2)/Gpt2.features/gather", "embedding, rotary tables, intervals"),
        (f"{STEP}/jvp(Gpt2)/Gpt2.features/layer_0/mlp/up/dot_general", "mlp"),
        (f"{STEP}/jvp(Gpt2)/while/body/dot_general", "head + loss"),
        (f"{STEP}/add", "gradient accumulation"),
        ("reduce_sum", "unattributed"),
        ("", "unattributed"),
    ],
)
def test_scopes_name_the_part_of_the_step(path, module):
    assert module_of(path) == module


def test_recomputation_is_told_from_the_backward_pass():
    path = f"{STEP}/transpose(jvp(Gpt))/Gpt.features/layer_0/rematted_computation/layer_0/mlp/dot_general"
    assert pass_of(path) == "recomputed"


@pytest.mark.parametrize(
    ("kernel", "op_name", "group"),
    [
        ("flash_forward", "", kernels.ATTENTION_FORWARD),
        ("flash_backward_queries", "", kernels.ATTENTION_BACKWARD),
        ("flash_backward_keys_2", "", kernels.ATTENTION_BACKWARD),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_NNN", "", kernels.PRODUCTS),
        ("gemm_fusion_dot_12", "", kernels.PRODUCTS),
        ("nvjet_sm90_tst_192x192", f"{STEP}/jvp(Gpt)/while/body/dot_general", "head + loss"),
        ("nvjet_sm90_tst_192x192", "jit(step)/optimizer/dot_general", "optimiser"),
        ("ynn_fusion.3", f"{STEP}/jvp(Gpt)/Gpt.features/layer_0/attention/while/body/dot", kernels.ATTENTION_FORWARD),
        ("loop_add_fusion_3", "", kernels.ELEMENTWISE),
        ("input_reduce_fusion", "", kernels.REDUCTIONS),
        ("MemcpyD2D", "", kernels.COPIES),
        ("loop_transpose_fusion_1", "", kernels.COPIES),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "", kernels.COMMUNICATION),
        ("some_kernel_of_a_library", "", kernels.OTHER),
    ],
)
def test_kernels_fall_into_groups(kernel, op_name, group):
    assert group_of(kernel, Instruction("custom-call", op_name) if op_name else None) == group


def test_times_are_summed_by_kernel_and_traced_back_by_either_name():
    events = [
        Event("nvjet_sm90", "cublas-gemm.5", 0, 4e6),  # hlo_op, as without command buffers
        Event("nvjet_sm90", "cublas-gemm.5", 5e6, 4e6),
        Event("loop_multiply_fusion_7", "command_buffer_94", 10e6, 2e6),  # the kernel's own name
        Event("loop.3", "loop.3", 0, 99e6),  # a loop holds the others
        Event("mystery", None, 12e6, 2e6),
    ]
    times = kernel_times(events, read_instructions(HLO), steps=2)
    assert [(k.name, k.module, k.calls_per_step, k.ms_per_step) for k in times.kernels] == [
        ("nvjet_sm90", "attention", 1, 4),
        ("loop_multiply_fusion_7", "mlp", 0.5, 1),
        ("mystery", "unattributed", 0.5, 1),
    ]
    assert times.attributed == pytest.approx(5 / 6)
    assert time_by(times.kernels, "group") == {
        (kernels.PRODUCTS,): 4,
        (kernels.ELEMENTWISE,): 1,
        (kernels.OTHER,): 1,
    }


GPU_TRACE = """
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 9000 } }
         event_metadata { key: 1 value { id: 1 name: "host work" } } }
planes { name: "/device:GPU:1" lines { name: "Stream #7" events { metadata_id: 1 duration_ps: 9000 } }
         event_metadata { key: 1 value { id: 1 name: "of another device" } } }
planes { name: "/device:GPU:0"
  lines { id: 1 name: "XLA Ops" events { metadata_id: 1 duration_ps: 7000 } }
  lines { id: 2 name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 3000 duration_ps: 2000 stats { metadata_id: 1 str_value: "command_buffer_94" } }
    events { metadata_id: 2 offset_ps: 1000 duration_ps: 1000 stats { metadata_id: 1 ref_value: 2 } } }
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_sm90" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "cublas-gemm.5" } } }
"""


def test_a_gpu_trace_is_read_from_the_streams_of_its_first_device(tmp_path):
    trace = jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_TRACE)
    (tmp_path / "host.xplane.pb").write_bytes(trace)
    assert read_events(tmp_path) == [
        Event("nvjet_sm90", "cublas-gemm.5", 1, 1),
        Event("loop_add_fusion_3", "command_buffer_94", 3, 2),
    ]
    assert read_events(tmp_path / "nowhere") == []


def test_overlapping_kernels_keep_the_device_busy_once():
    assert busy_fraction([Event("a", None, 0, 4), Event("b", None, 2, 4), Event("c", None, 8, 2)]) == pytest.approx(0.8)
    assert busy_fraction([Event("a", None, 0, 10), Event("b", None, 2, 1), Event("c", None, 5, 5)]) == 1
    assert busy_fraction([]) is None
