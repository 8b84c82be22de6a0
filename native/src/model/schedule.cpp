#include "model/schedule.h"

#include <algorithm>

namespace kt {
namespace {

StepClass class_of(int32_t code) {
  switch (code) {
    case KT_OP_LINEAR:
      return kClassLinear;
    case KT_OP_ATTENTION:
      return kClassAttention;
    case KT_OP_MOE:
      return kClassExperts;
    default:
      return kClassOther;
  }
}

bool reads(const kt_op& op, int32_t buffer) {
  for (const int32_t id : op.in) {
    if (id == buffer) {
      return true;
    }
  }
  return false;
}

}  // namespace

// Linears and expert layers read in0 in prepared form.
bool Scheduler::reads_prepared(const kt_op& op) const {
  return op.code == KT_OP_LINEAR || op.code == KT_OP_MOE;
}

uint32_t Scheduler::form_of(const kt_op& op) const {
  const int32_t slot = op.code == KT_OP_MOE ? 1 : 0;
  return 1u << m_.weights_[static_cast<size_t>(op.w[slot])].act;
}

// Forms that readers of an operation's output want, until something overwrites the buffer.
uint32_t Scheduler::wanted_forms(size_t index) const {
  const int32_t buffer = m_.ops_[index].out[0];
  uint32_t forms = 0;
  for (size_t i = index + 1; i < m_.ops_.size(); ++i) {
    const kt_op& op = m_.ops_[i];
    if (reads_prepared(op) && op.in[0] == buffer) {
      forms |= form_of(op);
    }
    if (op.out[0] == buffer) {
      break;
    }
  }
  return forms;
}

// Operations that finish whole 32-column blocks of a row on one worker prepare them on the way.
bool Scheduler::can_prepare(const kt_op& op) const {
  switch (op.code) {
    case KT_OP_LINEAR:
    case KT_OP_MOE:
      return false;
    case KT_OP_ATTENTION:
      return op.i[1] / op.i[2] * op.i[3] % 32 == 0;
    default:
      return true;
  }
}

// A norm of few rows is repeated by every worker instead of shared, when only linears and expert
// layers read it and the next step does not overwrite its input while slower workers still read it.
bool Scheduler::may_be_private(size_t index, size_t* last_reader) const {
  const kt_op& norm = m_.ops_[index];
  if (norm.code != KT_OP_RMSNORM || norm.in[0] == norm.out[0]) {
    return false;
  }
  if (index + 1 == m_.ops_.size()) {
    return false;
  }
  *last_reader = 0;
  for (size_t i = index + 1; i < m_.ops_.size(); ++i) {
    const kt_op& op = m_.ops_[i];
    if (reads(op, norm.out[0])) {
      const bool only_first = op.in[0] == norm.out[0] && op.in[1] != norm.out[0];
      if (!reads_prepared(op) || !only_first) {
        return false;
      }
      *last_reader = i;
    }
    if (op.out[0] == norm.out[0]) {
      break;
    }
  }
  if (*last_reader == 0) {
    return false;
  }
  // Workers have one private row area: no other norm may claim it in between.
  for (size_t i = index + 1; i < *last_reader; ++i) {
    if (m_.ops_[i].code == KT_OP_RMSNORM) {
      return false;
    }
  }
  for (size_t i = index + 1; i < m_.ops_.size(); ++i) {
    if (i > index + 1 && !joins_group(index + 1, i)) {
      break;
    }
    // An expert layer writes its output only after barriers of its own.
    if (m_.ops_[i].code != KT_OP_MOE && m_.ops_[i].out[0] == norm.in[0]) {
      return false;
    }
  }
  return true;
}

// Whether linear `index` may run in the same step as the linears first .. index - 1.
bool Scheduler::joins_group(size_t first, size_t index) const {
  const kt_op& op = m_.ops_[index];
  const kt_op& head = m_.ops_[first];
  if (op.code != KT_OP_LINEAR || head.code != KT_OP_LINEAR || op.in[0] != head.in[0]) {
    return false;
  }
  for (size_t i = first; i < index; ++i) {
    const kt_op& other = m_.ops_[i];
    if (other.out[0] == op.out[0] || other.out[0] == op.in[0] || other.out[0] == op.in[1] ||
        op.out[0] == other.in[0] || op.out[0] == other.in[1]) {
      return false;
    }
    const auto parts = [&](const kt_op& o) {
      return m_.weights_[static_cast<size_t>(o.w[0])].parts.size();
    };
    if (parts(op) != parts(other)) {
      return false;
    }
  }
  return true;
}

void Scheduler::require_forms(int32_t buffer, uint32_t forms) {
  const auto b = static_cast<size_t>(buffer);
  needed_[b] |= forms;
  const uint32_t missing = forms & ~valid_[b];
  if (missing == 0) {
    return;
  }
  Step step;
  step.code = kStepPrepare;
  step.buffer = buffer;
  step.prepare = missing;
  step.time_class = kClassOther;
  m_.steps_.push_back(step);
  valid_[b] |= missing;
}

void Scheduler::push_step(size_t first, size_t count) {
  const kt_op& op = m_.ops_[first];
  Step step;
  step.code = op.code;
  step.first = static_cast<int32_t>(first);
  step.count = static_cast<int32_t>(count);
  step.time_class = class_of(op.code);
  if (reads_prepared(op)) {
    const auto in = static_cast<size_t>(op.in[0]);
    uint32_t forms = 0;
    for (size_t i = first; i < first + count; ++i) {
      forms |= form_of(m_.ops_[i]);
    }
    step.use_private = is_private_[in];
    // Needed in shared form too: which one is used depends on the number of rows.
    require_forms(op.in[0], forms);
    const auto parts = static_cast<int32_t>(
        m_.weights_[static_cast<size_t>(op.w[op.code == KT_OP_MOE ? 1 : 0])].parts.size());
    step.tails = m_.num_tails_;
    m_.num_tails_ += op.code == KT_OP_MOE ? 2 * std::max(parts, m_.workers_.num_nodes()) : parts;
  } else if (op.code == KT_OP_ATTENTION) {
    step.tails = m_.num_tails_++;
  }
  for (size_t i = first; i < first + count; ++i) {
    const auto out = static_cast<size_t>(m_.ops_[i].out[0]);
    valid_[out] = 0;
    is_private_[out] = false;
  }
  if (can_prepare(op)) {
    const auto out = static_cast<size_t>(op.out[0]);
    step.prepare = wanted_forms(first);
    valid_[out] = step.prepare;
    needed_[out] |= step.prepare;
    size_t last_reader = 0;
    step.use_private = step.prepare != 0 && may_be_private(first, &last_reader);
    is_private_[out] = step.use_private;
  }
  m_.steps_.push_back(step);
}

void Scheduler::build() {
  valid_.assign(m_.buffers_.size(), 0);
  needed_.assign(m_.buffers_.size(), 0);
  is_private_.assign(m_.buffers_.size(), false);
  for (size_t i = 0; i < m_.ops_.size();) {
    size_t count = 1;
    while (i + count < m_.ops_.size() && joins_group(i, i + count)) {
      ++count;
    }
    push_step(i, count);
    i += count;
  }
  for (size_t b = 0; b < m_.buffers_.size(); ++b) {
    Buffer& buffer = m_.buffers_[b];
    for (int32_t kind = 0; kind < kNumActKinds; ++kind) {
      if (((needed_[b] >> kind) & 1u) != 0) {
        buffer.act_stride[kind] = act_row_bytes(static_cast<ActKind>(kind), buffer.width);
      }
    }
  }
}

}  // namespace kt
