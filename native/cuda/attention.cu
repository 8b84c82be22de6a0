// attention.cu: attention of decode steps (one new token per row) over paged keys and values.
// Follows step.cu in one NVRTC compilation.
//
// One launch does what a layer needs between its q, k, v products and its output product: norm and
// rotation of q and k, the new key and value into their page, softmax(q k) v, and the output in the
// form that the next product reads. Nothing is planned on the host: lengths and page tables are
// read from the step's block, so that a captured graph serves any lengths.
//
// Work is divided into items (row, kv head, 8 query heads, split of the keys). How many splits a
// row has depends on its own length alone, and partial results are added in the order of the
// splits: a row's result does not depend on the rows beside it. The last block to finish a row's
// splits merges them.
//
// A warp takes 16 keys at a time and keeps them in registers, 16 warps of a multiprocessor hide
// each other's loads: S^T = K q^T and O^T += V^T p^T by m16n8k16 products, with 8 query heads as n.
// The order of the head's dimensions inside a product is free as long as both sides agree, so that
// every load is 16 contiguous bytes.

constexpr int kAttentionThreads = 256, kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kHeadTile = 8;
constexpr int kTileKeys = 16;
constexpr int kMinChunk = kTileKeys * kAttentionWarps;  // keys of a split: one tile per warp
constexpr int kMaxSplits = 32;
constexpr float kLog2E = 1.4426950408889634f;

struct DecodeStep {
  const int* page_start;     // [R + 1] ranges in page_ids
  const int* last_page_len;  // [R]
  const int* page_ids;
  const int* positions;  // [R] of the new token
  const int* kv_slot;    // [R] where it goes
  int rows, page_size;   // page_size: a multiple of kTileKeys
};

// Results of splits until they are merged.
struct Partials {
  float* values;   // [R, KH, tiles, kMaxSplits, kHeadTile, D]
  float2* scales;  // [R, KH, tiles, kMaxSplits, kHeadTile] largest logit, sum
  u32* arrived;    // [R, KH, tiles], zero between launches
};

// Where an item lies.
struct Item {
  int row, length, split, splits, chunk, head, tile;  // head: of keys
};

__device__ __forceinline__ int split_length(int length) {
  const int even = (length + kMaxSplits - 1) / kMaxSplits;
  return max(kMinChunk, (even + kMinChunk - 1) / kMinChunk * kMinChunk);
}

// Keys of a row, and into how many splits they go; 0 beyond the last row.
__device__ __forceinline__ int row_length(const DecodeStep& s, int row, int& splits) {
  splits = 0;
  if (row >= s.rows) {
    return 0;
  }
  const int pages = s.page_start[row + 1] - s.page_start[row];
  const int length = (pages - 1) * s.page_size + s.last_page_len[row];
  const int chunk = split_length(length);
  splits = (length + chunk - 1) / chunk;
  return length;
}

// The number of items, counted by every warp for itself.
__device__ __forceinline__ int count_items(const DecodeStep& s, int heads, int tiles) {
  int count = 0;
  for (int row = threadIdx.x & 31; row < s.rows; row += kWarp) {
    int splits;
    row_length(s, row, splits);
    count += splits * heads * tiles;
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    count += __shfl_xor_sync(~0u, count, step);
  }
  return count;
}

// The item of a number below count_items, found by every warp for itself. The splits of a row, head
// and tile follow each other.
__device__ __forceinline__ Item find_item(const DecodeStep& s, int number, int heads, int tiles) {
  const int lane = threadIdx.x & 31;
  Item item{};
  for (int first = 0; first < s.rows; first += kWarp) {
    int splits;
    const int length = row_length(s, first + lane, splits);
    int end = splits * heads * tiles;
#pragma unroll
    for (int step = 1; step < kWarp; step <<= 1) {
      const int left = __shfl_up_sync(~0u, end, step);
      if (lane >= step) {
        end += left;
      }
    }
    const u32 beyond = __ballot_sync(~0u, number < end);
    if (beyond != 0) {
      const int at = __ffs(beyond) - 1;
      item.row = first + at;
      item.length = __shfl_sync(~0u, length, at);
      item.splits = __shfl_sync(~0u, splits, at);
      item.chunk = split_length(item.length);
      const int inside = number - (__shfl_sync(~0u, end, at) - item.splits * heads * tiles);
      item.split = inside % item.splits;
      item.head = inside / item.splits / tiles;
      item.tile = inside / item.splits % tiles;
      break;
    }
    number -= __shfl_sync(~0u, end, kWarp - 1);
  }
  return item;
}

