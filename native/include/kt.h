/* kt.h: the whole public C surface of the kt_async native library. Valid C11.
 *
 * Conventions
 *  - Every function returns int32_t: KT_OK (0), a positive expected outcome, or a negative error.
 *    After a negative code kt_last_error() describes it (thread-local, valid until the next failing
 *    call on that thread). Unless a comment says otherwise, an object is unchanged after an error.
 *  - Handles are opaque; kt_x_destroy accepts NULL and joins the threads the handle owns.
 *  - Structs hold fixed-width integers, floats and pointers without hidden padding. Input structs
 *    begin with struct_size = sizeof(struct); reserved members must be zero.
 *  - The caller allocates. Nothing allocated here crosses the boundary.
 *  - Threads: [setup] before serving, one thread; [any] any thread; [loop] event loop; [engine] the
 *    engine thread. Nothing here prints, exits, throws or calls back.
 *  - Dimensions: T tokens of a step, R rows (sequences) of a step, S logit rows, H hidden size,
 *    I intermediate size, E experts, K top_k, V vocabulary size, P pages. Matrices are row-major.
 */
#ifndef KT_H
#define KT_H

#include <stdint.h>

#if defined(__GNUC__)
#define KT_API __attribute__((visibility("default")))
#else
#define KT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define KT_ABI_VERSION 1

/* ---- status codes: never renumbered ---- */
#define KT_OK 0
#define KT_FULL 1    /* bounded resource is full; try later */
#define KT_IDLE 2    /* nothing to do */
#define KT_TIMEOUT 3 /* the wait ended by time */
#define KT_ERR_ARGUMENT (-1)
#define KT_ERR_MEMORY (-2)
#define KT_ERR_UNSUPPORTED (-3)
#define KT_ERR_STATE (-4)
#define KT_ERR_ABI (-5)
#define KT_ERR_INTERNAL (-6) /* broken invariant: the handle refuses every later call */

/* ---- library ---- */

/* One field of one public struct, for comparing a binding's layout with this build's. */
typedef struct kt_abi_field {
  const char* struct_name;
  const char* field_name; /* "" describes the struct itself: offset 0, size = sizeof */
  uint32_t offset;        /* bytes */
  uint32_t size;          /* bytes */
} kt_abi_field;

KT_API int32_t kt_abi_version(void); /* [any] returns KT_ABI_VERSION, not a status */
/* [any] *table points at static memory. */
KT_API int32_t kt_abi_fields(const kt_abi_field** table, int32_t* num_fields);
/* [any] JSON object: version, compiler, compiled ISA list. Static memory. */
KT_API const char* kt_build_info(void);
/* [any] Never NULL; "" when this thread has seen no error. */
KT_API const char* kt_last_error(void);

/* ---- host ---- */

#define KT_ISA_AUTO (-1)
#define KT_ISA_SCALAR 0
#define KT_ISA_AVX2 1       /* AVX2 + FMA + F16C */
#define KT_ISA_AVX512 2     /* F, BW, VL, DQ */
#define KT_ISA_AVX512VNNI 3 /* AVX512 + VNNI + BF16 */
#define KT_ISA_AMX 4        /* AVX512VNNI + AMX tile, int8, bf16 + AVX512-FP16, VBMI */

typedef struct kt_host_info {
  uint32_t struct_size;
  uint32_t isa_mask; /* bit KT_ISA_x set when CPU, OS and this build allow x */
  int32_t best_isa;
  int32_t num_cpus;        /* logical CPUs this process may run on */
  int32_t num_cores;       /* physical cores among them */
  int32_t num_nodes;       /* NUMA nodes among them */
  int32_t quota_millicpus; /* cgroup CPU quota; -1 without one */
  int32_t l1d_bytes;
  int32_t l2_bytes;
  int32_t l3_bytes;
  int64_t total_bytes;     /* RAM */
  int64_t available_bytes; /* MemAvailable, lowered to the cgroup's limit */
  char cpu_name[64];       /* NUL-terminated */
} kt_host_info;

KT_API int32_t kt_host_query(kt_host_info* out); /* [any] */

/* ---- tensor types (numbers are ggml's) ---- */

typedef struct kt_type_info {
  uint32_t struct_size;
  int32_t type;
  int32_t block_size;  /* weights per block */
  int32_t block_bytes; /* bytes per block */
  int32_t has_kernel;  /* 0: refused; 1: generic path (dequantise, then float); 2: fast path */
  int32_t reserved;
  char name[16]; /* "Q4_K" */
} kt_type_info;

/* [any] KT_ERR_UNSUPPORTED for a number this build does not know. */
KT_API int32_t kt_type_query(int32_t type, kt_type_info* out);
/* [any] src: num_weights of `type` in GGUF order; dst: f32 [num_weights]. num_weights must be a
 * multiple of the block size. Exactly the values of gguf's reference dequantiser. */
