// Drawing one token of a row: the random part of the sampler (see sampler.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "model/philox.h"
#include "model/sampler.h"

namespace kt {
namespace {

// Buckets by weight, four per power of two: exponent and two mantissa bits, read off the float's
// representation, which orders non-negative floats. The last one holds everything below kSmall.
constexpr int32_t kBuckets = 82;
constexpr float kSmall = 0x1p-20f;

int32_t bucket_of(float weight) {
  constexpr int32_t kOne = 0x3f800000;
  int32_t bits = 0;
  std::memcpy(&bits, &weight, 4);
  return std::clamp((kOne - bits) >> 21, 0, kBuckets - 1);
}

}  // namespace

int32_t Sampler::draw(const kt_sample_params& p, float* values, float best, int32_t best_id,
                      DrawScratch& scratch) const {
  const float inverse = 1.0f / p.temperature;
  // So cold that the division overflows: the distribution is its maximum.
  if (!std::isfinite(inverse)) {
    return best_id;
  }
  if (p.top_k > 0 && p.top_k < sample_vocab_) {
    return draw_of_few(p, values, best, inverse, scratch);
  }
  return draw_of_all(p, values, best, inverse, best_id, scratch);
}

void Sampler::find_chunk_max(const float* values, DrawScratch& scratch) const {
  for (int32_t at = 0; at < sample_vocab_; at += kDrawChunk) {
    (void)vector_.argmax(values + at, std::min(kDrawChunk, sample_vocab_ - at),
                         &scratch.chunk_max[static_cast<size_t>(at / kDrawChunk)]);
  }
}

// The k largest values, largest first, ties by id, as candidates.
void Sampler::largest(const float* values, int32_t k, DrawScratch& scratch) const {
  find_chunk_max(values, scratch);
  const int32_t chunks = (sample_vocab_ + kDrawChunk - 1) / kDrawChunk;
  float bound = -std::numeric_limits<float>::infinity();
  if (k < chunks) {
    // k chunks have a maximum of at least this, so the k-th largest value is not below it.
    auto& order = scratch.order;
    std::copy_n(scratch.chunk_max.begin(), chunks, order.begin());
    std::nth_element(order.begin(), order.begin() + (k - 1), order.begin() + chunks,
                     std::greater<>());
    bound = order[static_cast<size_t>(k) - 1];
  }
  auto& found = scratch.candidates;
  found.clear();
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    if (scratch.chunk_max[static_cast<size_t>(chunk)] < bound) {
      continue;
    }
    const int32_t first = chunk * kDrawChunk;
    const int32_t last = std::min(sample_vocab_, first + kDrawChunk);
    for (int32_t id = first; id < last; ++id) {
      if (values[id] >= bound) {
        found.push_back({values[id], id});
      }
    }
  }
  const auto heavier = [](const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
  };
  const auto count = std::min<int64_t>(k, static_cast<int64_t>(found.size()));
  std::partial_sort(found.begin(), found.begin() + count, found.end(), heavier);
  found.resize(static_cast<size_t>(count));
}

