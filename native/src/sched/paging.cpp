// Which sequence holds which pages: taking, sharing, evicting, preempting.
#include <algorithm>

#include "base/error.h"
#include "sched/scheduler.h"

namespace kt::sched {
namespace {

constexpr size_t kPrefetchWindow = 16;  // pages whose lookups overlap their cache misses

}  // namespace

// A page to write into: a free one, else the longest idle cached one. -1 when every page is in use.
int32_t Scheduler::take_page() {
  const int32_t free_page = pool_.take();
  if (free_page >= 0) {
    return free_page;
  }
  const int32_t id = tree_.oldest_idle();
  if (id < 0) {
    return -1;
  }
  counters_.evicted_pages += 1;
  const int32_t host_page = take_host_page();
  if (host_page >= 0) {
    const int32_t page = tree_.move_to_host(id, host_page);
    copies_out_.push_back({page, host_page});
    return page;
  }
  // Without a host page the node goes, and nothing is below it: its children would lie idle on the
  // host, where take_host_page had found one.
  const int32_t page = tree_.node(id).page;
  tree_.remove(id);
  return page;
}

int32_t Scheduler::take_host_page() {
  const int32_t free_page = host_pool_.take();
  if (free_page >= 0) {
    return free_page;
  }
  const int32_t id = tree_.oldest_host_idle();
  if (id < 0) {
    return -1;
  }
  const int32_t host_page = tree_.node(id).host_page;
  tree_.remove(id);
  // Had the page been filled by this very plan, two copies would go to one place.
  copies_out_.erase(
      std::remove_if(copies_out_.begin(), copies_out_.end(),
                     [&](const PageCopy& copy) { return copy.host_page == host_page; }),
      copies_out_.end());
  return host_page;
}

// Gives `seq` pages for its first num_tokens tokens. May take pages from younger sequences, in the
// end from itself, when asked to. On failure it keeps what it got, unless it was preempted.
bool Scheduler::reserve(Sequence& seq, int32_t num_tokens, bool may_preempt) {
  const auto need = static_cast<size_t>(pages_for(num_tokens));
  while (seq.pages.size() < need) {
    const int32_t page = take_page();
    if (page >= 0) {
      seq.pages.push_back(page);
      continue;
    }
    if (!may_preempt) {
      return false;
    }
    Sequence* youngest = running_.back();
    if (youngest->is_in_lane) {
      lane_blocks_pages_ = true;
      return false;
    }
    preempt(*youngest);
    if (youngest == &seq) {
      return false;
    }
  }
  return true;
}

// Pages that running prefills still lack.
int64_t Scheduler::promised_pages() const {
  int64_t promised = 0;
  for (const Sequence* seq : running_) {
    const int64_t lacking = pages_for(seq->num_tokens()) - static_cast<int64_t>(seq->pages.size());
    promised += std::max<int64_t>(0, lacking);
  }
  return promised;
}

// How many leading pages may come from the cache: at least one token has to run, and positions
// whose log-probability is wanted have to run too.
size_t Scheduler::max_shared_pages(const Sequence& seq) const {
  if (!has_flag(KT_SCHED_PREFIX_CACHE)) {
    return 0;
  }
  int32_t last = seq.num_tokens() - 1;
  if (seq.prompt_logprobs >= 0 && seq.num_prompt_scored < seq.prompt_len - 1) {
    last = std::min(last, seq.num_prompt_scored);
  }
  return static_cast<size_t>(last / config_.page_size);
}

// Hashes the pages that new tokens have filled.
void Scheduler::hash_pages(Sequence& seq) {
  if (!has_flag(KT_SCHED_PREFIX_CACHE)) {
    return;
  }
  const size_t num_full = seq.tokens.size() / static_cast<size_t>(config_.page_size);
  for (size_t i = seq.hashes.size(); i < num_full; ++i) {
    const uint64_t parent_hash = i == 0 ? root_hash(seq.cache_salt) : seq.hashes[i - 1];
    const int32_t* tokens = &seq.tokens[i * static_cast<size_t>(config_.page_size)];
    seq.hashes.push_back(page_hash(parent_hash, tokens, config_.page_size));
  }
}

// The cached path of a waiting sequence. Valid until the tree loses a node.
const std::vector<int32_t>& Scheduler::match(const Sequence& seq) {
  if (match_.arrival != seq.key.arrival || match_.num_removed != tree_.num_removed()) {
    match_.arrival = seq.key.arrival;
    match_.num_removed = tree_.num_removed();
    match_.nodes.clear();
  }
  const size_t limit = max_shared_pages(seq);
  for (size_t i = match_.nodes.size(); i < limit; ++i) {
    if (i % kPrefetchWindow == 0) {
      tree_.prefetch(&seq.hashes[i], static_cast<int32_t>(std::min(limit - i, kPrefetchWindow)));
    }
    const int32_t id = tree_.find(i == 0 ? -1 : match_.nodes[i - 1], seq.cache_salt, seq.hashes[i],
                                  &seq.tokens[i * static_cast<size_t>(config_.page_size)]);
    if (id < 0) {
      break;
    }
    match_.nodes.push_back(id);
  }
  return match_.nodes;
}

// Appends a referenced node's page to the sequence: these tokens need not be computed.
void Scheduler::use_node(Sequence& seq, int32_t id) {
  const PrefixTree::Node& node = tree_.node(id);
  seq.nodes.push_back(id);
  seq.pages.push_back(node.page);
  seq.num_planned += config_.page_size;
  seq.ready_plan = std::max(seq.ready_plan, node.ready_plan);
  if (seq.admissions == 1) {
    seq.num_cached += config_.page_size;
    counters_.prefix_hit_tokens += static_cast<uint64_t>(config_.page_size);
  }
}

// Brings a referenced host node back; the caller has made sure that a device page can be had.
void Scheduler::load_node(int32_t id) {
  const int32_t page = take_page();
  if (page < 0) {
    fail_internal("no page for a cached prefix that was counted as fitting");
  }
  const int32_t host_page = tree_.move_to_device(id, page, plan_id_ + 1);
  copies_in_.push_back({page, host_page});
  host_freed_.push_back(host_page);
}

// Continues a prefill with pages that others have computed since it was admitted.
void Scheduler::adopt(Sequence& seq) {
  const size_t limit = max_shared_pages(seq);
  while (seq.nodes.size() < limit && seq.nodes.size() == seq.pages.size() &&
         seq.num_planned == static_cast<int32_t>(seq.pages.size()) * config_.page_size) {
    const size_t i = seq.nodes.size();
    const int32_t id = tree_.find(i == 0 ? -1 : seq.nodes[i - 1], seq.cache_salt, seq.hashes[i],
                                  &seq.tokens[i * static_cast<size_t>(config_.page_size)]);
    if (id < 0 || tree_.node(id).page < 0 || tree_.node(id).ready_plan > plan_id_) {
      return;
    }
    tree_.acquire(id);
    use_node(seq, id);
  }
}

// Puts full pages among the first num_computed tokens into the tree. When another sequence was
// faster, its page is used from now on and the own copy is free again.
void Scheduler::share(Sequence& seq, int32_t num_computed) {
  if (!has_flag(KT_SCHED_PREFIX_CACHE)) {
    return;
  }
  const auto page_size = static_cast<size_t>(config_.page_size);
  while ((seq.nodes.size() + 1) * page_size <= static_cast<size_t>(num_computed)) {
    const size_t i = seq.nodes.size();
    const int32_t* tokens = &seq.tokens[i * page_size];
    const int32_t parent = i == 0 ? -1 : seq.nodes[i - 1];
    int32_t id = tree_.find(parent, seq.cache_salt, seq.hashes[i], tokens);
    if (id < 0) {
      id = tree_.insert(parent, seq.cache_salt, seq.hashes[i], tokens, seq.pages[i]);
    } else {
      tree_.acquire(id);
      if (tree_.node(id).page < 0) {
        host_pool_.give_back(tree_.move_to_device(id, seq.pages[i], 0));
      } else {
        pool_.give_back(seq.pages[i]);
        seq.pages[i] = tree_.node(id).page;
        seq.ready_plan = std::max(seq.ready_plan, tree_.node(id).ready_plan);
      }
    }
    seq.nodes.push_back(id);
  }
}

// Takes all pages away; what the cache keeps makes the later recomputation short.
void Scheduler::preempt(Sequence& seq) {
  release_pages(seq);
  running_.erase(std::find(running_.begin(), running_.end(), &seq));
  seq.is_running = false;
  waiting_.emplace(seq.key, &seq);
  num_preempted_ += 1;
  counters_.preempted += 1;
}

void Scheduler::release_pages(Sequence& seq) {
  while (seq.pages.size() > seq.nodes.size()) {
    pool_.give_back(seq.pages.back());
    seq.pages.pop_back();
  }
  // Deepest first: the tree's lists rely on it.
  for (auto it = seq.nodes.rbegin(); it != seq.nodes.rend(); ++it) {
    tree_.release(*it);
  }
  seq.nodes.clear();
  seq.pages.clear();
  seq.num_planned = 0;
}

// Drops every cached page that nobody uses.
void Scheduler::forget_idle() {
  while (tree_.oldest_host_idle() >= 0) {
    host_pool_.give_back(tree_.node(tree_.oldest_host_idle()).host_page);
    tree_.remove(tree_.oldest_host_idle());
  }
  while (tree_.oldest_idle() >= 0) {
    pool_.give_back(tree_.node(tree_.oldest_idle()).page);
    tree_.remove(tree_.oldest_idle());
  }
}

const char* Scheduler::check_pages() const {
  std::vector<int32_t> users(static_cast<size_t>(tree_.max_nodes()), 0);
  int64_t num_private = 0;
  for (const Sequence* seq : running_) {
    num_private += static_cast<int64_t>(seq->pages.size() - seq->nodes.size());
    for (size_t i = 0; i < seq->nodes.size(); ++i) {
      const auto id = static_cast<size_t>(seq->nodes[i]);
      users[id] += 1;
      if (tree_.node(seq->nodes[i]).page != seq->pages[i]) {
        return "a shared page moved";
      }
    }
  }
  if (const char* wrong = tree_.check(users)) {
    return wrong;
  }
  int64_t num_shared = 0;
  std::vector<uint8_t> seen(static_cast<size_t>(config_.num_pages), 0);
  const auto see = [&seen](int32_t page) { return seen[static_cast<size_t>(page)]++ == 0; };
  for (int32_t id = 0; id < tree_.max_nodes(); ++id) {
    const PrefixTree::Node& node = tree_.node(id);
    if (node.refs < 0 || node.page < 0) {
      continue;
    }
    num_shared += 1;
    if (!see(node.page)) {
      return "two nodes hold one page";
    }
  }
  for (const Sequence* seq : running_) {
    for (size_t i = seq->nodes.size(); i < seq->pages.size(); ++i) {
      if (!see(seq->pages[i])) {
        return "a page has two owners";
      }
    }
  }
  if (num_private + num_shared + pool_.num_free() != config_.num_pages) {
    return "a page is lost";
  }
  return nullptr;
}

}  // namespace kt::sched