__device__ __forceinline__ uint4 load_once(const u16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ u32 transposed(u32 v) {
  u32 out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

// 16 keys and their values in one warp. Lane 4 g + t holds of keys g and g + 8 the dimensions
// 32 j + 8 t .. + 7, and of the values of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9 the dimensions
// 64 c + 8 g .. + 7.
template <int D>
struct KvTile {
  uint4 k[2][D / 32];
  uint4 v[4][D / 64];
};

__device__ __forceinline__ int value_key(int i) {
  const int t = threadIdx.x & 3;
  return 2 * t + (i & 1) + 8 * (i >> 1);
}

// keys: the tile's first key; values lie v_offset further. Keys from `limit` on become zero.
template <int D>
__device__ __forceinline__ void load_tile(const u16* keys, i64 stride, i64 v_offset, int limit,
                                          KvTile<D>& tile) {
  const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u16* from = keys + (g + 8 * i) * stride + 8 * t;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      tile.k[i][j] = g + 8 * i < limit ? load_once(from + 32 * j) : zero;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u16* from = keys + v_offset + value_key(i) * stride + 8 * g;
#pragma unroll
    for (int c = 0; c < D / 64; ++c) {
      tile.v[i][c] = value_key(i) < limit ? load_once(from + 64 * c) : zero;
    }
  }
}

// Puts the step's own key and value (bf16 in shared memory) at key `at` of the tile.
template <int D>
__device__ __forceinline__ void patch_tile(const u16* k_new, const u16* v_new, int at,
                                           KvTile<D>& tile) {
  const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      if (g + 8 * i == at) {
        tile.k[i][j] = *reinterpret_cast<const uint4*>(k_new + 32 * j + 8 * t);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int c = 0; c < D / 64; ++c) {
      if (value_key(i) == at) {
        tile.v[i][c] = *reinterpret_cast<const uint4*>(v_new + 64 * c + 8 * g);
      }
    }
  }
}

// What a warp has of its keys so far: per lane for heads 2 t and 2 t + 1.
template <int D>
struct WarpResult {
  float largest[2], sum[2];  // logits in units of log 2; sum: this lane's share
  float acc[D / 16][4];
};

// count: keys of the tile that exist. q: this lane's part of head g.
template <int D>
__device__ __forceinline__ void attend_tile(const KvTile<D>& tile, const u16* q, int count,
                                            float scale, WarpResult<D>& r) {
  float s[4] = {};
#pragma unroll
  for (int j = 0; j < D / 32; ++j) {
    const uint4 b = *reinterpret_cast<const uint4*>(q + 32 * j);
    multiply_add(s, tile.k[0][j].x, tile.k[1][j].x, tile.k[0][j].y, tile.k[1][j].y, b.x, b.y);
    multiply_add(s, tile.k[0][j].z, tile.k[1][j].z, tile.k[0][j].w, tile.k[1][j].w, b.z, b.w);
  }
  const int g = threadIdx.x >> 2 & 7;
  float alpha[2], p[4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float a = g < count ? s[n] * scale : -3.4e38f;
    const float b = g + 8 < count ? s[n + 2] * scale : -3.4e38f;
    float largest = fmaxf(a, b);
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    }
    largest = fmaxf(largest, r.largest[n]);
    alpha[n] = exp2f(r.largest[n] - largest);
    r.largest[n] = largest;
    p[n] = g < count ? exp2f(a - largest) : 0.0f;
    p[n + 2] = g + 8 < count ? exp2f(b - largest) : 0.0f;
    r.sum[n] = r.sum[n] * alpha[n] + p[n] + p[n + 2];
  }
  const u32 b0 = transposed(bf16_pair(p[0], p[1])), b1 = transposed(bf16_pair(p[2], p[3]));