KT_API int32_t kt_dequantize(int32_t type, const void* src, int64_t num_weights, float* dst);

/* ---- worker pool: pinned threads that run the CPU kernels ---- */

typedef struct kt_pool kt_pool;

typedef struct kt_pool_config {
  uint32_t struct_size;
  int32_t num_threads; /* workers including the calling thread; 0 = one per physical core within
                          quota */
  int32_t isa;         /* KT_ISA_x; an ISA the machine lacks is KT_ERR_UNSUPPORTED */
  int32_t spin_us;     /* how long an idle worker spins before it sleeps; -1 = default */
  int32_t pin;         /* 1 pins workers to cores, 0 leaves them to the OS */
  int32_t fake_nodes;  /* 0 = the machine's NUMA nodes; n > 0 pretends n nodes (tests) */
} kt_pool_config;

KT_API int32_t kt_pool_create(const kt_pool_config* config, kt_pool** out); /* [setup] */
KT_API int32_t kt_pool_destroy(kt_pool* pool); /* [setup] no model may use it any more */
/* [any] The core on which no worker is pinned, left to the thread that runs jobs; -1 when workers
 * are not pinned. The pool does not pin its caller. */
KT_API int32_t kt_pool_caller_cpu(const kt_pool* pool, int32_t* cpu);
/* [any] One line of text: threads, cores and nodes. Truncated to capacity, always NUL-terminated.
 */
KT_API int32_t kt_pool_describe(const kt_pool* pool, char* text, int32_t capacity);

/* ---- model program: the CPU forward pass as a list of operations ----
 * A program is recorded once at start-up (buffers, weights, operations in order) and then executed
 * for every step by all workers of the pool without returning to the caller. Buffers are f32
 * [rows, width]; rows is T or S of the step. Weights are packed into the kernels' own layout when
 * they are added, so that the caller may drop the source pages afterwards. */

typedef struct kt_model kt_model;

#define KT_KV_F32 0
#define KT_KV_F16 1
#define KT_KV_BF16 2

typedef struct kt_model_config {
  uint32_t struct_size;
  int32_t max_tokens;     /* largest T */
  int32_t max_rows;       /* largest R */
  int32_t max_logit_rows; /* largest S */
  int32_t page_size;      /* token positions per KV page; multiple of 16 */
  int32_t num_pages;
  int32_t kv_type;      /* KT_KV_x */
  int32_t vocab_size;   /* width of the logits buffer that the sampler reads */
  int32_t sample_vocab; /* ids >= this are never sampled (padding rows of the vocabulary) */
  int32_t reserved;
} kt_model_config;

typedef struct kt_tensor {
  uint32_t struct_size;
  int32_t type;        /* ggml type */
  int32_t num_experts; /* 1 for an ordinary matrix */
  int32_t rows;        /* output features (per expert) */
  int32_t cols;        /* input features */
  int32_t reserved;
  int64_t num_bytes; /* size of data; checked against type and shape */
  const void* data;  /* [num_experts, rows, cols] in GGUF order; read during the call only, except
                        with KT_WEIGHT_BORROW, where it must outlive the model */
} kt_tensor;

#define KT_WEIGHT_MATRIX 0 /* packed for linear and expert operations */
#define KT_WEIGHT_VECTOR 1 /* small f32 data (norms, biases), converted to f32 */
#define KT_WEIGHT_BORROW 2 /* left where it is in GGUF order (embedding table) */

/* Operation codes. in/out name buffers, w weights, i/f parameters; unused entries are -1 / 0.
 * "rows" = T until KT_OP_GATHER, S for buffers derived from it. All outputs may alias in0 only
 * where said. */
