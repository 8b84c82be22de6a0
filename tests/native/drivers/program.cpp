// Driver of whole steps: a small Qwen3MoE-shaped program fed by the native scheduler, as the engine
// thread feeds it, with requests submitted and cancelled by another thread meanwhile.
//
// Prints the greedy tokens of every request, so that another build or machine can be compared, then
// "ok": the tokens must not depend on the number of workers, of nodes, or on who shares a step.
// tests/native/sanitize.sh runs it, also under an emulator for ARM64. Usage: program [ISA].
#include <atomic>
#include <map>
#include <thread>

#include "driver.h"

namespace {

using driver::check;
using driver::expect;
using driver::Pool;
using driver::Random;
using driver::sized;
using driver::Tensor;

constexpr int32_t kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14, kF32 = 0;
constexpr int32_t kHidden = 256, kInner = 256, kExperts = 8, kTopK = 2, kVocab = 96, kLayers = 2;
constexpr int32_t kHeads = 4, kKvHeads = 2, kDim = 32, kPageSize = 16, kPages = 64, kChunk = 24;
constexpr int32_t kRequests = 6, kNewTokens = 8;

using Answers = std::map<uint64_t, std::vector<int32_t>>;

// Weights are drawn once and stay: the embedding table is borrowed.
struct Weights {
  struct Block {
    Tensor norm, q, k, v, head_norm, o, router, gate, up, down;
  };
  Tensor table, norm, head, frequencies;
  std::vector<Block> blocks;

  explicit Weights(Random& random) {
    const auto draw = [&](int32_t type, int32_t experts, int32_t rows, int32_t cols, float limit) {
      return driver::random_tensor(random, type, experts, rows, cols, limit);
    };
    table = draw(kQ8_0, 1, kVocab, kHidden, 1.0f);
    norm = draw(kF32, 1, 1, kHidden, 1.0f);
    head = draw(kQ6_K, 1, kVocab, kHidden, 0.5f);
    frequencies = draw(kF32, 1, 1, kDim / 2, 1.0f);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      blocks.push_back(
          {draw(kF32, 1, 1, kHidden, 1.0f), draw(kQ4_K, 1, kHeads * kDim, kHidden, 0.25f),
           draw(kQ4_K, 1, kKvHeads * kDim, kHidden, 0.25f),
           draw(kQ8_0, 1, kKvHeads * kDim, kHidden, 0.25f), draw(kF32, 1, 1, kDim, 1.0f),
           draw(kQ8_0, 1, kHidden, kHeads * kDim, 0.25f), draw(kF32, 1, kExperts, kHidden, 0.5f),
           draw(kQ4_K, kExperts, kInner, kHidden, 0.25f),
           draw(kQ4_K, kExperts, kInner, kHidden, 0.25f),
           draw(kQ6_K, kExperts, kHidden, kInner, 0.25f)});
    }
  }
};

