"""Kernels of a trace: their times, by kind and by the module that their program names."""

import jax
import pytest

from senano_jax.profiling import kernels
from senano_jax.profiling.hlo import Instruction, module_of, pass_of, read_instructions
from senano_jax.profiling.kernels import Event, busy_fraction, group_of, kernel_times, read_events, time_by

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
        (f"{STEP}/jvp(Gpt)/Gpt.features/trunk/layer_0/layer_0.attend/attention/while/body/dot_general", "attention"),
        (f"{STEP}/jvp(Gpt)/Gpt.features/trunk/layer_0/layer_0.mixed/add", "residual stream, skips, norms"),
        (f"{STEP}/transpose(jvp(Gpt))/Gpt.features/trunk/pad", "residual stream, skips, norms"),
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
        ("matmul_mosaic_gpu_kernel", f"{STEP}/jvp(Gpt)/Gpt.features/layer_0/mlp/jvp()/mpmd_map", kernels.PRODUCTS),
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