/* clang-format off */
#define KT_OP_EMBED 1      /* out0[T,H] = w0[token] ; w0 borrowed [V,H] */
#define KT_OP_RMSNORM 2    /* out0 = in0 / rms(in0) * w0, over groups of i0 columns (0 = all); f0 = eps */
#define KT_OP_LINEAR 3     /* out0 = in0 . w0^T (+ w1 bias vector) (+ in1 when in1 >= 0; out0 may be in1) */
#define KT_OP_ATTENTION 4  /* out0[T,QH*D] = paged causal GQA; in0 q [T,QH*D], in1 k [T,KH*D], in2 v.
                              Norms q and k per head when w0 (q) and w1 (k) are given, applies rope,
                              appends k and v to the pages of KV layer i0, attends.
                              i1 QH, i2 KH, i3 D, i4 rotary dims, i5 1 = neox (half-split) pairs;
                              w2 = f32 vector of i4/2 inverse frequencies; f0 eps, f1 softmax scale,
                              f2 multiplier of cos and sin (YaRN's attention factor; 0 means 1) */
#define KT_OP_MOE 5        /* out0[T,H] = in1 + sum over top-k of weight * down(silu(gate x) * (up x));
                              in0 = x, in1 = residual or -1 (out0 may be in1). w0 router [E,H],
                              w1 gate, w2 up [E,I,H], w3 down [E,H,I], w4 selection bias vector or -1.
                              i0 K, i1 scoring (0 softmax, 1 sigmoid), i2 1 = renormalise the K weights,
                              i3 expert groups, i4 groups kept (0 = no grouping), i5 group score
                              (0 best expert, 1 sum of best two); f0 scale of the weights (0 means 1) */
#define KT_OP_SILU_MUL 6   /* out0 = silu(in0) * in1; out0 may be in0 */
#define KT_OP_ADD 7        /* out0 = in0 + in1; out0 may be in0 */
#define KT_OP_GATE_ADD 8   /* out0 = in0 + sigmoid(in1[:,0]) * in2 : shared expert gate; out0 may be in0 */
#define KT_OP_GATHER 9     /* out0[S,H] = in0[logit_token[s]] */
/* clang-format on */

typedef struct kt_op {
  uint32_t struct_size;
  int32_t code;
  int32_t in[4];
  int32_t out[2];
  int32_t w[6];
  int32_t i[8];
  float f[4];
} kt_op;

/* ---- step metadata: one block of memory written by the scheduler, read by CPU or GPU ---- */

#define KT_MAX_LOGPROBS 20

/* How to sample one logit row (88 bytes). */
typedef struct kt_sample_params {
  uint64_t seq_id;
  uint64_t seed;
  int32_t token_index;    /* index into the step's T tokens whose hidden state gives the logits */
  int32_t target;         /* -1: sample; >= 0: prompt token whose log-probability is wanted */
  int32_t position;       /* generated tokens so far: counter of the random stream */
  int32_t top_k;          /* 0 = off */
  float temperature;      /* 0 = argmax */
  float top_p;            /* 1 = off */
  float min_p;            /* 0 = off */
  float presence_penalty; /* 0 = off */
  float frequency_penalty;
  float repetition_penalty; /* 1 = off */
  int32_t num_logprobs;     /* -1 none; 0 only the chosen token's; n most likely alternatives */
  int32_t bias_start;       /* range in the bias arrays */
  int32_t bias_count;
  int32_t history_start; /* range in the history arrays; empty unless a penalty is on */
  int32_t history_count;
  int32_t row;      /* row of the step this belongs to */
  int32_t mask_row; /* row of the allowed-token bit mask, -1 = everything is allowed */
  int32_t reserved;
} kt_sample_params;

/* Byte offsets of the arrays inside the block; fixed when the scheduler is created, so that one
 * copy moves a step and captured graphs may hold the addresses. In memory page_ids follows samples,
 * so that a short copy suffices for a step without bias and history. */
typedef struct kt_block_layout {
  uint32_t struct_size;
  int32_t max_tokens;
  int32_t max_rows;
  int32_t max_samples;
  int64_t num_bytes;     /* size of the whole block */
  int64_t tokens;        /* int32 [T] input ids; -1 - s means "the token that logit row s of the
                            previous step sampled" (look-ahead) */
  int64_t positions;     /* int32 [T] */
  int64_t token_row;     /* int32 [T] row that owns the token */
  int64_t kv_slot;       /* int32 [T] page_id * page_size + offset where its KV goes */
  int64_t row_start;     /* int32 [R + 1] token ranges (query indptr) */
  int64_t context_len;   /* int32 [R] KV length of the row after this step */
  int64_t page_start;    /* int32 [R + 1] ranges in page_ids (KV indptr) */
  int64_t last_page_len; /* int32 [R] used positions of the row's last page */
  int64_t num_prompt;  /* int32 [R] how many of the row's tokens are its prompt's: the first ones */
  int64_t samples;     /* kt_sample_params [S] */
  int64_t page_ids;    /* int32 [sum of pages] */
  int64_t bias_ids;    /* int32 */
  int64_t bias_values; /* float */
  int64_t history_ids; /* int32 distinct tokens of prompt and output */
  int64_t history_counts; /* int32 how often among the generated ones (0 = only in the prompt) */
  int64_t copies_out;     /* int32 [num_copies_out, 2] (page, host_page): page -> host */
  int64_t copies_in;      /* int32 [num_copies_in, 2] (page, host_page): host -> page */
} kt_block_layout;

typedef struct kt_plan {
  uint32_t struct_size;
  int32_t num_tokens;      /* T */
  int32_t num_rows;        /* R */
  int32_t num_decode_rows; /* rows 0 .. n-1: one token, not of a prompt, and a logit row each */
  int32_t num_samples;     /* S */
  int32_t num_page_ids;
  int32_t num_bias;
  int32_t num_history;
  int32_t num_copies_out; /* page copies between device and host tier; 0 without num_host_pages */
  int32_t num_copies_in;
  int32_t lane_waits; /* 1: prompt tokens were left to kt_sched_plan_lane */
  int32_t reserved;
  uint64_t step_id;
  int64_t used_bytes; /* all but the copies, which the host reads, lies before this */
} kt_plan;

/* Result of sampling; arrays owned by the caller, capacity >= S. */
typedef struct kt_sample_out {
  uint32_t struct_size;
  int32_t num_samples; /* capacity of the arrays */
  int32_t* tokens;     /* [S] sampled id, or the target itself */
  float* logprobs;  /* [S] log-probability of tokens[s] under the raw logits; filled when asked */
  int32_t* top_ids; /* [S, KT_MAX_LOGPROBS] most likely first */
  float* top_logprobs;  /* [S, KT_MAX_LOGPROBS] */
  const uint32_t* mask; /* allowed-token bits [rows, ceil(V / 32)] or NULL */
} kt_sample_out;

typedef struct kt_model_stats {
  uint32_t struct_size;
  int32_t num_ops;
  int64_t weight_bytes; /* packed weights */
  int64_t kv_bytes;
  int64_t buffer_bytes;
  int64_t steps;
  int64_t run_ns;    /* total inside kt_model_run */
  int64_t expert_ns; /* part of it inside expert operations */
  int64_t attention_ns;
  int64_t linear_ns;
  int64_t sample_ns;
} kt_model_stats;

KT_API int32_t kt_model_create(const kt_model_config* config, kt_pool* pool, kt_model** out);
KT_API int32_t kt_model_destroy(kt_model* model); /* [setup] */
/* [setup] width columns, f32. by_sample: 0 = T rows, 1 = S rows. */
KT_API int32_t kt_model_add_buffer(kt_model* model, int32_t width, int32_t by_sample,
                                   int32_t* buffer_id);
/* [setup] kind: KT_WEIGHT_x. Packs with all workers. Errors name sizes. */
KT_API int32_t kt_model_add_weight(kt_model* model, const kt_tensor* tensor, int32_t kind,
                                   int32_t* weight_id);
/* [setup] Checks shapes against buffers and weights. */
KT_API int32_t kt_model_add_op(kt_model* model, const kt_op* op);
/* [setup] Names the buffer [S, V] that holds the logits and allocates everything else. */
KT_API int32_t kt_model_finish(kt_model* model, int32_t logits_buffer);
/* [engine] Runs one step and samples. Blocks until done; no allocation. layout and block come from
 * the scheduler that made the plan. */
KT_API int32_t kt_model_run(kt_model* model, const kt_plan* plan, const kt_block_layout* layout,
                            const void* block, kt_sample_out* out);
/* [engine] Copies rows [first, first + count) of a buffer after a run (tests, logits). */
KT_API int32_t kt_model_read(kt_model* model, int32_t buffer_id, int32_t first, int32_t count,
                             float* dst);
KT_API int32_t kt_model_query(const kt_model* model, kt_model_stats* out); /* [any] */

/* [any] The sampler by itself: logits f32 [S, V] are left unchanged. The layout names the arrays of
 * block; plan->num_samples rows. */
KT_API int32_t kt_sample(kt_pool* pool, const float* logits, int32_t vocab_size,
                         int32_t sample_vocab, const kt_plan* plan, const kt_block_layout* layout,
                         const void* block, kt_sample_out* out);

/* ---- single kernels, for tests and benchmarks ---- */

typedef struct kt_matrix kt_matrix; /* packed weights, possibly of many experts */

KT_API int32_t kt_matrix_create(kt_pool* pool, const kt_tensor* tensor, kt_matrix** out);
KT_API int32_t kt_matrix_destroy(kt_matrix* matrix);
/* Writes the GGUF bytes back (inverse permutation); capacity as kt_tensor.num_bytes. */
KT_API int32_t kt_matrix_unpack(const kt_matrix* matrix, void* dst, int64_t capacity);
/* out[num_rows, rows] = x[num_rows, cols] . W^T for expert `expert`, by all workers. is_prompt: 0
 * or 1, all rows are multiplied like prompt tokens, which on AMX means bf16 instead of int8. */
KT_API int32_t kt_matrix_multiply(const kt_matrix* matrix, int32_t expert, const float* x,
                                  int32_t num_rows, float* out, int32_t is_prompt);
/* One routed-expert layer: out[T,H] = sum_k weights[t,k] * down(silu(gate x) * (up x)).
 * ids int32 [T, K] (an id out of range is KT_ERR_ARGUMENT), weights f32 [T, K]; is_prompt u8 [T]
 * says which tokens are multiplied like those of a prompt, NULL: none. */
KT_API int32_t kt_experts_multiply(const kt_matrix* gate, const kt_matrix* up,
                                   const kt_matrix* down, const float* x, const int32_t* ids,
                                   const float* weights, int32_t num_tokens, int32_t top_k,
                                   float* out, const uint8_t* is_prompt);
/* Sustained read bandwidth of all workers over a buffer of num_bytes, best of `passes`. */
KT_API int32_t kt_bench_read(kt_pool* pool, int64_t num_bytes, int32_t passes,
                             double* bytes_per_second);
/* Peak multiply-add rate of all workers with the ISA's widest integer (kind 0), bf16 (kind 1) or
 * f32 (kind 2) instruction; KT_ERR_UNSUPPORTED when the ISA has none. */
KT_API int32_t kt_bench_peak(kt_pool* pool, int32_t kind, double* macs_per_second);

/* ---- experts of all layers on the CPU, for engines whose other parts run elsewhere ---- */

typedef struct kt_expert_set kt_expert_set;

#define KT_EXPERTS_GATE 0
#define KT_EXPERTS_UP 1
#define KT_EXPERTS_DOWN 2

/* One node's share of a packed tensor: bands [first_band, first_band + num_bands) of every expert.
 */
typedef struct kt_packed_part {
  uint32_t struct_size;
  int32_t type;
  int32_t num_experts;
  int32_t rows; /* of the whole tensor */
  int32_t cols;
  int32_t num_bands; /* of this part */
  int32_t first_band;
  int32_t num_parts; /* how many parts the tensor has */
  int64_t band_bytes;
  int64_t expert_bytes; /* num_bands * band_bytes: distance between experts inside the part */
  const void* data;     /* owned by the set; immutable */
} kt_packed_part;

/* [setup] max_tokens: most rows of one run. The pool must outlive the set. */
KT_API int32_t kt_expert_set_create(kt_pool* pool, int32_t max_tokens, int32_t top_k,
                                    kt_expert_set** out);
KT_API int32_t kt_expert_set_destroy(kt_expert_set* set); /* [setup] */
/* [setup] Packs a layer's matrices; layers are numbered in the order they are added. */
KT_API int32_t kt_expert_set_add(kt_expert_set* set, const kt_tensor* gate, const kt_tensor* up,
                                 const kt_tensor* down);
/* [setup] Allocates the working memory; afterwards the set can run. */
KT_API int32_t kt_expert_set_finish(kt_expert_set* set);
/* [any] which: KT_EXPERTS_x. */
KT_API int32_t kt_expert_set_part(const kt_expert_set* set, int32_t layer, int32_t which,
                                  int32_t part, kt_packed_part* out);
/* [engine] out f32 [T, H] = sum over k of weights[t, k] * expert ids[t, k] of x f32 [T, H]. An id
 * of -1 is skipped (somebody else computes it); a row that has no other is neither read nor
 * written. is_prompt: u8 [T] as in kt_experts_multiply, or NULL. */
KT_API int32_t kt_expert_set_run(kt_expert_set* set, int32_t layer, int32_t num_tokens,
                                 const float* x, const int32_t* ids, const float* weights,
                                 float* out, const uint8_t* is_prompt);

/* A run for somebody who does not wait for it in the caller's thread: a GPU. Between start and end
 * it needs neither the thread that started it nor any lock of that thread's language or of CUDA, so
 * whatever they are blocked by, `done` comes. */
typedef struct kt_expert_job {
  uint32_t struct_size;
  int32_t layer;
  int32_t num_tokens;
  int32_t num_spared; /* workers (0 .. 2), of which kt_pool_caller_cpu's is the first, that leave
                         their cores to the threads that drive the GPU; results are the same */
  int32_t reserved;
  uint32_t number;      /* 1 .. 2^31 - 1: tells this job's flags from those of earlier ones */
  const float* x;       /* [T, H]; need not be there before *request */
  const int32_t* ids;   /* [T, K] as in kt_expert_set_run; there, like the rest, from the start */
  const float* weights; /* [T, K] */
  const uint8_t* is_prompt; /* [T] or NULL */
  float* out;               /* [T, H] */
  uint32_t* request;        /* becomes `number` when x is there (release); NULL: x is there */
  uint32_t* done; /* out: `number` when out is complete (release), with KT_EXPERT_JOB_FAILED when
                     it never will be */
  int64_t timeout_ns; /* longest wait for *request */
  int64_t* times_ns; /* out [2], may be NULL: when the rows were there and when out was complete, by
                        the system's monotonic clock */
} kt_expert_job;

#define KT_EXPERT_JOB_FAILED 0x80000000u

/* [engine] Begins a run on the pool's threads and returns; a job that is refused never touches
 * `done`. The struct is copied; its arrays are borrowed until kt_expert_set_join or the end of
 * kt_expert_set_destroy, which ends the wait for x. KT_ERR_STATE while a job is not joined; runs by
 * other means are refused as well until then. */
KT_API int32_t kt_expert_set_start(kt_expert_set* set, const kt_expert_job* job);
/* [engine] Sleeps until the started job has ended; its error, if it failed. KT_IDLE when none was
 * started. */
KT_API int32_t kt_expert_set_join(kt_expert_set* set);

/* [any] The packed form of a matrix, as one part. */
KT_API int32_t kt_matrix_part(const kt_matrix* matrix, kt_packed_part* out);

/* One copy to the device. */
typedef struct kt_copy {
  void* to;         /* device memory */
  const void* from; /* host memory; only pinned memory is copied in the background */
  int64_t num_bytes;
} kt_copy;

/* [engine] Puts copies on a stream (cudaStream_t), in order, and returns at once.
 * KT_ERR_UNSUPPORTED without a CUDA runtime in the process, KT_ERR_INTERNAL when CUDA refuses one.
 */
KT_API int32_t kt_copy_to_device(void* stream, const kt_copy* copies, int32_t num_copies);

/* ---- decode steps on a GPU whose routed experts run on the CPU ---- */

typedef struct kt_handoff kt_handoff;

/* How the GPU asks and waits: mechanism */
#define KT_HANDOFF_SPIN 0       /* kernels raise and poll the flags; waiting has a time limit */
#define KT_HANDOFF_WAIT_VALUE 1 /* a kernel raises, the stream waits: cuStreamWaitValue32 */
#define KT_HANDOFF_HOST_CALL 2  /* a host function in the stream computes the experts */

/* Pinned buffers shared with the graph's signal and wait kernels; borrowed until destroy. */
typedef struct kt_handoff_config {
  uint32_t struct_size;
  int32_t num_layers;
  int32_t max_tokens;
  int32_t mechanism;    /* KT_HANDOFF_x */
  const float* x;       /* [max_tokens, H] */
  const int32_t* ids;   /* [max_tokens, K] */
  const float* weights; /* [max_tokens, K] */
  float* out;           /* [max_tokens, H] */
  uint32_t* request;    /* [num_layers, 16]: word 0 of a line is the layer's flag */
  uint32_t* done;       /* [num_layers, 16] */
} kt_handoff_config;

/* What one step does on a stream, in this order: copy the block to the device, launch the graph,
 * copy the results back. */
typedef struct kt_gpu_step {
  uint32_t struct_size;
  int32_t num_tokens; /* rows of the graph; 0 = no experts on the CPU */
  void* stream;       /* cudaStream_t */
  void* graph_exec;   /* cudaGraphExec_t */
  void* block_device;
  const void* block_host; /* pinned */
  int64_t block_bytes;
  void* results_host; /* pinned */
  const void* results_device;
  int64_t results_bytes;
  int64_t timeout_ns; /* longest wait for one layer's request */
  int64_t expert_ns;  /* out: time spent in the experts */
  int64_t*
      asked_ns; /* out [num_layers], may be NULL: when each request was seen, by an own clock */
} kt_gpu_step;

/* [setup] set may be NULL: requests are then answered at once and out stays as it is; with
 * num_layers 0 there are none. KT_ERR_UNSUPPORTED without a CUDA runtime in the process. */
KT_API int32_t kt_handoff_create(const kt_handoff_config* config, kt_expert_set* set,
                                 kt_handoff** out);
KT_API int32_t kt_handoff_destroy(kt_handoff* handoff); /* [setup] */
/* [setup] Puts on a stream that is being captured (cudaStream_t), in front of the kernel that reads
 * out, what makes it wait for a layer's answer; nothing for KT_HANDOFF_SPIN. The graph may be
 * replayed until the handle is destroyed. KT_ERR_UNSUPPORTED when the driver lacks the call,
 * KT_ERR_INTERNAL when it refuses it. */
KT_API int32_t kt_handoff_await(kt_handoff* handoff, int32_t layer, void* stream);
/* [engine] Runs one step and waits for it. KT_ERR_INTERNAL when CUDA fails or the time limit
 * passes: the GPU's state is then unknown. */
KT_API int32_t kt_handoff_run(kt_handoff* handoff, kt_gpu_step* step);

/* ---- scheduler: continuous batching over paged KV; no clock, no threads, no I/O ---- */

typedef struct kt_sched kt_sched;

#define KT_SCHED_FCFS 0                /* several prompts may prefill in one step */
#define KT_SCHED_FCFS_SINGLE_PREFILL 1 /* one prompt at a time */

/* flags */
#define KT_SCHED_PREFIX_CACHE 1u /* equal token prefixes share pages, also after their request */
#define KT_SCHED_LOOKAHEAD 2u    /* one step may be planned while the one before is not committed */
#define KT_SCHED_JOURNAL 4u      /* keep a record of all calls for kt_sched_journal */

typedef struct kt_sched_config {
  uint32_t struct_size;
  uint32_t flags;
  int32_t policy;
  int32_t max_batch_size; /* most rows in a step, 1..256 */
  int32_t chunk_size;     /* token budget of a step */
  int32_t page_size;
  int32_t num_pages;
  int32_t max_len;          /* most tokens of one sequence, prompt and output */
  int32_t max_queue;        /* most waiting requests; beyond it submit returns KT_FULL */
  int32_t max_samples;      /* most logit rows in a step, >= max_batch_size */
  int32_t watermark_pages;  /* pages kept free when a new sequence is admitted; -1 = default */
  int32_t num_host_pages;   /* pages of the host-RAM tier; 0 = none; needs KT_SCHED_PREFIX_CACHE */
  int64_t queue_timeout_ns; /* a request waiting longer ends with KT_FINISH_TIMEOUT; 0 = never */
  int64_t target_itl_ns;    /* adapt the prefill budget to this time between tokens; 0 = off */
  int64_t priority_step_ns; /* one priority step counts like having come this much earlier, so
                               nothing waits for ever; 0 = default (10 s) */
  int32_t lane_tokens;      /* while somebody decodes, so many or more prompt tokens run as steps of
                               their own beside the decode steps (kt_sched_plan_lane); 0 = off */
  int32_t reserved;
} kt_sched_config;

typedef struct kt_request {
  uint32_t struct_size;
  int32_t num_tokens;    /* prompt length, >= 1 */
  const int32_t* tokens; /* copied */
  uint64_t seq_id;       /* caller's, unique among living sequences, > 0 */
  uint64_t seed;
  uint64_t cache_salt;      /* prefixes are shared only within equal salts */
  int32_t max_tokens;       /* most generated tokens, >= 0; 0 ends after prefill (echo) */
  int32_t min_tokens;       /* stop ids are ignored before this many */
  int32_t priority;         /* higher first; 0 = normal */
  int32_t num_stop_ids;     /* at most 64 */
  const int32_t* stop_ids;  /* copied */
  const int32_t* bias_ids;  /* copied */
  const float* bias_values; /* copied */
  int32_t num_bias;         /* at most 1024 */
  int32_t top_k;
  float temperature;
  float top_p;
  float min_p;
  float presence_penalty;
  float frequency_penalty;
  float repetition_penalty;
  int32_t num_logprobs;    /* -1 none */
  int32_t prompt_logprobs; /* -1 none; otherwise alternatives per prompt token */
} kt_request;

#define KT_EVENT_TOKEN 1          /* token was generated */
#define KT_EVENT_PROMPT_LOGPROB 2 /* sample_row holds the log-probability of prompt[token_pos] */
#define KT_EVENT_FINISH 3         /* the sequence ended; no later event names it */

#define KT_FINISH_NONE 0
#define KT_FINISH_STOP 1      /* a stop id; that token event comes first */
#define KT_FINISH_LENGTH 2    /* max_tokens or max_len */
#define KT_FINISH_CANCELLED 3 /* kt_sched_cancel */
#define KT_FINISH_TIMEOUT 4   /* queue_timeout_ns */
#define KT_FINISH_ERROR 5     /* kt_sched_fail */

typedef struct kt_event {
  uint64_t seq_id;
  int32_t kind;       /* KT_EVENT_x */
  int32_t finish;     /* KT_FINISH_x */
  int32_t token;      /* id, or -1 */
  int32_t token_pos;  /* index in prompt + output */
  int32_t sample_row; /* logit row of the step just committed, or -1 */
  int32_t num_cached; /* prompt tokens taken from the prefix cache */
  int64_t admit_ns;   /* now_ns of the plan that first admitted it */
} kt_event;

typedef struct kt_sched_stats {
  uint32_t struct_size;
  int32_t num_waiting;
  int32_t num_running;
  int32_t pages_total;
  int32_t pages_free;    /* never used or evicted */
  int32_t pages_cached;  /* unreferenced, kept for their prefix */
  int32_t pages_used;    /* referenced by running sequences */
  int32_t num_preempted; /* part of num_waiting that has run before */
  int32_t host_pages_total;
  int32_t host_pages_used;
  uint64_t submitted;
  uint64_t finished;
  uint64_t cancelled;
  uint64_t preempted;
  uint64_t rejected;
  uint64_t steps;      /* planned, those of the lane included */
  uint64_t lane_steps; /* part of them */
  uint64_t prefill_tokens;
  uint64_t decode_tokens;
  uint64_t prefix_query_tokens;
  uint64_t prefix_hit_tokens;
  uint64_t evicted_pages; /* dropped from the device tier, also when the host keeps them */
  uint64_t copied_out_pages;
  uint64_t copied_in_pages;
  uint64_t timed_out;
  uint64_t plan_ns; /* total inside kt_sched_plan and kt_sched_commit */
  uint64_t commit_ns;
} kt_sched_stats;

KT_API int32_t kt_sched_create(const kt_sched_config* config, kt_sched** out); /* [setup] */
KT_API int32_t kt_sched_destroy(kt_sched* sched);                              /* [setup] */
KT_API int32_t kt_sched_layout(const kt_sched* sched, kt_block_layout* out);   /* [any] */
/* [any] Queues a request; microseconds, never waits. KT_FULL beyond max_queue; KT_ERR_ARGUMENT when
 * it can never fit (the message has the numbers) or a field is out of range. */
KT_API int32_t kt_sched_submit(kt_sched* sched, const kt_request* request, int64_t now_ns);
/* [any] Takes effect at the next plan; unknown ids are ignored. The sequence ends with
 * KT_FINISH_CANCELLED unless it has ended before. */
KT_API int32_t kt_sched_cancel(kt_sched* sched, uint64_t seq_id);
/* [engine] Sleeps until there is something to plan or to drain (KT_OK), kt_sched_wake was called
 * (KT_IDLE) or timeout_ns passed (KT_TIMEOUT; -1 = no limit). */
KT_API int32_t kt_sched_wait(kt_sched* sched, int64_t timeout_ns);
KT_API int32_t kt_sched_wake(kt_sched* sched); /* [any] */
/* [engine] Decides the next step and writes it into block (layout.num_bytes bytes). KT_IDLE when
 * nothing can run (out is all zero; events may still be there to drain). KT_ERR_STATE between a
 * plan and its commit.
 *
 * Look-ahead (KT_SCHED_LOOKAHEAD): one more step may be planned before the commit of the one
 * before, into another block. Steps run in the order of their plans, commits come in the same
 * order. Such a step feeds tokens that are still being sampled (see kt_block_layout.tokens); rows
 * of a sequence that turns out to have ended are run for nothing and give no event. Sequences with
 * penalties are not planned ahead: their history would lack a token.
 *
 * Host tier (num_host_pages > 0): copies of plan n begin after step n-1 and after all copies of
 * plan n-1; copies_out end before step n begins; copies_in begin after copies_out and end before
 * step n+1 begins, so they may overlap step n, whose rows do not touch their pages. A plan may hold
 * copies only (num_tokens 0): do them and commit 0 tokens. */
KT_API int32_t kt_sched_plan(kt_sched* sched, int64_t now_ns, void* block, kt_plan* out);
/* [engine] tokens int32 [num_samples] of the planned step, in logit-row order. Applies stop rules,
 * frees or keeps pages, queues events. */
KT_API int32_t kt_sched_commit(kt_sched* sched, int64_t now_ns, const int32_t* tokens,
                               int32_t num_samples);
/* [engine] The planned step failed: its sequences end with KT_FINISH_ERROR, the others go on. */
KT_API int32_t kt_sched_fail(kt_sched* sched, int64_t now_ns);
/* [engine] The prefill lane (lane_tokens > 0): plans a step of prompt tokens only, which may run
 * beside any number of ordinary steps planned, run and committed meanwhile; it begins after all
 * steps planned before it. KT_IDLE when nobody decodes or fewer than lane_tokens prompt tokens
 * wait: they belong to ordinary steps then. KT_ERR_STATE while a lane step is not committed.
 *
 * Until its commit the step's sequences keep their pages and are in no other step, and ordinary
 * plans hold decode rows only; a cancelled one ends at the commit. Page copies of ordinary and lane
 * plans happen in the order of the plans: those of a lane plan before any later plan's. */
KT_API int32_t kt_sched_plan_lane(kt_sched* sched, int64_t now_ns, void* block, kt_plan* out);
/* [engine] As kt_sched_commit and kt_sched_fail, for the lane step; the steps planned before it
 * must be committed (KT_ERR_STATE). */
KT_API int32_t kt_sched_commit_lane(kt_sched* sched, int64_t now_ns, const int32_t* tokens,
                                    int32_t num_samples);
KT_API int32_t kt_sched_fail_lane(kt_sched* sched, int64_t now_ns);
/* [engine] Moves up to capacity events out, oldest first; KT_FULL when more are left. */
KT_API int32_t kt_sched_drain(kt_sched* sched, kt_event* events, int32_t capacity,
                              int32_t* num_events);
KT_API int32_t kt_sched_query(kt_sched* sched, kt_sched_stats* out); /* [any] */
/* [any] Moves up to capacity bytes of the journal out (KT_SCHED_JOURNAL); KT_FULL when more is
 * left. Text, one call per line in the order in which they took effect, with a digest of every
 * planned step: replaying the lines on a scheduler of the same configuration gives the same
 * digests. Format: native/src/sched/journal.h. */
KT_API int32_t kt_sched_journal(kt_sched* sched, char* text, int64_t capacity, int64_t* num_bytes);
/* [engine] Verifies every invariant (pages conserved, reference counts equal users, ...);
 * KT_ERR_INTERNAL names what is broken. O(pages): for tests. */
KT_API int32_t kt_sched_check(kt_sched* sched);

#ifdef __cplusplus
}
#endif

#endif /* KT_H */