class Program {
 public:
  Program(const Pool& pool, const Weights& w) {
    auto config = sized<kt_model_config>();
    config.max_tokens = kChunk;
    config.max_rows = 4;
    config.max_logit_rows = 4;
    config.page_size = kPageSize;
    config.num_pages = kPages;
    config.kv_type = KT_KV_F16;
    config.vocab_size = kVocab;
    config.sample_vocab = kVocab;
    check(kt_model_create(&config, pool.get(), &model_), "kt_model_create");
    const int32_t frequencies = weight(w.frequencies, KT_WEIGHT_VECTOR);
    const int32_t x = buffer(kHidden), h = buffer(kHidden), q = buffer(kHeads * kDim);
    const int32_t k = buffer(kKvHeads * kDim), v = buffer(kKvHeads * kDim);
    const int32_t mixed = buffer(kHeads * kDim);
    op(KT_OP_EMBED, {}, x, {weight(w.table, KT_WEIGHT_BORROW)});
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      const Weights::Block& b = w.blocks[static_cast<size_t>(layer)];
      const int32_t norm = weight(b.norm, KT_WEIGHT_VECTOR);
      const int32_t head_norm = weight(b.head_norm, KT_WEIGHT_VECTOR);
      op(KT_OP_RMSNORM, {x}, h, {norm}, {}, {1e-6f});
      op(KT_OP_LINEAR, {h}, q, {weight(b.q)});
      op(KT_OP_LINEAR, {h}, k, {weight(b.k)});
      op(KT_OP_LINEAR, {h}, v, {weight(b.v)});
      op(KT_OP_ATTENTION, {q, k, v}, mixed, {head_norm, head_norm, frequencies},
         {layer, kHeads, kKvHeads, kDim, kDim, 1}, {1e-6f, 0.18f});
      op(KT_OP_LINEAR, {mixed, x}, x, {weight(b.o)});
      op(KT_OP_RMSNORM, {x}, h, {norm}, {}, {1e-6f});
      op(KT_OP_MOE, {h, x}, x, {weight(b.router), weight(b.gate), weight(b.up), weight(b.down)},
         {kTopK, 0, 1});
    }
    const int32_t last = buffer(kHidden, 1), logits = buffer(kVocab, 1);
    op(KT_OP_GATHER, {x}, last, {});
    op(KT_OP_RMSNORM, {last}, last, {weight(w.norm, KT_WEIGHT_VECTOR)}, {}, {1e-6f});
    op(KT_OP_LINEAR, {last}, logits, {weight(w.head)});
    check(kt_model_finish(model_, logits), "kt_model_finish");
  }
  ~Program() { kt_model_destroy(model_); }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  kt_model* get() const { return model_; }

 private:
  int32_t buffer(int32_t width, int32_t by_sample = 0) {
    int32_t id = -1;
    check(kt_model_add_buffer(model_, width, by_sample, &id), "kt_model_add_buffer");
    return id;
  }
  int32_t weight(const Tensor& tensor, int32_t kind = KT_WEIGHT_MATRIX) {
    int32_t id = -1;
    check(kt_model_add_weight(model_, &tensor.head, kind, &id), "kt_model_add_weight");
    return id;
  }
  void op(int32_t code, const std::vector<int32_t>& in, int32_t out, const std::vector<int32_t>& w,
          const std::vector<int32_t>& ints = {}, const std::vector<float>& floats = {}) {
    auto op = sized<kt_op>();
    op.code = code;
    std::fill_n(op.in, 4, -1);
    std::fill_n(op.out, 2, -1);
    std::fill_n(op.w, 6, -1);
    std::copy(in.begin(), in.end(), op.in);
    op.out[0] = out;
    std::copy(w.begin(), w.end(), op.w);
    std::copy(ints.begin(), ints.end(), op.i);
    std::copy(floats.begin(), floats.end(), op.f);
    check(kt_model_add_op(model_, &op), "kt_model_add_op");
  }

  kt_model* model_ = nullptr;
};

kt_sched* make_scheduler() {
  auto config = sized<kt_sched_config>();
  config.flags = KT_SCHED_PREFIX_CACHE;
  config.max_batch_size = 4;
  config.chunk_size = kChunk;
  config.page_size = kPageSize;
  config.num_pages = kPages;
  config.max_len = 128;
  config.max_queue = 64;
  config.max_samples = 4;
  config.watermark_pages = -1;
  kt_sched* sched = nullptr;
  check(kt_sched_create(&config, &sched), "kt_sched_create");
  return sched;
}

void submit(kt_sched* sched, uint64_t seq_id) {
  Random random(seq_id % 1000);
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < 5 + 13 * static_cast<int32_t>(seq_id % 1000); ++i) {
    prompt.push_back(random.below(kVocab));
  }
  auto request = sized<kt_request>();
  request.num_tokens = static_cast<int32_t>(prompt.size());
  request.tokens = prompt.data();
  request.seq_id = seq_id;
  request.max_tokens = kNewTokens;
  request.top_p = 1;
  request.repetition_penalty = 1;
  request.num_logprobs = -1;
  request.prompt_logprobs = -1;
  check(kt_sched_submit(sched, &request, 0), "kt_sched_submit");
}

