#include "model/op_check.h"

#include <cmath>

#include "base/error.h"

namespace kt {
namespace {

const char* op_name(int32_t code) {
  switch (code) {
    case KT_OP_EMBED:
      return "embed";
    case KT_OP_RMSNORM:
      return "rmsnorm";
    case KT_OP_LINEAR:
      return "linear";
    case KT_OP_ATTENTION:
      return "attention";
    case KT_OP_MOE:
      return "moe";
    case KT_OP_SILU_MUL:
      return "silu_mul";
    case KT_OP_ADD:
      return "add";
    case KT_OP_GATE_ADD:
      return "gate_add";
    case KT_OP_GATHER:
      return "gather";
    default:
      return "unknown";
  }
}

std::string num(int64_t value) { return std::to_string(value); }

}  // namespace

OpChecker::OpChecker(const Model& model, const kt_op& op, size_t index)
    : model_(model),
      op_(op),
      name_("op " + num(static_cast<int64_t>(index)) + " (" + op_name(op.code) + ")") {}

void OpChecker::fail(const std::string& message) const { fail_argument(name_ + ": " + message); }

const Buffer& OpChecker::buffer(int32_t id, const std::string& name) const {
  const auto count = static_cast<int64_t>(model_.buffers_.size());
  if (id < 0 || id >= count) {
    fail(name + " is buffer " + num(id) + ", the model has " + num(count));
  }
  return model_.buffers_[static_cast<size_t>(id)];
}

const Weight& OpChecker::weight(int32_t slot) const {
  const int32_t id = op_.w[slot];
  const auto count = static_cast<int64_t>(model_.weights_.size());
  if (id < 0 || id >= count) {
    fail("w" + num(slot) + " is weight " + num(id) + ", the model has " + num(count));
  }
  return model_.weights_[static_cast<size_t>(id)];
}

const Weight* OpChecker::weight_or_null(int32_t slot) const {
  return op_.w[slot] == -1 ? nullptr : &weight(slot);
}

void OpChecker::require_width(const char* name, const Buffer& b, int64_t width) const {
  if (b.width != width) {
    fail(std::string(name) + " has width " + num(b.width) + ", expected " + num(width));
  }
}

void OpChecker::require_same_rows(const char* name, const Buffer& a, const Buffer& b) const {
  if (a.by_sample != b.by_sample) {
    fail(std::string(name) + " has " + (a.by_sample ? "S" : "T") + " rows, out0 has " +
         (b.by_sample ? "S" : "T"));
  }
}

void OpChecker::require_not_aliased(int32_t slot) const {
  if (op_.in[slot] >= 0 && op_.in[slot] == op_.out[0]) {
    fail("out0 must not be in" + num(slot) + " (buffer " + num(op_.out[0]) + ")");
  }
}

const Weight& OpChecker::kind_of(int32_t slot, int32_t kind) const {
  const Weight& w = weight(slot);
  if (w.kind != kind) {
    fail("w" + num(slot) + " " + describe_weight(w) + " was added as kind " + num(w.kind) +
         ", expected " + num(kind));
  }
  return w;
}

void OpChecker::require_vector(int32_t slot, int64_t size) const {
  if (op_.w[slot] == -1) {
    return;
  }
  const Weight& w = kind_of(slot, KT_WEIGHT_VECTOR);
  if (w.size() != size) {
    fail("w" + num(slot) + " " + describe_weight(w) + " has " + num(w.size()) +
         " values, expected " + num(size));
  }
}

void OpChecker::require_int(int32_t slot, int32_t low, int32_t high, const char* what) const {
  const int32_t value = op_.i[slot];
  if (value < low || value > high) {
    fail("i" + num(slot) + " (" + what + ") is " + num(value) + ", allowed is " + num(low) +
         " .. " + num(high));
  }
}

void OpChecker::check() const {
  switch (op_.code) {
    case KT_OP_EMBED:
      return check_embed();
    case KT_OP_RMSNORM:
      return check_norm();
    case KT_OP_LINEAR:
      return check_linear();
    case KT_OP_ATTENTION:
      return check_attention();
    case KT_OP_MOE:
      return check_moe();
    case KT_OP_SILU_MUL:
    case KT_OP_ADD:
    case KT_OP_GATE_ADD:
      return check_elementwise();
    case KT_OP_GATHER:
      return check_gather();
    default:
      fail("code " + num(op_.code) + " is unknown");
  }
}

void OpChecker::check_embed() const {
  const Weight& table = kind_of(0, KT_WEIGHT_BORROW);
  if (table.num_experts != 1) {
    fail("w0 " + describe_weight(table) + " must be one matrix");
  }
  require_width("out0", out(), table.cols);
  if (out().by_sample) {
    fail("out0 must have T rows");
  }
}

void OpChecker::check_norm() const {
  require_same_rows("in0", in(0), out());
  require_width("out0", out(), in(0).width);
  const int32_t group = op_.i[0] == 0 ? in(0).width : op_.i[0];
  if (group < 1 || in(0).width % group != 0) {
    fail("i0 (group) is " + num(op_.i[0]) + ", not a divisor of the width " + num(in(0).width));
  }
  if (op_.w[0] == -1) {
    fail("w0 is missing");
  }
  require_vector(0, group);
  if (!(op_.f[0] >= 0.0f)) {
    fail("f0 (eps) is " + std::to_string(op_.f[0]));
  }
}

void OpChecker::check_linear() const {
  const Weight& w = kind_of(0, KT_WEIGHT_MATRIX);
  if (w.num_experts != 1) {
    fail("w0 " + describe_weight(w) + " must be one matrix");
  }
  require_width("in0", in(0), w.cols);
  require_width("out0", out(), w.rows);
  require_same_rows("in0", in(0), out());
  require_not_aliased(0);
  require_vector(1, w.rows);
  if (op_.in[1] != -1) {
    require_width("in1", in(1), w.rows);
    require_same_rows("in1", in(1), out());
  }
}

void OpChecker::check_attention() const {
  require_int(0, 0, 100000, "KV layer");
  require_int(1, 1, 65536, "query heads");
  require_int(2, 1, 65536, "KV heads");
  require_int(3, 1, 1024, "head size");
  require_int(4, 0, op_.i[3], "rotary dims");
  require_int(5, 0, 1, "neox");
  if (op_.i[1] % op_.i[2] != 0) {
    fail(num(op_.i[1]) + " query heads are not a multiple of " + num(op_.i[2]) + " KV heads");
  }
  if (op_.i[1] / op_.i[2] > kQueryRows) {
    fail_unsupported(name_ + ": " + num(op_.i[1] / op_.i[2]) +
                     " query heads share a KV head, at most " + num(kQueryRows) + " may");
  }
  if (op_.i[4] % 2 != 0) {
    fail("i4 (rotary dims) is " + num(op_.i[4]) + ", must be even");
  }
  const int64_t q = int64_t{op_.i[1]} * op_.i[3];
  const int64_t k = int64_t{op_.i[2]} * op_.i[3];
  require_width("in0", in(0), q);
  require_width("in1", in(1), k);
  require_width("in2", in(2), k);
  require_width("out0", out(), q);
  for (int32_t slot = 0; slot < 3; ++slot) {
    if (in(slot).by_sample || out().by_sample) {
      fail("all buffers must have T rows");
    }
    require_not_aliased(slot);
  }
  require_vector(0, op_.i[3]);
  require_vector(1, op_.i[3]);
  if (op_.i[4] > 0 && op_.w[2] == -1) {
    fail("w2 (inverse frequencies) is missing");
  }
  require_vector(2, op_.i[4] / 2);
  if (!std::isfinite(op_.f[1])) {
    fail("f1 (softmax scale) is not finite");
  }
}

void OpChecker::check_moe() const {
  const Weight& router = weight(0);
  if (router.kind == KT_WEIGHT_BORROW || router.num_experts != 1) {
    fail("w0 " + describe_weight(router) + " must be one matrix, added as matrix or vector");
  }
  const ExpertWeights experts = {&kind_of(1, KT_WEIGHT_MATRIX), &kind_of(2, KT_WEIGHT_MATRIX),
                                 &kind_of(3, KT_WEIGHT_MATRIX)};
  check_expert_weights(experts, name_.c_str());
  const int32_t count = experts.gate->num_experts;
  if (router.rows != count || router.cols != experts.gate->cols) {
    fail("w0 " + describe_weight(router) + " does not fit gate " + describe_weight(*experts.gate));
  }
  require_width("in0", in(0), experts.gate->cols);
  require_width("out0", out(), experts.down->rows);
  require_same_rows("in0", in(0), out());
  require_not_aliased(0);
  if (op_.in[1] != -1) {
    require_width("in1", in(1), experts.down->rows);
    require_same_rows("in1", in(1), out());
  }
  require_vector(4, count);
  require_int(0, 1, count, "experts per token");
  require_int(1, 0, 1, "scoring");
  require_int(2, 0, 1, "renormalise");
  require_int(3, 0, 256, "expert groups");
  require_int(5, 0, 1, "group score");
  if (op_.i[3] > 0) {
    require_int(4, 1, op_.i[3], "groups kept");
    if (count % op_.i[3] != 0) {
      fail(num(count) + " experts do not divide into " + num(op_.i[3]) + " groups");
    }
    if (op_.i[0] > count / op_.i[3] * op_.i[4]) {
      fail("i0 (experts per token) is " + num(op_.i[0]) + ", the groups kept have " +
           num(count / op_.i[3] * op_.i[4]));
    }
  }
}

void OpChecker::check_elementwise() const {
  require_width("in0", in(0), out().width);
  require_same_rows("in0", in(0), out());
  require_same_rows("in1", in(1), out());
  require_not_aliased(1);
  if (op_.code == KT_OP_GATE_ADD) {
    require_width("in1", in(1), 1);
    require_width("in2", in(2), out().width);
    require_same_rows("in2", in(2), out());
    require_not_aliased(2);
  } else {
    require_width("in1", in(1), out().width);
  }
}

void OpChecker::check_gather() const {
  require_width("in0", in(0), out().width);
  if (in(0).by_sample) {
    fail("in0 must have T rows");
  }
  if (!out().by_sample) {
    fail("out0 must have S rows");
  }
}

}  // namespace kt
