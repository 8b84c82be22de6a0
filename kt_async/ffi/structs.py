"""ctypes mirrors of the structs and constants in native/include/kt.h, in header order.

`ffi.lib` compares every offset and size with the library's own table when it loads.
"""

from __future__ import annotations

import ctypes
from typing import TypeVar

StructT = TypeVar("StructT", bound=ctypes.Structure)

KT_ABI_VERSION = 1
KT_OK = 0
KT_FULL = 1
KT_IDLE = 2
KT_TIMEOUT = 3
KT_ERR_ARGUMENT = -1
KT_ERR_MEMORY = -2
KT_ERR_UNSUPPORTED = -3
KT_ERR_STATE = -4
KT_ERR_ABI = -5
KT_ERR_INTERNAL = -6
KT_ISA_AUTO = -1
KT_ISA_SCALAR = 0
KT_ISA_AVX2 = 1
KT_ISA_AVX512 = 2
KT_ISA_AVX512VNNI = 3
KT_ISA_AMX = 4
KT_KV_F32 = 0
KT_KV_F16 = 1
KT_KV_BF16 = 2
KT_WEIGHT_MATRIX = 0
KT_WEIGHT_VECTOR = 1
KT_WEIGHT_BORROW = 2
KT_OP_EMBED = 1
KT_OP_RMSNORM = 2
KT_OP_LINEAR = 3
KT_OP_ATTENTION = 4
KT_OP_MOE = 5
KT_OP_SILU_MUL = 6
KT_OP_ADD = 7
KT_OP_GATE_ADD = 8
KT_OP_GATHER = 9
KT_MAX_LOGPROBS = 20
KT_EXPERTS_GATE = 0
KT_EXPERTS_UP = 1
KT_EXPERTS_DOWN = 2
KT_EXPERT_JOB_FAILED = 0x80000000
KT_HANDOFF_SPIN = 0
KT_HANDOFF_WAIT_VALUE = 1
KT_HANDOFF_HOST_CALL = 2
KT_SCHED_FCFS = 0
KT_SCHED_FCFS_SINGLE_PREFILL = 1
KT_SCHED_PREFIX_CACHE = 1
KT_SCHED_LOOKAHEAD = 2
KT_SCHED_JOURNAL = 4
KT_EVENT_TOKEN = 1
KT_EVENT_PROMPT_LOGPROB = 2
KT_EVENT_FINISH = 3
KT_FINISH_NONE = 0
KT_FINISH_STOP = 1
KT_FINISH_LENGTH = 2
KT_FINISH_CANCELLED = 3
KT_FINISH_TIMEOUT = 4
KT_FINISH_ERROR = 5


