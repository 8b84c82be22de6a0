#include "sched/pages.h"

#include <string>

#include "base/error.h"

namespace kt::sched {

PagePool::PagePool(int32_t num_pages) : is_taken_(static_cast<size_t>(num_pages), 0) {
  free_.reserve(static_cast<size_t>(num_pages));
  for (int32_t page = num_pages - 1; page >= 0; --page) {
    free_.push_back(page);
  }
}

int32_t PagePool::take() {
  if (free_.empty()) {
    return -1;
  }
  const int32_t page = free_.back();
  free_.pop_back();
  is_taken_[static_cast<size_t>(page)] = 1;
  return page;
}

void PagePool::give_back(int32_t page) {
  uint8_t& taken = is_taken_.at(static_cast<size_t>(page));
  if (taken == 0) {
    fail_internal("page " + std::to_string(page) + " was given back twice");
  }
  taken = 0;
  free_.push_back(page);
}

}  // namespace kt::sched
