// The pool of KV pages nobody uses. Single-threaded (engine thread); it knows page ids only, the KV
// itself lives with the engine. Used twice: for GPU (or only) pages and for the host-RAM tier.
#pragma once

#include <cstdint>
#include <vector>

namespace kt::sched {

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t num_pages() const { return static_cast<int32_t>(is_taken_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }

  // A free page, or -1.
  int32_t take();
  void give_back(int32_t page);

 private:
  std::vector<uint8_t> is_taken_;
  std::vector<int32_t> free_;  // stack; starts so that page 0 is handed out first
};

}  // namespace kt::sched
