// Checks one operation against buffers and weights before it is recorded.
#pragma once

#include <string>

#include "model/model.h"

namespace kt {

class OpChecker {
 public:
  OpChecker(const Model& model, const kt_op& op, size_t index);

  // Throws with operation, operand and sizes.
  void check() const;
  const Weight& weight(int32_t slot) const;
  const Weight* weight_or_null(int32_t slot) const;
  [[noreturn]] void fail(const std::string& message) const;

 private:
  const Buffer& buffer(int32_t id, const std::string& name) const;
  const Buffer& in(int32_t slot) const { return buffer(op_.in[slot], "in" + std::to_string(slot)); }
  const Buffer& out() const { return buffer(op_.out[0], "out0"); }
  void require_width(const char* name, const Buffer& buffer, int64_t width) const;
  void require_same_rows(const char* name, const Buffer& a, const Buffer& b) const;
  void require_not_aliased(int32_t slot) const;
  const Weight& kind_of(int32_t slot, int32_t kind) const;
  void require_vector(int32_t slot, int64_t size) const;
  void require_int(int32_t slot, int32_t low, int32_t high, const char* what) const;
  void check_embed() const;
  void check_norm() const;
  void check_linear() const;
  void check_attention() const;
  void check_moe() const;
  void check_elementwise() const;
  void check_gather() const;

  const Model& model_;
  const kt_op& op_;
  std::string name_;
};

}  // namespace kt
