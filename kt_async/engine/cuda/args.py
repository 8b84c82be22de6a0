"""ctypes mirrors of the structs that the CUDA kernels take (native/cuda/*.cu)."""

from __future__ import annotations

import ctypes

_I32 = ctypes.c_int32
_I64 = ctypes.c_int64
_F32 = ctypes.c_float
_PTR = ctypes.c_void_p


class MatrixArg(ctypes.Structure):
    """struct Matrix of linear.cu."""

    _fields_ = (
        ("data", _PTR),
        ("band_bytes", _I64),
        ("expert_bytes", _I64),
        ("type", _I32),
        ("rows", _I32),
        ("cols", _I32),
        ("num_bands", _I32),
    )


class ActsArg(ctypes.Structure):
    """struct Acts of linear.cu."""

    _fields_ = (("q", _PTR), ("meta", _PTR), ("blocks", _I32))


class OutputsArg(ctypes.Structure):
    """struct Outputs of linear.cu."""

    _fields_ = (
        ("w", MatrixArg * 3),
        ("out", _PTR * 3),
        ("bias", _PTR * 3),
        ("residual", _PTR),
    )


class CutArg(ctypes.Structure):
    """struct Cut of linear.cu."""

    _fields_ = (
        ("parts", _I32),
        ("split", _I32),
        ("stages", _I32),
        ("stage_bytes", _I32),
        ("part_floats", _I32),
        ("sums", _I32),
    )


class PromptTilesArg(ctypes.Structure):
    """struct PromptTiles of prompt_experts.cu."""

    _fields_ = (("x", _PTR), ("order", _PTR), ("top_k", _I32), ("ends", _PTR), ("turns", _I32))


class PreparedArg(ctypes.Structure):
    """struct Prepared of step.cu."""

    _fields_ = (("f32", _PTR), ("bf16", _PTR), ("quantized", ActsArg))


class RopeArg(ctypes.Structure):
    """struct Rope of step.cu."""

    _fields_ = (
        ("inverse_frequencies", _PTR),
        ("q_norm", _PTR),
        ("k_norm", _PTR),
        ("eps", _F32),
        ("multiplier", _F32),
        ("q_heads", _I32),
        ("kv_heads", _I32),
        ("dim", _I32),
        ("rotary_dims", _I32),
        ("neox", _I32),
        ("fp8", _I32),
    )


class RoutingArg(ctypes.Structure):
    """struct Routing of step.cu."""

    _fields_ = (
        ("experts", _I32),
        ("top_k", _I32),
        ("sigmoid", _I32),
        ("renormalise", _I32),
        ("groups", _I32),
        ("groups_used", _I32),
        ("sum_of_two", _I32),
        ("scale", _F32),
        ("selection_bias", _PTR),
    )


class GroupsArg(ctypes.Structure):
    """struct Groups of linear.cu."""

    _fields_ = (("active", _PTR), ("start", _PTR), ("order", _PTR))


class DecodeStepArg(ctypes.Structure):
    """struct DecodeStep of attention.cu."""

    _fields_ = (
        ("page_start", _PTR),
        ("last_page_len", _PTR),
        ("page_ids", _PTR),
        ("positions", _PTR),
        ("kv_slot", _PTR),
        ("rows", _I32),
        ("page_size", _I32),
    )


class PartialsArg(ctypes.Structure):
    """struct Partials of attention.cu."""

    _fields_ = (("values", _PTR), ("scales", _PTR), ("arrived", _PTR))


class RouterInputArg(ctypes.Structure):
    """struct RouterInput of router.cu."""

    _fields_ = (
        ("x", _PTR),
        ("norm", _PTR),
        ("eps", _F32),
        ("cols", _I32),
        ("weight", _PTR),
        ("to", PreparedArg),
    )


class SignalArg(ctypes.Structure):
    """struct Signal of router.cu."""

    _fields_ = (("x", _PTR), ("ids", _PTR), ("weights", _PTR), ("flag", _PTR))


class RouterOutputArg(ctypes.Structure):
    """struct RouterOutput of router.cu."""

    _fields_ = (
        ("logits", _PTR),
        ("arrived", _PTR),
        ("ids", _PTR),
        ("weights", _PTR),
        ("groups", GroupsArg),
        ("signal", SignalArg),
    )


class SampleSharesArg(ctypes.Structure):
    """struct SampleShares of sample.cu."""

    _fields_ = (("best", _PTR), ("at", _PTR), ("arrived", _PTR))


class PiecesArg(ctypes.Structure):
    """struct Pieces of step.cu."""

    _fields_ = (("start", _I32 * 16), ("count", _I32 * 16))
