#include "sched/sequence.h"

namespace kt::sched {

void History::start(const std::vector<int32_t>& prompt) {
  is_on_ = true;
  table_.assign(256, -1);
  for (const int32_t token : prompt) {
    index_of(token);
  }
}

size_t History::index_of(int32_t token) {
  const size_t mask = table_.size() - 1;
  // Fibonacci hashing: consecutive ids spread over the table.
  size_t slot = (static_cast<uint32_t>(token) * 0x9E3779B1u >> 7) & mask;
  while (table_[slot] >= 0) {
    if (ids_[static_cast<size_t>(table_[slot])] == token) {
      return static_cast<size_t>(table_[slot]);
    }
    slot = (slot + 1) & mask;
  }
  table_[slot] = static_cast<int32_t>(ids_.size());
  ids_.push_back(token);
  counts_.push_back(0);
  if (ids_.size() * 2 > table_.size()) {
    grow();
  }
  return ids_.size() - 1;
}

void History::grow() {
  table_.assign(table_.size() * 4, -1);
  const size_t mask = table_.size() - 1;
  for (size_t i = 0; i < ids_.size(); ++i) {
    size_t slot = (static_cast<uint32_t>(ids_[i]) * 0x9E3779B1u >> 7) & mask;
    while (table_[slot] >= 0) {
      slot = (slot + 1) & mask;
    }
    table_[slot] = static_cast<int32_t>(i);
  }
}

}  // namespace kt::sched
