// Turns a model's recorded operations into steps; runs once, in Model::finish().
#pragma once

#include "model/model.h"

namespace kt {

class Scheduler {
 public:
  explicit Scheduler(Model& model) : m_(model) {}
  void build();

 private:
  bool joins_group(size_t first, size_t index) const;
  bool reads_prepared(const kt_op& op) const;
  uint32_t form_of(const kt_op& op) const;
  uint32_t wanted_forms(size_t index) const;
  bool can_prepare(const kt_op& op) const;
  bool may_be_private(size_t index, size_t* last_reader) const;
  void push_step(size_t first, size_t count);
  void require_forms(int32_t buffer, uint32_t forms);

  Model& m_;
  std::vector<uint32_t> valid_;   // per buffer: forms the current content has
  std::vector<uint32_t> needed_;  // per buffer: forms that must be allocated
  std::vector<bool> is_private_;
};

}  // namespace kt
