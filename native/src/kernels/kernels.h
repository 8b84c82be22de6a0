// kernels.h: what the rest of the library may ask of the CPU kernels.
//
// Two tables of function pointers exist per ISA: MatrixKernels (quantised matrix x few rows, file
// matrix_<isa>.cpp) and VectorKernels (norms, rope, attention, sampling; file vector_<isa>.cpp).
// dispatch.cpp picks them once per pool. ISA files are compiled with their own -m flags, so they
// include only freestanding headers and intrinsics and export no weak symbols: every helper they
// need lives in an anonymous namespace.
//
// Weights are packed into bands of 16 output rows (layout R16, see pack.h); activations are
// prepared once per row into an opaque form that all weight types of one ActKind share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

inline constexpr int kBandRows = 16;

// How the inputs of a matrix are represented while they are multiplied.
enum ActKind : int32_t {
  kActF32 = 0,   // as they are: F32, F16, BF16 weights and the generic path
  kActQ8 = 1,    // int8 with one f32 scale per 32 columns, plus the sums the k-quants need
  kActBf16 = 2,  // bf16, scaled and permuted for multiply_prompt, 64 bytes for every 32 columns;
                 // fits where a kActQ8 row does
};

// Packed weights of one tensor. Owned by whoever packed them; immutable afterwards.
struct Matrix {
  int32_t type = 0;  // ggml type
  int32_t rows = 0;  // output features per expert
  int32_t cols = 0;  // input features
  int32_t num_experts = 1;
  int32_t num_bands = 0;  // per expert: ceil(rows / 16); missing rows are zero
  ActKind act = kActF32;
  int64_t band_bytes = 0;         // multiple of 64
  int64_t expert_bytes = 0;       // num_bands * band_bytes
  const uint8_t* data = nullptr;  // 64-byte aligned
};

inline const uint8_t* band_at(const Matrix& w, int32_t expert, int32_t band) {
  return w.data + expert * w.expert_bytes + band * w.band_bytes;
}

// Bytes of one prepared activation row (multiple of 64).
int64_t act_row_bytes(ActKind kind, int32_t cols);
// Bytes of per-thread scratch that multiply_band may need for a matrix with `cols` columns.
int64_t multiply_scratch_bytes(int32_t cols);

// Most rows of one multiply_prompt: their prepared form then stays in the L2 cache while bands go
// by.
inline constexpr int32_t kPromptRows = 256;
// Bands worth multiplying by one call: what begins and ends a call is a sixth of two bands' time.
inline constexpr int32_t kPromptBands = 8;

// Rows of one multiply_prompt, prepared as kActBf16: columns [32 k, 32 k + 32) of row i, 64 bytes,
// lie at acts + i * row_stride + k * line_stride. line_stride is 64 for rows as prepare() leaves
// them; lines of all rows next to each other (row_stride 64) are multiplied faster.
struct PromptRows {
  const uint8_t* acts = nullptr;
  int64_t row_stride = 0;
  int64_t line_stride = 64;
  int32_t m = 0;
  // What this thread reads afterwards, or nullptr: brought into its L2 cache meanwhile.
  const uint8_t* ahead = nullptr;
  int64_t ahead_bytes = 0;
};

struct MatrixKernels {
  int32_t isa;
  // Prepares columns [first, first + count) of one row; x points at column `first`, dst at the
  // start of the row's prepared form. first and count are multiples of 32 (count may end at cols).
  // Disjoint column ranges of one row may be prepared by different threads.
  void (*prepare)(ActKind kind, const float* x, int32_t cols, int32_t first, int32_t count,
                  uint8_t* dst);
  // out[i * out_stride + r] = dot(row `band * 16 + r`, activation rows[i]) for i < m, r < 16.
  // acts: prepared rows, act_stride bytes apart; rows: indices into them, or nullptr for 0..m-1.
  // Any m >= 1: the band is read from memory once. scratch: multiply_scratch_bytes(cols).
  // next: the band that this thread multiplies next, of any matrix with an equal band size, or
  // nullptr; its beginning is asked for while the end of this band is computed.
  // The order of additions does not depend on m: a row gives the same bits alone and in company.
  void (*multiply_band)(const Matrix& w, int32_t expert, int32_t band, const uint8_t* acts,
                        int64_t act_stride, const int32_t* rows, int32_t m, float* out,
                        int64_t out_stride, void* scratch, const uint8_t* next);
  // Many rows at bf16 precision, prompt tokens, at most kPromptRows; nullptr where multiply_band
  // serves them as well. For matrices whose act is kActQ8. out[i * out_stride + r], r < 16 *
  // num_bands; several bands together are faster than band by band. next: the first one of the
  // bands that this thread multiplies next, or nullptr. Equal bits alone and in company here too,
  // but others than multiply_band's: a token is multiplied in one way for as long as its state
  // lives.
  void (*multiply_prompt)(const Matrix& w, int32_t expert, int32_t band, int32_t num_bands,
                          const PromptRows& rows, float* out, int64_t out_stride, void* scratch,
                          const uint8_t* next);
  // Runs `rounds` rounds of independent multiply-adds in registers, with the widest integer
  // (kind 0), bf16 (1) or f32 (2) instruction; returns how many multiply-adds that were, 0 when the
  // ISA has no such instruction. For kt_bench_peak.
  int64_t (*peak)(int32_t kind, int64_t rounds);
};

// The form in which a token's row of `kind` is prepared.
inline ActKind form_of(ActKind kind, bool is_prompt) {
  return is_prompt && kind == kActQ8 ? kActBf16 : kind;
}

// nullptr when this build lacks the ISA. Whether the CPU allows it is host/features.h's business.
const MatrixKernels* matrix_kernels(int32_t isa);

// ---- packing (pack.cpp; ISA independent) ----

// Activation kind and band size of a type, or false when the type is unknown.
bool matrix_format(int32_t type, int32_t cols, ActKind* act, int64_t* band_bytes);
// Packs / unpacks one band of up to 16 rows; src rows are row_bytes apart in GGUF order.
void pack_band(int32_t type, int32_t cols, const uint8_t* src, int64_t row_bytes, int32_t num_rows,
               uint8_t* band);
void unpack_band(int32_t type, int32_t cols, const uint8_t* band, int64_t row_bytes,
                 int32_t num_rows, uint8_t* dst);

// ---- types (types.cpp) ----

struct TypeTraits {
  int32_t type;
  const char* name;
  int32_t block_size;
  int32_t block_bytes;
  int32_t has_kernel;  // as kt_type_info
};
const TypeTraits* type_traits(int32_t type);  // nullptr when unknown
// Bit-exact with gguf's reference for whole blocks.
void dequantize_row(int32_t type, const uint8_t* src, int64_t num_weights, float* dst);

}  // namespace kt