int32_t Sampler::draw_of_few(const kt_sample_params& p, const float* values, float best,
                             float inverse, DrawScratch& scratch) const {
  largest(values, p.top_k, scratch);
  auto& kept = scratch.candidates;
  double total = 0.0;
  for (Candidate& c : kept) {
    (void)vector_.sum_exp(&c.weight, 1, best, inverse, &c.weight);
    total += static_cast<double>(c.weight);
  }
  double sum = 0.0;
  size_t count = 0;
  // The first is always kept; top_p keeps the fewest that reach its mass, min_p cuts the light end.
  while (count < kept.size()) {
    const float weight = kept[count].weight;
    if (count > 0 && (weight < p.min_p || weight == 0.0f)) {
      break;
    }
    sum += static_cast<double>(weight);
    ++count;
    if (p.top_p < 1.0f && sum >= static_cast<double>(p.top_p) * total) {
      break;
    }
  }
  kept.resize(count);
  std::sort(kept.begin(), kept.end(),
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  const double wanted = philox_uniform(p.seed, static_cast<uint64_t>(p.position)) * sum;
  double seen = 0.0;
  for (const Candidate& c : kept) {
    seen += static_cast<double>(c.weight);
    if (seen > wanted) {
      return c.id;
    }
  }
  return kept.back().id;
}

int32_t Sampler::draw_of_all(const kt_sample_params& p, float* weights, float best, float inverse,
                             int32_t best_id, DrawScratch& scratch) const {
  double total = 0.0;
  for (int32_t at = 0; at < sample_vocab_; at += kSlice) {
    const int32_t n = std::min(kSlice, sample_vocab_ - at);
    total += vector_.sum_exp(weights + at, n, best, inverse, weights + at);
  }
  find_chunk_max(weights, scratch);
  Candidate last = {0.0f, std::numeric_limits<int32_t>::max()};  // the lightest that is kept
  if (p.top_p < 1.0f) {
    last = cut_mass(weights, static_cast<double>(p.top_p) * total, total, scratch);
  }
  if (p.min_p > last.weight) {
    last = {p.min_p, std::numeric_limits<int32_t>::max()};
  }
  const auto visit = [&](auto&& body) {
    for (int32_t at = 0; at < sample_vocab_; at += kDrawChunk) {
      if (scratch.chunk_max[static_cast<size_t>(at / kDrawChunk)] < last.weight) {
        continue;
      }
      const int32_t end = std::min(sample_vocab_, at + kDrawChunk);
      for (int32_t id = at; id < end; ++id) {
        const float w = weights[id];
        // Written so that NaN is never kept.
        if (!(w > last.weight || (w == last.weight && id <= last.id && w > 0.0f))) {
          continue;
        }
        if (!body(w, id)) {
          return;
        }
      }
    }
  };
  double kept = 0.0;
  visit([&](float w, int32_t) {
    kept += static_cast<double>(w);
    return true;
  });
  const double wanted = philox_uniform(p.seed, static_cast<uint64_t>(p.position)) * kept;
  double seen = 0.0;
  int32_t token = best_id;
  visit([&](float w, int32_t id) {
    seen += static_cast<double>(w);
    token = id;
    return seen <= wanted;
  });
  return token;
}

// The last of the fewest heaviest tokens whose sum reaches `mass`; at least the heaviest.
Sampler::Candidate Sampler::cut_mass(const float* weights, double mass, double total,
                                     DrawScratch& scratch) const {
  double sums[kBuckets] = {};
  double large = 0.0;
  for (int32_t at = 0; at < sample_vocab_; at += kDrawChunk) {
    if (scratch.chunk_max[static_cast<size_t>(at / kDrawChunk)] < kSmall) {
      continue;
    }
    const int32_t end = std::min(sample_vocab_, at + kDrawChunk);
    for (int32_t id = at; id < end; ++id) {
      if (weights[id] < kSmall) {
        continue;
      }
      sums[bucket_of(weights[id])] += static_cast<double>(weights[id]);
      large += static_cast<double>(weights[id]);
    }
  }
  sums[kBuckets - 1] = std::max(total - large, 0.0);
  int32_t boundary = 0;
  double before = 0.0;
  while (boundary < kBuckets - 1 && before + sums[boundary] < mass) {
    before += sums[boundary++];
  }
  auto& found = scratch.candidates;
  found.clear();
  for (int32_t id = 0; id < sample_vocab_; ++id) {
    const float w = weights[id];
    const bool inside =
        boundary == kBuckets - 1 ? w < kSmall : w >= kSmall && bucket_of(w) == boundary;
    if (inside) {
      found.push_back({w, id});
    }
  }
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
  });
  Candidate last = {0.0f, std::numeric_limits<int32_t>::max()};
  for (const Candidate& c : found) {
    last = c;
    before += static_cast<double>(c.weight);
    if (before >= mass) {
      break;
    }
  }
  return last;
}

}  // namespace kt
