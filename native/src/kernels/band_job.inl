// band_job.inl: one band times a list of activation rows, as all kernels of an ISA file see it.

struct BandJob {
  const Matrix* w;
  const uint8_t* band;
  const uint8_t* acts;
  int64_t act_stride;
  const int32_t* rows;
  int32_t m;
  float* out;
  int64_t out_stride;
  void* scratch;
  const uint8_t* next;

  const uint8_t* act(int32_t i) const {
    return acts + (rows != nullptr ? rows[i] : i) * act_stride;
  }
  int32_t num_tiles() const { return (w->cols + kTileCols - 1) / kTileCols; }
  int32_t tile_blocks(int32_t tile) const {
    const int32_t left = (w->cols - tile * kTileCols) / 32;
    return left < 8 ? left : 8;
  }
  // The tile, of `step` bytes, that begins `distance` bytes behind this one, in this band or the
  // next; this one where nothing is known to follow.
  const uint8_t* tile_behind(const uint8_t* tiles, int32_t tile, int64_t step,
                             int64_t distance) const {
    const auto count = static_cast<int32_t>((distance + step / 2) / step);
    const int32_t later = tile + (count < num_tiles() ? count : num_tiles());
    if (later < num_tiles()) {
      return tiles + later * step;
    }
    return next == nullptr ? tiles + tile * step
                           : next + (tiles - band) + (later - num_tiles()) * step;
  }
  Ahead ahead(const uint8_t* tiles, int32_t tile, int64_t step) const {
    return {tile_behind(tiles, tile, step, kFar), tile_behind(tiles, tile, step, kNear)};
  }
};

// Rows [first, first + count) of the job, count <= M: spare lanes repeat the last row.
template <int M>
inline void gather_rows(const BandJob& job, int32_t first, int32_t count, const uint8_t** x) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    x[i] = job.act(first + (i < count ? i : count - 1));
  }
}
