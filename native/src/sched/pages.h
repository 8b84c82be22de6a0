// The pool of KV pages: who may write where. Single-threaded (engine thread); it knows page ids and
// reference counts only, the KV itself lives with the engine.
#pragma once

#include <cstdint>
#include <vector>

namespace kt::sched {

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t num_pages() const { return static_cast<int32_t>(refs_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }

  // A page with one reference, or -1 when none is free.
  int32_t take();
  // Drops one reference; the last one frees the page.
  void release(int32_t page);

 private:
  std::vector<int32_t> refs_;
  std::vector<int32_t> free_;  // stack; starts so that page 0 is handed out first
};

}  // namespace kt::sched