class AbiField(ctypes.Structure):
    """Mirror of kt_abi_field."""

    _fields_ = (
        ("struct_name", ctypes.c_char_p),
        ("field_name", ctypes.c_char_p),
        ("offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


class HostInfo(ctypes.Structure):
    """Mirror of kt_host_info."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("isa_mask", ctypes.c_uint32),
        ("best_isa", ctypes.c_int32),
        ("num_cpus", ctypes.c_int32),
        ("num_cores", ctypes.c_int32),
        ("num_nodes", ctypes.c_int32),
        ("quota_millicpus", ctypes.c_int32),
        ("l1d_bytes", ctypes.c_int32),
        ("l2_bytes", ctypes.c_int32),
        ("l3_bytes", ctypes.c_int32),
        ("total_bytes", ctypes.c_int64),
        ("available_bytes", ctypes.c_int64),
        ("cpu_name", ctypes.c_char * 64),
    )


class TypeInfo(ctypes.Structure):
    """Mirror of kt_type_info."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("block_bytes", ctypes.c_int32),
        ("has_kernel", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("name", ctypes.c_char * 16),
    )


class PoolConfig(ctypes.Structure):
    """Mirror of kt_pool_config."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_threads", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("spin_us", ctypes.c_int32),
        ("pin", ctypes.c_int32),
        ("fake_nodes", ctypes.c_int32),
    )


class ModelConfig(ctypes.Structure):
    """Mirror of kt_model_config."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("max_tokens", ctypes.c_int32),
        ("max_rows", ctypes.c_int32),
        ("max_logit_rows", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("num_pages", ctypes.c_int32),
        ("kv_type", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("sample_vocab", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Tensor(ctypes.Structure):
    """Mirror of kt_tensor."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("num_bytes", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


class Op(ctypes.Structure):
    """Mirror of kt_op."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("code", ctypes.c_int32),
        ("in", ctypes.c_int32 * 4),
        ("out", ctypes.c_int32 * 2),
        ("w", ctypes.c_int32 * 6),
        ("i", ctypes.c_int32 * 8),
        ("f", ctypes.c_float * 4),
    )


class SampleParams(ctypes.Structure):
    """Mirror of kt_sample_params."""

    _fields_ = (
        ("seq_id", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("token_index", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("position", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("num_logprobs", ctypes.c_int32),
        ("bias_start", ctypes.c_int32),
        ("bias_count", ctypes.c_int32),
        ("history_start", ctypes.c_int32),
        ("history_count", ctypes.c_int32),
        ("row", ctypes.c_int32),
        ("mask_row", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class BlockLayout(ctypes.Structure):
    """Mirror of kt_block_layout."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("max_tokens", ctypes.c_int32),
        ("max_rows", ctypes.c_int32),
        ("max_samples", ctypes.c_int32),
        ("num_bytes", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("token_row", ctypes.c_int64),
        ("kv_slot", ctypes.c_int64),
        ("row_start", ctypes.c_int64),
        ("context_len", ctypes.c_int64),
        ("page_start", ctypes.c_int64),
        ("last_page_len", ctypes.c_int64),
        ("num_prompt", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("page_ids", ctypes.c_int64),
        ("bias_ids", ctypes.c_int64),
        ("bias_values", ctypes.c_int64),
        ("history_ids", ctypes.c_int64),
        ("history_counts", ctypes.c_int64),
        ("copies_out", ctypes.c_int64),
        ("copies_in", ctypes.c_int64),
    )


class Plan(ctypes.Structure):
    """Mirror of kt_plan."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_tokens", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("num_decode_rows", ctypes.c_int32),
        ("num_samples", ctypes.c_int32),
        ("num_page_ids", ctypes.c_int32),
        ("num_bias", ctypes.c_int32),
        ("num_history", ctypes.c_int32),
        ("num_copies_out", ctypes.c_int32),
        ("num_copies_in", ctypes.c_int32),
        ("lane_waits", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("step_id", ctypes.c_uint64),
        ("used_bytes", ctypes.c_int64),
    )


class SampleOut(ctypes.Structure):
    """Mirror of kt_sample_out."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_samples", ctypes.c_int32),
        ("tokens", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
    )


class ModelStats(ctypes.Structure):
    """Mirror of kt_model_stats."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_ops", ctypes.c_int32),
        ("weight_bytes", ctypes.c_int64),
        ("kv_bytes", ctypes.c_int64),
        ("buffer_bytes", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("run_ns", ctypes.c_int64),
        ("expert_ns", ctypes.c_int64),
        ("attention_ns", ctypes.c_int64),
        ("linear_ns", ctypes.c_int64),
        ("sample_ns", ctypes.c_int64),
    )


class PackedPart(ctypes.Structure):
    """Mirror of kt_packed_part."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("num_bands", ctypes.c_int32),
        ("first_band", ctypes.c_int32),
        ("num_parts", ctypes.c_int32),
        ("band_bytes", ctypes.c_int64),
        ("expert_bytes", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


class ExpertJob(ctypes.Structure):
    """Mirror of kt_expert_job."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("layer", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("num_spared", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("number", ctypes.c_uint32),
        ("x", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("is_prompt", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("request", ctypes.c_void_p),
        ("done", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_int64),
        ("times_ns", ctypes.c_void_p),
    )


class Copy(ctypes.Structure):
    """Mirror of kt_copy."""

    _fields_ = (("to", ctypes.c_void_p), ("from", ctypes.c_void_p), ("num_bytes", ctypes.c_int64))


class HandoffConfig(ctypes.Structure):
    """Mirror of kt_handoff_config."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_layers", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("mechanism", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("request", ctypes.c_void_p),
        ("done", ctypes.c_void_p),
    )


class GpuStep(ctypes.Structure):
    """Mirror of kt_gpu_step."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_tokens", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("graph_exec", ctypes.c_void_p),
        ("block_device", ctypes.c_void_p),
        ("block_host", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("results_host", ctypes.c_void_p),
        ("results_device", ctypes.c_void_p),
        ("results_bytes", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("expert_ns", ctypes.c_int64),
        ("asked_ns", ctypes.c_void_p),
    )


class SchedConfig(ctypes.Structure):
    """Mirror of kt_sched_config."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("policy", ctypes.c_int32),
        ("max_batch_size", ctypes.c_int32),
        ("chunk_size", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("num_pages", ctypes.c_int32),
        ("max_len", ctypes.c_int32),
        ("max_queue", ctypes.c_int32),
        ("max_samples", ctypes.c_int32),
        ("watermark_pages", ctypes.c_int32),
        ("num_host_pages", ctypes.c_int32),
        ("queue_timeout_ns", ctypes.c_int64),
        ("target_itl_ns", ctypes.c_int64),
        ("priority_step_ns", ctypes.c_int64),
        ("lane_tokens", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Request(ctypes.Structure):
    """Mirror of kt_request."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_tokens", ctypes.c_int32),
        ("tokens", ctypes.c_void_p),
        ("seq_id", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("cache_salt", ctypes.c_uint64),
        ("max_tokens", ctypes.c_int32),
        ("min_tokens", ctypes.c_int32),
        ("priority", ctypes.c_int32),
        ("num_stop_ids", ctypes.c_int32),
        ("stop_ids", ctypes.c_void_p),
        ("bias_ids", ctypes.c_void_p),
        ("bias_values", ctypes.c_void_p),
        ("num_bias", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("num_logprobs", ctypes.c_int32),
        ("prompt_logprobs", ctypes.c_int32),
    )


class Event(ctypes.Structure):
    """Mirror of kt_event."""

    _fields_ = (
        ("seq_id", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("finish", ctypes.c_int32),
        ("token", ctypes.c_int32),
        ("token_pos", ctypes.c_int32),
        ("sample_row", ctypes.c_int32),
        ("num_cached", ctypes.c_int32),
        ("admit_ns", ctypes.c_int64),
    )


class SchedStats(ctypes.Structure):
    """Mirror of kt_sched_stats."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_waiting", ctypes.c_int32),
        ("num_running", ctypes.c_int32),
        ("pages_total", ctypes.c_int32),
        ("pages_free", ctypes.c_int32),
        ("pages_cached", ctypes.c_int32),
        ("pages_used", ctypes.c_int32),
        ("num_preempted", ctypes.c_int32),
        ("host_pages_total", ctypes.c_int32),
        ("host_pages_used", ctypes.c_int32),
        ("submitted", ctypes.c_uint64),
        ("finished", ctypes.c_uint64),
        ("cancelled", ctypes.c_uint64),
        ("preempted", ctypes.c_uint64),
        ("rejected", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("lane_steps", ctypes.c_uint64),
        ("prefill_tokens", ctypes.c_uint64),
        ("decode_tokens", ctypes.c_uint64),
        ("prefix_query_tokens", ctypes.c_uint64),
        ("prefix_hit_tokens", ctypes.c_uint64),
        ("evicted_pages", ctypes.c_uint64),
        ("copied_out_pages", ctypes.c_uint64),
        ("copied_in_pages", ctypes.c_uint64),
        ("timed_out", ctypes.c_uint64),
        ("plan_ns", ctypes.c_uint64),
        ("commit_ns", ctypes.c_uint64),
    )


def c_name(mirror: type[ctypes.Structure]) -> str:
    """The name in kt.h: SchedStats -> kt_sched_stats."""
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in mirror.__name__)
    return "kt" + words


def sized(mirror: type[StructT], **values: object) -> StructT:
    """A zeroed struct with struct_size set and the given fields filled."""
    result = mirror()
    result.struct_size = ctypes.sizeof(mirror)
    for name, value in values.items():
        setattr(result, name, value)
    return result


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(experts, rows, cols) of a tensor of one to three dimensions; a vector is one row."""
    experts, rows, cols = (1, 1, *shape)[-3:]
    return experts, rows, cols


def tensor_at(ggml_type: int, shape: tuple[int, ...], num_bytes: int, address: int) -> Tensor:
    """kt_tensor for GGUF bytes at an address."""
    experts, rows, cols = matrix_shape(shape)
    return sized(
        Tensor,
        type=int(ggml_type),
        num_experts=experts,
        rows=rows,
        cols=cols,
        num_bytes=num_bytes,
        data=address,
    )
