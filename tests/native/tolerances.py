"""Every numeric tolerance of the native kernel tests, each with its reason."""

from __future__ import annotations

# Relative error (Frobenius norm) of a product with exactly decoded weights, f64 reference.
# F32, F16 and BF16 weights meet f32 activations: f32 rounding of a few hundred additions.
FLOAT_PRODUCT = 2e-6
# BF16 weights in AMX tiles: activations are split in two bf16 numbers, 16 bits of precision.
BF16_TILE_PRODUCT = 1e-5
# Activations are rounded to int8 with one scale per 32: the step is max|x| / 127, about 1/50 of a
# standard deviation of Gaussian data, its error 1/sqrt(12) of that; observed 4e-3 .. 7e-3.
INT8_PRODUCT = 1.2e-2
# Prompt rows in AMX tiles: weights and activations are rounded to bf16, by 2^-9 at most, spread
# evenly: 1.1e-3 each where they are random.
PROMPT_PRODUCT = 4e-3
# Weights times the activations as they are after rounding: only f32 additions differ.
ROUNDED_PRODUCT = 2e-6
# The same product on another ISA: equal integers, f32 terms grouped and fused differently.
BETWEEN_ISAS = 1e-6  # BF16 on AMX: BF16_TILE_PRODUCT