#pragma unroll
  for (int c = 0; c < D / 64; ++c) {
    const u32* v0 = reinterpret_cast<const u32*>(&tile.v[0][c]);
    const u32* v1 = reinterpret_cast<const u32*>(&tile.v[1][c]);
    const u32* v2 = reinterpret_cast<const u32*>(&tile.v[2][c]);
    const u32* v3 = reinterpret_cast<const u32*>(&tile.v[3][c]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* acc = r.acc[4 * c + i];
      acc[0] *= alpha[0];
      acc[1] *= alpha[1];
      acc[2] *= alpha[0];
      acc[3] *= alpha[1];
      multiply_add(acc, __byte_perm(v0[i], v1[i], 0x5410), __byte_perm(v0[i], v1[i], 0x7632),
                   __byte_perm(v2[i], v3[i], 0x5410), __byte_perm(v2[i], v3[i], 0x7632), b0, b1);
    }
  }
}

template <int D>
struct AttentionShared {
  // Even heads first, rows 2 words apart modulo the banks: the stores below are free of conflicts.
  float values[kAttentionWarps][kHeadTile][D + 2];
  float largest[kAttentionWarps][kHeadTile], sum[kAttentionWarps][kHeadTile];
  float2 rotation[D / 2];
  float vector[kAttentionWarps][D];
  alignas(16) u16 q[kHeadTile][D + 8];
  alignas(16) u16 k_new[D];
  alignas(16) u16 v_new[D];
  int is_last;
};

// One vector of q or k: norm, rotation, bf16; by one warp.
template <int D>
__device__ __forceinline__ void prepare_vector(const float* from, const float* norm, bool rotates,
                                               const Rope& p, AttentionShared<D>& shared, u16* to) {
  const int lane = threadIdx.x & 31;
  float* values = shared.vector[threadIdx.x >> 5];
  float x[D / kWarp], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) {
    x[i] = from[lane + i * kWarp];
    squares += x[i] * x[i];
  }
  const float factor = norm != nullptr ? rsqrtf(warp_sum(squares) / D + p.eps) : 1.0f;
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) {
    values[lane + i * kWarp] = norm != nullptr ? x[i] * (factor * norm[lane + i * kWarp]) : x[i];
  }
  __syncwarp();
  if (rotates) {
    const int half = p.rotary_dims / 2;
    for (int i = lane; i < half; i += kWarp) {
      const float2 turn = shared.rotation[i];
      const int a = p.neox ? i : 2 * i, b = p.neox ? i + half : 2 * i + 1;
      const float u = values[a], w = values[b];
      values[a] = u * turn.x - w * turn.y;
      values[b] = w * turn.x + u * turn.y;
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) {
    to[lane + i * kWarp] = to_bf16(values[lane + i * kWarp]);
  }
  __syncwarp();
}

// A warp's result into shared memory.
template <int D>
__device__ __forceinline__ void store_warp(WarpResult<D>& r, AttentionShared<D>& shared) {
  const int warp = threadIdx.x >> 5, g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      r.sum[n] += __shfl_xor_sync(~0u, r.sum[n], step);
    }
    if (g == 0) {
      shared.largest[warp][4 * n + t] = r.largest[n];
      shared.sum[warp][4 * n + t] = r.sum[n];
    }
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      float* to = shared.values[warp][4 * n + t] + i / 4 * 64 + 8 * g + 2 * (i % 4);
      *reinterpret_cast<float2*>(to) = make_float2(r.acc[i][n], r.acc[i][n + 2]);
    }
  }
}

