#include "sched/prefix.h"

#include <cstring>

#include "base/error.h"

namespace kt::sched {
namespace {

constexpr int32_t kIsUnused = -2;  // Node::refs of an unused node

// Multiply and fold 128 bits, the mixing step of the wyhash family.
uint64_t fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

constexpr uint64_t kOdd1 = 0x9E3779B97F4A7C15;
constexpr uint64_t kOdd2 = 0xD6E8FEB86659FD93;
constexpr uint64_t kOdd3 = 0xA0761D6478BD642F;

}  // namespace

uint64_t root_hash(uint64_t salt) { return fold(salt ^ kOdd1, kOdd2); }

uint64_t page_hash(uint64_t parent_hash, const int32_t* tokens, int32_t page_size) {
  // Two independent lanes hide the latency of the multiplication.
  uint64_t lane1 = parent_hash ^ kOdd1;
  uint64_t lane2 = parent_hash + kOdd2;
  int32_t i = 0;
  for (; i + 4 <= page_size; i += 4) {
    uint64_t word1;
    uint64_t word2;
    std::memcpy(&word1, tokens + i, 8);
    std::memcpy(&word2, tokens + i + 2, 8);
    lane1 = fold(lane1 ^ word1, kOdd3);
    lane2 = fold(lane2 ^ word2, kOdd1);
  }
  for (; i < page_size; ++i) {
    lane1 = fold(lane1 ^ static_cast<uint32_t>(tokens[i]), kOdd3);
  }
  return fold(lane1 ^ kOdd2, lane2 ^ static_cast<uint64_t>(page_size));
}

PrefixTree::PrefixTree(int32_t num_pages, int32_t num_host_pages, int32_t page_size)
    : page_size_(page_size) {
  const size_t count = static_cast<size_t>(num_pages) + static_cast<size_t>(num_host_pages);
  nodes_.resize(count);
  tokens_.reset(new int32_t[count * static_cast<size_t>(page_size)]);
  size_t num_buckets = 1;
  while (num_buckets < count * 2) {
    num_buckets *= 2;
  }
  buckets_.assign(num_buckets, -1);
  for (size_t i = count; i-- > 0;) {
    nodes_[i].refs = kIsUnused;
    nodes_[i].next = unused_;
    unused_ = static_cast<int32_t>(i);
  }
}

void PrefixTree::prefetch(const uint64_t* hashes, int32_t count) const {
  for (int32_t i = 0; i < count; ++i) {
    __builtin_prefetch(&buckets_[bucket_of(hashes[i])]);
  }
  for (int32_t i = 0; i < count; ++i) {
    const int32_t id = buckets_[bucket_of(hashes[i])];
    if (id < 0) {
      continue;
    }
    __builtin_prefetch(&nodes_[static_cast<size_t>(id)]);
    const char* tokens = reinterpret_cast<const char*>(tokens_of(id));
    for (int32_t at = 0; at < page_size_ * 4 && at < 512; at += 64) {
      __builtin_prefetch(tokens + at);
    }
  }
}

int32_t PrefixTree::find(int32_t parent, uint64_t salt, uint64_t hash,
                         const int32_t* tokens) const {
  for (int32_t id = buckets_[bucket_of(hash)]; id >= 0; id = node(id).next) {
    const Node& n = node(id);
    if (n.hash == hash && n.parent == parent && (parent >= 0 || n.salt == salt) &&
        std::memcmp(tokens_of(id), tokens, static_cast<size_t>(page_size_) * 4) == 0) {
      return id;
    }
  }
  return -1;
}

int32_t PrefixTree::insert(int32_t parent, uint64_t salt, uint64_t hash, const int32_t* tokens,
                           int32_t page) {
  // Every node holds a page of its own, so there are always as many nodes as pages.
  if (unused_ < 0) {
    fail_internal("the prefix tree has more nodes than pages");
  }
  const int32_t id = unused_;
  Node& n = at(id);
  unused_ = n.next;
  n = Node();
  n.hash = hash;
  n.salt = salt;
  n.parent = parent;
  n.refs = 1;
  n.page = page;
  int32_t& bucket = buckets_[bucket_of(hash)];
  n.next = bucket;
  bucket = id;
  if (parent >= 0) {
    at(parent).num_children += 1;
  }
  std::memcpy(tokens_of(id), tokens, static_cast<size_t>(page_size_) * 4);
  return id;
}

void PrefixTree::acquire(int32_t id) {
  if (at(id).refs++ == 0) {
    unlink(id);
  }
}

void PrefixTree::release(int32_t id) {
  if (at(id).refs <= 0) {
    fail_internal("a cached page was released more often than used");
  }
  if (--at(id).refs == 0) {
    append(id);
  }
}

void PrefixTree::remove(int32_t id) {
  Node& n = at(id);
  if (n.refs != 0 || n.num_children != 0) {
    fail_internal("a cached page in use was evicted");
  }
  unlink(id);
  int32_t* link = &buckets_[bucket_of(n.hash)];
  while (*link != id) {
    link = &at(*link).next;
  }
  *link = n.next;
  if (n.parent >= 0) {
    at(n.parent).num_children -= 1;
  }
  n.refs = kIsUnused;
  n.next = unused_;
  unused_ = id;
  num_removed_ += 1;
}

int32_t PrefixTree::move_to_host(int32_t id, int32_t host_page) {
  unlink(id);
  Node& n = at(id);
  const int32_t page = n.page;
  n.page = -1;
  n.host_page = host_page;
  append(id);
  return page;
}

int32_t PrefixTree::move_to_device(int32_t id, int32_t page, uint64_t ready_plan) {
  Node& n = at(id);
  if (n.refs <= 0) {
    fail_internal("an idle page was loaded");
  }
  const int32_t host_page = n.host_page;
  n.page = page;
  n.host_page = -1;
  n.ready_plan = ready_plan;
  return host_page;
}

void PrefixTree::append(int32_t id) {
  Node& n = at(id);
  List& list = list_of(n);
  n.older = list.tail;
  n.newer = -1;
  (list.tail >= 0 ? at(list.tail).newer : list.head) = id;
  list.tail = id;
  list.size += 1;
}

void PrefixTree::unlink(int32_t id) {
  Node& n = at(id);
  List& list = list_of(n);
  (n.older >= 0 ? at(n.older).newer : list.head) = n.newer;
  (n.newer >= 0 ? at(n.newer).older : list.tail) = n.older;
  n.older = n.newer = -1;
  list.size -= 1;
}

const char* PrefixTree::check(const std::vector<int32_t>& users) const {
  std::vector<int32_t> children(nodes_.size(), 0);
  int32_t num_idle = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& n = nodes_[i];
    if (n.refs == kIsUnused) {
      if (users[i] != 0) {
        return "a sequence uses a node that does not exist";
      }
      continue;
    }
    if (n.refs != users[i]) {
      return "reference count differs from the number of users";
    }
    if ((n.page >= 0) == (n.host_page >= 0)) {
      return "a node is not in exactly one tier";
    }
    if (n.refs > 0 && n.page < 0) {
      return "a node in use has no device page";
    }
    if (n.refs == 0) {
      num_idle += 1;
    }
    if (n.parent < 0) {
      continue;
    }
    const Node& parent = node(n.parent);
    if (parent.refs == kIsUnused) {
      return "a node outlived its parent";
    }
    if (parent.refs < n.refs) {
      return "a node has more users than its parent";
    }
    if (n.page >= 0 && parent.page < 0) {
      return "a device node lies below a host node";
    }
    children[static_cast<size_t>(n.parent)] += 1;
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].refs != kIsUnused && children[i] != nodes_[i].num_children) {
      return "a child count is wrong";
    }
  }
  if (num_idle != device_.size + host_.size) {
    return "the idle lists miss nodes";
  }
  const char* wrong = check_list(device_, true);
  return wrong != nullptr ? wrong : check_list(host_, false);
}

const char* PrefixTree::check_list(const List& list, bool on_device) const {
  std::vector<int32_t> seen_children(nodes_.size(), 0);
  int32_t size = 0;
  for (int32_t id = list.head; id >= 0; id = node(id).newer, ++size) {
    if (size >= list.size) {
      return "an idle list is longer than its size";
    }
    const Node& n = node(id);
    if (n.refs != 0 || (n.page >= 0) != on_device) {
      return "a node is in the wrong list";
    }
    if (n.parent >= 0) {
      seen_children[static_cast<size_t>(n.parent)] += 1;
    }
    // Children in the same tier are idle too and must have come before; on the device, children may
    // also live on the host.
    if (!on_device && seen_children[static_cast<size_t>(id)] != n.num_children) {
      return "a parent precedes its child";
    }
  }
  return size == list.size ? nullptr : "an idle list is shorter than its size";
}

}  // namespace kt::sched
