// Large memory that is never freed piecemeal: packed weights, KV pages, step buffers.
//
// Address space is reserved in big chunks without committing it; a page becomes memory when it is
// first written, on the NUMA node of the thread that writes it. That is why allocate() does not
// touch what it returns: the owner does. Huge pages are requested because streaming 4 KiB pages
// costs a TLB miss every 64 lines. One thread at a time ([setup]).
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

namespace kt {

inline constexpr int64_t kHugePage = int64_t{2} << 20;

inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (const Chunk& chunk : chunks_) {
      munmap(chunk.map, static_cast<size_t>(chunk.map_bytes));
    }
  }

  // Zeroed memory aligned to 4 KiB (2 MiB when large). Throws std::bad_alloc.
  uint8_t* allocate(int64_t num_bytes) {
    const int64_t bytes = round_up(num_bytes < 1 ? 1 : num_bytes, 4096);
    if (chunks_.empty() || chunks_.back().used + bytes > chunks_.back().size) {
      add_chunk(bytes);
    }
    Chunk& chunk = chunks_.back();
    uint8_t* result = chunk.base + chunk.used;
    chunk.used += bytes;
    total_ += bytes;
    return result;
  }
  template <class T>
  T* allocate_array(int64_t count) {
    return reinterpret_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
  int64_t total_bytes() const { return total_; }

 private:
  struct Chunk {
    void* map;
    int64_t map_bytes;
    uint8_t* base;  // 2 MiB aligned
    int64_t size;
    int64_t used;
  };

  void add_chunk(int64_t at_least) {
    constexpr int64_t kChunk = int64_t{256} << 20;
    const int64_t size = round_up(at_least > kChunk ? at_least : kChunk, kHugePage);
    const int64_t map_bytes = size + kHugePage;
    void* map = mmap(nullptr, static_cast<size_t>(map_bytes), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) {
      throw std::bad_alloc();
    }
    const auto address = reinterpret_cast<uintptr_t>(map);
    const auto aligned = static_cast<uintptr_t>(round_up(static_cast<int64_t>(address), kHugePage));
    uint8_t* base = static_cast<uint8_t*>(map) + (aligned - address);
    // Advice only: a kernel without huge pages refuses it and nothing else changes.
    (void)madvise(base, static_cast<size_t>(size), MADV_HUGEPAGE);
    chunks_.push_back({map, map_bytes, base, size, 0});
  }

  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
};

}  // namespace kt