// Adds the results of `warps` warps for one head; every lane gets D / 32 values.
template <int D>
__device__ __forceinline__ void merge_warps(const AttentionShared<D>& shared, int head, int warps,
                                            float& largest, float& sum, float* out) {
  const int lane = threadIdx.x & 31, row = (head & 1) * 4 + head / 2;
  largest = -3.4e38f;
  for (int w = 0; w < warps; ++w) {
    largest = fmaxf(largest, shared.largest[w][row]);
  }
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) {
    out[i] = 0.0f;
  }
  for (int w = 0; w < warps; ++w) {
    const float factor = exp2f(shared.largest[w][row] - largest);
    sum += factor * shared.sum[w][row];
#pragma unroll
    for (int i = 0; i < D / kWarp; ++i) {
      out[i] += factor * shared.values[w][row][lane + i * kWarp];
    }
  }
}

// Adds the results of a row's splits for one head, in their order.
template <int D>
__device__ __forceinline__ void merge_splits(const Partials& partials, i64 first, int head,
                                             int splits, float& sum, float* out) {
  const int lane = threadIdx.x & 31;
  const float2 mine = lane < splits ? __ldcg(partials.scales + (first + lane) * kHeadTile + head)
                                    : make_float2(-3.4e38f, 0.0f);
  const float largest = warp_max(mine.x);
  const float factor = exp2f(mine.x - largest);
  sum = warp_sum(factor * mine.y);
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) {
    out[i] = 0.0f;
  }
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const float f = __shfl_sync(~0u, factor, s);
    const float* from = partials.values + ((first + s) * kHeadTile + head) * D + lane;
#pragma unroll
    for (int i = 0; i < D / kWarp; ++i) {
      out[i] += f * __ldcg(from + i * kWarp);
    }
  }
}