// The engine thread: runs steps until `expected` sequences have ended.
Answers serve(kt_sched* sched, kt_model* model, int32_t expected) {
  auto layout = sized<kt_block_layout>();
  check(kt_sched_layout(sched, &layout), "kt_sched_layout");
  std::vector<uint64_t> block(static_cast<size_t>(layout.num_bytes + 7) / 8);
  std::vector<int32_t> tokens(4), top_ids(4 * KT_MAX_LOGPROBS);
  std::vector<float> logprobs(4), top_logprobs(4 * KT_MAX_LOGPROBS);
  Answers answers;
  int64_t now = 0;
  for (int32_t ended = 0; ended < expected;) {
    auto plan = sized<kt_plan>();
    const int32_t status = kt_sched_plan(sched, ++now, block.data(), &plan);
    check(status, "kt_sched_plan");
    if (status == KT_OK) {
      auto out = sized<kt_sample_out>();
      out.num_samples = 4;
      out.tokens = tokens.data();
      out.logprobs = logprobs.data();
      out.top_ids = top_ids.data();
      out.top_logprobs = top_logprobs.data();
      check(kt_model_run(model, &plan, &layout, block.data(), &out), "kt_model_run");
      check(kt_sched_commit(sched, ++now, tokens.data(), plan.num_samples), "kt_sched_commit");
    }
    kt_event events[64];
    int32_t count = 0;
    check(kt_sched_drain(sched, events, 64, &count), "kt_sched_drain");
    for (int32_t i = 0; i < count; ++i) {
      if (events[i].kind == KT_EVENT_TOKEN) {
        answers[events[i].seq_id].push_back(events[i].token);
      }
      ended += events[i].kind == KT_EVENT_FINISH ? 1 : 0;
    }
    if (status == KT_IDLE && count == 0) {
      check(kt_sched_wait(sched, 1'000'000'000), "kt_sched_wait");
    }
  }
  check(kt_sched_check(sched), "kt_sched_check");
  return answers;
}

// Requests 1 .. n with their answers. extra: a second thread adds and cancels others meanwhile.
Answers answers_of(int32_t isa, const Weights& weights, int32_t threads, int32_t nodes,
                   bool extra) {
  const Pool pool(threads, isa, nodes);
  const Program program(pool, weights);
  kt_sched* sched = make_scheduler();
  int32_t expected = kRequests;
  std::thread client;
  for (uint64_t seq_id = 1; seq_id <= kRequests; ++seq_id) {
    submit(sched, seq_id);
  }
  if (extra) {
    expected += kRequests;
    client = std::thread([sched] {
      for (uint64_t seq_id = 1; seq_id <= kRequests; ++seq_id) {
        submit(sched, 1000 + seq_id);
        check(kt_sched_cancel(sched, 1000 + seq_id / 2), "kt_sched_cancel");
      }
    });
  }
  Answers answers = serve(sched, program.get(), expected);
  if (client.joinable()) {
    client.join();
  }
  check(kt_sched_destroy(sched), "kt_sched_destroy");
  answers.erase(answers.upper_bound(kRequests), answers.end());
  return answers;
}

}  // namespace

int main(int argc, char** argv) {
  Random random(7);
  const Weights weights(random);
  for (const int32_t isa : driver::isas(argc, argv)) {
    const Answers alone = answers_of(isa, weights, 1, 0, false);
    for (const auto& [seq_id, tokens] : alone) {
      std::printf("isa %d request %d:", static_cast<int>(isa), static_cast<int>(seq_id));
      for (const int32_t token : tokens) {
        std::printf(" %d", static_cast<int>(token));
      }
      std::printf("\n");
      expect(tokens.size() == kNewTokens, "an answer has the wrong length");
    }
    expect(alone.size() == kRequests, "answers are missing");
    expect(answers_of(isa, weights, 3, 0, true) == alone, "3 workers, more clients: other tokens");
    expect(answers_of(isa, weights, 4, 2, true) == alone, "2 nodes, more clients: other tokens");
  }
  return driver::result();
}