template <int D>
__device__ __forceinline__ void decode_attention(const float* q, const float* k, const float* v,
                                                 const DecodeStep& step, const Rope& p, float scale,
                                                 u16* cache, const Partials& partials,
                                                 const Prepared& to) {
  __shared__ AttentionShared<D> shared;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int group = p.q_heads / p.kv_heads, tiles = (group + kHeadTile - 1) / kHeadTile;
  const i64 stride = (i64)p.kv_heads * D, v_offset = stride * step.page_size;
  release_next();
  // Neighbouring items: the queries of one row and head are prepared once for several splits. Few
  // items go to the first blocks, which start first.
  const int items = count_items(step, p.kv_heads, tiles), block = blockIdx.x;
  const int used = min(items, (int)gridDim.x);
  const int last = block < used ? (int)((i64)items * (block + 1) / used) : 0;
  Item item{};
  bool is_next = false;  // to the split before
  for (int number = block < used ? (int)((i64)items * block / used) : 0; number < last; ++number) {
    is_next = is_next && item.split + 1 < item.splits;
    if (is_next) {
      ++item.split;
    } else {
      item = find_item(step, number, p.kv_heads, tiles);
    }
    // Everything up to the wait depends on earlier steps and on the block of this one alone.
    const int begin = item.split * item.chunk, end = min(item.length, begin + item.chunk);
    const bool has_new = end == item.length;
    const int* pages = step.page_ids + step.page_start[item.row];
    const auto address = [&](int key) {
      const i64 page = pages[key / step.page_size];
      return cache + (page * 2 * step.page_size + key % step.page_size) * stride +
             (i64)item.head * D;
    };
    int key = begin + kTileKeys * warp;
    KvTile<D> tile;
    if (key < end) {
      load_tile<D>(address(key), stride, v_offset, min(end, item.length - 1) - key, tile);
    }
    const int heads_here = min(kHeadTile, group - item.tile * kHeadTile);
    const int first_head = item.head * group + item.tile * kHeadTile;
    if (!is_next) {
      for (int i = threadIdx.x; i < p.rotary_dims / 2; i += kAttentionThreads) {
        const float angle = (float)step.positions[item.row] * p.inverse_frequencies[i];
        shared.rotation[i] = make_float2(cosf(angle) * p.multiplier, sinf(angle) * p.multiplier);
      }
      __syncthreads();
      wait_for_previous();
      if (warp < heads_here) {
        prepare_vector<D>(q + ((i64)item.row * p.q_heads + first_head + warp) * D, p.q_norm, true,
                          p, shared, shared.q[warp]);
      } else {
        for (int i = lane; i < D; i += kWarp) {
          shared.q[warp][i] = 0;
        }
      }
    }
    is_next = true;
    if (has_new && warp < 2) {
      const float* from = (warp == 0 ? k : v) + ((i64)item.row * p.kv_heads + item.head) * D;
      prepare_vector<D>(from, warp == 0 ? p.k_norm : nullptr, warp == 0, p, shared,
                        warp == 0 ? shared.k_new : shared.v_new);
    }
    __syncthreads();
    const i64 slot = step.kv_slot[item.row];
    if (has_new && item.tile == 0 && slot >= 0 && threadIdx.x < D / 4) {
      const int is_v = threadIdx.x >= D / 8, part = threadIdx.x % (D / 8);
      u16* at =
          cache +
          ((slot / step.page_size * 2 + is_v) * step.page_size + slot % step.page_size) * stride +
          (i64)item.head * D;
      reinterpret_cast<uint4*>(at)[part] =
          reinterpret_cast<const uint4*>(is_v ? shared.v_new : shared.k_new)[part];
    }
    WarpResult<D> result{{-3.4e38f, -3.4e38f}};
    while (key < end) {
      if (has_new && key + kTileKeys >= end) {
        patch_tile<D>(shared.k_new, shared.v_new, end - 1 - key, tile);
      }
      attend_tile<D>(tile, shared.q[g] + 8 * t, end - key, scale * kLog2E, result);
      key += kTileKeys * kAttentionWarps;
      if (key < end) {
        load_tile<D>(address(key), stride, v_offset, min(end, item.length - 1) - key, tile);
      }
    }
    store_warp<D>(result, shared);
    __syncthreads();
    const int warps = min(kAttentionWarps, (end - begin + kTileKeys - 1) / kTileKeys);
    float largest, sum, out[D / kWarp];
    merge_warps<D>(shared, warp, warps, largest, sum, out);
    bool writes = warp < heads_here;
    if (item.splits > 1) {
      const i64 set = ((i64)item.row * p.kv_heads + item.head) * tiles + item.tile;
      const i64 at = (set * kMaxSplits + item.split) * kHeadTile + warp;
#pragma unroll
      for (int i = 0; i < D / kWarp; ++i) {
        partials.values[at * D + lane + i * kWarp] = out[i];
      }
      if (lane == 0) {
        partials.scales[at] = make_float2(largest, sum);
      }
      writes &= last_block(partials.arrived + set, item.splits, &shared.is_last);
      if (writes) {
        merge_splits<D>(partials, set * kMaxSplits, warp, item.splits, sum, out);
      }
    }
    if (writes) {
#pragma unroll
      for (int i = 0; i < D / kWarp; ++i) {
        store_prepared(to, item.row, p.q_heads * D, (first_head + warp) * D + lane + i * kWarp,
                       out[i] / sum);
      }
    }
    __syncthreads();
  }
  wait_for_previous();  // blocks without work: a grid ends only after the one before it
}

extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    decode_attention_64(const float* q, const float* k, const float* v, DecodeStep step, Rope p,
                        float scale, u16* cache, Partials partials, Prepared to) {
  decode_attention<64>(q, k, v, step, p, scale, cache, partials, to);
}
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 2)
    decode_attention_128(const float* q, const float* k, const float* v, DecodeStep step, Rope p,
                         float scale, u16* cache, Partials partials, Prepared to) {
  decode_attention<128>(q, k, v, step, p, scale, cache, partials, to);
}
